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

Dimensions: I images, K categories, G groups; H, W the size of one image after augmentation (images of a batch may differ),
A annotations of an image, L its labels, C classes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch.utils.data import DataLoader, Dataset

from proxydet.data import dataset
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.image_labels import open_label_images
from proxydet.data.images import (
    FolderImages,
    LabelledImages,
    open_annotated_image,
    quiet_worker,
    require_distinct_files,
    training_view,
)
from proxydet.data.masks import decode
from proxydet.data.records import Identifier
from proxydet.errors import DataError, ProxydetError, RuntimeEnvironmentError

if TYPE_CHECKING:
    from proxydet.data.images import View
    from proxydet.data.store import AnnotationStore, ImageRecord
    from proxydet.vocabulary.vocabulary import Vocabulary


FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_GROUP_STREAM, _IMAGE_STREAM, _AUGMENTATION_STREAM = 1, 2, 3
SourceName = Literal["boxes", "image_labels"]


# --- Batches ---------------------------------------------------------------------------------------------------------------

B = TypeVar("B", bound="_Batch")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What batches have in common.

    Attributes:
        images: B uint8 tensors (3, H, W), RGB; at least one.
        image_ids: B identifiers, as the annotation file or the image-label source has them.
        skipped: Names of images that were planned for this batch and left out because they cannot be read.
    """

    images: tuple[torch.Tensor, ...]
    image_ids: tuple[Identifier, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self: B, device: torch.device | str) -> B:
        """Return the batch with its images on ``device``; the network moves the annotations there, in one piece."""
        images = tuple(image.to(device, non_blocking=True) for image in self.images)
        return replace(self, images=images)

    def pin_memory(self: B) -> B:
        """Return the batch with its images in page-locked memory (called by torch's loader)."""
        return replace(self, images=tuple(image.pin_memory() for image in self.images))

    def __post_init__(self) -> None:
        counts = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "skipped"}
        if len(set(counts.values())) != 1 or not self.images:
            raise ValueError(
                f"a batch needs as many annotations and ids as images, at least 1: {counts}"
            )


@dataclass(frozen=True, kw_only=True)
class BoxBatch(_Batch):
    """Images with their objects.

    Attributes:
        instances: B detectron2 ``Instances`` of the size of their image, with ``gt_boxes`` (``Boxes``, xyxy pixels),
            ``gt_classes`` (int64 in [0, C)) and, where masks are trained, ``gt_masks`` (``PolygonMasks`` or
            ``BitMasks``) with ``gt_masked`` (bool, whether the object has one); may hold no object.
    """

    instances: tuple[Instances, ...]
    kind: ClassVar[Literal["boxes"]] = "boxes"


@dataclass(frozen=True, kw_only=True)
class ImageLabelBatch(_Batch):
    """Images of which only the classes are known.

    Attributes:
        labels: B int64 tensors (L,), the classes in the image, in [0, C).
    """

    labels: tuple[torch.Tensor, ...]
    kind: ClassVar[Literal["image_labels"]] = "image_labels"


Batch: TypeAlias = BoxBatch | ImageLabelBatch

SMALLEST_SIDE = 1e-5
"""Boxes with a side of at most this many pixels after clipping are left out (detectron2's limit)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which annotations training uses, and as which class.

    Attributes:
        rows_K: int64, the vocabulary's row of each category of the store.
        base_C: bool, whether each class of the vocabulary may be trained on.
        masks: Whether masks are trained.
    """

    rows_K: npt.NDArray[np.int64]
    base_C: BoolArray
    masks: bool

    @classmethod
    def of(
        cls, store: AnnotationStore, vocabulary: Vocabulary, masks: Literal["auto"] | bool
    ) -> Targets:
        """Bring the categories of a store and the classes together, and decide whether masks are trained.

        Args:
            store: The annotations.
            vocabulary: The classes.
            masks: Whether to train masks; ``"auto"``: where an object to train on has one.

        Raises:
            DataError: A category is not in the vocabulary; or masks are to be trained, and no object has one.
        """
        targets = cls(
            rows_K=store.class_rows(vocabulary.names),
            base_C=vocabulary.base,
            masks=masks is not False,
        )
        usable = targets.usable(store)
        if (usable & store.masked_A).any():
            return targets
        if masks is True and usable.any():
            raise DataError(
                f"{store.source_name} has boxes but no masks",
                hint="to train a detector of boxes, leave data.masks at auto",
            )
        return replace(targets, masks=False)

    def usable(self, store: AnnotationStore) -> BoolArray:
        """Return which annotations of a store may be used, whatever the view: bool over all annotations."""
        return store.trainable(self.base_C[self.rows_K])


