"""The images of a split, as their annotations describe them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from proxydet.data.formats.records import Identifier
from proxydet.data.images import Pixels, read_annotated_image, require_distinct_files
from proxydet.data.store import AnnotationStore


@dataclass(frozen=True)
class AnnotatedImages:
    """Annotations and the folders of their images.

    Attributes:
        store: Annotations, for the images' names and sizes.
        roots: Folders of the images.

    Raises:
        DataError: Several entries are one image file.
    """

    store: AnnotationStore
    roots: tuple[Path, ...]

    def __post_init__(self) -> None:
        require_distinct_files(self.store, self.roots)

    def read(self, index: int) -> Pixels:
        """Read image ``index`` of the store: uint8 (H, W, 3), RGB.

        It is turned as its EXIF orientation says, as detectron2 does, unless only unturned it has the annotated size.

        Raises:
            DataError: It cannot be read, or has another size.
        """
        return read_annotated_image(self.store.record(index), self.roots, None)

    def read_id(self, image_id: Identifier) -> Pixels:
        """Read the image of an id; KeyError where the store has none of it."""
        return self.read(self._index[image_id])

    @cached_property
    def _index(self) -> dict[Identifier, int]:
        return {image_id: index for index, image_id in enumerate(self.store.image_ids)}
