"""Checks of compressed run-length masks before they reach compiled code that trusts them.

A mask is ``{"size": [height, width], "counts": bytes}``: the lengths of alternating runs of 0 and 1 down the columns,
each but the first three as the difference to the run before the last, in groups of five bits, the lowest first, one
character a group from ``0`` on; a sixth bit says that more follow (the format of the COCO tools).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST = 48
_LAST = 48 + 63
_BATCH = 1000
"""Masks at once: few enough that their runs stay in the processor's cache."""
_LONGEST = 6
"""Groups of a number: 30 bits with its sign, more than an image of half a billion pixels needs."""


def are_polygons(value: Sequence[Sequence[float]]) -> bool:
    """Whether the COCO tools can rasterise a list: polygons of three points or more, or boxes of four numbers."""
    lengths = {len(polygon) for polygon in value}
    return bool(lengths) and (
        lengths == {4} or (min(lengths) >= 6 and not any(n % 2 for n in lengths))
    )


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
