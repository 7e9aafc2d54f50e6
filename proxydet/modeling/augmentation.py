"""Test-time augmentation (TTA): inference on several views of one image, mirrored and in other sizes.

All views share one set of regions: the proposals of all views, with one NMS for all. The second stage embeds each region
in every view; its class scores, its box and its mask are the mean over the views. So a
detection needs no matching between views, and thresholds mean what they mean without augmentation. With a single view
(or the same one twice) the result is the plain one.

The frame of reference is the network's input of the first view.

Dimensions: P proposals, M masks, S side of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proxydet.modeling.matching import Regions
from proxydet.modeling.nms import keep_best
from proxydet.modeling.postprocess import ClassText, assemble_predictions, detect_classes

if TYPE_CHECKING:
    from proxydet.modeling.centernet import Proposals
    from proxydet.modeling.config import InferenceConfig, ProposalConfig
    from proxydet.modeling.prediction import Prediction
    from proxydet.modeling.roi_heads import FeatureBatch, RoiHeads, ZeroShotClassifier


@dataclass(frozen=True, kw_only=True)
class View:
    """An image as the network is given it.

    Attributes:
        image: (3, h, w) RGB, uint8 or float in [0, 255]: resized, and mirrored where ``mirrored`` says so.
        mirrored: Whether left and right are exchanged.
    """

    image: Tensor
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class ViewFeatures:
    """Features and proposals of one view.

    Attributes:
        batch: Features and size, of a batch of one.
        proposals: Its proposals.
        mirrored: As in `View`.
    """

    batch: FeatureBatch
    proposals: Proposals
    mirrored: bool

    def from_reference(self, boxes_N4: Tensor, reference: FeatureBatch) -> Tensor:
        """Move boxes from the frame of reference into this view."""
        scaled_N4 = boxes_N4 * self._scale_4(reference)
        return self._mirror(scaled_N4)

    def to_reference(self, boxes_N4: Tensor, reference: FeatureBatch) -> Tensor:
        """Move boxes of this view into the frame of reference."""
        return self._mirror(boxes_N4) / self._scale_4(reference)

    def _scale_4(self, reference: FeatureBatch) -> Tensor:
        return (self.batch.sizes_B2[0] / reference.sizes_B2[0]).flip(0).repeat(2)

    def _mirror(self, boxes_N4: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes_N4
        x0, y0, x1, y1 = boxes_N4.unbind(dim=-1)
        width = self.batch.sizes_B2[0, 1]
        return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def detect_in_views(
    views: Sequence[ViewFeatures],
    heads: RoiHeads,
    classifiers: list[ZeroShotClassifier],
    classes: ClassText,
    *,
    proposals: ProposalConfig,
    settings: InferenceConfig,
    original_size: tuple[int, int],
) -> Prediction:
    """Detect objects in an image from several views.

    Args:
        views: Features and proposals of the views, at least one.
        heads: Box and mask heads.
        classifiers: As `proxydet.modeling.postprocess.detect_classes` takes them.
        classes: The classes to detect.
        proposals: NMS threshold and number of the proposals.
        settings: Thresholds and limits; ``masks`` only where the heads predict them.
        original_size: Height and width of the image, for boxes and masks in its pixels.
    """
    reference = views[0].batch
    regions = _merged(views, proposals)
    embedded, boxes = [], []
    for view in views:
        seen_BR4 = view.from_reference(regions.boxes_BR4, reference)
        own = heads.embed(view.batch, regions.with_boxes(seen_BR4, regions.valid_BR))
        embedded.append(own)
        boxes.append(view.to_reference(own.boxes_BR4, reference))
    embedded[0] = dataclasses.replace(embedded[0], boxes_BR4=_mean(boxes))
    found = detect_classes(embedded, classes, classifiers, settings)

    def masks(_: FeatureBatch, boxes_M4: Tensor, image_M: Tensor) -> Tensor:
        parts = []
        for view in views:
            own_M4 = view.from_reference(boxes_M4, reference)
            masks_MSS = heads.mask_probabilities(view.batch, own_M4, image_M)
            parts.append(masks_MSS.flip(2) if view.mirrored else masks_MSS)
        return _mean(parts)

    wanted = masks if settings.masks else None
    (prediction,) = assemble_predictions(found, reference, [original_size], wanted)
    return prediction


def _merged(views: Sequence[ViewFeatures], config: ProposalConfig) -> Regions:
    """Join the proposals of all views in the frame of reference."""
    reference = views[0].batch
    boxes_P4 = torch.cat(
        [
            view.to_reference(view.proposals.boxes_BP4[0][view.proposals.valid_BP[0]], reference)
            for view in views
        ]
    )
    scores_P = torch.cat(
        [view.proposals.scores_BP[0][view.proposals.valid_BP[0]] for view in views]
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
