"""Measures the three reproducibility modes: what they change, what varies, what they cost.

::

    python benchmarks/determinism.py order      # which sums depend on their order: an emulation of the GPU's atomics
    python benchmarks/determinism.py forward    # what the published rounding does to values, by where the box lies
    python benchmarks/determinism.py gradients  # which share of the gradient the published rounding loses
    python benchmarks/determinism.py network    # the same share in a step of R50 with fresh weights, without loss scaling
    python benchmarks/determinism.py memory     # of each backward pass at the sizes of the R50 recipe, on a CPU
    python benchmarks/determinism.py cost       # time and memory of the backward passes [--device cuda]
    python benchmarks/determinism.py steps      # whole training steps: proxydet verify determinism [--device cuda]

``--device cuda`` runs on a GPU at the sizes of the R50 recipe; ``--json FILE`` keeps the figures. Times of a busy machine
are ratios at best.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from proxydet.config import merge, parse_overrides
from proxydet.recipes import RunConfig, r50, tiny
from proxydet.runtime.determinism import LVIS_CLASSES, Bench, resident_mib
from proxydet.runtime.modes import apply_mode
from proxydet.runtime.roi_align import (
    RoiGeometry,
    kernel_backward,
    published_roi_align,
    roi_align,
    separable_backward,
    strict_roi_align,
)

P3 = RoiGeometry(output_size=(7, 7), spatial_scale=1 / 8, sampling_ratio=0, aligned=True)
SIDE = 640
CHANNELS = 256

RECIPE_CASES = {
    "boxes, stride 8": (8, 7, 8 * 512),
    "boxes, stride 16": (16, 7, 8 * 512),
    "boxes, stride 32": (32, 7, 8 * 512),
    "masks, stride 8": (8, 14, 8 * 128),
}
"""By pooling: stride of the level, bins along an axis, boxes (of masks, the quarter that may be positive)."""


def boxes_of_level(count: int, images: int, seed: int = 0) -> torch.Tensor:
    """Boxes (K, 5) as the pyramid sends them to stride 8: between 16 and 224 pixels wide and high."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 * (224 / 16) ** torch.rand((count, 2), generator=generator)
    low = torch.rand((count, 2), generator=generator) * (SIDE - size)
    owner = torch.randint(0, images, (count, 1), generator=generator).float()
    return torch.cat([owner, low, low + size], dim=1)


