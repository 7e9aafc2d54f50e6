"""Settings of the backbones. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from proxydet.modeling.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A residual network; the defaults are ResNet-50."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks a stage; stage 0 has stride 4, every next one twice the stride before it."""

    width: int = 64
    """Channels of the stem; stage i works with ``width * 2**i``."""

    block: Literal["bottleneck", "basic"] = "bottleneck"
    """Residual block: 1x1-3x3-1x1 convolutions with fourfold output channels, or two 3x3 convolutions."""

    norm: Literal["frozen_bn", "bn", "gn"] = "frozen_bn"
    """Normalisation: BatchNorm with frozen statistics and affine (for pretrained weights), BatchNorm, or GroupNorm."""

    norm_groups: int = 32
    """Groups of GroupNorm, reduced to a divisor of the channels; read with ``norm = "gn"``."""

    def __post_init__(self) -> None:
        require_positive("resnet", width=self.width, norm_groups=self.norm_groups)
        require(
            len(self.depths) >= 1 and min(self.depths) >= 1,
            f"resnet.depths must hold at least one stage of at least one block, not {self.depths}",
        )

    @property
    def stages(self) -> int:
        """Number of stages; the last one has stride ``2 ** (stages + 1)``."""
        return len(self.depths)


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """A Swin Transformer; the defaults are Swin-B with windows of 7."""

    embed_dim: int = 128
    """Channels of stage 0; every next stage has twice as many."""

    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks a stage; stage 0 has stride 4, every next one twice the stride before it."""

    heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads a stage."""

    window: int = 7
    """Side of an attention window, in tokens."""

    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, in multiples of its channels."""

    drop_path: float = 0.3
    """Stochastic depth: the last block's probability to be skipped, growing linearly from 0 at the first."""

    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        require_positive(
            "swin", embed_dim=self.embed_dim, window=self.window, mlp_ratio=self.mlp_ratio
        )
        require(0.0 <= self.drop_path < 1.0, f"swin.drop_path must be in [0, 1): {self.drop_path}")
        require(
            len(self.depths) == len(self.heads) >= 1 and min(self.depths) >= 1,
            f"swin.depths {self.depths} and swin.heads {self.heads} must have one entry a stage",
        )
        for stage, heads in enumerate(self.heads):
            channels = self.embed_dim * 2**stage
            require(
                heads >= 1 and channels % heads == 0,
                f"swin.heads[{stage}] = {heads} does not divide the {channels} channels of that stage",
            )

    @property
    def stages(self) -> int:
        """Number of stages; the last one has stride ``2 ** (stages + 1)``."""
        return len(self.depths)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network makes the feature maps, and how large it is."""

    kind: Literal["resnet", "swin"] = "resnet"
    """Which of the two sections below is used."""

    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    """Sizes of the residual network, read with ``kind = "resnet"``."""

    swin: SwinConfig = field(default_factory=SwinConfig)
    """Sizes of the Swin Transformer, read with ``kind = "swin"``."""

    @property
    def stages(self) -> int:
        """Number of stages of the network in use."""
        return self.resnet.stages if self.kind == "resnet" else self.swin.stages
