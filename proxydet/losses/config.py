"""Weights and settings of the losses. The defaults are the published ones. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from proxydet.extensions import Options, require_python_path
from proxydet.modeling.config import CenterNetLossConfig, require


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
        require(
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
        require(self.beta >= 0, f"mixup.beta must not be negative: {self.beta}")
        require(self.temperature > 0, f"mixup.temperature must be above 0: {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class ImageLabelLossConfig:
    """The loss of image-label batches."""

    weight: float = 0.1
    """Weight of the loss, a step each."""

    background_column: bool = True
    """Whether the background counts as one more class that is absent, as published (it adds a constant)."""


@dataclass(frozen=True, kw_only=True)
class DistillationLossConfig:
    """Keeps what the starting weights predict of regions without an annotated object, so that fine-tuning forgets less."""

    weight: float = 0.0
    """Weight of the mean of 1 - cosine between region embeddings of the trained and of the starting weights, a step each; 0 is
    off, and takes no time. Embeddings decide the scores of any class, trained or not."""

    box_weight: float = 0.05
    """Weight of the mean absolute difference of their box changes, relative to ``weight``."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"distillation.weight must not be negative: {self.weight}")
        require(
            self.box_weight >= 0, f"distillation.box_weight must not be negative: {self.box_weight}"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """All losses; the defaults are the published ones."""

    criterion: str | None = None
    """Python path of a criterion of your own, such as mypackage.losses:Mine, in place of the published one. It is made with
    this section and its options."""

    options: Options = field(default_factory=dict)
    """Keyword arguments of the criterion at a Python path."""

    centernet: CenterNetLossConfig = field(default_factory=CenterNetLossConfig)
    """The proposal network."""

    classification: ClassificationLossConfig = field(default_factory=ClassificationLossConfig)
    """The detection branch on box batches."""

    mixup: MixupLossConfig = field(default_factory=MixupLossConfig)
    """The mixup branch on box batches."""

    image_labels: ImageLabelLossConfig = field(default_factory=ImageLabelLossConfig)
    """The detection branch on image-label batches."""

    distillation: DistillationLossConfig = field(default_factory=DistillationLossConfig)
    """Of a training that starts from weights (training.weights): what they knew."""

    mask_weight: float = 1.0
    """Weight of the mask loss."""

    def __post_init__(self) -> None:
        if self.criterion is not None:
            require_python_path(self.criterion, "criterion")
