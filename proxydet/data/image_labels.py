"""Images of which only the classes are known: in tars, one a class, or in folders with a list. No torch here."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as cached
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.dataset import ImageLabelSpec, class_rows, how_to_get, nearest
from proxydet.data.formats.records import CategoryEntry
from proxydet.data.images import find_image, open_image, require_distinct_files
from proxydet.data.store import AnnotationStore
from proxydet.data.tars import TarIndex
from proxydet.errors import DataError
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

_READERS = 8
_AT_ONCE = 64


class LabelledImages(ABC):
    """Image files of which the classes are known. They can be pickled."""

    @property
    @abstractmethod
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image in pixels."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Return the name of an image, for messages."""

    @abstractmethod
    def encoded(self, row: int) -> Path | bytes:
        """Return the file of an image, or its bytes; DataError where it is not there."""

    @abstractmethod
    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the vocabulary rows of an image's classes: int64 (L,)."""

    def __len__(self) -> int:
        return len(self.shapes_I2)

    def image(self, row: int, *, exif_orientation: bool) -> Image.Image:
        """Decode an image: mode RGB.

        Raises:
            DataError: it cannot be read.
        """
        source = self.encoded(row)
        name = self.name(row) if isinstance(source, bytes) else str(source)
        try:
            return open_image(source, name=name, exif_orientation=exif_orientation)
        except DataError as error:
            hint = "fetch the file again, or leave such images out with data.unreadable_images=skip"
            raise DataError(error.message, hint=hint) from error


@dataclass(frozen=True, kw_only=True)
class TarClasses:
    """Which tar belongs to which class.

    Attributes:
        class_of_tar: Row of the vocabulary for each tar file name that belongs to a class.
        without_class: Tars that belong to no class of the vocabulary; they are not used.
        missing: Keys of ``map`` without a tar, and WordNet ids of ImageNet-LVIS whose class has no tar at all.
    """

    class_of_tar: dict[str, int]
    without_class: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class TarImages(LabelledImages):
    """Images in tars, one tar a class.

    Attributes:
        index: The images.
        matched: The classes of the tars.
    """

    index: TarIndex
    matched: TarClasses

    @property
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image in pixels."""
        return self.index.shapes_I2

    def name(self, row: int) -> str:
        """Return ``tar/member``."""
        return self.index.name(row)

    def encoded(self, row: int) -> bytes:
        """Return the bytes of an image file."""
        return self.index.read(row)

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the class of the image's tar."""
        tar = self.index.tars[self.index.tar_I[row]]
        return np.array([self.matched.class_of_tar[tar]], dtype=np.int64)


