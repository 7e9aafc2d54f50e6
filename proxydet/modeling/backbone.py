"""Backbone with feature pyramid: detectron2's FPN over our networks, timm's, or one at a Python path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import proxydet.runtime.d2  # noqa: F401

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from proxydet.errors import ConfigError
from proxydet.extensions import build_extension, extension_errors, load_extension
from proxydet.modeling.config import (
    BACKBONES,
    BackboneConfig,
    ModelConfig,
    PyramidConfig,
    ResNetConfig,
    SwinConfig,
)
from proxydet.wording import nearest

Pixel = tuple[float, float, float]
"""Red, green and blue, in [0, 255]."""
IMAGENET: tuple[Pixel, Pixel] = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation as most backbones were trained with."""


class _FixedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean_C: Tensor,
        variance_C: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Normalise; keep what belongs to the channels only."""
        ctx.save_for_backward(mean_C, variance_C, weight_C)
        ctx.eps = eps
        return functional.batch_norm(input, mean_C, variance_C, weight_C, bias_C, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient."""
        if not gradient.numel():  # on which torch's kernel divides by 0
            return torch.zeros_like(gradient), None, None, None, None, None
        mean_C, variance_C, weight_C = ctx.saved_tensors
        # The kernel reads the values that were normalised only for gradients of weight and bias, which are not asked for.
        scaled, _, _ = torch.ops.aten.native_batch_norm_backward(
            gradient,
            gradient,
            weight_C,
            mean_C,
            variance_C,
            None,
            None,
            False,
            ctx.eps,
            [True, False, False],
        )
        return scaled, None, None, None, None, None


class _FixedBatchNorm(nn.BatchNorm2d):
    """What BatchNorms become whose statistics and affine never change: their class is exchanged for this one.

    The gradient of such a norm needs none of the values that it normalises, so it does not keep them: half the memory of a
    residual network's backward pass. Values and gradients are those of torch's own, bit for bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, channels, ...) with the stored statistics."""
        settings = self.running_mean, self.running_var, self.weight, self.bias
        # A compiler decides itself what to keep; and whoever unfreezes the affine later trains it.
        if (
            torch.compiler.is_compiling()
            or not (torch.is_grad_enabled() and input.requires_grad)
            or any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        ):
            return functional.batch_norm(input, *settings, eps=self.eps)
        normalised: Tensor = _FixedNorm.apply(input, *settings, self.eps)
        return normalised


_TIMM_NORM = ("timm.layers.norm_act", "BatchNormAct2d")


class _FixedBatchNormAct(_FixedBatchNorm):
    """As `_FixedBatchNorm`, for timm's BatchNorm with dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate."""
        return cast(Tensor, self.act(self.drop(super().forward(input))))


class FrozenBatchNorm(_FixedBatchNorm):
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
        return super().forward(input)


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


PATCH = 4
# Added to the logits of token pairs that are neighbours only because the shift wrapped around the map.
_APART = -100.0


