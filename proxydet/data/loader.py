"""From rows of the store to batches: what training images are made of, and the batches of one process.

Which images a batch holds and how they are augmented is decided by numbers that travel with its plan (`samplers`), so
workers keep no state: any process makes the same sample of the same row and seed, with any number of workers.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from proxydet.data.batches import Batch, BoxBatch, ImageLabelBatch
from proxydet.data.classes import load_vocabulary, open_split
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.description import DatasetDescription
from proxydet.data.formats.records import Identifier
from proxydet.data.image_labels import LabelledImages, open_label_images
from proxydet.data.images import (
    find_image,
    open_annotated_image,
    quiet_worker,
    require_distinct_files,
)
from proxydet.data.instances import Targets, make_instances
from proxydet.data.samplers import (
    BatchPlan,
    FloatArray,
    PlannedBatch,
    SourceImages,
    SourceName,
    image_weights,
    repeat_factors,
)
from proxydet.data.store import AnnotationStore
from proxydet.data.transforms import View, training_view
from proxydet.errors import DataError, EnvironmentProblem, ProxydetError
from proxydet.reporting import SILENT, Progress

if TYPE_CHECKING:
    from detectron2.structures import Instances

_logger = logging.getLogger(__name__)

_DIGESTED_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One augmented image with what is known of it."""

    image: torch.Tensor
    """uint8 (3, h, w), RGB."""
    target: Instances | torch.Tensor
    """Its objects, or its classes: int64 (L,)."""
    image_id: Identifier


