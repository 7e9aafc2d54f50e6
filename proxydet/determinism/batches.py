"""Batches of noise with objects, of a recipe's sizes: what is repeated needs no data set."""

from __future__ import annotations

import proxydet.compat.d2  # noqa: F401

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks

from proxydet.data.batches import Batch, BoxBatch, ImageLabelBatch
from proxydet.data.config import DataConfig, SourceConfig
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
