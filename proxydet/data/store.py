"""Annotations in columns: converted from JSON once, then opened by memory map in a millisecond.

All ranks and loader workers of a machine share the pages of the one file; nothing is parsed again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.annotation_json import CategoryEntry
from proxydet.data.columns import ColumnFile
from proxydet.data.store_build import STORE_KIND, STORE_VERSION, build_store
from proxydet.data.store_report import StoreReport
from proxydet.errors import DataError
from proxydet.files import build_once, remembered_sha256
from proxydet.paths import cache_folder
from proxydet.reporting import SILENT, Progress

_logger = logging.getLogger(__name__)


class _Meta(msgspec.Struct, frozen=True):
    categories: list[CategoryEntry]
    report: StoreReport
    source: str


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image and its annotations. Arrays are read-only views of the store.

    Attributes:
        index: Row of the image in the store.
        image_id: Its id in the annotation file.
        file_name: Path below an image root, with forward slashes.
        height: Pixels.
        width: Pixels.
        annotation_ids_A: int64 (A,).
        boxes_A4: float32 (A, 4), xyxy in pixels, inside the image.
        categories_A: int32 (A,), rows of the store's categories.
        areas_A: float32 (A,), square pixels of the mask.
        crowd_A: bool (A,), whether the annotation stands for a group.
    """

    index: int
    image_id: int
    file_name: str
    height: int
    width: int
    annotation_ids_A: npt.NDArray[np.int64]
    boxes_A4: npt.NDArray[np.float32]
    categories_A: npt.NDArray[np.int32]
    areas_A: npt.NDArray[np.float32]
    crowd_A: npt.NDArray[np.bool_]
    first_annotation: int
    """Row of the first of the annotations in the store."""

    def __len__(self) -> int:
        return len(self.boxes_A4)


