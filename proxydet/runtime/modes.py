"""The reproducibility modes, applied to the running process with no edit of any installed file.

``off``
    Nothing is changed.
``published``
    The flags of the published training (cuDNN deterministic, no benchmark, deterministic algorithms,
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8``) and its RoIAlign (features and boxes rounded to half precision). New memory is not filled,
    which torch 2 would add.
``strict``
    The same flags, and a RoIAlign with unrounded values whose backward pass adds in a fixed order.

The modes replace ``detectron2.layers.ROIAlign.forward``, the one method through which detectron2's poolers reach
the operator, so they work the same whether or not the installed file carries the published change. Importing this
module loads no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from proxydet.errors import ConfigError

_logger = logging.getLogger(__name__)

Mode = Literal["off", "published", "strict"]
"""``off`` changes nothing; ``published`` is the published training's; ``strict`` repeats itself bit for bit."""

MODES: tuple[Mode, ...] = get_args(Mode)

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"
"""Eight fixed workspaces of 4 MiB: cuBLAS then repeats itself (read when a process first uses CUDA)."""

_active: Mode = "off"
_restore: Callable[[], None] | None = None


def current_mode() -> Mode:
    """Return the mode that this process runs in."""
    return _active


def apply_mode(mode: Mode) -> Mode:
    """Put the process into a reproducibility mode; ``off`` restores the settings from before the first mode.

    Call it before the process first uses CUDA: cuBLAS reads its setting only once. Idempotent.

    Args:
        mode: ``"off"``, ``"published"`` or ``"strict"``.

    Returns:
        The mode before the call.

    Raises:
        ConfigError: There is no such mode.
    """
    global _active, _restore
    if mode not in MODES:
        raise ConfigError(
            f"There is no reproducibility mode {mode!r}.", hint=f"choose one of {', '.join(MODES)}"
        )
    previous = _active
    if mode == previous:
        return previous
    if _restore is None:
        _restore = _remember_settings()
    if mode == "off":
        _restore()
        _restore = None
    else:
        from proxydet.runtime.roi_align import use_operator

        _set_flags()
        use_operator(mode)
    _active = mode
    _logger.info("reproducibility mode: %s", mode)
    return previous


@contextmanager
def reproducibility_mode(mode: Mode) -> Iterator[None]:
    """Run a block in a mode, then return to the mode before it.

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


def _remember_settings() -> Callable[[], None]:
    """Return a function that restores what the modes change, as it is now."""
    from proxydet.runtime.detectron2 import activate

    activate()
    import torch
    from detectron2.layers import ROIAlign

    forward = ROIAlign.forward
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get(CUBLAS_VARIABLE)

    def restore() -> None:
        ROIAlign.forward = forward
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
        else:
            os.environ[CUBLAS_VARIABLE] = workspace

    return restore


def _set_flags() -> None:
    import torch

    if os.environ.get(CUBLAS_VARIABLE) != CUBLAS_WORKSPACE:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            _logger.warning(
                "%s=%s comes too late for this process, which has used CUDA before: set it before the start",
                CUBLAS_VARIABLE,
                CUBLAS_WORKSPACE,
            )
        os.environ[CUBLAS_VARIABLE] = CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(True)
    # Deterministic algorithms would also fill all new memory, at the cost of a launch a tensor. Nothing here reads memory
    # before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
