"""One process of the check: repeats the same training steps, and writes down what they gave, bit by bit.

Run as a module by :mod:`proxydet.runtime.determinism` with the paths of its job and of its answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import Tensor

from proxydet.config import from_mapping
from proxydet.data.batches import Batch, BoxBatch, ImageLabelBatch
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.losses.criterion import Criterion
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import RunConfig
from proxydet.runtime.modes import Mode
from proxydet.runtime.roi_align import apply_mode
from proxydet.training.checkpoint import TrainingState
from proxydet.training.distributed import DistInfo, choose_device
from proxydet.training.step import (
    StepResult,
    TrainingModel,
    apply_precision,
    build_optimizer,
    build_scaler,
    seed_everything,
    train_step,
)
from proxydet.vocabulary.vocabulary import Vocabulary

_MOST_OBJECTS = 12
_SMALLEST_SIDE = 8.0


def random_vocabulary(classes: int, dimension: int) -> Vocabulary:
    """Return classes with random embeddings, seven in ten of them base.

    Args:
        classes: How many.
        dimension: Of the embeddings.
    """
    generator = np.random.default_rng(0)
    return Vocabulary.from_arrays(
        [f"class {index}" for index in range(classes)],
        generator.normal(size=(classes, dimension)).astype(np.float32),
        np.arange(classes) % 10 < 7,
    )


def random_batches(config: DataConfig, classes: int) -> list[Batch]:
    """Return a batch of each source of a configuration, of full size.

    Args:
        config: The sizes.
        classes: Labels are below this number.
    """
    generator = np.random.default_rng(1)
    batches: list[Batch] = [_boxes(config.boxes, classes, generator)]
    if config.image_labels is not None:
        batches.append(_labels(config.image_labels, classes, generator))
    return batches


def _boxes(source: SourceConfig, classes: int, generator: np.random.Generator) -> BoxBatch:
    count, side = source.batch_size, source.size
    return BoxBatch(
        images=_images(count, side, generator),
        instances=tuple(_objects(side, classes, generator) for _ in range(count)),
        image_ids=tuple(range(count)),
    )


def _labels(source: SourceConfig, classes: int, generator: np.random.Generator) -> ImageLabelBatch:
    count = source.batch_size
    labels = generator.integers(0, classes, size=(count, 1))
    return ImageLabelBatch(
        images=_images(count, source.size, generator),
        labels=tuple(torch.from_numpy(row) for row in labels),
        image_ids=tuple(range(count)),
    )


def _images(count: int, side: int, generator: np.random.Generator) -> tuple[torch.Tensor, ...]:
    pixels = generator.integers(0, 256, size=(count, 3, side, side), dtype=np.uint8)
    return tuple(torch.from_numpy(image) for image in pixels)


def _objects(side: int, classes: int, generator: np.random.Generator) -> Instances:
    count = int(generator.integers(1, _MOST_OBJECTS + 1))
    corners_N22 = np.sort(generator.uniform(0, side, size=(count, 2, 2)), axis=1)
    low_N2, high_N2 = corners_N22[:, 0], corners_N22[:, 1]
    low_N2 = np.minimum(low_N2, side - _SMALLEST_SIDE)
    boxes_N4 = np.concatenate([low_N2, np.maximum(high_N2, low_N2 + _SMALLEST_SIDE)], axis=1)
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.from_numpy(boxes_N4).float())
    instances.gt_classes = torch.from_numpy(generator.integers(0, classes, size=count))
    instances.gt_masks = PolygonMasks([[_diamond(box)] for box in boxes_N4])
    return instances


def _diamond(box: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    return [middle_x, y1, x2, middle_y, middle_x, y2, x1, middle_y]


_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process is to do."""

    configuration: dict[str, Any]
    """A `RunConfig` as plain values."""

    mode: Mode
    """The reproducibility mode."""

    device: str
    """``cpu`` or ``cuda``."""

    steps: int
    """Steps of a repetition."""

    repetitions: int
    """Times to run them."""

    classes: int
    """Size of the vocabulary."""


@dataclass
class StepRecord:
    """What one step gave: digests by name, in the order of computation."""

    digests: dict[str, str] = field(default_factory=dict)
    """``loss NAME``, ``gradient of NAME``, ``weight NAME`` to the digest of its bits."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients on the CPU, of the first repetition only."""


def run(job: Job) -> dict[str, Any]:
    """Do a job.

    Returns:
        Time, memory and losses of the steps; digests of the first repetition; for the others, the first difference
        and how many gradient elements differ.
    """
    apply_mode(job.mode)
    config = from_mapping(RunConfig, job.configuration)
    bench = Bench(config, job)
    cost = bench.measure()
    first = bench.repeat(None)
    others = [bench.repeat(first) for _ in range(job.repetitions - 1)]
    return {
        **cost,
        "device": bench.device_name,
        "elements": sum(g.numel() for step in first.steps for g in step.gradients.values()),
        "digests": [step.digests for step in first.steps],
        "differing": [{"first": other.first, "elements": other.elements} for other in others],
    }


@dataclass
class _Repetition:
    steps: list[StepRecord] = field(default_factory=list)
    first: list[Any] | None = None
    elements: int = 0


class Bench:
    """A network in training on batches of noise, whose steps can be repeated from the same start.

    Args:
        config: What is trained.
        job: How it is repeated; its mode must be in force.
    """

    def __init__(self, config: RunConfig, job: Job) -> None:
        self._config = config
        self._job = job
        self._device = choose_device(job.device)
        seed_everything(config.seed)
        vocabulary = random_vocabulary(job.classes, config.model.classifier.embedding_dim)
        self._network = ProxyDetNetwork(config.model, vocabulary).to(self._device)
        apply_precision(self._network, config.training.precision)
        self._network.train()
        self._batches: list[Batch] = random_batches(config.data, job.classes)
        self._start = {k: v.cpu().clone() for k, v in self._network.state_dict().items()}
        self.device_name = "cpu"
        if self._device.type == "cuda":
            self.device_name = torch.cuda.get_device_name(self._device)

    def step(self) -> dict[str, float]:
        """Take the first step from the start, and return its losses."""
        return self._step(self._fresh(), 0).losses

    def measure(self) -> dict[str, Any]:
        """Time the steps and take their memory, with nothing recorded; one step goes ahead to warm up."""
        before = _resident_mib()
        state = self._fresh()
        times: list[tuple[float, float]] = []
        losses: dict[str, float] = {}
        for step in range(self._job.steps + 1):
            start, start_cpu = time.perf_counter(), time.process_time()
            result = self._step(state, step)
            self._wait()
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

    def repeat(self, reference: _Repetition | None) -> _Repetition:
        """Run the steps from the start; compare each with the reference, or become it."""
        state = self._fresh()
        repetition = _Repetition()
        names = {id(p): name for name, p in self._network.named_parameters()}
        record = StepRecord()
        state.optimizer.register_step_pre_hook(
            lambda optimizer, *_: _take_gradients(optimizer, names, record)
        )
        for step in range(self._job.steps):
            record.digests, record.gradients = {}, {}
            result = self._step(state, step)
            done = StepRecord(
                digests={f"loss {name}": value.hex() for name, value in result.losses.items()},
                gradients=record.gradients,
            )
            done.digests |= {f"gradient of {n}": _digest(g) for n, g in record.gradients.items()}
            weights = self._network.state_dict().items()
            done.digests |= {f"weight {name}": _digest(value) for name, value in weights}
            if reference is None:
                repetition.steps.append(done)
            else:
                _compare(repetition, reference.steps[step], done, step)
        return repetition

    def _step(self, state: TrainingState, step: int) -> StepResult:
        return train_step(
            state,
            [self._batch(step)],
            # One batch is an iteration.
            config=dataclasses.replace(self._config.training, replicas=1),
            ranks=DistInfo(device=self._device),
            failures=Path(tempfile.gettempdir()),
        )

    def _fresh(self) -> TrainingState:
        config = self._config
        self._network.load_state_dict(self._start)
        model = TrainingModel(
            self._network,
            Criterion(config.losses),
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

    def _batch(self, step: int) -> Batch:
        return self._batches[step % len(self._batches)]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _take_gradients(
    optimizer: torch.optim.Optimizer, names: dict[int, str], record: StepRecord
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                record.gradients[names[id(parameter)]] = parameter.grad.detach().cpu().clone()


def _compare(repetition: _Repetition, first: StepRecord, other: StepRecord, step: int) -> None:
    for name, gradient in {**first.gradients, **other.gradients}.items():
        if name in first.gradients and name in other.gradients:
            repetition.elements += _differing(first.gradients[name], other.gradients[name])
        else:
            repetition.elements += gradient.numel()
    where = first_other(first.digests, other.digests)
    if repetition.first is None and where is not None:
        repetition.first = [step, where]


def first_other(first: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Name the first digest that differs, or that only one of two steps has; None where all are equal."""
    names = {**first, **other}
    return next((name for name in names if first.get(name) != other.get(name)), None)


def _differing(first: Tensor, other: Tensor) -> int:
    # Bits are compared: two NaN of one pattern are equal, 0 and -0 are not.
    return int((_bits(first) != _bits(other)).sum())


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=12).hexdigest()


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / _MIB


def read_job(path: Path) -> Job:
    """Read a job that :func:`write_job` wrote."""
    return Job(**json.loads(path.read_text(encoding="utf-8")))


def write_job(path: Path, job: Job) -> None:
    """Write a job to a file."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


if __name__ == "__main__":
    answer = run(read_job(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
