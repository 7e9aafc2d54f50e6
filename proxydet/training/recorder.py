"""Writes down what each step did, and shows it."""

from __future__ import annotations

import time
from typing import Any

from proxydet.files import JsonLines
from proxydet.reporting import Task
from proxydet.training.config import LogConfig
from proxydet.training.distributed import DistInfo
from proxydet.training.logs import Clock, LossWindow, TensorBoard, memory_mib
from proxydet.training.runfolder import RunFolder
from proxydet.training.state import TrainingState
from proxydet.training.step import StepResult


class Recorder:
    """Collects steps into records, on the main process.

    Args:
        folder: The run folder.
        config: How often, and whether for TensorBoard.
        ranks: This process; all others record nothing.
        state: Of the training, as it is resumed.
        task: Where progress is shown.
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
        self._window = LossWindow(state.window)
        self._metrics = JsonLines(folder.metrics)
        self._evaluations = JsonLines(folder.evaluations)
        self._clock = Clock()
        self._tensorboard: TensorBoard | None = None
        if ranks.is_main:
            self._metrics.keep(lambda record: record["iteration"] <= state.iteration)
            self._evaluations.keep(lambda record: record["iteration"] <= state.iteration)
            if config.tensorboard:
                self._tensorboard = TensorBoard(folder.tensorboard, state.iteration)
        self.last: dict[str, float] = {}
        """Mean losses of the newest record."""

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def step(self, result: StepResult, waited: float, *, last: bool) -> None:
        """Take a step into account; the state already counts it.

        Args:
            result: What the step did.
            waited: Seconds that the run has waited for data so far.
            last: Whether this is the last step, which is recorded whatever the period.
        """
        self._window.add(result)
        iteration = self._state.iteration
        if last or iteration % self._config.period == 0:
            self._record(result, waited, iteration)
        else:
            self._task.advance(1)
        self._state.window = self._window.state_dict()

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Write down the metrics of an evaluation of the present weights."""
        if not self._ranks.is_main:
            return
        iteration = self._state.iteration
        self._evaluations.append({"iteration": iteration, "metrics": metrics})
        if self._tensorboard is not None:
            self._tensorboard.add({f"evaluation/{k}": v for k, v in metrics.items()}, iteration)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return the metrics of each evaluation so far by iteration, oldest first (main process only)."""
        return {record["iteration"]: record["metrics"] for record in self._evaluations.read()}

    def _record(self, result: StepResult, waited: float, iteration: int) -> None:
        self.last = self._window.means()
        speed = self._clock.lap(waited, self._window.steps)
        memory = round(memory_mib(self._ranks.device), 1)
        images_per_second = self._window.images / max(
            speed["step_seconds"] * self._window.steps, 1e-9
        )
        shown: dict[str, str | float] = {
            **self.last,
            "lr": result.learning_rate,
            "it/s": 1 / max(speed["step_seconds"], 1e-9),
            "data s": speed["data_seconds"],
            "MiB": memory,
        }
        self._task.advance(1, **shown)
        self._window = LossWindow()
        if not self._ranks.is_main:
            return
        record: dict[str, Any] = {
            "iteration": iteration,
            "losses": self.last,
            "learning_rate": result.learning_rate,
            **speed,
            "images_per_second": round(images_per_second, 3),
            "memory_mib": memory,
            "skipped": self._state.skipped,
            "time": round(time.time(), 3),
        }
        self._metrics.append(record)
        if self._tensorboard is not None:
            scalars = {f"loss/{name}": value for name, value in self.last.items()}
            scalars["train/learning_rate"] = result.learning_rate
            scalars.update({f"train/{name}": value for name, value in speed.items()})
            self._tensorboard.add(scalars, iteration)