class AnnotationStore:
    """The columns of one annotation file.

    Make one with `open`. It can be pickled: what travels is its path.

    Attributes:
        path: The store's file.
        categories: The categories, in ascending order of their id; annotations refer to their position.
        report: What was dropped and mended when the store was made.
        source_name: Name of the annotation file.
        image_ids_I: int64 (I,).
        sizes_I2: int32 (I, 2), height and width in pixels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = ColumnFile(path, kind=STORE_KIND, version=STORE_VERSION)
        meta = self._columns.meta(_Meta)
        self.categories: tuple[CategoryEntry, ...] = tuple(meta.categories)
        self.report = meta.report
        self.source_name = meta.source
        self.image_ids_I: npt.NDArray[np.int64] = self._columns["image_id"]
        self.sizes_I2: npt.NDArray[np.int32] = self._columns["size"]
        self._names = self._columns["names"]
        self._name_offsets = self._columns["name_offsets"]
        self._offsets = self._columns["annotation_offsets"]
        self._point_offsets = self._columns["point_offsets"]
        self._coordinates = self._columns["coordinates"]
        self._runs = self._columns["runs"]

    @classmethod
    def open(
        cls,
        source: Path | str,
        *,
        cache: Path | None = None,
        progress: Progress = SILENT,
        warn: bool = True,
    ) -> AnnotationStore:
        """Open the store of an annotation file, after making it where there is none.

        Args:
            source: COCO, LVIS or image-label JSON.
            cache: Folder of the stores; None means the user's cache folder.
            progress: Where to show the conversion.
            warn: Log what the conversion drops and mends; False where the caller shows the report itself.

        Raises:
            DataError: the file cannot be read.
        """
        source = Path(source)
        path = cls.path_for(source, cache=cache)
        made_here = False

        def build(target: Path) -> None:
            nonlocal made_here
            made_here = True
            build_store(source, target, progress=progress)
            if cls.path_for(source, cache=cache) != target:
                target.unlink()
                raise DataError(
                    f"{source} changed while it was read",
                    hint="run the same command again when nothing writes to it",
                    path=source,
                )

        build_once(path, build)
        store = cls(path)
        if made_here and warn:
            for line in store.report.lines():
                _logger.warning("%s: %s", source.name, line)
        return store

    @staticmethod
    def path_for(source: Path, *, cache: Path | None = None) -> Path:
        """Return where the store of an annotation file is, or would be made.

        Raises:
            DataError: the file cannot be read.
        """
        folder = cache_folder("stores") if cache is None else cache
        digest = remembered_sha256(
            source,
            folder,
            hint="check the paths in the data description; they are relative to its folder",
            error=DataError,
        )
        return folder / f"{digest[:32]}-v{STORE_VERSION}.columns"

    def __len__(self) -> int:
        return len(self.image_ids_I)

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationStore, (self.path,)

    @property
    def has_masks(self) -> bool:
        """Whether any annotation has a mask."""
        return self.report.without_mask < self.report.annotations_kept

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column over all annotations: ``image``, ``category``, ``box``, ``area``, ``crowd``, ..."""
        return self._columns[name]

    def file_name(self, index: int) -> str:
        """Return the path of an image below its root."""
        start, end = self._name_offsets[index : index + 2]
        return bytes(self._names[start:end]).decode("utf-8", "surrogatepass")

    def record(self, index: int) -> ImageRecord:
        """Return image ``index`` with its annotations."""
        start, end = (int(offset) for offset in self._offsets[index : index + 2])
        height, width = (int(side) for side in self.sizes_I2[index])
        return ImageRecord(
            index=index,
            image_id=int(self.image_ids_I[index]),
            file_name=self.file_name(index),
            height=height,
            width=width,
            annotation_ids_A=self._columns["annotation_id"][start:end],
            boxes_A4=self._columns["box"][start:end],
            categories_A=self._columns["category"][start:end],
            areas_A=self._columns["area"][start:end],
            crowd_A=self._columns["crowd"][start:end],
            first_annotation=start,
        )

    def labels(self, index: int, field: str) -> npt.NDArray[np.int32]:
        """Return the category rows of an image's list ``field``.

        Args:
            index: Row of the image.
            field: ``neg_category_ids``, ``not_exhaustive_category_ids`` or ``pos_category_ids``.
        """
        start, end = self._columns[f"{field}_offsets"][index : index + 2]
        labels: npt.NDArray[np.int32] = self._columns[field][start:end]
        return labels

    def polygons(self, annotation: int) -> list[npt.NDArray[np.float32]]:
        """Return the polygons of annotation row ``annotation``, each (2n,) as x, y, x, y, ... in pixels."""
        first = int(self._columns["polygon_start"][annotation])
        count = int(self._columns["polygon_count"][annotation])
        ends = self._point_offsets[first : first + count + 1].tolist()
        return [self._coordinates[start:end] for start, end in itertools.pairwise(ends)]

    def run_lengths(self, annotation: int) -> npt.NDArray[np.uint32]:
        """Return the run lengths of annotation row ``annotation`` (see `run_lengths.to_mask`); empty without."""
        start = int(self._columns["run_start"][annotation])
        runs: npt.NDArray[np.uint32] = self._runs[
            start : start + int(self._columns["run_count"][annotation])
        ]
        return runs

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return how many images and how many annotations each category has, crowds included: int64 (C,) each."""
        classes = len(self.categories)
        category = self.column("category").astype(np.int64)
        pairs = np.unique(self.column("image").astype(np.int64) * classes + category)
        images = np.bincount(pairs % classes if classes else pairs, minlength=classes)
        return images, np.bincount(category, minlength=classes)

    def digest(self) -> str:
        """Return a digest of the annotation file's content, as in the store's name."""
        return hashlib.sha256(self.path.stem.encode()).hexdigest()

    def damaged_columns(self) -> list[str]:
        """Read the whole file and return the names of columns that changed since they were written."""
        return self._columns.damaged_columns()
