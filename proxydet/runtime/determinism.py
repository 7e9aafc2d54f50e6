"""Repeats training steps in fresh processes, mode by mode, and compares everything they give bit by bit."""

from __future__ import annotations

import hashlib
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
import torchvision
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import Tensor

from proxydet.config import from_mapping, to_mapping
from proxydet.data.config import DataConfig
from proxydet.data.loader import Batch, BoxBatch, ImageLabelBatch
from proxydet.errors import RuntimeEnvironmentError
from proxydet.losses.criterion import build_criterion
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import RunConfig
from proxydet.reporting import SILENT, Progress
from proxydet.runtime.modes import MODES, Mode, apply_mode
from proxydet.runtime.processes import call_in_new_process
from proxydet.training.checkpoint import TrainingState
from proxydet.training.distributed import DistInfo, choose_device
from proxydet.training.step import (
    StepResult,
    TrainingModel,
    apply_precision,
    build_optimizer,
    build_scaler,
    check_precision,
    seed_everything,
    train_step,
)
from proxydet.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Part:
    """The first place at which a repetition differs from the first run."""

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
    """Where the first differing repetition differs from the first run; None where all are identical."""
    step_seconds: float
    """Time of a step: the median of a process's steps, the smaller of the processes'."""
    step_cpu_seconds: float
    """Processor time of a step over all threads, taken like ``step_seconds``: other work on the machine changes it
    least."""
    memory_mib: float
    """Most memory during the steps: allocated on the GPU, or on the CPU what the steps added to the process."""
    losses: dict[str, float]
    """Losses of the first step."""
    identical: bool
    """Whether every repetition gave the same bits."""


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


LVIS_CLASSES = 1203
PROCESSES = 2
"""Fresh processes in each mode: what differs between processes does not show within one."""


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

    The steps are those of training (network, losses, mixed precision, clipping, optimizer) on batches of noise of the
    configuration's sizes, alternately of each source.

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
        ConfigError: The device does not support the configuration's number format.
        RuntimeEnvironmentError: There is no such device, or a process failed.
    """
    check_precision(config.training.precision, choose_device(device))
    settings: dict[str, Any] = {"steps": steps, "repetitions": repetitions, "classes": LVIS_CLASSES}
    found: dict[Mode, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with progress.task("repeating steps", total=len(modes) * PROCESSES, unit="processes") as task:
        # Modes alternate: a machine that slows down meanwhile slows each of them.
        for mode in [*modes] * PROCESSES:
            task.describe(f"repeating steps, mode {mode}")
            try:
                plain = to_mapping(config)
                answer = call_in_new_process(
                    __name__, "repeat_steps", config=plain, mode=mode, device=device, **settings
                )
            except RuntimeEnvironmentError as error:
                raise RuntimeEnvironmentError(
                    f"The steps do not run in mode {mode}: {error.message}",
                    hint="try --recipe tiny; run: proxydet env --check",
                ) from error
            found[mode].append(answer)
            task.advance()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return DeterminismReport(
        device=next((answers[0]["device"] for answers in found.values()), device),
        recipe=config.recipe,
        steps=steps,
        processes=PROCESSES,
        versions={**versions, "cuda": torch.version.cuda or "none"},
        modes=tuple(summarize(mode, answers) for mode, answers in found.items()),
    )


def summarize(mode: Mode, found: Sequence[Mapping[str, Any]]) -> ModeResult:
    """Compare what :func:`repeat_steps` returned in each process of one mode.

    Repetitions are compared with the first of their process, and that with the first of process 0.
    """
    parts = []
    for process, answer in enumerate(found):
        for step, digests in enumerate(zip(found[0]["digests"], answer["digests"], strict=True)):
            where = first_difference(*digests)
            if where is not None:
                parts.append(Part(process=process, repetition=0, step=step, where=where))
                break
        for number, other in enumerate(answer["differing"], start=1):
            if other["first"] is not None:
                step, where = other["first"]
                parts.append(Part(process=process, repetition=number, step=step, where=where))
    others = [other for answer in found for other in answer["differing"]]
    return ModeResult(
        mode=mode,
        repetitions=len(found) + len(others),
        differing_repetitions=len(parts),
        gradient_elements=found[0]["elements"],
        differing_elements=max((other["elements"] for other in others), default=0),
        first_difference=parts[0] if parts else None,
        step_seconds=min(answer["step_seconds"] for answer in found),
        step_cpu_seconds=min(answer["step_cpu_seconds"] for answer in found),
        memory_mib=max(answer["memory_mib"] for answer in found),
        losses=found[0]["losses"],
        identical=not parts,
    )


# ---- in the fresh process --------------------------------------------------------------------------------------------


def repeat_steps(
    config: Mapping[str, Any], mode: Mode, device: str, steps: int, repetitions: int, classes: int
) -> dict[str, Any]:
    """Repeat training steps from the same start; puts the process into the mode.

    ``config`` is a `RunConfig` as plain values, ``classes`` the size of the vocabulary.

    Returns:
        Time, memory and losses of the steps; digests of the first repetition; for the others, the first difference
        and how many gradient elements differ.
    """
    apply_mode(mode)
    bench = Bench(from_mapping(RunConfig, config), device=device, classes=classes)
    cost = bench.measure(steps)
    first = bench.repeat(steps)
    others = [compare(first, bench.repeat(steps)) for _ in range(repetitions - 1)]
    return {
        **cost,
        "device": bench.device_name,
        "elements": sum(g.numel() for step in first for g in step.gradients.values()),
        "digests": [step.digests for step in first],
        "differing": others,
    }


@dataclass
class StepRecord:
    """What one step gave."""

    digests: dict[str, str]
    """``loss NAME``, ``gradient of NAME``, ``weight NAME`` to the digest of its bits, in the order of computation."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients by parameter, on the CPU."""


