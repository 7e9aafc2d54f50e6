"""Weights and settings of the losses. The defaults are the published ones. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from proxydet.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


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

    def __post_init__(self) -> None:
        _require(len(self.size_ranges) > 0, "centernet.size_ranges must not be empty")
        for low, high in self.size_ranges:
            _require(0 <= low < high, f"centernet.size_ranges holds ({low}, {high})")
        for name in ("min_overlap", "focal_alpha", "ignored_above"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"centernet.{name} must be in [0, 1], not {value}")
        _require(self.min_radius > 0, f"centernet.min_radius must be above 0: {self.min_radius}")
        _require(
            0.0 < self.probability_clamp < 0.5,
            f"centernet.probability_clamp must be in (0, 0.5), not {self.probability_clamp}",
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationLossConfig:
    """The federated classification loss and the box loss of the detection branch."""

    sampled_categories: int = 50
    """Categories that a step's loss counts: those that appear, and sampled ones; 0 counts all."""

    weight: float = 1.0
    """Weight of the classification loss."""

    box_weight: float = 1.0
    """Weight of the box loss."""

    def __post_init__(self) -> None:
        _require(
            self.sampled_categories >= 0, "classification.sampled_categories must not be negative"
        )


@dataclass(frozen=True, kw_only=True)
class MixupLossConfig:
    """The class-wise mixup loss."""

    weight: float = 256.0
    """Weight of the loss."""

    beta: float = 1.0
    """Both parameters of the Beta distribution of the mixing ratio; 0 mixes nothing (the ratio is 0 or 1)."""

    prototype: Literal["objectness", "center"] = "objectness"
    """How a class's regions make its prototype: weighted by a softmax of their objectness, or all alike."""

    temperature: float = 1.0
    """Temperature of that softmax."""

    distance: Literal["l1", "l2"] = "l1"
    """Distance of mixed visual and mixed text embedding: mean absolute or mean squared difference."""

    def __post_init__(self) -> None:
        _require(self.beta >= 0, f"mixup.beta must not be negative: {self.beta}")
        _require(self.temperature > 0, f"mixup.temperature must be above 0: {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class ImageLabelLossConfig:
    """The loss of image-label batches."""

    weight: float = 0.1
    """Weight of the loss, a step each."""

    background_column: bool = True
    """Whether the background counts as one more class that is absent, as published (it adds a constant)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """All losses; the defaults are the published ones."""

    centernet: CenterNetLossConfig = field(default_factory=CenterNetLossConfig)
    """The proposal network."""

    classification: ClassificationLossConfig = field(default_factory=ClassificationLossConfig)
    """The detection branch on box batches."""

    mixup: MixupLossConfig = field(default_factory=MixupLossConfig)
    """The mixup branch on box batches."""

    image_labels: ImageLabelLossConfig = field(default_factory=ImageLabelLossConfig)
    """The detection branch on image-label batches."""

    mask_weight: float = 1.0
    """Weight of the mask loss."""
