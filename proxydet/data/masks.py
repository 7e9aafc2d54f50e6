"""Masks of annotations and of results: run lengths (COCO's RLE) and polygons, checked before compiled code sees them.

An RLE is ``{"size": [height, width], "counts": bytes}``: the lengths of alternating runs of 0 and 1 down the columns,
each but the first three as the difference to the run before the last, in groups of five bits, the lowest first, one
character a group from ``0`` on; a sixth bit says that more follow (the format of the COCO tools).

The COCO tools trust what they are given: a polygon with one coordinate of 1e8 makes them allocate 20 GB, and run lengths
that do not add up make them read and write outside their buffers. The bounds here keep both away from them.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

LARGEST_NUMBER = 1e9
"""Pixels: numbers of boxes beyond it are read as missing."""
LARGEST_COORDINATE = 100_000.0
"""Pixels, either way: polygons that reach beyond it are not read."""
LONGEST_OUTLINE = 1_000_000.0
"""Pixels: longest outline of a polygon. The COCO tools need about 80 bytes a pixel of it."""
LARGEST_IMAGE = 2**31 - 1
"""Pixels: largest height times width that run lengths can count."""

Outline: TypeAlias = Sequence[float] | NDArray[np.float64]
"""Numbers x, y, x, y, ... in pixels."""

_BYTES_LITERAL = re.compile(r"""b'(?:[^'\\\n]|\\[ -~])*'|b"(?:[^"\\\n]|\\[ -~])*\"""")
_TOLERANCE = 0.2
"""Pixels by which a polygon may miss the outline that it simplifies."""
_FIRST = 48
_LAST = 48 + 63
_BATCH = 500
"""Masks at once: few enough that their runs stay in the processor's cache."""
_LONGEST = 6
"""Groups of a number: 30 bits with its sign, more than an image of half a billion pixels needs."""


