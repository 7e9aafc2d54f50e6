"""Turning the annotation records of a file into columns, by stated rules.

An annotation is dropped when: its record cannot be read; its image or category is not in the file; it has no box and
no polygon; its box is not finite, or not wider and higher than 0; its box lies outside the image.
It is mended when: its box is missing or not numbers (taken from its polygons); its box reaches beyond the image by a
pixel or more (clipped; less is clipped too and not counted); a polygon has fewer than 3 points, an odd number of
coordinates, or coordinates that are no numbers (that polygon is removed); its run lengths do not fit the image (the
mask is removed); its area is missing or negative (that of its box); its id is missing or was there before (a new one).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.annotation_json import AnnotationEntry, RunLengths, decode_entry
from proxydet.data.columns import Column, ColumnWriter
from proxydet.data.run_lengths import parse_counts
from proxydet.data.store_report import StoreReport
from proxydet.data.store_tables import ImageTable

_LARGEST_COORDINATE = 1e7
_CLIP_COUNTED_FROM = 1.0
_NO_ID = -(2**63)
_DTYPES: dict[str, npt.DTypeLike] = {
    "annotation_id": np.int64,
    "image": np.int32,
    "category": np.int32,
    "box": np.float64,
    "area": np.float32,
    "crowd": np.bool_,
    "polygon_start": np.int64,
    "polygon_count": np.int32,
    "run_start": np.int64,
    "run_count": np.int32,
}


class AnnotationTable:
    """Collects annotations chunk by chunk; polygon coordinates go to the file at once, the rest at the end.

    Args:
        images: The images that are kept.
        row_of_category: Row of each category id.
        writer: Where the columns go; no other column may be written between the first `add` and `write`.
        report: Counts what is dropped and mended.
    """

    def __init__(
        self,
        images: ImageTable,
        row_of_category: dict[int, int],
        writer: ColumnWriter,
        report: StoreReport,
    ) -> None:
        self._images = images
        self._row_of_category = row_of_category
        self._writer = writer
        self._report = report
        self._decoder = msgspec.json.Decoder(AnnotationEntry)
        self._chunks: list[dict[str, Column]] = []
        self._point_offsets = array("q", [0])
        self._runs: list[npt.NDArray[np.uint32]] = []
        self._run_total = 0
        writer.append("coordinates", np.empty(0, dtype=np.float32))

    def add(self, raws: Sequence[msgspec.Raw], start: int) -> None:
        """Check and collect a chunk of annotations.

        Args:
            raws: Records.
            start: Position of the first of them in the file, for the report.
        """
        coordinates = array("f")
        labels: list[object] = []
        rows: list[tuple[Any, ...]] = []
        for position, raw in enumerate(raws, start):
            try:
                entry = decode_entry(raw, self._decoder, AnnotationEntry)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                self._report.drop_annotations(
                    "annotation record not readable", [f"position {position}"]
                )
                continue
            label = entry.id if entry.id is not None else f"position {position}"
            row = self._row(entry, label, coordinates)
            if row:
                labels.append(label)
                rows.append(row)
        self._writer.append("coordinates", np.frombuffer(coordinates, dtype=np.float32))
        if rows:
            columns = zip(*rows, strict=True)
            chunk = {
                name: np.array(values, dtype=dtype)
                for (name, dtype), values in zip(_DTYPES.items(), columns, strict=True)
            }
            self._chunks.append(self._check_boxes(chunk, np.array(labels, dtype=object)))

    def write(self) -> None:
        """Write all columns but ``coordinates``, sorted by image (in the order of the file within an image)."""
        columns = {name: self._joined(name) for name in _DTYPES}
        columns["annotation_id"] = self._unique_ids(columns["annotation_id"])
        columns["box"] = columns["box"].astype(np.float32)
        order = np.argsort(columns["image"], kind="stable")
        for name, column in columns.items():
            self._writer.add(name, column[order])
        offsets = np.zeros(self._report.images_kept + 1, dtype=np.int64)
        counts = np.bincount(columns["image"], minlength=self._report.images_kept)
        np.cumsum(counts, out=offsets[1:])
        self._writer.add("annotation_offsets", offsets)
        self._writer.add("point_offsets", np.frombuffer(self._point_offsets, dtype=np.int64))
        self._writer.add("runs", np.concatenate([np.empty(0, dtype=np.uint32), *self._runs]))
        masked = (columns["polygon_count"] > 0) | (columns["run_count"] > 0)
        self._report.annotations_kept = len(order)
        self._report.without_mask = int(np.count_nonzero(~masked))

    def _joined(self, name: str) -> Column:
        empty = np.empty((0, 4) if name == "box" else 0, dtype=_DTYPES[name])
        return np.concatenate([empty, *(chunk[name] for chunk in self._chunks)])

    def _row(
        self, entry: AnnotationEntry, label: object, coordinates: array[float]
    ) -> tuple[Any, ...] | None:
        """Return the values of one annotation in the order of ``_DTYPES``, or None when it is dropped."""
        image = self._images.row_of.get(entry.image_id)
        category = self._row_of_category.get(entry.category_id)
        if image is None or category is None:
            self._report.drop_annotations(self._unknown(entry, image), [label])
            return None
        first_polygon, first_point = len(self._point_offsets) - 1, len(coordinates)
        first_run = self._run_total
        if isinstance(entry.segmentation, RunLengths):
            self._add_runs(entry.segmentation, image, label)
        elif entry.segmentation:
            self._add_polygons(entry.segmentation, label, coordinates)
        box = entry.bbox
        if box is None:
            if len(coordinates) == first_point:
                self._report.drop_annotations("annotation without a usable box or polygon", [label])
                return None
            box = _extent_xywh(coordinates[first_point:])
            self._report.repair("box taken from the polygons", [label])
        return (
            _NO_ID if entry.id is None else entry.id,
            image,
            category,
            box,
            np.nan if entry.area is None else entry.area,
            entry.iscrowd != 0,
            first_polygon,
            len(self._point_offsets) - 1 - first_polygon,
            first_run,
            self._run_total - first_run,
        )

    def _unknown(self, entry: AnnotationEntry, image: int | None) -> str:
        if image is not None:
            return "annotation of an unknown category"
        if entry.image_id in self._images.dropped_ids:
            return "annotation of a dropped image"
        return "annotation of an unknown image"

    def _add_polygons(
        self, polygons: list[list[float]], label: object, coordinates: array[float]
    ) -> None:
        base = self._point_offsets[-1] - len(coordinates)
        removed = 0
        for polygon in polygons:
            if len(polygon) < 6 or len(polygon) % 2 or not _in_range(polygon):
                removed += 1
                continue
            coordinates.extend(polygon)
            self._point_offsets.append(base + len(coordinates))
        if removed:
            self._report.repair("polygon removed that is not 3 or more points", [label] * removed)

    def _add_runs(self, mask: RunLengths, image: int, label: object) -> None:
        runs = None
        if tuple(self._images.sizes_I2[image]) == mask.size:
            runs = parse_counts(mask.counts, mask.size)
        if runs is None or not runs[1::2].any():
            self._report.repair("mask removed whose run lengths do not fit the image", [label])
            return
        self._runs.append(runs)
        self._run_total += len(runs)

    def _check_boxes(self, chunk: dict[str, Column], labels: Column) -> dict[str, Column]:
        """Turn xywh into clipped xyxy, fill missing areas, and drop what has no box inside its image."""
        xywh = chunk["box"]
        sized = np.isfinite(xywh).all(axis=1) & (xywh[:, 2:] > 0).all(axis=1)
        size_wh = self._images.sizes_I2[chunk["image"]][:, ::-1]
        # Absurd numbers of a damaged file may overflow on the way; what they become is checked below.
        with np.errstate(over="ignore", invalid="ignore"):
            raw = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
            clipped = np.clip(raw, 0, np.tile(size_wh, 2)).astype(np.float32)
            moved = (np.abs(clipped - raw) >= _CLIP_COUNTED_FROM).any(axis=1)
        sides = clipped[:, 2:] - clipped[:, :2]
        inside = (sides > 0).all(axis=1)
        kept = sized & inside
        area = chunk["area"]
        no_area = ~(np.isfinite(area) & (area >= 0))
        self._report.drop_annotations("box not finite or without width and height", labels[~sized])
        self._report.drop_annotations("box outside the image", labels[sized & ~inside])
        self._report.repair("box clipped to the image", labels[kept & moved])
        self._report.repair("area taken from the box", labels[kept & no_area])
        chunk["box"] = clipped
        chunk["area"] = np.where(no_area, sides.prod(axis=1), area)
        return {name: column[kept] for name, column in chunk.items()}

    def _unique_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(ids), dtype=np.bool_)
        again[first] = False
        again |= ids == _NO_ID
        if again.any():
            which = ("none" if number == _NO_ID else number for number in ids[again].tolist())
            self._report.repair("annotation id missing or repeated: a new one given", which)
            free = np.setdiff1d(np.arange(1, 2 * len(ids) + 1), ids[~again])
            ids[again] = free[: np.count_nonzero(again)]
        return ids


def _in_range(polygon: list[float]) -> bool:
    return min(polygon) > -_LARGEST_COORDINATE and max(polygon) < _LARGEST_COORDINATE


def _extent_xywh(coordinates: array[float]) -> tuple[float, float, float, float]:
    x, y = coordinates[0::2], coordinates[1::2]
    return min(x), min(y), max(x) - min(x), max(y) - min(y)
