"""What the second stage does in training, for both kinds of batch.

Dimensions: B images, R regions of an image (padded), N = B * R, C classes, P chosen regions of the whole batch, S side of a
pooled region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxydet.modeling import geometry, matching
from proxydet.modeling.config import CascadeConfig
from proxydet.modeling.heads import scale_gradient
from proxydet.modeling.matching import Assignment, GroundTruth, Regions
from proxydet.modeling.outputs import ImageStepOutput, MaskOutput, MixupOutput, StepOutput
from proxydet.modeling.roi_heads import RoiHeads, Scene


def sample_regions(
    config: CascadeConfig,
    regions: Regions,
    truth: GroundTruth,
    classes: int,
    generator: torch.Generator | None,
) -> tuple[Regions, Assignment]:
    """Add the objects' own boxes to the proposals and draw the regions to train on."""
    regions = matching.append_ground_truth(regions, truth)
    assignment = matching.match(regions, truth, config.iou_thresholds[0], classes)
    return matching.sample(
        regions,
        assignment,
        size=config.samples_per_image,
        positive_fraction=config.positive_fraction,
        classes=classes,
        generator=generator,
    )


def box_steps(
    heads: RoiHeads,
    scene: Scene,
    regions: Regions,
    assignment: Assignment,
    truth: GroundTruth,
    *,
    classes: int,
) -> tuple[tuple[StepOutput, ...], MixupOutput | None]:
    """Run both cascades on a box batch.

    Args:
        heads: The second stage.
        scene: Features and image sizes.
        regions: The drawn regions.
        assignment: What they stand for.
        truth: The objects.
        classes: C, the background's label.
    """
    branch, config = heads.detection, heads.config
    outputs: list[StepOutput] = []
    pooled_NCSS = heads.pool(scene, regions)
    shape = regions.valid_BR.shape
    for step in range(len(branch)):
        if step > 0:
            regions = heads.refine(scene, outputs[-1].deltas_BR4, regions, step - 1)
            assignment = matching.match(regions, truth, config.iou_thresholds[step], classes)
            pooled_NCSS = heads.pool(scene, regions)
        features_NF = branch.features(step, _damp(pooled_NCSS, config))
        classifier = branch.classifier(step)
        outputs.append(
            StepOutput(
                embeddings_BRD=classifier(features_NF).unflatten(0, shape),
                deltas_BR4=branch.deltas(step, features_NF).unflatten(0, shape),
                regions=regions,
                assignment=assignment,
                targets_BR4=assignment.boxes_from(truth),
                delta_weights=config.delta_weights[step],
                bias=classifier.cls_bias,
            )
        )
    return tuple(outputs), _mixup_step(heads, scene, regions, truth, classes, pooled_NCSS.detach())


def _mixup_step(
    heads: RoiHeads,
    scene: Scene,
    regions: Regions,
    truth: GroundTruth,
    classes: int,
    pooled_NCSS: Tensor,
) -> MixupOutput | None:
    branch, config = heads.mixup, heads.config
    if branch is None:
        return None
    with torch.no_grad():
        regions = heads.mixup_regions(scene, regions, pooled_NCSS)
    threshold = config.iou_thresholds[-1]
    labels_BR = matching.match(regions, truth, threshold, classes).labels_BR
    chosen = _stand_for_objects(labels_BR, classes)
    pooled = heads.box_pooler(
        scene.features, regions.boxes_BR4.flatten(0, 1)[chosen], regions.image_N[chosen]
    )
    last = len(branch) - 1
    features_PF = branch.features(last, _damp(pooled, config))
    return MixupOutput(
        embeddings_PD=branch.classifier(last)(features_PF),
        labels_P=labels_BR.flatten()[chosen],
        objectness_P=regions.objectness_BR.flatten()[chosen],
    )


