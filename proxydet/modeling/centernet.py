"""The proposal network, a class-agnostic CenterNet (CenterNet2, Zhou et al. 2021, arXiv 2103.07461), with its losses.

Every cell of every pyramid level says how likely an object's centre lies in it and how far the object's sides are. The
losses are a focal loss of the heatmap and GIoU of the distances.

Dimensions: B images, H and W cells of a level, M cells of all levels, L levels, G objects of an image, R proposals of an
image (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

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
# Most pairs of an object and a cell whose targets are computed in one piece, where one image has no more: 16 MiB a tensor of
# them. 8 images of 640 x 640 pixels come in one piece up to 61 objects an image; with 245 they take 410 MiB.
_PAIRS_AT_ONCE = 2**22

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

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Return height and width of each level in cells."""
        return tuple((maps.shape[2], maps.shape[3]) for maps in self.heatmaps)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Return the logits (B, M) and the distances (B, M, 4) of all cells, the finest level's first, row by row: float32."""
        logits_BM = torch.cat([maps.flatten(1) for maps in self.heatmaps], dim=1)
        distances_B4M = torch.cat([maps.flatten(2) for maps in self.distances], dim=2)
        return logits_BM.float(), distances_B4M.transpose(1, 2).float()


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
        """Return heatmap logits (B, 1, H, W) and distances (B, 4, H, W), one a level; of several sizes, size after size."""
        heatmaps, distances = [], []
        towers = list(features)
        for layer in self.bbox_tower:
            if isinstance(layer, nn.ReLU):
                towers = _rectified(towers)
            else:
                towers = [layer(maps) for maps in towers]
        for hidden, scale in zip(towers, cycle(self.scales)):
            kind = hidden.device.type
            # The meta device, on which a dry run counts, has no autocast to ask about.
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                # Boxes start from these: 8 bits of fraction would move their sides by a fifth of a percent.
                with torch.autocast(kind, enabled=False):
                    hidden = hidden.float()  # once: the backward pass keeps it
                    heatmap, distance = self.agn_hm(hidden), self.bbox_pred(hidden)
            else:
                heatmap, distance = self.agn_hm(hidden), self.bbox_pred(hidden)
            heatmaps.append(heatmap)
            distances.append(scale(distance))
        return tuple(heatmaps), tuple(_rectified(distances))


