"""The reproducibility modes and their RoIAlign, applied to the running process with no edit of any installed file.

``off``
    Nothing is changed.
``published``
    The flags of the published training (cuDNN deterministic, no benchmark, deterministic algorithms,
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8``) and its RoIAlign (features and boxes rounded to half precision).
``strict``
    The same flags, and a RoIAlign with unrounded values whose backward pass adds in a fixed order.

The modes replace ``detectron2.layers.ROIAlign.forward``, the one method through which detectron2's poolers reach
the operator, so they act alike whether or not the installed file carries the published change.

torchvision's CUDA kernel adds the gradient of every sample to its four feature cells with atomic additions, whose
order changes from run to run. RoIAlign is linear in the features and separable: a bin's value is the mean over a
grid of bilinear samples, so it is ``sum_hw along_y[p, h] along_x[q, w] features[h, w]``. Its gradient is then two
matrix products a box, summed over the boxes of an image by one more, and matrix products add in a fixed order
(on CUDA: with ``CUBLAS_WORKSPACE_CONFIG=:4096:8``).

Letters in names: N images, C channels, H x W feature cells, K boxes, P x Q bins of a pooled box.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import proxydet.runtime.d2  # noqa: F401

import torch
import torchvision  # noqa: F401  # its import registers torch.ops.torchvision
from detectron2.layers import ROIAlign
from torch import Tensor
from torch.autograd.function import once_differentiable

from proxydet.errors import ConfigError
from proxydet.runtime.modes import CUBLAS_VARIABLE, CUBLAS_WORKSPACE, MODES, Mode

_CHUNK_BYTES = 128 * 2**20


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
    """Whether pixel centres lie at half-integer coordinates (detectron2's ``ROIAlignV2``)."""


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
    pooled: Tensor = _RoiAlign.apply(rounded, boxes_K5.half().double(), geometry, kernel_backward)
    return pooled.to(dtype=features_NCHW.dtype)


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
    boxes_K5 = boxes_K5.to(dtype=features_NCHW.dtype)
    pooled: Tensor = _RoiAlign.apply(features_NCHW, boxes_K5, geometry, backward)
    return pooled


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
    with _nondeterminism_allowed():
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
    return grad_NCHW


@contextmanager
def _nondeterminism_allowed() -> Iterator[None]:
    # torchvision 0.16 and later refuse this kernel under deterministic algorithms; 0.12, the published one, did not.
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def separable_backward(
    grad_KCPQ: Tensor, boxes_K5: Tensor, shape: tuple[int, int, int, int], geometry: RoiGeometry
) -> Tensor:
    """Gradient of RoIAlign as matrix products, added in a fixed order.

    Equal to the kernel's gradient up to the rounding of sums. Each image's boxes are multiplied in pieces, one after
    the other: beside its result, the interpolation matrices and two copies of a piece's gradient it takes at most
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
    piece = max(1, _CHUNK_BYTES // (geometry.output_size[0] * channels * width * dtype.itemsize))
    for image, members in _boxes_by_image(boxes_K5, images):
        for some in torch.split(members, piece):
            grad_kPCQ = grad_KCPQ[some].to(dtype).transpose(1, 2)
            grad_NCHW[image] += _gradient_of_image(grad_kPCQ, along_y_KPH[some], along_x_KQW[some])
    return grad_NCHW.to(grad_KCPQ.dtype)


def _boxes_by_image(boxes_K5: Tensor, images: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each image that has boxes, with their positions in ascending order; waits for the device once."""
    owner_K = boxes_K5[:, 0].long()
    counts = torch.bincount(owner_K, minlength=images).tolist()
    by_image = torch.split(owner_K.argsort(stable=True), counts)
    yield from ((image, members) for image, members in enumerate(by_image) if counts[image])


def _gradient_of_image(grad_kPCQ: Tensor, along_y_kPH: Tensor, along_x_kQW: Tensor) -> Tensor:
    boxes, rows, channels, columns = grad_kPCQ.shape
    height, width = along_y_kPH.shape[2], along_x_kQW.shape[2]
    widened = torch.bmm(grad_kPCQ.reshape(boxes, rows * channels, columns), along_x_kQW)
    by_row = along_y_kPH.reshape(boxes * rows, height).T @ widened.reshape(
        boxes * rows, channels * width
    )
    return by_row.reshape(height, channels, width).transpose(0, 1)


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


_logger = logging.getLogger(__name__)

_OPERATORS: dict[Mode, Callable[[Tensor, Tensor, RoiGeometry], Tensor]] = {
    "published": published_roi_align,
    "strict": strict_roi_align,
}


@dataclass(frozen=True, kw_only=True)
class _State:
    forward: Callable[..., Tensor]
    deterministic: bool
    warn_only: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    cublas_workspace: str | None


_active: Mode = "off"
_before: _State | None = None


def current_mode() -> Mode:
    """Return the mode that this process runs in."""
    return _active


def apply_mode(mode: Mode) -> Mode:
    """Put the process into a reproducibility mode; going back to ``off`` restores what was there before.

    Call it before the process first uses CUDA: cuBLAS reads its setting only once. Idempotent.

    Args:
        mode: ``"off"``, ``"published"`` or ``"strict"``.

    Returns:
        The mode before the call.

    Raises:
        ConfigError: There is no such mode.
    """
    global _active, _before
    if mode not in MODES:
        raise ConfigError(
            f"There is no reproducibility mode {mode!r}.", hint=f"choose one of {', '.join(MODES)}"
        )
    previous = _active
    if mode == previous:
        return previous
    if _before is None:
        _before = _read_state()
    if mode == "off":
        _restore_state(_before)
        _before = None
    else:
        _set_flags()
        ROIAlign.forward = _forward_with(_OPERATORS[mode])
    _active = mode
    _logger.info("reproducibility mode: %s", mode)
    return previous


@contextmanager
def reproducibility_mode(mode: Mode) -> Iterator[None]:
    """Run a block in a mode and go back to the mode before it.

    Args:
        mode: ``"off"``, ``"published"`` or ``"strict"``.

    Raises:
        ConfigError: There is no such mode.
    """
    previous = apply_mode(mode)
    try:
        yield
    finally:
        apply_mode(previous)


def _forward_with(
    operator: Callable[[Tensor, Tensor, RoiGeometry], Tensor],
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def forward(self: Any, input: Tensor, rois: Tensor) -> Tensor:
        size = self.output_size
        geometry = RoiGeometry(
            output_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )
        return operator(input.dequantize() if input.is_quantized else input, rois, geometry)

    return forward


def _read_state() -> _State:
    return _State(
        forward=cast("Callable[..., Tensor]", ROIAlign.forward),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn_deterministic=torch.backends.cudnn.deterministic,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        cublas_workspace=os.environ.get(CUBLAS_VARIABLE),
    )


def _restore_state(state: _State) -> None:
    ROIAlign.forward = state.forward
    torch.use_deterministic_algorithms(state.deterministic, warn_only=state.warn_only)
    torch.backends.cudnn.deterministic = state.cudnn_deterministic
    torch.backends.cudnn.benchmark = state.cudnn_benchmark
    if state.cublas_workspace is None:
        os.environ.pop(CUBLAS_VARIABLE, None)
    else:
        os.environ[CUBLAS_VARIABLE] = state.cublas_workspace


def _set_flags() -> None:
    if os.environ.get(CUBLAS_VARIABLE) != CUBLAS_WORKSPACE:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            _logger.warning(
                "%s=%s comes too late for this process, which has used CUDA before: set it before the start",
                CUBLAS_VARIABLE,
                CUBLAS_WORKSPACE,
            )
        os.environ[CUBLAS_VARIABLE] = CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
