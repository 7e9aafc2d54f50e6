"""The mask loss (Mask R-CNN, arXiv 1703.06870).

Dimensions: P regions that stand for an object, S side of a mask.
"""

from __future__ import annotations

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor
from torch.nn import functional

from proxydet.modeling.matching import GroundTruth
from proxydet.modeling.outputs import MaskOutput


def mask_targets(output: MaskOutput, truth: GroundTruth) -> Tensor:
    """Return each region's object cut out by its box and resized to the mask's size: float32 (P, S, S), 0 or 1.

    Polygons are drawn on the CPU; their boxes go there in one piece for the whole batch.
    """
    side = output.logits_PSS.shape[-1]
    rows = torch.cat(
        [output.boxes_P4, output.image_P[:, None], output.object_P[:, None]], dim=1
    ).cpu()
    parts = []
    for image, masks in enumerate(truth.masks):
        chosen = rows[rows[:, 4] == image]
        if len(chosen) and masks is not None:
            parts.append(_crop(masks, chosen[:, :4], chosen[:, 5].long(), side))
    # The regions are ordered by image, so that the parts follow the same order.
    targets_PSS = torch.cat(parts) if parts else torch.zeros(0, side, side)
    return targets_PSS.to(output.logits_PSS.device, torch.float32)


def mask_loss(output: MaskOutput, truth: GroundTruth) -> Tensor:
    """Return the mean binary cross-entropy over all cells; a zero connected to the head where there is no object."""
    if len(output.logits_PSS) == 0:
        return output.logits_PSS.sum() * 0
    return functional.binary_cross_entropy_with_logits(
        output.logits_PSS, mask_targets(output, truth)
    )


def _crop(masks: PolygonMasks | BitMasks, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    cropped: Tensor = masks[objects.to(masks.device)].crop_and_resize(boxes.to(masks.device), side)
    return cropped.cpu()
