"""RoIAlign over the pyramid levels: detectron2's layer, and on a CPU a product with a sparse matrix.

RoIAlign (He et al. 2017, section 3) is linear in the features: a cell of a pooled region is a weighted sum of a few
feature cells, with the same weights in every channel. So all regions together are one sparse matrix, with a row for
each pooled cell and a column for each feature cell, times the features with their channels innermost; the gradient is
the transposed matrix times the gradient. torchvision's CPU kernel walks the cells channel by channel, and its backward
pass runs on one thread; ``benchmarks/region_align.py`` measures both. Values equal torchvision's up to the rounding of
sums, in forward and backward, and repeat bit for bit.

Dimensions: B images, N regions, C channels, H and W feature cells of a level, S side of a pooled region, R = N * S * S
pooled cells, E entries of the matrix, G samples of a pooled cell along an axis, T terms along an axis, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from proxydet.modeling.boxes import areas
from proxydet.modeling.config import CascadeConfig
from proxydet.runtime.modes import current_mode


@dataclass(frozen=True, kw_only=True)
class _SparseRows:
    """The matrix by rows.

    Attributes:
        columns_E: Feature cell of each entry, rows one after the other.
        weights_E: Its value.
        starts_R: First entry of each row, that is of each pooled cell.
    """

    columns_E: Tensor
    weights_E: Tensor
    starts_R: Tensor

    def times(self, values: Tensor) -> Tensor:
        """Multiply with a dense matrix."""
        product: Tensor = embedding_bag(
            self.columns_E,
            values,
            self.starts_R,
            mode="sum",
            per_sample_weights=self.weights_E,
        )
        return product

    def transposed(self, columns: int) -> _SparseRows:
        """Return the transposed matrix; ``columns`` is the number of columns of this one."""
        order_E = self.columns_E.argsort(stable=True)
        lengths_R = torch.diff(self.starts_R, append=self.starts_R.new_tensor([len(order_E)]))
        rows_E = torch.repeat_interleave(lengths_R)
        counts = torch.bincount(self.columns_E, minlength=columns)
        return _SparseRows(
            columns_E=rows_E[order_E],
            weights_E=self.weights_E[order_E],
            starts_R=counts.cumsum(0) - counts,
        )


@dataclass(frozen=True, kw_only=True)
class RegionGrid:
    """How regions are divided.

    Attributes:
        side: S.
        scales: Feature cells a pixel, 1 / stride, of each level.
        sampling_ratio: G; 0 takes, for each region and axis, as many as a pooled cell covers feature cells.
    """

    side: int
    scales: Sequence[float]
    sampling_ratio: int


def align_regions(
    features: Sequence[Tensor], rois_N5: Tensor, level_N: Tensor, grid: RegionGrid
) -> Tensor:
    """Pool regions as torchvision's ``roi_align(..., aligned=True)`` does.

    Args:
        features: Maps (B, C, H, W) of each level, float32 or float64, on the CPU.
        rois_N5: Image index, then x1, y1, x2, y2 in pixels of the image.
        level_N: int64, place among ``features`` of the map that each region is pooled from.
        grid: How regions are divided.

    Returns:
        (N, C, S, S), channels innermost in memory; differentiable in the features.
    """
    pooled: Tensor = _AlignRegions.apply(rois_N5, level_N, grid, *features)
    return pooled


class _AlignRegions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rois_N5: Tensor, level_N: Tensor, grid: RegionGrid, *features: Tensor
    ) -> Tensor:
        batch, channels = features[0].shape[:2]
        sizes = [(maps.shape[2], maps.shape[3]) for maps in features]
        matrix = _matrix(rois_N5.to(features[0].dtype), level_N, batch, sizes, grid)
        cells = torch.cat([maps.permute(0, 2, 3, 1).reshape(-1, channels) for maps in features])
        # A lone image's cells may be a view of its map, and the product walks a view twenty times slower.
        pooled = matrix.times(cells.contiguous())
        ctx.matrix, ctx.batch, ctx.sizes = matrix, batch, sizes
        return pooled.view(len(rois_N5), grid.side, grid.side, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCSS: Tensor) -> tuple[Tensor | None, ...]:
        counts = [ctx.batch * height * width for height, width in ctx.sizes]
        rows = grad_NCSS.permute(0, 2, 3, 1).reshape(-1, grad_NCSS.shape[1]).contiguous()
        cells = ctx.matrix.transposed(sum(counts)).times(rows)
        gradients = [
            part.view(ctx.batch, height, width, -1).permute(0, 3, 1, 2)
            for part, (height, width) in zip(cells.split(counts), ctx.sizes, strict=True)
        ]
        return None, None, None, *gradients


def _matrix(
    rois_N5: Tensor,
    level_N: Tensor,
    batch: int,
    sizes: list[tuple[int, int]],
    grid: RegionGrid,
) -> _SparseRows:
    """Build the matrix; its rows follow the regions.

    Regions with the same number of samples are built together, so that none carries the terms of a larger one.
    """
    scale_N1 = rois_N5.new_tensor(grid.scales)[level_N, None]
    starts_N2 = rois_N5[:, [2, 1]] * scale_N1 - 0.5  # y, x
    steps_N2 = (rois_N5[:, [4, 3]] * scale_N1 - 0.5 - starts_N2) / grid.side
    samples_N2 = steps_N2.ceil().long().clamp(min=0)
    if grid.sampling_ratio > 0:
        samples_N2 = torch.full_like(samples_N2, grid.sampling_ratio)
    sizes_L2 = torch.tensor(sizes)
    counts_L = batch * sizes_L2.prod(dim=1)
    sizes_N2 = sizes_L2[level_N]
    first_N = (counts_L.cumsum(0) - counts_L)[level_N] + rois_N5[:, 0].long() * sizes_N2.prod(dim=1)
    largest_N = samples_N2.amax(dim=1)
    groups = []
    for samples in largest_N.unique().tolist():
        chosen = (largest_N == samples).nonzero()[:, 0]
        along = [
            _axis_terms(
                starts_N2[chosen, axis],
                steps_N2[chosen, axis],
                samples_N2[chosen, axis],
                sizes_N2[chosen, axis],
                grid,
                most=samples,
            )
            for axis in (0, 1)
        ]
        # Combine the terms of both axes: region, pooled row, pooled column, term along y, term along x.
        (rows, row_weights), (columns, column_weights) = along
        begins = first_N[chosen, None, None] + rows * sizes_N2[chosen, 1, None, None]
        cells = begins[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        groups.append((chosen, cells.flatten(1), weights.flatten(1)))
    # Put the groups' entries into the order of the regions.
    length_N = torch.zeros(len(rois_N5), dtype=torch.long)
    for chosen, cells, _ in groups:
        length_N[chosen] = cells.shape[1]
    begin_N = length_N.cumsum(0) - length_N
    columns_E = torch.empty(int(length_N.sum()), dtype=torch.long)
    weights_E = rois_N5.new_empty(len(columns_E))
    for chosen, cells, weights in groups:
        places = begin_N[chosen, None] + torch.arange(cells.shape[1])
        columns_E[places] = cells
        weights_E[places] = weights
    lengths_R = (length_N // grid.side**2).repeat_interleave(grid.side**2)
    return _SparseRows(
        columns_E=columns_E, weights_E=weights_E, starts_R=lengths_R.cumsum(0) - lengths_R
    )


def _axis_terms(
    start_N: Tensor,
    step_N: Tensor,
    samples_N: Tensor,
    cells_N: Tensor,
    grid: RegionGrid,
    *,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Return which cells along an axis a pooled cell is made of, and with which weights: both (N, S, T).

    A sample lies between two cells and takes from each by its distance. Beyond a cell outside the map it counts
    nothing; nearer it is moved to the border.

    Args:
        start_N: Where each region starts, in feature cells.
        step_N: Length of its pooled cells, in feature cells.
        samples_N: int64, its samples of a pooled cell.
        cells_N: int64, feature cells along the axis of its map.
        grid: How regions are divided.
        most: G, the most samples that one of the regions takes.
    """
    dtype = start_N.dtype
    p_S1 = torch.arange(grid.side, dtype=dtype)[:, None]
    i_G = torch.arange(max(most, 1), dtype=dtype)
    start, step, samples, cells = (
        value_N[:, None, None] for value_N in (start_N, step_N, samples_N, cells_N)
    )
    count = samples.clamp(min=1).to(dtype)
    position = start + p_S1 * step + (i_G + 0.5) * step / count
    inside = (position >= -1.0) & (position <= cells) & (i_G < samples)
    position = torch.minimum(position.clamp(min=0.0), (cells - 1).to(dtype))
    low = position.long()
    fraction = position - low
    share = inside.to(dtype) / count
    both = torch.stack([low, torch.minimum(low + 1, cells - 1)], dim=-1)
    weights = torch.stack([share * (1.0 - fraction), share * fraction], dim=-1)
    if grid.sampling_ratio > 0:  # neighbouring samples may be more than a cell apart
        return both.flatten(2), weights.flatten(2)
    # Samples at most a cell apart touch at most G + 1 neighbouring cells: add up what falls on the same one.
    first = low[:, :, :1]
    terms = torch.arange(len(i_G) + 1)
    slot = (both - first[..., None]).clamp(max=len(i_G)).flatten(2)
    merged = weights.new_zeros(*slot.shape[:2], len(terms))
    merged.scatter_add_(2, slot, weights.flatten(2))
    return torch.minimum(first + terms, cells - 1), merged


