"""Records of annotations, as all readers give them, and what files do differently: one table for all formats.

Every deviation has one fate. *Mended*: the record is used, with the value that `then` names. *Dropped*: the record (or the
part that `field` names) is left out of training, evaluation and statistics. *Refused*: nothing is read, exit code 3.
*Noted*: used as written, because the official evaluators count it as it is and mending would change the numbers, and
reported because something is probably wrong. ``docs/reference/annotation-files.md`` shows
this table, and ``proxydet data check`` counts by it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.masks import RunLengths
from proxydet.errors import ConfigError, DataError
from proxydet.wording import counted

Identifier = int | str
_OwnId = (
    Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    | Annotated[str, msgspec.Meta(min_length=1)]
)
"""An id that others refer to, as columns hold it: a whole number of 64 bits, or a text that is not empty."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
MOST_CATEGORIES = 200_000
"""Categories of a file: ten times as many as any published vocabulary has."""
LABEL_LISTS = ("neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids")
"""Fields of images that list categories: LVIS's verified absent, LVIS's not exhaustively annotated, verified present."""


class ImageEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an image; other fields are skipped. Sizes in pixels."""

    id: _OwnId
    width: int
    height: int
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Identifier] | None = None
    not_exhaustive_category_ids: list[Identifier] | None = None
    pos_category_ids: list[Identifier] | None = None


class AnnotationEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an annotation; other fields are skipped. The box is x, y, width, height in pixels.

    Of a record that strict decoding refused, ``segmentation`` may be anything: `proxydet.data.masks.read` says what it is.
    """

    image_id: Identifier
    category_id: Identifier
    bbox: tuple[float, float, float, float] | None = None
    segmentation: list[list[float]] | RunLengths | None = None
    area: float | None = None
    iscrowd: int = 0
    ignore: int = 0
    id: Identifier | None = None


class CategoryEntry(msgspec.Struct, frozen=True):
    """What is read of a category; other fields are skipped."""

    id: _OwnId
    name: str
    frequency: str | None = None
    synset: str | None = None
    wnid: str | None = None
    freebase_id: str | None = None
    supercategory: str | None = None
    image_count: _Count | None = None
    instance_count: _Count | None = None
    synonyms: list[str] | None = None


# LVIS v0.5 names its images by the COCO 2014 release; the 2017 release that users have is in the address.
_COCO_2014_NAME = re.compile(r"COCO_(train|val|test)2014_")


def image_name(image: ImageEntry) -> str:
    """Return the path of an image below its root, empty where the record has none.

    ``file_name`` where there is one; LVIS v1 gives only an address, whose last two parts are folder and name.
    """
    name = (image.file_name or "").strip()
    if image.coco_url and (not name or _COCO_2014_NAME.search(name)):
        parts = PurePosixPath(urlsplit(image.coco_url).path).parts
        return "/".join(parts[-2:]).lstrip("/")
    return name


class Unusable(msgspec.Struct, frozen=True):
    """A record that is not read, by the key of its deviation in `DEVIATIONS`, which says what happens.

    Attributes:
        deviation: The key.
        which: Its id, or its position.
        file_name: Of an image, where it has one.
    """

    deviation: str
    which: str
    file_name: str = ""


Format = Literal[
    "COCO JSON", "Pascal VOC", "YOLO", "labelme", "VGG VIA", "CVAT XML", "Label Studio JSON"
]


class WithImages:
    """Something whose images are in one folder or several."""

    images: Path | tuple[Path, ...]

    @property
    def roots(self) -> tuple[Path, ...]:
        """The image folders."""
        return self.images if isinstance(self.images, tuple) else (self.images,)