@dataclass(frozen=True)
class FolderImages(LabelledImages):
    """Images in folders, with their classes in the ``pos_category_ids`` of an annotation file.

    Attributes:
        store: The annotation file.
        roots: The folders.
        rows_K: int64 (K,), the vocabulary's row of each category of the store.
    """

    store: AnnotationStore
    roots: tuple[Path, ...]
    rows_K: npt.NDArray[np.int64]

    @property
    def shapes_I2(self) -> npt.NDArray[np.int32]:
        """Height and width of each image in pixels."""
        return self.store.sizes_I2

    def name(self, row: int) -> str:
        """Return the file name."""
        return self.store.file_name(row)

    def encoded(self, row: int) -> Path:
        """Return the file."""
        return find_image(self.name(row), self.roots)

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the classes that the file gives for the image."""
        return self.rows_K[self.store.labels(row, "pos_category_ids")]


def open_label_images(
    spec: ImageLabelSpec,
    vocabulary: Vocabulary,
    categories: Sequence[CategoryEntry],
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
    warn: bool = True,
) -> TarImages | FolderImages:
    """Open the image-label data of a dataset config, after indexing it where that was not done before.

    Args:
        spec: The table ``[image_labels]``.
        vocabulary: The classes.
        categories: Categories of the training annotations.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show the indexing.
        warn: Log what is missing, damaged or not used; False where the caller shows it itself.

    Raises:
        DataError: it is not there, none of it belongs to a class of the vocabulary, or two entries are one file.
    """
    if spec.annotations is not None:
        store = AnnotationStore.open(spec.annotations, cache=cache, progress=progress, warn=warn)
        require_distinct_files(store, spec.roots)
        return FolderImages(store, spec.roots, class_rows(store, vocabulary))
    matched = match_tars(spec, vocabulary, categories)
    folder = spec.tars or Path()
    if warn and matched.without_class:
        unused = counted(len(matched.without_class), "tar belongs", "tars belong")
        _logger.info("%s: %s to no class", folder, unused)
    if warn and matched.missing:
        absent = counted(len(matched.missing), "tar is", "tars are")
        _logger.warning("%s: %s missing, e.g. %s.tar", folder, absent, matched.missing[0])
    names = list(matched.class_of_tar)
    return TarImages(
        TarIndex.open(folder, names, cache=cache, progress=progress, warn=warn), matched
    )


def match_tars(
    spec: ImageLabelSpec, vocabulary: Vocabulary, categories: Sequence[CategoryEntry]
) -> TarClasses:
    """Find the class of each tar by its name.

    ``<key>.tar`` belongs to the class that ``map`` gives for the key; else to the category whose ``wnid``, ``synset`` or
    ``name`` is the key; else, where the key is a WordNet id of ImageNet-LVIS, to the category with its synset.

    Args:
        spec: The table ``[image_labels]``.
        vocabulary: The classes.
        categories: Categories of the training annotations.

    Raises:
        DataError: the folder is not there or holds no tar of any class, or ``map`` names an unknown class.
    """
    if spec.tars is None or not spec.tars.is_dir():
        raise DataError(
            f"there is no folder of tars {spec.tars}",
            hint="check 'tars' under [image_labels] in the dataset config; it is relative to its folder",
            path=spec.tars,
        )
    row_of_name = {name: row for row, name in enumerate(vocabulary.names)}
    known = [c for c in categories if c.name.strip() in row_of_name]
    row_of_synset = {c.synset: row_of_name[c.name.strip()] for c in known if c.synset}
    # What is put in first gives way to what comes later.
    row_of_key = {
        wnid: row_of_synset[synset]
        for wnid, synset in synset_of_wnid().items()
        if synset in row_of_synset
    }
    row_of_key |= row_of_name | row_of_synset
    row_of_key |= {c.wnid: row_of_name[c.name.strip()] for c in known if c.wnid}
    for key, name in spec.map.items():
        if name.strip() not in row_of_name:
            raise DataError(
                f"[image_labels] map: {key!r} is given the class {name!r}, which is not in the vocabulary."
                + nearest(name, list(row_of_name)),
                hint="spell the class as the vocabulary does",
            )
        row_of_key[key] = row_of_name[name.strip()]
    keys = {path.name: path.stem for path in sorted(spec.tars.glob("*.tar"))}
    found = {tar: row_of_key[key] for tar, key in keys.items() if key in row_of_key}
    if not keys:
        raise DataError(
            f"there are no tars in {spec.tars}",
            hint=how_to_get(spec.tars / "n02691156.tar")
            or "put one tar for each class there, named by its class",
            path=spec.tars,
        )
    if not found:
        raise DataError(
            f"none of the {counted(len(keys), 'tar')} in {spec.tars} belongs to a class of the vocabulary",
            hint="say which by [image_labels] map = { key = 'class name' }; the key is the tar's name without .tar",
            path=spec.tars,
        )
    missing = set(spec.map) - set(keys.values())
    if any(keys[tar] in synset_of_wnid() for tar in found):
        indexed = synset_of_wnid().keys() & row_of_key.keys()
        missing |= {wnid for wnid in indexed if row_of_key[wnid] not in found.values()}
    return TarClasses(
        class_of_tar=found,
        without_class=tuple(tar for tar in keys if tar not in found),
        missing=tuple(sorted(missing)),
    )


@cached
def synset_of_wnid() -> Mapping[str, str]:
    """Return the synset (``aerosol.n.02``, as LVIS categories have it) of each of ImageNet-LVIS's 997 WordNet ids.

    The table is in the package: no WordNet is needed at run time.
    """
    text = (files("proxydet.data") / "imagenet_lvis.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return MappingProxyType(dict(lines))


def unusable_label_images(
    images: LabelledImages, *, decode: bool, progress: Progress = SILENT
) -> list[str]:
    """Look for images that training would stop at.

    Args:
        images: The images. That the members of a tar are images at all, its index knows.
        decode: Decode every image; else only check that the files are there.
        progress: Where to show how far it is.

    Returns:
        What is wrong with each image that cannot be used.
    """
    if isinstance(images, TarImages) and not decode:
        return []

    def encoded(row: int) -> Path | bytes | DataError:
        try:
            return images.encoded(row)
        except DataError as error:
            return error

    def problem(source: Path | bytes | DataError, row: int) -> str:
        try:
            if isinstance(source, DataError):
                raise source
            if decode:
                name = images.name(row) if isinstance(source, bytes) else str(source)
                open_image(source, name=name)
        except DataError as error:
            return error.message
        return ""

    found: list[str] = []
    with (
        progress.task("checking images of image_labels", total=len(images), unit="images") as task,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        # In portions: a pool would otherwise take the bytes of all images into memory at once. Tars are read in this thread
        # only: their open files are shared.
        for start in range(0, len(images), _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, len(images)))
            for text in pool.map(problem, [encoded(row) for row in rows], rows):
                task.advance()
                if text:
                    found.append(text)
    return found
