"""One optimiser step: forward, backward, exchange of the losses, clip, update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo, sum_over_ranks
from proxydet.training.guards import NonFiniteGuard
from proxydet.training.optimizer import clip_gradients, settle_unused_gradients
from proxydet.training.schedule import learning_rate_factor, set_learning_rate
from proxydet.training.seeding import derive_seed
from proxydet.training.state import TrainingState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        losses: Name to mean over all processes and accumulated batches.
        shares: Name to the fraction of those batches in which the loss was not 0, in [0, 1].
        learning_rate: With which the step was taken.
        images: Number of images on all processes.
        skipped: Whether the weights were left alone because a loss was not finite.
        stop: Whether a process has received a stop signal.
    """

    losses: dict[str, float]
    shares: dict[str, float]
    learning_rate: float
    images: int
    skipped: bool
    stop: bool

    @property
    def total(self) -> float:
        """Sum of the losses."""
        return sum(self.losses.values())


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What the processes tell each other in a step; see `StepResult`."""

    losses: dict[str, float]
    shares: dict[str, float]
    images: int
    stop: bool


class Stepper:
    """Takes optimiser steps.

    Args:
        state: Model, optimiser and loss scaler; its iteration is left to the caller.
        config: Training settings.
        ranks: This process.
        guard: Decides about losses that are not finite.
        seed: Seed of the run.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        config: TrainingConfig,
        ranks: DistInfo,
        guard: NonFiniteGuard,
        seed: int,
    ) -> None:
        self._model = state.model
        self._optimizer = state.optimizer
        self._scaler = state.scaler
        self._config = config
        self._ranks = ranks
        self._guard = guard
        self._seed = seed
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Any], iteration: int, stop: bool = False) -> StepResult:
        """Take the step of one iteration.

        Args:
            batches: As many batches as are accumulated.
            iteration: Steps taken before this one.
            stop: Whether this process wants to stop; all processes learn of it.

        Raises:
            NumericsError: A loss is not finite, and the guard does not skip the step.
        """
        learning_rate = self._set_learning_rate(iteration)
        names, values, shares = self._backward(batches, iteration)
        shared = self._exchange(names, torch.cat([values, shares]), batches, stop)
        skip = self._guard.refuses(shared.losses, values, batches, iteration)
        if not skip:
            self._update()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            losses=shared.losses,
            shares=shared.shares,
            learning_rate=learning_rate,
            images=shared.images,
            skipped=skip,
            stop=shared.stop,
        )

    def _set_learning_rate(self, iteration: int) -> float:
        config = self._config
        factor = learning_rate_factor(iteration, config.iterations, config.schedule)
        learning_rate = config.optimizer.learning_rate * factor
        set_learning_rate(self._optimizer, learning_rate)
        return learning_rate

    def _backward(
        self, batches: Sequence[Any], iteration: int
    ) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Accumulate the gradients of the mean loss over the batches.

        Returns:
            Names of the losses in alphabetical order, their means over the batches, and in which share of the batches
            each was not 0.
        """
        names: list[str] = []
        rows = []
        for part, batch in enumerate(batches):
            seed = derive_seed(self._seed, iteration, self._ranks.rank, part)
            with self._no_sync() if part + 1 < len(batches) else nullcontext():
                losses = self._model(batch.to(self._ranks.device), seed)
                total = torch.stack(list(losses.values())).sum() / len(batches)
                self._scaler.scale(total).backward()
            names = sorted(losses)
            rows.append(torch.stack([losses[name].detach().float() for name in names]))
        values = torch.stack(rows)
        return names, values.mean(dim=0), (values != 0).float().mean(dim=0)

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Return the context in which gradients stay on this process."""
        if isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()

    def _exchange(
        self, names: list[str], numbers: torch.Tensor, batches: Sequence[Any], stop: bool
    ) -> _Shared:
        """Average over the processes in one collective, and read the result: the step's one wait for the device.

        Args:
            names: Names of the losses.
            numbers: Their values, then their shares.
            batches: The batches of this process.
            stop: Whether this process wants to stop.
        """
        images = sum(len(batch) for batch in batches)
        counts = torch.tensor([images, stop], dtype=numbers.dtype).to(numbers.device)
        *means, total_images, stops = sum_over_ranks(
            torch.cat([numbers, counts]), self._ranks
        ).tolist()
        means = [number / self._ranks.world_size for number in means]
        return _Shared(
            losses=dict(zip(names, means, strict=False)),
            shares=dict(zip(names, means[len(names) :], strict=True)),
            images=round(total_images),
            stop=stops > 0,
        )

    def _update(self) -> None:
        config = self._config.optimizer
        if config.unused_gradients == "zero":
            settle_unused_gradients(self._optimizer)
        self._scaler.unscale_(self._optimizer)
        if config.clip_value is not None:
            clip_gradients(self._parameters, config.clip_value)
        self._scaler.step(self._optimizer)
        self._scaler.update()