@dataclass(frozen=True, kw_only=True)
class AnnotationSource(WithImages):
    """Annotations, and what of them is meant: the tables ``[train]``, ``[val]`` and ``[test]`` of a dataset config."""

    annotations: Path
    """A file or folder of any format of ``docs/reference/annotation-files.md``."""

    images: Path | tuple[Path, ...]
    """Folder of the images, or a list of folders that are searched in this order; without any, those next to annotations
    whose format has no rule for them and may not hold sizes."""

    part: str | None = None
    """Of annotations that hold several parts: ``train``, ``val`` or ``test`` of a YOLO ``data.yaml``, or a subset of a CVAT
    file (``val``: all subsets with a word for it, ``Validation`` and ``dev``). Without it all of them."""

    share: tuple[float, float] | None = None
    """From and to which fraction of the images, as ``[0.0, 0.8]`` and ``[0.8, 1.0]`` of annotations that are not split.
    A hash of each image's name and of ``seed`` decides their order."""

    seed: int = 0
    """Decides which images are in the ``share``."""

    format: Format | None = None
    """Name of the format; without it names and first bytes decide, when the annotations are opened."""

    reader: str | None = None
    """Python path of a reader of your own for ``annotations`` of another format, such as ``mypackage.formats:read``:
    a function of the file or folder and the folders of its images, ``read(path, images) -> Document``."""

    def __post_init__(self) -> None:
        if self.reader is not None and self.format is not None:
            raise ConfigError("format and reader exclude each other", hint="leave one out")
        if self.share is not None and not 0 <= self.share[0] < self.share[1] <= 1:
            low, high = self.share
            raise ConfigError(
                f"share must be two fractions from 0 to 1, the lower first, not [{low}, {high}]"
            )


@dataclass(frozen=True, kw_only=True)
class Document:
    """An annotation file, opened.

    Attributes:
        format: Name of the format, for people.
        categories: The categories, in the file's order.
        images: The images, in the file's order.
        annotations: Chunks of annotations, in the file's order.
        record: As of `StoreReport`.
        called: What to call the annotation of an id in messages; None calls it by the id.
    """

    format: str
    categories: list[CategoryEntry]
    images: list[ImageEntry | Unusable]
    annotations: Iterator[list[AnnotationEntry | Unusable]]
    record: str = "annotation"
    called: Callable[[Identifier], str] | None = None