def mask_step(
    heads: RoiHeads,
    scene: Scene,
    regions: Regions,
    assignment: Assignment,
    truth: GroundTruth,
    classes: int,
) -> MaskOutput:
    """Predict masks for the regions that stand for an object which has a mask."""
    masked_BR = assignment.masked_from(truth)
    chosen = _stand_for_objects(torch.where(masked_BR, assignment.labels_BR, classes), classes)
    boxes_P4 = regions.boxes_BR4.flatten(0, 1)[chosen]
    image_P = regions.image_N[chosen]
    return MaskOutput(
        logits_PSS=heads.mask_logits(scene, boxes_P4, image_P),
        boxes_P4=boxes_P4,
        image_P=image_P,
        object_P=assignment.objects_BR.flatten()[chosen],
    )


def image_label_steps(
    heads: RoiHeads, scene: Scene, regions: Regions
) -> tuple[ImageStepOutput, ...]:
    """Run the detection branch on an image-label batch.

    Each step's loss looks at one region an image, the largest of all but the last. So only that one is seen with
    gradient; the others are only refined, to find the next step's largest.
    """
    boxes_BR4 = geometry.clip(regions.boxes_BR4, scene.sizes_B2[:, None])
    regions = regions.with_boxes(boxes_BR4, regions.valid_BR)
    image_B = torch.arange(len(boxes_BR4), device=boxes_BR4.device)
    branch = heads.detection
    outputs = []
    for step in range(len(branch)):
        if step > 0:
            with torch.no_grad():
                features_NF = branch.features(step - 1, heads.pool(scene, regions))
                deltas_N4 = branch.deltas(step - 1, features_NF)
                deltas_BR4 = deltas_N4.unflatten(0, regions.valid_BR.shape)
                regions = heads.refine(scene, deltas_BR4, regions, step - 1)
        largest_B4, valid_B = largest_but_last(regions)
        pooled = heads.box_pooler(scene.features, largest_B4, image_B)
        classifier = branch.classifier(step)
        features_BF = branch.features(step, _damp(pooled, heads.config))
        outputs.append(
            ImageStepOutput(
                embeddings_BD=classifier(features_BF), valid_B=valid_B, bias=classifier.cls_bias
            )
        )
    return tuple(outputs)


def largest_but_last(regions: Regions) -> tuple[Tensor, Tensor]:
    """Choose each image's largest region, the last one left out (the published choice; a lone region is taken).

    Returns:
        Boxes (B, 4), zero where an image has no region; and which images have one: bool (B,).
    """
    images, count = regions.valid_BR.shape
    if count == 0:
        empty_B4 = regions.boxes_BR4.new_zeros(images, 4)
        return empty_B4, torch.zeros(images, dtype=torch.bool, device=empty_B4.device)
    positions_R = torch.arange(count, device=regions.valid_BR.device)
    last_B = torch.where(regions.valid_BR, positions_R, -1).amax(dim=1)
    # The last one ranks below every other valid one and above padding, so it wins only when it is alone.
    areas_BR = geometry.areas(regions.boxes_BR4)
    areas_BR = torch.where(positions_R == last_B[:, None], -1.0, areas_BR)
    areas_BR = torch.where(regions.valid_BR, areas_BR, -2.0)
    chosen_B = areas_BR.argmax(dim=1)
    index_B14 = chosen_B[:, None, None].expand(-1, 1, 4)
    return regions.boxes_BR4.gather(1, index_B14)[:, 0], last_B >= 0


def _stand_for_objects(labels_BR: Tensor, classes: int) -> Tensor:
    """Return the places of the regions that stand for an object, all images in one row; waits for the device."""
    return ((labels_BR >= 0) & (labels_BR < classes)).flatten().nonzero()[:, 0]


def _damp(pooled_NCSS: Tensor, config: CascadeConfig) -> Tensor:
    """Let each step move the shared features by its share only."""
    return scale_gradient(pooled_NCSS, 1.0 / config.steps)
