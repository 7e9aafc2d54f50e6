"""RoIAlign on a CPU as a product with a sparse matrix.

RoIAlign (He et al. 2017, section 3) is linear in the features: a cell of a pooled region is a weighted sum of a few
feature cells, with the same weights in every channel. So all regions together are one sparse matrix, with a row for
each pooled cell and a column for each feature cell, times the features with their channels innermost; the gradient is
the transposed matrix times the gradient. torchvision's CPU kernel walks the cells channel by channel, and its backward
pass runs on one thread; ``benchmarks/region_align.py`` measures both.

Values equal torchvision's up to the rounding of sums, in forward and backward, and repeat bit for bit.

The maps of all levels lie one after the other in the product, so the regions of every level come out in one piece, in
the order in which they were given.

Dimensions: B images, C channels, H and W of a feature map, L levels, N regions, S side of a pooled region, G samples of a
pooled cell along an axis, T terms of a pooled cell along an axis, E entries of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


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
        matrix = _matrix(rois_N5.to(features[0].dtype), level_N, _layout(batch, sizes), grid)
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


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the cells of the levels lie.

    Attributes:
        sizes_L2: int64, H and W of each level.
        first_L: int64, number of each level's first cell.
    """

    sizes_L2: Tensor
    first_L: Tensor


def _layout(batch: int, sizes: list[tuple[int, int]]) -> _Layout:
    sizes_L2 = torch.tensor(sizes)
    counts_L = batch * sizes_L2.prod(dim=1)
    return _Layout(sizes_L2=sizes_L2, first_L=counts_L.cumsum(0) - counts_L)


def _matrix(rois_N5: Tensor, level_N: Tensor, layout: _Layout, grid: RegionGrid) -> _SparseRows:
    """Build the matrix; its rows follow the regions.

    Regions with the same number of samples are built together, so that none carries the terms of a larger one.
    """
    scale_N1 = rois_N5.new_tensor(grid.scales)[level_N, None]
    starts_N2 = rois_N5[:, [2, 1]] * scale_N1 - 0.5  # y, x
    steps_N2 = (rois_N5[:, [4, 3]] * scale_N1 - 0.5 - starts_N2) / grid.side
    samples_N2 = steps_N2.ceil().long().clamp(min=0)
    if grid.sampling_ratio > 0:
        samples_N2 = torch.full_like(samples_N2, grid.sampling_ratio)
    sizes_N2 = layout.sizes_L2[level_N]
    first_N = layout.first_L[level_N] + rois_N5[:, 0].long() * sizes_N2.prod(dim=1)
    largest_N = samples_N2.amax(dim=1)
    groups = []
    for samples in largest_N.unique().tolist():
        chosen = (largest_N == samples).nonzero()[:, 0]
        along = [
            _axis_terms(
                _Axis(
                    start_N=starts_N2[chosen, axis],
                    step_N=steps_N2[chosen, axis],
                    samples_N=samples_N2[chosen, axis],
                    cells_N=sizes_N2[chosen, axis],
                    side=grid.side,
                    most=samples,
                    merge=grid.sampling_ratio == 0,
                )
            )
            for axis in (0, 1)
        ]
        groups.append(_group(chosen, first_N[chosen], sizes_N2[chosen, 1], along))
    return _in_order(groups, len(rois_N5), grid.side**2)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Entries of some regions that have equally many, J each.

    Attributes:
        regions_N: Which regions.
        columns_NJ: Feature cell of each entry, pooled cell after pooled cell.
        weights_NJ: Its value.
    """

    regions_N: Tensor
    columns_NJ: Tensor
    weights_NJ: Tensor


def _group(
    regions_N: Tensor, first_N: Tensor, width_N: Tensor, along: list[tuple[Tensor, Tensor]]
) -> _Group:
    """Combine the terms along y and along x; ``first_N`` is the first cell of each region's map."""
    (rows, row_weights), (columns, column_weights) = along
    # Axes: region, pooled row, pooled column, term along y, term along x.
    begins = first_N[:, None, None] + rows * width_N[:, None, None]
    cells = begins[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return _Group(regions_N=regions_N, columns_NJ=cells.flatten(1), weights_NJ=weights.flatten(1))


def _in_order(groups: list[_Group], regions: int, cells: int) -> _SparseRows:
    """Put the groups' entries into the order of the regions, each of which has so many pooled cells."""
    length_N = torch.zeros(regions, dtype=torch.long)
    for group in groups:
        length_N[group.regions_N] = group.columns_NJ.shape[1]
    first_N = length_N.cumsum(0) - length_N
    columns_E = torch.empty(int(length_N.sum()), dtype=torch.long)
    weights_E = columns_E.new_empty(
        len(columns_E), dtype=groups[0].weights_NJ.dtype if groups else torch.get_default_dtype()
    )
    for group in groups:
        places_NJ = first_N[group.regions_N, None] + torch.arange(group.columns_NJ.shape[1])
        columns_E[places_NJ] = group.columns_NJ
        weights_E[places_NJ] = group.weights_NJ
    lengths_R = (length_N // cells).repeat_interleave(cells)
    return _SparseRows(
        columns_E=columns_E, weights_E=weights_E, starts_R=lengths_R.cumsum(0) - lengths_R
    )


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of a group of regions.

    Attributes:
        start_N: Where each region starts, in feature cells.
        step_N: Length of its pooled cells, likewise.
        samples_N: int64, its samples of a pooled cell.
        cells_N: int64, feature cells along the axis of its map.
        side: S.
        most: G, the most samples that a region of the group takes.
        merge: Whether neighbouring samples are at most one cell apart, so that they share feature cells.
    """

    start_N: Tensor
    step_N: Tensor
    samples_N: Tensor
    cells_N: Tensor
    side: int
    most: int
    merge: bool


def _axis_terms(axis: _Axis) -> tuple[Tensor, Tensor]:
    """Return which cells along an axis a pooled cell is made of, and with which weights: both (N, S, T).

    A sample lies between two cells and takes from each by its distance. Beyond a cell outside the map it counts
    nothing; nearer it is moved to the border.
    """
    dtype = axis.start_N.dtype
    p_S1 = torch.arange(axis.side, dtype=dtype)[:, None]
    i_G = torch.arange(max(axis.most, 1), dtype=dtype)
    start, step, samples, cells = (
        value_N[:, None, None]
        for value_N in (axis.start_N, axis.step_N, axis.samples_N, axis.cells_N)
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
    if not axis.merge:
        return both.flatten(2), weights.flatten(2)
    # Samples at most a cell apart touch at most G + 1 neighbouring cells: add up what falls on the same one.
    first = low[:, :, :1]
    terms = torch.arange(len(i_G) + 1)
    slot = (both - first[..., None]).clamp(max=len(i_G)).flatten(2)
    merged = weights.new_zeros(*slot.shape[:2], len(terms))
    merged.scatter_add_(2, slot, weights.flatten(2))
    return torch.minimum(first + terms, cells - 1), merged