def identifier(value: object) -> Identifier | None:
    """Return an id: a whole number of 64 bits, however it is spelt, or a text; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return value if isinstance(value, str) and value else None


def owners(fields: dict[str, Any], which: str) -> dict[str, Any] | Unusable:
    """Return ``image_id`` and ``category_id`` of a record, or the one of which they cannot be read."""
    found = {name: identifier(fields.get(name)) for name in ("image_id", "category_id")}
    missing = next((name for name, value in found.items() if value is None), None)
    return found if missing is None else Unusable(f"annotation.{missing}", which)


def other_spelling(value: Identifier) -> Identifier | None:
    """Return an id as the other type writes it, a number's text or a text's number; None where it has none."""
    if isinstance(value, int):
        return str(value)
    return int(value) if re.fullmatch(r"-?\d{1,18}", value.strip(), re.ASCII) else None


# --- Deviations ---------------------------------------------------------------------------------------------------------

Fate = Literal["mended", "dropped", "refused", "noted"]
_MOST_EXAMPLES = 5


class Deviation(NamedTuple):
    """One way in which a record deviates.

    Attributes:
        of: What deviates: ``file``, ``category``, ``image``, ``annotation`` or ``polygon``.
        field: The field of the record.
        what: What is wrong with it.
        fate: What happens.
        then: What is done instead, or what to do about it.
    """

    of: str
    field: str
    what: str
    fate: Fate
    then: str


_ROWS: dict[str, tuple[str, str, str, Fate, str]] = {
    # The file.
    "file.nan": ("file", "a number", "NaN or Infinity, which JSON does not have", "mended", "read as missing"),
    "file.text": ("file", "a text", "not UTF-8, or with half of a surrogate pair", "mended", "read with U+FFFD in its place: write the file as UTF-8"),
    "file.convention.xyxy": ("file", "bbox", "boxes are [x1, y1, x2, y2]", "refused", "write [x, y, width, height]: subtract x1 from x2 and y1 from y2"),
    "file.convention.fractions": ("file", "bbox", "boxes are fractions of the image", "refused", "write pixels: multiply by the image's width and height"),
    "file.convention.masks": ("file", "bbox", "most boxes are not where their own masks are (IoU below 0.5): percent, [cx, cy, w, h], [y, x, h, w] or of another image size", "refused", "write [x, y, width, height] in pixels, or remove 'bbox' to take the boxes from the masks"),
    "file.convention.pixels": ("file", "rows", "the numbers of most rows are above 1: pixels, not fractions of the image (YOLO)", "refused", "divide x and width by the image's width, y and height by its height"),
    "file.predictions": ("file", "predictions", "no task is annotated, and tasks have predictions (Label Studio)", "noted", "the predictions are read, as of a file of predict --save labelstudio"),
    "file.nc": ("file", "nc", "not the number of 'names' (YOLO)", "noted", "the classes are those of 'names'"),
    "file.masks": ("file", "segmentation", "most objects have one and none of them can be read", "refused", "correct the masks, or remove them to use the boxes only"),
    "file.crowds": ("file", "iscrowd", "every annotation is a crowd: nothing to train on or to score", "refused", "set iscrowd to 0 where an annotation is one object (CVAT writes 1 for every mask)"),
    "file.empty": ("file", "annotations", "no annotation is left to use", "refused", "add annotations, or correct those that were dropped"),
    "file.images": ("file", "images, categories", "no image or no category is left to use", "refused", "every image needs an id, a width and a height, every category an id and a name"),
    "file.categories": ("file", "categories", "more than 200,000", "refused", "leave out categories without objects"),
    # Categories.
    "category.record": ("category", "record", "not an object with an 'id' (whole number of 64 bits, or text) and a 'name' (text)", "refused", "give each category an id and a name"),
    "category.id.repeated": ("category", "id", "used by two categories", "refused", "give each category an id of its own"),
    "category.id.mixed": ("category", "id", "a number in some categories, a text in others", "refused", "write all category ids as numbers"),
    "category.name.repeated": ("category", "name", "used by two categories", "refused", "give each category a name of its own, or merge the two"),
    "category.name.empty": ("category", "name", "empty", "refused", "give each category a name"),
    "category.root": ("category", "supercategory", "a category without objects that is the supercategory of all others (Roboflow's root)", "dropped", "it is not a class"),
    "category.frequency": ("category", "frequency", "missing, while other categories have it", "mended", "taken from image_count, by LVIS's limits (r: 1-10, c: 11-100, f: more)"),
    "category.field": ("category", "frequency, synset, image_count, ...", "of another type", "mended", "read as missing"),
    # Images.
    "image.record": ("image", "record", "not an object, or longer than 32 MB", "dropped", ""),
    "image.id": ("image", "id", "missing, or neither a whole number of 64 bits nor a text", "dropped", ""),
    "image.id.mixed": ("image", "id", "a number in some images, a text in others", "refused", "write all image ids as numbers"),
    "image.id.again": ("image", "id", "two entries for one image, equal in name and size", "dropped", "the first is used"),
    "image.id.repeated": ("image", "id", "used by two images", "refused", "give each image an id of its own"),
    "image.size": ("image", "width, height", "missing, not a positive whole number, or above 2,147,483,647 pixels", "dropped", "write the image's size in pixels"),
    "image.file": ("image", "the image", "not there or not readable, and the format does not hold its size (YOLO, VGG VIA)", "dropped", "put the image back, or name its folder with 'images'"),
    "image.unlabelled": ("image", "rows", "no file of rows (YOLO)", "noted", "used as an image without objects"),
    "image.unannotated": ("image", "annotations", "not annotated yet (Label Studio: none submitted)", "dropped", ""),
    "image.annotations": ("image", "annotations", "annotated more than once (Label Studio)", "noted", "the ground truth is used, else the newest annotation"),
    "image.name.repeated": ("image", "file_name", "two images name one file", "refused", "which objects belong to the file is not known: name each image's own file, with its folder"),
    "image.name": ("image", "file_name", "missing, and no coco_url", "noted", "the image cannot be read: it is scored with --results, not trained on"),
    "image.list": ("image", "neg_category_ids, ...", "names a category that the file does not have", "mended", "that entry is left out"),
    "image.list.type": ("image", "neg_category_ids, ...", "not a list of category ids", "mended", "read as missing"),
    # Annotations.
    "annotation.record": ("annotation", "record", "not an object, or longer than 32 MB", "dropped", ""),
    "annotation.id": ("annotation", "id", "missing, repeated, or not a whole number of 64 bits", "mended", "a new id"),
    "annotation.image_id": ("annotation", "image_id", "missing, or neither a whole number nor a text", "dropped", ""),
    "annotation.image_id.type": ("annotation", "image_id", "a text where the image's id is a number, or the reverse", "refused", "write image_id as images[].id is written"),
    "annotation.image_id.unknown": ("annotation", "image_id", "names an image that the file does not have", "dropped", ""),
    "annotation.image_id.dropped": ("annotation", "image_id", "names an image that was dropped", "dropped", ""),
    "annotation.category_id": ("annotation", "category_id", "missing, or neither a whole number nor a text (Pascal VOC: an empty name)", "dropped", ""),
    "annotation.category_id.type": ("annotation", "category_id", "a text where the category's id is a number, or the reverse", "refused", "write category_id as categories[].id is written"),
    "annotation.category_id.unknown": ("annotation", "category_id", "names a category that the file does not have", "dropped", ""),
    "annotation.row": ("annotation", "row", "not a class number with 4 numbers of a box or 6 and more of an outline (YOLO)", "dropped", ""),
    "annotation.row.class": ("annotation", "row", "a class number that data.yaml or classes.txt does not name (YOLO)", "dropped", "add the class's name"),
    "annotation.shape": ("annotation", "shape", "a point, a line, or of an unknown kind: without an area", "dropped", ""),
    "annotation.rotation": ("annotation", "rotation", "a box that is turned", "mended", "read as the upright box around it"),
    "annotation.bbox.mask": ("annotation", "bbox", "missing, not 4 numbers below 1e9, or without extent", "mended", "taken from the mask"),
    "annotation.bbox": ("annotation", "bbox", "missing, not 4 numbers below 1e9, or of negative extent, and no mask to take it from", "dropped", ""),
    "annotation.bbox.extent": ("annotation", "bbox", "without extent (width or height 0)", "noted", "counted in scoring as the official evaluators count it, not trained on"),
    "annotation.bbox.outside": ("annotation", "bbox", "outside the image", "noted", "counted in scoring as the official evaluators count it, not trained on"),
    "annotation.bbox.clipped": ("annotation", "bbox", "reaches out of the image by a pixel or more", "mended", "clipped for training"),
    "annotation.area": ("annotation", "area", "missing, negative, or not a finite number", "mended", "the box's"),
    "annotation.area.large": ("annotation", "area", "larger than the box", "noted", "size classes (small, medium, large) go by it"),
    "annotation.iscrowd": ("annotation", "iscrowd", "not 0 or 1", "mended", "read as a truth value; null and \"0\" are 0"),
    "annotation.segmentation.flat": ("annotation", "segmentation", "one flat list of numbers (VGG VIA), or lists of points", "mended", "read as one polygon"),
    "annotation.segmentation.bytes": ("annotation", "segmentation", "run lengths written as Python's b'...'", "mended", "read without the quotes"),
    "annotation.segmentation": ("annotation", "segmentation", "neither polygons nor run lengths", "mended", "the mask is left out, the box is used"),
    "annotation.segmentation.polygons": ("annotation", "segmentation", "none of its polygons has 3 points or more, finite numbers, and coordinates within 100,000 pixels", "mended", "the mask is left out, the box is used"),
    "annotation.rle.size": ("annotation", "segmentation.size", "missing, or not the image's height and width", "mended", "the mask is left out, the box is used"),
    "annotation.rle.counts": ("annotation", "segmentation.counts", "damaged: the run lengths do not fill the image, or the mask cannot be decoded", "mended", "the mask is left out, the box is used"),
    "annotation.crowds": ("annotation", "iscrowd", "1 on more than a tenth of the annotations", "noted", "crowds are not trained on and not scored: set iscrowd to 0 where an annotation is one object"),
    "polygon.points": ("polygon", "segmentation", "fewer than 3 points, or an odd number of coordinates", "mended", "the polygon is left out"),
    "polygon.numbers": ("polygon", "segmentation", "coordinates that are not finite numbers", "mended", "the polygon is left out"),
    "polygon.far": ("polygon", "segmentation", "a coordinate beyond 100,000 pixels, or an outline longer than 1,000,000", "mended", "the polygon is left out"),
    # Detections of results files; ids, boxes and masks are read as those of annotations.
    "detection.record": ("detection", "record", "not an object, or longer than 32 MB", "dropped", ""),
    "detection.image_id.dropped": ("detection", "image_id", "names an image that was dropped from the annotations", "dropped", ""),
    "detection.score": ("detection", "score", "missing, or not a finite number", "dropped", ""),
    "detection.image_id.unknown": ("detection", "image_id", "names an image that the data set does not have", "refused", "give the results' own annotation file with --data"),
    "detection.category_id.unknown": ("detection", "category_id", "names a category that the data set does not have", "refused", "category_id is the id of the annotation file, not a row number"),
    "detection.bbox.outside": ("detection", "bbox", "reaches out of the image by more than a pixel", "refused", "boxes are x, y, width, height in pixels of the original image; clip them, or accept them as they are with --allow-outside"),
    "detection.none": ("file", "detections", "no detection is left to score", "refused", "each needs image_id, category_id, score, and bbox or segmentation"),
}  # fmt: skip
DEVIATIONS = {key: Deviation(*row) for key, row in _ROWS.items()}
"""Every deviation, by its key."""

FIELDS: dict[str, dict[str, str]] = {
    "object": {
        "bbox": "bndbox",
        "category_id": "name",
        "file_name": "filename",
        "width, height": "size/width, size/height",
    },
    "row": {"bbox": "cx, cy, w, h", "category_id": "class", "segmentation": "outline"},
    "shape": {"bbox": "shape", "category_id": "label", "segmentation": "points"},
    "region": {"bbox": "region", "category_id": "label", "segmentation": "points"},
}
"""What formats call the fields of `DEVIATIONS`, by what they call an annotation."""

DAMAGED_MASK = (
    "annotation.segmentation",
    "annotation.segmentation.polygons",
    "annotation.rle.size",
    "annotation.rle.counts",
)
"""Deviations that cost an annotation its mask."""


class StoreReport(msgspec.Struct, kw_only=True):
    """Counts of what was read, kept, dropped and mended.

    It always holds that ``images_in`` is ``images_kept`` plus the images dropped, and the same for annotations.

    Attributes:
        images_in: Image records in the file.
        images_kept: Images in the store.
        annotations_in: Annotation records in the file.
        annotations_kept: Annotations in the store.
        crowds: Annotations kept that stand for a group.
        without_mask: Annotations kept that have a box and no mask.
        record: What the format calls an annotation: ``annotation``, or a key of `FIELDS`.
        counts: Number of records by deviation.
        examples: The first few ids (or positions in the file) for each of them.
    """

    images_in: int = 0
    images_kept: int = 0
    annotations_in: int = 0
    annotations_kept: int = 0
    crowds: int = 0
    without_mask: int = 0
    record: str = "annotation"
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}

    def count(self, key: str, which: Iterable[object]) -> None:
        """Count records.

        Args:
            key: The deviation.
            which: Their ids, or ``position N`` where they have none.
        """
        items = list(which)
        if items:
            self.counts[key] = self.counts.get(key, 0) + len(items)
            shown = self.examples.setdefault(key, [])
            shown += [str(item)[:80] for item in items[: _MOST_EXAMPLES - len(shown)]]

    def by_fate(self) -> list[str]:
        """Return the deviations that were found, what is dropped first."""
        order = ("dropped", "mended", "noted", "refused")
        return sorted(self.counts, key=lambda key: (order.index(DEVIATIONS[key].fate), key))

    def summary(self, source: object) -> list[str]:
        """Return one line of text that counts what `lines` names one by one; none where nothing deviates.

        Args:
            source: The file, as a command line names it.
        """
        fates: dict[str, int] = {}
        for key in self.by_fate():
            fate = DEVIATIONS[key].fate
            fates[fate] = fates.get(fate, 0) + self.counts[key]
        if not fates:
            return []
        counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
        return [f"{counts} (proxydet data check {shlex.quote(str(source))} says what and why)"]

    def lines(self, record: str = "") -> list[str]:
        """Return one line of text for each deviation, what is dropped first; ``record`` as for `line_of`, else the format's."""
        called = record or self.record
        return [
            line_of(key, self.counts[key], self.examples[key], called) for key in self.by_fate()
        ]


