"""Rough memory and time of a training, before it runs.

The network is run on torch's meta device, which computes shapes only: that gives the multiply-adds of a step and the bytes
that its backward pass keeps, for any configuration. Pooling, proposals, losses and the optimiser are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from proxydet.data.config import SourceConfig
from proxydet.modeling.centernet import CenterNet
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.pyramid import build_backbone
from proxydet.modeling.roi_heads import RoiHeads
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import choose_device

# AdamW: weight, gradient and two moments in float32.
_BYTES_PER_PARAMETER = 16
# The operations of a step over its time, as a share of what the probe's convolution reaches. Measured for R50 on a 2-core CPU
# (benchmarks/training_step_cpu2_202611.md, 220 GFLOP/s): 1.17 for box batches, with fewer masks than are counted here,
# 0.65 for image-label batches. No GPU was measured.
_EFFICIENCY = 0.85
_PROBE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class BatchCost:
    """What one batch of a source takes."""

    images: int
    """Images."""

    operations: float
    """Floating-point operations, forward and backward; a multiply-add is two."""

    kept_bytes: float
    """What the forward pass keeps for the backward pass."""

    share: float
    """Share of the steps that take such a batch, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training takes, roughly: within a factor of two on an idle machine."""

    device: str
    """Where it would compute."""

    parameters: int
    """Parameters of the network."""

    memory_gib: float
    """Memory of the device, a process."""

    seconds_per_step: float
    """Time of a step."""

    operations_per_second: float
    """Floating-point operations a second that a large convolution reached in a short probe of the device."""

    hours: float
    """Time of all steps."""

    images: int
    """Images that all processes see in all steps."""

    def lines(self) -> list[str]:
        """Return the estimate for people to read."""
        lines = [
            f"device       {self.device}, at least {self.memory_gib:.1f} GiB a process, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"time         about {_duration(self.hours)}: {self.seconds_per_step:.2g} s a step, "
            f"{self.images:,} images; a rough guess: a convolution reaches {self.operations_per_second / 1e9:.3g} GFLOP/s "
            "here just now (less where other programs run)",
        ]
        if self.device == "cpu" and self.hours > 24:
            lines.append("slow         this recipe is made for GPUs; on a CPU it takes very long")
        return lines


def estimate_run(
    model: ModelConfig,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
    processes: int,
) -> Estimate:
    """Estimate a training.

    Args:
        model: Sizes of the network.
        boxes: Batches of annotated images.
        labels: Batches of images with labels; None where there are none.
        training: Settings, scaled to the number of processes.
        processes: How many processes train.
    """
    device = choose_device(training.device)
    parts = MetaNetwork(model)
    costs = batch_costs(parts, boxes, labels, training)
    operations = sum(cost.operations * cost.share for cost in costs) * training.accumulation
    images = sum(cost.images * cost.share for cost in costs) * training.accumulation * processes
    speed = device_speed(device, training.precision.dtype)
    seconds = operations / (_EFFICIENCY * speed)
    parameters = sum(p.numel() for p in parts.parameters())
    return Estimate(
        device=str(device),
        parameters=parameters,
        memory_gib=(_BYTES_PER_PARAMETER * parameters + max(cost.kept_bytes for cost in costs))
        / 2**30,
        seconds_per_step=seconds,
        operations_per_second=speed,
        hours=seconds * training.iterations / 3600,
        images=round(images * training.iterations),
    )


def batch_costs(
    network: MetaNetwork,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
) -> list[BatchCost]:
    """Return what the batches of each source take.

    Sources are drawn by image: one with twice the batch size at the same ratio makes half as many batches.
    """
    sources = [source for source in (boxes, labels) if source is not None]
    weights = [source.ratio / source.batch_size for source in sources]
    small = 0.5 if training.precision.dtype != "fp32" else 1.0
    costs = []
    for source, weight in zip(sources, weights, strict=True):
        features, pyramid = count(network.pyramid, source.batch_size, source.size)
        regions = network.config.cascade.samples_per_image if source is boxes else 1
        heads = count(network.heads, source.batch_size, regions, source is boxes)[1]
        proposals = count(network.proposals, features)[1]
        operations = pyramid[0] + proposals[0] + heads[0]
        kept = small * pyramid[1] + proposals[1] + heads[1]
        costs.append(
            BatchCost(
                images=source.batch_size,
                operations=3 * operations,
                kept_bytes=kept,
                share=weight / sum(weights),
            )
        )
    return costs


def count(function: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[float, float]]:
    """Run a function on meta tensors; return its result, and its operations and the bytes that it keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    return result, (float(counter.get_total_flops()), float(sum(kept.values())))


def device_speed(device: torch.device, dtype: str) -> float:
    """Return the floating-point operations a second that a large convolution reaches on a device just now."""
    formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    used = formats[dtype] if device.type == "cuda" else torch.float32
    values = torch.randn(2, 256, 64, 64, device=device, dtype=used)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=used)
    operations = 2 * values.numel() * 256 * 9
    rounds, start = 0, 0.0
    while rounds < 3 or time.perf_counter() - start < _PROBE_SECONDS:
        if rounds == 2:
            start = time.perf_counter()
        functional.conv2d(values, weight, padding=1).mean().item()
        rounds += 1
    return operations * (rounds - 2) / (time.perf_counter() - start)


class MetaNetwork:
    """The network's parts on the meta device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        dimension = config.classifier.embedding_dim
        self._backbone = build_backbone(config.backbone, config.pyramid).to("meta")
        channels, strides = config.pyramid.channels, config.pyramid.strides
        self._centernet = CenterNet(config.proposals, channels, strides).to("meta")
        self._roi_heads = RoiHeads(config, torch.zeros(dimension, 2), torch.ones(1)).to("meta")

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        modules = (self._backbone, self._centernet, self._roi_heads)
        return [parameter for module in modules for parameter in module.parameters()]

    def pyramid(self, images: int, size: int) -> list[Tensor]:
        """Run backbone and pyramid on images of a size, padded as the network pads them."""
        side = -(-size // self._backbone.size_divisibility) * self._backbone.size_divisibility
        pixels = torch.empty(images, 3, side, side, device="meta")
        return list(self._backbone(pixels).values())

    def proposals(self, features: list[Tensor]) -> object:
        """Run the proposal network's convolutions."""
        return self._centernet(features)

    def heads(self, images: int, regions: int, boxes: bool) -> None:
        """Run the heads with gradient on a number of regions an image, masks and mixup on as many as may be objects."""
        config, heads = self.config, self._roi_heads
        side, channels = config.cascade.pool_size, config.pyramid.channels
        pooled = torch.empty(images * regions, channels, side, side, device="meta")
        for step in range(config.cascade.steps):
            features = heads.detection.features(step, pooled)
            heads.detection.deltas(step, features)
        if not boxes:
            return
        objects = max(round(images * regions * config.cascade.positive_fraction), 1)
        if heads.mixup is not None:
            heads.mixup.features(config.cascade.steps - 1, pooled[:objects])
        if config.masks is not None and heads.mask_head is not None:
            mask_side = config.masks.pool_size
            pooled = torch.empty(objects, channels, mask_side, mask_side, device="meta")
            heads.mask_head.layers(pooled)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{max(hours * 60, 0.1):.2g} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
