"""Detections in columns: read, checked against the data set that they claim to be of, whatever file they came from.

Taken are LVIS's and COCO's results format, a list of ``{"image_id", "category_id", "score", "bbox": [x, y, width, height],
"segmentation": RLE or polygons}``, and an object that holds such a list as ``annotations`` or ``predictions`` next to its
own ``images`` and ``categories``, as ``proxydet predict --save coco`` writes it; plain or gzipped. Results of LVIS's
validation set are some gigabytes, so a file is read in blocks, each turned into columns before the next is read; of the
masks only those are kept that can be scored. What deviates from the format has the fate that `proxydet.data.records`
gives it, as in annotation files.

Dimensions: D detections, M distinct masks. Detections keep the order of their file: among equal scores in one image the
official evaluators count the earlier one first.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, compress, repeat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.data import masks
from proxydet.data.formats.coco import JsonText, encoded, no_garbage_collection
from proxydet.data.records import (
    DAMAGED_MASK,
    DEVIATIONS,
    BoxConvention,
    Identifier,
    StoreReport,
    Unusable,
    fit_by_convention,
    identifier,
    line_of,
    other_spelling,
    owners,
    refused,
)
from proxydet.errors import DataError
from proxydet.wording import first_of

if TYPE_CHECKING:
    from proxydet.evaluation.ground_truth import GroundTruth

_LOG = logging.getLogger(__name__)

Index: TypeAlias = Mapping[Identifier, int]
"""Ids of a file, and the number in the data set of what each names."""

_SHOWN = 5
_DEEPEST = 16
"""Folders of an image's path that are compared."""
_TOLERANCE_PIXELS = 1.0
_MOST_COMPARED, _FEWEST_AS_CORNERS, _MOSTLY = 2000, 3, 0.9
"""Detections, those of the highest score, whose boxes are compared with annotated ones; when corners are likely."""
_HINT = (
    "results are a JSON list of objects with image_id, category_id, score, and bbox or segmentation"
)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Detections of a data set, numbered as its :class:`~proxydet.evaluation.ground_truth.GroundTruth` numbers.

    Attributes:
        path: The file that they were read from; None for values.
        image_D: int64 in [0, I).
        category_D: int64 in [0, C).
        score_D: float64, finite.
        box_D4: float64, x, y, width, height in pixels of the original image.
        drawn_D: bool, whether the file has no box for a detection, so that it was drawn around the mask.
        mask_D: int64 in [0, M), which mask a detection has; -1 where it has none, or none was kept because its
            category is not judged in its image.
        masks: M compressed RLE masks (``size`` and ``counts``).
        mask_area_M: float64, pixels.
        without_mask: How many detections the file has no mask for.
        damaged_masks: How many have a mask that cannot be read; for masks they count as empty.
        report: What was mended and dropped.
    """

    path: Path | None
    image_D: NDArray[np.int64]
    category_D: NDArray[np.int64]
    score_D: NDArray[np.float64]
    box_D4: NDArray[np.float64]
    drawn_D: NDArray[np.bool_]
    mask_D: NDArray[np.int64]
    masks: list[dict[str, Any]] = field(repr=False)
    mask_area_M: NDArray[np.float64]
    without_mask: int
    damaged_masks: int = 0
    report: StoreReport = field(default_factory=StoreReport, repr=False)

    def __len__(self) -> int:
        return len(self.score_D)

    @property
    def has_masks(self) -> bool:
        """Whether masks can be scored: every detection has one."""
        return self.without_mask == 0

    def take(self, chosen: NDArray[np.int64]) -> Results:
        """Return the detections of the given numbers, in their file's order."""
        kept = np.sort(chosen)
        columns = ("image_D", "category_D", "score_D", "box_D4", "drawn_D", "mask_D")
        return replace(self, **{name: getattr(self, name)[kept] for name in columns})


