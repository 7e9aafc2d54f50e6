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

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torchvision  # noqa: F401  # its import registers torch.ops.torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from torch.utils.weak import WeakTensorKeyDictionary

Numbers = np.ndarray[Any, np.dtype[Any]]

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


_rounded_maps: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
"""Feature maps that are still there to their version and their values, rounded to half precision, in double."""


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
    # All poolings of a step round the same maps, so that this is done once. Each rounds its own gradient.
    version = 0 if features_NCHW.is_inference() else features_NCHW._version
    known = _rounded_maps.get(features_NCHW)
    if known is None or known[0] != version:
        known = version, features_NCHW.detach().half().double()
        _rounded_maps[features_NCHW] = known
    boxes_K5 = boxes_K5.half().double()
    pooled_KCPQ: Tensor = _RoiAlign.apply(
        features_NCHW, boxes_K5, geometry, kernel_backward, known[1]
    )
    return pooled_KCPQ


def strict_roi_align(features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry) -> Tensor:
    """RoIAlign with the values of torchvision's kernel and a backward pass that is repeatable bit for bit.

    Arguments and result as of `published_roi_align`; features of any float dtype.
    """
    # On a CPU torchvision's backward kernel is one serial loop: its order is fixed as it is.
    backward = kernel_backward if features_NCHW.device.type == "cpu" else separable_backward
    return roi_align(features_NCHW, boxes_K5.to(dtype=features_NCHW.dtype), geometry, backward)


