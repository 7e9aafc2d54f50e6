"""RoIAlign on a CPU as a product with a sparse matrix.

RoIAlign (He et al. 2017, section 3) is linear in the features: a cell of a pooled region is a weighted sum of a few
feature cells, with the same weights in every channel. So all regions together are one sparse matrix, with a row for
each pooled cell and a column for each feature cell, times the features with their channels innermost; the gradient is
the transposed matrix times the gradient. torchvision's CPU kernel walks the cells channel by channel, and its backward
pass runs on one thread; ``benchmarks/region_align.py`` measures both.

Values equal torchvision's up to the rounding of sums, in forward and backward, and repeat bit for bit.

Dimensions: B images, C channels, H and W of a feature map, N regions, S side of a pooled region, G samples of a pooled
cell along an axis, T terms of a pooled cell along an axis, E entries of the matrix.
"""

from __future__ import annotations

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


def align_regions(
    features_BCHW: Tensor, rois_N5: Tensor, *, side: int, scale: float, sampling_ratio: int
) -> Tensor:
    """Pool regions as torchvision's ``roi_align(..., aligned=True)`` does.

    Args:
        features_BCHW: float32 or float64 features, on the CPU.
        rois_N5: Image index, then x1, y1, x2, y2 in pixels of the image.
        side: S.
        scale: Feature cells a pixel, 1 / stride.
        sampling_ratio: G; 0 takes, for each region and axis, as many as a pooled cell covers feature cells.

    Returns:
        (N, C, S, S); differentiable in the features.
    """
    pooled: Tensor = _AlignRegions.apply(features_BCHW, rois_N5, side, scale, sampling_ratio)
    return pooled


class _AlignRegions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, rois_N5: Tensor, side: int, scale: float, sampling_ratio: int
    ) -> Tensor:
        batch, channels, height, width = features.shape
        matrix, order_N = _matrix(
            rois_N5.to(features.dtype), (height, width), side, scale, sampling_ratio
        )
        cells = features.permute(0, 2, 3, 1).reshape(-1, channels)
        pooled = matrix.times(cells).view(len(rois_N5), side, side, channels)
        ctx.matrix, ctx.order_N, ctx.shape = matrix, order_N, (batch, channels, height, width)
        output = torch.empty_like(pooled)
        output[order_N] = pooled
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCSS: Tensor) -> tuple[Tensor, None, None, None, None]:
        batch, channels, height, width = ctx.shape
        rows = grad_NCSS.permute(0, 2, 3, 1)[ctx.order_N].reshape(-1, channels)
        grad_cells = ctx.matrix.transposed(batch * height * width).times(rows)
        grad = grad_cells.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return grad, None, None, None, None


def _matrix(
    rois_N5: Tensor, size: tuple[int, int], side: int, scale: float, sampling_ratio: int
) -> tuple[_SparseRows, Tensor]:
    """Build the matrix; its rows follow the regions in the returned order.

    Regions with the same number of samples are built together, so that none carries the terms of a larger one.
    """
    starts_N2 = rois_N5[:, [2, 1]] * scale - 0.5  # y, x
    steps_N2 = (rois_N5[:, [4, 3]] * scale - 0.5 - starts_N2) / side
    samples_N2 = steps_N2.ceil().long().clamp(min=0)
    if sampling_ratio > 0:
        samples_N2 = torch.full_like(samples_N2, sampling_ratio)
    largest_N = samples_N2.amax(dim=1)
    columns, weights, lengths, orders = [], [], [], []
    for samples in largest_N.unique().tolist():
        chosen = (largest_N == samples).nonzero()[:, 0]
        (rows, row_weights), (cols, col_weights) = (
            _axis_terms(
                starts_N2[chosen, axis],
                steps_N2[chosen, axis],
                samples_N2[chosen, axis],
                _Axis(cells=size[axis], side=side, most=samples, merge=sampling_ratio == 0),
            )
            for axis in (0, 1)
        )
        image = rois_N5[chosen, 0].long()[:, None, None, None, None]
        # Axes: region, pooled row, pooled column, term along y, term along x.
        cells = (image * size[0] + rows[:, :, None, :, None]) * size[1] + cols[:, None, :, None, :]
        columns.append(cells.flatten())
        weights.append(
            (row_weights[:, :, None, :, None] * col_weights[:, None, :, None, :]).flatten()
        )
        lengths.append(
            rois_N5.new_full((len(chosen) * side * side,), cells.shape[3] * cells.shape[4]).long()
        )
        orders.append(chosen)
    if not orders:
        nothing = rois_N5.new_zeros(0, dtype=torch.long)
        return _SparseRows(
            columns_E=nothing, weights_E=rois_N5.new_zeros(0), starts_R=nothing
        ), nothing
    lengths_R = torch.cat(lengths)
    matrix = _SparseRows(
        columns_E=torch.cat(columns),
        weights_E=torch.cat(weights),
        starts_R=lengths_R.cumsum(0) - lengths_R,
    )
    return matrix, torch.cat(orders)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of a group of regions.

    Attributes:
        cells: Feature cells along it.
        side: S.
        most: G, the most samples that a region of the group takes.
        merge: Whether neighbouring samples are at most one cell apart, so that they share feature cells.
    """

    cells: int
    side: int
    most: int
    merge: bool


def _axis_terms(
    start_N: Tensor, step_N: Tensor, samples_N: Tensor, axis: _Axis
) -> tuple[Tensor, Tensor]:
    """Return which cells along an axis a pooled cell is made of, and with which weights: both (N, S, T).

    A sample lies between two cells and takes from each by its distance. Beyond a cell outside the map it counts
    nothing; nearer it is moved to the border.
    """
    p_S1 = torch.arange(axis.side, dtype=start_N.dtype)[:, None]
    i_G = torch.arange(max(axis.most, 1), dtype=start_N.dtype)
    count_N = samples_N.clamp(min=1).to(start_N.dtype)
    start, step, count = (value[:, None, None] for value in (start_N, step_N, count_N))
    position = start + p_S1 * step + (i_G + 0.5) * step / count
    inside = (position >= -1.0) & (position <= axis.cells) & (i_G < samples_N[:, None, None])
    position = position.clamp(0.0, axis.cells - 1.0)
    low = position.long()
    fraction = position - low
    share = inside.to(start_N.dtype) / count
    cells = torch.stack([low, (low + 1).clamp(max=axis.cells - 1)], dim=-1)
    weights = torch.stack([share * (1.0 - fraction), share * fraction], dim=-1)
    if not axis.merge:
        return cells.flatten(2), weights.flatten(2)
    # Samples at most a cell apart touch at most G + 1 neighbouring cells: add up what falls on the same one.
    first = low[:, :, :1]
    terms = torch.arange(len(i_G) + 1)
    slot = (cells - first[..., None]).clamp(max=len(i_G)).flatten(2)
    merged = weights.new_zeros(*slot.shape[:2], len(terms))
    merged.scatter_add_(2, slot, weights.flatten(2))
    return (first + terms).clamp(max=axis.cells - 1), merged