def read_results(
    source: Path | str | list[dict[str, Any]] | dict[str, Any],
    truth: GroundTruth,
    *,
    keep_every_mask: bool = False,
    allow_outside: bool = False,
    allow_duplicates: bool = False,
) -> Results:
    """Read detections and check them against the data set that they claim to be of.

    Args:
        source: A results file, plain or gzipped JSON, or the same as Python values.
        truth: The data set.
        keep_every_mask: Keep masks that the protocol does not judge too; the official evaluator wants them.
        allow_outside: Accept boxes that reach out of their image by more than a pixel.
        allow_duplicates: Accept a file that holds every detection more than once.

    Raises:
        DataError: The file is damaged, or its detections cannot be of this data set; the message has the first
            offenders and their count. Or no detection is left, or none of its masks can be read.
    """
    path = None if isinstance(source, list | dict) else Path(source)
    name = str(path) if path is not None else "The detections given"
    content = encoded(source, name) if path is None else path
    reading = _Reading(
        truth=truth,
        path=path,
        name=name,
        allow_outside=allow_outside,
        known={"image_id": truth.image_index, "category_id": truth.category_index},
        dropped=truth.store.dropped_images,
    )
    report = reading.report
    parts: list[Results] = []
    with no_garbage_collection():
        text = JsonText(content, name, kind="a results file", hint=_HINT, report=report)
        rows, key = None, ""
        if text.start[:1] == b"{":
            lists = text.fields(_Object)
            key = "predictions" if lists.predictions != _ABSENT else "annotations"
            rows = cast(msgspec.Raw, getattr(lists, key))
            if bytes(memoryview(rows)[:1]) != b"[":
                raise text.error("it has no list of annotations or predictions")
            listed = _named(text, lists, "images", name)
            images, reading.dropped = _images_of(listed, truth, name, path)
            named = _named(text, lists, "categories", name)
            reading.known = {
                "image_id": images,
                "category_id": _categories_of(named, truth, name, path),
            }
            absent = len(truth.image_ids) - len({images.get(row.id, -1) for row in listed} - {-1})
            if listed and absent:
                _LOG.warning(
                    "%s: %d of the %d images of %s are not in its list of images: their objects count as missed",
                    name,
                    absent,
                    len(truth.image_ids),
                    truth.name,
                )
        for block in text.records(
            _Row, _loose_row, "detection.record", first=_Numbers, text=rows, field=key
        ):
            parts.append(_columns(block, reading, keep_every_mask))
            report.annotations_in += len(block)
    reading.refuse_if_needed()
    names = ("image_D", "category_D", "score_D", "box_D4", "drawn_D", "mask_area_M")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    first = accumulate((len(part.masks) for part in parts), initial=0)
    shifted = [
        np.where(p.mask_D < 0, -1, p.mask_D + at) for p, at in zip(parts, first, strict=False)
    ]
    results = Results(
        path=path,
        **columns,
        mask_D=np.concatenate(shifted),
        masks=[mask for part in parts for mask in part.masks],
        without_mask=sum(part.without_mask for part in parts),
        damaged_masks=sum(part.damaged_masks for part in parts),
        report=report,
    )
    report.annotations_kept = len(results)
    lines = report.lines("detection")
    if not report.annotations_in:
        _LOG.warning("%s: it holds no detection, so that every object counts as missed", name)
    elif not len(results):
        if key == "annotations" and report.counts.keys() == {"detection.score"}:
            raise text.error(
                "it looks like an annotation file, no entry has a score",
                "an annotation file goes with --data",
            )
        raise refused("detection.none", path, name, lines)
    if 2 * reading.masks_given > len(results) and not reading.masks_read:
        raise refused("file.masks", path, name, lines)
    for line in lines:
        _LOG.warning("%s: %s", name, line)
    if reading.convention.may_be_corners:
        _warn_of_corners(results, truth, name)
    if not allow_duplicates:
        _check_duplicates(results, truth)
    return results


_ABSENT = msgspec.Raw(b"")


class _Row(msgspec.Struct, gc=False):
    """One detection as results files spell it; the box is x, y, width, height in pixels. Other keys are ignored."""

    image_id: Identifier
    category_id: Identifier
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw = _ABSENT