def roi_align(
    features_NCHW: Tensor, boxes_K5: Tensor, geometry: RoiGeometry, backward: Backward
) -> Tensor:
    """RoIAlign by torchvision's kernel, with a backward pass of choice: `kernel_backward` or `separable_backward`.

    Features and boxes have one dtype: float32 or float64 on the CPU, also half on a GPU.
    """
    pooled_KCPQ: Tensor = _RoiAlign.apply(features_NCHW, boxes_K5, geometry, backward, None)
    return pooled_KCPQ


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_NCHW: Tensor,
        boxes_K5: Tensor,
        geometry: RoiGeometry,
        backward: Backward,
        rounded_NCHW: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(boxes_K5)
        ctx.shape, ctx.geometry, ctx.pass_back = tuple(features_NCHW.shape), geometry, backward
        ctx.dtype, ctx.rounds = features_NCHW.dtype, rounded_NCHW is not None
        rows, columns = geometry.output_size
        maps_NCHW = features_NCHW if rounded_NCHW is None else rounded_NCHW
        scale, ratio, aligned = geometry.spatial_scale, geometry.sampling_ratio, geometry.aligned
        pooled: Tensor = torch.ops.torchvision.roi_align(
            maps_NCHW, boxes_K5, scale, rows, columns, ratio, aligned
        )
        return pooled.to(features_NCHW.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KCPQ: Tensor) -> tuple[Tensor | None, ...]:
        (boxes_K5,) = ctx.saved_tensors
        grad_KCPQ = grad_KCPQ.to(boxes_K5.dtype)
        grad_NCHW = ctx.pass_back(grad_KCPQ, boxes_K5, ctx.shape, ctx.geometry)
        grad_NCHW = grad_NCHW.half() if ctx.rounds else grad_NCHW
        return grad_NCHW.to(ctx.dtype), None, None, None, None


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
        scale, ratio, aligned = geometry.spatial_scale, geometry.sampling_ratio, geometry.aligned
        grad_NCHW: Tensor = torch.ops.torchvision._roi_align_backward(
            grad_KCPQ, boxes_K5, scale, rows, columns, *shape, ratio, aligned
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

    Arguments and result as of `kernel_backward`. Half and bfloat16 are added up in float32; a box that is not finite
    gets no gradient.
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
            widened = torch.bmm(grad_kPCQ.flatten(1, 2), along_x_KQW[some])
            along_y_RH = along_y_KPH[some].flatten(0, 1)
            by_row = along_y_RH.T @ widened.reshape(len(along_y_RH), channels * width)
            grad_NCHW[image] += by_row.reshape(height, channels, width).transpose(0, 1)
    return grad_NCHW.to(grad_KCPQ.dtype)


def interpolation_matrices(
    boxes_K4: Tensor, size: tuple[int, int], geometry: RoiGeometry
) -> tuple[Tensor, Tensor]:
    """Return the weights with which feature cells enter the bins of each box: along y (K, P, H), along x (K, Q, W).

    Boxes are xyxy in pixels, float32 or float64; ``size`` is (H, W) of the feature map.
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


def operator_in_use() -> Callable[[Tensor, Tensor, RoiGeometry], Tensor] | None:
    """Return the operator of the reproducibility modes that is in detectron2's place; None where there is none."""
    from detectron2.layers import ROIAlign

    return getattr(ROIAlign.forward, "operator", None)


# --- As a sparse product, on a CPU ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _SparseRows:
    """The matrix by rows.

    Attributes:
        columns_E: int32, feature cell of each entry, rows one after the other.
        weights_E: Its value.
        starts_R: int32, first entry of each row, that is of each pooled cell.
    """

    columns_E: Tensor
    weights_E: Tensor
    starts_R: Tensor

    def times(self, values: Tensor) -> Tensor:
        """Multiply with a dense matrix."""
        weights_E = self.weights_E
        product: Tensor = embedding_bag(
            self.columns_E, values, self.starts_R, mode="sum", per_sample_weights=weights_E
        )
        return product

    def transposed(self, columns: int) -> _SparseRows:
        """Return the transposed matrix; ``columns`` is the number of columns of this one."""
        if columns <= 2**16:  # numpy sorts 16 bits by radix, however few there are
            short_E = self.columns_E.numpy().astype(np.uint16)
            order_E = torch.from_numpy(short_E.argsort(kind="stable"))
        else:
            order_E = self.columns_E.argsort(stable=True)
        lengths_R = self.starts_R.diff(append=self.starts_R.new_tensor([len(order_E)]))
        rows_R = torch.arange(len(lengths_R), dtype=torch.int32)
        rows_E = rows_R.repeat_interleave(lengths_R, output_size=len(order_E))
        counts = torch.bincount(self.columns_E, minlength=columns)
        return _SparseRows(
            columns_E=rows_E[order_E],
            weights_E=self.weights_E[order_E],
            starts_R=(counts.cumsum(0) - counts).int(),
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


@np.errstate(over="ignore", invalid="ignore")  # of boxes near the largest float
def _matrix(
    rois_N5: Tensor, level_N: Tensor, batch: int, sizes: list[tuple[int, int]], grid: RegionGrid
) -> _SparseRows:
    """Build the matrix; its rows follow the regions.

    The terms along both axes are computed for all regions at once, the largest apart, so that none carries the terms of one
    that is much larger. Regions with as many terms along each axis are then multiplied out together. In numpy, whose calls
    cost a quarter of torch's where there are few regions.
    """
    rois, places_N, side = rois_N5.numpy(), level_N.numpy(), grid.side
    dtype = rois.dtype
    sizes_L2 = np.array(sizes, dtype=np.int64)
    counts_L = batch * sizes_L2.prod(axis=1)
    scale_N1 = np.array(grid.scales, dtype=dtype)[places_N, None]
    half = dtype.type(0.5)
    starts_N2 = rois[:, [2, 1]] * scale_N1 - half  # y, x
    steps_N2 = (rois[:, [4, 3]] * scale_N1 - half - starts_N2) / dtype.type(side)
    sizes_N2 = sizes_L2[places_N]
    if grid.sampling_ratio > 0:
        samples_N2 = np.full_like(sizes_N2, grid.sampling_ratio)
        terms_N2 = 2 * samples_N2
    else:
        samples_N2 = np.maximum(np.ceil(steps_N2), 0).astype(np.int64)
        # Samples at most a cell apart touch at most one more cell than they are, and no more than there are.
        terms_N2 = np.minimum(np.maximum(samples_N2, 1) + 1, sizes_N2)
    first_N = (counts_L.cumsum() - counts_L)[places_N]
    first_N += rois[:, 0].astype(np.int64) * sizes_N2[:, 0] * sizes_N2[:, 1]

    lengths_N = terms_N2[:, 0] * terms_N2[:, 1]
    ends_N = (lengths_N * side**2).cumsum()
    begin_N = ends_N - lengths_N * side**2
    entries = int(ends_N[-1]) if len(rois) else 0
    columns_E, weights_E = np.empty(entries, dtype=np.int32), np.empty(entries, dtype=dtype)
    # Regions of up to 4 samples are computed together, of up to 8, 16, ...; of these, those with as many terms each way.
    class_N = np.ceil(np.log2(np.maximum(samples_N2.max(axis=1, initial=4), 4))).astype(np.int64)
    for number in np.unique(class_N):
        members = (class_N == number).nonzero()[0]
        cells_M2ST, shares_M2ST = _axis_terms(
            starts_N2[members], steps_N2[members], samples_N2[members], sizes_N2[members], grid
        )
        rows_MST = cells_M2ST[:, 0] * sizes_N2[members, 1].astype(np.int32)[:, None, None]
        rows_MST += first_N[members].astype(np.int32)[:, None, None]
        kind_M = (terms_N2[members, 0] << 32) + terms_N2[members, 1]
        for kind in np.unique(kind_M):
            own = (kind_M == kind).nonzero()[0]
            high, wide = int(kind) >> 32, int(kind) & 0xFFFFFFFF
            # Region, pooled row, pooled column, term along y, term along x.
            cells = rows_MST[own, :, None, :high, None] + cells_M2ST[own, 1, None, :, None, :wide]
            weights = (
                shares_M2ST[own, 0, :, None, :high, None]
                * shares_M2ST[own, 1, None, :, None, :wide]
            )
            places = begin_N[members[own], None] + np.arange(side**2 * high * wide)
            columns_E[places] = cells.reshape(places.shape)
            weights_E[places] = weights.reshape(places.shape)
    starts_R = lengths_N.repeat(side**2).cumsum() - lengths_N.repeat(side**2)
    return _SparseRows(
        columns_E=torch.from_numpy(columns_E),
        weights_E=torch.from_numpy(weights_E),
        starts_R=torch.from_numpy(starts_R.astype(np.int32)),
    )


def _axis_terms(
    start_N2: Numbers, step_N2: Numbers, samples_N2: Numbers, cells_N2: Numbers, grid: RegionGrid
) -> tuple[Numbers, Numbers]:
    """Return which cells along each axis a pooled cell is made of, and with which weights: both (N, 2, S, T).

    A sample lies between two cells and takes from each by its distance. Beyond a cell outside the map it counts
    nothing; nearer it is moved to the border. Terms that a region does not need follow its own, with weight 0.

    Args:
        start_N2: Where each region starts along y and x, in feature cells.
        step_N2: Length of its pooled cells, in feature cells.
        samples_N2: int64, its samples of a pooled cell.
        cells_N2: int64, feature cells along the axes of its map.
        grid: How regions are divided.
    """
    dtype = start_N2.dtype
    most = max(int(samples_N2.max()), 1)
    p_S1 = np.arange(grid.side, dtype=dtype)[:, None]
    i_G = np.arange(most, dtype=dtype)
    start, step, samples, cells = (
        values[:, :, None, None]
        for values in (start_N2, step_N2, samples_N2.astype(dtype), cells_N2.astype(dtype))
    )
    count = np.maximum(samples, dtype.type(1))
    position = start + p_S1 * step + (i_G + dtype.type(0.5)) * step / count
    inside = (position >= -1.0) & (position <= cells) & (i_G < samples)
    position = np.minimum(np.fmax(position, dtype.type(0)), cells - dtype.type(1))
    low = position.astype(np.int32)
    fraction = position - low.astype(dtype)
    share = inside / count
    last = cells_N2.astype(np.int32)[:, :, None, None] - np.int32(1)
    both = np.stack([low, np.minimum(low + 1, last)], axis=-1)
    weights = np.stack([share * (dtype.type(1) - fraction), share * fraction], axis=-1)
    shape = (*low.shape[:3], 2 * most)
    if grid.sampling_ratio > 0:  # neighbouring samples may be more than a cell apart
        return both.reshape(shape), weights.reshape(shape)
    # Add up what falls on the same cell.
    first = low[..., :1]
    slot = np.clip(both - first[..., None], 0, most).reshape(shape)
    values = torch.from_numpy(weights.reshape(shape))
    merged = values.new_zeros((*shape[:3], most + 1))
    merged.scatter_add_(3, torch.from_numpy(slot.astype(np.int64)), values)
    return np.minimum(first + np.arange(most + 1, dtype=np.int32), last), merged.numpy()
