"""Trains a network: builds the state, resumes it, and runs the loop with its checkpoints, evaluations and logs."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxydet.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    Interrupted,
    TrainingError,
)
from proxydet.reporting import SILENT, Progress
from proxydet.training.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_checkpoint,
)
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo, broadcast_value, wait_for_all, wrap_for_ranks
from proxydet.training.logs import MetricLogger
from proxydet.training.runfolder import Resume, RunFolder
from proxydet.training.signals import StopNow, StopSignals
from proxydet.training.step import (
    Losses,
    TrainingModel,
    apply_precision,
    build_optimizer,
    build_scaler,
    train_step,
)
from proxydet.weight_files import write_safetensors, write_state

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module, int, Path], dict[str, float]]
"""Evaluates a network in eval mode at an iteration, keeping its files in a folder. Runs on every process, which may
work together; the main process returns the metrics by name, larger being better, the others may return nothing."""

_RESUME = "Start the same command again: it resumes from the newest checkpoint."


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation of a run."""

    iteration: int
    """Iterations so far when it was made."""

    metric: str
    """Name of the metric."""

    value: float
    """Its value."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training gives."""

    folder: Path
    """The run folder."""

    weights: Path
    """The weights after the last step."""

    iterations: int
    """Iterations of the run."""

    losses: dict[str, float]
    """Means of the last record: ``total``, and each loss over the batches that have it."""

    evaluations: dict[int, dict[str, float]]
    """Metrics by iteration."""

    best: Best | None
    """The best evaluation."""

    skipped: int
    """Steps that left the weights alone because a loss was not finite."""

    seconds: float
    """Wall-clock time of this call."""


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """One training, apart from the network, its losses and its data."""

    config: TrainingConfig
    """Settings; ``replicas`` is the number of batches of an iteration."""

    folder: RunFolder
    """Where the run lives."""

    ranks: DistInfo
    """This process."""

    seed: int
    """Seed of every random draw."""

    accumulation: int | None = None
    """Batches that this process adds up in a step; None takes the settings'. With another number of batches a step than
    ``replicas``, progress is counted in batches, and the learning rate follows ``scaling``."""

    loader_timeout: float | None = None
    """Seconds without a batch after which the run stops; None waits for ever."""

    resume: Resume = "auto"
    """What to do with checkpoints that are there."""

    run: str = ""
    """JSON of what the run is made from, for its checkpoints."""

    about: Mapping[str, Any] = field(default_factory=dict)
    """Plain values for the metadata of the final weights."""

    still_ours: Callable[[], None] = lambda: None
    """Raises when another training has taken over the run folder; called before anything is written."""

    evaluate: Evaluate | None = None
    """Evaluates the network by the schedule of the settings."""

    progress: Progress = field(default=SILENT)
    """Where progress is shown."""


def fit(
    network: nn.Module,
    criterion: Callable[..., Losses],
    make_loader: Callable[[int, int], Iterable[Any]],
    job: FitJob,
) -> TrainResult:
    """Train a network to the last iteration.

    Args:
        network: Has ``forward_train(batch, generator=...)`` and a ``backbone`` module; holds its starting weights.
        criterion: Gives losses of that method's result; see `TrainingModel`.
        make_loader: Called with the number of batches that all processes, and that each one, have used; returns the endless
            batches of this process after them.
        job: Everything else.

    Raises:
        Interrupted: A stop signal came; a checkpoint is written.
        NumericsError: A loss is not finite.
        DiskFullError: There is no room for a checkpoint or a log.
        LockedError: Another training has taken over the run folder.
        TrainingError: The loader is stuck, or a device failed.
        CheckpointError: There are checkpoints to resume from, and none fits or can be read.
    """
    start = time.perf_counter()
    state = _build_state(network, criterion, job)
    checkpoints = CheckpointFolder(job.folder.checkpoints, job.config.checkpoints)
    _resume(state, checkpoints, job)
    with ExitStack() as stack:
        task = stack.enter_context(
            job.progress.task(
                "training", total=job.config.iterations, unit="it", done=float(state.iteration)
            )
        )
        metrics = stack.enter_context(
            MetricLogger(job.folder, job.config.log, ranks=job.ranks, state=state, task=task)
        )
        prefetcher = stack.enter_context(
            Prefetcher(make_loader(state.batches, state.draws), job.loader_timeout)
        )
        signals = stack.enter_context(StopSignals())
        network.train()
        loop = _Loop(
            job=job,
            accumulation=job.accumulation or job.config.accumulation,
            state=state,
            checkpoints=checkpoints,
            metrics=metrics,
            prefetcher=prefetcher,
            signals=signals,
        )
        try:
            loop.run()
        except torch.OutOfMemoryError as error:
            raise EnvironmentProblem(
                f"The GPU has no memory left at iteration {state.iteration}: {error}",
                hint="Use smaller batches with more training.accumulation, a smaller input size, or "
                "model.backbone.swin.checkpoint_activations=true for Swin.",
            ) from error
        except RuntimeError as error:
            # CUDA or NCCL reports the failure of a device or of another process.
            kinds = tuple(
                getattr(module, name)
                for module, name in (
                    (torch, "AcceleratorError"),
                    (torch.distributed, "DistBackendError"),
                )
                if hasattr(module, name)
            )
            if not isinstance(error, kinds) and "CUDA error" not in str(error):
                raise
            raise TrainingError(
                f"The GPU failed at iteration {state.iteration}: {error}", hint=_RESUME
            ) from error
        if job.ranks.is_main:
            job.still_ours()
            weights = network.state_dict()
            about = {**job.about, "iteration": state.iteration}
            write_safetensors(job.folder.final_safetensors, weights, about)
            write_state({"model": weights, "iteration": state.iteration}, job.folder.final_weights)
        return TrainResult(
            folder=job.folder.root,
            weights=job.folder.final_weights,
            iterations=state.iteration,
            losses=metrics.last,
            evaluations=metrics.evaluations(),
            best=best_of(metrics.evaluations(), job.config.evaluation.metric),
            skipped=state.skipped,
            seconds=time.perf_counter() - start,
        )


