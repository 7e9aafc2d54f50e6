"""Number formats of training: mixed precision of the backbone, loss scaling, memory layout, compilation."""

from __future__ import annotations

import torch
from torch import nn

from proxydet.training.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_scaler(config: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler: active in fp16, passing everything through otherwise."""
    return torch.amp.GradScaler(
        device.type, init_scale=config.initial_loss_scale, enabled=config.dtype == "fp16"
    )


def apply_precision(network: nn.Module, config: PrecisionConfig) -> None:
    """Set number format, memory layout and compilation of a network's backbone and pyramid, in place.

    Args:
        network: Has a module ``backbone``, which it runs under autocast in its ``backbone_dtype``.
        config: What to set.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    network.backbone_dtype = _DTYPES[config.dtype]  # type: ignore[assignment]
    backbone = network.get_submodule("backbone")
    if config.channels_last:
        backbone.to(memory_format=torch.channels_last)
    if config.compile:
        backbone.compile()