def make_instances(
    store: AnnotationStore, record: ImageRecord, usable_A: BoolArray, view: View, targets: Targets
) -> Instances:
    """Return the objects of an image in a view of it.

    Args:
        store: Where the record comes from.
        record: The image with its annotations.
        usable_A: bool (A,), the record's part of `Targets.usable`.
        view: What of the image is seen, and how.
        targets: Classes and whether to make masks.

    Returns:
        ``Instances`` of the view's size with ``gt_boxes``, ``gt_classes`` and, with masks, ``gt_masks`` (polygons, or
        bitmaps where an object of the image has run lengths) and ``gt_masked``: bool, whether the object has a mask; of
        one without, ``gt_masks`` is empty.
    """
    boxes_A4 = view.boxes(record.boxes_A4)
    sides = boxes_A4[:, 2:] - boxes_A4[:, :2]
    kept = np.flatnonzero(usable_A & (sides > SMALLEST_SIDE).all(axis=1))
    instances = Instances(view.size)
    if targets.masks:
        annotations = record.first_annotation + kept
        has_mask = store.masked_A[annotations]
        as_bitmaps = bool(store.column("rle_length")[annotations].any())
        masks: list[Any] = []
        seen: list[bool] = []
        for annotation in annotations.tolist():
            # The store keeps more digits than polygons are trained with.
            polygons = view.polygons([p.astype(np.float32) for p in store.polygons(annotation)])
            if not as_bitmaps:
                masks.append(polygons)
                seen.append(any(_touches(polygon, view.size) for polygon in polygons))
                continue
            if rle := store.rle(annotation):
                masks.append(view.mask(decode(rle, (record.height, record.width))))
            else:
                drawn = BitMasks.from_polygon_masks(PolygonMasks([polygons]), *view.size)
                masks.append(drawn.tensor[0].numpy())
            seen.append(bool(masks[-1].any()))
        # An object whose mask is outside the view is left out; one that has none keeps its box.
        chosen = np.array(seen, dtype=np.bool_) | ~has_mask
        kept, masks = kept[chosen], list(itertools.compress(masks, chosen))
        if as_bitmaps:
            stacked = np.stack(masks) if masks else np.zeros((0, *view.size), dtype=np.bool_)
            instances.gt_masks = BitMasks(torch.from_numpy(stacked))
        else:
            instances.gt_masks = PolygonMasks(masks)
        instances.gt_masked = torch.from_numpy(has_mask[chosen])
    instances.gt_boxes = Boxes(torch.from_numpy(boxes_A4[kept].astype(np.float32)))
    instances.gt_classes = torch.from_numpy(targets.rows_K[record.categories_A[kept]])
    return instances


def _touches(polygon: npt.NDArray[np.float64], size: tuple[int, int]) -> bool:
    """Whether the extent of a polygon meets the view: where not, its mask there is certainly empty."""
    x, y = polygon[0::2], polygon[1::2]
    return bool(x.max() > 0 and y.max() > 0 and x.min() < size[1] and y.min() < size[0])


# --- The plan --------------------------------------------------------------------------------------------------------------


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
        # The source, the rows of its images, and their cumulative weights.
        self._groups: list[tuple[SourceImages, npt.NDArray[np.int64], FloatArray]] = []
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