def best_of(evaluations: dict[int, dict[str, float]], metric: str | None) -> Best | None:
    """Return the best of a run's evaluations, the first of equal ones; None where there are none.

    Args:
        evaluations: Metrics by iteration.
        metric: Which one decides; None takes the first.

    Raises:
        ConfigError: The evaluations have no such metric.
    """
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


def _build_state(
    network: nn.Module, criterion: Callable[..., Losses], job: FitJob
) -> TrainingState:
    config, ranks = job.config, job.ranks
    network.to(ranks.device)
    apply_precision(network, config.precision)
    touch = config.optimizer.unused_gradients == "zero"
    model: nn.Module = TrainingModel(network, criterion, device=ranks.device, touch_all=touch)
    if ranks.world_size > 1:
        model = wrap_for_ranks(model, ranks, find_unused=not touch)
    return TrainingState(
        network=network,
        model=model,
        optimizer=build_optimizer(network.parameters(), config.optimizer),
        scaler=build_scaler(config.precision, ranks.device),
        seed=job.seed,
        replicas=config.replicas,
        run=job.run,
    )


def _resume(state: TrainingState, checkpoints: CheckpointFolder, job: FitJob) -> None:
    """Go back to the state to resume from, if there is one; the main process chooses it for all."""
    if job.resume == "never":
        return
    saved: dict[str, Any] | None = None
    path: object = job.resume if isinstance(job.resume, Path) else None
    if job.ranks.is_main and path is None:
        saved, path = checkpoints.load_newest() or (None, None)
    path = broadcast_value(path, job.ranks)
    if isinstance(path, Path):
        saved = saved if saved is not None else load_checkpoint(path)
        state.load_state_dict(saved, job.config.accumulation)
        logger.info("Resuming after iteration %d from %s", state.iteration, path)
        # When every process has read its state.
        wait_for_all(job.ranks)
        if job.ranks.is_main:
            job.folder.set_aside_after(state.iteration)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """The training loop; `run` is the loop."""

    job: FitJob
    accumulation: int
    state: TrainingState
    checkpoints: CheckpointFolder
    metrics: MetricLogger
    prefetcher: Prefetcher
    signals: StopSignals

    def run(self) -> None:
        """Train until the last iteration.

        Raises:
            Interrupted: A stop signal came; a checkpoint is written.
        """
        state, config, ranks = self.state, self.job.config, self.job.ranks
        end = config.iterations * config.replicas
        self._evaluate_if_due()
        if ranks.is_main:  # a process that was killed may have left that to do
            self.checkpoints.rotate(self._best_iteration())
        while state.batches < end:
            batches = [self.prefetcher.next() for _ in range(self.accumulation)]
            result = train_step(
                state,
                batches,
                config=config,
                ranks=ranks,
                failures=self.job.folder.failures,
                stop=self.signals.received > 0,
            )
            # Where an iteration is no whole number of steps, the last one would count beyond the end.
            state.batches = min(state.batches, end)
            last = state.batches == end
            record = last or self._has_passed(config.log.period)
            if record and ranks.is_main:
                self.job.still_ours()
            self.metrics.step(result, self.prefetcher.waited, record=record)
            if result.stop and not last:
                self._stop()
            if last or self._has_passed(config.checkpoints.period) or self._evaluation_due():
                self._save()
            self._evaluate_if_due()

    def _has_passed(self, period: int) -> bool:
        """Whether the last step reached or passed a multiple of a number of iterations."""
        state = self.state
        step = self.accumulation * self.job.ranks.world_size
        unit = period * state.replicas
        return state.batches // unit > max(state.batches - step, 0) // unit

    def _evaluation_due(self) -> bool:
        """Whether the schedule asks for an evaluation of the present weights."""
        schedule, iteration = self.job.config.evaluation, self.state.iteration
        if self.job.evaluate is None or iteration == 0:
            return False
        if iteration == self.job.config.iterations:
            return schedule.at_end
        period = schedule.period
        return period is not None and iteration >= schedule.start and self._has_passed(period)

    def _evaluate_if_due(self) -> None:
        """Evaluate by the schedule, unless an interrupted run did so at this very iteration."""
        job, network, iteration = self.job, self.state.network, self.state.iteration
        if not self._evaluation_due() or job.evaluate is None:
            return
        done = iteration in self.metrics.evaluations()
        if broadcast_value(done, job.ranks):
            return
        network.eval()
        try:
            with self.signals.immediate():
                metrics = job.evaluate(network, iteration, job.folder.evaluation(iteration))
        except StopNow:
            self._stop(saved=True)
        finally:
            network.train()
        if job.ranks.is_main:
            job.still_ours()
        self.metrics.evaluation(metrics)
        if job.ranks.is_main:
            self.checkpoints.rotate(self._best_iteration())

    def _save(self) -> None:
        if self.job.ranks.is_main:
            self.job.still_ours()
            state = self.state.state_dict()
            path = self.checkpoints.save(state, self.state.iteration, self._best_iteration())
            logger.info("Wrote %s", path)

    def _best_iteration(self) -> int | None:
        best = best_of(self.metrics.evaluations(), self.job.config.evaluation.metric)
        return None if best is None else best.iteration

    def _stop(self, *, saved: bool = False) -> None:
        """End the run after a stop signal, with a checkpoint."""
        if not saved:
            self._save()
            wait_for_all(self.job.ranks)
        number = self.signals.received or int(signal.SIGTERM)
        iteration = self.state.iteration
        raise Interrupted(
            f"Training was stopped after {iteration} of {self.job.config.iterations} iterations; "
            f"{self.checkpoints.path(iteration)} holds its state.",
            signal_number=number,
            hint="Start the same command again: it resumes from there.",
        )


