"""What the network hands to the losses in training.

Dimensions: B images, R regions of an image (padded), D embedding, C classes, P chosen regions of the whole batch,
S side of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from proxydet.modeling.centernet import CenterNetOutput
    from proxydet.modeling.geometry import Weights
    from proxydet.modeling.matching import Assignment, GroundTruth, Regions


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The training classes, as the losses need them.

    Attributes:
        text_DC1: Normalised text embeddings, a column each, the last one zero (background).
        frequency_C: Weight of each class in the federated draw.
        temperature: Factor from cosine to logit.
    """

    text_DC1: Tensor
    frequency_C: Tensor
    temperature: float

    @property
    def classes(self) -> int:
        """C, which is also the background's label."""
        return self.text_DC1.shape[1] - 1


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """One step of the detection branch on a box batch.

    Attributes:
        embeddings_BRD: Region embeddings of length 1.
        deltas_BR4: Predicted box changes.
        regions: The boxes that this step saw.
        assignment: What they stand for.
        targets_BR4: The box of each region's object.
        delta_weights: Scale of the box changes.
        bias: Learnt bias of the logits (1,), None where there is none.
    """

    embeddings_BRD: Tensor
    deltas_BR4: Tensor
    regions: Regions
    assignment: Assignment
    targets_BR4: Tensor
    delta_weights: Weights
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class MixupOutput:
    """The last step of the mixup branch: its regions that stand for an object, from all images.

    The classes are base classes because only those are annotated in training data, as published: novel classes that an
    annotation file does hold take part.

    Attributes:
        embeddings_PD: Region embeddings of length 1.
        labels_P: int64 in [0, C).
        objectness_P: Score of the proposal (about 23 for a ground-truth box).
    """

    embeddings_PD: Tensor
    labels_P: Tensor
    objectness_P: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskOutput:
    """Masks predicted for the regions of the first step that stand for an object which has a mask.

    Attributes:
        logits_PSS: Mask logits.
        boxes_P4: The boxes that they fill.
        image_P: int64, the image of each.
        object_P: int64, the object of that image.
    """

    logits_PSS: Tensor
    boxes_P4: Tensor
    image_P: Tensor
    object_P: Tensor


@dataclass(frozen=True, kw_only=True)
class BoxTrainingOutput:
    """Everything that the losses of a box batch need.

    Attributes:
        centernet: The proposal network's output.
        truth: The objects.
        steps: The detection branch, a step each.
        mixup: The mixup branch; None where the model has none.
        masks: The mask head; None where the model has none, or no image comes with masks.
        table: The classes.
    """

    centernet: CenterNetOutput
    truth: GroundTruth
    steps: tuple[StepOutput, ...]
    mixup: MixupOutput | None
    masks: MaskOutput | None
    table: ClassTable


@dataclass(frozen=True, kw_only=True)
class ImageStepOutput:
    """One step of the detection branch on an image-label batch: the region that stands for the image.

    Attributes:
        embeddings_BD: Its embedding, of length 1.
        valid_B: bool, False where an image has no region.
        bias: Learnt bias of the logits (1,), None where there is none.
    """

    embeddings_BD: Tensor
    valid_B: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ImageLabelTrainingOutput:
    """Everything that the losses of an image-label batch need.

    Attributes:
        centernet: The proposal network's output.
        labels: Classes of each image: int64 (L,), in [0, C).
        steps: The detection branch, a step each.
        table: The classes.
    """

    centernet: CenterNetOutput
    labels: tuple[torch.Tensor, ...]
    steps: tuple[ImageStepOutput, ...]
    table: ClassTable


TrainingOutput: TypeAlias = BoxTrainingOutput | ImageLabelTrainingOutput
