"""The reproducibility modes, applied to the running process with no edit of any installed file.

``off``
    Nothing is changed.
``published``
    The flags of the published training (cuDNN deterministic, no benchmark, deterministic algorithms,
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8``) and its RoIAlign (features and boxes rounded to half precision).
``strict``
    The same flags, and a RoIAlign with unrounded values whose backward pass adds in a fixed order.

The modes replace ``detectron2.layers.ROIAlign.forward``, the one method through which detectron2's poolers reach
the operator, so they act alike whether or not the installed file carries the published change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import ROIAlign
from torch import Tensor

from proxydet.compat.modes import CUBLAS_VARIABLE, CUBLAS_WORKSPACE, MODES, Mode
from proxydet.compat.roi_operators import RoiGeometry, published_roi_align, strict_roi_align
from proxydet.errors import ConfigError

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
