"""From rows of the store to batches: what training images are made of, and the batches of one process.

Which images a batch holds and how they are augmented is decided by numbers that travel with its plan (`BatchPlan`), so
workers keep no state: any process makes the same sample of the same row and seed, with any number of workers.

Nothing here remembers anything: the batch of step 80,000 is computed as directly as that of step 0, by any process. So a
run resumes exactly, whatever the number of loader workers was.

A *group* is a source (boxes or image labels) with an orientation (landscape or not). A batch is drawn in two parts: first
its group, so often that in the long run each image comes up in proportion to its weight; then its images, independently
and with replacement, in proportion to their weights in the group. This gives the same mixture as drawing single
images and collecting them by group until a batch is full, which is how it was published, without the state that
collecting needs.

Dimensions: I images, K categories, G groups.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from proxydet.data.batches import Batch, BoxBatch, ImageLabelBatch, Targets, make_instances
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.dataset import DatasetConfig, load_vocabulary, open_split
from proxydet.data.formats.records import Identifier
from proxydet.data.image_labels import LabelledImages, open_label_images
from proxydet.data.images import (
    find_image,
    open_annotated_image,
    quiet_worker,
    require_distinct_files,
)
from proxydet.data.store import AnnotationStore
from proxydet.data.transforms import View, training_view
from proxydet.errors import DataError, EnvironmentProblem, ProxydetError
from proxydet.reporting import SILENT, Progress

if TYPE_CHECKING:
    from detectron2.structures import Instances


FloatArray = npt.NDArray[np.float64]

_GROUP_STREAM, _IMAGE_STREAM, _AUGMENTATION_STREAM = 1, 2, 3
SourceName = Literal["boxes", "image_labels"]


def repeat_factors(
    images_P: npt.NDArray[np.integer],
    categories_P: npt.NDArray[np.integer],
    *,
    image_count: int,
    threshold: float,
) -> FloatArray:
    """Return how often each image should be repeated for the sake of its rarest category.

    A category in a share f of the images gets max(1, sqrt(threshold / f)); an image gets the largest of its categories'
    factors, and 1 without any (LVIS paper, appendix B.2).

    Args:
        images_P: Image row of each of P annotations.
        categories_P: Category of each.
        image_count: Number of images, I.
        threshold: Share of the images below which a category is repeated; 0 repeats none.

    Returns:
        float64 (I,), at least 1.
    """
    factors_I: FloatArray = np.ones(image_count, dtype=np.float64)
    if not len(images_P):
        return factors_I
    categories = np.asarray(categories_P, dtype=np.int64)
    width = int(categories.max()) + 1
    pairs = np.unique(np.asarray(images_P, dtype=np.int64) * width + categories)
    image_of, category_of = np.divmod(pairs, width)
    share_K = np.bincount(category_of, minlength=width) / image_count
    factor_K = np.maximum(1.0, np.sqrt(threshold / np.where(share_K > 0, share_K, np.inf)))
    np.maximum.at(factors_I, image_of, factor_K[category_of])
    return factors_I


def image_weights(factors: Sequence[FloatArray], ratios: Sequence[float]) -> list[FloatArray]:
    """Return the sampling weight of each image of each source.

    Within a source, weights are in proportion to the repeat factors; their sums over the sources are in proportion to the
    ratios, and all together as large as the largest source (the published scale, which matters only for comparison).

    Args:
        factors: Repeat factors of each source.
        ratios: Share of images to draw from each source.
    """
    total = max(len(source) for source in factors)
    return [
        source * (total * ratio / sum(ratios) / source.sum())
        for source, ratio in zip(factors, ratios, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """What the plan needs to know of a source.

    Attributes:
        name: Which source it is.
        weights_I: float64 (I,), in proportion to how often each image is to be drawn, over all sources.
        landscape_I: bool (I,), whether each image is wider than high.
        batch_size: Images of a batch on one process.
    """

    name: SourceName
    weights_I: FloatArray
    landscape_I: npt.NDArray[np.bool_]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """What a loader worker needs to make a batch.

    Attributes:
        source: Where the images come from.
        rows: Row of each image in its source.
        seeds: Seed of each image's augmentation.
    """

    source: SourceName
    rows: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]


class BatchPlan:
    """The infinite sequence of batches of a run.

    Args:
        sources: The sources that have images.
        seed: Of the run.
        group_by_orientation: Whether a batch holds only landscape or only other images.
        ranks_share_group: Whether all processes of a step draw from one group, and then successive parts of one larger batch.

    Raises:
        DataError: no source has images that are drawn at all.
    """

    def __init__(
        self,
        sources: Sequence[SourceImages],
        *,
        seed: int,
        group_by_orientation: bool = True,
        ranks_share_group: bool = False,
    ) -> None:
        self._seed = seed
        self._shared = ranks_share_group
        self._groups: list[tuple[SourceImages, npt.NDArray[np.int64], FloatArray]] = []
        """The source, the rows of its images, and their cumulative weights."""
        for source in sources:
            landscape = np.flatnonzero(source.landscape_I), np.flatnonzero(~source.landscape_I)
            whole = (np.arange(len(source.weights_I)),)
            for rows in landscape if group_by_orientation else whole:
                cumulative = np.cumsum(source.weights_I[rows])
                if len(rows) and cumulative[-1] > 0:
                    self._groups.append((source, rows, cumulative))
        if not self._groups:
            raise DataError(
                "there are no images to train on",
                hint="see what is in the data set: proxydet data check",
            )
        # A group that fills its batch with n images comes up 1/n as often as its images do.
        rates = [cumulative[-1] / source.batch_size for source, _, cumulative in self._groups]
        self._cumulative_G: FloatArray = np.cumsum(rates)

    def batch(self, step: int, *, rank: int, world_size: int, start: int = 0) -> PlannedBatch:
        """Return the batch of one process in one step.

        The batches of all processes are one sequence: process r of N takes number ``start + step * N + r``. One process that
        accumulates the gradients of N batches therefore sees the same images as N processes.

        Args:
            step: Counted from 0; where gradients are accumulated, each batch is a step here.
            rank: Number of the process.
            world_size: How many processes there are.
            start: Numbers that were used before: batches of all processes, or, where these share a group, steps.
        """
        number = start + (step if self._shared else step * world_size + rank)
        drawn = self._pick(self._cumulative_G, (_GROUP_STREAM, number), 1)
        source, rows, cumulative = self._groups[drawn[0]]
        first = rank * source.batch_size if self._shared else 0
        needed = first + source.batch_size
        drawn = self._pick(cumulative, (_IMAGE_STREAM, number), needed)[first:]
        return PlannedBatch(
            source=source.name,
            rows=tuple(rows[drawn].tolist()),
            seeds=tuple(
                (self._seed, _AUGMENTATION_STREAM, number, place) for place in range(first, needed)
            ),
        )

    def _pick(
        self, cumulative: FloatArray, stream: tuple[int, int], count: int
    ) -> npt.NDArray[np.int64]:
        """Draw rows in proportion to weights, of which the cumulative sums are given."""
        uniform = np.random.default_rng([self._seed, *stream]).random(count)
        # The largest double below 1 times a total is never rounded up to the total, so that every number falls into a slice.
        picked: npt.NDArray[np.int64] = np.searchsorted(
            cumulative, uniform * cumulative[-1], side="right"
        )
        return picked


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
    config: DataConfig, description: DatasetConfig, *, progress: Progress = SILENT
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
