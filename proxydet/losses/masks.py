"""The mask loss (Mask R-CNN, arXiv 1703.06870).

Dimensions: P regions that stand for an object with a mask, S side of a mask.
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

    Polygons are drawn on the CPU; their boxes go there in one piece for the whole batch, the one wait for the device.
    """
    rows_P6 = torch.cat(
        [output.boxes_P4, output.image_P[:, None], output.object_P[:, None]], dim=1
    ).cpu()
    return _draw(rows_P6, truth, output.logits_PSS)


def _draw(rows_P6: Tensor, truth: GroundTruth, logits_PSS: Tensor) -> Tensor:
    """Draw the targets of regions, given on the CPU as box, image and object, for logits that lie elsewhere."""
    side, device = logits_PSS.shape[-1], logits_PSS.device
    parts = []
    for image, masks in enumerate(truth.masks):
        chosen = rows_P6[rows_P6[:, 4] == image]
        if len(chosen) and masks is not None:
            drawn = _crop(masks, chosen[:, :4], chosen[:, 5].long(), side)
            parts.append(drawn.to(device, torch.float32, non_blocking=True))
    # The regions are ordered by image, so that the parts follow the same order.
    return torch.cat(parts) if parts else logits_PSS.new_zeros(0, side, side)


def mask_loss(output: MaskOutput, truth: GroundTruth) -> Tensor:
    """Return the mean binary cross-entropy over all cells; a zero connected to the head where there is no region."""
    if len(output.logits_PSS) == 0:
        return output.logits_PSS.sum() * 0
    return functional.binary_cross_entropy_with_logits(
        output.logits_PSS, mask_targets(output, truth)
    )


def _crop(masks: PolygonMasks | BitMasks, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    objects = objects.to(masks.device, non_blocking=True)
    boxes = boxes.to(masks.device, non_blocking=True)
    cropped: Tensor = masks[objects].crop_and_resize(boxes, side)
    return cropped