class TrainingSources(Dataset[Any]):
    """All that batches are made of, and what workers run. It can be pickled and does not change.

    Stores and indexes are made where there are none.

    Attributes:
        config: Augmentation, sampling, and which images are trained on.
        store: The annotations of the images with objects.
        targets: Which annotations are trained on.
        images: The images of each source.
        usable_A: bool (A,), which annotations may be used, whatever the view.
        rows_I: int64 (I,), the rows of the store that are trained on.

    Args:
        config: As above.
        data: The data set.

    Raises:
        DataError: something is not there or cannot be used.
        VocabularyError: embeddings and categories do not fit.
    """

    def __init__(self, config: DataConfig, data: dataset.Dataset) -> None:
        store, spec = data.store("train"), data.config.image_labels
        self.config = config
        self.store = store
        self.targets = Targets.of(store, data.vocabulary, config.masks)
        self._roots = data.config.split("train").roots
        require_distinct_files(store, self._roots)
        self.images: dict[SourceName, LabelledImages] = {
            "boxes": FolderImages(store, self._roots, self.targets.rows_K)
        }
        if config.image_labels is not None and spec is not None:
            self.images["image_labels"] = open_label_images(
                spec, data.vocabulary, store.categories, cache=data.cache, progress=data.progress
            )
        self.usable_A = self.targets.usable(store)
        used_images = np.unique(store.column("image")[self.usable_A])
        self.rows_I: npt.NDArray[np.int64] = (
            np.arange(len(store)) if config.keep_empty_images else used_images.astype(np.int64)
        )

    def sample(self, source: SourceName, row: int, rng: np.random.Generator) -> Sample:
        """Read and augment an image.

        Args:
            source: Where it comes from.
            row: Its row among the images of the source.
            rng: Decides the augmentation.

        Raises:
            DataError: it cannot be read, or has another size than annotated.
        """
        config, images = self.config, self.images[source]
        if source == "boxes":
            record = self.store.record(row)
            image = open_annotated_image(record, self._roots, config.exif_orientation)
        else:
            image = images.image(row, exif_orientation=config.exif_orientation)
        size, flip = (image.height, image.width), config.flip_probability
        view = training_view(*size, getattr(config, source), flip_probability=flip, rng=rng)
        # Pillow takes its pixels apart in less than half the time that torch needs to turn them over.
        seen = view.apply(image)
        planes = [np.frombuffer(seen.tobytes("raw", channel), np.uint8) for channel in "RGB"]
        pixels = torch.from_numpy(np.stack(planes)).view(3, *view.size)
        if source == "boxes":
            first = record.first_annotation
            usable = self.usable_A[first : first + len(record)]
            instances = make_instances(self.store, record, usable, view, self.targets)
            return Sample(image=pixels, target=instances, image_id=record.image_id)
        labels = torch.from_numpy(images.labels(row))
        return Sample(image=pixels, target=labels, image_id=images.name(row))

    def __getitem__(self, planned: PlannedBatch) -> Batch | ProxydetError:
        """Make the batch that a plan asks for.

        An error that a user can cause is returned, not raised: torch would bury it in text.
        """
        samples: list[Sample] = []
        skipped: list[str] = []
        for row, seed in zip(planned.rows, planned.seeds, strict=True):
            try:
                samples.append(self.sample(planned.source, row, np.random.default_rng(seed)))
            except DataError as error:
                skip = self.config.unreadable_images == "skip"
                if not skip or len(skipped) + 1 == len(planned.rows):
                    return error
                skipped.append(self.images[planned.source].name(row))
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

    def digests(self) -> dict[str, str]:
        """Return digests by which changed images are noticed, in much less time than reading all of them takes.

        Of each source, ``images`` and ``image labels``: 16 files spread over it, and the sizes of all images.
        """
        found = {"images": _digest(self.images["boxes"], self.rows_I).hexdigest()}
        if (labels := self.images.get("image_labels")) is not None:
            files = _digest(labels, np.arange(len(labels)))
            sizes = np.ascontiguousarray(labels.shapes_I2).tobytes()
            found["image labels"] = hashlib.sha256(sizes + files.hexdigest().encode()).hexdigest()
        return found

    def plan(self, *, seed: int) -> BatchPlan:
        """Return the sequence of batches of a run.

        Raises:
            DataError: there is no image, or no annotated object, to train on.
        """
        config, store = self.config, self.store
        factors = {name: np.ones(len(images)) for name, images in self.images.items()}
        factors["boxes"][:] = 0  # of images that are not trained on
        factors["boxes"][self.rows_I] = repeat_factors(
            np.searchsorted(self.rows_I, store.column("image")[self.usable_A]),
            store.column("category")[self.usable_A],
            image_count=len(self.rows_I),
            threshold=config.repeat_threshold,
        )
        for name, factors_I in factors.items():
            if not factors_I.any():
                raise DataError(
                    f"the data set has no images to train on in its part {name!r}",
                    hint="see what is in it with: proxydet data check",
                )
        # Without, training would end well and have learnt that nothing is ever there.
        store.require_trainable(self.targets.base_C[self.targets.rows_K])
        settings: dict[str, SourceConfig] = {name: getattr(config, name) for name in self.images}
        ratios = [source.ratio for source in settings.values()]
        weights = image_weights(list(factors.values()), ratios)
        sources = [
            SourceImages(
                name=name,
                weights_I=weights_I,
                landscape_I=images.shapes_I2[:, 1] > images.shapes_I2[:, 0],
                batch_size=settings[name].batch_size,
            )
            for weights_I, (name, images) in zip(weights, self.images.items(), strict=True)
        ]
        return BatchPlan(
            sources,
            seed=seed,
            group_by_orientation=config.group_by_orientation,
            ranks_share_group=config.ranks_share_group,
        )


