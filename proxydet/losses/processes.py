"""Counts that all processes of a training agree on."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def average_over_processes(counts: Tensor) -> Tensor:
    """Return the mean over all processes, at least 1; every process must call this, whatever its batch holds.

    Args:
        counts: This process's counts, of any shape.

    Returns:
        float32 of the same shape, without gradient. Waits for the other processes, not for the device.
    """
    totals = counts.detach().to(torch.float32).clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(totals)
        totals /= distributed.get_world_size()
    return totals.clamp(min=1.0)
