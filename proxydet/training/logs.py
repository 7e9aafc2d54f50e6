"""Logs of a training: records of its steps and evaluations, the live display, and where the records also go.

``metrics.jsonl`` and ``evaluations.jsonl`` are the records; TensorBoard, W&B, MLflow and loggers of one's own get a copy.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from proxydet.errors import MissingDependencyError
from proxydet.extensions import load_extension, require_signature
from proxydet.files import JsonLines, write_text
from proxydet.reporting import Task
from proxydet.training.checkpoint import TrainingState
from proxydet.training.config import LOGGERS, EvaluationSchedule, LogConfig
from proxydet.training.distributed import DistInfo
from proxydet.training.step import StepResult

if TYPE_CHECKING:
    from proxydet.training.runfolder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation of a run.

    Attributes:
        iteration: Iterations so far when it was made.
        metric: Name of the metric.
        value: Its value.
    """

    iteration: int
    metric: str
    value: float


class Logger(Protocol):
    """What ``training.log.loggers`` names: made once by the main process, with the arguments below by name.

    Args:
        folder: The run folder, which is there.
        config: The whole configuration as nested mappings.
        iteration: Iterations so far: 0, or those after which the run is resumed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], iteration: int) -> None: ...

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take a record.

        Args:
            values: By name: ``loss/total``, ``loss/...``, ``train/learning_rate``, ``evaluation/...``.
            iteration: Iterations so far.
        """

    def close(self) -> None:
        """End: the training is over, or was stopped."""


class TensorBoardLogger:
    """TensorBoard event files in ``RUN/tensorboard``; later entries of an interrupted run are hidden."""

    def __init__(self, folder: Path, config: Mapping[str, Any], iteration: int) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take a record."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases, its files in ``RUN/wandb``.

    W&B's own environment variables decide where it goes (``WANDB_PROJECT``, ``WANDB_MODE``, ...); without a login it is
    offline, for ``wandb sync`` later. A resumed training resumes its run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], iteration: int) -> None:  # noqa: ARG002
        import wandb

        # Without a login wandb.init would ask for one.
        mode = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False) else "offline")
        if mode == "offline":
            logger.info("W&B writes to %s; wandb sync uploads it", folder / "wandb")
        known = folder / "wandb" / "run_id.txt"
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "proxydet"),
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            id=known.read_text().strip() if known.exists() else None,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        write_text(known, self._run.id)
        # A resumed training may log an iteration again: W&B's own step counts up only.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take a record."""
        self._run.log({**values, "iteration": iteration})

    def close(self) -> None:
        """Upload or write what is left."""
        self._run.finish()


