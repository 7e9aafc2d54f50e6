"""From an image's record in the store to detectron2 ``Instances`` in the view that training sees.

An object is left out of training when it is a crowd, when its class is novel, when it has no mask although masks are
trained, or when nothing of it is in the view: its clipped box has a side below `SMALLEST_SIDE`, or all of its mask lies
outside.

Dimensions: A annotations of the image, K kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import proxydet.compat.d2  # noqa: F401

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from proxydet.data.masks import decode
from proxydet.data.store import AnnotationStore, ImageRecord
from proxydet.data.transforms import View

SMALLEST_SIDE = 1e-5
"""Boxes with a side of at most this many pixels after clipping are left out (detectron2's limit)."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which annotations training uses, and as which class.

    Attributes:
        rows_K: int64, the vocabulary's row of each category of the store.
        base_C: bool, whether each class of the vocabulary may be trained on.
        masks: Whether objects need masks.
    """

    rows_K: npt.NDArray[np.int64]
    base_C: BoolArray
    masks: bool

    def usable(self, store: AnnotationStore) -> BoolArray:
        """Return which annotations of a store may be used, whatever the view: bool over all annotations."""
        usable = store.trainable(self.base_C[self.rows_K])
        if self.masks:
            usable &= store.masked_A
        return usable


def make_instances(
    store: AnnotationStore, record: ImageRecord, usable_A: BoolArray, view: View, targets: Targets
) -> Instances:
    """Return the objects of an image in a view of it.

    Args:
        store: Where the record comes from.
        record: The image with its annotations.
        usable_A: bool (A,), the record's part of `Targets.usable`.
        view: What of the image is seen, and how.
        targets: Classes and whether to make masks.

    Returns:
        ``Instances`` of the view's size with ``gt_boxes``, ``gt_classes`` and, with masks, ``gt_masks``: polygons, or
        bitmaps where an object of the image has run lengths.
    """
    boxes_A4 = view.boxes(record.boxes_A4)
    sides = boxes_A4[:, 2:] - boxes_A4[:, :2]
    kept = np.flatnonzero(usable_A & (sides > SMALLEST_SIDE).all(axis=1))
    masks: PolygonMasks | BitMasks | None = None
    if targets.masks:
        kept, masks = _masks(store, record, kept, view)
    instances = Instances(view.size)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes_A4[kept].astype(np.float32)))
    instances.gt_classes = torch.from_numpy(targets.rows_K[record.categories_A[kept]])
    if masks is not None:
        instances.gt_masks = masks
    return instances


def _masks(
    store: AnnotationStore, record: ImageRecord, rows: npt.NDArray[np.int64], view: View
) -> tuple[npt.NDArray[np.int64], PolygonMasks | BitMasks]:
    """Return the rows whose mask is in the view, and their masks."""
    annotations = (record.first_annotation + rows).tolist()
    if store.column("rle_length")[annotations].any():
        bitmaps = [_bitmap(store, record, annotation, view) for annotation in annotations]
        seen = [bool(bitmap.any()) for bitmap in bitmaps]
        visible = [bitmap for bitmap, is_seen in zip(bitmaps, seen, strict=True) if is_seen]
        stacked = np.stack(visible) if visible else np.zeros((0, *view.size), dtype=np.bool_)
        return rows[np.array(seen, dtype=np.bool_)], BitMasks(torch.from_numpy(stacked))
    polygons = [view.polygons(_polygons(store, annotation)) for annotation in annotations]
    seen = [any(_touches(polygon, view.size) for polygon in parts) for parts in polygons]
    visible_polygons = [parts for parts, is_seen in zip(polygons, seen, strict=True) if is_seen]
    return rows[np.array(seen, dtype=np.bool_)], PolygonMasks(visible_polygons)


def _bitmap(store: AnnotationStore, record: ImageRecord, annotation: int, view: View) -> BoolArray:
    if rle := store.rle(annotation):
        return view.mask(decode(rle, (record.height, record.width)))
    polygons = PolygonMasks([view.polygons(_polygons(store, annotation))])
    bitmap: BoolArray = BitMasks.from_polygon_masks(polygons, *view.size).tensor[0].numpy()
    return bitmap


def _polygons(store: AnnotationStore, annotation: int) -> list[npt.NDArray[np.float32]]:
    return [polygon.astype(np.float32) for polygon in store.polygons(annotation)]


def _touches(polygon: npt.NDArray[np.float64], size: tuple[int, int]) -> bool:
    """Whether the extent of a polygon meets the view: where not, its mask there is certainly empty."""
    x, y = polygon[0::2], polygon[1::2]
    return bool(x.max() > 0 and y.max() > 0 and x.min() < size[1] and y.min() < size[0])
