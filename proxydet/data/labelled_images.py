"""Images of which only the classes are known: in tars, or in folders with a list. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.images import find_image, open_image
from proxydet.data.store import AnnotationStore
from proxydet.data.tar_index import TarIndex
from proxydet.errors import DataError


class LabelledImages(Protocol):
    """Image files of which the classes are known."""

    @property
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image."""

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, row: int) -> str:
        """Return a name for messages."""

    def picture(self, row: int, *, exif_orientation: bool) -> Image.Image:
        """Decode an image: mode RGB."""

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the vocabulary rows of an image's classes."""


@dataclass(frozen=True)
class TarImages:
    """Images in tars, one tar a class.

    Attributes:
        index: The images.
        class_of_tar: The vocabulary's row of each of the index's tars.
    """

    index: TarIndex
    class_of_tar: tuple[int, ...]

    @property
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image."""
        return self.index.shapes_I2

    def __len__(self) -> int:
        return len(self.index)

    def name(self, row: int) -> str:
        """Return ``tar/member``."""
        return self.index.name(row)

    def picture(self, row: int, *, exif_orientation: bool) -> Image.Image:
        """Decode an image: mode RGB."""
        name = self.index.name(row)
        content = self.index.read(row)
        try:
            return open_image(content, name=name, exif_orientation=exif_orientation)
        except DataError as error:
            raise DataError(
                error.message,
                hint="fetch the tar again, or leave such images out with data.unreadable_images=skip",
                path=self.index.folder,
            ) from error

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the class of the image's tar."""
        return np.array([self.class_of_tar[self.index.tar_I[row]]], dtype=np.int64)


@dataclass(frozen=True)
class FolderImages:
    """Images in folders, with their classes in the ``pos_category_ids`` of an annotation file.

    Attributes:
        store: The annotation file.
        roots: The folders.
        rows_K: The vocabulary's row of each category of the store.
    """

    store: AnnotationStore
    roots: tuple[Path, ...]
    rows_K: npt.NDArray[np.int64]

    @property
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image."""
        return self.store.sizes_I2

    def __len__(self) -> int:
        return len(self.store)

    def name(self, row: int) -> str:
        """Return the file name."""
        return self.store.file_name(row)

    def picture(self, row: int, *, exif_orientation: bool) -> Image.Image:
        """Decode an image: mode RGB."""
        path = find_image(self.name(row), self.roots)
        return open_image(path, exif_orientation=exif_orientation)

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the classes that the file gives for the image."""
        return self.rows_K[self.store.labels(row, "pos_category_ids")]
