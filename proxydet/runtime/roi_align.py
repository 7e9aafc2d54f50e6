"""RoIAlign as the reproducibility modes need it: the published one, and one whose backward pass repeats itself.

torchvision's CUDA kernel adds the gradient of every sample to its four feature cells with atomic additions, whose
order changes from run to run. RoIAlign is linear in the features and separable: a bin's value is the mean over a
grid of bilinear samples, so it is ``sum_hw along_y[p, h] along_x[q, w] features[h, w]``. Its gradient is then two
matrix products a box, summed over the boxes of an image by one more, and matrix products add in a fixed order
(on CUDA: with ``CUBLAS_WORKSPACE_CONFIG=:4096:8``). :mod:`proxydet.runtime.modes` puts both in detectron2's place.

Letters in names: N images, C channels, H x W feature cells, K boxes, P x Q bins of a pooled box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision  # noqa: F401  # its import registers torch.ops.torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable

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
