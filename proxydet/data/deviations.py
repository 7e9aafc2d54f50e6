"""What annotation files do differently from their format, and what happens to each: one table for all readers.

Every deviation has one fate. *Mended*: the record is used, with the value that `then` names. *Dropped*: the record (or the
part that `field` names) is left out of training, evaluation and statistics. *Refused*: nothing is read, exit code 3.
*Noted*: used as written, because the official evaluators count it as it is and mending would change the numbers, and
reported because something is probably wrong. ``docs/reference/annotation-files.md`` shows
this table, and ``proxydet data check`` counts by it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from proxydet.errors import DataError

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
    "annotation.rle.size": ("annotation", "segmentation.size", "missing, or not the image's height and width", "mended", "the mask is left out, the box is used"),
    "annotation.rle.counts": ("annotation", "segmentation.counts", "damaged: the run lengths do not fill the image", "mended", "the mask is left out, the box is used"),
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

DAMAGED_MASK = ("annotation.segmentation", "annotation.rle.size", "annotation.rle.counts")
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