def _digest(images: LabelledImages, rows: npt.NDArray[np.int64]) -> hashlib._Hash:
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


class TrainingLoader:
    """Iterates over the batches of one process, without end.

    They depend on seed, iteration, rank and world size only: not on the number of workers, nor on where iteration began.
    Each `iter` begins at ``start``, with workers of its own, which end when the iterator is dropped or closed.

    Attributes:
        sources: What batches are made of.
        skipped: Number of images left out so far because they cannot be read (only where the configuration asks for it).

    Args:
        sources: What batches are made of, and the workers and batching of its configuration.
        rank: Number of this process.
        world_size: How many processes train together.
        seed: Of the run, at least 0.
        start: What the run has used before: batches of all processes, or, where these share a group, batches of one.

    Raises:
        DataError: there is no image to train on.
    """

    def __init__(
        self, sources: TrainingSources, *, rank: int, world_size: int, seed: int, start: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        if seed < 0 or start < 0:
            raise ValueError("seed and start must not be negative")
        self.sources = sources
        self.skipped = 0
        self._shard = {"rank": rank, "world_size": world_size, "start": start}
        self._plan = sources.plan(seed=seed)

    def planned(self, iteration: int) -> PlannedBatch:
        """Return which images the batch of an iteration, counted from the start, holds."""
        return self._plan.batch(iteration, **self._shard)

    def batch(self, iteration: int) -> Batch:
        """Make the batch of one iteration here, in this process (to show or to repeat it).

        Raises:
            DataError: an image cannot be read.
        """
        made = self.sources[self.planned(iteration)]
        if isinstance(made, ProxydetError):
            raise made
        return made

    def __iter__(self) -> Iterator[Batch]:
        config, workers = self.sources.config, self.sources.config.workers
        loader: DataLoader[Any] = DataLoader(
            self.sources,
            batch_size=None,
            sampler=map(self.planned, itertools.count()),
            num_workers=workers,
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
                    what = f"the data workers returned nothing for {config.worker_timeout_s:g} s"
                    hint = (
                        "look for a file system that hangs; wait longer with data.worker_timeout_s"
                    )
                elif "exited unexpectedly" in text or "is killed" in text:
                    what = f"a data worker died: {text.splitlines()[0]}"
                    hint = "it may have run out of memory: use fewer workers (data.workers), or see the system's log"
                else:
                    raise
                raise RuntimeEnvironmentError(what, hint=hint) from error
            if isinstance(made, ProxydetError):
                raise made
            for name in made.skipped:
                self.skipped += 1
                _logger.warning("image %s cannot be read; left out (%d so far)", name, self.skipped)
            yield made