_LARGEST_ID = 1 << 23
_Whole: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=_LARGEST_ID, multiple_of=1)]


class _Numbers(msgspec.Struct, gc=False, omit_defaults=True):
    """A detection with a box and small whole ids, which is what most files hold throughout."""

    image_id: _Whole
    category_id: _Whole
    score: float
    bbox: tuple[float, float, float, float]
    segmentation: msgspec.Raw = _ABSENT


# As MessagePack all detections without a mask are equally long: each number is 8 bytes behind a mark.
_packed = msgspec.msgpack.Encoder().encode
_SIDES = ("x", "y", "width", "height")
_EXAMPLE = _packed(_Numbers(0.0, 0.0, 0.0, (0.0, 0.0, 0.0, 0.0)))
_RECORD = np.dtype(
    {
        "names": ("image_id", "category_id", "score", *_SIDES),
        "formats": [">f8"] * 7,
        "offsets": [at + 1 for at, byte in enumerate(_EXAMPLE) if byte == 0xCB],
        "itemsize": len(_EXAMPLE),
    }
)


def _table(rows: list[_Numbers]) -> NDArray[Any] | None:
    """Return the numbers of detections, a column a field, without making Python objects of them; None where one has a mask."""
    text = _packed(rows)
    head = len(text) - len(rows) * _RECORD.itemsize
    return np.frombuffer(text, _RECORD, offset=head) if head <= 5 else None


_RUNS = msgspec.json.Decoder(list[masks.RunLengths])
# JSON of at most this length is not a mask: it is absent, null, or an empty list or object.
_SHORTEST_MASK = 4


def _loose_row(fields: dict[str, Any], which: str) -> _Row | Unusable:
    ids = owners(fields, which)
    if isinstance(ids, Unusable):
        return ids
    if not masks.are_numbers([fields.get("score")]):
        return Unusable("detection.score", which)
    box, mask = fields.get("bbox"), fields.get("segmentation")
    if box is not None:
        box = tuple(box) if masks.are_numbers(box, 4) else (math.nan,) * 4
    text = _ABSENT if mask is None else msgspec.Raw(json.dumps(mask).encode())
    return _Row(**ids, score=float(fields["score"]), bbox=box, segmentation=text)


# -- files with images and categories of their own --------------------------------------------------------------------


class _Named(msgspec.Struct, gc=False):
    id: Identifier
    file_name: str | None = None
    name: str | None = None


class _Object(msgspec.Struct, gc=False):
    annotations: msgspec.Raw = _ABSENT
    predictions: msgspec.Raw = _ABSENT
    images: msgspec.Raw = msgspec.Raw(b"[]")
    categories: msgspec.Raw = msgspec.Raw(b"[]")


def _named(text: JsonText, lists: _Object, key: str, name: str) -> list[_Named]:
    """Return the images or categories of a file; DataError where two have one id."""
    of = {"images": "image", "categories": "category"}[key]

    def loosely(fields: dict[str, Any], which: str) -> _Named | Unusable:
        own_id = identifier(fields.get("id"))
        if own_id is None:
            return Unusable("image.id" if of == "image" else "category.record", which)
        texts = {k: v for k in ("file_name", "name") if isinstance(v := fields.get(k), str)}
        return _Named(own_id, **texts)

    rows = []
    for record in chain.from_iterable(
        text.records(_Named, loosely, f"{of}.record", text=getattr(lists, key), field=key)
    ):
        if isinstance(record, Unusable):
            raise refused(record.deviation, text.path, name, [record.which])
        rows.append(record)
    repeated = [value for value, n in Counter(row.id for row in rows).items() if n > 1]
    if repeated:
        raise refused(f"{of}.id.repeated", text.path, name, repeated)
    return rows


