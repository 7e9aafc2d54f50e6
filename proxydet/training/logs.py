"""The course of a training: what is recorded of its steps, TensorBoard, and what is shown while it runs."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from proxydet.training.step import StepResult


class LossWindow:
    """Sums over the steps since the last record.

    A loss that some batches do not have (mask loss, on image-label batches) is averaged over those that have it.
    """

    def __init__(self, sums: dict[str, Any] | None = None) -> None:
        self._sums: dict[str, Any] = sums or {"steps": 0, "images": 0, "losses": {}, "shares": {}}

    def add(self, result: StepResult) -> None:
        """Take a step into account."""
        if result.skipped:
            return
        self._sums["steps"] += 1
        self._sums["images"] += result.images
        for kind, values in (("losses", result.losses), ("shares", result.shares)):
            sums = self._sums[kind]
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return each loss's mean over the batches that have it, and their mean sum as ``total``."""
        steps = max(self._sums["steps"], 1)
        means = {}
        for name, value in self._sums["losses"].items():
            share = self._sums["shares"][name]
            means[name] = value / share if share else 0.0
        return {"total": sum(self._sums["losses"].values()) / steps, **means}

    @property
    def steps(self) -> int:
        """Number of steps taken into account."""
        return int(self._sums["steps"])

    @property
    def images(self) -> int:
        """Number of images in those steps, on all processes."""
        return int(self._sums["images"])

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, to go on with after an interruption."""
        return {k: dict(v) if isinstance(v, dict) else v for k, v in self._sums.items()}


class TensorBoard:
    """TensorBoard event files.

    Args:
        folder: Where they go.
        iteration: Steps taken so far: later entries of an interrupted run are hidden.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def add(self, values: dict[str, float], iteration: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush to the disk."""
        self._writer.close()


class Clock:
    """Time and waiting since the last record."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0

    def lap(self, waited: float, steps: int) -> dict[str, float]:
        """Return seconds a step, seconds of waiting for data a step, and start anew.

        Args:
            waited: Seconds that the feed has waited since the beginning.
            steps: Steps since the last lap.
        """
        now = time.perf_counter()
        seconds, data = now - self._start, waited - self._waited
        self._start, self._waited = now, waited
        return {
            "step_seconds": round(seconds / max(steps, 1), 6),
            "data_seconds": round(data / max(steps, 1), 6),
        }


def memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: on the GPU where it computes on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