def _rectified(maps: list[Tensor]) -> list[Tensor]:
    """Return the ReLU of maps that nobody else reads; in inference on a GPU in place, with one launch for all."""
    if not maps[0].is_cuda or torch.is_grad_enabled():
        return [functional.relu(each) for each in maps]
    torch._foreach_clamp_min_(maps, 0)
    return maps


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
        (output,) = self.of_sizes([features])
        return output

    def of_sizes(self, sizes: Sequence[list[Tensor]]) -> list[CenterNetOutput]:
        """Run the head on the maps of images of several sizes, with fewer kernels than size by size; else as `forward`."""
        levels = len(self.strides)
        maps = [level for features in sizes for level in features[-levels:]]
        heatmaps, distances = compute_heads(self.centernet_head, maps)
        return [
            CenterNetOutput(
                heatmaps=heatmaps[first : first + levels],
                distances=distances[first : first + levels],
                strides=self.strides,
            )
            for first in range(0, len(maps), levels)
        ]

    @torch.no_grad()
    def propose(
        self, *outputs: CenterNetOutput, keep: int | None = None, check: bool = False
    ) -> Regions:
        """Turn the head's output into proposals: boxes, not clipped to the image, with scores in [0, 1], best first.

        Args:
            *outputs: What `forward` returned, of images of one size or, one after the other, of several.
            keep: Proposals to keep an image at most; None takes the configured number for training or inference.
            check: Whether to check for values that are not finite.

        Raises:
            NumericsError: A value is not finite, and ``check`` is set.
        """
        candidates = self.config.candidates_train if self.training else self.config.candidates_test
        if keep is None:
            keep = self.config.keep_train if self.training else self.config.keep_test
        cells = [output.cells() for output in outputs]
        boxes_BN4, scores_BN = self._candidates(outputs, cells, candidates)
        numbers = [(scores_BN > 0).sum(dim=1)]
        if check:
            values = torch.cat([maps.flatten() for own in cells for maps in own])
            numbers.append(values.isfinite().all()[None])
        counts = torch.cat(numbers).tolist()  # waits for the device once
        if check and not counts.pop():
            raise NumericsError(
                "the features of an image are not finite: the proposal network gave NaN or infinity",
                hint="the weights are damaged, or half precision is too narrow for them: use float32",
            )
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

    def _candidates(
        self,
        outputs: Sequence[CenterNetOutput],
        cells: Sequence[tuple[Tensor, Tensor]],
        limit: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the best cells of each level as boxes, by descending score; cells below the floor score 0.

        What has to run size by size and level by level is the choice of the cells; all else is done for all images at once.
        """
        device = cells[0][0].device
        points, best, chosen, places, row, point = [], [], [], [], 0, 0
        for output, (logits_BM, _) in zip(outputs, cells, strict=True):
            probability_BM = logits_BM.sigmoid()
            images, number = logits_BM.shape
            levels, starts, start = [], [], 0
            for height, width in output.shapes():
                level_BM = probability_BM[:, start : start + height * width]
                levels.append(level_BM.topk(min(limit, height * width), dim=1))
                starts.append(torch.full((levels[-1].values.shape[1],), start))
                start += height * width
            points.append(_points(output.shapes(), output.strides))
            best.append(torch.cat([level.values for level in levels], dim=1))
            chosen.append(torch.cat([level.indices for level in levels], dim=1))
            # Of each candidate's level: the place of its first cell among all points, and among all images' cells.
            first_K, row_B1 = torch.cat(starts), row + number * torch.arange(images)[:, None]
            places.append(torch.stack([(point + first_K).expand(images, -1), row_B1 + first_K]))
            row, point = row + images * number, point + number
        most = max(own.shape[1] for own in best)
        best_BK, cells_BK, first_2BK = (
            torch.cat(
                [
                    own if own.shape[-1] == most else functional.pad(own, (0, most - own.shape[-1]))
                    for own in parts
                ],
                dim=-2,
            )
            for parts in (best, chosen, places)
        )
        # Made on the host and moved in one piece, which is one launch instead of twelve a level.
        points_M3 = torch.cat(points).to(device, non_blocking=True)
        point_BK, row_BK = first_2BK.to(device, non_blocking=True) + cells_BK
        points_BK2, stride_BK1 = points_M3[point_BK].split((2, 1), dim=-1)
        sides_BK4 = stride_BK1 * torch.cat([sides.flatten(0, 1) for _, sides in cells])[row_BK]
        scores_BK = torch.where(best_BK > self.config.score_floor, best_BK.sqrt(), 0.0)
        scores_BN, order_BN = scores_BK.sort(dim=1, descending=True, stable=True)
        boxes_BK4 = boxes_around(points_BK2, sides_BK4)
        return boxes_BK4.gather(1, order_BN[:, :, None].expand(-1, -1, 4)), scores_BN


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may be used in training
def _points(shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...]) -> Tensor:
    """Return x and y of each cell's point, and its stride, in pixels (M, 3); on the host, where it costs no launches."""
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        centres_M2 = cell_centres(height, width, stride, torch.device("cpu"))
        levels.append(functional.pad(centres_M2, (0, 1), value=float(stride)))
    return torch.cat(levels)


def boxes_around(points: Tensor, sides: Tensor) -> Tensor:
    """Return the boxes (..., 4) whose sides have the given distances (..., 4) from points (..., 2), in pixels."""
    top_left = points - sides[..., :2]
    bottom_right = torch.maximum(points + sides[..., 2:], top_left + _SMALLEST_SIDE)
    return torch.cat([top_left, bottom_right], dim=-1)


# --- Losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of all levels, and the levels.

    Attributes:
        table_5M: Of each cell: x and y of its point in pixels, its stride in pixels, and the smallest and largest half
            diagonal that its level learns.
        table_6L: Of each level: stride, smallest and largest half diagonal, its first cell, its width and height in cells.
    """

    table_5M: Tensor
    table_6L: Tensor

    @classmethod
    def of_levels(
        cls,
        shapes: tuple[tuple[int, int], ...],
        strides: tuple[int, ...],
        size_ranges: tuple[tuple[float, float], ...],
        device: torch.device,
    ) -> Cells:
        """Lay out the cells of levels with the given shapes, strides and size ranges.

        The tables are made on the host and copied from pageable memory: the host waits until CUDA has staged them, not for
        a result of the device.
        """
        table_5M, table_6L = _tables(shapes, strides, size_ranges)
        return cls(
            table_5M=table_5M.to(device, non_blocking=True),
            table_6L=table_6L.to(device, non_blocking=True),
        )


@lru_cache(maxsize=32)
def _tables(
    shapes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    size_ranges: tuple[tuple[float, float], ...],
) -> tuple[Tensor, Tensor]:
    """Make the two tables of `Cells` on the host, where it costs no launches."""
    ranges, levels, start = [], [], 0
    for (height, width), stride, (low, high) in zip(shapes, strides, size_ranges, strict=True):
        ranges.append(torch.tensor([low, high])[:, None].expand(2, height * width))
        levels.append([stride, low, high, start, width, height])
        start += height * width
    table_5M = torch.cat([_points(shapes, strides).T, torch.cat(ranges, dim=1)])
    return table_5M, torch.tensor(levels).T.contiguous()


@dataclass(frozen=True, kw_only=True)
class CenterNetTargets:
    """Targets of a batch of images.

    Attributes:
        heatmap_BM: In [0, 1]: 1 where a cell holds an object's centre, falling off around it.
        distances_BM4: Left, top, right, bottom in strides; 0 where not learnt.
        learnt_BM: bool, cells whose distances are learnt.
        centres_BGL: int64, the cell that holds each object's centre, on each level; any cell where padded.
        positive_BGL: bool, levels that learn each object's size; False where padded.
    """

    heatmap_BM: Tensor
    distances_BM4: Tensor
    learnt_BM: Tensor
    centres_BGL: Tensor
    positive_BGL: Tensor


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
    boxes_BG4: Tensor, valid_BG: Tensor, cells: Cells, config: CenterNetLossConfig
) -> CenterNetTargets:
    """Compute the targets of a batch, without waiting for the device.

    Args:
        boxes_BG4: The objects, xyxy pixels; there may be none.
        valid_BG: bool, False where padded.
        cells: The cells of all levels.
        config: Radii and overlap.
    """
    sides_BG2 = boxes_BG4[..., 2:] - boxes_BG4[..., :2]
    centres_BG2 = (boxes_BG4[..., :2] + boxes_BG4[..., 2:]) / 2
    stride_L, low_L, high_L, start_L, width_L, height_L = cells.table_6L
    half_BG1 = sides_BG2.square().sum(dim=-1, keepdim=True).sqrt() / 2
    column_BGL, row_BGL = (
        torch.minimum((centres_BG2[..., axis, None] / stride_L).floor().clamp(min=0), size_L - 1)
        for axis, size_L in enumerate((width_L, height_L))
    )
    centres_BGL = start_L.long() + row_BGL.long() * width_L.long() + column_BGL.long()
    positive_BGL = (half_BG1 >= low_L) & (half_BG1 <= high_L) & valid_BG[..., None]
    # One piece for all images, unless one of them holds so many objects that the pairs would take too much memory.
    pairs = max(boxes_BG4.shape[1], 1) * cells.table_5M.shape[1]
    parts = [
        _of_cells(boxes, centres, valid, cells, config)
        for boxes, centres, valid in zip(
            *(v.split(max(1, _PAIRS_AT_ONCE // pairs)) for v in (boxes_BG4, centres_BG2, valid_BG)),
            strict=True,
        )
    ]
    heatmap_BM, distances_BM4, learnt_BM = (
        of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts)
        for of_parts in zip(*parts, strict=True)
    )
    return CenterNetTargets(
        heatmap_BM=heatmap_BM,
        distances_BM4=distances_BM4,
        learnt_BM=learnt_BM,
        centres_BGL=centres_BGL,
        positive_BGL=positive_BGL,
    )


def _of_cells(
    boxes_BG4: Tensor,
    centres_BG2: Tensor,
    valid_BG: Tensor,
    cells: Cells,
    config: CenterNetLossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each cell's heatmap (B, M), distances (B, M, 4) and whether it learns them (B, M)."""
    x_M, y_M, stride_M, low_M, high_M = cells.table_5M
    images, objects = valid_BG.shape
    if objects == 0:
        zeros_BM = torch.zeros_like(x_M).repeat(images, 1)
        return zeros_BM, zeros_BM[..., None].repeat(1, 1, 4), zeros_BM.bool()
    x1_BG1, y1_BG1, x2_BG1, y2_BG1 = boxes_BG4[..., None].unbind(dim=2)
    x_BG1, y_BG1 = centres_BG2[..., None].unbind(dim=2)
    half_stride_M = stride_M / 2
    # From the point of the cell on each cell's level that holds the object's centre.
    across_BGM = x_M - ((x_BG1 / stride_M).floor() * stride_M + half_stride_M)
    down_BGM = y_M - ((y_BG1 / stride_M).floor() * stride_M + half_stride_M)
    squared_BGM = (x_M - x_BG1).square() + (y_M - y_BG1).square()
    squared_BGM = squared_BGM.masked_fill((across_BGM == 0) & (down_BGM == 0), 0.0)
    delta = (1 - config.min_overlap) / (1 + config.min_overlap)
    squared_radii_BG = (2 * delta**2 * areas(boxes_BG4)).clamp(min=config.min_radius**2)
    nearness_BGM = squared_BGM / squared_radii_BG[..., None]
    nearness_BGM = nearness_BGM.masked_fill(~valid_BG[..., None], torch.inf)
    heatmap_BM = (-nearness_BGM.amin(dim=1)).exp()
    # Of the objects that a cell is near the centre of, inside and on the level of, it learns the nearest.
    around_BGM = torch.maximum(across_BGM.abs(), down_BGM.abs()) <= stride_M
    left_BGM, top_BGM = x_M - x1_BG1, y_M - y1_BG1
    right_BGM, bottom_BGM = x2_BG1 - x_M, y2_BG1 - y_M
    inside_BGM = (
        torch.minimum(torch.minimum(left_BGM, top_BGM), torch.minimum(right_BGM, bottom_BGM)) > 0
    )
    squared_sides_BGM = (left_BGM + right_BGM).square() + (top_BGM + bottom_BGM).square()
    half_BGM = squared_sides_BGM.sqrt() / 2
    fits_BGM = (half_BGM >= low_M) & (half_BGM <= high_M)
    ranked_BGM = nearness_BGM.masked_fill(~(around_BGM & inside_BGM & fits_BGM), _FAR)
    best_BM, object_BM = ranked_BGM.min(dim=1)
    learnt_BM = best_BM < _FAR
    chosen_BM4 = boxes_BG4.gather(1, object_BM[..., None].expand(-1, -1, 4))
    points_M2 = cells.table_5M[:2].T
    sides_BM4 = torch.cat([points_M2 - chosen_BM4[..., :2], chosen_BM4[..., 2:] - points_M2], dim=2)
    return (
        torch.where(heatmap_BM < _FAINTEST, 0.0, heatmap_BM),
        torch.where(learnt_BM[..., None], sides_BM4 / stride_M[:, None], 0.0),
        learnt_BM,
    )


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
    device = output.heatmaps[0].device
    cells = Cells.of_levels(output.shapes(), output.strides, config.size_ranges, device)
    targets = centernet_targets(truth.boxes_BG4, truth.valid_BG, cells, config)
    logits_BM, distances_BM4 = output.cells()
    return losses_from_targets(logits_BM, distances_BM4, targets, config)


def zero_centernet_losses(zero: Tensor) -> dict[str, Tensor]:
    """Return three zeros for an image-label batch, whose objects are not known.

    They take part in the agreement on counts, so that processes with a box batch do not wait for ever.

    Args:
        zero: A scalar 0, connected to what is to get a gradient of 0 (`zero_with_gradient`).
    """
    nothing = average_over_processes(zero.new_zeros(2)).sum() * 0
    return {LOCATION: zero + nothing, POSITIVE: nothing, NEGATIVE: nothing}


class _ZeroWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensor:
        """Return a zero."""
        ctx.shapes = [value.shape for value in values]
        return values[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Give each value zeros, all cut out of one tensor."""
        counts = [shape.numel() for shape in ctx.shapes]
        parts = gradients[0].new_zeros(sum(counts)).split(counts)
        return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def zero_with_gradient(values: Iterable[Tensor]) -> Tensor:
    """Return a scalar 0 in whose graph the values get a gradient of exactly 0, as of a sum of them times 0.

    Args:
        values: Of one type and on one device; at least one. Those that need no gradient get none.
    """
    given = list(values)
    needed = [value for value in given if value.requires_grad]
    if not needed:
        return given[0].new_zeros(())
    zero: Tensor = _ZeroWithGradient.apply(*needed)
    return zero


def losses_from_targets(
    logits_BM: Tensor,
    distances_BM4: Tensor,
    targets: CenterNetTargets,
    config: CenterNetLossConfig,
) -> dict[str, Tensor]:
    """Return the three losses.

    Args:
        logits_BM: Heatmap logits.
        distances_BM4: Predicted distances in strides.
        targets: What they should be.
        config: Weights.
    """
    probability_BM = logits_BM.sigmoid().clamp(
        config.probability_clamp, 1 - config.probability_clamp
    )
    positive_BP, learnt_BM = targets.positive_BGL.flatten(1), targets.learnt_BM
    counts = average_over_processes(torch.stack([positive_BP.sum(), learnt_BM.sum()]))
    p_BP = probability_BM.gather(1, targets.centres_BGL.flatten(1))
    loss_BP = -config.focal_alpha * p_BP.log() * (1 - p_BP) ** config.focal_gamma
    positive = (loss_BP * positive_BP).sum()
    loss_BM = -(1 - config.focal_alpha) * (1 - probability_BM).log()
    loss_BM = loss_BM * probability_BM**config.focal_gamma
    loss_BM = loss_BM * (1 - targets.heatmap_BM) ** config.negative_beta
    negative = torch.where(probability_BM < config.ignored_above, loss_BM, 0.0).sum()
    location = (giou_of_distances(distances_BM4, targets.distances_BM4) * learnt_BM).sum()
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
