"""Runs the RoIAlign that detectron2 really uses, and measures how far it is from each independent computation.

Run in a fresh interpreter by :mod:`proxydet.runtime.roi_verify`, which hands it the path to write its answer to.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import proxydet.runtime.d2

import numpy as np
import torch
import torchvision
from detectron2 import layers
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
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


_STRIDE = 32
_POOLING = Pooling(output_size=(2, 2), spatial_scale=1 / _STRIDE, sampling_ratio=0, aligned=True)
_BOXES_N4 = (
    (3.37, 9.91, 120.26, 77.13),
    (1040.46, 1100.37, 1301.41, 1201.62),
    (700.3, 1029.4, 1500.45, 1340.2),
)
"""Pixels; all coordinates have fractions that half precision cannot hold, those beyond 1,024 lose them whole."""

_REPEATS = 50


def measure(device: str) -> dict[str, Any]:
    """Compare the operator's values and gradient with the two independent computations.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Largest absolute differences from the published and from the plain operator, for values and gradient, what
        was run, and on a GPU how many gradient elements differ between repeated backward passes.
    """
    generator = np.random.default_rng(4723)
    features_NCHW = generator.normal(size=(1, 3, 48, 52)).astype(np.float32)
    weight_KCPQ = generator.normal(size=(len(_BOXES_N4), 3, 2, 2)).astype(np.float32)
    values, gradient = _run(features_NCHW, weight_KCPQ, device)
    expected = {
        "published": _expected(features_NCHW, weight_KCPQ, published=True),
        "plain": _expected(features_NCHW, weight_KCPQ, published=False),
    }
    figures = {
        f"{what}_from_{name}": float(np.abs(found.astype(np.float64) - wanted).max())
        for name, pair in expected.items()
        for what, found, wanted in zip(
            ("values", "gradient"), (values, gradient), pair, strict=True
        )
    }
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "operator": str(Path(sys.modules[layers.ROIAlign.__module__].__file__ or "")),
        "dtype": str(values.dtype),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": proxydet.runtime.d2.INSTALLED.version,
        "figures": figures,
        "between_the_two": float(np.abs(expected["published"][0] - expected["plain"][0]).max()),
        "repeats": _count_differing() if device == "cuda" else None,
    }


def _run(
    features_NCHW: NDArray[np.float32], weight_KCPQ: NDArray[np.float32], device: str
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    features = torch.tensor(features_NCHW, device=device, requires_grad=True)
    pooler = ROIPooler(2, [1 / _STRIDE], sampling_ratio=0, pooler_type="ROIAlignV2")
    pooled = pooler([features], [Boxes(torch.tensor(_BOXES_N4, device=device))])
    (pooled * torch.tensor(weight_KCPQ, device=device)).sum().backward()
    if features.grad is None:
        raise RuntimeError("the operator passed no gradient back")
    return pooled.detach().cpu().numpy(), features.grad.cpu().numpy()


def _expected(
    features_NCHW: NDArray[np.float32], weight_KCPQ: NDArray[np.float32], *, published: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    boxes_K4 = np.asarray(_BOXES_N4, dtype=np.float32)
    if published:
        features_NCHW = features_NCHW.astype(np.float16).astype(np.float32)
        boxes_K4 = boxes_K4.astype(np.float16).astype(np.float32)
    boxes_K5 = np.concatenate([np.zeros((len(boxes_K4), 1)), boxes_K4.astype(np.float64)], axis=1)
    values = pool(features_NCHW.astype(np.float64), boxes_K5, _POOLING)
    gradient = pool_gradient(
        weight_KCPQ.astype(np.float64), boxes_K5, features_NCHW.shape, _POOLING
    )
    if published:
        gradient = gradient.astype(np.float16).astype(np.float64)
    return values, gradient


def _count_differing() -> dict[str, int]:
    """Repeat one backward pass on the GPU and count the gradient elements that are not always the same."""
    torch.manual_seed(0)
    features = torch.randn((2, 64, 80, 80), device="cuda", requires_grad=True)
    corners = torch.rand((2, 500, 2, 2), device="cuda") * 640
    boxes = [Boxes(torch.cat([c.amin(1), c.amax(1)], dim=1)) for c in corners]
    pooler = ROIPooler(7, [1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2")
    weight = torch.randn((1000, 64, 7, 7), device="cuda")
    first, differing = None, torch.zeros(features.shape, dtype=torch.bool, device="cuda")
    for _ in range(_REPEATS):
        (gradient,) = torch.autograd.grad((pooler([features], boxes) * weight).sum(), [features])
        first = gradient if first is None else first
        differing |= gradient != first
    return {
        "times": _REPEATS,
        "elements": features.numel(),
        "differing": int(differing.sum().item()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answer = measure(sys.argv[2])
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")
