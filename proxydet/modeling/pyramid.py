"""Backbone with feature pyramid: detectron2's FPN over our networks."""

from __future__ import annotations

import proxydet.compat.d2  # noqa: F401

from detectron2.modeling.backbone import FPN
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional

from proxydet.modeling.config import BackboneConfig, PyramidConfig
from proxydet.modeling.resnet import ResNet
from proxydet.modeling.swin import SwinBackbone


class ExtraLevels(nn.Module):
    """Coarser levels on top of the pyramid: a 3x3 convolution of stride 2 each, on the ReLU of the one before.

    Args:
        top_level: The pyramid's coarsest level; its raw map is the first convolution's input.
        count: Levels to add, at least 1.
        channels: Channels of every level.
    """

    def __init__(self, top_level: int, count: int, channels: int) -> None:
        super().__init__()
        # These two names are what detectron2's FPN reads.
        self.in_feature = f"p{top_level}"
        self.num_levels = count
        self._names = [f"p{top_level + 1 + index}" for index in range(count)]
        for name in self._names:
            convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            c2_xavier_fill(convolution)
            self.add_module(name, convolution)

    def forward(self, top_BCHW: Tensor) -> list[Tensor]:
        """Return the added maps, finest first."""
        outputs: list[Tensor] = []
        for name in self._names:
            source = functional.relu(outputs[-1]) if outputs else top_BCHW
            outputs.append(self.get_submodule(name)(source))
        return outputs


def build_backbone(backbone: BackboneConfig, pyramid: PyramidConfig) -> FPN:
    """Build the feature extractor.

    Returns:
        A module from normalised images (B, 3, H, W), H and W divisible by its ``size_divisibility``, to
        ``{"p3": (B, channels, H / 8, W / 8), ...}``, finest level first.
    """
    if backbone.kind == "resnet":
        bottom_up: nn.Module = ResNet(backbone.resnet)
    else:
        bottom_up = SwinBackbone(backbone.swin, out_levels=pyramid.levels)
    top_block = None
    if pyramid.extra_levels:
        top_block = ExtraLevels(pyramid.levels[-1], pyramid.extra_levels, pyramid.channels)
    return FPN(
        bottom_up=bottom_up,
        in_features=[f"layer{level}" for level in pyramid.levels],
        out_channels=pyramid.channels,
        top_block=top_block,
    )
