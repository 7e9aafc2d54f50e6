"""The stream of training batches: planned in the training process, made in worker processes.

Which images a batch holds and how they are augmented is decided by numbers that travel with the plan, so workers keep no
state, and batches are the same with any number of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from proxydet.data.batches import Batch, BoxBatch, ImageLabelBatch
from proxydet.data.config import DataConfig
from proxydet.data.images import quiet_worker
from proxydet.data.samplers import PlannedBatch
from proxydet.data.sources import BoxSample, LabelSample
from proxydet.data.training_sources import TrainingSources
from proxydet.errors import DataError, EnvironmentProblem, ProxydetError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in a run."""

    rank: int
    """Number of the process."""
    world_size: int
    """How many processes there are."""
    seed: int
    """Of the run, at least 0."""
    start: int = 0
    """What the run has used before: batches of all processes, or, where these share a group, batches of one."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} processes")
        if self.seed < 0 or self.start < 0:
            raise ValueError("seed and start must not be negative")


class TrainingLoader:
    """Iterates over the batches of one process, without end.

    Each `iter` starts at the place's start, with workers of its own, which end when the iterator is dropped or closed.

    Attributes:
        skipped: Number of images left out so far because they cannot be read (only where the configuration asks for it).

    Args:
        sources: What batches are made of.
        config: Workers and batching.
        place: Process, seed and first iteration.

    Raises:
        DataError: there is no image to train on.
    """

    def __init__(self, sources: TrainingSources, config: DataConfig, place: Place) -> None:
        self.sources = sources
        self.place = place
        self.skipped = 0
        self._config = config
        self._plan = sources.plan(config, seed=place.seed)

    def planned(self, iteration: int) -> PlannedBatch:
        """Return which images the batch of an iteration, counted from the place's start, holds."""
        place = self.place
        return self._plan.batch(
            iteration, rank=place.rank, world_size=place.world_size, start=place.start
        )

    def batch(self, iteration: int) -> Batch:
        """Make the batch of one iteration here, in this process (to look at it, or to repeat it).

        Raises:
            DataError: an image cannot be read.
        """
        made = BatchMaker(self.sources, self._config)[self.planned(iteration)]
        if isinstance(made, ProxydetError):
            raise made
        return made

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        workers = config.workers
        loader: DataLoader[Any] = DataLoader(
            BatchMaker(self.sources, config),
            batch_size=None,
            sampler=_Plans(self),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=quiet_worker,
            prefetch_factor=config.prefetch if workers else None,
            timeout=config.worker_timeout_s if workers else 0,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: making workers must not move the global one, which belongs to training.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        while True:
            yield self._checked(next_from_workers(batches, config))

    def _checked(self, made: Batch | ProxydetError) -> Batch:
        if isinstance(made, ProxydetError):
            raise made
        for name in made.skipped:
            self.skipped += 1
            _logger.warning("image %s cannot be read; left out (%d so far)", name, self.skipped)
        return made


class BatchMaker(Dataset[Any]):
    """Makes the batch that a plan asks for; what workers run.

    An error that a user can cause is returned, not raised: torch would bury it in text.
    """

    def __init__(self, sources: TrainingSources, config: DataConfig) -> None:
        self._boxes = sources.boxes
        self._labels = sources.labels
        self._skip = config.unreadable_images == "skip"

    def __getitem__(self, planned: PlannedBatch) -> Batch | ProxydetError:
        """Return the batch, or why it cannot be made."""
        try:
            if planned.source == "boxes":
                boxes, skipped = self._samples(self._boxes, planned)
                return BoxBatch(
                    images=tuple(sample.image for sample in boxes),
                    instances=tuple(sample.instances for sample in boxes),
                    image_ids=tuple(sample.image_id for sample in boxes),
                    skipped=skipped,
                )
            if self._labels is None:
                raise ValueError("an image-label batch was planned without image labels")
            labelled, skipped = self._samples(self._labels, planned)
            return ImageLabelBatch(
                images=tuple(sample.image for sample in labelled),
                labels=tuple(sample.labels for sample in labelled),
                image_ids=tuple(sample.image_id for sample in labelled),
                skipped=skipped,
            )
        except ProxydetError as error:
            return error

    def _samples(self, source: Any, planned: PlannedBatch) -> tuple[list[Any], tuple[str, ...]]:
        samples: list[BoxSample | LabelSample] = []
        skipped: list[str] = []
        for row, seed in zip(planned.rows, planned.seeds, strict=True):
            try:
                samples.append(source.sample(row, np.random.default_rng(seed)))
            except DataError:
                last = len(skipped) + 1 == len(planned.rows)
                if not self._skip or last:
                    raise
                skipped.append(source.name(row))
        return samples, tuple(skipped)


class _Plans(torch.utils.data.Sampler[PlannedBatch]):
    """The plans from the loader's start on."""

    def __init__(self, loader: TrainingLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[PlannedBatch]:
        yield from map(self._loader.planned, itertools.count())


def _unchanged(batch: Any) -> Any:
    return batch


def next_from_workers(batches: Iterator[Any], config: DataConfig) -> Any:
    """Return the next batch of a torch loader.

    Raises:
        EnvironmentProblem: a worker died, or none delivered in time.
    """
    try:
        return next(batches)
    except RuntimeError as error:
        # How torch says that a worker was killed or that none delivered in time.
        text = str(error)
        if "timed out" in text:
            raise EnvironmentProblem(
                f"the data workers delivered nothing for {config.worker_timeout_s:g} s",
                hint="look for a file system that hangs; wait longer with data.worker_timeout_s",
            ) from error
        if "exited unexpectedly" in text or "is killed" in text:
            raise EnvironmentProblem(
                f"a data worker died: {text.splitlines()[0]}",
                hint="it may have run out of memory: use fewer workers (data.workers), or look at the system's log",
            ) from error
        raise
