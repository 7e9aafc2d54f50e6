"""RoIAlign in all forms that replace torchvision's: of the reproducibility modes, and for the CPU.

RoIAlign (He et al. 2017, section 3) is linear in the features: a cell of a pooled region is a weighted sum of a few
feature cells, with the same weights in every channel.

*Repeatable*: torchvision's CUDA kernel adds the gradient of every sample to its four feature cells with atomic additions,
whose order changes from run to run. RoIAlign is separable too: a bin's value is the mean over a
grid of bilinear samples, so it is ``sum_hw along_y[p, h] along_x[q, w] features[h, w]``. Its gradient is then two
matrix products a box, summed over the boxes of an image by one more, and matrix products add in a fixed order
(on CUDA: with ``CUBLAS_WORKSPACE_CONFIG=:4096:8``). :mod:`proxydet.runtime.modes` puts it, or the published operator, in
detectron2's place.

*On a CPU*: all regions together are one sparse matrix, with a row for
each pooled cell and a column for each feature cell, times the features with their channels innermost; the gradient is
the transposed matrix times the gradient. torchvision's CPU kernel walks the cells channel by channel, and its backward
pass runs on one thread; ``benchmarks/region_align.py`` measures both. Values equal torchvision's up to the rounding of
sums, in forward and backward, and repeat bit for bit.

Letters in names: N images, C channels, H x W feature cells, K boxes, P x Q bins of a pooled box. In the sparse product: B
images, N regions, S side of a pooled region, R = N * S * S pooled cells, E entries of the matrix, G samples of a pooled cell
along an axis, T terms along an axis, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchvision  # noqa: F401  # its import registers torch.ops.torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

CHUNK_BYTES = 128 * 2**20
"""Most memory of one piece of the separable backward pass."""


@dataclass(frozen=True, kw_only=True)
class RoiGeometry:
    """How boxes are cut out of a feature map."""

    output_size: tuple[int, int]
    """Bins a box: rows, columns."""

    spatial_scale: float
    """Feature cells a pixel: 1 / stride."""

    sampling_ratio: int
    """Samples a bin along each axis; 0 takes as many as the bin covers cells."""

    aligned: bool
    """Whether pixel centers lie at half-integer coordinates (detectron2's ``ROIAlignV2``)."""


Backward = Callable[[Tensor, Tensor, "tuple[int, int, int, int]", RoiGeometry], Tensor]
"""(grad_KCPQ, boxes_K5, shape of the features, geometry) -> grad_NCHW."""


def published_roi_align(features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry) -> Tensor:
    """RoIAlign of features and boxes rounded to half precision, computed in double.

    The published change (detectron2 issue 4723). It calls torchvision's kernel, as the published training did with
    torchvision 0.12; today's ``torchvision.ops.roi_align`` would take another implementation under
    ``torch.use_deterministic_algorithms`` on a GPU.

    Args:
        features_NCHW: Any float dtype; values beyond 65,504 become infinite.
        boxes_K5: Image index, then x1, y1, x2, y2 in pixels; coordinates above 1,024 lose their fraction.
        geometry: Bins, scale and sampling.

    Returns:
        Pooled features (K, C, P, Q) in the dtype of the features. Gradients pass through half precision: they vanish
        below 3e-8 and are infinite beyond 65,504.
    """
    rounded = features_NCHW.half().double()
    pooled_KCPQ = roi_align(rounded, boxes_K5.half().double(), geometry, kernel_backward)
    return pooled_KCPQ.to(dtype=features_NCHW.dtype)


def strict_roi_align(features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry) -> Tensor:
    """RoIAlign with the values of torchvision's kernel and a backward pass that is repeatable bit for bit.

    Args:
        features_NCHW: Any float dtype.
        boxes_K5: Image index, then x1, y1, x2, y2 in pixels.
        geometry: Bins, scale and sampling.

    Returns:
        Pooled features (K, C, P, Q) in the dtype of the features.
    """
    # On a CPU torchvision's backward kernel is one serial loop: its order is fixed as it is.
    backward = kernel_backward if features_NCHW.device.type == "cpu" else separable_backward
    return roi_align(features_NCHW, boxes_K5.to(dtype=features_NCHW.dtype), geometry, backward)


def roi_align(
    features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry, backward: Backward
) -> Tensor:
    """RoIAlign by torchvision's kernel, with a backward pass of choice.

    Args:
        features_NCHW: Float32 or float64 on the CPU, also half on a GPU.
        boxes_K5: Image index, then x1, y1, x2, y2 in pixels; of the same dtype.
        geometry: Bins, scale and sampling.
        backward: `kernel_backward` or `separable_backward`.

    Returns:
        Pooled features (K, C, P, Q).
    """
    pooled_KCPQ: Tensor = _RoiAlign.apply(features_NCHW, boxes_K5, geometry, backward)
    return pooled_KCPQ


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry, backward: Backward
    ) -> Tensor:
        ctx.save_for_backward(boxes_K5)
        ctx.shape, ctx.geometry, ctx.pass_back = tuple(features_NCHW.shape), geometry, backward
        rows, columns = geometry.output_size
        pooled: Tensor = torch.ops.torchvision.roi_align(
            features_NCHW,
            boxes_K5,
            geometry.spatial_scale,
            rows,
            columns,
            geometry.sampling_ratio,
            geometry.aligned,
        )
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KCPQ: Tensor) -> tuple[Tensor, None, None, None]:
        (boxes_K5,) = ctx.saved_tensors
        return ctx.pass_back(grad_KCPQ, boxes_K5, ctx.shape, ctx.geometry), None, None, None