class RegionPooler(nn.Module):
    """Aligned RoIAlign over several levels (Lin et al. 2017, equation 1, chooses the level).

    Args:
        config: Levels and the size that belongs to one of them.
        side: S.
    """

    def __init__(self, config: CascadeConfig, side: int) -> None:
        super().__init__()
        self.levels = config.pool_levels
        self.side = side
        self.config = config
        # detectron2's own layer, so that a repair of its roi_align reaches this one. On a CPU there is nothing to
        # repair (no atomics), and a faster way; the published rounding is kept where it is asked for.
        self.level_poolers = nn.ModuleList(
            ROIAlign((side, side), 1.0 / 2**level, config.sampling_ratio, aligned=True)
            for level in self.levels
        )
        self._grid = RegionGrid(
            side=side,
            scales=[1.0 / 2**level for level in self.levels],
            sampling_ratio=config.sampling_ratio,
        )

    def forward(self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor) -> Tensor:
        """Pool every box.

        Args:
            features: Maps (B, C, H, W) of ``levels``, finest first.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.

        Returns:
            (N, C, S, S). Waits for the device once, whatever N is.
        """
        (pooled,) = self.parts(features, boxes_N4, image_N, max(len(boxes_N4), 1))
        return pooled

    def parts(
        self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor, size: int
    ) -> Iterator[Tensor]:
        """Pool every box, at most ``size`` boxes at once, so that the caller can bound its memory.

        Args:
            features: Maps (B, C, H, W) of ``levels``, finest first.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.
            size: Boxes of a part.

        Yields:
            (n, C, S, S) of one part after the other; at least one, which may be empty. Waits for the device once.
        """
        # Boxes that are not finite have no level; whoever made them checks for them once a batch.
        boxes_N4 = boxes_N4.nan_to_num(nan=0.0)
        rois_N5 = torch.cat([image_N[:, None].to(boxes_N4.dtype), boxes_N4], dim=1)
        parts = rois_N5.split(size)
        if boxes_N4.device.type == "cpu" and current_mode() != "published":
            for rois, own in zip(parts, self._position(boxes_N4).split(size), strict=True):
                yield align_regions(features, rois, own, self._grid)
            return
        if len(self.levels) == 1:
            yield from (self.level_poolers[0](features[0], rois) for rois in parts)
            return
        position_N = self._position(boxes_N4)
        positions_L = torch.arange(len(self.levels), device=boxes_N4.device)
        counts = torch.stack(
            [(own[:, None] == positions_L).sum(dim=0) for own in position_N.split(size)]
        ).tolist()
        for rois, own, per_level in zip(parts, position_N.split(size), counts, strict=True):
            yield self._pool_part(features, rois, own.argsort(stable=True).split(per_level))

    def _pool_part(
        self, features: list[Tensor], rois_N5: Tensor, rows_of_level: Sequence[Tensor]
    ) -> Tensor:
        output = features[0].new_zeros(len(rois_N5), features[0].shape[1], self.side, self.side)
        for pooler, maps, rows in zip(self.level_poolers, features, rows_of_level, strict=True):
            output.index_put_((rows,), pooler(maps, rois_N5[rows]))
        return output

    def _position(self, boxes_N4: Tensor) -> Tensor:
        """Return the place among the levels of the one that each box is pooled from: int64 (N,)."""
        return self.level(boxes_N4) - self.levels[0]

    def level(self, boxes_N4: Tensor) -> Tensor:
        """Return the level that each box is pooled from: int64 (N,)."""
        size, level = self.config.canonical_size, self.config.canonical_level
        # The small number keeps empty boxes at a finite level and equals the published rounding.
        octaves_N = torch.log2(areas(boxes_N4).clamp(min=0).sqrt() / size + 1e-8)
        return torch.floor(level + octaves_N).clamp(self.levels[0], self.levels[-1]).long()