def _images_of(
    images: list[_Named], truth: GroundTruth, called: str, path: Path | None
) -> tuple[Index, Set[Identifier]]:
    """Return which of the data set's images each image of the file is, and the ids of images that were dropped from it.

    By file name, or by id where the file has no names. A name may have more or fewer folders than the data set's, as long as only one image fits.
    """
    if not any(row.file_name for row in images):
        return truth.image_index, truth.store.dropped_images
    known: dict[tuple[str, ...], list[int]] = {}
    for number, name in enumerate(truth.image_names):
        parts = _parts(name)
        for depth in range(1, len(parts) + 1):
            known.setdefault(parts[-depth:], []).append(number)
    exact = {_parts(name): number for number, name in enumerate(truth.image_names)}
    dropped = {
        _parts(name)[-count:] for name in truth.store.dropped_names for count in range(1, _DEEPEST)
    }
    gone: set[Identifier] = set()
    found: dict[Identifier, int] = {}
    taken: dict[int, str] = {}
    for row in images:
        parts = _parts(row.file_name or "")
        tails = [parts[-count:] for count in range(len(parts), 0, -1)]
        # The longest name of the data set that this one ends with; else the only one that ends as this one does.
        fitting = next(([exact[tail]] for tail in tails if tail in exact), [])
        fitting = fitting or next((known[tail] for tail in tails if tail in known), [])
        if not fitting and not dropped.isdisjoint(tails):
            gone.add(row.id)
        if len(fitting) != 1:
            continue
        number = fitting[0]
        if number in taken:
            raise DataError(
                f"{called}: {taken[number]} and {row.file_name} are both the image "
                f"{truth.image_names[number]} of {truth.name}.",
                hint="predict each image once, or give its path as the annotation file does",
                path=path,
            )
        taken[number] = row.file_name or ""
        found[row.id] = number
    if not found and not gone:
        raise DataError(
            f"{called}: none of its {len(images)} images is in {truth.name} "
            f"({first_of([row.file_name for row in images])}).",
            hint="give the annotation file of these images with --data",
            path=path,
        )
    return found, gone


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts[-_DEEPEST:]


def _categories_of(
    categories: list[_Named], truth: GroundTruth, called: str, path: Path | None
) -> Index:
    """Return which of the data set's categories each category of the file is: by name, by id where it has none."""
    if not any(row.name for row in categories):
        return truth.category_index
    number_of: dict[str, int] = {}
    for spelled in (str.strip, lambda name: name.strip().replace("_", " ").casefold()):
        for number, name in enumerate(truth.category_names):
            number_of.setdefault(spelled(name), number)
    found: dict[Identifier, int] = {}
    for row in categories:
        name = (row.name or "").strip()
        place = number_of.get(name, number_of.get(name.replace("_", " ").casefold()))
        if place is not None:
            found[row.id] = place
    if not found:
        raise DataError(
            f"{called}: none of its {len(categories)} categories is in {truth.name} "
            f"({first_of([row.name for row in categories])}).",
            hint="predict with the class names of the annotation file",
            path=path,
        )
    return found


# -- from blocks to checked columns -----------------------------------------------------------------------------------