def to_windows(maps_BHWC: Tensor, side: int) -> Tensor:
    """Cut maps, H and W divisible by ``side``, into windows (B * N, T, C), row by row."""
    batch, height, width, channels = maps_BHWC.shape
    grid = maps_BHWC.view(batch, height // side, side, width // side, side, channels)
    return grid.transpose(2, 3).reshape(-1, side * side, channels)


def from_windows(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """Put windows (B * N, T, C) back together to maps (B, H, W, C)."""
    channels = windows.shape[-1]
    grid = windows.view(-1, height // side, width // side, side, side, channels)
    return grid.transpose(2, 3).reshape(-1, height, width, channels)


def _whole_windows(length: int, side: int) -> int:
    """Round up to a multiple of ``side``, in whole numbers above 0 only: ONNX rounds quotients towards 0."""
    return (length + side - 1) // side * side


def relative_positions(side: int) -> Tensor:
    """Return for each pair of tokens of a window the row of the bias table: int64 (T, T) in [0, (2 side - 1)^2)."""
    axis = torch.arange(side)
    row_T, column_T = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    down_TT = row_T[:, None] - row_T[None, :] + side - 1
    across_TT = column_T[:, None] - column_T[None, :] + side - 1
    return down_TT * (2 * side - 1) + across_TT


def shift_mask(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """Return what keeps wrapped-around tokens apart: (N, T, T), 0 or -100, for windows shifted by ``side // 2``.

    Args:
        height: Rows of the padded map, divisible by ``side``.
        width: Columns of the padded map, divisible by ``side``.
        side: Side of a window.
        device: Where to make it.
    """
    shift = side // 2

    def bands(length: int) -> Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - side).long() + (position >= length - shift).long()

    region_HW = 3 * bands(height)[:, None] + bands(width)[None, :]
    region_NT = to_windows(region_HW[None, :, :, None], side)[:, :, 0]
    apart_NTT = region_NT[:, :, None] != region_NT[:, None, :]
    return apart_NTT.float() * _APART


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learnt bias for each relative position.

    Args:
        channels: C.
        heads: K, a divisor of C.
        side: Side of a window.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(side))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, windows: Tensor, mask_NTT: Tensor | None) -> Tensor:
        """Attend within each window.

        Args:
            windows: (B * N, T, C).
            mask_NTT: Added to the attention logits of the N windows of each image; None adds nothing.

        Returns:
            (B * N, T, C).
        """
        count, tokens, channels = windows.shape
        qkv = self.qkv(windows).view(count, tokens, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = table.view(tokens, tokens, self.heads).permute(2, 0, 1)[None]
        if mask_NTT is not None:
            bias = bias + mask_NTT[:, None]
        bias = bias.to(query.dtype)
        if mask_NTT is not None:
            bias = bias.repeat(count // mask_NTT.shape[0], 1, 1, 1)
        bias = bias.expand(count, -1, -1, -1)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(windows.shape)))


class Mlp(nn.Module):
    """Two fully connected layers with GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return cast(Tensor, self.fc2(functional.gelu(self.fc1(tokens))))


class SwinBlock(nn.Module):
    """Window attention and MLP, each behind a LayerNorm and added to its input.

    Args:
        channels: C.
        heads: Attention heads.
        config: Window, MLP ratio.
        shifted: Whether the windows are shifted by half their side.
        drop_path: Probability that an image skips each of the two parts in training.
    """

    def __init__(
        self, channels: int, heads: int, config: SwinConfig, *, shifted: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.side = config.window
        self.shift = config.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, config.window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, maps_BHWC: Tensor, mask_NTT: Tensor) -> Tensor:
        """Return maps of the same shape; ``mask_NTT`` is that of the padded, shifted map."""
        maps_BHWC = maps_BHWC + self.drop_path(self._attend(self.norm1(maps_BHWC), mask_NTT))
        return cast(Tensor, maps_BHWC + self.drop_path(self.mlp(self.norm2(maps_BHWC))))

    def _attend(self, maps_BHWC: Tensor, mask_NTT: Tensor) -> Tensor:
        height, width = maps_BHWC.shape[1:3]
        full_height, full_width = (
            _whole_windows(height, self.side),
            _whole_windows(width, self.side),
        )
        padded = functional.pad(maps_BHWC, (0, 0, 0, full_width - width, 0, full_height - height))
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(to_windows(padded, self.side), mask_NTT if self.shift else None)
        attended = from_windows(windows, self.side, full_height, full_width)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), dims=(1, 2))
        return attended[:, :height, :width]


class PatchMerging(nn.Module):
    """Halves the map: each 2x2 tokens become one with twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, maps_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C); odd sizes are padded with zeros."""
        height, width = maps_BHWC.shape[1:3]
        even = functional.pad(maps_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        # The published channel order: down the left column first, then down the right one.
        corners = [even[:, row::2, column::2] for column, row in ((0, 0), (0, 1), (1, 0), (1, 1))]
        return cast(Tensor, self.reduction(self.norm(torch.cat(corners, dim=-1))))


class SwinStage(nn.Module):
    """Blocks at one resolution, then the merging of tokens (except after the last stage)."""

    downsample: PatchMerging | None

    def __init__(self, stage: int, config: SwinConfig, drop_paths: list[float]) -> None:
        super().__init__()
        channels = config.embed_dim * 2**stage
        self.side = config.window
        self.checkpoint_activations = config.checkpoint_activations
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels, config.heads[stage], config, shifted=index % 2 == 1, drop_path=drop_path
            )
            for index, drop_path in enumerate(drop_paths)
        )
        last = stage == config.stages - 1
        self.downsample = None if last else PatchMerging(channels)

    def forward(self, maps_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return this stage's maps, and what the next stage starts from."""
        height, width = (_whole_windows(size, self.side) for size in maps_BHWC.shape[1:3])
        mask_NTT = shift_mask(height, width, self.side, maps_BHWC.device)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                maps_BHWC = checkpoint(block, maps_BHWC, mask_NTT, use_reentrant=False)
            else:
                maps_BHWC = block(maps_BHWC, mask_NTT)
        onward = maps_BHWC if self.downsample is None else self.downsample(maps_BHWC)
        return maps_BHWC, onward


