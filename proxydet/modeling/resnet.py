"""Residual networks (He et al. 2016), made of torchvision's blocks, with the published parameter names.

Dimensions: B images, H and W pixels or cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from proxydet.modeling.config import ResNetConfig


class FrozenBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics and affine come from a checkpoint and never change, in training neither."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, channels, H, W) with the stored statistics.

        In inference mode on a CPU ``input`` itself is changed and returned: it is a convolution's output, which nobody
        else reads.
        """
        if torch.is_inference_mode_enabled() and input.device.type == "cpu":
            assert self.running_mean is not None
            assert self.running_var is not None
            scale_C = self.weight * (self.running_var + self.eps).rsqrt()
            shift_C = self.bias - self.running_mean * scale_C
            return torch.addcmul(shift_C[:, None, None], input, scale_C[:, None, None], out=input)
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class ResNetTrunk(nn.Module):
    """Stem and stages.

    Args:
        config: Sizes and normalisation.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        norm = _norm_layer(config)
        self.conv1 = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(config.width)
        self.channels: list[int] = []
        channels = config.width
        for stage, depth in enumerate(config.depths):
            layer, channels = _stage(config, stage, depth, channels, norm)
            self.add_module(f"layer{stage + 1}", layer)
            self.channels.append(channels)
        self._initialise()

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Return one map a stage, strides 4, 8, 16, ..."""
        maps = functional.relu(self.bn1(self.conv1(images_B3HW)), inplace=True)
        maps = functional.max_pool2d(maps, 3, stride=2, padding=1)
        outputs = []
        for stage in range(len(self.channels)):
            maps = self.get_submodule(f"layer{stage + 1}")(maps)
            outputs.append(maps)
        return outputs

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(Backbone):
    """A residual network as a detectron2 backbone with outputs ``layer2`` (stride 4), ``layer3``, ...

    The outputs are named after their level: ``layer{n}`` has stride ``2**n``.

    Args:
        config: Sizes and normalisation.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.base = ResNetTrunk(config)

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Return a map for every stage, by level name."""
        return {f"layer{level}": maps for level, maps in enumerate(self.base(images_B3HW), start=2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every output."""
        return {
            f"layer{level}": ShapeSpec(channels=channels, stride=2**level)
            for level, channels in enumerate(self.base.channels, start=2)
        }


def _norm_layer(config: ResNetConfig) -> Callable[[int], nn.Module]:
    if config.norm == "frozen_bn":
        return FrozenBatchNorm
    if config.norm == "bn":
        return nn.BatchNorm2d
    return lambda channels: nn.GroupNorm(math.gcd(config.norm_groups, channels), channels)


def _stage(
    config: ResNetConfig,
    stage: int,
    depth: int,
    channels_in: int,
    norm: Callable[[int], nn.Module],
) -> tuple[nn.Sequential, int]:
    block = Bottleneck if config.block == "bottleneck" else BasicBlock
    planes = config.width * 2**stage
    channels_out = planes * block.expansion
    stride = 1 if stage == 0 else 2
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), norm(channels_out)
        )
    blocks = [block(channels_in, planes, stride, shortcut, norm_layer=norm)]
    blocks += [block(channels_out, planes, norm_layer=norm) for _ in range(depth - 1)]
    _damp_residuals(blocks)
    return nn.Sequential(*blocks), channels_out


def _damp_residuals(blocks: list[nn.Module]) -> None:
    # A block that starts as the identity lets a network without pretrained weights train from the first step;
    # a frozen norm could never leave that start.
    for block in blocks:
        last = block.get_submodule("bn3" if isinstance(block, Bottleneck) else "bn2")
        if not isinstance(last, FrozenBatchNorm):
            nn.init.zeros_(last.get_parameter("weight"))