def _columns(
    block: list[_Row | _Numbers | Unusable],
    reading: _Reading,
    keep_every_mask: bool,
) -> Results:
    """Check detections, and return those that can be placed in the data set; what is wrong is noted in ``reading``."""
    truth, report = reading.truth, reading.report
    rows: list[Any] = block
    place_D = np.arange(report.annotations_in, report.annotations_in + len(block))
    table = None
    if block and type(block[0]) is _Numbers:  # then all are
        table = _table(rows) if block[0].segmentation is _ABSENT else None
    elif Unusable in set(map(type, block)):
        for record in block:
            if isinstance(record, Unusable):
                report.count(record.deviation, [record.which])
        place_D = place_D[[not isinstance(row, Unusable) for row in block]]
        rows = [row for row in block if not isinstance(row, Unusable)]
    reading.place_D = place_D
    texts: list[msgspec.Raw] = []
    masked_D, absent_D = np.zeros((2, len(rows)), dtype=bool)
    if table is not None:
        image_D = reading.numbers("image_id", table["image_id"])
        category_D = reading.numbers("category_id", table["category_id"])
        score_D = table["score"].astype(np.float64)
        box_D4 = np.stack([table[side] for side in _SIDES], axis=1, dtype=np.float64)
    else:
        image_D = reading.numbers("image_id", [row.image_id for row in rows])
        category_D = reading.numbers("category_id", [row.category_id for row in rows])
        score_D = np.array([row.score for row in rows], dtype=np.float64)
        texts = [row.segmentation for row in rows]
        if texts.count(_ABSENT) < len(rows):
            masked_D = (
                np.fromiter(map(len, texts), dtype=np.int64, count=len(rows)) > _SHORTEST_MASK
            )
        boxes = [row.bbox for row in rows]
        if None in boxes:
            absent_D = np.array([box is None for box in boxes])
            boxes = [box or (0.0, 0.0, 0.0, 0.0) for box in boxes]
        # By struct, which takes a third of the time of numpy's own ways.
        packed = struct.pack(f"{4 * len(rows)}d", *chain.from_iterable(boxes))
        box_D4 = np.frombuffer(bytearray(packed)).reshape(-1, 4)
    known_D = (image_D >= 0) & (category_D >= 0)
    sound_D = (box_D4[:, 2] >= 0) & (box_D4[:, 3] >= 0)
    for side_D in box_D4.T:  # by columns: numpy reduces along rows of four slowly
        sound_D &= np.abs(side_D) < masks.LARGEST_NUMBER
    drawn_D = absent_D | ~sound_D
    wanted_D = known_D & masked_D
    if not keep_every_mask and wanted_D.any():
        wanted_D[wanted_D] = truth.judges(image_D[wanted_D], category_D[wanted_D])
        wanted_D |= known_D & masked_D & drawn_D  # to draw their boxes
    mask_D, kept_masks, area_M = _masks(texts, np.flatnonzero(wanted_D), image_D, reading)
    damaged_D = wanted_D & (mask_D < 0)
    drawn = np.flatnonzero(drawn_D & (mask_D >= 0))
    if len(drawn):
        box_D4[drawn] = coco_mask.toBbox([kept_masks[index] for index in mask_D[drawn]])
    kept_D = known_D & ~(drawn_D & (damaged_D | ~masked_D))
    damaged_D &= kept_D
    # A mask that cannot be read finds nothing, in every engine: it is an empty one.
    for image in np.unique(image_D[damaged_D]).tolist() if damaged_D.any() else ():
        mask_D[damaged_D & (image_D == image)] = len(kept_masks)
        height, width = truth.image_sizes_I2[image].tolist()
        runs = {"size": [height, width], "counts": [height * width]}
        kept_masks.append(coco_mask.frPyObjects(runs, height, width))
    area_M = np.append(area_M, np.zeros(len(kept_masks) - len(area_M)))
    reading.count("annotation.bbox", np.flatnonzero(known_D & ~kept_D))
    reading.count("annotation.bbox.mask", np.flatnonzero(kept_D & ~sound_D))
    size_D2 = truth.image_sizes_I2[image_D]
    if not reading.allow_outside:
        reading.check_boxes(size_D2, box_D4, image_D, kept_D)
    given = np.flatnonzero(kept_D & ~drawn_D)
    every = len(given) == len(box_D4)
    reading.convention.add(*(box_D4, size_D2) if every else (box_D4[given], size_D2[given]))
    masked = given[mask_D[given] >= 0]
    masked = masked[area_M[mask_D[masked]] > 0][: reading.convention.compares]
    if len(masked):
        extents = coco_mask.toBbox([kept_masks[index] for index in mask_D[masked]])
        reading.convention.compare(box_D4[masked], extents)
    part = Results(
        path=reading.path,
        image_D=image_D,
        category_D=category_D,
        score_D=score_D,
        box_D4=box_D4,
        drawn_D=drawn_D,
        mask_D=mask_D,
        masks=kept_masks,
        mask_area_M=area_M,
        without_mask=int(np.count_nonzero(kept_D & ~masked_D)),
        damaged_masks=int(np.count_nonzero(damaged_D)),
    )
    return part if kept_D.all() else part.take(np.flatnonzero(kept_D))


