"""Test-time augmentation: one image looked at in several views, mirrored and in other sizes.

All views share one set of regions: the proposals of all views, suppressed together as those of one view are. The second
stage looks at each region in every view; its class scores, its box and its mask are the mean over the views. So a
detection needs no matching between views, and thresholds mean what they mean without augmentation. With a single view
(or the same one twice) the result is the plain one.

The frame of reference is the network's input of the first view.

Dimensions: P proposals, M masks, S side of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxydet.modeling.assemble import assemble_predictions
from proxydet.modeling.centernet import Proposals
from proxydet.modeling.config import InferenceConfig, ProposalConfig
from proxydet.modeling.heads import ZeroShotClassifier
from proxydet.modeling.matching import Regions
from proxydet.modeling.prediction import Prediction
from proxydet.modeling.roi_heads import RoiHeads, Scene
from proxydet.modeling.scoring import ClassText, detect_classes
from proxydet.modeling.suppression import keep_best


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to look at an image.

    Attributes:
        image: (3, h, w) RGB, uint8 or float in [0, 255]: resized, and mirrored where ``mirrored`` says so.
        mirrored: Whether left and right are exchanged.
    """

    image: Tensor
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class Look:
    """What backbone and proposal network made of a view.

    Attributes:
        scene: Features and size, of a batch of one.
        proposals: Its proposals.
        mirrored: As in `View`.
    """

    scene: Scene
    proposals: Proposals
    mirrored: bool

    def from_reference(self, boxes_N4: Tensor, reference: Scene) -> Tensor:
        """Move boxes from the frame of reference into this view."""
        scaled_N4 = boxes_N4 * self._scale_4(reference)
        return self._mirror(scaled_N4)

    def to_reference(self, boxes_N4: Tensor, reference: Scene) -> Tensor:
        """Move boxes of this view into the frame of reference."""
        return self._mirror(boxes_N4) / self._scale_4(reference)

    def _scale_4(self, reference: Scene) -> Tensor:
        return (self.scene.sizes_B2[0] / reference.sizes_B2[0]).flip(0).repeat(2)

    def _mirror(self, boxes_N4: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes_N4
        x0, y0, x1, y1 = boxes_N4.unbind(dim=-1)
        width = self.scene.sizes_B2[0, 1]
        return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The second stage, and what to look for with it.

    Attributes:
        heads: Box and mask heads.
        classifiers: As `proxydet.modeling.scoring.detect_classes` takes them.
        classes: What to look for.
        proposals: How proposals are suppressed.
        settings: Thresholds and limits.
    """

    heads: RoiHeads
    classifiers: list[ZeroShotClassifier]
    classes: ClassText
    proposals: ProposalConfig
    settings: InferenceConfig


def detect_in_views(
    looks: Sequence[Look], stage: Stage, original_size: tuple[int, int]
) -> Prediction:
    """Find objects in an image that was looked at in several views.

    Args:
        looks: The views, at least one.
        stage: The second stage.
        original_size: Height and width of the image, for boxes and masks in its pixels.
    """
    reference = looks[0].scene
    regions = _merged(looks, stage.proposals)
    embedded, boxes = [], []
    for look in looks:
        seen_BR4 = look.from_reference(regions.boxes_BR4, reference)
        own = stage.heads.embed(look.scene, regions.with_boxes(seen_BR4, regions.valid_BR))
        embedded.append(own)
        boxes.append(look.to_reference(own.boxes_BR4, reference))
    embedded[0] = dataclasses.replace(embedded[0], boxes_BR4=_mean(boxes))
    found = detect_classes(embedded, stage.classes, stage.classifiers, stage.settings)

    def masks(_: Scene, boxes_M4: Tensor, image_M: Tensor) -> Tensor:
        parts = []
        for look in looks:
            own_M4 = look.from_reference(boxes_M4, reference)
            masks_MSS = stage.heads.mask_probabilities(look.scene, own_M4, image_M)
            parts.append(masks_MSS.flip(2) if look.mirrored else masks_MSS)
        return _mean(parts)

    wanted = masks if stage.settings.masks else None
    (prediction,) = assemble_predictions(found, reference, [original_size], wanted)
    return prediction


def _merged(looks: Sequence[Look], config: ProposalConfig) -> Regions:
    """Join the proposals of all views in the frame of reference."""
    reference = looks[0].scene
    boxes_P4 = torch.cat(
        [
            look.to_reference(look.proposals.boxes_BP4[0][look.proposals.valid_BP[0]], reference)
            for look in looks
        ]
    )
    scores_P = torch.cat(
        [look.proposals.scores_BP[0][look.proposals.valid_BP[0]] for look in looks]
    )
    order_P = scores_P.argsort(descending=True, stable=True)
    boxes_P4, scores_P = boxes_P4[order_P], scores_P[order_P]
    kept = keep_best(boxes_P4, scores_P, config.nms_iou, config.keep_test)
    return Regions(
        boxes_BR4=boxes_P4[kept][None],
        objectness_BR=scores_P[kept][None],
        valid_BR=torch.ones_like(scores_P[kept], dtype=torch.bool)[None],
    )


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)