def measure_order(device: str, shuffles: int = 3) -> dict[str, Any]:
    """Count cells of the features' gradient that change when the boxes are added in another order.

    Where none does, the expected number is estimated: a sum that moves by d crosses a rounding boundary of spacing s
    with probability d / s.
    """
    images, count = (8, 4096) if device == "cuda" else (2, 1024)
    shape = (images, CHANNELS, SIDE // 8, SIDE // 8)
    boxes, grad = boxes_of_level(count, images), torch.randn((count, CHANNELS, 7, 7))
    single = kernel_backward(grad, boxes, shape, P3)
    double = kernel_backward(grad.double(), boxes.double(), shape, P3)
    found = {
        "cells": shuffles * single.numel(),
        "float32": 0,
        "float64 to float32": 0,
        "float64 to half": 0,
    }
    expected = {torch.float32: 0.0, torch.float16: 0.0}
    for _ in range(shuffles):
        order = torch.randperm(count)
        other = kernel_backward(grad[order], boxes[order], shape, P3)
        found["float32"] += int((other != single).sum())
        other = kernel_backward(grad[order].double(), boxes[order].double(), shape, P3)
        found["float64 to float32"] += int((other.float() != double.float()).sum())
        found["float64 to half"] += int((other.half() != double.half()).sum())
        for dtype in expected:
            spacing = double.abs().clamp(min=torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
            expected[dtype] += float(((other - double).abs() / spacing).sum())
    return {**found, **{f"expected for {dtype}": value for dtype, value in expected.items()}}


def measure_forward() -> dict[str, Any]:
    """Compare published with plain values, for boxes of one size at different places of a large image."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {}
    for low, high in ((0, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096)):
        side = high // 8 + 32
        # Feature maps are smooth at the scale of cells: noise of standard deviation 1, averaged over 3 x 3 cells.
        noise = torch.randn((1, 16, side + 2, side + 2), generator=generator)
        features = torch.nn.functional.avg_pool2d(noise, 3, stride=1) * 3
        start = low + torch.rand((400, 2), generator=generator) * (high - low - 100)
        size = 16 + torch.rand((400, 2), generator=generator) * 84
        boxes = torch.cat([torch.zeros(400, 1), start, start + size], dim=1)
        plain = strict_roi_align(features, boxes, P3)
        both = published_roi_align(features, boxes, P3) - plain
        only_features = (
            strict_roi_align(features.half().double(), boxes.double(), P3) - plain.double()
        )
        rows[f"{low}-{high}"] = {
            "largest box shift, px": float((boxes.half().float() - boxes).abs().max()),
            "mean difference": float(both.abs().mean()),
            "largest difference": float(both.abs().max()),
            "largest difference from rounding features alone": float(only_features.abs().max()),
            "standard deviation of values": float(plain.std()),
        }
    return rows


def measure_gradients(scales: tuple[float, ...] = (1.0, 1e-2, 1e-4, 1e-6)) -> dict[str, Any]:
    """Share of the features' gradient that the published rounding makes 0 or infinite, by the size of the gradient."""
    boxes = boxes_of_level(200, 1)
    rows: dict[str, Any] = {}
    for scale in (*scales, 1e5):
        found = {}
        for name, operator in (("published", published_roi_align), ("strict", strict_roi_align)):
            features = torch.zeros((1, 32, 80, 80), requires_grad=True)
            weight = torch.randn((200, 32, 7, 7), generator=torch.Generator().manual_seed(1))
            (operator(features, boxes, P3) * weight * scale).sum().backward()
            found[name] = features.grad
        published, strict = found["published"], found["strict"]
        present = strict != 0
        finite = published.isfinite() & present & (published != 0)
        relative = ((published - strict).abs() / strict.abs())[finite]
        rows[f"{scale:g}"] = {
            "median size of an element": float(strict[present].abs().median()),
            "share lost": float((published[present] == 0).float().mean()),
            "share infinite": float((~published[present].isfinite()).float().mean()),
            "median relative difference of the rest": float(relative.median())
            if len(relative)
            else None,
        }
    return rows


def measure_network() -> dict[str, Any]:
    """Share of the gradient through RoIAlign that is below half precision's reach, in a step of R50 on one image."""
    from proxydet.runtime import roi_align

    overrides = [
        "data.boxes.batch_size=1",
        "data.image_labels=null",
        "training.precision.backbone=fp32",
    ]
    config = merge(r50(), parse_overrides(RunConfig, overrides))
    pieces: list[torch.Tensor] = []

    def listen(*arguments: Any) -> torch.Tensor:
        gradient = kernel_backward(*arguments)
        pieces.append(gradient[gradient != 0].abs())
        return gradient

    roi_align.kernel_backward = listen
    apply_mode("published")
    Bench(config, device="cpu", classes=LVIS_CLASSES).step()
    sizes = torch.cat(pieces)
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps / 2
    return {
        "elements": sizes.numel(),
        "median": float(sizes.median()),
        "largest": float(sizes.max()),
        "share lost without loss scaling": float((sizes <= least).double().mean()),
        "share lost with a loss scale of 65536": float((sizes * 65536 <= least).double().mean()),
        "share infinite with a loss scale of 65536": float((sizes * 65536 > 65504).double().mean()),
    }


def measure_memory() -> dict[str, Any]:
    """Memory and time of each backward pass at the sizes of the R50 recipe: 8 images of 640 x 640, 512 boxes each.

    Every box goes to one level, which is the worst case: a step spreads them over three.
    """
    found: dict[str, Any] = {}
    for case in RECIPE_CASES:
        for name in ("off", "strict"):
            options = ["--case", case, "--operator", name]
            command = [sys.executable, __file__, "one-memory", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{case}, {name}"] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_memory(case: str, name: str) -> dict[str, float]:
    """Measure one backward pass here: what it adds to its inputs at most, its result among it."""
    stride, bins, count = RECIPE_CASES[case]
    shape = (8, CHANNELS, SIDE // stride, SIDE // stride)
    geometry = RoiGeometry(
        output_size=(bins, bins), spatial_scale=1 / stride, sampling_ratio=0, aligned=True
    )
    boxes = boxes_of_level(count, 8)
    grad = torch.randn((count, CHANNELS, bins, bins))
    backward = {"off": kernel_backward, "strict": separable_backward}[name]
    few = backward(grad[:1], boxes[:1], (8, CHANNELS, 2, 2), geometry)
    before = resident_mib()
    start = time.process_time()
    result = backward(grad, boxes, shape, geometry)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "MiB added": peak - before,
        "MiB of it the result": result.numel() * result.element_size() / 2**20,
        "MiB of the gradient that comes in": grad.numel() * grad.element_size() / 2**20,
        "processor seconds": seconds,
        "finite": float(result.isfinite().all() and few.isfinite().all()),
    }


def measure_cost(device: str) -> dict[str, Any]:
    """Time and memory of one backward pass on the finest level, each in a process of its own."""
    names = ["off", "published", "strict"]
    found = {}
    for name in names:
        command = [sys.executable, __file__, "one-cost", "--device", device, "--operator", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_cost(device: str, name: str) -> dict[str, float]:
    """Measure one operator here."""
    images, count = (8, 4096) if device == "cuda" else (2, 256)
    shape = (images, CHANNELS, SIDE // 8, SIDE // 8)
    boxes, features = boxes_of_level(count, images).to(device), torch.randn(shape, device=device)
    features.requires_grad_()
    geometry = (P3.spatial_scale, 7, 7, 0, True)
    operators: dict[str, Callable[[], torch.Tensor]] = {
        "off": lambda: torch.ops.torchvision.roi_align(features, boxes, *geometry),
        "published": lambda: published_roi_align(features, boxes, P3),
        "strict": lambda: _StrictOnAnyDevice.run(features, boxes),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5 if device == "cpu" else 50):
        _wait(device)
        start = time.perf_counter()
        operators[name]().sum().backward()
        _wait(device)
        times.append(time.perf_counter() - start)
        features.grad = None
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": statistics.median(times), "MiB": memory}


class _StrictOnAnyDevice:
    """The strict operator with the matrix products of the GPU path, also on a CPU."""

    @staticmethod
    def run(features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return roi_align(features, boxes, P3, separable_backward)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_steps(device: str, repetitions: int) -> dict[str, Any]:
    """Run whole training steps in the three modes."""
    from proxydet.runtime.determinism import verify_determinism

    config = r50() if device == "cuda" else tiny()
    return asdict(verify_determinism(config, device=device, repetitions=repetitions))


def main() -> None:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["order", "forward", "gradients", "network", "memory", "cost", "steps"]
    parts += ["one-memory", "one-cost"]
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--operator", choices=["off", "published", "strict"], default="off")
    parser.add_argument("--case", choices=list(RECIPE_CASES), default="boxes, stride 8")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "order": lambda: measure_order(options.device),
        "forward": measure_forward,
        "gradients": measure_gradients,
        "network": measure_network,
        "memory": measure_memory,
        "cost": lambda: measure_cost(options.device),
        "steps": lambda: measure_steps(options.device, options.repetitions),
        "one-memory": lambda: one_memory(options.case, options.operator),
        "one-cost": lambda: one_cost(options.device, options.operator),
    }
    found = measurements[options.part]()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=None if options.part.startswith("one-") else 1))


if __name__ == "__main__":
    main()
