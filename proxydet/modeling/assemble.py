"""From detections in the network's input to predictions in the original image, with one mask a distinct box.

Dimensions: N detections and M distinct boxes of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proxydet.modeling import geometry
from proxydet.modeling.prediction import Prediction
from proxydet.modeling.roi_heads import Scene
from proxydet.modeling.scoring import Detections

MaskPredictor = Callable[[Scene, Tensor, Tensor], Tensor]

# Bounds the memory of the mask head; a batch seldom has more distinct boxes.
_MASKS_AT_ONCE = 512


def assemble_predictions(
    found: list[Detections],
    scene: Scene,
    original_sizes: list[tuple[int, int]],
    mask_probabilities: MaskPredictor | None,
) -> list[Prediction]:
    """Scale boxes to the original images, drop those that end up empty, and predict masks for the rest.

    Args:
        found: Detections of each image.
        scene: What the mask head looks at.
        original_sizes: Height and width of each original image.
        mask_probabilities: Masks of boxes, in [0, 1], given the image of each; None makes no masks.
    """
    sizes = torch.tensor(original_sizes, dtype=torch.float32).to(scene.sizes_B2.device)
    scales_B4 = (sizes / scene.sizes_B2).flip(1).repeat(1, 2)
    kept, boxes = [], []
    for image, detections in enumerate(found):
        scaled = geometry.clip(detections.boxes_L4 * scales_B4[image], sizes[image])
        solid = geometry.nonempty(scaled).nonzero()[:, 0]
        kept.append(_choose(detections, solid))
        boxes.append(scaled[solid])
    if mask_probabilities is None:
        probabilities = [sizes.new_zeros(0, 1, 1)] * len(kept)
        indices = [torch.full_like(detections.classes_L, -1) for detections in kept]
    else:
        probabilities, indices = _distinct_masks(kept, scene, mask_probabilities)
    return [
        Prediction(
            boxes_N4=boxes[image],
            scores_N=detections.scores_L,
            classes_N=detections.classes_L,
            mask_probs_MSS=probabilities[image],
            mask_index_N=indices[image],
            image_size=original_sizes[image],
        )
        for image, detections in enumerate(kept)
    ]


def _distinct_masks(
    kept: list[Detections], scene: Scene, mask_probabilities: MaskPredictor
) -> tuple[list[Tensor], list[Tensor]]:
    counts = [len(detections.scores_L) for detections in kept]
    device = scene.sizes_B2.device
    image_N = torch.repeat_interleave(
        torch.arange(len(kept), device=device), torch.tensor(counts, device=device)
    )
    region_N = torch.cat([detections.regions_L for detections in kept])
    boxes_N4 = torch.cat([detections.boxes_L4 for detections in kept])
    # A region's place in the whole batch; all its classes have the same box.
    stride = int(region_N.max()) + 1 if len(region_N) else 1
    place_M, mask_N = (image_N * stride + region_N).unique(return_inverse=True)
    image_M = place_M // stride
    boxes_M4 = boxes_N4.new_empty(len(place_M), 4)
    boxes_M4[mask_N] = boxes_N4
    parts = [
        mask_probabilities(scene, boxes_part, image_part)
        for boxes_part, image_part in zip(
            boxes_M4.split(_MASKS_AT_ONCE), image_M.split(_MASKS_AT_ONCE), strict=True
        )
    ]
    per_image = torch.bincount(image_M, minlength=len(kept)).tolist()
    first = 0
    indices = []
    for local_N, count in zip(mask_N.split(counts), per_image, strict=True):
        indices.append(local_N - first)
        first += count
    return list(torch.cat(parts).split(per_image)), indices


def _choose(detections: Detections, index: Tensor) -> Detections:
    return Detections(
        boxes_L4=detections.boxes_L4[index],
        scores_L=detections.scores_L[index],
        classes_L=detections.classes_L[index],
        regions_L=detections.regions_L[index],
    )