class Bench:
    """A network in training on batches of noise, whose steps can be repeated from the same start.

    Args:
        config: What is trained.
        device: ``cpu`` or ``cuda``.
        classes: Size of the vocabulary.
    """

    def __init__(self, config: RunConfig, *, device: str, classes: int) -> None:
        self._config = config
        self._device = choose_device(device)
        seed_everything(config.seed)
        vocabulary = random_vocabulary(classes, config.model.classifier.embedding_dim)
        self._network = ProxyDetNetwork(config.model, vocabulary).to(self._device)
        apply_precision(self._network, config.training.precision)
        self._network.train()
        self._start = {k: v.cpu().clone() for k, v in self._network.state_dict().items()}
        self.batches: list[Batch] = random_batches(config.data, classes)
        self.device_name = "cpu"
        if self._device.type == "cuda":
            self.device_name = torch.cuda.get_device_name(self._device)

    def step(self) -> dict[str, float]:
        """Take the first step from the start, and return its losses."""
        return self._step(self._fresh(), 0).losses

    def measure(self, steps: int) -> dict[str, Any]:
        """Time the steps and take their memory, with nothing recorded, after one step to warm up."""
        before = resident_mib()
        state = self._fresh()
        times: list[tuple[float, float]] = []
        losses: dict[str, float] = {}
        for step in range(steps + 1):
            start, start_cpu = time.perf_counter(), time.process_time()
            result = self._step(state, step)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append((time.perf_counter() - start, time.process_time() - start_cpu))
            losses = losses or result.losses
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device) / _MIB
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        seconds, cpu_seconds = zip(*times[1:], strict=True)
        return {
            "step_seconds": statistics.median(seconds),
            "step_cpu_seconds": statistics.median(cpu_seconds),
            "memory_mib": memory,
            "losses": losses,
        }

    def repeat(self, steps: int) -> list[StepRecord]:
        """Run the steps from the start and record them."""
        state = self._fresh()
        names = {id(p): name for name, p in self._network.named_parameters()}
        gradients: dict[str, Tensor] = {}

        def take_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    gradients[names[id(parameter)]] = parameter.grad.detach().cpu().clone()

        state.optimizer.register_step_pre_hook(take_gradients)
        records = []
        for step in range(steps):
            gradients.clear()
            losses = self._step(state, step).losses
            digests = {f"loss {name}": value.hex() for name, value in losses.items()}
            digests |= {f"gradient of {name}": bits_digest(g) for name, g in gradients.items()}
            weights = self._network.state_dict().items()
            digests |= {f"weight {name}": bits_digest(value) for name, value in weights}
            records.append(StepRecord(digests, dict(gradients)))
        return records

    def _step(self, state: TrainingState, step: int) -> StepResult:
        return train_step(
            state,
            [self.batches[step % len(self.batches)]],
            config=self._config.training,
            step=Fraction(1),
            ranks=DistInfo(device=self._device),
            failures=Path(tempfile.gettempdir()),
        )

    def _fresh(self) -> TrainingState:
        config = self._config
        self._network.load_state_dict(self._start)
        model = TrainingModel(
            self._network,
            build_criterion(config.losses),
            device=self._device,
            touch_all=config.training.optimizer.unused_gradients == "zero",
        )
        return TrainingState(
            network=self._network,
            model=model,
            optimizer=build_optimizer(self._network.parameters(), config.training.optimizer),
            scaler=build_scaler(config.training.precision, self._device),
            seed=config.seed,
            replicas=1,
            # After warm-up, so that the steps move the weights.
            batches=config.training.schedule.warmup_iterations,
        )


