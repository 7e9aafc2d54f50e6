"""Trains a network: puts optimiser, precision, checkpoints, logs and loop around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from proxydet.errors import EnvironmentProblem, TrainingError
from proxydet.reporting import SILENT, Progress
from proxydet.training.checkpoint import CheckpointFolder, load_checkpoint, write_checkpoint
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import (
    DistInfo,
    broadcast_value,
    wait_for_all,
    wrap_for_ranks,
)
from proxydet.training.feed import BatchFeed
from proxydet.training.guards import NonFiniteGuard
from proxydet.training.loop import Best, Evaluate, Loop
from proxydet.training.model import Losses, TrainingModel
from proxydet.training.optimizer import build_optimizer
from proxydet.training.precision import apply_precision, build_scaler
from proxydet.training.recorder import Recorder
from proxydet.training.runfolder import RunFolder
from proxydet.training.signals import StopSignals
from proxydet.training.state import TrainingState
from proxydet.training.step import Stepper

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path
"""``auto`` goes on with the newest checkpoint of the run folder if there is one, ``never`` starts anew, a path goes
on with that checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training gives."""

    folder: Path
    """The run folder."""

    weights: Path
    """The weights after the last step."""

    iterations: int
    """Steps taken."""

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
    """Settings."""

    folder: RunFolder
    """Where the run lives."""

    ranks: DistInfo
    """This process."""

    seed: int
    """Seed of every random draw."""

    loader_timeout: float | None = None
    """Seconds without a batch after which the run stops; None waits for ever."""

    resume: Resume = "auto"
    """What to do with checkpoints that are there."""

    evaluate: Evaluate | None = None
    """Evaluates the network by the schedule of the settings."""

    progress: Progress = field(default=SILENT)
    """Where progress is shown."""


def fit(
    network: nn.Module,
    criterion: Callable[..., Losses],
    make_loader: Callable[[int], Iterable[Any]],
    job: FitJob,
) -> TrainResult:
    """Train a network to the last iteration.

    Args:
        network: Has ``forward_train(batch, generator=...)`` and a ``backbone`` module; holds its starting weights.
        criterion: Gives losses of that method's result; see `TrainingModel`.
        make_loader: Called with a number of batches; returns the endless batches of this process after them.
        job: Everything else.

    Raises:
        Interrupted: A stop signal came; a checkpoint is written.
        NumericsError: A loss is not finite.
        DiskFullError: There is no room for a checkpoint or a log.
        TrainingError: The loader is stuck, or a device failed.
        CheckpointError: There are checkpoints to go on with, and none fits or can be read.
    """
    start = time.perf_counter()
    config, ranks = job.config, job.ranks
    state = _build_state(network, criterion, job)
    _resume(state, job)
    guard = NonFiniteGuard(config.guards, ranks, job.folder.failures)
    guard.skipped = state.skipped
    with ExitStack() as stack:
        task = stack.enter_context(
            job.progress.task(
                "training", total=config.iterations, unit="it", done=float(state.iteration)
            )
        )
        batches = make_loader(state.iteration * config.accumulation)
        loop = Loop(
            state=state,
            stepper=Stepper(state, config=config, ranks=ranks, guard=guard, seed=job.seed),
            feed=stack.enter_context(BatchFeed(batches, job.loader_timeout)),
            checkpoints=CheckpointFolder(job.folder.checkpoints, config.checkpoints),
            recorder=stack.enter_context(
                Recorder(job.folder, config.log, ranks=ranks, state=state, task=task)
            ),
            signals=stack.enter_context(StopSignals()),
            folder=job.folder,
            ranks=ranks,
            config=config,
            evaluate=job.evaluate,
        )
        network.train()
        _run(loop)
        if ranks.is_main:
            weights = {"model": network.state_dict(), "iteration": state.iteration}
            write_checkpoint(weights, job.folder.final_weights)
        return TrainResult(
            folder=job.folder.root,
            weights=job.folder.final_weights,
            iterations=state.iteration,
            losses=loop.recorder.last,
            evaluations=loop.recorder.evaluations(),
            best=loop.best(),
            skipped=state.skipped,
            seconds=time.perf_counter() - start,
        )


def _build_state(
    network: nn.Module, criterion: Callable[..., Losses], job: FitJob
) -> TrainingState:
    config, ranks = job.config, job.ranks
    network.to(ranks.device)
    apply_precision(network, config.precision)
    touch = config.optimizer.unused_gradients == "zero"
    model: nn.Module = TrainingModel(
        network,
        criterion,
        device=ranks.device,
        touch_all=touch,
    )
    if ranks.world_size > 1:
        model = wrap_for_ranks(model, ranks, find_unused=not touch)
    return TrainingState(
        network=network,
        model=model,
        optimizer=build_optimizer(network.parameters(), config.optimizer),
        scaler=build_scaler(config.precision, ranks.device),
        seed=job.seed,
    )


def _resume(state: TrainingState, job: FitJob) -> None:
    """Go back to the state to go on with, if there is one; the main process chooses it for all."""
    if job.resume == "never":
        return
    saved: dict[str, Any] | None = None
    path: object = job.resume if isinstance(job.resume, Path) else None
    folder = CheckpointFolder(job.folder.checkpoints, job.config.checkpoints)
    if job.ranks.is_main and path is None:
        saved, path = folder.load_newest() or (None, None)
    path = broadcast_value(path, job.ranks)
    if isinstance(path, Path):
        state.load_state_dict(saved if saved is not None else load_checkpoint(path))
        logger.info("Going on after iteration %d of %s", state.iteration, path)
        # When every process has read its state.
        wait_for_all(job.ranks)
        if job.ranks.is_main:
            folder.set_aside_after(state.iteration)


def _run(loop: Loop) -> None:
    """Run the loop; say in the user's words how the machine failed."""
    resume_hint = "Start the same command again: it goes on from the newest checkpoint."
    try:
        loop.run()
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"The GPU has no memory left at iteration {loop.state.iteration}: {error}",
            hint="Use smaller batches with more training.accumulation, a smaller input size, or "
            "model.backbone.swin.checkpoint_activations=true for Swin.",
        ) from error
    except RuntimeError as error:
        if not _is_device_failure(error):
            raise
        raise TrainingError(
            f"The GPU failed at iteration {loop.state.iteration}: {error}", hint=resume_hint
        ) from error


def _is_device_failure(error: RuntimeError) -> bool:
    """Whether CUDA or NCCL reports the failure of a device or of another process."""
    kinds = tuple(
        getattr(module, name)
        for module, name in ((torch, "AcceleratorError"), (torch.distributed, "DistBackendError"))
        if hasattr(module, name)
    )
    return isinstance(error, kinds) or "CUDA error" in str(error)