class MlflowLogger:
    """A run of MLflow at ``MLFLOW_TRACKING_URI``, or in ``RUN/mlflow.db`` where that is not set.

    Its experiment is ``MLFLOW_EXPERIMENT_NAME``, or ``proxydet``. A resumed training resumes its run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], iteration: int) -> None:  # noqa: ARG002
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=address)
        self._metric: Any = Metric
        known = folder / "mlflow_run_id.txt"
        if known.exists():
            self._run = known.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "proxydet")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        parameters = [Param(key, str(value)[:500]) for key, value in _leaves(config)]
        for start in range(0, len(parameters), 100):  # as many as it takes at once
            self._client.log_batch(self._run, params=parameters[start : start + 100])
        write_text(known, self._run)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take a record."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, iteration) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _leaves(mapping: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def find_loggers(config: LogConfig) -> dict[str, type[Logger]]:
    """Return what makes each logger, by name or Python path.

    Raises:
        ConfigError: One at a Python path is not there, or cannot be called as a logger is.
        MissingDependencyError: The package of one is not installed.
    """
    own = (TensorBoardLogger, WandbLogger, MlflowLogger)
    known: dict[str, type[Logger]] = dict(zip(LOGGERS, own, strict=True))
    found: dict[str, type[Logger]] = {}
    key = "training.log.loggers"
    for name in (*["tensorboard"] * config.tensorboard, *config.loggers):
        if name in known:
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(
                    f"{key} holds {name}, and the package {name} is not installed",
                    hint=f"run: pip install 'proxydet[{name}]'",
                )
            found[name] = known[name]
            continue
        made = load_extension(name, key)
        require_signature(made, key, name, "folder", "config", "iteration")
        for method, positional in (("log", 3), ("close", 1)):  # with self
            function = getattr(made, method, None)
            require_signature(function, key, f"{name}.{method}", positional=positional)
        found[name] = made
    return found


class MetricLogger:
    """Collects steps into records, on the main process.

    Between two records the losses are summed up in the state's ``window``, which checkpoints hold. A loss that some batches do
    not have (mask loss, on image-label batches) is averaged over those that have it.

    Args:
        folder: The run folder.
        config: How often, and where the records also go.
        ranks: This process; all others record nothing.
        state: Of the training, as it is resumed; records after it are removed.
        task: Where progress is shown.

    Attributes:
        last: Mean losses of the newest record.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: LogConfig,
        *,
        ranks: DistInfo,
        state: TrainingState,
        task: Task,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._state = state
        self._task = task
        self._metrics = JsonLines(folder.metrics)
        self._evaluations = JsonLines(folder.evaluations)
        self._loggers: dict[str, Logger] = {}
        self._shown = state.iteration
        self._restart_clock(0.0)
        self.last: dict[str, float] = {}
        if ranks.is_main:
            then = f"training continues after iteration {state.iteration}"
            recorded = state.window.get("images", 0) < state.images
            if recorded and not folder.metrics.exists():
                logger.warning("%s is missing: its records are lost; %s", folder.metrics, then)
            for lines in (self._metrics, self._evaluations):
                lines.keep(lambda record: iteration_of(record) <= state.iteration, then=then)
            settings = json.loads(state.run).get("configuration", {}) if state.run else {}
            for name, make in find_loggers(config).items():
                with self._reported(name):
                    self._loggers[name] = make(
                        folder=folder.root, config=settings, iteration=state.iteration
                    )

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *error: object) -> None:
        for name, other in list(self._loggers.items()):
            with self._reported(name):
                other.close()

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Report what a logger raises, once, and leave it out from then on: the training does not end by it."""
        try:
            yield
        except Exception as error:
            self._loggers.pop(name, None)
            logger.warning(
                "the logger %s failed and gets no more records (metrics.jsonl has them all): %s: %s",
                name,
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            logger.debug("the logger %s failed", name, exc_info=True)

    def step(self, result: StepResult, waited: float, *, record: bool) -> None:
        """Take a step into account; the state already counts it.

        Args:
            result: What the step did.
            waited: Seconds that the run has waited for data so far.
            record: Whether a record ends with this step.
        """
        state, window = self._state, self._state.window
        window["images"] = window.get("images", 0) + result.images
        if not result.skipped:
            window["steps"] = window.get("steps", 0) + 1
            for kind, values in (("losses", result.losses), ("shares", result.shares)):
                sums = window.setdefault(kind, {})
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
        self._clocked_steps += 1
        self._clocked_images += result.images
        advance, self._shown = state.iteration - self._shown, state.iteration
        if not record:
            self._task.advance(advance)
            return
        losses, shares = window.get("losses", {}), window.get("shares", {})
        self.last = {
            "total": sum(losses.values()) / max(window.get("steps", 0), 1),
            **{n: value / shares[n] if shares[n] else 0.0 for n, value in losses.items()},
        }
        seconds = max(time.perf_counter() - self._clock_start, 1e-9)
        speed = {
            "step_seconds": round(seconds / self._clocked_steps, 6),
            "data_seconds": round((waited - self._waited) / self._clocked_steps, 6),
        }
        images_per_second = round(self._clocked_images / seconds, 3)
        memory, rate = round(memory_mib(self._ranks.device), 1), result.learning_rate
        shown = {"lr": rate, "it/s": float(state.progress - self._clocked_from) / seconds}
        shown |= {"data s": speed["data_seconds"], "MiB": memory}
        self._task.advance(advance, **self.last, **shown)
        self._restart_clock(waited)
        state.window = {}
        if not self._ranks.is_main:
            return
        self._metrics.append(
            {
                "iteration": state.iteration,
                "images": state.images,
                "losses": self.last,
                "learning_rate": rate,
                **speed,
                "images_per_second": images_per_second,
                "memory_mib": memory,
                "skipped": state.skipped,
                "time": round(time.time(), 3),
            }
        )
        scalars = {f"loss/{name}": value for name, value in self.last.items()}
        scalars |= {
            f"train/{name}": value for name, value in {"learning_rate": rate, **speed}.items()
        }
        self._to_loggers(scalars)

    def batches(self, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Write down what a step is made of, where it was something else before: when the run began, or by the last such record."""
        if not self._ranks.is_main:
            return
        for record in self._metrics.read():
            began = record.get("batches", began)
        if now != began:
            self._metrics.append({"iteration": self._state.iteration, "batches": dict(now)})

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Write down the metrics of an evaluation of the present weights."""
        if not self._ranks.is_main:
            return
        self._evaluations.append({"iteration": self._state.iteration, "metrics": metrics})
        self._to_loggers({f"evaluation/{name}": value for name, value in metrics.items()})

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return the metrics of each evaluation so far by iteration, oldest first (main process only)."""
        return read_evaluations(self._evaluations)

    def _restart_clock(self, waited: float) -> None:
        self._clock_start, self._waited = time.perf_counter(), waited
        self._clocked_from = self._state.progress
        self._clocked_steps = self._clocked_images = 0

    def _to_loggers(self, values: dict[str, float]) -> None:
        for name, other in list(self._loggers.items()):
            with self._reported(name):
                other.log(values, self._state.iteration)