class BoxSource:
    """Images with annotated objects. It can be pickled and does not change.

    Args:
        store: The annotations.
        roots: Folders of the images.
        targets: Which annotations are trained on.
        config: Augmentation, and which images are trained on.
    """

    def __init__(
        self, store: AnnotationStore, roots: tuple[Path, ...], targets: Targets, config: DataConfig
    ) -> None:
        self.store = store
        self.targets = targets
        self._roots = roots
        self._config = config
        self.usable = targets.usable(store)
        used_images = np.unique(store.column("image")[self.usable])
        self.rows_I: npt.NDArray[np.int64] = (
            np.arange(len(store)) if config.keep_empty_images else used_images.astype(np.int64)
        )
        """Rows of the store that are trained on."""

    def name(self, row: int) -> str:
        """Return the file name of an image."""
        return self.store.file_name(row)

    def encoded(self, row: int) -> Path:
        """Return the file of an image; DataError where it is not there."""
        return find_image(self.store.file_name(row), self._roots)

    def sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Read and augment the image of a row of the store.

        Raises:
            DataError: it cannot be read, or has another size than annotated.
        """
        record = self.store.record(row)
        image = open_annotated_image(record, self._roots, self._config.exif_orientation)
        view = _draw_view(image, self._config.boxes, self._config, rng)
        first = record.first_annotation
        usable = self.usable[first : first + len(record)]
        return Sample(
            image=to_tensor(view.apply(image)),
            target=make_instances(self.store, record, usable, view, self.targets),
            image_id=record.image_id,
        )

    def factors(self, threshold: float) -> FloatArray:
        """Return how often each image is repeated: float64 (I,), 0 for those that are not trained on."""
        factors_I: FloatArray = np.zeros(len(self.store))
        factors_I[self.rows_I] = repeat_factors(
            np.searchsorted(self.rows_I, self.store.column("image")[self.usable]),
            self.store.column("category")[self.usable],
            image_count=len(self.rows_I),
            threshold=threshold,
        )
        return factors_I


class LabelSource:
    """Images of which only the classes are known. It can be pickled and does not change."""

    def __init__(self, images: LabelledImages, source: SourceConfig, config: DataConfig) -> None:
        self.images = images
        self._source = source
        self._config = config

    def name(self, row: int) -> str:
        """Return the name of an image, for messages."""
        return self.images.name(row)

    def sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Read and augment an image.

        Raises:
            DataError: it cannot be read.
        """
        image = self.images.image(row, exif_orientation=self._config.exif_orientation)
        view = _draw_view(image, self._source, self._config, rng)
        return Sample(
            image=to_tensor(view.apply(image)),
            target=torch.from_numpy(self.images.labels(row)),
            image_id=self.images.name(row),
        )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an image of mode RGB as uint8 (3, H, W), contiguous."""
    # Pillow takes its pixels apart in less than half the time that torch needs to turn them over.
    planes = [np.frombuffer(image.tobytes("raw", channel), np.uint8) for channel in "RGB"]
    return torch.from_numpy(np.stack(planes)).view(3, image.height, image.width)


def _draw_view(
    image: Image.Image, source: SourceConfig, config: DataConfig, rng: np.random.Generator
) -> View:
    return training_view(
        image.height,
        image.width,
        size=source.size,
        scale=source.scale,
        flip_probability=config.flip_probability,
        rng=rng,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSources:
    """All that batches are made of. It can be pickled and does not change."""

    boxes: BoxSource
    """Images with annotated objects."""

    labels: LabelSource | None
    """Images of which only the class is known."""

    def digests(self) -> dict[str, str]:
        """Return digests by which changed images are noticed, in much less time than reading all of them takes.

        Of each source, ``images`` and ``image labels``: 16 files spread over it, and the sizes of all images.
        """
        found = {"images": _digest(self.boxes, self.boxes.rows_I).hexdigest()}
        if self.labels is not None:
            images = self.labels.images
            files = _digest(images, np.arange(len(images)))
            sizes = np.ascontiguousarray(images.shapes_I2).tobytes()
            found["image labels"] = hashlib.sha256(sizes + files.hexdigest().encode()).hexdigest()
        return found

    def plan(self, config: DataConfig, *, seed: int) -> BatchPlan:
        """Return the sequence of batches of a run.

        Raises:
            DataError: there is no image, or no annotated object, to train on.
        """
        parts: list[tuple[SourceName, FloatArray, npt.NDArray[np.int32], SourceConfig]] = [
            (
                "boxes",
                self.boxes.factors(config.repeat_threshold),
                self.boxes.store.sizes_I2,
                config.boxes,
            )
        ]
        if self.labels is not None and config.image_labels is not None:
            images = self.labels.images
            parts.append(
                ("image_labels", np.ones(len(images)), images.shapes_I2, config.image_labels)
            )
        for name, factors, _, _ in parts:
            if not factors.any():
                raise DataError(
                    f"the data set has no images to train on in its part {name!r}",
                    hint="see what is in it with: proxydet data check",
                )
        if not self.boxes.usable.any():
            # Training would end well and have learnt that nothing is ever there.
            store = self.boxes.store
            raise DataError(
                f"{store.source_name} has no object to train on among its {store.report.annotations_kept} annotations: "
                "crowds, novel classes, and boxes without extent or outside their image are left out",
                hint="see what is in it with: proxydet data stats",
            )
        weights = image_weights([part[1] for part in parts], [part[3].ratio for part in parts])
        sources = [
            SourceImages(
                name=name,
                weights_I=weights_I,
                landscape_I=sizes_I2[:, 1] > sizes_I2[:, 0],
                batch_size=source.batch_size,
            )
            for weights_I, (name, _, sizes_I2, source) in zip(weights, parts, strict=True)
        ]
        return BatchPlan(
            sources,
            seed=seed,
            group_by_orientation=config.group_by_orientation,
            ranks_share_group=config.ranks_share_group,
        )


def _digest(images: BoxSource | LabelledImages, rows: npt.NDArray[np.int64]) -> hashlib._Hash:
    """Digest the files of some rows; one that cannot be read counts as absent."""
    digest = hashlib.sha256()
    spread = np.unique(np.linspace(0, len(rows) - 1, _DIGESTED_FILES).astype(np.int64))
    for row in rows[spread] if len(rows) else ():
        try:
            source = images.encoded(int(row))
            content = source if isinstance(source, bytes) else source.read_bytes()
        except (DataError, OSError):
            content = b"absent"
        digest.update(hashlib.sha256(content).digest())
    return digest


def open_training_sources(
    config: DataConfig, description: DatasetDescription, *, progress: Progress = SILENT
) -> TrainingSources:
    """Open annotations and image labels, making stores and indexes where there are none.

    Raises:
        DataError: something is not there or cannot be used.
        VocabularyError: embeddings and categories do not fit.
    """
    vocabulary = load_vocabulary(description, cache=config.cache, progress=progress)
    store = open_split(description, "train", cache=config.cache, progress=progress)
    targets = Targets.of(store, vocabulary, config.masks)
    roots = description.split("train").roots
    require_distinct_files(store, roots)
    boxes = BoxSource(store, roots, targets, config)
    if config.image_labels is None or description.image_labels is None:
        return TrainingSources(boxes=boxes, labels=None)
    images = open_label_images(
        description.image_labels,
        vocabulary,
        store.categories,
        cache=config.cache,
        progress=progress,
    )
    return TrainingSources(boxes=boxes, labels=LabelSource(images, config.image_labels, config))


class TrainingLoader:
    """Iterates over the batches of one process, without end.

    They depend on seed, iteration, rank and world size only: not on the number of workers, nor on where iteration began.
    Each `iter` begins at ``start``, with workers of its own, which end when the iterator is dropped or closed.

    Attributes:
        sources: What batches are made of.
        skipped: Number of images left out so far because they cannot be read (only where the configuration asks for it).

    Args:
        sources: What batches are made of.
        config: Workers and batching.
        rank: Number of this process.
        world_size: How many processes train together.
        seed: Of the run, at least 0.
        start: What the run has used before: batches of all processes, or, where these share a group, batches of one.

    Raises:
        DataError: there is no image to train on.
    """

    def __init__(
        self,
        sources: TrainingSources,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        seed: int,
        start: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        if seed < 0 or start < 0:
            raise ValueError("seed and start must not be negative")
        self.sources = sources
        self.skipped = 0
        self._config = config
        self._shard = {"rank": rank, "world_size": world_size, "start": start}
        self._plan = sources.plan(config, seed=seed)

    def planned(self, iteration: int) -> PlannedBatch:
        """Return which images the batch of an iteration, counted from the start, holds."""
        return self._plan.batch(iteration, **self._shard)

    def batch(self, iteration: int) -> Batch:
        """Make the batch of one iteration here, in this process (to show or to repeat it).

        Raises:
            DataError: an image cannot be read.
        """
        made = _BatchMaker(self.sources, self._config)[self.planned(iteration)]
        if isinstance(made, ProxydetError):
            raise made
        return made

    def __iter__(self) -> Iterator[Batch]:
        config, workers = self._config, self._config.workers
        loader: DataLoader[Any] = DataLoader(
            _BatchMaker(self.sources, config),
            batch_size=None,
            sampler=map(self.planned, itertools.count()),
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
            try:
                made = next(batches)
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
                        hint="it may have run out of memory: use fewer workers (data.workers), or see the system's log",
                    ) from error
                raise
            if isinstance(made, ProxydetError):
                raise made
            for name in made.skipped:
                self.skipped += 1
                _logger.warning("image %s cannot be read; left out (%d so far)", name, self.skipped)
            yield made


class _BatchMaker(Dataset[Any]):
    """Makes the batch that a plan asks for; what workers run.

    An error that a user can cause is returned, not raised: torch would bury it in text.
    """

    def __init__(self, sources: TrainingSources, config: DataConfig) -> None:
        self._sources = {"boxes": sources.boxes, "image_labels": sources.labels}
        self._skip = config.unreadable_images == "skip"

    def __getitem__(self, planned: PlannedBatch) -> Batch | ProxydetError:
        source = self._sources[planned.source]
        if source is None:
            raise ValueError("an image-label batch was planned without image labels")
        samples: list[Sample] = []
        skipped: list[str] = []
        for row, seed in zip(planned.rows, planned.seeds, strict=True):
            try:
                samples.append(source.sample(row, np.random.default_rng(seed)))
            except DataError as error:
                if not self._skip or len(skipped) + 1 == len(planned.rows):
                    return error
                skipped.append(source.name(row))
            except ProxydetError as error:
                return error
        made: dict[str, Any] = {
            "images": tuple(sample.image for sample in samples),
            "image_ids": tuple(sample.image_id for sample in samples),
            "skipped": tuple(skipped),
        }
        targets: tuple[Any, ...] = tuple(sample.target for sample in samples)
        if planned.source == "boxes":
            return BoxBatch(instances=targets, **made)
        return ImageLabelBatch(labels=targets, **made)


def _unchanged(batch: Any) -> Any:
    return batch
