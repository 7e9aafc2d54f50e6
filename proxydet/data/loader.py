"""Building the stream of training batches of one process."""

from __future__ import annotations

from proxydet.data.classes import load_vocabulary, open_split
from proxydet.data.config import DataConfig
from proxydet.data.description import DatasetDescription
from proxydet.data.image_labels import open_label_images
from proxydet.data.images import require_distinct_files
from proxydet.data.instances import Targets
from proxydet.data.sources import BoxSource, LabelSource
from proxydet.data.stream import Place, TrainingLoader
from proxydet.data.training_sources import TrainingSources
from proxydet.reporting import SILENT, Progress


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


def build_training_loader(
    config: DataConfig,
    description: DatasetDescription,
    *,
    rank: int,
    world_size: int,
    seed: int,
    start: int = 0,
) -> TrainingLoader:
    """Return the batches of one process, from ``start`` on, without end.

    They depend on seed, iteration, rank and world size only: not on the number of workers, nor on where iteration began.

    Args:
        config: Sources, augmentation, workers.
        description: The data set. Without an ``[image_labels]`` table, or with ``config.image_labels`` None, all batches
            have boxes.
        rank: Number of this process.
        world_size: How many processes train together.
        seed: Of the run, at least 0.
        start: Batches that all processes have used before; where they share a group, that one process has.

    Raises:
        DataError: the data cannot be used.
        VocabularyError: embeddings and categories do not fit.
    """
    sources = open_training_sources(config, description)
    return TrainingLoader(
        sources,
        config,
        Place(rank=rank, world_size=world_size, seed=seed, start=start),
    )