def kernel_backward(
    grad_KCPQ: Tensor, boxes_K5: Tensor, shape: tuple[int, int, int, int], geometry: RoiGeometry
) -> Tensor:
    """Gradient of RoIAlign by torchvision's kernel: serial on a CPU, atomic additions on a GPU.

    Args:
        grad_KCPQ: Gradient of the pooled features.
        boxes_K5: The boxes of the forward pass, in the same dtype.
        shape: (N, C, H, W) of the features.
        geometry: Bins, scale and sampling.

    Returns:
        Gradient of the features (N, C, H, W).
    """
    rows, columns = geometry.output_size
    # torchvision 0.16 and later refuse this kernel under deterministic algorithms; 0.12, the published one, did not.
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        grad_NCHW: Tensor = torch.ops.torchvision._roi_align_backward(
            grad_KCPQ,
            boxes_K5,
            geometry.spatial_scale,
            rows,
            columns,
            *shape,
            geometry.sampling_ratio,
            geometry.aligned,
        )
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    return grad_NCHW


def separable_backward(
    grad_KCPQ: Tensor, boxes_K5: Tensor, shape: tuple[int, int, int, int], geometry: RoiGeometry
) -> Tensor:
    """Gradient of RoIAlign as matrix products, added in a fixed order.

    Equal to the kernel's gradient up to the rounding of sums. Each image's boxes are multiplied in pieces, one after
    the other: besides its result, the interpolation matrices and two copies of a piece's gradient it takes at most
    128 MiB.

    Args:
        grad_KCPQ: Gradient of the pooled features; half and bfloat16 are added up in float32.
        boxes_K5: The boxes of the forward pass; one that is not finite gets no gradient.
        shape: (N, C, H, W) of the features.
        geometry: Bins, scale and sampling.

    Returns:
        Gradient of the features (N, C, H, W) in the dtype of ``grad_KCPQ``.
    """
    images, channels, height, width = shape
    dtype = torch.float64 if grad_KCPQ.dtype == torch.float64 else torch.float32
    grad_NCHW = torch.zeros(shape, dtype=dtype, device=grad_KCPQ.device)
    boxes_K4 = boxes_K5[:, 1:].to(dtype)
    along_y_KPH, along_x_KQW = interpolation_matrices(boxes_K4, (height, width), geometry)
    piece = max(1, CHUNK_BYTES // (geometry.output_size[0] * channels * width * dtype.itemsize))
    owner_K = boxes_K5[:, 0].long()
    counts = torch.bincount(owner_K, minlength=images).tolist()  # waits for the device once
    by_image = torch.split(owner_K.argsort(stable=True), counts)
    for image, members in enumerate(by_image):
        for some in torch.split(members, piece) if counts[image] else ():
            grad_kPCQ = grad_KCPQ[some].to(dtype).transpose(1, 2)
            boxes, rows, _, columns = grad_kPCQ.shape
            widened = torch.bmm(
                grad_kPCQ.reshape(boxes, rows * channels, columns), along_x_KQW[some]
            )
            by_row = along_y_KPH[some].reshape(boxes * rows, height).T @ widened.reshape(
                boxes * rows, channels * width
            )
            grad_NCHW[image] += by_row.reshape(height, channels, width).transpose(0, 1)
    return grad_NCHW.to(grad_KCPQ.dtype)


def interpolation_matrices(
    boxes_K4: Tensor, size: tuple[int, int], geometry: RoiGeometry
) -> tuple[Tensor, Tensor]:
    """Weights with which feature cells enter the bins of each box, one matrix an axis.

    Args:
        boxes_K4: x1, y1, x2, y2 in pixels; float32 or float64.
        size: (H, W) of the feature map.
        geometry: Bins, scale and sampling.

    Returns:
        ``along_y`` (K, P, H) and ``along_x`` (K, Q, W).
    """
    corners_K4 = boxes_K4 * geometry.spatial_scale - (0.5 if geometry.aligned else 0.0)
    rows, columns = geometry.output_size
    along_y = _weights_of_axis(corners_K4[:, 1], corners_K4[:, 3], rows, size[0], geometry)
    along_x = _weights_of_axis(corners_K4[:, 0], corners_K4[:, 2], columns, size[1], geometry)
    return along_y, along_x


def _weights_of_axis(
    start_K: Tensor, end_K: Tensor, bins: int, cells: int, geometry: RoiGeometry
) -> Tensor:
    extent_K = end_K - start_K
    if not geometry.aligned:
        extent_K = extent_K.clamp(min=1.0)
    bin_K = extent_K / bins
    if geometry.sampling_ratio > 0:
        samples_K = torch.full_like(bin_K, geometry.sampling_ratio)
    else:
        samples_K = torch.nan_to_num(torch.ceil(bin_K), nan=0.0, posinf=0.0, neginf=0.0)
    bin_KP = start_K[:, None] + torch.arange(bins, device=start_K.device) * bin_K[:, None]
    cell_H = torch.arange(cells, device=start_K.device, dtype=start_K.dtype)
    weights_KPH = start_K.new_zeros((len(start_K), bins, cells))
    most = int(samples_K.max().item()) if len(samples_K) else 0
    for sample in range(most):
        position_KP = bin_KP + ((sample + 0.5) * bin_K / samples_K)[:, None]
        counted_KP = (sample < samples_K)[:, None] & (position_KP >= -1) & (position_KP <= cells)
        distance_KPH = (position_KP.clamp(0, cells - 1)[:, :, None] - cell_H).abs()
        hat_KPH = (1 - distance_KPH).clamp(min=0)
        weights_KPH += torch.where(counted_KP[:, :, None], hat_KPH, 0)
    return weights_KPH / samples_K.clamp(min=1)[:, None, None]


def use_operator(mode: Literal["published", "strict"]) -> None:
    """Put the operator of a reproducibility mode in detectron2's place: the method that all of its poolers call."""
    from detectron2.layers import ROIAlign

    operator = published_roi_align if mode == "published" else strict_roi_align

    def forward(self: Any, input: Tensor, rois: Tensor) -> Tensor:
        size = self.output_size
        geometry = RoiGeometry(
            output_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )
        return operator(input.dequantize() if input.is_quantized else input, rois, geometry)

    forward.operator = operator  # type: ignore[attr-defined]
    ROIAlign.forward = forward


def is_rounded() -> bool:
    """Whether the published operator, which rounds to half precision, is in detectron2's place."""
    from detectron2.layers import ROIAlign

    return getattr(ROIAlign.forward, "operator", None) is published_roi_align


# --- As a sparse product, on a CPU ----------------------------------------------------------------------------------------


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
