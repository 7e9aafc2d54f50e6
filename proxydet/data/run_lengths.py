"""Masks as run lengths (COCO's RLE): column by column, alternately background and foreground.

Counts that come from outside are checked here in Python; nothing unchecked reaches a C decoder.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CHARACTER_BITS = 5
_MORE = 0x20
_NEGATIVE = 0x10
_ZERO = 48


def parse_counts(counts: list[int] | str, size: tuple[int, int]) -> npt.NDArray[np.uint32] | None:
    """Check run lengths and return them as an array.

    Args:
        counts: Run lengths, or COCO's compressed text for them.
        size: Height and width of the mask.

    Returns:
        uint32 run lengths that sum to height x width, or None where the counts are damaged.
    """
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if runs is None or any(run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        return None
    return np.array(runs, dtype=np.uint32)


def to_mask(runs: npt.NDArray[np.uint32], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the mask of checked run lengths: bool (height, width)."""
    foreground = np.arange(len(runs)) % 2 == 1
    mask_WH = np.repeat(foreground, runs).reshape(width, height)
    return np.ascontiguousarray(mask_WH.transpose(), dtype=np.bool_)


def _decompress(text: str) -> list[int] | None:
    """Decode COCO's text form: 5 bits a character, differences to the run before the last one from the third run on."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("utf-8"):
        code = character - _ZERO
        if not 0 <= code < 2 * _MORE:
            return None
        value |= (code & (_MORE - 1)) << shift
        shift += _CHARACTER_BITS
        if code & _MORE:
            continue
        if code & _NEGATIVE:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs
