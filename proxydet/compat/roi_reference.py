"""RoIAlign sample by sample in numpy and double precision: the yardstick of ``proxydet patch verify``.

It shares no code with torchvision or with our operators: every sample point is visited, looks up its four feature
cells and adds what they weigh. Slow; for small inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What detectron2's ``ROIAlign`` is built with."""

    output_size: tuple[int, int]
    """Bins a box: rows, columns."""

    spatial_scale: float
    """Feature cells a pixel."""

    sampling_ratio: int
    """Samples a bin along each axis; 0 for as many as it covers cells."""

    aligned: bool
    """Whether coordinates are shifted by half a cell."""


def pool(features_NCHW: Array, boxes_K5: Array, pooling: Pooling) -> Array:
    """Pool boxes out of feature maps.

    Args:
        features_NCHW: Feature maps.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        pooling: Bins, scale and sampling.

    Returns:
        Pooled features (K, C, P, Q).
    """
    pooled_KCPQ = np.zeros((len(boxes_K5), features_NCHW.shape[1], *pooling.output_size))
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, features_NCHW.shape, pooling):
        pooled_KCPQ[box, :, bin_y, bin_x] += weight * features_NCHW[image, :, y, x]
    return pooled_KCPQ


def pool_gradient(
    grad_KCPQ: Array, boxes_K5: Array, shape: tuple[int, ...], pooling: Pooling
) -> Array:
    """Gradient of :func:`pool` with regard to the features.

    Args:
        grad_KCPQ: Gradient of the pooled features.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        shape: (N, C, H, W) of the features.
        pooling: Bins, scale and sampling.

    Returns:
        Gradient of the features (N, C, H, W).
    """
    grad_NCHW = np.zeros(shape)
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, shape, pooling):
        grad_NCHW[image, :, y, x] += weight * grad_KCPQ[box, :, bin_y, bin_x]
    return grad_NCHW


def _cells(
    boxes_K5: Array, shape: tuple[int, ...], pooling: Pooling
) -> Iterator[tuple[int, int, int, int, int, int, float]]:
    """Every (box, bin row, bin column, image, cell row, cell column, weight) that has a part in the result."""
    rows, columns = pooling.output_size
    for box, (image, x1, y1, x2, y2) in enumerate(boxes_K5):
        along_y = _samples(y1, y2, rows, pooling)
        along_x = _samples(x1, x2, columns, pooling)
        for bin_y, y_points in enumerate(along_y):
            for bin_x, x_points in enumerate(along_x):
                share = 1 / max(len(y_points) * len(x_points), 1)
                for y in y_points:
                    for x in x_points:
                        for row, weight_y in _neighbours(y, shape[2]):
                            for column, weight_x in _neighbours(x, shape[3]):
                                weight = share * weight_y * weight_x
                                yield box, bin_y, bin_x, int(image), row, column, weight


def _samples(start: float, end: float, bins: int, pooling: Pooling) -> list[list[float]]:
    """Sample coordinates of each bin along one axis, in feature cells."""
    shift = 0.5 if pooling.aligned else 0.0
    low, high = start * pooling.spatial_scale - shift, end * pooling.spatial_scale - shift
    extent = high - low if pooling.aligned else max(high - low, 1.0)
    count = pooling.sampling_ratio if pooling.sampling_ratio > 0 else math.ceil(extent / bins)
    step = extent / bins
    return [
        [low + index * step + (sample + 0.5) * step / count for sample in range(count)]
        for index in range(bins)
    ]


def _neighbours(coordinate: float, cells: int) -> list[tuple[int, float]]:
    """The one or two cells around a coordinate and their linear weights; none where it lies outside."""
    if not -1.0 <= coordinate <= cells:
        return []
    inside = max(coordinate, 0.0)
    low = int(inside)
    if low >= cells - 1:
        return [(cells - 1, 1.0)]
    return [(low, 1.0 - (inside - low)), (low + 1, inside - low)]
