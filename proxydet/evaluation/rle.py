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
_BATCH = 20_000
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
    last_M = ends_M[lengths_M > 0] - 1
    last_B = (groups_B & 0x20) == 0
    open_M = last_M[~last_B[last_M]]
    last_B[last_M] = True
    runs, odd = _run_differences(groups_B, np.flatnonzero(last_B))
    run_ends_M = np.concatenate([[0], np.cumsum(last_B)])[ends_M]
    owner = np.repeat(np.arange(len(masks)), np.diff(run_ends_M, prepend=0))
    place = np.arange(len(runs)) - np.repeat(
        run_ends_M - np.diff(run_ends_M, prepend=0), np.diff(run_ends_M, prepend=0)
    )
    lengths = _undo_differences(runs, owner, place)
    total_M = np.bincount(owner, weights=lengths, minlength=len(masks))
    wrong_M = (total_M != pixels_M) | (lengths_M == 0)
    wrong_M[owner[odd | (lengths < 0)]] = True
    strange = np.concatenate([np.flatnonzero(groups_B > _LAST - _FIRST), open_M])
    wrong_M[np.searchsorted(ends_M, strange, side="right")] = True
    area_M = np.bincount(owner, weights=lengths * (place % 2), minlength=len(masks))
    return area_M.astype(np.float64), ~wrong_M


def _run_differences(
    groups_B: NDArray[np.uint8], closes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Join five-bit groups to numbers; return them, and which of them have more groups than any image needs.

    Args:
        groups_B: All characters, as numbers from 0.
        closes: Where each number's last group is.
    """
    starts = np.concatenate([[0], closes[:-1] + 1])[: len(closes)]
    lengths = closes - starts + 1
    values = (groups_B[starts] & 0x1F).astype(np.int64)
    for place in range(1, _LONGEST):
        longer = np.flatnonzero(lengths > place)
        if not len(longer):
            break
        group = (groups_B[starts[longer] + place] & 0x1F).astype(np.int64)
        values[longer] |= group << (5 * place)
    negative = np.flatnonzero(groups_B[closes] & 0x10)
    values[negative] -= 1 << (5 * np.minimum(lengths[negative], _LONGEST))
    return values, lengths > _LONGEST


def _undo_differences(
    runs: NDArray[np.int64], owner: NDArray[np.int64], place: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return run lengths: from the fourth on, a number is the difference to the run before the last."""
    lengths: NDArray[np.int64] = runs.copy()
    for parity in (0, 1):
        # Runs of one parity after the very first form a chain (2, 4, ... and 1, 3, ...), each adding to the one before.
        chain = np.flatnonzero((place % 2 == parity) & (place > 0))
        lengths[chain] = segment_cumsum(runs[chain], owner[chain])
    return lengths


def segment_cumsum(values: NDArray[np.int64], segment: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return running sums that start anew wherever ``segment`` changes.

    Args:
        values: N numbers.
        segment: N numbers, equal neighbours belonging together.
    """
    sums = np.cumsum(values)
    heads = np.append(True, segment[1:] != segment[:-1])[: len(values)]
    head_of = np.maximum.accumulate(np.where(heads, np.arange(len(values)), 0))
    return sums - (sums - values)[head_of]
