"""Counting what is in a data set: images, objects, classes, the long tail, base and novel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from proxydet.data.dataset import PARTS, Dataset
from proxydet.data.image_labels import open_label_images

if TYPE_CHECKING:
    from proxydet.data.store import AnnotationStore

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
    """``train``, ``val``, ``test`` or ``image_labels``."""
    images: int
    """Images."""
    annotations: int
    """Annotations, crowds included."""
    images_without_annotations: int
    """Images on which nothing is annotated."""
    crowds: int = 0
    """Annotations that stand for a group."""
    without_mask: int
    """Annotations that have a box only."""
    small: int = 0
    """Objects below 32 x 32 pixels."""
    medium: int = 0
    """Objects from there to 96 x 96 pixels."""
    large: int = 0
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


def dataset_stats(data: Dataset) -> DatasetStats:
    """Count what is in a data set.

    Args:
        data: The data set.

    Raises:
        DataError: a file cannot be used.
        VocabularyError: embeddings and categories do not fit.
    """
    description, vocabulary = data.config, data.classes

    def class_counts(
        store: AnnotationStore,
        images_C: npt.NDArray[np.int64],
        annotations_C: npt.NDArray[np.int64],
    ) -> tuple[ClassCount, ...]:
        rows_K = store.class_rows(vocabulary.names).tolist()
        groups = {row: c.frequency for row, c in zip(rows_K, store.categories, strict=True)}
        return tuple(
            ClassCount(
                name=name,
                base=bool(vocabulary.base[row]),
                frequency=groups.get(row) or "",
                images=int(images_C[row]),
                annotations=int(annotations_C[row]),
            )
            for row, name in enumerate(vocabulary.names)
        )

    parts = []
    for split in PARTS:
        if getattr(description, split) is None:
            continue
        store = data.store(split)
        counts_2C = np.zeros((2, len(vocabulary.names)), dtype=np.int64)
        counts_2C[:, store.class_rows(vocabulary.names)] = store.counts()
        objects = store.column("area")[~store.column("crowd")]
        small, medium = (int((objects < area).sum()) for area in (SMALL_AREA, LARGE_AREA))
        parts.append(
            PartStats(
                part=split,
                images=len(store),
                annotations=store.report.annotations_kept,
                images_without_annotations=len(store) - len(np.unique(store.column("image"))),
                crowds=store.report.crowds,
                without_mask=store.report.without_mask,
                small=small,
                medium=medium - small,
                large=len(objects) - medium,
                classes=class_counts(store, *counts_2C),
            )
        )
    if description.image_labels is not None and description.train is not None:
        categories = data.store("train").categories
        images = open_label_images(
            description.image_labels,
            data.vocabulary,
            categories,
            cache=data.cache,
            progress=data.progress,
        )
        counts_C = np.zeros(len(vocabulary.names), dtype=np.int64)
        unlabelled = 0
        for row in range(len(images)):
            labels = images.labels(row)
            counts_C[labels] += 1
            unlabelled += not len(labels)
        parts.append(
            PartStats(
                part="image_labels",
                images=len(images),
                annotations=int(counts_C.sum()),
                images_without_annotations=unlabelled,
                without_mask=int(counts_C.sum()),
                classes=class_counts(data.store("train"), counts_C, counts_C),
            )
        )
    return DatasetStats(name=description.name, parts=tuple(parts))
