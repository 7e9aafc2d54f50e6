"""Number formats of training: mixed precision of the backbone, loss scaling, memory layout, compilation."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from proxydet.errors import ConfigError, EnvironmentProblem
from proxydet.training.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# What torch.compile calls on a CPU, in this order, where CXX names no other.
_CPP_COMPILERS = ("g++", "clang++")


def check_precision(
    config: PrecisionConfig,
    device: torch.device,
    which: Callable[[str], str | None] = shutil.which,
) -> None:
    """Make sure that a device can compute as it is told, before a run begins.

    Args:
        config: What is asked for.
        device: Where it will be computed.
        which: Finds a program.

    Raises:
        ConfigError: fp16 is asked for on a CPU, which has no fast way to do it: a step would take minutes.
        EnvironmentProblem: torch.compile is asked for and what it needs is not there.
    """
    if config.dtype == "fp16" and device.type == "cpu":
        raise ConfigError(
            "training.precision.dtype is fp16, which needs a GPU; on a CPU it is about a hundred times slower than fp32.",
            hint="Add --set training.precision.dtype=fp32, or bf16.",
        )
    if not config.compile:
        return
    if device.type == "cpu":
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else list(_CPP_COMPILERS)
        if not any(which(name) for name in compilers):
            raise EnvironmentProblem(
                f"training.precision.compile needs a C++ compiler, and there is no {' or '.join(compilers)}.",
                hint="Install one (for example: apt install g++), or leave training.precision.compile off.",
            )
    elif importlib.util.find_spec("triton") is None:
        raise EnvironmentProblem(
            "training.precision.compile needs the package triton on a GPU, and it is not installed.",
            hint="Install triton, or leave training.precision.compile off.",
        )


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