def line_of(key: str, count: int, examples: Iterable[str], record: str = "annotation") -> str:
    """Return a deviation as text: how many of what, the fate, the field, why, and the first few.

    Args:
        key: The deviation.
        count: How many records.
        examples: What to call the first few of them.
        record: ``annotation``, a key of `FIELDS`, or ``detection`` for those of a results file.
    """
    what = DEVIATIONS[key]
    nouns = {"category": "categories"}
    of = record if what.of == "annotation" else what.of
    noun = of if count == 1 else nouns.get(of, of + "s")
    if what.of == "file":
        noun = "place in the file" if count == 1 else "places in the file"
    then = f" ({what.then})" if what.then and what.fate != "refused" else ""
    shown = list(examples)
    ids = f"; e.g. {', '.join(shown)}" if shown else ""
    field = FIELDS.get(record, {}).get(what.field, what.field)
    return f"{count} {noun} {what.fate}: {field} {what.what}{then}{ids}"


def refused(
    key: str,
    path: Path | None,
    name: str,
    examples: Iterable[object] = (),
    record: str = "annotation",
) -> DataError:
    """Return the error of a file that is refused.

    Args:
        key: The deviation.
        path: The file; None for values.
        name: What to call the file.
        examples: The first few offenders, as text.
        record: As for `line_of`.
    """
    what = DEVIATIONS[key]
    shown = [str(item)[:200] for item in examples]
    ids = f" ({', '.join(shown[:_MOST_EXAMPLES])}{', ...' if len(shown) > _MOST_EXAMPLES else ''})"
    of = "" if what.of == "file" else f"{what.of} "
    field = FIELDS.get(record, {}).get(what.field, what.field)
    message = f"{name}: {of}{field}: {what.what}{ids if shown else ''}"
    return DataError(message, hint=what.then, path=path)


