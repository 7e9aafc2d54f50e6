"""The training loop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from proxydet.errors import ConfigError, Interrupted
from proxydet.training.checkpoint import CheckpointFolder
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo, broadcast_value, wait_for_all
from proxydet.training.feed import BatchFeed
from proxydet.training.recorder import Recorder
from proxydet.training.runfolder import RunFolder
from proxydet.training.signals import StopNow, StopSignals
from proxydet.training.state import TrainingState
from proxydet.training.step import Stepper

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module, int, Path], dict[str, float]]
"""Evaluates a network in eval mode at an iteration, keeping its files in a folder. Runs on every process, which may
work together; the main process returns the metrics by name, larger being better, the others may return nothing."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation of a run."""

    iteration: int
    """Steps taken when it was made."""

    metric: str
    """Name of the metric."""

    value: float
    """Its value."""


@dataclass(kw_only=True)
class Loop:
    """Everything that takes part in the loop; `run` is the loop."""

    state: TrainingState
    """What changes."""

    stepper: Stepper
    """Takes a step."""

    feed: BatchFeed
    """Gives batches."""

    checkpoints: CheckpointFolder
    """Keeps states."""

    recorder: Recorder
    """Writes down what happened."""

    signals: StopSignals
    """Tells when to stop."""

    folder: RunFolder
    """Where the run lives."""

    ranks: DistInfo
    """This process."""

    config: TrainingConfig
    """Settings."""

    evaluate: Evaluate | None = None
    """Evaluation by the schedule of the settings."""

    def run(self) -> None:
        """Train until the last iteration.

        Raises:
            Interrupted: A stop signal came; a checkpoint is written.
        """
        state, config = self.state, self.config
        self._evaluate_if_due()
        while state.iteration < config.iterations:
            batches = [self.feed.next() for _ in range(config.accumulation)]
            result = self.stepper(batches, state.iteration, stop=self.signals.received > 0)
            state.iteration += 1
            state.skipped += result.skipped
            state.images += result.images
            last = state.iteration == config.iterations
            self.recorder.step(result, self.feed.waited, last=last)
            if result.stop and not last:
                self._stop()
            if last or state.iteration % config.checkpoints.period == 0 or self._evaluation_due():
                self._save()
            self._evaluate_if_due()

    def best(self) -> Best | None:
        """Return the best evaluation so far (main process only)."""
        evaluations = self.recorder.evaluations()
        metric = self.config.evaluation.metric
        best: Best | None = None
        for iteration, metrics in evaluations.items():
            name = metric or next(iter(metrics), "")
            if name not in metrics:
                raise ConfigError(
                    f"training.evaluation.metric is {metric!r}, which the evaluation does not report.",
                    hint=f"It reports {', '.join(metrics) or 'nothing'}.",
                )
            if best is None or metrics[name] > best.value:
                best = Best(iteration=iteration, metric=name, value=metrics[name])
        return best

    def _evaluation_due(self) -> bool:
        """Whether the schedule asks for an evaluation of the present weights."""
        schedule, iteration = self.config.evaluation, self.state.iteration
        if self.evaluate is None or iteration == 0:
            return False
        if iteration == self.config.iterations:
            return schedule.at_end
        period = schedule.period
        return period is not None and iteration >= schedule.start and iteration % period == 0

    def _evaluate_if_due(self) -> None:
        """Evaluate by the schedule, unless an interrupted run did so at this very step."""
        if not self._evaluation_due() or self.evaluate is None:
            return
        done = self.state.iteration in self.recorder.evaluations()
        if broadcast_value(done, self.ranks):
            return
        network, iteration = self.state.network, self.state.iteration
        network.eval()
        try:
            with self.signals.immediate():
                metrics = self.evaluate(network, iteration, self.folder.evaluation(iteration))
        except StopNow:
            self._stop(saved=True)
        finally:
            network.train()
        self.recorder.evaluation(metrics)
        if self.ranks.is_main:
            self.checkpoints.rotate(self._best_iteration())

    def _save(self) -> None:
        if self.ranks.is_main:
            state = self.state.state_dict()
            path = self.checkpoints.save(state, self.state.iteration, self._best_iteration())
            logger.info("Wrote %s", path)

    def _best_iteration(self) -> int | None:
        best = self.best()
        return None if best is None else best.iteration

    def _stop(self, *, saved: bool = False) -> None:
        """End the run after a stop signal, with a checkpoint."""
        if not saved:
            self._save()
            wait_for_all(self.ranks)
        number = self.signals.received or int(signal.SIGTERM)
        raise Interrupted(
            f"Training was stopped after {self.state.iteration} of {self.config.iterations} iterations; "
            f"{self.checkpoints.path(self.state.iteration)} holds its state.",
            signal_number=number,
            hint="Start the same command again: it goes on from there.",
        )
