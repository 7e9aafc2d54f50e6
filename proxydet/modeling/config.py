"""Sizes and settings of the detector. The defaults are the published ProxyDet R50.

Nothing here imports torch: the command line reads these classes to print and check configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from proxydet.errors import ConfigError
from proxydet.extensions import Options, is_python_path, require_python_path
from proxydet.wording import nearest


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(where: str, **values: float) -> None:
    """Raise a `ConfigError` unless all values are above 0; ``where`` is the section that they are in."""
    for name, value in values.items():
        require(value > 0, f"{where}.{name} must be above 0, not {value}")


def require_share(where: str, **values: float) -> None:
    """Raise a `ConfigError` unless all values are in [0, 1]; ``where`` is the section that they are in."""
    for name, value in values.items():
        require(0.0 <= value <= 1.0, f"{where}.{name} must be in [0, 1], not {value}")


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

    kind: str = "resnet"
    """resnet, swin or timm; or the Python path of a network of your own, such as mypackage.networks:Mine."""

    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    """Sizes of the residual network, read with ``kind = "resnet"``."""

    swin: SwinConfig = field(default_factory=SwinConfig)
    """Sizes of the Swin Transformer, read with ``kind = "swin"``."""

    timm: str = "resnet50"
    """Name of a timm model that can give feature maps, read with ``kind = "timm"``. The stages with the strides of
    ``pyramid.levels`` are used. It starts from fresh weights, or from those of ``training.weights``; nothing is downloaded."""

    options: Options = field(default_factory=dict)
    """Keyword arguments of the timm model, or of the network at a Python path."""

    frozen_norms: bool = False
    """Keep the BatchNorms of a timm model, or of the network at a Python path, as their weights have them: neither statistics
    nor affine change. For pretrained weights and small batches."""

    def __post_init__(self) -> None:
        if self.kind not in BACKBONES and not is_python_path(self.kind):
            raise ConfigError(
                f"kind must be {', '.join(BACKBONES)} or a Python path; it is {self.kind[:80]!r}."
                + nearest(self.kind, BACKBONES),
                hint="a timm model: --set model.backbone.kind=timm --set model.backbone.timm=NAME; a network of your own: "
                "--set model.backbone.kind=mypackage.networks:Mine",
            )

    @property
    def stages(self) -> int | None:
        """Number of stages of the network in use; None where only the built network says so."""
        known = {"resnet": self.resnet.stages, "swin": self.swin.stages}
        return known.get(self.kind)


BACKBONES = ("resnet", "swin", "timm")
"""Values of ``model.backbone.kind`` besides Python paths."""

TTA_SCALES = (0.75, 1.0, 1.25)
"""Sizes of ``--tta``, times the usual one."""

_SMALLEST, _LARGEST = 0.1, 4.0
_SMALLEST_TILE, _MOST_OVERLAP = 32, 0.9

Precision: TypeAlias = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of the products of a part of the network. ``tf32`` rounds their factors to 10 bits of fraction on NVIDIA GPUs from Ampere on,
and is fp32 elsewhere; ``bf16`` and ``fp16`` are torch's autocast. Weights stay float32."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What is kept of the scored regions."""

    score_threshold: float = 0.02
    """Detections must score above this, in [0, 1]."""

    nms_iou: float = 0.5
    """Overlap above which the lower-scored of two detections of one class is dropped."""

    max_detections: int = 300
    """Best detections kept an image."""

    one_class_per_proposal: bool = False
    """Keep only the best class of each proposal, as the published demos do."""

    agnostic_nms: bool = False
    """NMS over all classes at once: one label a box. The default of predict, serve, export and Python all the same."""

    alpha: float = 0.15
    """Weight of the mixup branch for base classes, in [0, 1] (published without image labels: 0.35)."""

    beta: float = 0.35
    """Weight of the mixup branch for novel classes, in [0, 1] (published without image labels: 0.55)."""

    masks: bool = True
    """Whether masks are predicted for the detections, by a detector that has a mask head."""

    class_chunk: int = 2048
    """Classes that are scored at once: bounds the memory for large vocabularies."""

    rescore: bool = False
    """Score a region by all proposals that ended where it did, instead of by its own alone: boxes that many agree on come first. Scores
    rise, so thresholds mean something else (docs/how-to/evaluate.md)."""

    flip: bool = False
    """Test-time augmentation: run the mirrored image too, and take the mean."""

    scales: tuple[float, ...] = (1.0,)
    """Test-time augmentation: scales of the image, relative to its usual size; the mean is taken."""

    tiles: int = 0
    """Side of the overlapping tiles, in pixels of the image, that larger images are run in, each scaled as an image is, and what is
    found in them merged; 0: none."""

    tile_overlap: float = 0.2
    """Share of its side that a tile has in common with the next one at least, in [0, 0.9]: objects smaller than that are whole in one."""

    whole_image: bool = True
    """Whether an image in tiles is run as a whole too, for objects that are larger than a tile."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "fp32"
    """Number format of backbone, pyramid, proposal tower, box heads and mask head, also in a training's evaluations, whatever it
    trains in; scores, boxes and NMS are always fp32. bf16 and fp16 need a device that has units for them (``proxydet env``), fp16 a
    GPU; auto takes the fastest."""

    def __post_init__(self) -> None:
        require_share(
            "inference",
            score_threshold=self.score_threshold,
            nms_iou=self.nms_iou,
            alpha=self.alpha,
            beta=self.beta,
            tile_overlap=self.tile_overlap,
        )
        require_positive(
            "inference", max_detections=self.max_detections, class_chunk=self.class_chunk
        )
        if self.tiles < 0 or 0 < self.tiles < _SMALLEST_TILE:
            raise ConfigError(
                f"inference.tiles is {self.tiles}: a tile has at least {_SMALLEST_TILE} pixels a side, and 0 means no tiles"
            )
        if self.tile_overlap > _MOST_OVERLAP:
            raise ConfigError(
                f"inference.tile_overlap is {self.tile_overlap}: it must be from 0 to {_MOST_OVERLAP}"
            )
        if not self.scales or not all(_SMALLEST <= scale <= _LARGEST for scale in self.scales):
            raise ConfigError(
                f"inference.scales is {list(self.scales)}: there must be at least one, each from {_SMALLEST} to {_LARGEST}"
            )

    @property
    def augmented(self) -> bool:
        """Whether each image is run in more than its one usual view."""
        return self.flip or self.scales != (1.0,)


__all__ = [
    "BACKBONES",
    "BackboneConfig",
    "CascadeConfig",
    "CenterNetLossConfig",
    "ClassifierConfig",
    "InferenceConfig",
    "MaskConfig",
    "ModelConfig",
    "Precision",
    "ProposalConfig",
    "PyramidConfig",
    "ResNetConfig",
    "SwinConfig",
]


def with_later_settings(stated: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inference settings that a file states, with those that came after it at their defaults, which change nothing.

    Args:
        stated: What an earlier version wrote; JSON values.
        now: What this version would write: settings of `InferenceConfig`, others perhaps among them.
    """
    defaults = json.loads(json.dumps(asdict(InferenceConfig())))
    return {name: defaults[name] for name in now.keys() & defaults.keys()} | dict(stated)


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The feature pyramid; level n has stride ``2**n``."""

    levels: tuple[int, ...] = (3, 4, 5)
    """Levels made from the backbone's stages, finest first, without gaps."""

    extra_levels: int = 2
    """Levels added above them, each by a 3x3 convolution of stride 2 on the one below: 0, 1 or 2."""

    channels: int = 256
    """Channels of every level."""

    def __post_init__(self) -> None:
        require_positive("pyramid", channels=self.channels)
        require(
            len(self.levels) >= 1 and self.levels[0] >= 2,
            f"pyramid.levels must start at 2 or above, not {self.levels}",
        )
        require(
            self.levels == tuple(range(self.levels[0], self.levels[0] + len(self.levels))),
            f"pyramid.levels must follow one another, finest first, not {self.levels}",
        )
        require(
            self.extra_levels in (0, 1, 2),
            f"pyramid.extra_levels must be 0, 1 or 2, not {self.extra_levels}",
        )

    @property
    def all_levels(self) -> tuple[int, ...]:
        """Every level that the proposal network sees, finest first."""
        top = self.levels[-1]
        return (*self.levels, *range(top + 1, top + 1 + self.extra_levels))

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride in pixels of every level of `all_levels`."""
        return tuple(2**level for level in self.all_levels)


@dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """The class-agnostic CenterNet that proposes boxes."""

    convs: int = 4
    """3x3 convolutions (with GroupNorm and ReLU) shared by the heatmap and the box output."""

    norm_groups: int = 32
    """Groups of their GroupNorm; must divide the pyramid's channels."""

    first_level: int | None = None
    """The finest pyramid level that proposes; null is the pyramid's finest. Finer levels are then only pooled from, which costs
    little, as the proposal network's convolutions do not run on them."""

    score_floor: float = 1e-4
    """A cell is a candidate when its heatmap probability (before the square root) is above this."""

    candidates_train: int = 4000
    """Best cells kept a level before NMS, in training."""

    candidates_test: int = 1000
    """Best cells kept a level before NMS, in inference."""

    nms_iou: float = 0.9
    """Overlap above which the lower-scored of two proposals is dropped."""

    keep_train: int = 2000
    """Proposals kept an image, in training."""

    keep_test: int = 256
    """Proposals kept an image, in inference."""

    initial_probability: float = 0.01
    """Heatmap probability of every cell before training."""

    initial_distance: float = 8.0
    """Distance to each side of the box, in strides, of every cell before training."""

    def __post_init__(self) -> None:
        require_positive(
            "proposals",
            norm_groups=self.norm_groups,
            candidates_train=self.candidates_train,
            candidates_test=self.candidates_test,
            keep_train=self.keep_train,
            keep_test=self.keep_test,
            initial_distance=self.initial_distance,
        )
        require(self.convs >= 0, f"proposals.convs must not be negative: {self.convs}")
        require_share("proposals", score_floor=self.score_floor, nms_iou=self.nms_iou)
        require(
            0.0 < self.initial_probability < 1.0,
            f"proposals.initial_probability must be in (0, 1), not {self.initial_probability}",
        )


