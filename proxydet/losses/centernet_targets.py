"""What the proposal network should have said of an image (CenterNet2, arXiv 2103.07461, section 4).

Dimensions: M cells of all levels of one image, level after level, row by row; G objects; L levels.
Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from proxydet.losses.config import CenterNetLossConfig
from proxydet.modeling.geometry import areas, cell_centres

# Heatmap targets below this are 0.
_FAINTEST = 1e-4
_FAR = 1e8


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
    offsets_MG2 = cells.points_M2[:, None] - _cell_points(centres_G2, cells)
    squared_MG = (cells.points_M2[:, None] - centres_G2).square().sum(dim=-1)
    squared_MG = squared_MG.masked_fill((offsets_MG2 == 0).all(dim=-1), 0.0)
    nearness_MG = squared_MG / _squared_radii(boxes_G4, config)
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


def _cell_points(centres_G2: Tensor, cells: Cells) -> Tensor:
    """Return, on each cell's level, the point of the cell that holds each object's centre: (M, G, 2)."""
    strides_M11 = cells.strides_M[:, None, None]
    return (centres_G2 / strides_M11).floor() * strides_M11 + strides_M11 / 2


def _squared_radii(boxes_G4: Tensor, config: CenterNetLossConfig) -> Tensor:
    delta = (1 - config.min_overlap) / (1 + config.min_overlap)
    return (2 * delta**2 * areas(boxes_G4)).clamp(min=config.min_radius**2)


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