class Prefetcher:
    """An endless source of batches, fetched ahead in a thread, which notices a loader that is stuck.

    Args:
        batches: The loader. It is iterated in a thread, beginning when the first batch is asked for.
        timeout: Seconds to wait for a batch; None waits for ever.

    Attributes:
        waited: Seconds spent waiting for batches so far.
    """

    _AHEAD = 2

    def __init__(self, batches: Iterable[Any], timeout: float | None) -> None:
        self._batches = batches
        self._timeout = timeout
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(self._AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetcher", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            TrainingError: None came within the timeout, or a loader process died.
            DataError: The loader came to an end, or what it met in the data.
        """
        if not self._thread.is_alive() and self._queue.empty():
            self._thread.start()
        start = time.perf_counter()
        try:
            batch, error = self._queue.get(timeout=self._timeout)
        except queue.Empty as empty:
            raise TrainingError(
                f"The data loader gave no batch for {self._timeout:.0f} seconds.",
                hint="Check the file system that holds the images; data.worker_timeout_s sets how long to wait.",
            ) from empty
        finally:
            self.waited += time.perf_counter() - start
        if error is None:
            return batch
        if isinstance(error, StopIteration):
            raise DataError(
                "The data loader came to its end in the middle of training.",
                hint="a loader that is given to training must yield batches without end",
            ) from error
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise TrainingError(
                f"A process of the data loader died: {error}",
                hint="Most often the machine ran out of memory: use fewer loader workers (data.workers).",
            ) from error
        raise error

    def _fill(self) -> None:
        iterator = iter(self._batches)
        error: BaseException | None = None
        while error is None and not self._closed.is_set():
            batch = None
            try:
                batch = next(iterator)
            except BaseException as raised:  # noqa: BLE001 - handed to the thread that asks for the batch
                error = raised
            while not self._closed.is_set():
                try:
                    self._queue.put((batch, error), timeout=0.2)
                except queue.Full:
                    continue
                break