# --- Conventions of boxes ------------------------------------------------------------------------------------------------

_MOST_COMPARED = 2000
"""Boxes, the first of the file, that are compared with their own masks."""
_ALL = 0.95
_MOST = 0.9
_FEWEST = 3
_FITS = 0.5
"""IoU of a box with its mask's box: from here on the two are of one object."""
_SMALLEST_IMAGE = 2


class BoxConvention:
    """Counts, block by block, what boxes would be in each convention; a few outliers decide nothing.

    Annotations and results are both read with it. Dimensions: N boxes of a block.

    Args:
        exact: Whether masks fill their boxes, as annotated ones do; of detections either may be far off.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._fits, self._apart = (0.9, 0.25) if exact else (_FITS, 0.05)
        self._boxes = self._fractions = self._beyond = self._corners = 0
        self._compared = self._differing = self._better_as_corners = self._unlike = 0

    def add(self, xywh_N4: npt.NDArray[np.float64], size_N2: npt.NDArray[np.integer]) -> None:
        """Count boxes; those that are not finite or without extent say nothing.

        Args:
            xywh_N4: The four numbers of each box as the file has them.
            size_N2: Height and width of each box's image, pixels.
        """
        # By columns: numpy reduces along rows of four slowly.
        x_N, y_N, w_N, h_N = xywh_N4.T
        width_N, height_N = size_N2[:, 1], size_N2[:, 0]
        telling_N = (w_N > 0) & (h_N > 0)
        for side_N in (x_N, y_N, w_N, h_N):
            telling_N &= np.isfinite(side_N)
        self._boxes += int(telling_N.sum())
        in_unit_N = (x_N >= 0) & (y_N >= 0)
        for side_N in (x_N, y_N, w_N, h_N):
            in_unit_N &= side_N < 1.001
        in_unit_N &= (width_N > _SMALLEST_IMAGE) & (height_N > _SMALLEST_IMAGE)
        self._fractions += int((in_unit_N & telling_N).sum())
        beyond_N = (x_N + w_N > width_N + 1) | (y_N + h_N > height_N + 1)
        self._beyond += int((beyond_N & telling_N).sum())
        ordered_N = (w_N > x_N) & (h_N > y_N) & (w_N <= width_N + 1) & (h_N <= height_N + 1)
        self._corners += int((ordered_N & telling_N).sum())

    @property
    def may_be_corners(self) -> bool:
        """Whether at least half of the boxes could be read as two corners."""
        return 2 * self._corners >= self._boxes

    @property
    def compares(self) -> int:
        """How many more boxes are to be compared with their masks."""
        return _MOST_COMPARED - self._compared

    def compare(self, xywh_N4: npt.NDArray[np.float64], extent_N4: npt.NDArray[np.float64]) -> None:
        """Count how boxes overlap the extents of their own masks, as they are and read as two corners.

        Args:
            xywh_N4: The four numbers of each box as the file has them, finite.
            extent_N4: x, y, width, height of the mask of each, pixels.
        """
        as_is_N = _overlap(xywh_N4, extent_N4)
        sides_N2 = np.maximum(xywh_N4[:, 2:] - xywh_N4[:, :2], 0)
        as_corners_N = _overlap(np.concatenate([xywh_N4[:, :2], sides_N2], axis=1), extent_N4)
        self._compared += len(xywh_N4)
        self._differing += int((np.abs(as_is_N - as_corners_N) > self._apart).sum())
        better_N = (as_corners_N > as_is_N + self._apart) & (as_corners_N > self._fits)
        self._better_as_corners += int(better_N.sum())
        self._unlike += int((as_is_N < _FITS).sum())

    def deviation(self) -> tuple[str, str] | None:
        """Return the deviation that most boxes show, and how many of how many do; None where they are as they should be."""
        if self._boxes and self._fractions >= _ALL * self._boxes:
            return (
                "file.convention.fractions",
                f"{self._fractions} of {counted(self._boxes, 'box', 'boxes')}",
            )
        number, total = self._corners, self._boxes
        if self._differing >= (1 if self._exact else _FEWEST):  # masks decide
            number, total = self._better_as_corners, self._differing
            corners = number >= _MOST * total
        else:
            corners = total >= _FEWEST and self._beyond > total / 2 and number >= _ALL * total
        if corners:
            return "file.convention.xyxy", f"{number} of {counted(total, 'box', 'boxes')}"
        if self._exact and self._compared >= _FEWEST and self._unlike > self._compared / 2:
            return (
                "file.convention.masks",
                f"{self._unlike} of {counted(self._compared, 'box', 'boxes')}",
            )
        return None


def fit_by_convention(
    xywh_N4: npt.NDArray[np.float64], annotated: Sequence[npt.NDArray[np.float64]]
) -> tuple[int, int]:
    """Count the detections that fit an annotated box of their image in one convention only.

    Args:
        xywh_N4: The four numbers of each detection's box as the file has them.
        annotated: For each detection x, y, width, height of the annotated boxes of its image: float64 (A, 4), pixels.

    Returns:
        How many fit as they are, and how many read as two corners.
    """
    sides_N2 = np.maximum(xywh_N4[:, 2:] - xywh_N4[:, :2], 0)
    corners_N4 = np.concatenate([xywh_N4[:, :2], sides_N2], axis=1)
    # One row a pair of a detection and an annotated box of its image.
    row_P = np.repeat(np.arange(len(annotated)), [len(boxes_A4) for boxes_A4 in annotated])
    boxes_P4 = np.concatenate([np.zeros((0, 4)), *annotated])
    as_is_N, as_corners_N = (
        np.bincount(row_P, _overlap(read_N4[row_P], boxes_P4) >= _FITS, len(annotated)) > 0
        for read_N4 in (xywh_N4, corners_N4)
    )
    return int((as_is_N & ~as_corners_N).sum()), int((as_corners_N & ~as_is_N).sum())


def _overlap(
    first_N4: npt.NDArray[np.float64], second_N4: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the IoU of each pair of boxes (x, y, width, height)."""
    low_N2 = np.maximum(first_N4[:, :2], second_N4[:, :2])
    ends = [boxes_N4[:, :2] + boxes_N4[:, 2:] for boxes_N4 in (first_N4, second_N4)]
    common_N = np.maximum(np.minimum(*ends) - low_N2, 0).prod(axis=1)
    union_N = first_N4[:, 2:].prod(axis=1) + second_N4[:, 2:].prod(axis=1) - common_N
    overlap_N: npt.NDArray[np.float64] = common_N / np.maximum(union_N, 1e-9)
    return overlap_N