class PatchEmbed(nn.Module):
    """Turns each 4x4 pixels into a token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Map (B, 3, H, W) pixels to (B, ceil(H / 4), ceil(W / 4), C) tokens."""
        height, width = images_B3HW.shape[2:]
        padded = functional.pad(images_B3HW, (0, -width % PATCH, 0, -height % PATCH))
        return cast(Tensor, self.norm(self.proj(padded).permute(0, 2, 3, 1)))


class SwinBackbone(Backbone):
    """Patch embedding and stages.

    Outputs are named after their level: ``layer{n}`` has stride ``2**n``; stage i makes level i + 2, and each output
    goes through its own LayerNorm ``norm{i}``.

    Args:
        config: Sizes.
        out_levels: The levels to return.
    """

    def __init__(self, config: SwinConfig, out_levels: tuple[int, ...]) -> None:
        super().__init__()
        self._out_stages = tuple(level - 2 for level in out_levels)
        self._channels = [config.embed_dim * 2**stage for stage in range(config.stages)]
        self.patch_embed = PatchEmbed(config.embed_dim)
        drop_paths = torch.linspace(0.0, config.drop_path, sum(config.depths)).split(
            list(config.depths)
        )
        self.layers = nn.ModuleList(
            SwinStage(stage, config, drop_paths[stage].tolist()) for stage in range(config.stages)
        )
        for stage in self._out_stages:
            self.add_module(f"norm{stage}", nn.LayerNorm(self._channels[stage]))
        self.apply(_initialise)

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Return maps (B, C, H, W) of every output level, by name."""
        onward = self.patch_embed(images_B3HW)
        outputs = {}
        for stage, layer in enumerate(self.layers):
            maps_BHWC, onward = layer(onward)
            if stage in self._out_stages:
                normalised = self.get_submodule(f"norm{stage}")(maps_BHWC)
                outputs[f"layer{stage + 2}"] = normalised.permute(0, 3, 1, 2).contiguous()
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every output."""
        return {
            f"layer{stage + 2}": ShapeSpec(channels=self._channels[stage], stride=2 ** (stage + 2))
            for stage in self._out_stages
        }


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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


