"""What the loader hands to the trainer: a batch of one kind of supervision.

Dimensions: H, W the size of one image after augmentation (images of a batch may differ), L labels of an image,
C classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from proxydet.data.masks import decode
from proxydet.errors import DataError

if TYPE_CHECKING:
    from proxydet.data.images import View
    from proxydet.data.records import Identifier
    from proxydet.data.store import AnnotationStore, ImageRecord
    from proxydet.vocabulary.vocabulary import Vocabulary

B = TypeVar("B", bound="_Batch")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What batches have in common.

    Attributes:
        images: B uint8 tensors (3, H, W), RGB; at least one.
        image_ids: B identifiers, as the annotation file or the image-label source has them.
        skipped: Names of images that were planned for this batch and left out because they cannot be read.
    """

    images: tuple[torch.Tensor, ...]
    image_ids: tuple[Identifier, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self: B, device: torch.device | str) -> B:
        """Return the batch with its images on ``device``; the network moves the annotations there, in one piece."""
        images = tuple(image.to(device, non_blocking=True) for image in self.images)
        return replace(self, images=images)

    def pin_memory(self: B) -> B:
        """Return the batch with its images in page-locked memory (called by torch's loader)."""
        return replace(self, images=tuple(image.pin_memory() for image in self.images))

    def __post_init__(self) -> None:
        counts = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "skipped"}
        if len(set(counts.values())) != 1 or not self.images:
            raise ValueError(
                f"a batch needs as many annotations and ids as images, at least 1: {counts}"
            )


@dataclass(frozen=True, kw_only=True)
class BoxBatch(_Batch):
    """Images with their objects.

    Attributes:
        instances: B detectron2 ``Instances`` of the size of their image, with ``gt_boxes`` (``Boxes``, xyxy pixels),
            ``gt_classes`` (int64 in [0, C)) and, where masks are trained, ``gt_masks`` (``PolygonMasks`` or
            ``BitMasks``) with ``gt_masked`` (bool, whether the object has one); may hold no object.
    """

    instances: tuple[Instances, ...]


@dataclass(frozen=True, kw_only=True)
class ImageLabelBatch(_Batch):
    """Images of which only the classes are known.

    Attributes:
        labels: B int64 tensors (L,), the classes in the image, in [0, C).
    """

    labels: tuple[torch.Tensor, ...]


Batch: TypeAlias = BoxBatch | ImageLabelBatch


SMALLEST_SIDE = 1e-5
"""Boxes with a side of at most this many pixels after clipping are left out (detectron2's limit)."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which annotations training uses, and as which class.

    Attributes:
        rows_K: int64, the vocabulary's row of each category of the store.
        base_C: bool, whether each class of the vocabulary may be trained on.
        masks: Whether masks are trained.
    """

    rows_K: npt.NDArray[np.int64]
    base_C: BoolArray
    masks: bool

    @classmethod
    def of(
        cls, store: AnnotationStore, vocabulary: Vocabulary, masks: Literal["auto"] | bool
    ) -> Targets:
        """Bring the categories of a store and the classes together, and decide whether masks are trained.

        Args:
            store: The annotations.
            vocabulary: The classes.
            masks: Whether to train masks; ``"auto"``: where an object to train on has one.

        Raises:
            DataError: A category is not in the vocabulary; or masks are to be trained, and no object has one.
        """
        targets = cls(
            rows_K=store.class_rows(vocabulary.names),
            base_C=vocabulary.base,
            masks=masks is not False,
        )
        usable = targets.usable(store)
        if not (usable & store.masked_A).any():
            if masks is True and usable.any():
                raise DataError(
                    f"{store.source_name} has boxes but no masks",
                    hint="to train a detector of boxes, leave data.masks at auto",
                )
            return replace(targets, masks=False)
        return targets

    def usable(self, store: AnnotationStore) -> BoolArray:
        """Return which annotations of a store may be used, whatever the view: bool over all annotations."""
        return store.trainable(self.base_C[self.rows_K])


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
        ``Instances`` of the view's size with ``gt_boxes``, ``gt_classes`` and, with masks, ``gt_masks`` (polygons, or
        bitmaps where an object of the image has run lengths) and ``gt_masked``: bool, whether the object has a mask; of
        one without, ``gt_masks`` is empty.
    """
    boxes_A4 = view.boxes(record.boxes_A4)
    sides = boxes_A4[:, 2:] - boxes_A4[:, :2]
    kept = np.flatnonzero(usable_A & (sides > SMALLEST_SIDE).all(axis=1))
    instances = Instances(view.size)
    if targets.masks:
        annotations = record.first_annotation + kept
        has_mask = store.masked_A[annotations]
        as_bitmaps = bool(store.column("rle_length")[annotations].any())
        masks: list[Any] = []
        seen: list[bool] = []
        for annotation in annotations.tolist():
            # The store keeps more digits than polygons are trained with.
            polygons = view.polygons([p.astype(np.float32) for p in store.polygons(annotation)])
            if not as_bitmaps:
                masks.append(polygons)
                seen.append(any(_touches(polygon, view.size) for polygon in polygons))
                continue
            if rle := store.rle(annotation):
                masks.append(view.mask(decode(rle, (record.height, record.width))))
            else:
                drawn = BitMasks.from_polygon_masks(PolygonMasks([polygons]), *view.size)
                masks.append(drawn.tensor[0].numpy())
            seen.append(bool(masks[-1].any()))
        # An object whose mask is outside the view is left out; one that has none keeps its box.
        chosen = np.array(seen, dtype=np.bool_) | ~has_mask
        kept, masks = kept[chosen], list(itertools.compress(masks, chosen))
        if as_bitmaps:
            stacked = np.stack(masks) if masks else np.zeros((0, *view.size), dtype=np.bool_)
            instances.gt_masks = BitMasks(torch.from_numpy(stacked))
        else:
            instances.gt_masks = PolygonMasks(masks)
        instances.gt_masked = torch.from_numpy(has_mask[chosen])
    instances.gt_boxes = Boxes(torch.from_numpy(boxes_A4[kept].astype(np.float32)))
    instances.gt_classes = torch.from_numpy(targets.rows_K[record.categories_A[kept]])
    return instances


def _touches(polygon: npt.NDArray[np.float64], size: tuple[int, int]) -> bool:
    """Whether the extent of a polygon meets the view: where not, its mask there is certainly empty."""
    x, y = polygon[0::2], polygon[1::2]
    return bool(x.max() > 0 and y.max() > 0 and x.min() < size[1] and y.min() < size[0])
