"""The proposal network, a class-agnostic CenterNet (CenterNet2, Zhou et al. 2021, arXiv 2103.07461), with its losses.

Every cell of every pyramid level says how likely an object's centre lies in it and how far the object's sides are. The
losses are a focal loss of the heatmap and GIoU of the distances.

Dimensions: B images, H and W cells of a level, M cells of all levels, L levels, G objects of an image, R proposals of an
image (padded).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from proxydet.errors import NumericsError
from proxydet.modeling.boxes import NmsInput, Regions, areas, cell_centres, suppress
from proxydet.modeling.config import CenterNetLossConfig, ProposalConfig
from proxydet.modeling.precision import compute_heads

if TYPE_CHECKING:
    from proxydet.modeling.roi_heads import BatchObjects

# Boxes are widened to this many pixels, so that none is empty.
_SMALLEST_SIDE = 0.01
# Heatmap targets below this are 0.
_FAINTEST = 1e-4
_FAR = 1e8

LOCATION = "loss_centernet_loc"
POSITIVE = "loss_centernet_agn_pos"
NEGATIVE = "loss_centernet_agn_neg"


# --- Proposals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CenterNetOutput:
    """What the head says of every cell, a tensor a level, finest first.

    Attributes:
        heatmaps: (B, 1, H, W) logits.
        distances: (B, 4, H, W), left, top, right, bottom in strides, not negative.
        strides: Pixels a cell, a level.
    """

    heatmaps: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]
    strides: tuple[int, ...]


class Scale(nn.Module):
    """A learnt factor, one for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        """Multiply."""
        return values * self.scale


