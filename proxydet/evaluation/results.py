"""Detections in columns: read, checked against the data set that they claim to be of, whatever file they came from.

Taken are LVIS's and COCO's results format, a list of ``{"image_id", "category_id", "score", "bbox": [x, y, width, height],
"segmentation": RLE or polygons}``, and an object that holds such a list as ``annotations`` or ``predictions`` next to its
own ``images`` and ``categories``, as ``proxydet predict --save coco`` writes it; plain or gzipped. Results of LVIS's
validation set are some gigabytes, so a file is read in blocks, each turned into columns before the next is read; of the
masks only those are kept that can be scored.

Dimensions: D detections, M distinct masks. Detections keep the order of their file: among equal scores in one image the
official evaluators count the earlier one first.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.data.formats.records import Identifier
from proxydet.data.masks import are_numbers, compress, measure, polygon_fault, rasterize
from proxydet.errors import DataError
from proxydet.evaluation.ground_truth import GroundTruth

_LOG = logging.getLogger(__name__)

Index: TypeAlias = Mapping[Identifier, int]
"""Ids of a file, and the number in the data set of what each names."""

_BLOCK_BYTES = 4 * 2**20
_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{)")
_BOUNDARY_REACHES = (2**13, 2**20)
_BOUNDARIES_TRIED = 8
_NOT_FINITE = re.compile(rb"-?\b(?:NaN|Infinity)\b")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 5
_DEEPEST = 16
"""Folders of an image's path that are compared."""
_DIGITS = 20
_TOLERANCE_PIXELS = 1.0
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
            offenders and their count.
    """
    path = None if isinstance(source, list | dict) else Path(source)
    problems = _Problems(truth=truth, path=path, allow_outside=allow_outside)
    parts: list[Results] = []
    with _without_garbage_collector(), _opened(source) as stream:
        indexes: tuple[Index, Index] = truth.image_index, truth.category_index
        head, rows = stream.read(_BLOCK_BYTES), cast(IO[bytes], stream)
        if head.lstrip(b" \t\r\n")[:1] == b"{":
            content = _decode_object(head + stream.read(), path)
            indexes = _images_of(content, truth, path), _categories_of(content, truth, path)
            rows, head = io.BytesIO(content.rows), b""
        for block in _blocks(head, rows, path):
            parts.append(_columns(block, indexes, problems, keep_every_mask))
            problems.seen += len(block)
    problems.raise_if_any()
    results = _joined(path, parts)
    if not allow_duplicates:
        _check_duplicates(results, truth)
    return results


@contextlib.contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Keep the collector from walking over a million new objects, none of which is in a cycle, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# -- from bytes to blocks of rows -------------------------------------------------------------------------------------


class _Stream:
    """A file's bytes, unpacked when it is gzipped, without a byte order mark; DataError where it cannot be read."""

    def __init__(self, stream: IO[bytes], path: Path | None) -> None:
        self._stream = stream
        self._path = path
        self._at_start = True

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self._path} is a damaged or incomplete gzip file: {error}.",
                hint="copy or download the file again",
                path=self._path,
            ) from error
        except OSError as error:
            raise _unreadable(cast(Path, self._path), error) from error
        if self._at_start:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        self._at_start = False
        return data


@contextlib.contextmanager
def _opened(source: Path | str | list[dict[str, Any]] | dict[str, Any]) -> Iterator[_Stream]:
    if isinstance(source, list | dict):
        yield _Stream(io.BytesIO(json.dumps(source, default=_plain).encode()), None)
        return
    path = Path(source)
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        try:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
        except OSError as error:  # a folder, a pipe
            raise _unreadable(path, error) from error
        yield _Stream(cast(IO[bytes], gzip.GzipFile(fileobj=file)) if zipped else file, path)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"Cannot read {path}: {error.strerror or error}.",
        hint="check the path, and that you may read the file",
        path=path,
    )


