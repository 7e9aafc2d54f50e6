"""Losses of the proposal network (CenterNet2, arXiv 2103.07461): focal heatmap loss and GIoU of distances.

Dimensions: B images, M cells of all levels, G objects of an image, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxydet.errors import ConfigError
from proxydet.losses.centernet_targets import Cells, CenterNetTargets, centernet_targets
from proxydet.losses.config import CenterNetLossConfig
from proxydet.losses.processes import average_over_processes
from proxydet.modeling.centernet import CenterNetOutput
from proxydet.modeling.matching import GroundTruth

LOCATION = "loss_centernet_loc"
POSITIVE = "loss_centernet_agn_pos"
NEGATIVE = "loss_centernet_agn_neg"


def centernet_losses(
    output: CenterNetOutput, truth: GroundTruth, config: CenterNetLossConfig
) -> dict[str, Tensor]:
    """Return the three losses of a box batch.

    Args:
        output: What the head said.
        truth: The objects.
        config: Weights.

    Raises:
        ConfigError: There are not as many size ranges as levels.
    """
    if len(config.size_ranges) != len(output.strides):
        raise ConfigError(
            f"{len(config.size_ranges)} size ranges for {len(output.strides)} pyramid levels",
            hint="give losses.centernet.size_ranges one entry for each level of model.pyramid",
        )
    shapes = tuple((maps.shape[2], maps.shape[3]) for maps in output.heatmaps)
    device = output.heatmaps[0].device
    cells = Cells.of_levels(shapes, output.strides, config.size_ranges, device)
    targets = [
        centernet_targets(boxes_G4[:count], cells, config)
        for boxes_G4, count in zip(truth.boxes_BG4, truth.counts, strict=True)
    ]
    logits_BM = torch.cat([maps.flatten(1) for maps in output.heatmaps], dim=1)
    distances_BM4 = torch.cat([maps.flatten(2).transpose(1, 2) for maps in output.distances], dim=1)
    return losses_from_targets(logits_BM, distances_BM4, targets, config)


def silent_centernet_losses(output: CenterNetOutput) -> dict[str, Tensor]:
    """Return three zeros for an image-label batch, whose objects are not known.

    They are connected to the head, so that its parameters get a zero gradient as in the published code, and take part in
    the agreement on counts, so that processes with a box batch do not wait for ever.
    """
    zeros = average_over_processes(output.heatmaps[0].new_zeros(2)).sum() * 0
    nothing = sum((maps.sum() * 0 for maps in output.heatmaps), zeros)
    regression = sum((maps.sum() * 0 for maps in output.distances), zeros)
    return {LOCATION: regression, POSITIVE: nothing, NEGATIVE: nothing}


def losses_from_targets(
    logits_BM: Tensor,
    distances_BM4: Tensor,
    targets: list[CenterNetTargets],
    config: CenterNetLossConfig,
) -> dict[str, Tensor]:
    """Return the three losses.

    Args:
        logits_BM: Heatmap logits.
        distances_BM4: Predicted distances in strides.
        targets: Targets of each image.
        config: Weights.
    """
    probability_BM = logits_BM.sigmoid().clamp(
        config.probability_clamp, 1 - config.probability_clamp
    )
    heatmap_BM = torch.stack([target.heatmap_M for target in targets])
    learnt_BM = torch.stack([target.learnt_M for target in targets])
    wanted_BM4 = torch.stack([target.distances_M4 for target in targets])
    positives = torch.stack([target.positive_GL.sum() for target in targets]).sum()
    counts = average_over_processes(torch.stack([positives, learnt_BM.sum()]))
    positive = sum(
        _positive_part(probability_M, target, config)
        for probability_M, target in zip(probability_BM, targets, strict=True)
    )
    negative = _negative_part(probability_BM, heatmap_BM, config)
    location = (giou_of_distances(distances_BM4, wanted_BM4) * learnt_BM).sum()
    return {
        LOCATION: config.regression_weight * location / counts[1],
        POSITIVE: config.heatmap_weight * positive / counts[0],
        NEGATIVE: config.heatmap_weight * negative / counts[0],
    }


def giou_of_distances(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 - GIoU (Rezatofighi et al. 2019) of boxes given as distances from a point inside the wanted one.

    Args:
        predicted: (..., 4), left, top, right, bottom, not negative.
        wanted: (..., 4).

    Returns:
        (...), in [0, 2]. Areas in the overlap ratio are smoothed by 1, so empty boxes are no special case.
    """
    shared = _area(torch.minimum(predicted, wanted))
    hull = _area(torch.maximum(predicted, wanted))
    union = _area(predicted) + _area(wanted) - shared
    # The hull is 0 only where both boxes are; the gap is 0 there too.
    gap = (hull - union) / torch.where(hull > 0, hull, 1.0)
    return 1 - (shared + 1) / (union + 1) + gap


def _area(distances: Tensor) -> Tensor:
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])


def _positive_part(
    probability_M: Tensor, target: CenterNetTargets, config: CenterNetLossConfig
) -> Tensor:
    p_GL = probability_M[target.centres_GL]
    loss_GL = -config.focal_alpha * p_GL.log() * (1 - p_GL) ** config.focal_gamma
    return (loss_GL * target.positive_GL).sum()


def _negative_part(
    probability_BM: Tensor, heatmap_BM: Tensor, config: CenterNetLossConfig
) -> Tensor:
    loss_BM = -(1 - config.focal_alpha) * (1 - probability_BM).log()
    loss_BM = loss_BM * probability_BM**config.focal_gamma
    loss_BM = loss_BM * (1 - heatmap_BM) ** config.negative_beta
    return torch.where(probability_BM < config.ignored_above, loss_BM, 0.0).sum()
