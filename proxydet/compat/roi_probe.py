"""Runs the RoIAlign that detectron2 really uses, and measures how far it is from each independent computation.

Run in a fresh interpreter by :mod:`proxydet.compat.roi_verify`, which hands it the path to write its answer to.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import proxydet.compat.d2

import numpy as np
import torch
import torchvision
from detectron2 import layers
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from numpy.typing import NDArray

from proxydet.compat.roi_reference import Pooling, pool, pool_gradient

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
        "detectron2": proxydet.compat.d2.INSTALLED.version,
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