def read_evaluations(lines: JsonLines) -> dict[int, dict[str, float]]:
    """Return the metrics of a run's evaluations by iteration; records that are not such are passed over."""
    return {
        iteration_of(record): record["metrics"]
        for record in lines.read()
        if iteration_of(record) < sys.maxsize and _are_numbers(record.get("metrics"))
    }


def best_of(evaluations: Mapping[int, Mapping[str, float]], metric: str | None) -> Best | None:
    """Return the best of a run's evaluations, the first of equal ones; None where none is known.

    An evaluation that does not report the metric, as it was made with other settings, or reports NaN or infinity, is passed
    over.

    Args:
        evaluations: Metrics by iteration.
        metric: Which one decides; None takes the first of the newest evaluation.
    """
    if metric is None and evaluations:
        metric = next(iter(evaluations[max(evaluations)]), None)
    best: Best | None = None
    for iteration, metrics in evaluations.items():
        value = metrics.get(metric, math.nan) if metric is not None else math.nan
        if math.isfinite(value) and (best is None or value > best.value):
            best = Best(iteration=iteration, metric=str(metric), value=value)
    return best


def stopped_early(
    evaluations: Mapping[int, Mapping[str, float]], schedule: EvaluationSchedule
) -> bool:
    """Return whether the newest evaluations, as many as ``patience`` says, gave no new best value of the metric.

    An evaluation that does not report the metric is passed over, as in `best_of`.
    """
    best = best_of(evaluations, schedule.metric)
    if best is None or schedule.patience is None:
        return False
    later = [
        at for at, metrics in evaluations.items() if at > best.iteration and best.metric in metrics
    ]
    return len(later) >= schedule.patience


def read_steps(lines: JsonLines) -> list[dict[str, Any]]:
    """Return the records of a run's steps, oldest first; records that are not such are passed over."""
    return [
        record
        for record in lines.read()
        if iteration_of(record) < sys.maxsize
        and _are_numbers(record.get("losses"))
        and "total" in record["losses"]
    ]


def _are_numbers(values: object) -> bool:
    """Whether these are named numbers that a plot or a table can show."""
    found = list(values.values()) if isinstance(values, dict) else []
    return bool(found) and all(
        type(v) is float or (type(v) is int and abs(v) < sys.maxsize) for v in found
    )


def memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: on the GPU where it computes on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def iteration_of(record: Mapping[str, Any]) -> int:
    """Return the iteration that a record of a log belongs to; beyond all of them for one that names none."""
    iteration = record.get("iteration")
    known = type(iteration) is int and 0 <= iteration < sys.maxsize
    return int(iteration) if known else sys.maxsize  # type: ignore[arg-type]