def are_numbers(value: object, length: int | None = None) -> TypeGuard[list[float]]:
    """Whether a decoded JSON value is a list of finite numbers, of ``length`` where that is given."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(
            isinstance(x, (int, float))
            and not isinstance(x, bool)
            and -1e300 < x < 1e300  # false for NaN too
            for x in value
        )
    )


def rasterize(polygons: Sequence[Outline], size: tuple[int, int]) -> bytes:
    """Return the union of polygons as `rasterize_all` does."""
    return rasterize_all([polygons], size)[0]


def rasterize_all(shapes: Sequence[Sequence[Outline]], size: tuple[int, int]) -> list[bytes]:
    """Return masks as RLE counts, each the union of polygons, drawn as the COCO tools draw it.

    Args:
        shapes: The polygons of each mask, at least one, as `read` or the store gives them.
        size: Height and width of the image.
    """
    pieces = iter(coco_mask.frPyObjects([polygon for shape in shapes for polygon in shape], *size))
    masks = [[next(pieces) for _ in shape] for shape in shapes]
    return [(mask[0] if len(mask) == 1 else coco_mask.merge(mask))["counts"] for mask in masks]


def crop_polygons(
    shapes: Sequence[Sequence[NDArray[np.float64]]], boxes_N4: NDArray[np.float32], side: int
) -> NDArray[np.bool_]:
    """Return what boxes cut out of masks, resized to a square: the values of detectron2's ``PolygonMasks``, all in one call.

    Args:
        shapes: The polygons of each mask, x, y, x, y, ... in pixels; a mask without any is empty.
        boxes_N4: The box of each, xyxy in pixels; a side below 0.1 counts as 0.1.
        side: Of the square, in pixels.

    Returns:
        (N, side, side).
    """
    masks_NSS = np.zeros((len(shapes), side, side), dtype=np.bool_)
    drawn = np.flatnonzero([len(shape) for shape in shapes])
    if not len(drawn):
        return masks_NSS
    polygons = [polygon for shape in shapes for polygon in shape]
    extent_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    # The quotient of a box is single precision, as detectron2 computes it.
    scale_N2 = np.float32(side) / np.maximum(extent_N2, np.float32(0.1))
    points = [sum(len(polygon) // 2 for polygon in shape) for shape in shapes]
    moved_P2 = np.concatenate(polygons).reshape(-1, 2) - np.repeat(boxes_N4[:, :2], points, axis=0)
    moved = (moved_P2 * np.repeat(scale_N2, points, axis=0)).reshape(-1)
    cuts = itertools.accumulate(map(len, polygons), initial=0)
    pieces = iter(
        coco_mask.frPyObjects([moved[a:b] for a, b in itertools.pairwise(cuts)], side, side)
    )
    rles = [[next(pieces) for _ in shapes[mask]] for mask in drawn.tolist()]
    rles = [parts[0] if len(parts) == 1 else coco_mask.merge(parts) for parts in rles]
    masks_NSS[drawn] = coco_mask.decode(rles).transpose(2, 0, 1)
    return masks_NSS


class RunLengths(msgspec.Struct, frozen=True, gc=False):
    """A mask as run lengths, column by column, starting with background."""

    counts: list[int] | str
    size: tuple[int, int]


class Mask(NamedTuple):
    """What a record's ``segmentation`` is; neither polygons nor counts where it has no mask, or a damaged one.

    Attributes:
        polygons: Numbers x, y, x, y, ... in pixels, each of at least 3 points that may be given to `rasterize`.
        counts: RLE counts of a mask of the image's size; whether they are sound, `measure` says.
        deviations: Keys of `proxydet.data.records.DEVIATIONS`.
    """

    polygons: Sequence[list[float]] = ()
    counts: bytes | None = None
    deviations: Sequence[str] = ()


def read(value: object, size: tuple[int, int]) -> Mask:
    """Read a mask, however it is spelt.

    Args:
        value: `RunLengths`, or a decoded JSON value.
        size: Height and width of its image.
    """
    if not isinstance(value, RunLengths):
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            value = value[0]
        if isinstance(value, dict) and value:
            value = RunLengths(counts=value.get("counts"), size=value.get("size"))  # type: ignore[arg-type]
    if isinstance(value, RunLengths):
        # Of a record that strict decoding refused, the size may be anything.
        if value.size != size and not (are_numbers(value.size, 2) and tuple(value.size) == size):
            return Mask(deviations=["annotation.rle.size"])
        found: list[str] = []
        counts = None
        if isinstance(value.counts, str):
            counts = _counts_of_text(value.counts)
            if counts is not None and value.counts[:1] == "b" and len(counts) < len(value.counts):
                found.append("annotation.segmentation.bytes")
        elif are_numbers(value.counts):
            runs = [int(run) for run in value.counts]
            if (
                runs == value.counts
                and min(runs, default=0) >= 0
                and sum(runs) == size[0] * size[1]
            ):
                counts = coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)[
                    "counts"
                ]
        return Mask(counts=counts, deviations=found if counts else ["annotation.rle.counts"])
    if value in (None, "", [], {}):
        return Mask()
    if not isinstance(value, list):
        return Mask(deviations=["annotation.segmentation"])
    found, polygons = [], []
    # By type: of numbers that strict decoding made, none is checked one by one in Python.
    kinds = set(map(type, value))
    flat = list not in kinds
    if flat or (len(value) >= 3 and kinds == {list} and set(map(len, value)) == {2}):
        value = [value]
    for polygon in value:
        if polygon == []:  # [[]] is how some tools write that there is no mask
            continue
        kinds = set(map(type, polygon)) if isinstance(polygon, list) else {object}
        if kinds == {list} and set(map(len, polygon)) == {2}:
            polygon, flat = [number for point in polygon for number in point], True
            kinds = set(map(type, polygon))
        if not kinds <= {int, float}:
            found.append("polygon.numbers")
        elif fault := _fault(polygon):
            found.append(fault)
        else:
            polygons.append(polygon)
    if flat:
        found.append("annotation.segmentation.flat")
    if not polygons and any(value):  # once an object, not once a polygon
        found = [
            *(key for key in found if key[:8] != "polygon."),
            "annotation.segmentation.polygons",
        ]
    return Mask(polygons=polygons, deviations=found)


def _fault(polygon: Sequence[float]) -> str:
    """Return the deviation of a polygon that cannot be drawn; empty where it can."""
    if len(polygon) < 6 or len(polygon) % 2:
        return "polygon.points"
    low, high = min(polygon), max(polygon)
    if not (low >= -LARGEST_COORDINATE and high <= LARGEST_COORDINATE):
        return "polygon.far"
    # An outline is never longer than its points times its extent, which is cheap to know.
    if len(polygon) * (high - low) > LONGEST_OUTLINE:
        points_P2 = np.array(polygon).reshape(-1, 2)
        steps_P2 = np.abs(points_P2 - np.roll(points_P2, 1, axis=0))
        if steps_P2.max(axis=1).sum() > LONGEST_OUTLINE:
            return "polygon.far"
    return ""


def _counts_of_text(text: str) -> bytes | None:
    """Return RLE counts from their text, also where Python wrote it as ``b'...'``; None where it is not ASCII."""
    if text[:2] in ("b'", 'b"'):
        if not _BYTES_LITERAL.fullmatch(text):
            return None
        try:
            return bytes(ast.literal_eval(text))
        except (ValueError, SyntaxError):  # an escape that does not exist
            return None
    return text.encode("ascii") if text.isascii() else None


def decode(counts: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of sound RLE counts: bool (height, width)."""
    mask_HW = coco_mask.decode({"size": list(size), "counts": counts})
    return np.ascontiguousarray(mask_HW, dtype=np.bool_)


