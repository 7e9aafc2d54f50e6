"""detectron2's layers as torch's own, which can be traced with shapes that depend on data."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

from detectron2.layers import Conv2d
from torch import nn


def make_convolutions_plain(module: nn.Module) -> None:
    """Replace every detectron2 ``Conv2d`` below a module by torch's, with its norm and its activation behind it.

    detectron2's asks, in Python, whether its input is empty.

    Args:
        module: Changed in place; its parameters are kept.
    """
    for name, child in module.named_children():
        if isinstance(child, Conv2d):
            setattr(module, name, _plain(child))
        else:
            make_convolutions_plain(child)


def _plain(layer: Conv2d) -> nn.Module:
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    behind = [part for part in (layer.norm, layer.activation) if part is not None]
    return nn.Sequential(plain, *(_as_module(part) for part in behind)) if behind else plain


def _as_module(part: object) -> nn.Module:
    if isinstance(part, nn.Module):
        return part
    if part is nn.functional.relu:
        return nn.ReLU()
    raise TypeError(f"no plain form of the activation {part!r} is known")
