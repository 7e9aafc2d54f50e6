"""From detections in the network's input to predictions in the original image, with one mask a distinct box.

How often the host waits for the device does not depend on the number of images.

Dimensions: B images, N detections and M distinct boxes of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxydet.modeling import geometry
from proxydet.modeling.prediction import Prediction
from proxydet.modeling.roi_heads import Scene
from proxydet.modeling.scoring import Detections

MaskPredictor = Callable[[Scene, Tensor, Tensor], Tensor]


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
        mask_probabilities: Masks of boxes, in [0, 1], given the image of each; None makes boxes without masks.
    """
    device = scene.sizes_B2.device
    sizes_B2 = torch.tensor(original_sizes, dtype=torch.float32).to(device, non_blocking=True)
    scales_B4 = (sizes_B2 / scene.sizes_B2).flip(1).repeat(1, 2)
    image_N = geometry.image_of_each([len(detections.scores_L) for detections in found], device)
    everything = _join(found)
    scaled_N4 = geometry.clip(everything.boxes_L4 * scales_B4[image_N], sizes_B2[image_N])
    solid = geometry.nonempty(scaled_N4).nonzero()[:, 0]
    kept, image_N = _choose(everything, solid), image_N[solid]
    counts = _counts(image_N, len(found))
    masks: Sequence[Tensor | None] = [None] * len(found)
    mask_index_N = torch.full_like(kept.classes_L, -1)
    if mask_probabilities is not None:
        masks, mask_index_N = _distinct_masks(kept, image_N, len(found), scene, mask_probabilities)
    return [
        Prediction(
            boxes_N4=boxes,
            scores_N=scores,
            classes_N=classes,
            mask_probs_MSS=own_masks,
            mask_index_N=mask_index,
            image_size=size,
        )
        for boxes, scores, classes, own_masks, mask_index, size in zip(
            scaled_N4[solid].split(counts),
            kept.scores_L.split(counts),
            kept.classes_L.split(counts),
            masks,
            mask_index_N.split(counts),
            original_sizes,
            strict=True,
        )
    ]


def _distinct_masks(
    kept: Detections, image_N: Tensor, images: int, scene: Scene, predict: MaskPredictor
) -> tuple[list[Tensor], Tensor]:
    """Predict one mask a distinct box: return each image's masks, and the place of each detection's among them."""
    # A region's place in the whole batch; all its classes have the same box.
    stride = kept.regions_L.max() + 1 if len(image_N) else 1
    place_M, mask_N = (image_N * stride + kept.regions_L).unique(return_inverse=True)
    image_M = place_M // stride
    boxes_M4 = kept.boxes_L4.new_empty(len(place_M), 4)
    boxes_M4[mask_N] = kept.boxes_L4
    probabilities_MSS = predict(scene, boxes_M4, image_M)
    first_B = torch.searchsorted(image_M, torch.arange(images, device=image_M.device))
    return list(probabilities_MSS.split(_counts(image_M, images))), mask_N - first_B[image_N]


def _counts(image_N: Tensor, images: int) -> list[int]:
    """Return how many rows belong to each image; waits for the device once."""
    numbers_B = torch.arange(images, device=image_N.device)
    counts: list[int] = (image_N[:, None] == numbers_B).sum(dim=0).tolist()
    return counts


def _join(found: list[Detections]) -> Detections:
    return Detections(
        boxes_L4=torch.cat([detections.boxes_L4 for detections in found]),
        scores_L=torch.cat([detections.scores_L for detections in found]),
        classes_L=torch.cat([detections.classes_L for detections in found]),
        regions_L=torch.cat([detections.regions_L for detections in found]),
    )


def _choose(detections: Detections, index: Tensor) -> Detections:
    return Detections(
        boxes_L4=detections.boxes_L4[index],
        scores_L=detections.scores_L[index],
        classes_L=detections.classes_L[index],
        regions_L=detections.regions_L[index],
    )