def encode(edges_E: NDArray[np.int64], masks: int, size: tuple[int, int]) -> list[bytes]:
    """Return masks of one image as the RLE counts that the COCO tools give them.

    Args:
        edges_E: Ascending, ``mask * (height * width + 1) + place`` for each place, counted down the columns, where a
            mask begins or ends; a place may be one past the last pixel. Two equal numbers cancel out.
        masks: How many masks there are.
        size: Height and width of the image.
    """
    pixels = size[0] * size[1]
    twice = np.flatnonzero(edges_E[1:] == edges_E[:-1])
    mask_E, place_E = np.divmod(np.delete(edges_E, np.concatenate([twice, twice + 1])), pixels + 1)
    edges_M = np.bincount(mask_E, minlength=masks)
    # A mask of k edges has k + 1 runs, the last up to the end of the image, and k where it has an edge there.
    runs_M = edges_M + 1 - np.bincount(mask_E[place_E == pixels], minlength=masks)
    start_M, first_M = np.cumsum(runs_M) - runs_M, np.cumsum(edges_M) - edges_M
    end_N = np.full(runs_M.sum(), pixels)
    end_N[np.arange(len(mask_E)) + (start_M - first_M)[mask_E]] = place_E
    run_N = np.diff(end_N, prepend=0)
    run_N[start_M] = end_N[start_M]
    # From the fourth on, a number is the difference to the run before the last.
    value_N = run_N.copy()
    later = np.flatnonzero(np.arange(len(run_N)) - np.repeat(start_M, runs_M) > 2)
    value_N[later] -= run_N[later - 2]
    groups_N = np.ones_like(value_N)
    rest_N = (value_N ^ (value_N >> 63)) >> 4  # all but a group's four bits beside the sign
    while rest_N.any():
        groups_N += rest_N > 0
        rest_N >>= 5
    at_N = np.cumsum(groups_N) - groups_N
    text = np.empty(groups_N.sum(), dtype=np.uint8)
    left, group = np.arange(len(value_N)), 0
    while len(left):
        more = groups_N[left] > group + 1
        text[at_N[left] + group] = _FIRST + ((value_N[left] >> 5 * group) & 0x1F) + 0x20 * more
        left, group = left[more], group + 1
    counts, cuts = text.tobytes(), [*at_N[start_M].tolist(), len(text)]
    return [counts[start:end] for start, end in itertools.pairwise(cuts)]


def outlines(coverage_HW: NDArray[Any]) -> list[list[float]]:
    """Trace the outlines of a mask along coverage one half.

    Args:
        coverage_HW: How much of each pixel belongs to the object, 0 to 1; holes are outlined as parts are.

    Returns:
        Polygons in COCO's form, x1, y1, x2, y2, ... in pixels (the first pixel's middle is at 0.5, 0.5), each with at least
        three corners; outlines below one pixel of area are left out.
    """
    import contourpy

    height, width = coverage_HW.shape
    polygons = []
    for line in contourpy.contour_generator(z=np.pad(coverage_HW, 1), name="serial").lines(0.5):
        points_P2 = _simplified(np.asarray(line)[:-1] - 0.5)
        x, y = points_P2.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        if len(points_P2) >= 3 and area >= 1:
            inside_P2 = np.clip(points_P2, 0, (width, height)).round(2)
            polygons.append(inside_P2.ravel().tolist())
    return polygons


