"""Where training images come from, and how one of them is read and augmented.

A source can be pickled and holds nothing that changes: any process makes the same sample of the same row and seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.formats.records import Identifier
from proxydet.data.image_labels import LabelledImages
from proxydet.data.images import find_image, open_annotated_image
from proxydet.data.instances import Targets, make_instances
from proxydet.data.store import AnnotationStore
from proxydet.data.transforms import View, training_view

if TYPE_CHECKING:
    from detectron2.structures import Instances


@dataclass(frozen=True, kw_only=True)
class BoxSample:
    """One augmented image with its objects."""

    image: torch.Tensor
    """uint8 (3, h, w), RGB."""
    instances: Instances
    image_id: Identifier


@dataclass(frozen=True, kw_only=True)
class LabelSample:
    """One augmented image with its classes."""

    image: torch.Tensor
    """uint8 (3, h, w), RGB."""
    labels: torch.Tensor
    """int64 (L,)."""
    image_id: Identifier


class BoxSource:
    """Images with annotated objects.

    Args:
        store: The annotations.
        roots: Folders of the images.
        targets: Which annotations are trained on.
        config: Augmentation.
    """

    def __init__(
        self, store: AnnotationStore, roots: tuple[Path, ...], targets: Targets, config: DataConfig
    ) -> None:
        self.store = store
        self._roots = roots
        self.targets = targets
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
        """Return the file of an image.

        Raises:
            DataError: it is not there.
        """
        return find_image(self.name(row), self._roots)

    def sample(self, row: int, rng: np.random.Generator) -> BoxSample:
        """Read and augment the image of a row of the store.

        Raises:
            DataError: it cannot be read, or has another size than annotated.
        """
        record = self.store.record(row)
        picture = open_annotated_image(record, self._roots, self._config.exif_orientation)
        view = _draw(picture, self._config.boxes, self._config.flip_probability, rng)
        first = record.first_annotation
        usable = self.usable[first : first + len(record)]
        return BoxSample(
            image=to_tensor(view.apply(picture)),
            instances=make_instances(self.store, record, usable, view, self.targets),
            image_id=record.image_id,
        )


class LabelSource:
    """Images of which only the classes are known."""

    def __init__(self, images: LabelledImages, source: SourceConfig, config: DataConfig) -> None:
        self.images = images
        self._source = source
        self._config = config

    def name(self, row: int) -> str:
        """Return the name of an image, for messages."""
        return self.images.name(row)

    def sample(self, row: int, rng: np.random.Generator) -> LabelSample:
        """Read and augment an image.

        Raises:
            DataError: it cannot be read.
        """
        picture = self.images.image(row, exif_orientation=self._config.exif_orientation)
        view = _draw(picture, self._source, self._config.flip_probability, rng)
        return LabelSample(
            image=to_tensor(view.apply(picture)),
            labels=torch.from_numpy(self.images.labels(row)),
            image_id=self.images.name(row),
        )


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Return an image of mode RGB as uint8 (3, H, W), contiguous."""
    # Pillow takes its pixels apart in less than half the time that torch needs to turn them over.
    planes = [np.frombuffer(picture.tobytes("raw", channel), np.uint8) for channel in "RGB"]
    return torch.from_numpy(np.stack(planes)).view(3, picture.height, picture.width)


def _draw(
    picture: Image.Image, source: SourceConfig, flip_probability: float, rng: np.random.Generator
) -> View:
    return training_view(
        picture.height,
        picture.width,
        size=source.size,
        scale=source.scale,
        flip_probability=flip_probability,
        rng=rng,
    )
