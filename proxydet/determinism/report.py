"""What repeating training steps showed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from proxydet.compat.modes import Mode


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