def _simplified(points_P2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Leave out corners of a closed outline that lie within a tolerance of the line they are on.

    Douglas-Peucker on the two halves between the first point and the one farthest from it.
    """
    if len(points_P2) < 4:
        return points_P2
    far = int(np.argmax(((points_P2 - points_P2[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([points_P2, points_P2[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far]] = True
    spans = [(0, far), (far, len(closed) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        along = closed[last] - closed[first]
        offset = closed[first + 1 : last] - closed[first]
        length = np.hypot(*along)
        if length == 0:
            distances = np.hypot(offset[:, 0], offset[:, 1])
        else:
            distances = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]) / length
        worst = int(np.argmax(distances))
        if distances[worst] > _TOLERANCE:
            middle = first + 1 + worst
            kept[middle] = True
            spans += [(first, middle), (middle, last)]
    return points_P2[kept[:-1]]


def measure(masks: Sequence[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the areas of masks, and which of them are sound.

    Args:
        masks: M compressed run-length masks, ``counts`` as bytes.

    Returns:
        float64 (M,), pixels; and bool (M,), whether a mask's characters are of the format and its runs, none
        negative, add up to height x width.
    """
    area_M, sound_M = np.zeros(len(masks)), np.zeros(len(masks), dtype=bool)
    for start in range(0, len(masks), _BATCH):
        batch = slice(start, start + _BATCH)
        area_M[batch], sound_M[batch] = _measure(masks[batch])
    return area_M, sound_M


def _measure(masks: Sequence[dict[str, Any]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Measure at least one mask: B characters, each a group of a number's bits, in all; N numbers, one for each run."""
    counts = [mask["counts"] for mask in masks]
    pixels_M = np.array([mask["size"][0] * mask["size"][1] for mask in masks], dtype=np.int64)
    length_M = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
    # Characters below the first wrap around to above the last.
    groups_B = np.frombuffer(b"".join(counts), dtype=np.uint8) - np.uint8(_FIRST)
    end_M = np.cumsum(length_M)
    ends = end_M[length_M > 0] - 1
    more_B = groups_B >= 0x20
    cut = ends[more_B[ends]]  # more was to follow
    more_B[ends] = False
    wrong_M = length_M == 0
    strange = np.append(cut, np.flatnonzero(groups_B > _LAST - _FIRST))
    wrong_M[np.searchsorted(end_M, strange, side="right")] = True
    close_N = np.flatnonzero(~more_B)
    end_N_M = np.searchsorted(close_N, end_M)
    # The last group is the highest; its fifth bit is the sign.
    values_N = ((groups_B[close_N] & 0x1F) ^ 0x10).view(np.int8) - np.int8(0x10)
    lower = np.flatnonzero(more_B)
    if len(lower):
        number = lower - np.arange(len(lower))  # how many numbers end before
        head = np.flatnonzero(np.diff(number, prepend=-1))
        groups = np.diff(head, append=len(lower))
        number, place = number[head], np.arange(len(lower)) - np.repeat(head, groups)
        wrong_M[np.searchsorted(end_N_M, number[groups >= _LONGEST], side="right")] = True
        bits = (groups_B[lower] & 0x1F).astype(np.int64) << (5 * np.minimum(place, _LONGEST))
        values_N = values_N.astype(np.int64)
        values_N[number] <<= 5 * np.minimum(groups, _LONGEST)
        values_N[number] += np.add.reduceat(bits, head)
    # The first run stands alone; from the fourth on, a number is the difference to the run before the last.
    runs_M = np.diff(end_N_M, prepend=0)
    start_M = end_N_M - runs_M
    first_M, some_M = np.zeros(len(masks), dtype=np.int64), runs_M > 0
    first_M[some_M] = values_N[start_M[some_M]]
    low_1, high_1, area_M = _running_sums(values_N, start_M + 1, runs_M // 2)
    low_0, high_0, rest_M = _running_sums(values_N, start_M + 2, (runs_M - 1) // 2)
    wrong_M |= np.minimum(np.minimum(low_1, low_0), first_M) < 0
    wrong_M |= np.maximum(high_1, high_0) > pixels_M
    return area_M, ~wrong_M & (first_M + area_M + rest_M == pixels_M)


def _running_sums(
    values_N: NDArray[np.integer], start_M: NDArray[np.int64], length_M: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the smallest, the largest and the sum of the running sums of every other number from a start on; 0 of none."""
    low_M, high_M, sum_M = (np.zeros(len(start_M), dtype=np.int64) for _ in range(3))
    some = np.flatnonzero(length_M > 0)
    if len(some):
        start, length = start_M[some], length_M[some]
        at = np.cumsum(length) - length
        chosen = np.repeat(start - 2 * at, length)
        chosen += 2 * np.arange(len(chosen))
        sums = np.cumsum(values_N[chosen], dtype=np.int64)
        before = sums[at] - values_N[start]
        low_M[some] = np.minimum.reduceat(sums, at) - before
        high_M[some] = np.maximum.reduceat(sums, at) - before
        sum_M[some] = np.add.reduceat(sums, at) - before * length
    return low_M, high_M, sum_M