class CenterNetHead(nn.Module):
    """Convolutions shared by all levels.

    Args:
        config: Sizes and starting values.
        channels: Channels of the pyramid.
        levels: Number of levels.
    """

    def __init__(self, config: ProposalConfig, channels: int, levels: int) -> None:
        super().__init__()
        tower: list[nn.Module] = []
        for _ in range(config.convs):
            tower += [
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(config.norm_groups, channels),
                nn.ReLU(),
            ]
        self.bbox_tower = nn.Sequential(*tower)
        self.agn_hm = nn.Conv2d(channels, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        odds = config.initial_probability / (1 - config.initial_probability)
        nn.init.constant_(self.agn_hm.bias, math.log(odds))  # type: ignore[arg-type]
        nn.init.constant_(self.bbox_pred.bias, config.initial_distance)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return heatmap logits (B, 1, H, W) and distances (B, 4, H, W), one a level."""
        heatmaps, distances = [], []
        for maps, scale in zip(features, self.scales, strict=True):
            hidden = self.bbox_tower(maps)
            heatmaps.append(self.agn_hm(hidden))
            distances.append(functional.relu(scale(self.bbox_pred(hidden))))
        return tuple(heatmaps), tuple(distances)


class CenterNet(nn.Module):
    """The proposal network.

    Args:
        config: Sizes and limits.
        channels: Channels of the pyramid.
        strides: Stride of every level of the pyramid, finest first.
    """

    def __init__(self, config: ProposalConfig, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(s for s in strides if s >= 2 ** (config.first_level or 0))
        self.centernet_head = CenterNetHead(config, channels, len(self.strides))

    def forward(self, features: list[Tensor]) -> CenterNetOutput:
        """Run the head on the maps of the levels that propose; ``features`` are all of the pyramid's, finest first."""
        heatmaps, distances = compute_heads(self.centernet_head, features[-len(self.strides) :])
        return CenterNetOutput(heatmaps=heatmaps, distances=distances, strides=self.strides)

    @torch.no_grad()
    def propose(
        self, output: CenterNetOutput, *, keep: int | None = None, check: bool = False
    ) -> Regions:
        """Turn the head's output into proposals: boxes, not clipped to the image, with scores in [0, 1], best first.

        Args:
            output: What `forward` returned.
            keep: Proposals to keep an image at most; None takes the configured number for training or inference.
            check: Whether to check for values that are not finite (waits for the device).

        Raises:
            NumericsError: A value is not finite, and ``check`` is set.
        """
        finite = (
            [m.isfinite().all() for m in (*output.heatmaps, *output.distances)] if check else []
        )
        if check and not bool(torch.stack(finite).all()):
            raise NumericsError(
                "the features of an image are not finite: the proposal network gave NaN or infinity",
                hint="the weights are damaged, or half precision is too narrow for them: use float32",
            )
        candidates = self.config.candidates_train if self.training else self.config.candidates_test
        if keep is None:
            keep = self.config.keep_train if self.training else self.config.keep_test
        boxes_BN4, scores_BN = self._candidates(output, candidates)
        counts = (scores_BN > 0).sum(dim=1).tolist()
        boxes = torch.cat([own[:count] for own, count in zip(boxes_BN4, counts, strict=True)])
        scores = torch.cat([own[:count] for own, count in zip(scores_BN, counts, strict=True)])
        nms_input = NmsInput(boxes_N4=boxes, scores_N=scores, counts=counts)
        kept = suppress(nms_input, iou=self.config.nms_iou, limit=keep)
        scores_BR = pad_sequence([scores[places] for places in kept], batch_first=True)
        return Regions(
            boxes_BR4=pad_sequence([boxes[places] for places in kept], batch_first=True),
            objectness_BR=scores_BR,
            valid_BR=scores_BR > 0,
        )

    def _candidates(self, output: CenterNetOutput, limit: int) -> tuple[Tensor, Tensor]:
        """Return the best cells of each level as boxes, by descending score; cells below the floor score 0."""
        boxes, scores = [], []
        for heatmap, distances, stride in zip(
            output.heatmaps, output.distances, output.strides, strict=True
        ):
            probability_BM = heatmap.detach().float().flatten(1).sigmoid()
            best_BK, cells_BK = probability_BM.topk(min(limit, probability_BM.shape[1]), dim=1)
            height, width = heatmap.shape[2:]
            points_M2 = cell_centres(height, width, stride, heatmap.device)
            sides_BM4 = distances.detach().float().flatten(2).transpose(1, 2)
            sides_BK4 = stride * sides_BM4.gather(1, cells_BK[:, :, None].expand(-1, -1, 4))
            boxes.append(boxes_around(points_M2[cells_BK], sides_BK4))
            scores.append(torch.where(best_BK > self.config.score_floor, best_BK.sqrt(), 0.0))
        scores_BN, order_BN = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
        boxes_BN4 = torch.cat(boxes, dim=1).gather(1, order_BN[:, :, None].expand(-1, -1, 4))
        return boxes_BN4, scores_BN


def boxes_around(points: Tensor, sides: Tensor) -> Tensor:
    """Return the boxes (..., 4) whose sides have the given distances (..., 4) from points (..., 2), in pixels."""
    top_left = points - sides[..., :2]
    bottom_right = torch.maximum(points + sides[..., 2:], top_left + _SMALLEST_SIDE)
    return torch.cat([top_left, bottom_right], dim=-1)


# --- Losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of all levels.

    Attributes:
        points_M2: What each cell stands for, (x, y) in pixels.
        strides_M: Pixels a cell.
        ranges_M2: Half diagonals that the cell's level learns.
        starts: First cell of each level.
        shapes: Height and width of each level, in cells.
        level_strides: Pixels a cell of each level.
    """

    points_M2: Tensor
    strides_M: Tensor
    ranges_M2: Tensor
    starts: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    level_strides: tuple[int, ...]

    @classmethod
    def of_levels(
        cls,
        shapes: tuple[tuple[int, int], ...],
        strides: tuple[int, ...],
        size_ranges: tuple[tuple[float, float], ...],
        device: torch.device,
    ) -> Cells:
        """Lay out the cells of levels with the given shapes, strides and size ranges."""
        counts = [height * width for height, width in shapes]
        repeats_L = torch.tensor(counts).to(device)
        total = sum(counts)
        points = [
            cell_centres(height, width, stride, device)
            for (height, width), stride in zip(shapes, strides, strict=True)
        ]
        strides_L = torch.tensor(strides, dtype=torch.float32).to(device)
        ranges_L2 = torch.tensor(size_ranges, dtype=torch.float32).to(device)
        return cls(
            points_M2=torch.cat(points),
            strides_M=strides_L.repeat_interleave(repeats_L, output_size=total),
            ranges_M2=ranges_L2.repeat_interleave(repeats_L, dim=0, output_size=total),
            starts=tuple(sum(counts[:level]) for level in range(len(counts))),
            shapes=shapes,
            level_strides=strides,
        )


@dataclass(frozen=True, kw_only=True)
class CenterNetTargets:
    """Targets of one image.

    Attributes:
        heatmap_M: In [0, 1]: 1 where a cell holds an object's centre, falling off around it.
        distances_M4: Left, top, right, bottom in strides; 0 where not learnt.
        learnt_M: bool, cells whose distances are learnt.
        centres_GL: int64, the cell that holds each object's centre, on each level.
        positive_GL: bool, levels that learn each object's size.
    """

    heatmap_M: Tensor
    distances_M4: Tensor
    learnt_M: Tensor
    centres_GL: Tensor
    positive_GL: Tensor


def average_over_processes(counts: Tensor) -> Tensor:
    """Return the mean over all processes, at least 1; every process must call this, whatever its batch holds.

    Args:
        counts: This process's counts, of any shape.

    Returns:
        float32 of the same shape, without gradient. Waits for the other processes, not for the device.
    """
    totals = counts.detach().to(torch.float32).clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(totals)
        totals /= distributed.get_world_size()
    return totals.clamp(min=1.0)


def centernet_targets(
    boxes_G4: Tensor, cells: Cells, config: CenterNetLossConfig
) -> CenterNetTargets:
    """Compute the targets of one image.

    Args:
        boxes_G4: Its objects, xyxy pixels; there may be none.
        cells: The cells of all levels.
        config: Radii and overlap.
    """
    centres_G2 = (boxes_G4[:, :2] + boxes_G4[:, 2:]) / 2
    centres_GL, positive_GL = _positives(boxes_G4, centres_G2, cells)
    if len(boxes_G4) == 0:
        zeros_M = torch.zeros_like(cells.strides_M)
        return CenterNetTargets(
            heatmap_M=zeros_M,
            distances_M4=zeros_M[:, None].repeat(1, 4),
            learnt_M=zeros_M.bool(),
            centres_GL=centres_GL,
            positive_GL=positive_GL,
        )
    # On each cell's level, the point of the cell that holds each object's centre.
    strides_M11 = cells.strides_M[:, None, None]
    holders_MG2 = (centres_G2 / strides_M11).floor() * strides_M11 + strides_M11 / 2
    offsets_MG2 = cells.points_M2[:, None] - holders_MG2
    squared_MG = (cells.points_M2[:, None] - centres_G2).square().sum(dim=-1)
    squared_MG = squared_MG.masked_fill((offsets_MG2 == 0).all(dim=-1), 0.0)
    delta = (1 - config.min_overlap) / (1 + config.min_overlap)
    squared_radii_G = (2 * delta**2 * areas(boxes_G4)).clamp(min=config.min_radius**2)
    nearness_MG = squared_MG / squared_radii_G
    heatmap_M = (-nearness_MG.amin(dim=1)).exp()
    distances_M4, learnt_M = _regression(boxes_G4, offsets_MG2, nearness_MG, cells)
    return CenterNetTargets(
        heatmap_M=torch.where(heatmap_M < _FAINTEST, 0.0, heatmap_M),
        distances_M4=distances_M4,
        learnt_M=learnt_M,
        centres_GL=centres_GL,
        positive_GL=positive_GL,
    )


def _positives(boxes_G4: Tensor, centres_G2: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    half_G = (boxes_G4[:, 2:] - boxes_G4[:, :2]).square().sum(dim=1).sqrt() / 2
    indices, holds = [], []
    for start, (height, width), stride in zip(
        cells.starts, cells.shapes, cells.level_strides, strict=True
    ):
        column_G = (centres_G2[:, 0] / stride).long().clamp(0, width - 1)
        row_G = (centres_G2[:, 1] / stride).long().clamp(0, height - 1)
        low, high = cells.ranges_M2[start]
        indices.append(start + row_G * width + column_G)
        holds.append((half_G >= low) & (half_G <= high))
    return torch.stack(indices, dim=1), torch.stack(holds, dim=1)


def _regression(
    boxes_G4: Tensor, offsets_MG2: Tensor, nearness_MG: Tensor, cells: Cells
) -> tuple[Tensor, Tensor]:
    points_M12 = cells.points_M2[:, None]
    sides_MG4 = torch.cat(
        [points_M12 - boxes_G4[None, :, :2], boxes_G4[None, :, 2:] - points_M12], dim=-1
    )
    around_MG = (offsets_MG2.abs() <= cells.strides_M[:, None, None]).all(dim=-1)
    inside_MG = sides_MG4.amin(dim=-1) > 0
    half_MG = (sides_MG4[..., :2] + sides_MG4[..., 2:]).square().sum(dim=-1).sqrt() / 2
    low_M1, high_M1 = cells.ranges_M2[:, :1], cells.ranges_M2[:, 1:]
    fits_MG = (half_MG >= low_M1) & (half_MG <= high_M1)
    ranked_MG = nearness_MG.masked_fill(~(around_MG & inside_MG & fits_MG), _FAR)
    best_M, object_M = ranked_MG.min(dim=1)
    learnt_M = best_M < _FAR
    chosen_M4 = sides_MG4.gather(1, object_M[:, None, None].expand(-1, 1, 4))[:, 0]
    return torch.where(learnt_M[:, None], chosen_M4 / cells.strides_M[:, None], 0.0), learnt_M


def centernet_losses(
    output: CenterNetOutput, truth: BatchObjects, config: CenterNetLossConfig
) -> dict[str, Tensor]:
    """Return the three losses of a box batch.

    Args:
        output: What the head said.
        truth: The objects.
        config: Weights.

    Raises:
        ConfigError: There are not as many size ranges as levels.
    """
    config.check_levels(len(output.strides))
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


def zero_centernet_losses(output: CenterNetOutput) -> dict[str, Tensor]:
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
    positive: Tensor | float = 0.0
    for probability_M, target in zip(probability_BM, targets, strict=True):
        p_GL = probability_M[target.centres_GL]
        loss_GL = -config.focal_alpha * p_GL.log() * (1 - p_GL) ** config.focal_gamma
        positive = positive + (loss_GL * target.positive_GL).sum()
    loss_BM = -(1 - config.focal_alpha) * (1 - probability_BM).log()
    loss_BM = loss_BM * probability_BM**config.focal_gamma
    loss_BM = loss_BM * (1 - heatmap_BM) ** config.negative_beta
    negative = torch.where(probability_BM < config.ignored_above, loss_BM, 0.0).sum()
    location = (giou_of_distances(distances_BM4, wanted_BM4) * learnt_BM).sum()
    return {
        LOCATION: config.regression_weight * location / counts[1],
        POSITIVE: config.heatmap_weight * positive / counts[0],
        NEGATIVE: config.heatmap_weight * negative / counts[0],
    }


def giou_of_distances(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 - GIoU (Rezatofighi et al. 2019) of boxes given as distances from a point inside the target one.

    Args:
        predicted: (..., 4), left, top, right, bottom, not negative.
        target: (..., 4).

    Returns:
        (...), in [0, 2]. Areas in the overlap ratio are smoothed by 1, so empty boxes are no special case.
    """
    shared = _area(torch.minimum(predicted, target))
    hull = _area(torch.maximum(predicted, target))
    union = _area(predicted) + _area(target) - shared
    # The hull is 0 only where both boxes are; the gap is 0 there too.
    gap = (hull - union) / torch.where(hull > 0, hull, 1.0)
    return 1 - (shared + 1) / (union + 1) + gap


def _area(distances: Tensor) -> Tensor:
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])