def _plain(value: Any) -> Any:
    """Return what JSON has for numpy's numbers and arrays, and for the bytes of a mask."""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise DataError(
        f"Detections cannot hold a value of type {type(value).__name__}.",
        hint="give numbers, texts, lists and dictionaries",
    )


_ABSENT = msgspec.Raw(b"")


class _Row(msgspec.Struct, gc=False):
    """One detection as results files spell it; the box is x, y, width, height in pixels. Other keys are ignored."""

    image_id: int | float | str
    category_id: int | float | str
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw = _ABSENT


class _Runs(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str


_ROWS = msgspec.json.Decoder(list[_Row])
_RUNS = msgspec.json.Decoder(list[_Runs])
# JSON of at most this length is no mask: it is absent, null, or an empty list or object.
_SHORTEST_MASK = 4


def _blocks(head: bytes, stream: IO[bytes], path: Path | None) -> Iterator[list[_Row]]:
    """Decode a JSON list piece by piece: each piece ends where one element ends and the next begins.

    Args:
        head: What was read already.
        stream: Where the rest comes from.
        path: The file; None for values.
    """
    pending, done, size = head, 0, _BLOCK_BYTES
    while read := stream.read(size):
        pending += read
        for end, start in _boundaries(pending):
            rows = _decoded(pending[:end] + b"]", done, path, stream)
            if rows is not None:
                yield rows
                done, size = done + len(rows), _BLOCK_BYTES
                pending = b"[" + pending[start:]
                break
        else:  # cut inside of a long element: with ever more text, so that the whole is not decoded again and again
            size *= 2
    if not pending.strip():
        raise DataError(f"{path} is empty.", hint="write or copy the file again", path=path)
    yield _decoded(pending, done, path, None) or []


def _boundaries(text: bytes) -> list[tuple[int, int]]:
    """Return the last places where one object ends and the next begins, the last first."""
    found: list[tuple[int, int]] = []
    for reach in _BOUNDARY_REACHES:
        start = max(0, len(text) - reach)
        found = [(match.start() + 1, match.end()) for match in _BOUNDARY.finditer(text, start)]
        if len(found) >= _BOUNDARIES_TRIED:
            break
    return found[: -_BOUNDARIES_TRIED - 1 : -1]


def _decoded(
    text: bytes, done: int, path: Path | None, rest: IO[bytes] | None
) -> list[_Row] | None:
    """Decode a list of detections; None where it was cut inside of one of them.

    Args:
        text: The list.
        done: How many detections come before it.
        path: The file; None for values.
        rest: What follows; None at the end, where a cut is an error.
    """
    try:
        return _ROWS.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        if rest is not None and "truncated" in str(error):
            return None
        raise _damage(text, done, path, rest, error) from error


def _damage(
    text: bytes,
    done: int,
    path: Path | None,
    rest: IO[bytes] | None,
    error: msgspec.MsgspecError | RecursionError | UnicodeDecodeError,
) -> DataError:
    """Return the error for text that is not JSON, or not of the layout of results.

    Args:
        text: What could not be decoded.
        done: How many detections come before it.
        path: The file; None for values.
        rest: What follows; None at the end.
        error: What the decoder said.
    """
    where = str(path) if path is not None else "The detections given"
    detail = str(error)
    if isinstance(error, RecursionError):
        detail = "lists or objects are nested too deeply"
    elif isinstance(error, msgspec.ValidationError):
        detail = re.sub(r"\$\[(\d+)\]", lambda m: f"$[{int(m[1]) + done}]", detail, count=1)
    elif isinstance(error, msgspec.DecodeError):
        places = list(_NOT_FINITE.finditer(text))
        if places:  # Python writes NaN, and JSON does not have it
            shown = []
            for place in places[: _SHOWN + 1]:
                number = done + text.count(b'"image_id"', 0, place.start()) - 1
                shown.append(f"{place[0].decode()} in detection {number}")
            count = len(places)
            while rest is not None and (block := rest.read(_BLOCK_BYTES)):
                count += len(_NOT_FINITE.findall(block))
            return DataError(
                f"{where}: {count} numbers are not finite ({first_offenders(shown)}).",
                hint="the detector that made them diverged, or divided by zero: inspect its outputs on these images",
                path=path,
            )
        # A number or word that is cut short is malformed at its very end.
        if "truncated" in detail or f"(byte {len(text)})" in detail:
            return DataError(
                f"{where} ends in the middle of its JSON: it is cut short.",
                hint="the program that wrote it was stopped or the copy is incomplete: write or copy it again",
                path=path,
            )
        return DataError(f"{where} is not valid JSON: {detail}.", hint=_HINT, path=path)
    return DataError(
        f"{where} is not a list of detections in COCO's or LVIS's results format: {detail}.",
        hint=_HINT,
        path=path,
    )


# -- files with images and categories of their own --------------------------------------------------------------------


class _Named(msgspec.Struct, gc=False):
    id: int | float | str
    file_name: str | None = None
    name: str | None = None


class _Object(msgspec.Struct, gc=False):
    annotations: msgspec.Raw = _ABSENT
    predictions: msgspec.Raw = _ABSENT
    images: list[_Named] = []
    categories: list[_Named] = []

    @property
    def rows(self) -> bytes:
        """The list of detections, as JSON."""
        return bytes(self.predictions or self.annotations)


def _decode_object(data: bytes, path: Path | None) -> _Object:
    try:
        content = msgspec.json.decode(data, type=_Object)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _damage(data, 0, path, None, error) from error
    if content.rows[:1] != b"[":
        raise DataError(
            f"{path or 'The detections given'} is not a list of detections, nor an object with a list of "
            "predictions or annotations.",
            hint=_HINT,
            path=path,
        )
    return content


def _images_of(content: _Object, truth: GroundTruth, path: Path | None) -> Index:
    """Return which of the data set's images each image of the file is: by file name, by id where it has no names.

    A name may have more or fewer folders than the data set's, as long as only one image fits.
    """
    _unique_ids(content.images, "image", path)
    if not any(row.file_name for row in content.images):
        return truth.image_index
    known: dict[tuple[str, ...], list[int]] = {}
    for number, name in enumerate(truth.image_names):
        parts = _parts(name)
        for count in range(1, len(parts) + 1):
            known.setdefault(parts[-count:], []).append(number)
    exact = {_parts(name): number for number, name in enumerate(truth.image_names)}
    found: dict[Identifier, int] = {}
    taken: dict[int, str] = {}
    for row in content.images:
        parts = _parts(row.file_name or "")
        tails = [parts[-count:] for count in range(len(parts), 0, -1)]
        # The longest name of the data set that this one ends with; else the only one that ends as this one does.
        fitting = next(([exact[tail]] for tail in tails if tail in exact), [])
        fitting = fitting or next((known[tail] for tail in tails if tail in known), [])
        if len(fitting) != 1:
            continue
        number = fitting[0]
        if number in taken:
            raise DataError(
                f"{path or 'The detections given'}: {taken[number]} and {row.file_name} are both the image "
                f"{truth.image_names[number]} of {truth.name}.",
                hint="predict each image once, or give its path as the annotation file does",
                path=path,
            )
        taken[number] = row.file_name or ""
        found[cast(Identifier, row.id)] = number
    if not found:
        raise DataError(
            f"{path or 'The detections given'}: none of its {len(content.images)} images is in {truth.name} "
            f"({first_offenders([row.file_name for row in content.images])}).",
            hint="give the annotation file of these images with --data",
            path=path,
        )
    return found


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts[-_DEEPEST:]


def _unique_ids(rows: Sequence[_Named], what: str, path: Path | None) -> None:
    repeated = [value for value, n in Counter(row.id for row in rows).items() if n > 1]
    if repeated:
        raise DataError(
            f"{path or 'The detections given'}: {what} ids used more than once ({first_offenders(repeated)}).",
            hint="score each results file on its own, or give the joined ones ids that are unique",
            path=path,
        )


def _categories_of(content: _Object, truth: GroundTruth, path: Path | None) -> Index:
    """Return which of the data set's categories each category of the file is: by name, by id where it has none."""
    _unique_ids(content.categories, "category", path)
    if not any(row.name for row in content.categories):
        return truth.category_index
    number_of: dict[str, int] = {}
    for spelled in (str.strip, lambda name: name.strip().replace("_", " ").casefold()):
        for number, name in enumerate(truth.category_names):
            number_of.setdefault(spelled(name), number)
    found: dict[Identifier, int] = {}
    for row in content.categories:
        name = (row.name or "").strip()
        place = number_of.get(name, number_of.get(name.replace("_", " ").casefold()))
        if place is not None:
            found[cast(Identifier, row.id)] = place
    if not found:
        raise DataError(
            f"{path or 'The detections given'}: none of its {len(content.categories)} categories is in {truth.name} "
            f"({first_offenders([row.name for row in content.categories])}).",
            hint="predict with the class names of the annotation file",
            path=path,
        )
    return found


# -- from blocks to checked columns -----------------------------------------------------------------------------------


def _columns(
    rows: list[_Row], indexes: tuple[Index, Index], problems: _Problems, keep_every_mask: bool
) -> Results:
    """Check detections, and return those that can be placed in the data set; what is wrong is noted in ``problems``."""
    truth = problems.truth
    image_D = problems.numbers("image_id", [row.image_id for row in rows], indexes[0])
    category_D = problems.numbers("category_id", [row.category_id for row in rows], indexes[1])
    known_D = (image_D >= 0) & (category_D >= 0)
    texts = [row.segmentation for row in rows]
    masked_D = np.zeros(len(rows), dtype=bool)
    if texts.count(_ABSENT) < len(rows):  # not a file of boxes; comparing is faster than measuring
        masked_D = np.fromiter(map(len, texts), dtype=np.int64, count=len(rows)) > _SHORTEST_MASK
    boxes = [row.bbox for row in rows]
    drawn_D = np.zeros(len(rows), dtype=bool)
    if None in boxes:
        drawn_D = np.array([box is None for box in boxes])
        boxes = [box or (0.0, 0.0, 0.0, 0.0) for box in boxes]
    box_D4 = np.fromiter(
        chain.from_iterable(cast(Any, boxes)), dtype=np.float64, count=4 * len(rows)
    ).reshape(-1, 4)
    wanted_D = known_D & masked_D
    if not keep_every_mask and wanted_D.any():
        wanted_D[wanted_D] = truth.judged_IC[image_D[wanted_D], category_D[wanted_D]]
        wanted_D |= known_D & masked_D & drawn_D  # to draw their boxes
    mask_D, masks, area_M = _masks(texts, np.flatnonzero(wanted_D), image_D, problems)
    bare = np.flatnonzero(drawn_D & ~masked_D)
    problems.add("have neither a box nor a mask", bare, problems.name)
    drawn = np.flatnonzero(drawn_D & (mask_D >= 0))
    if len(drawn) and not problems.found:
        box_D4[drawn] = coco_mask.toBbox([masks[index] for index in mask_D[drawn]])
    problems.check_boxes(image_D, box_D4)
    part = Results(
        path=problems.path,
        image_D=image_D,
        category_D=category_D,
        score_D=np.array([row.score for row in rows], dtype=np.float64),
        box_D4=box_D4,
        drawn_D=drawn_D,
        mask_D=mask_D,
        masks=masks,
        mask_area_M=area_M,
        without_mask=int(np.count_nonzero(~masked_D)),
    )
    return part if known_D.all() else part.take(np.flatnonzero(known_D))


def _masks(
    texts: list[msgspec.Raw],
    wanted: NDArray[np.int64],
    image_D: NDArray[np.int64],
    problems: _Problems,
) -> tuple[NDArray[np.int64], list[dict[str, Any]], NDArray[np.float64]]:
    """Return the number of each detection's mask (-1 where it has none), the wanted masks, and their areas."""
    mask_D = np.full(len(texts), -1, dtype=np.int64)
    if not len(wanted):
        return mask_D, [], np.zeros(0)
    # Detections of one box share its mask: each is read once.
    known: dict[tuple[int, bytes], int] = {}
    images = image_D[wanted].tolist()
    numbers = [
        known.setdefault((image, bytes(texts[index])), len(known))
        for image, index in zip(images, wanted.tolist(), strict=True)
    ]
    mask_D[wanted] = number_W = np.array(numbers, dtype=np.int64)
    image_K = np.array([image for image, _ in known], dtype=np.int64)
    sizes_K2 = problems.truth.image_sizes_I2[image_K]
    masks: list[dict[str, Any]] = []
    faults: dict[int, str] = {}
    try:
        runs = _RUNS.decode(b"[" + b",".join(text for _, text in known) + b"]")
        masks = [{"size": list(mask.size), "counts": mask.counts.encode("ascii")} for mask in runs]
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        masks = []  # of another spelling, or damaged
        for number, ((_, text), size) in enumerate(zip(known, sizes_K2.tolist(), strict=True)):
            mask = _read_mask(text, size)
            if not isinstance(mask, dict):
                faults[number] = mask
                mask = {"size": size, "counts": b""}
            masks.append(mask)
    own_K2 = np.array([mask["size"] for mask in masks]).reshape(-1, 2)
    fits_K = (own_K2 == sizes_K2).all(axis=1)

    def other_size(index: int) -> str:
        height, width = own_K2[mask_D[index]]
        return f"{problems.name(index)}: {height:.0f} x {width:.0f}{problems.image(int(image_D[index]))}"

    problems.add(
        "have a mask that is not of their image's size", wanted[~fits_K[number_W]], other_size
    )
    fitting = np.flatnonzero(fits_K)  # the size of others may be beyond all bounds
    area_K = np.zeros(len(masks))
    area_K[fitting], sound = measure([masks[index] for index in fitting])
    for number in fitting[~sound].tolist():
        python = masks[number]["counts"][:2] in (b"b'", b'b"')
        faults.setdefault(
            number,
            "run lengths written as Python's b'...': write counts.decode()"
            if python
            else "run lengths that do not fill it",
        )
    faulty_K = np.zeros(len(masks), dtype=bool)
    faulty_K[list(faults)] = True

    def damaged(index: int) -> str:
        image_id = problems.truth.image_ids[image_D[index]]
        return f"{problems.name(index)} in image {image_id!r}: {faults[int(mask_D[index])]}"

    problems.add("have a damaged mask", wanted[faulty_K[number_W]], damaged)
    return mask_D, masks, area_K


def _read_mask(text: bytes, size: list[int]) -> dict[str, Any] | str:
    """Return a mask of any spelling as a compressed one, or what is wrong with it."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return "damaged JSON"
    height, width = size
    if isinstance(value, list):
        if are_numbers(value):
            return "a flat list of numbers where a list of polygons should be"
        if not all(are_numbers(polygon) for polygon in value):
            return "polygons that are not lists of numbers"
        fault = next(filter(None, map(polygon_fault, value)), "")
        return fault or {"size": size, "counts": rasterize(value, (height, width))}
    if not isinstance(value, dict) or not are_numbers(value.get("size"), 2):
        return "neither polygons nor run lengths with a size"
    counts = value.get("counts")
    if value["size"] != size:
        return {"size": value["size"], "counts": b""}
    if isinstance(counts, list):
        packed = compress(counts, (height, width))
        return (
            "run lengths that do not fill it"
            if packed is None
            else {"size": size, "counts": packed}
        )
    if not isinstance(counts, str):
        return "no run lengths"
    return {"size": size, "counts": counts.encode("ascii", "replace")}


def _joined(path: Path | None, parts: list[Results]) -> Results:
    before = np.cumsum([0] + [len(part.masks) for part in parts])

    def column(name: str, empty: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([empty, *(getattr(part, name) for part in parts)])

    none = np.zeros(0, dtype=np.int64)
    shifted = [
        np.where(part.mask_D < 0, -1, part.mask_D + shift)
        for part, shift in zip(parts, before, strict=False)
    ]
    return Results(
        path=path,
        image_D=column("image_D", none),
        category_D=column("category_D", none),
        score_D=column("score_D", np.zeros(0)),
        box_D4=column("box_D4", np.zeros((0, 4))),
        drawn_D=column("drawn_D", np.zeros(0, dtype=bool)),
        mask_D=np.concatenate([none, *shifted]),
        masks=[mask for part in parts for mask in part.masks],
        mask_area_M=column("mask_area_M", np.zeros(0)),
        without_mask=sum(part.without_mask for part in parts),
    )


# -- what is wrong ----------------------------------------------------------------------------------------------------

_HINTS = {
    "name images that the data set does not have": "give the results' own annotation file with --data",
    "name categories that the data set does not have": "category_id is the id of the annotation file, not a row number",
    "have a box with a side that is negative or not finite": "a box is x, y, width, height in pixels",
    "have a box that reaches out of their image": (
        "boxes are x, y, width, height in pixels of the original image; clip them, or accept them as they are with "
        "--allow-outside"
    ),
    "have neither a box nor a mask": "each detection needs a bbox, a segmentation, or both",
    "have a mask that is not of their image's size": "masks must be of the original image's height and width",
    "have a damaged mask": "segmentation is a run-length mask of the COCO tools or a list of polygons",
}


@dataclass
class _Problems:
    """What is wrong with detections, found block by block and reported at the end.

    Every check works on whole columns, counts the offenders, and keeps the first few for the message.

    Attributes:
        truth: The data set.
        path: The results file; None for values.
        allow_outside: Whether boxes may reach out of their image.
        seen: Detections before the block that is looked at.
    """

    truth: GroundTruth
    path: Path | None
    allow_outside: bool
    seen: int = 0
    _counts: dict[str, int] = field(default_factory=dict)
    _examples: dict[str, list[str]] = field(default_factory=dict)
    _misspelled: set[str] = field(default_factory=set)

    @property
    def found(self) -> bool:
        """Whether anything is wrong so far."""
        return bool(self._counts)

    def name(self, index: int) -> str:
        """Return what to call a detection of the block."""
        return f"detection {self.seen + index}"

    def image(self, index: int) -> str:
        """Return what to say of a detection's image."""
        if index < 0:
            return ""
        height, width = self.truth.image_sizes_I2[index]
        return f" in image {self.truth.image_ids[index]!r} of {height} x {width}"

    def add(self, kind: str, wrong: NDArray[Any], describe: Callable[[int], str]) -> None:
        """Note offenders of a kind that has a hint: their positions in the block, and text for the message."""
        if not len(wrong):
            return
        self._counts[kind] = self._counts.get(kind, 0) + len(wrong)
        examples = self._examples.setdefault(kind, [])
        examples.extend(describe(int(index)) for index in wrong[: _SHOWN - len(examples)])

    def numbers(self, key: str, ids: list[Any], known: Index) -> NDArray[np.int64]:
        """Return the number of each id; -1 for images or categories that the data set does not have, which is noted."""
        try:
            return np.fromiter(map(known.__getitem__, ids), dtype=np.int64, count=len(ids))
        except KeyError:
            number_D = np.array([known.get(value, -1) for value in ids], dtype=np.int64)
        wrong = np.flatnonzero(number_D < 0)
        plural = {"image_id": "images", "category_id": "categories"}[key]
        kind = f"name {plural} that the data set does not have"
        self.add(kind, wrong, lambda index: f"{self.name(index)}: {key} {ids[index]!r}")
        if _other_spelling(ids[wrong[0]]) in known:
            self._misspelled.add(kind)
        return number_D

    def check_boxes(self, image_D: NDArray[np.int64], box_D4: NDArray[np.float64]) -> None:
        """Note boxes with impossible sides, and those that reach out of their image by more than a pixel."""
        end_D2 = box_D4[:, :2] + box_D4[:, 2:]
        valid_D = (box_D4[:, 2] >= 0) & (box_D4[:, 3] >= 0) & np.isfinite(end_D2).all(axis=1)

        def describe(index: int) -> str:
            sides = ", ".join(f"{side:g}" for side in box_D4[index])
            return f"{self.name(index)}: [{sides}]{self.image(int(image_D[index]))}"

        kind = "have a box with a side that is negative or not finite"
        self.add(kind, np.flatnonzero(~valid_D), describe)
        if self.allow_outside:
            return
        limit_I2 = self.truth.image_sizes_I2[:, ::-1] + _TOLERANCE_PIXELS
        out_D2 = (end_D2 > limit_I2[image_D]) | (box_D4[:, :2] < -_TOLERANCE_PIXELS)
        outside_D = valid_D & (image_D >= 0) & (out_D2[:, 0] | out_D2[:, 1])
        self.add("have a box that reaches out of their image", np.flatnonzero(outside_D), describe)

    def raise_if_any(self) -> None:
        """Raise DataError for the first kind of problem found, naming the others."""
        found = [kind for kind in _HINTS if kind in self._counts]
        if not found:
            return
        kind = found[0]
        count = self._counts[kind]
        where = str(self.path) if self.path is not None else "The detections given"
        shown = "; ".join(self._examples[kind]) + ("; ..." if count > _SHOWN else "")
        message = f"{where}: {count} of {self.seen} detections {kind} ({shown})."
        for other in found[1:]:
            message += f" Also, {self._counts[other]} {other}."
        hint = _HINTS[kind]
        if kind in self._misspelled:
            hint = "the same ids are there as numbers or as text: write them as the annotation file does"
        elif kind.startswith("name") and count > self.seen / 2:
            message += f" These look like results of another data set than {self.truth.name}."
            hint = "evaluate with the annotation file of the data set that the detector ran on"
        raise DataError(message, hint=hint, path=self.path)


def _other_spelling(name: Any) -> Identifier | None:
    """Return a number's text, or a text's number; None where it has none."""
    if isinstance(name, str):
        return int(name) if name.isascii() and name.isdigit() and len(name) < _DIGITS else None
    return str(name)


def _check_duplicates(results: Results, truth: GroundTruth) -> None:
    """Check that detections are not there twice, as when the files of several processes were joined carelessly.

    Raises:
        DataError: Every detection of every image occurs more than once, to the last digit. Where that is so in some of
            several images only, it is a warning.
    """
    key_D = _fingerprint(results)
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
    shown = first_offenders([repr(truth.image_ids[index]) for index in twice], most=_SHOWN)
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


def _fingerprint(results: Results) -> NDArray[np.uint64]:
    """One number a detection; equal for equal detections, and for others only by a chance of 2^-64."""
    key_D: NDArray[np.uint64] = results.image_D.astype(np.uint64)
    key_D *= np.uint64(0x9E3779B97F4A7C15)
    columns = [results.category_D.astype(np.float64), results.score_D, *results.box_D4.T]
    for column in columns:
        bits_D = np.ascontiguousarray(column + 0.0).view(np.uint64)
        key_D = (key_D ^ bits_D) * np.uint64(0xC2B2AE3D27D4EB4F)
        key_D ^= key_D >> np.uint64(29)
    return key_D


def first_offenders(items: Sequence[object], *, most: int = _SHOWN) -> str:
    """Return the first few of ``items`` as text for an error message, with dots where there are more."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, ..."