@dataclass(frozen=True, kw_only=True)
class CenterNetLossConfig:
    """Targets and losses of the proposal network."""

    size_ranges: tuple[tuple[float, float], ...] = (
        (0.0, 80.0),
        (64.0, 160.0),
        (128.0, 320.0),
        (256.0, 640.0),
        (512.0, float("inf")),
    )
    """For each level, finest first: the half diagonals of boxes, in pixels, that it learns; one entry a pyramid level."""

    min_overlap: float = 0.8
    """Sets how far from an object's centre the heatmap stays high: a box moved that far still overlaps by this."""

    min_radius: float = 4.0
    """Smallest such distance, in pixels."""

    regression_weight: float = 1.0
    """Weight of the GIoU loss of the boxes."""

    heatmap_weight: float = 0.5
    """Weight of both heatmap losses."""

    focal_alpha: float = 0.25
    """Share of the positive part of the focal loss; the negative part has the rest."""

    focal_gamma: float = 2.0
    """Exponent by which easy cells count less."""

    negative_beta: float = 4.0
    """Exponent by which cells near a centre count less as negatives."""

    ignored_above: float = 0.85
    """Negative cells with at least this probability are left out: they are often objects nobody annotated."""

    probability_clamp: float = 1e-4
    """Probabilities are kept this far from 0 and 1."""

    def check_levels(self, levels: int) -> None:
        """Raise a `ConfigError` unless there is one size range for each level that proposes."""
        if len(self.size_ranges) != levels:
            raise ConfigError(
                f"losses.centernet.size_ranges has {len(self.size_ranges)} entries for {levels} pyramid levels that propose",
                hint="give it one entry for each level of model.pyramid, from model.proposals.first_level on",
            )

    def __post_init__(self) -> None:
        require(len(self.size_ranges) > 0, "centernet.size_ranges must not be empty")
        for low, high in self.size_ranges:
            require(0 <= low < high, f"centernet.size_ranges holds ({low}, {high})")
        for name in ("min_overlap", "focal_alpha", "ignored_above"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"centernet.{name} must be in [0, 1], not {value}")
        require(self.min_radius > 0, f"centernet.min_radius must be above 0: {self.min_radius}")
        require(
            0.0 < self.probability_clamp < 0.5,
            f"centernet.probability_clamp must be in (0, 0.5), not {self.probability_clamp}",
        )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """The cascade of box heads; the mixup branch is a second one of the same sizes."""

    pool_levels: tuple[int, ...] = (3, 4, 5)
    """Pyramid levels that regions are pooled from, finest first, without gaps."""

    pool_size: int = 7
    """Side of a pooled region, in cells."""

    sampling_ratio: int = 0
    """Samples a cell and direction in RoIAlign; 0 takes as many as the region is large."""

    canonical_size: float = 224.0
    """Side in pixels (square root of the area) of a region that is pooled from ``canonical_level``."""

    canonical_level: int = 4
    """Level for regions of ``canonical_size``; twice the side goes one level up."""

    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the fully connected layers of a box head."""

    box_head: str | None = None
    """Python path of a box head of your own, in place of the fully connected layers; the last width is that of its features."""

    box_head_options: Options = field(default_factory=dict)
    """Its keyword arguments."""

    iou_thresholds: tuple[float, ...] = (0.6, 0.7, 0.8)
    """One step each: overlap with an object from which a region counts as that object."""

    delta_weights: tuple[tuple[float, float, float, float], ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    """One step each: scale of the regressed centre (x, y) and size (width, height) changes."""

    samples_per_image: int = 512
    """Regions an image that the first step trains on; later steps keep the same ones, refined."""

    positive_fraction: float = 0.25
    """Largest share of them that may be objects."""

    image_label_proposals: int = 128
    """Proposals an image used in an image-label batch."""

    mixup_gradient: float = 1.0
    """Share of the mixup branch's gradient that reaches the feature maps, in [0, 1]: 1 is published; 0 trains the branch alone."""

    def __post_init__(self) -> None:
        require_positive(
            "cascade",
            pool_size=self.pool_size,
            canonical_size=self.canonical_size,
            samples_per_image=self.samples_per_image,
            image_label_proposals=self.image_label_proposals,
        )
        require(self.sampling_ratio >= 0, "cascade.sampling_ratio must not be negative")
        if self.box_head is not None:
            require_python_path(self.box_head, "cascade.box_head")
        require_share(
            "cascade",
            positive_fraction=self.positive_fraction,
            mixup_gradient=self.mixup_gradient,
        )
        for threshold in self.iou_thresholds:
            require_share("cascade", iou_thresholds=threshold)
        require(
            len(self.iou_thresholds) == len(self.delta_weights) >= 1,
            f"cascade.iou_thresholds ({len(self.iou_thresholds)}) and cascade.delta_weights "
            f"({len(self.delta_weights)}) must have one entry a step",
        )
        require(
            all(min(weights) > 0 for weights in self.delta_weights),
            "cascade.delta_weights must be above 0",
        )
        require(
            len(self.hidden) >= 1 and min(self.hidden) > 0,
            f"cascade.hidden must hold at least one width above 0, not {self.hidden}",
        )

    @property
    def steps(self) -> int:
        """Number of steps of the cascade."""
        return len(self.iou_thresholds)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The zero-shot classifier: cosine between a region's embedding and a class name's, times a temperature."""

    embedding_dim: int = 512
    """Dimensions of the text embeddings (512 for CLIP ViT-B/32). Training from fresh weights takes those of its data."""

    temperature: float = 50.0
    """Factor on the cosine to make a logit, in the detection branch."""

    mixup_temperature: float = 1.0
    """The same in the mixup branch, whose loss knows no temperature: published is 1, found in its recorded logits."""

    bias: float | None = None
    """Starting value of a learnt bias on the detection branch's logits; None (published) has no bias."""

    frequency_power: float = 0.5
    """The federated loss samples classes with weight (images in training) to this power."""

    def __post_init__(self) -> None:
        require_positive(
            "classifier",
            embedding_dim=self.embedding_dim,
            temperature=self.temperature,
            mixup_temperature=self.mixup_temperature,
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """The class-agnostic mask head. Its output has twice the side of a pooled region."""

    pool_size: int = 14
    """Side of a pooled region, in cells."""

    convs: int = 4
    """3x3 convolutions before the upsampling."""

    channels: int = 256
    """Channels of those convolutions and of the upsampling."""

    def __post_init__(self) -> None:
        require_positive("masks", pool_size=self.pool_size, channels=self.channels)
        require(self.convs >= 0, f"masks.convs must not be negative: {self.convs}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole detector; the defaults are the published ProxyDet R50."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The network that makes the feature maps."""

    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    """The feature pyramid on top of it."""

    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    """The proposal network."""

    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    """The box heads."""

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The zero-shot classifier of every box head."""

    masks: MaskConfig | None = field(default_factory=MaskConfig)
    """The mask head; null builds none: a detector of boxes, without masks."""

    mixup_branch: bool = True
    """Whether the second cascade, trained by class-wise mixup, exists; BoxSup models have none."""

    pixel_mean: tuple[float, float, float] | None = None
    """Subtracted from the red, green and blue values, which are in [0, 255]. null takes what the backbone was made for: of a
    timm model what timm states, of a network of your own its ``pixel_mean``, else ImageNet's 123.675, 116.28, 103.53."""

    pixel_std: tuple[float, float, float] | None = None
    """The result is divided by this. null as above; ImageNet's are 58.395, 57.12, 57.375."""

    def __post_init__(self) -> None:
        require(self.pixel_std is None or min(self.pixel_std) > 0, "pixel_std must be above 0")
        stages = self.backbone.stages
        require(
            stages is None or self.pyramid.levels[-1] <= stages + 1,
            f"pyramid.levels {self.pyramid.levels} go beyond the backbone's last level, {(stages or 0) + 1}",
        )
        levels = self.cascade.pool_levels
        require(
            len(levels) >= 1 and levels == tuple(range(levels[0], levels[0] + len(levels))),
            f"cascade.pool_levels must follow one another, finest first, not {levels}",
        )
        require(
            set(levels) <= set(self.pyramid.all_levels),
            f"cascade.pool_levels {levels} must be among the pyramid's {self.pyramid.all_levels}",
        )
        first = self.proposals.first_level
        require(
            first is None or first in self.pyramid.all_levels,
            f"proposals.first_level {first} must be among the pyramid's {self.pyramid.all_levels}",
        )
        require(
            self.proposals.convs == 0 or self.pyramid.channels % self.proposals.norm_groups == 0,
            f"proposals.norm_groups {self.proposals.norm_groups} must divide pyramid.channels {self.pyramid.channels}",
        )
