"""Number formats of training: where automatic mixed precision applies, loss scaling, memory layout, compilation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from proxydet.training.config import PrecisionConfig

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(config: PrecisionConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the losses' forward pass runs."""
    if config.dtype == "fp32" or config.scope == "backbone":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[config.dtype])


def build_scaler(config: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler: active in fp16, passing everything through otherwise."""
    return torch.amp.GradScaler(
        device.type, init_scale=config.initial_loss_scale, enabled=config.dtype == "fp16"
    )


def prepare_backbone(backbone: nn.Module, config: PrecisionConfig, device: torch.device) -> None:
    """Apply the memory layout, mixed precision and compilation that concern the backbone and FPN, in place.

    Feature maps leave the backbone in float32 whatever it computed in.
    """
    if config.channels_last:
        backbone.to(memory_format=torch.channels_last)
    if config.compile:
        backbone.compile()
    if config.dtype != "fp32" and config.scope == "backbone":
        _LowPrecisionCall(_DTYPES[config.dtype], device).attach(backbone)


class _LowPrecisionCall:
    """Forward hooks that run one module under autocast and return its outputs in float32."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device_type = device.type
        self._contexts: list[torch.autocast] = []

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG002
        if not module.training:
            return
        context = torch.autocast(self._device_type, dtype=self._dtype)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._contexts.append(context)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002
        if not self._contexts:
            return output
        self._contexts.pop().__exit__(None, None, None)
        return _to_float32(output)


def _to_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _to_float32(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float32(item) for item in value)
    return value