class LevelBackbone(Backbone):
    """A network that returns a list of maps as a detectron2 backbone with outputs ``layer2`` (stride 4), ``layer3``, ...

    It is run once on an empty image when it is made, so that maps that are not what it says are refused then.

    Args:
        base: Maps (B, 3, H, W) to a list of maps (B, C, H / stride, W / stride), or with the channels last.
        channels: Channels of each map.
        strides: Stride of each map.
        levels: The levels to return; ``2**level`` is among the strides.
        what: What it is, for messages.
        frozen_norms: Whether its BatchNorms keep their statistics and affine.

    Raises:
        ConfigError: It lacks a level, or does not run, or returns other maps.
    """

    def __init__(
        self,
        base: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        levels: Sequence[int],
        *,
        what: str,
        frozen_norms: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self._norms = [m for m in base.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._frozen = frozen_norms
        if frozen_norms:
            for norm in self._norms:
                norm.requires_grad_(False)
                if norm.running_mean is None:  # it has no statistics but a batch's own
                    continue
                if type(norm).forward is nn.BatchNorm2d.forward:
                    norm.__class__ = _FixedBatchNorm
                elif (type(norm).__module__, type(norm).__name__) == _TIMM_NORM:
                    norm.__class__ = _FixedBatchNormAct
        places = indices_of_levels(strides, levels, what)
        self._places = dict(zip(levels, places, strict=True))
        self._channels = [int(channels[place]) for place in places]
        self._inner = [False] * len(places)  # whether a map has its channels last
        training = base.training
        size = (64 + 2 ** max(levels), 128)
        with extension_errors(f"{what}: running it on an image of {size[0]} x {size[1]} pixels"):
            with torch.no_grad():
                maps = base.eval()(torch.zeros(1, 3, *size))
            shapes = [tuple(maps[place].shape) for place in places]
        for index, (shape, level) in enumerate(zip(shapes, levels, strict=True)):
            cells = tuple(-(-side // 2**level) for side in size)
            wanted = (1, self._channels[index], *cells)
            self._inner[index] = shape != wanted and shape == (1, *cells, wanted[1])
            if shape != wanted and not self._inner[index]:
                raise ConfigError(
                    f"{what}: of an image of {size[0]} x {size[1]} pixels, its map {places[index]} has the shape {shape}, "
                    f"and by its channels and strides it should have {wanted}.",
                    hint="correct its channels and strides, or its forward",
                )
        base.train(training)

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Return a map for every level, by name."""
        maps = self.base(images_B3HW)
        return {
            f"layer{level}": maps[place].permute(0, 3, 1, 2) if inner else maps[place]
            for (level, place), inner in zip(self._places.items(), self._inner, strict=True)
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every output."""
        return {
            f"layer{level}": ShapeSpec(channels=channels, stride=2**level)
            for level, channels in zip(self._places, self._channels, strict=True)
        }

    def train(self, mode: bool = True) -> LevelBackbone:
        """Set the mode; frozen norms stay in that of inference."""
        super().train(mode)
        for norm in self._norms if self._frozen else ():
            norm.eval()
        return self


def indices_of_levels(strides: Sequence[int], levels: Sequence[int], what: str) -> list[int]:
    """Return for each level the last map with its stride.

    Raises:
        ConfigError: There is none.
    """
    by_stride = {int(stride): index for index, stride in enumerate(strides)}
    absent = [level for level in levels if 2**level not in by_stride]
    if absent:
        raise ConfigError(
            f"{what} has maps of the strides {', '.join(map(str, strides))}, and model.pyramid.levels {list(levels)} need "
            f"{', '.join(str(2**level) for level in absent)} too.",
            hint="set model.pyramid.levels to levels that it has (level n has stride 2**n), or take another network",
        )
    return [by_stride[2**level] for level in levels]


def how_to_get_timm(name: str) -> str:
    """Return the commands that fetch the weights of a timm model from its hub, and train from them."""
    import timm

    stated = timm.get_pretrained_cfg(name, allow_unregistered=True)
    hub = stated.hf_hub_id if stated is not None and stated.hf_hub_id else f"timm/{name}"
    return f"to fetch pretrained ones: hf download {hub} model.safetensors; it prints the path of the file, for --weights"


def _timm_backbone(config: BackboneConfig, levels: Sequence[int]) -> LevelBackbone:
    import timm

    name = config.timm
    what = f"model.backbone.timm {name}"
    if not timm.is_model(name):
        raise ConfigError(
            f"model.backbone.timm is {name[:80]!r}, which is not a model of timm {timm.__version__}."
            + nearest(name, timm.list_models()),
            hint="list them: python -c \"import timm; print(*timm.list_models('*resnet*'))\"",
        )

    fetched = [key for key in config.options if key.startswith(("pretrained", "checkpoint"))]
    if fetched:
        raise ConfigError(
            f"model.backbone.options holds {fetched[0]}: weights are not downloaded when a network is made.",
            hint=how_to_get_timm(name),
        )

    def create(**options: Any) -> Any:
        given: dict[str, Any] = {**config.options, **options}
        return timm.create_model(name, features_only=True, **given)

    with extension_errors(f"{what}: making it"):
        try:
            with torch.device("meta"):  # only its strides are asked for
                info = create().feature_info
        # A layer computes a value when it is made, which the meta device has not.
        except NotImplementedError:
            info = create().feature_info
        places = indices_of_levels(info.reduction(), levels, what)
        # Later stages than those that are used are not made.
        network = create(out_indices=[info.out_indices[place] for place in places])
        info = network.feature_info
    return LevelBackbone(
        network,
        info.channels(),
        info.reduction(),
        levels,
        what=what,
        frozen_norms=config.frozen_norms,
    )


def _own_backbone(config: BackboneConfig, levels: Sequence[int]) -> LevelBackbone:
    what = f"model.backbone.kind {config.kind}"
    network = build_extension(config.kind, "model.backbone.kind", config.options)
    sizes = [getattr(network, name, None) for name in ("channels", "strides")]
    counts = {len(size) if isinstance(size, list | tuple) else 0 for size in sizes}
    if not isinstance(network, nn.Module) or len(counts) != 1 or 0 in counts:
        raise ConfigError(
            f"{what} must make a torch.nn.Module with channels and strides: lists with an entry for each map that its forward "
            f"returns; it makes a {type(network).__name__} with channels {sizes[0]} and strides {sizes[1]}.",
            hint='the how-to page "Change the method" has an example',
        )
    channels, strides = sizes
    assert channels is not None
    assert strides is not None
    return LevelBackbone(
        network, channels, strides, levels, what=what, frozen_norms=config.frozen_norms
    )


def pixel_statistics(config: ModelConfig) -> tuple[Pixel, Pixel]:
    """Return what is subtracted from red, green and blue in [0, 255], and what the result is divided by.

    Raises:
        ConfigError: The network at a Python path cannot be found.
    """
    mean, std = IMAGENET
    kind = config.backbone.kind
    if config.pixel_mean is None or config.pixel_std is None:
        if kind == "timm":
            import timm

            stated = timm.get_pretrained_cfg(config.backbone.timm, allow_unregistered=True)
            if stated is not None and len(stated.mean) == len(stated.std) == 3:
                mean = tuple(255.0 * value for value in stated.mean)
                std = tuple(255.0 * value for value in stated.std)
        elif kind not in BACKBONES:
            own = load_extension(kind, "model.backbone.kind")
            mean, std = getattr(own, "pixel_mean", mean), getattr(own, "pixel_std", std)
    return config.pixel_mean or mean, config.pixel_std or std


def build_backbone(backbone: BackboneConfig, pyramid: PyramidConfig) -> FPN:
    """Build the feature extractor.

    Returns:
        A module from normalised images (B, 3, H, W), H and W divisible by its ``size_divisibility``, to
        ``{"p3": (B, channels, H / 8, W / 8), ...}``, finest level first.

    Raises:
        ConfigError: There is no such network, or it does not make the pyramid's levels.
    """
    if backbone.kind == "resnet":
        bottom_up: nn.Module = ResNet(backbone.resnet)
    elif backbone.kind == "swin":
        bottom_up = SwinBackbone(backbone.swin, out_levels=pyramid.levels)
    elif backbone.kind == "timm":
        bottom_up = _timm_backbone(backbone, pyramid.levels)
    else:
        bottom_up = _own_backbone(backbone, pyramid.levels)
    top_block = None
    if pyramid.extra_levels:
        top_block = ExtraLevels(pyramid.levels[-1], pyramid.extra_levels, pyramid.channels)
    return FPN(
        bottom_up=bottom_up,
        in_features=[f"layer{level}" for level in pyramid.levels],
        out_channels=pyramid.channels,
        top_block=top_block,
    )
