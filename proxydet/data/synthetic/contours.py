"""Turns the visible part of an object into polygons."""

from __future__ import annotations

import contourpy
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

_TOLERANCE = 0.2


def polygons_of(coverage_HW: npt.NDArray[np.float32]) -> list[list[float]]:
    """Trace the outlines of a mask along coverage one half.

    Args:
        coverage_HW: How much of each pixel belongs to the object, 0 to 1; it must have no holes.

    Returns:
        Polygons in COCO's form, x1, y1, x2, y2, ... in pixels (the first pixel's middle is at 0.5, 0.5),
        each with at least three corners; outlines below one pixel of area are left out.
    """
    padded = np.pad(coverage_HW, 1)
    generator = contourpy.contour_generator(z=padded, name="serial")
    polygons = []
    for line in generator.lines(0.5):
        points = simplify(np.asarray(line)[:-1] - 0.5, _TOLERANCE)
        if len(points) >= 3 and polygon_area(points) >= 1:
            height, width = coverage_HW.shape
            points = np.clip(points, 0, (width, height)).round(2)
            polygons.append([float(value) for value in points.ravel()])
    return polygons


def polygon_area(points: Points) -> float:
    """Area of a polygon with corners (P, 2), in squared pixels."""
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def simplify(points: Points, tolerance: float) -> Points:
    """Leave out corners of a closed outline that lie within ``tolerance`` of the line they are on.

    Douglas-Peucker on the two halves between the first point and the one farthest from it.
    """
    if len(points) < 4:
        return points
    far = int(np.argmax(((points - points[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([points, points[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far]] = True
    spans = [(0, far), (far, len(closed) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        distances = _distances(closed[first + 1 : last], closed[first], closed[last])
        worst = int(np.argmax(distances))
        if distances[worst] > tolerance:
            middle = first + 1 + worst
            kept[middle] = True
            spans += [(first, middle), (middle, last)]
    return points[kept[:-1]]


def _distances(points: Points, start: Points, end: Points) -> Points:
    along = end - start
    length = np.hypot(*along)
    offset = points - start
    if length == 0:
        return np.hypot(offset[:, 0], offset[:, 1])
    crossed: Points = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]) / length
    return crossed
