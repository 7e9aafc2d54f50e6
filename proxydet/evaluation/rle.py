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
    owner_B = np.repeat(np.arange(len(masks)), lengths_M)
    text_B = np.frombuffer(b"".join(counts), dtype=np.uint8).astype(np.int64)
    strange_B = (text_B < _FIRST) | (text_B > _LAST)
    runs, owner, ends_open = _run_differences(np.where(strange_B, 0, text_B - _FIRST), owner_B)
    place = _place_in_segment(owner)
    lengths = _undo_differences(runs, owner, place)
    total_M = np.bincount(owner, weights=lengths, minlength=len(masks))
    wrong_M = (total_M != pixels_M) | (lengths_M == 0)
    wrong_M[owner_B[strange_B]] = True
    wrong_M[owner[lengths < 0]] = True
    wrong_M[ends_open] = True
    area_M = np.bincount(owner, weights=lengths * (place % 2), minlength=len(masks))
    return area_M.astype(np.float64), ~wrong_M


def _run_differences(
    groups_B: NDArray[np.int64], owner_B: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Join the five-bit groups to numbers; return them, their masks, and the masks that end inside a number."""
    if not len(groups_B):
        return groups_B, owner_B, owner_B
    last_B = (groups_B & 0x20) == 0
    mask_ends_B = np.append(owner_B[1:] != owner_B[:-1], True)
    ends_open = owner_B[mask_ends_B & ~last_B]
    closes = np.flatnonzero(last_B | mask_ends_B)
    starts = np.concatenate([[0], closes[:-1] + 1])
    place_B = np.arange(len(groups_B)) - np.repeat(starts, closes - starts + 1)
    # A run is shorter than 2^50 pixels; a longer chain of groups is damage, told by its sum.
    values = np.add.reduceat((groups_B & 0x1F) << np.minimum(5 * place_B, 50), starts)
    negative = (groups_B[closes] & 0x10) != 0
    values -= negative.astype(np.int64) << np.minimum(5 * (closes - starts + 1), 50)
    return values, owner_B[closes], ends_open


def _place_in_segment(segment: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.flatnonzero(np.append(True, segment[1:] != segment[:-1])[: len(segment)])
    return np.arange(len(segment)) - np.repeat(starts, np.diff(np.append(starts, len(segment))))


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