def compare(first: Sequence[StepRecord], other: Sequence[StepRecord]) -> dict[str, Any]:
    """Compare a repetition with the first one.

    Returns:
        ``first``: step and name of the first difference, None where there is none; ``elements``: gradient elements
        whose bits differ. A gradient that only one of the two has differs in all elements.
    """
    found: dict[str, Any] = {"first": None, "elements": 0}
    for number, (mine, theirs) in enumerate(zip(first, other, strict=True)):
        where = first_difference(mine.digests, theirs.digests)
        if found["first"] is None and where is not None:
            found["first"] = [number, where]
        for name in mine.gradients.keys() | theirs.gradients.keys():
            pair = [step.gradients[name] for step in (mine, theirs) if name in step.gradients]
            # Bits are compared: two NaN of one pattern are equal, 0 and -0 are not.
            bits = [_bytes(gradient).reshape(-1, gradient.element_size()) for gradient in pair]
            differs = (bits[0] != bits[-1]).any(axis=1) if len(bits) == 2 else np.ones(len(bits[0]))
            found["elements"] += int(differs.sum())
    return found


_MIB = 2**20


def first_difference(first: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Name the first digest that differs, or that only one of two steps has; None where all are equal."""
    names = {**first, **other}
    return next((name for name in names if first.get(name) != other.get(name)), None)


def bits_digest(tensor: Tensor) -> str:
    """Digest of a tensor's bits, in hexadecimal."""
    return hashlib.blake2b(_bytes(tensor).data, digest_size=12).hexdigest()


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def resident_mib() -> float:
    """Memory that this process has in RAM, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / _MIB


# ---- noise -----------------------------------------------------------------------------------------------------------


def random_vocabulary(classes: int, dimension: int) -> Vocabulary:
    """Return classes with random embeddings, seven in ten of them base."""
    generator = np.random.default_rng(0)
    return Vocabulary.from_arrays(
        [f"class {index}" for index in range(classes)],
        generator.normal(size=(classes, dimension)).astype(np.float32),
        np.arange(classes) % 10 < 7,
    )


def random_batches(config: DataConfig, classes: int) -> list[Batch]:
    """Return a batch of each source of a configuration, of full size, with labels below ``classes``."""
    generator = np.random.default_rng(1)

    def images(count: int, side: int) -> tuple[Tensor, ...]:
        pixels = generator.integers(0, 256, size=(count, 3, side, side), dtype=np.uint8)
        return tuple(torch.from_numpy(image) for image in pixels)

    def objects(side: int) -> Instances:
        """Return up to 12 boxes anywhere in the image, no side below 8 pixels, each with a diamond for a mask."""
        count = int(generator.integers(1, 13))
        low_N2, high_N2 = np.sort(generator.uniform(0, side, size=(count, 2, 2)), axis=1).swapaxes(
            0, 1
        )
        low_N2 = np.minimum(low_N2, side - 8.0)
        boxes_N4 = np.concatenate([low_N2, np.maximum(high_N2, low_N2 + 8.0)], axis=1)
        instances = Instances((side, side))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes_N4).float())
        instances.gt_classes = torch.from_numpy(generator.integers(0, classes, size=count))
        instances.gt_masks = PolygonMasks(
            [
                [[(x1 + x2) / 2, y1, x2, (y1 + y2) / 2, (x1 + x2) / 2, y2, x1, (y1 + y2) / 2]]
                for x1, y1, x2, y2 in boxes_N4.tolist()
            ]
        )
        return instances

    count, side = config.boxes.batch_size, config.boxes.size
    pixels, ids = images(count, side), tuple(range(count))
    instances = tuple(objects(side) for _ in range(count))
    batches: list[Batch] = [BoxBatch(images=pixels, instances=instances, image_ids=ids)]
    if config.image_labels is not None:
        count, side = config.image_labels.batch_size, config.image_labels.size
        labels = tuple(map(torch.from_numpy, generator.integers(0, classes, size=(count, 1))))
        pixels, ids = images(count, side), tuple(range(count))
        batches.append(ImageLabelBatch(images=pixels, labels=labels, image_ids=ids))
    return batches
