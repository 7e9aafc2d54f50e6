"""AdamW as published, with gradients clipped element by element."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from proxydet.errors import ConfigError
from proxydet.training.config import OptimizerConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Build AdamW over the parameters that are trained, all in one group.

    Raises:
        ConfigError: No parameter is trained.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError("The network has no parameter to train: all are frozen.")
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], value: float) -> None:
    """Cut every gradient element to [-value, value] in place; parameters without a gradient are passed over.

    A gradient element that is not a number stays so: clipping must not hide it.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if with_gradient:
        nn.utils.clip_grad_value_(with_gradient, value)


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give a zero gradient to trained parameters that the losses did not reach."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
