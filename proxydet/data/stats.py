"""Counting what is in a data set: images, objects, classes, the long tail, base and novel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proxydet.data.dataset import (
    ClassTable,
    DatasetConfig,
    class_rows,
    load_classes,
    load_vocabulary,
    open_split,
)
from proxydet.data.image_labels import open_label_images
from proxydet.data.store import AnnotationStore
from proxydet.reporting import SILENT, Progress

SMALL_AREA, LARGE_AREA = 32**2, 96**2
"""Square pixels of the mask that divide small, medium and large objects (COCO)."""


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How often a class occurs in a split."""

    name: str
    """Class name."""
    base: bool
    """Whether training may use its annotations."""
    frequency: str
    """LVIS group ``r``, ``c`` or ``f``; empty where the annotations have none."""
    images: int
    """Images with an annotation of it; of an image-label source, images of it."""
    annotations: int
    """Annotations of it."""


@dataclass(frozen=True, kw_only=True)
class PartStats:
    """Counts of one part of a data set."""

    part: str
    """``train``, ``val`` or ``image_labels``."""
    images: int
    """Images."""
    annotations: int
    """Annotations, crowds included."""
    images_without_annotations: int
    """Images on which nothing is annotated."""
    crowds: int
    """Annotations that stand for a group."""
    without_mask: int
    """Annotations that have a box only."""
    small: int
    """Objects below 32 x 32 pixels."""
    medium: int
    """Objects from there to 96 x 96 pixels."""
    large: int
    """Larger objects."""
    classes: tuple[ClassCount, ...]
    """One entry for each class of the vocabulary, in its order."""

    def group(self, *, base: bool) -> dict[str, int]:
        """Return number of classes, of those that occur, and of annotations, of the base or the novel classes."""
        members = [entry for entry in self.classes if entry.base == base]
        return {
            "classes": len(members),
            "occurring": sum(entry.images > 0 for entry in members),
            "annotations": sum(entry.annotations for entry in members),
        }


@dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """Counts of a data set."""

    name: str
    """Name of the data set."""
    parts: tuple[PartStats, ...]
    """The parts that it has."""


def dataset_stats(
    description: DatasetConfig, *, cache: Path | None = None, progress: Progress = SILENT
) -> DatasetStats:
    """Count what is in a data set.

    Args:
        description: The data set.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show conversions.

    Raises:
        DataError: a file cannot be used.
        VocabularyError: embeddings and categories do not fit.
    """
    vocabulary = load_classes(description, cache=cache, progress=progress)
    parts = []
    stores = {}
    for split in ("train", "val"):
        if getattr(description, split) is None:
            continue
        store = stores[split] = open_split(description, split, cache=cache, progress=progress)
        images_K, annotations_K = store.counts()
        objects = store.column("area")[~store.column("crowd")]
        parts.append(
            PartStats(
                part=split,
                images=len(store),
                annotations=store.report.annotations_kept,
                images_without_annotations=len(store) - len(np.unique(store.column("image"))),
                crowds=store.report.crowds,
                without_mask=store.report.without_mask,
                small=int((objects < SMALL_AREA).sum()),
                medium=int(((objects >= SMALL_AREA) & (objects < LARGE_AREA)).sum()),
                large=int((objects >= LARGE_AREA).sum()),
                classes=_class_counts(store, vocabulary, images_K, annotations_K),
            )
        )
    if description.image_labels is not None and "train" in stores:
        store = stores["train"]
        images = open_label_images(
            description.image_labels,
            load_vocabulary(description, cache=cache, progress=progress),
            store.categories,
            cache=cache,
            progress=progress,
        )
        counts = np.zeros(len(vocabulary.names), dtype=np.int64)
        unlabelled = 0
        for row in range(len(images)):
            labels = images.labels(row)
            counts[labels] += 1
            unlabelled += not len(labels)
        counts_K = counts[class_rows(store, vocabulary)]
        parts.append(
            PartStats(
                part="image_labels",
                images=len(images),
                annotations=int(counts.sum()),
                images_without_annotations=unlabelled,
                crowds=0,
                without_mask=int(counts.sum()),
                small=0,
                medium=0,
                large=0,
                classes=_class_counts(store, vocabulary, counts_K, counts_K),
            )
        )
    return DatasetStats(name=description.name, parts=tuple(parts))


def _class_counts(
    store: AnnotationStore,
    vocabulary: ClassTable,
    images_K: npt.NDArray[np.int64],
    annotations_K: npt.NDArray[np.int64],
) -> tuple[ClassCount, ...]:
    category_of = {int(row): k for k, row in enumerate(class_rows(store, vocabulary))}
    counts = []
    for row, name in enumerate(vocabulary.names):
        k = category_of.get(row)
        counts.append(
            ClassCount(
                name=name,
                base=bool(vocabulary.base[row]),
                frequency="" if k is None else store.categories[k].frequency or "",
                images=0 if k is None else int(images_K[k]),
                annotations=0 if k is None else int(annotations_K[k]),
            )
        )
    return tuple(counts)