def _masks(
    texts: list[msgspec.Raw],
    wanted: NDArray[np.int64],
    image_D: NDArray[np.int64],
    reading: _Reading,
) -> tuple[NDArray[np.int64], list[dict[str, Any]], NDArray[np.float64]]:
    """Return the number of each detection's mask (-1 where none can be read), the masks, and their areas."""
    mask_D = np.full(len(image_D), -1, dtype=np.int64)
    if not len(wanted):
        return mask_D, [], np.zeros(0)
    # Detections of one box share its mask: each is read once.
    known: dict[tuple[int, bytes], int] = {}
    images = image_D[wanted].tolist()
    numbers = [
        known.setdefault((image, bytes(texts[index])), len(known))
        for image, index in zip(images, wanted.tolist(), strict=True)
    ]
    try:
        values: list[Any] = _RUNS.decode(b"[" + b",".join([text for _, text in known]) + b"]")
    except (msgspec.MsgspecError, RecursionError, UnicodeError):  # of another spelling, or damaged
        values = [_json(text) for _, text in known]
    sizes = map(tuple, reading.truth.image_sizes_I2[[i for i, _ in known]].tolist())
    found_K: list[dict[str, Any]] = [
        {
            "size": size,
            "counts": value.counts.encode()
            if type(value) is masks.RunLengths and value.size == size and type(value.counts) is str
            else b"",
        }
        for value, size in zip(values, sizes, strict=True)
    ]
    deviating: dict[int, list[str]] = {}
    area_K, sound_K = masks.measure(found_K)
    # What is written as it should be, and sound, needs no closer reading.
    closer = np.flatnonzero(~sound_K)
    for number in closer.tolist():
        found = found_K[number]
        mask = masks.read(values[number], found["size"])
        found["counts"] = mask.counts or b""
        if mask.polygons:
            found["counts"] = masks.rasterize(mask.polygons, found["size"])
        if mask.deviations:
            deviating[number] = list(mask.deviations)
    area_K[closer], sound_K[closer] = masks.measure([found_K[number] for number in closer])
    for number in closer.tolist():
        if found_K[number]["counts"] and not sound_K[number]:
            deviating[number] = ["annotation.rle.counts"]
    place_K = np.where(sound_K, np.cumsum(sound_K) - 1, -1)
    mask_D[wanted] = place_K[numbers]
    rows_of: dict[str, list[int]] = {}
    if deviating:
        for row, number in zip(wanted.tolist(), numbers, strict=True):
            for key in deviating.get(number, ()):
                rows_of.setdefault(key, []).append(row)
    for key, rows in rows_of.items():
        reading.count(key, np.array(rows))
    damaged = {row for key in DAMAGED_MASK for row in rows_of.get(key, ())}
    reading.masks_read += int(np.count_nonzero(mask_D >= 0))
    reading.masks_given += int(np.count_nonzero(mask_D >= 0)) + len(damaged)
    return mask_D, list(compress(found_K, sound_K.tolist())), area_K[sound_K]


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # not a mask


# -- what is wrong ----------------------------------------------------------------------------------------------------

_REFUSED = ("detection.image_id.unknown", "detection.category_id.unknown", "detection.bbox.outside")


