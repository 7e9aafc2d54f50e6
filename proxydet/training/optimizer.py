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


def settle_unused_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give a gradient of zero to parameters that the losses did not reach now but have reached in an earlier step.

    So they go on by their momentum, as with torch before 2.0, whose ``zero_grad`` kept gradients and set them to zero.
    Parameters that were never reached are left alone: a group of processes hands them zeros, which are taken away. Which
    ones were reached is read from the optimiser's state, and so outlives an interruption.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reached = parameter in optimizer.state
            if reached and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not reached and parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None
