"""The images of a split, as their annotations describe them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proxydet.data.images import find_image, image_size
from proxydet.data.reading import read_annotated_image
from proxydet.data.store import AnnotationStore
from proxydet.evaluation.annotation_file import Identifier

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class AnnotatedImages:
    """Annotations and the folders of their images.

    Attributes:
        store: Annotations, for the images' names and sizes.
        roots: Folders of the images.
    """

    store: AnnotationStore
    roots: tuple[Path, ...]

    def read(self, index: int) -> Pixels:
        """Read image ``index`` of the store: uint8 (H, W, 3), RGB.

        It is turned as its EXIF orientation says, as detectron2 does, unless only unturned it has the annotated size.

        Raises:
            DataError: It cannot be read, or has another size.
        """
        record = self.store.record(index)
        path = find_image(record.file_name, self.roots)
        annotated = (record.height, record.width)
        unturned = image_size(path) != annotated and (
            image_size(path, exif_orientation=False) == annotated
        )
        return read_annotated_image(record, self.roots, not unturned)

    def read_id(self, image_id: Identifier) -> Pixels:
        """Read the image of an id; KeyError where the store has none of it."""
        return self.read(self._index[image_id])

    @cached_property
    def _index(self) -> dict[Identifier, int]:
        return {image_id: index for index, image_id in enumerate(self.store.image_ids_I.tolist())}