@dataclass
class _Reading:
    """What is found block by block, and reported at the end.

    Attributes:
        truth: The data set.
        path: The results file; None for values.
        name: What to call it.
        allow_outside: Whether boxes may reach out of their image.
        report: What deviates.
        place_D: Place in the file of each detection of the block that is being read.
        masks_given: Masks that were read, or are damaged.
        masks_read: Masks that were read.
        convention: What the boxes are: pixels, fractions or corners.
        known: By field, the ids that may stand in it.
        dropped: Ids of images that were dropped from the annotations.
        tables: By field, one more than the number of each small whole id; 0 of one that is not known.
        misspelled: Deviations of ids that are known when they are written as the other type.
    """

    truth: GroundTruth
    path: Path | None
    name: str
    allow_outside: bool
    known: dict[str, Index]
    report: StoreReport = field(default_factory=StoreReport)
    place_D: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    masks_given: int = 0
    masks_read: int = 0
    convention: BoxConvention = field(default_factory=partial(BoxConvention, exact=False))
    dropped: Set[Identifier] = frozenset()
    tables: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    misspelled: set[str] = field(default_factory=set)

    def count(
        self, key: str, rows: NDArray[np.int64], describe: Callable[[int], str] = lambda _: ""
    ) -> None:
        """Count detections of the block by their places in it; ``describe`` adds to the place in the file."""
        if len(rows):
            named = (
                f"position {self.place_D[row]}{describe(row)}" for row in rows[:_SHOWN].tolist()
            )
            self.report.count(key, chain(named, repeat("", max(0, len(rows) - _SHOWN))))

    def numbers(self, field: str, ids: NDArray[Any] | list[Any]) -> NDArray[np.int64]:
        """Return the number of each id; -1 for images or categories that the data set does not have, which is counted."""
        known = self.known[field]
        if isinstance(ids, np.ndarray):
            if field not in self.tables:
                small = [i for i in known if isinstance(i, int) and 0 <= i <= _LARGEST_ID]
                self.tables[field] = np.zeros(_LARGEST_ID + 1, dtype=np.int32)
                self.tables[field][small] = [known[i] + 1 for i in small]
            place_D = self.tables[field][ids.astype(np.int64)]
            if place_D.all():
                return np.subtract(place_D, 1, dtype=np.int64)
        else:
            with suppress(KeyError):
                return np.fromiter(map(known.__getitem__, ids), dtype=np.int64, count=len(ids))
        ids = [int(value) if isinstance(value, float) else value for value in ids]
        number_D = np.array([known.get(value, -1) for value in ids], dtype=np.int64)
        key = f"detection.{field}.unknown"
        wrong_D = number_D < 0
        if field == "image_id" and self.dropped:
            gone_D = wrong_D & np.array([value in self.dropped for value in ids])
            self.count("detection.image_id.dropped", np.flatnonzero(gone_D))
            wrong_D &= ~gone_D
        wrong = np.flatnonzero(wrong_D)
        if not len(wrong):
            return number_D
        self.count(key, wrong, lambda row: f": {field} {ids[row]!r}")
        if other_spelling(ids[wrong[0]]) in known:
            self.misspelled.add(key)
        return number_D

    def check_boxes(
        self,
        size_D2: NDArray[np.int64],
        box_D4: NDArray[np.float64],
        image_D: NDArray[np.int64],
        kept_D: NDArray[np.bool_],
    ) -> None:
        """Count boxes that reach out of their image by more than a pixel."""
        # By columns: numpy reduces along rows of four slowly.
        x_D, y_D, width_D, height_D = box_D4.T
        out_D = (x_D < -_TOLERANCE_PIXELS) | (y_D < -_TOLERANCE_PIXELS)
        out_D |= x_D + width_D > size_D2[:, 1] + _TOLERANCE_PIXELS
        out_D |= y_D + height_D > size_D2[:, 0] + _TOLERANCE_PIXELS

        def describe(row: int) -> str:
            sides = ", ".join(f"{side:g}" for side in box_D4[row])
            height, width = size_D2[row]
            image = self.truth.image_ids[image_D[row]]
            return f": [{sides}] in image {image!r} of width {width}, height {height}"

        self.count("detection.bbox.outside", np.flatnonzero(kept_D & out_D), describe)

    def refuse_if_needed(self) -> None:
        """Raise DataError where detections cannot be of this data set."""
        counts, total = self.report.counts, self.report.annotations_in
        deviation = self.convention.deviation()
        if deviation is not None:
            raise refused(deviation[0], self.path, self.name, [deviation[1]])
        found = [key for key in _REFUSED if key in counts]
        if not found:
            return
        lines = "; ".join(line_of(key, counts[key], self.report.examples[key]) for key in found)
        message, hint = f"{self.name}: of {total} detections, {lines}", DEVIATIONS[found[0]].then
        if found[0] in self.misspelled:
            hint = "the same ids are there as numbers or as text: write them as the annotation file does"
        elif found[0] != _REFUSED[-1] and counts[found[0]] > total / 2:
            message += f". These look like results of another data set than {self.truth.name}"
            hint = "evaluate with the annotation file of the data set that the detector ran on"
        raise DataError(message, hint=hint, path=self.path)


