"""Repeats training steps in fresh processes, mode by mode, and compares everything they give bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxydet.config import to_mapping
from proxydet.errors import EnvironmentProblem
from proxydet.recipes import RunConfig
from proxydet.reporting import SILENT, Progress
from proxydet.runtime.determinism_worker import Job, first_other, write_job
from proxydet.runtime.modes import MODES, Mode
from proxydet.training.distributed import choose_device
from proxydet.training.step import check_precision


@dataclass(frozen=True, kw_only=True)
class Part:
    """The first place at which a repetition left the first run."""

    process: int
    """Number of the process, from 0; the first run is in process 0."""

    repetition: int
    """Number of the repetition in that process, from 0."""

    step: int
    """Step, from 0."""

    where: str
    """``loss NAME``, ``gradient of NAME`` or ``weight NAME``: of several, losses come first, then gradients."""


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """What one reproducibility mode gave."""

    mode: Mode
    """The mode."""

    repetitions: int
    """Times that the same steps were run, over all processes."""

    differing_repetitions: int
    """How many differ in any bit of a loss, gradient or weight: from the first of their process, and the first of a
    process from that of process 0."""

    gradient_elements: int
    """Gradient elements of one repetition, all steps together."""

    differing_elements: int
    """The most gradient elements in which a repetition differs from the first one of its process."""

    first_difference: Part | None
    """Where the first differing repetition left the first run; None where all are identical."""

    step_seconds: float
    """Time of a step: the median of a process's steps, the smaller of the processes'."""

    step_cpu_seconds: float
    """Processor time of a step over all threads, taken like ``step_seconds``: what other work on the machine disturbs
    least."""

    memory_mib: float
    """Most memory during the steps: allocated on the GPU, or on the CPU what the steps added to the process."""

    losses: dict[str, float]
    """Losses of the first step."""

    @property
    def identical(self) -> bool:
        """Whether every repetition gave the same bits."""
        return self.differing_repetitions == 0


@dataclass(frozen=True, kw_only=True)
class DeterminismReport:
    """What repeating training steps showed, mode by mode."""

    device: str
    """``cpu``, or the GPU's name."""

    recipe: str
    """The configuration's recipe."""

    steps: int
    """Steps of one repetition."""

    processes: int
    """Fresh processes in each mode."""

    versions: dict[str, str]
    """torch, torchvision and CUDA."""

    modes: tuple[ModeResult, ...]
    """One result a mode."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        plain = asdict(self)
        plain["modes"] = [{**asdict(mode), "identical": mode.identical} for mode in self.modes]
        return plain


LVIS_CLASSES = 1203
PROCESSES = 2
"""Fresh processes in each mode: what differs between processes does not show within one."""

_WORKER = "proxydet.runtime.determinism_worker"


def verify_determinism(
    config: RunConfig,
    *,
    modes: Sequence[Mode] = MODES,
    device: str = "cpu",
    steps: int = 2,
    repetitions: int = 2,
    progress: Progress = SILENT,
) -> DeterminismReport:
    """Run the same training steps over and over and compare losses, gradients and weights bit by bit.

    The steps are those of training (network, losses, mixed precision, clipping, optimiser) on batches of noise of the
    configuration's sizes, one of each source in turn.

    Args:
        config: What is trained; its data is not read.
        modes: Reproducibility modes to try.
        device: ``cpu`` or ``cuda``.
        steps: Steps of one repetition.
        repetitions: Times to run them in each of two fresh processes.
        progress: Where progress is shown.

    Returns:
        For each mode, whether all repetitions were identical, where the first difference was, time and memory.

    Raises:
        ConfigError: The device cannot do the configuration's number format.
        EnvironmentProblem: There is no such device, or a process failed.
    """
    check_precision(config.training.precision, choose_device(device))
    jobs = {
        mode: Job(
            configuration=to_mapping(config),
            mode=mode,
            device=device,
            steps=steps,
            repetitions=repetitions,
            classes=LVIS_CLASSES,
        )
        for mode in modes
    }
    found: dict[Mode, list[dict[str, Any]]] = {mode: [] for mode in jobs}
    with progress.task("repeating steps", total=len(jobs) * PROCESSES, unit="processes") as task:
        # Modes take turns: a machine that slows down meanwhile slows each of them.
        for mode, job in [*jobs.items()] * PROCESSES:
            task.describe(f"repeating steps, mode {mode}")
            found[mode].append(_run_process(job))
            task.advance()
    return DeterminismReport(
        device=next((answers[0]["device"] for answers in found.values()), device),
        recipe=config.recipe,
        steps=steps,
        processes=PROCESSES,
        versions=_versions(),
        modes=tuple(_summarise(mode, answers, repetitions) for mode, answers in found.items()),
    )


def _run_process(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="proxydet-determinism-") as folder:
        question, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        write_job(question, job)
        command = [sys.executable, "-m", _WORKER, str(question), str(answer)]
        done = subprocess.run(  # noqa: S603 - a list, no shell, our own module
            command, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no message"])[-1]
            raise EnvironmentProblem(
                f"The steps do not run in mode {job.mode} (exit code {done.returncode}): {last}",
                hint="try --recipe tiny; run: proxydet env --check",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _summarise(mode: Mode, found: list[dict[str, Any]], repetitions: int) -> ModeResult:
    parts = list(_parts(found))
    differing = [
        process
        for process, answer in enumerate(found)
        if process > 0 and answer["digests"] != found[0]["digests"]
    ]
    within = [other["first"] is not None for answer in found for other in answer["differing"]]
    return ModeResult(
        mode=mode,
        repetitions=repetitions * len(found),
        differing_repetitions=len(differing) + sum(within),
        gradient_elements=found[0]["elements"],
        differing_elements=max(
            (other["elements"] for answer in found for other in answer["differing"]), default=0
        ),
        first_difference=parts[0] if parts else None,
        step_seconds=min(answer["step_seconds"] for answer in found),
        step_cpu_seconds=min(answer["step_cpu_seconds"] for answer in found),
        memory_mib=max(answer["memory_mib"] for answer in found),
        losses=found[0]["losses"],
    )


def _parts(found: list[dict[str, Any]]) -> list[Part]:
    parts = []
    for process, answer in enumerate(found):
        across = _first_other(found[0]["digests"], answer["digests"])
        if across is not None:
            parts.append(Part(process=process, repetition=0, step=across[0], where=across[1]))
        for number, other in enumerate(answer["differing"], start=1):
            if other["first"] is not None:
                step, where = other["first"]
                parts.append(Part(process=process, repetition=number, step=step, where=where))
    return parts


def _first_other(
    first: list[dict[str, str]], other: list[dict[str, str]]
) -> tuple[int, str] | None:
    for step, (mine, theirs) in enumerate(zip(first, other, strict=True)):
        name = first_other(mine, theirs)
        if name is not None:
            return step, name
    return None


def _versions() -> dict[str, str]:
    import torch
    import torchvision

    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda or "none",
    }
