"""The learning rate as a pure function of the iteration."""

from __future__ import annotations

import math

import torch

from proxydet.training.config import ScheduleConfig

# detectron2's scheduler (fvcore) decides on this tolerance, in units of the whole training, whether warm-up is over.
_WARMUP_TOLERANCE = 1e-6


def learning_rate_factor(iteration: int, iterations: int, config: ScheduleConfig) -> float:
    """Return the fraction of the learning rate with which an iteration steps.

    During warm-up the factor runs linearly from ``warmup_start`` to the value that the cosine has at the end of
    warm-up, so that the two parts meet; this is how detectron2 joins them.

    Args:
        iteration: Number of steps taken before this one, from 0.
        iterations: Steps of the whole training.
        config: Shape and warm-up.

    Returns:
        A number in (0, 1].
    """
    progress = iteration / iterations
    warmup_end = config.warmup_iterations / iterations
    if progress + _WARMUP_TOLERANCE >= warmup_end:
        return _course(progress, config)
    start, end = config.warmup_start * _course(0.0, config), _course(warmup_end, config)
    done = progress / warmup_end
    return end * done + start * (1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Make the optimiser's next step use a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _course(progress: float, config: ScheduleConfig) -> float:
    """Factor without warm-up at a fraction of the training (above 1 during a warm-up longer than it)."""
    if config.shape == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
