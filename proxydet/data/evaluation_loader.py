"""Reading annotated images for evaluation: resized as published, each image once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from proxydet.data.classes import open_split
from proxydet.data.config import DataConfig
from proxydet.data.description import DatasetDescription
from proxydet.data.images import Pixels, quiet_worker
from proxydet.data.reading import read_annotated_image
from proxydet.data.sources import to_tensor
from proxydet.data.store import AnnotationStore
from proxydet.data.stream import next_from_workers
from proxydet.data.transforms import shortest_side
from proxydet.errors import ProxydetError


@dataclass(frozen=True, kw_only=True)
class EvaluationBatch:
    """Images to predict on.

    Attributes:
        images: B uint8 tensors (3, h, w), RGB, resized.
        original_sizes: B pairs (height, width) of the images as annotated, in pixels.
        image_ids: B ids of the annotation file.
        file_names: B names as the annotation file has them.
    """

    images: tuple[torch.Tensor, ...]
    original_sizes: tuple[tuple[int, int], ...]
    image_ids: tuple[int, ...]
    file_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def resize_for_test(pixels_HW3: Pixels, config: DataConfig) -> torch.Tensor:
    """Resize an image as evaluation does.

    Args:
        pixels_HW3: uint8, RGB.
        config: Shortest and longest side.

    Returns:
        uint8 (3, h, w), RGB.
    """
    view = shortest_side(
        *pixels_HW3.shape[:2],
        shortest=config.test_shortest_side,
        longest=config.test_longest_side,
    )
    return to_tensor(view.image(pixels_HW3))


class EvaluationLoader:
    """Iterates once over the images of one process, each time it is iterated.

    Args:
        store: The annotations, for ids, names and sizes.
        roots: Folders of the images.
        rows: Rows of the store to read, in this order.
        batch_size: Images of a batch; the last may hold fewer.
        config: Image size and workers.
    """

    def __init__(
        self,
        store: AnnotationStore,
        roots: tuple[Path, ...],
        rows: list[int],
        batch_size: int,
        config: DataConfig,
    ) -> None:
        self.store = store
        self.rows = rows
        self._roots = roots
        self._batch_size = batch_size
        self._config = config

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.rows) // self._batch_size)

    def without(self, done: Collection[int]) -> EvaluationLoader:
        """Return the loader of the images whose id is not in ``done``, to go on with an evaluation that was stopped."""
        ids = self.store.image_ids_I
        rest = [row for row in self.rows if int(ids[row]) not in done]
        return EvaluationLoader(self.store, self._roots, rest, self._batch_size, self._config)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        config = self._config
        batches = [
            self.rows[start : start + self._batch_size]
            for start in range(0, len(self.rows), self._batch_size)
        ]
        loader: DataLoader[Any] = DataLoader(
            _Reader(self.store, self._roots, config),
            batch_size=None,
            sampler=batches,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            timeout=config.worker_timeout_s if config.workers else 0,
            collate_fn=_unchanged,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),
        )
        made = iter(loader)
        for _ in batches:
            batch = next_from_workers(made, config)
            if isinstance(batch, ProxydetError):
                raise batch
            yield batch


def build_evaluation_loader(
    config: DataConfig,
    description: DatasetDescription,
    *,
    split: str = "val",
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1,
) -> EvaluationLoader:
    """Return the images of one process of an evaluation: every ``world_size``-th, from ``rank`` on.

    Args:
        config: Image size and workers.
        description: The data set.
        split: ``val`` or ``train``.
        rank: Number of this process.
        world_size: How many processes share the images.
        batch_size: Images of a batch.

    Raises:
        DataError: the annotations cannot be read. An image that cannot be read raises it during iteration.
    """
    store = open_split(description, split, cache=config.cache)
    return EvaluationLoader(
        store,
        description.split(split).roots,
        list(range(rank, len(store), world_size)),
        batch_size,
        config,
    )


class _Reader(Dataset[Any]):
    def __init__(self, store: AnnotationStore, roots: tuple[Path, ...], config: DataConfig) -> None:
        self._store = store
        self._roots = roots
        self._config = config

    def __getitem__(self, rows: list[int]) -> EvaluationBatch | ProxydetError:
        try:
            records = [self._store.record(row) for row in rows]
            exif = self._config.exif_orientation
            pixels = [read_annotated_image(record, self._roots, exif) for record in records]
            return EvaluationBatch(
                images=tuple(resize_for_test(image, self._config) for image in pixels),
                original_sizes=tuple((record.height, record.width) for record in records),
                image_ids=tuple(record.image_id for record in records),
                file_names=tuple(record.file_name for record in records),
            )
        except ProxydetError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch
