"""Finds places for labels so that they cover each other and other labels' boxes as little as can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_ROWS_INSIDE = 4
_CROWDING = 0.15


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
    top, below, then at the right edge, then further rows inside. The place wins that covers the least of
    the labels placed before; among equal ones, the earlier in the list, where covering the top of
    other boxes counts a little.

    Args:
        requests: What to place, the most important first.
        canvas: Width and height of the picture in pixels; places never leave it.

    Returns:
        One place for each request.
    """
    placed: list[Box] = []
    boxes = [request.box for request in requests]
    for index, request in enumerate(requests):
        others = boxes[:index] + boxes[index + 1 :]
        placed.append(_best_place(request, placed, others, canvas))
    return placed


def overlap(first: Box, second: Box) -> float:
    """Area in which two boxes overlap, in squared pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _best_place(
    request: LabelRequest, placed: Sequence[Box], others: Sequence[Box], canvas: tuple[int, int]
) -> Box:
    area = request.width * request.height
    best, best_cost = None, float("inf")
    for rank, (left, top) in enumerate(_places(request)):
        place = _inside(left, top, request, canvas)
        covered = sum(overlap(place, other) for other in placed) / area
        crowd = min(sum(overlap(place, other) for other in others) / area, 3.0)
        moved = abs(place[0] - left) + abs(place[1] - top)
        cost = 10 * covered + _CROWDING * crowd + 0.05 * rank + 0.3 * moved / request.height
        if cost < best_cost:
            best, best_cost = place, cost
    assert best is not None
    return best


def _places(request: LabelRequest) -> Iterator[tuple[float, float]]:
    left, top, right, bottom = request.box
    width, height = request.width, request.height
    columns = (left, right - width, (left + right - width) / 2)
    for column in columns:
        yield column, top - height
        yield column, top
        yield column, bottom
        yield column, bottom - height
    for row in range(1, _ROWS_INSIDE + 1):
        yield left, top + row * height
        yield left, top - (row + 1) * height
        yield right, top + row * height
        yield left - width, top + row * height


def _inside(left: float, top: float, request: LabelRequest, canvas: tuple[int, int]) -> Box:
    left = max(min(left, canvas[0] - request.width), 0)
    top = max(min(top, canvas[1] - request.height), 0)
    return (left, top, left + request.width, top + request.height)
