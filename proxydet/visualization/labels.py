"""Finds places for labels so that they cover each other and other labels' boxes as little as can be.

Dimensions: L labels, P places for one label, B boxes that may be covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Floats = npt.NDArray[np.float64]

# Rows that a label may go up or down from its box, so that a dozen of one place stay apart.
_ROWS = 12
# What a place costs: for the share of it that covers other labels, for the share that covers other
# boxes (at most thrice), for coming late in the list (up to a point: being far is better than covering), and for each
# label's height that the picture's edge moved it.
_COVERED, _CROWDED, _LATE, _MOVED = 10.0, 0.15, 0.05, 0.3
_CROWD_MOST, _LATE_MOST = 3.0, 1.4


@dataclass(frozen=True)
class LabelRequest:
    """A label that needs a place."""

    box: Box
    """The box that the label belongs to."""
    width: float
    height: float


def place_labels(requests: Sequence[LabelRequest], canvas: tuple[int, int]) -> list[Box]:
    """Choose a place for each label, the first ones first.

    Each label has a list of places around and inside its box, the best first: above, inside at the
    top, below, then at the right edge, then further rows. The place wins that covers the least of
    the labels placed before; among equal ones, the earlier in the list, where covering other boxes counts a little.

    Args:
        requests: What to place, the most important first.
        canvas: Width and height of the picture in pixels; places never leave it.

    Returns:
        One place for each request.
    """
    boxes_L4 = np.array([request.box for request in requests], np.float64).reshape(-1, 4)
    placed_L4 = np.zeros_like(boxes_L4)
    for index, request in enumerate(requests):
        wanted_P2 = _places(request)
        places_P4 = _inside(wanted_P2, request, canvas)
        area = request.width * request.height
        others_B4 = np.delete(boxes_L4, index, axis=0)
        cost_P = _COVERED * overlaps(places_P4, placed_L4[:index]).sum(axis=1) / area
        crowd_P = overlaps(places_P4, others_B4).sum(axis=1) / area
        late_P = np.minimum(_LATE * np.arange(len(places_P4)), _LATE_MOST)
        cost_P += _CROWDED * np.minimum(crowd_P, _CROWD_MOST) + late_P
        moved_P = np.abs(places_P4[:, :2] - wanted_P2).sum(axis=1)
        cost_P += _MOVED * moved_P / request.height
        placed_L4[index] = places_P4[np.argmin(cost_P)]
    return [(left, top, right, bottom) for left, top, right, bottom in placed_L4.tolist()]


def overlaps(first_P4: Floats, second_B4: Floats) -> Floats:
    """Area in which each box of one set overlaps each of another: (P, B), in squared pixels."""
    low_PB2 = np.maximum(first_P4[:, None, :2], second_B4[None, :, :2])
    high_PB2 = np.minimum(first_P4[:, None, 2:], second_B4[None, :, 2:])
    areas: Floats = np.clip(high_PB2 - low_PB2, 0, None).prod(axis=2)
    return areas


def _places(request: LabelRequest) -> Floats:
    """Left and top of each place, (P, 2)."""
    left, top, right, bottom = request.box
    width, height = request.width, request.height
    places = [
        (column, row)
        for column in (left, right - width, (left + right - width) / 2)
        for row in (top - height, top, bottom, bottom - height)
    ]
    for number in range(1, _ROWS + 1):
        row = top + number * height
        places += [
            (left, row),
            (left, top - (number + 1) * height),
            (right, row),
            (left - width, row),
        ]
    return np.array(places, np.float64)


def _inside(places_P2: Floats, request: LabelRequest, canvas: tuple[int, int]) -> Floats:
    """Move places into the picture; (P, 4) boxes."""
    size = np.array([request.width, request.height])
    corners_P2 = np.maximum(np.minimum(places_P2, np.array(canvas) - size), 0)
    return np.concatenate([corners_P2, corners_P2 + size], axis=1)
