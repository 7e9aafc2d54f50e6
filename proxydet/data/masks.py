"""Masks of annotations and of results: run lengths (COCO's RLE) and polygons, checked before compiled code sees them.

An RLE is ``{"size": [height, width], "counts": bytes}``: the lengths of alternating runs of 0 and 1 down the columns,
each but the first three as the difference to the run before the last, in groups of five bits, the lowest first, one
character a group from ``0`` on; a sixth bit says that more follow (the format of the COCO tools).

The COCO tools trust what they are given: a polygon with one coordinate of 1e8 makes them allocate 20 GB, and run lengths
that do not add up make them read and write outside their buffers. The bounds here keep both away from them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

LARGEST_COORDINATE = 100_000.0
"""Pixels, either way: polygons that reach beyond it are not read."""
LONGEST_OUTLINE = 1_000_000.0
"""Pixels: longest outline of a polygon. The COCO tools need about 80 bytes a pixel of it."""
LARGEST_IMAGE = 2**31 - 1
"""Pixels: largest height times width that run lengths can count."""

_BYTES_LITERAL = re.compile(r"""b'(?:[^'\\\n]|\\[ -~])*'|b"(?:[^"\\\n]|\\[ -~])*\"""")
_FIRST = 48
_LAST = 48 + 63
_BATCH = 1000
"""Masks at once: few enough that their runs stay in the processor's cache."""
_LONGEST = 6
"""Groups of a number: 30 bits with its sign, more than an image of half a billion pixels needs."""


def polygon_fault(polygon: Sequence[float]) -> str:
    """Return why a polygon cannot be drawn; empty where it can.

    Args:
        polygon: Finite numbers x, y, x, y, ... in pixels.
    """
    if len(polygon) < 6:
        return "fewer than 3 points"
    if len(polygon) % 2:
        return "an odd number of coordinates"
    low, high = min(polygon), max(polygon)
    if not (low >= -LARGEST_COORDINATE and high <= LARGEST_COORDINATE):
        return f"a coordinate beyond {LARGEST_COORDINATE:.0f} pixels"
    # An outline is never longer than its points times its extent, which is cheap to know.
    if len(polygon) * (high - low) > LONGEST_OUTLINE:
        points_P2 = np.array(polygon).reshape(-1, 2)
        steps_P2 = np.abs(points_P2 - np.roll(points_P2, 1, axis=0))
        if steps_P2.max(axis=1).sum() > LONGEST_OUTLINE:
            return f"an outline longer than {LONGEST_OUTLINE:.0f} pixels"
    return ""


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


def rasterize(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> bytes:
    """Return the union of polygons as RLE counts, drawn as the COCO tools draw it.

    Args:
        polygons: At least one, each without a `polygon_fault`.
        size: Height and width of the image.
    """
    pieces = coco_mask.frPyObjects([list(polygon) for polygon in polygons], *size)
    counts: bytes = coco_mask.merge(pieces)["counts"]
    return counts


def compress(counts: Sequence[Any], size: tuple[int, int]) -> bytes | None:
    """Return RLE counts for run lengths given as numbers; None where they do not fill the image.

    Args:
        counts: Lengths of alternating runs of 0 and 1, column by column.
        size: Height and width of the mask.
    """
    whole = all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts)
    if not whole or sum(counts) != size[0] * size[1]:
        return None
    packed: bytes = coco_mask.frPyObjects({"size": list(size), "counts": list(counts)}, *size)[
        "counts"
    ]
    return packed


def counts_of_text(text: str) -> bytes | None:
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


def measure(masks: Sequence[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the areas of masks, and which of them are sound.

    Args:
        masks: M compressed run-length masks, ``counts`` as bytes.

    Returns:
        float64 (M,), pixels; and bool (M,), whether a mask's characters are of the format and its runs, none
        negative, add up to height x width.
    """
    parts = [_measure(masks[start : start + _BATCH]) for start in range(0, len(masks), _BATCH)]
    if not parts:
        return np.zeros(0), np.zeros(0, dtype=bool)
    areas, sound = zip(*parts, strict=True)
    return np.concatenate(areas), np.concatenate(sound)


def _measure(
    masks: Sequence[dict[str, Any]],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    counts = [mask["counts"] for mask in masks]
    lengths_M = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
    pixels_M = np.array([mask["size"][0] * mask["size"][1] for mask in masks], dtype=np.int64)
    # Characters below the first wrap around to above the last.
    groups_B = np.frombuffer(b"".join(counts), dtype=np.uint8) - np.uint8(_FIRST)
    ends_M = np.cumsum(lengths_M)
    last_B = groups_B < 0x20
    ends = ends_M[lengths_M > 0] - 1
    strange = np.concatenate(
        [
            np.flatnonzero(groups_B > _LAST - _FIRST),
            ends[~last_B[ends]],
        ]  # the latter: more was to follow
    )
    last_B[ends] = True
    closes_N = np.flatnonzero(last_B)
    run_ends_M = np.searchsorted(closes_N, ends_M)
    values_N, odd = _differences(groups_B, closes_N)
    wrong_M = lengths_M == 0
    wrong_M[np.searchsorted(ends_M, strange, side="right")] = True
    wrong_M[np.searchsorted(run_ends_M, odd, side="right")] = True
    lengths_P2, starts_M = _run_lengths(values_N, run_ends_M)
    negative = np.flatnonzero((lengths_P2 < 0).any(axis=1))
    wrong_M[np.searchsorted(starts_M, negative, side="right") - 1] = True
    total_M2 = _sums(lengths_P2, starts_M)
    wrong_M |= total_M2.sum(axis=1) != pixels_M
    return total_M2[:, 1].astype(np.float64), ~wrong_M


def _differences(
    groups_B: NDArray[np.uint8], closes_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Join five-bit groups to numbers; return them, and the places of those with more groups than any image needs.

    Args:
        groups_B: All characters, as numbers from 0.
        closes_N: Where each number's last group is.
    """
    # The last group is the highest; its fifth bit is the sign.
    values_N = ((groups_B[closes_N] & 0x1F) ^ 0x10).astype(np.int64) - 0x10
    lengths_N = np.diff(closes_N, prepend=-1)
    for place in range(1, _LONGEST):
        longer = np.flatnonzero(lengths_N > place)
        if not len(longer):
            break
        group = groups_B[closes_N[longer] - place] & 0x1F
        values_N[longer] = (values_N[longer] << 5) | group
    return values_N, np.flatnonzero(lengths_N > _LONGEST)


def _run_lengths(
    values_N: NDArray[np.int64], run_ends_M: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return run lengths in pairs, of 0 and of 1, a mask's number of runs being made even; and each mask's first pair."""
    runs_M = np.diff(run_ends_M, prepend=0)
    pairs_M = (runs_M + 1) // 2
    starts_M = np.cumsum(pairs_M) - pairs_M
    pairs_P2 = np.zeros((int(pairs_M.sum()), 2), dtype=np.int64)
    shift_M = 2 * starts_M - (run_ends_M - runs_M)
    pairs_P2.reshape(-1)[np.arange(len(values_N)) + np.repeat(shift_M, runs_M)] = values_N
    # From the fourth on, a number is the difference to the run before the last; the first is in no such chain.
    some_M = starts_M[pairs_M > 0]
    first = pairs_P2[some_M, 0]
    pairs_P2[some_M, 0] = 0
    before_P2 = np.zeros((len(pairs_P2) + 1, 2), dtype=np.int64)
    np.cumsum(pairs_P2, axis=0, out=before_P2[1:])
    lengths_P2 = before_P2[1:] - np.repeat(before_P2[starts_M], pairs_M, axis=0)
    lengths_P2[some_M, 0] = first
    filled_M = starts_M[runs_M % 2 == 1] + pairs_M[runs_M % 2 == 1] - 1
    lengths_P2[filled_M, 1] = 0
    return lengths_P2, starts_M


def _sums(values_P2: NDArray[np.int64], starts_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sums over segments that start at ``starts_M``; 0 for empty ones."""
    sums = np.zeros((len(values_P2) + 1, 2), dtype=np.int64)
    np.cumsum(values_P2, axis=0, out=sums[1:])
    bounds = np.append(starts_M, len(values_P2))
    between: NDArray[np.int64] = np.diff(sums[bounds], axis=0)
    return between