def _warn_of_corners(results: Results, truth: GroundTruth, name: str) -> None:
    """Warn where detections lie on objects only if their boxes are read as two corners; inside the image nothing else shows it."""
    given = np.flatnonzero(~results.drawn_D)
    most = min(_MOST_COMPARED, len(given))
    best = given[np.argpartition(-results.score_D[given], most - 1)[:most]] if most else given
    order = np.argsort(truth.ann_image_A, kind="stable")
    image_D = results.image_D[best]
    sorted_A = truth.ann_image_A[order]
    bounds = (np.searchsorted(sorted_A, image_D, side=side) for side in ("left", "right"))
    annotated = [truth.ann_box_A4[order[start:end]] for start, end in zip(*bounds, strict=True)]
    as_is, corners = fit_by_convention(results.box_D4[best], annotated)
    if corners >= _MOSTLY * (as_is + corners) and corners >= min(_FEWEST_AS_CORNERS, len(best)) > 0:
        _LOG.warning(
            "%s: bbox: of the %d boxes compared, %d lie on an annotated box read as [x1, y1, x2, y2], and %d as they are, "
            "[x, y, width, height]: if they are corners, subtract x1 from x2 and y1 from y2",
            name,
            len(best),
            corners,
            as_is,
        )


def _check_duplicates(results: Results, truth: GroundTruth) -> None:
    """Check that detections are not there twice, as when the files of several processes were joined carelessly.

    Raises:
        DataError: Every detection of every image occurs more than once, to the last digit. Where that is so in some of
            several images only, it is a warning.
    """
    columns = (results.category_D.astype(np.float64), results.score_D, *results.box_D4.T)
    key_D = fingerprint(results.image_D, *columns)
    order = np.sort(key_D)
    repeated = order[1:][order[1:] == order[:-1]]
    if not len(repeated):
        return
    images = len(truth.image_ids)
    repeated_D = np.isin(key_D, repeated)
    total_I = np.bincount(results.image_D, minlength=images)
    repeated_I = np.bincount(results.image_D[repeated_D], minlength=images)
    twice = np.flatnonzero((total_I > 0) & (total_I == repeated_I))
    if not len(twice):
        return
    shown = first_of([repr(truth.image_ids[index]) for index in twice])
    where = results.path or "The detections given"
    if len(twice) < np.count_nonzero(total_I):
        _LOG.warning(
            "%s: every detection of %d images occurs more than once (images %s); where files were joined, join each once",
            where,
            len(twice),
            shown,
        )
        return
    raise DataError(
        f"{where}: every detection of all {len(twice)} images occurs more than once (images {shown}).",
        hint="the files of several processes were probably joined twice: join each once, or score them as they are with "
        "--allow-duplicates",
        path=results.path,
    )


def fingerprint(image_D: NDArray[np.int64], *columns: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return one number a detection; equal for equal detections, and for others only by a chance of 2^-64."""
    key_D: NDArray[np.uint64] = image_D.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for column in columns:
        bits_D = np.ascontiguousarray(column + 0.0).view(np.uint64)
        key_D = (key_D ^ bits_D) * np.uint64(0xC2B2AE3D27D4EB4F)
        key_D ^= key_D >> np.uint64(29)
    return key_D
