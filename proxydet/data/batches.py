"""What the loader hands to the trainer: a batch of one kind of supervision.

Dimensions: H, W the size of one image after augmentation (images of a batch may differ), L labels of an image,
C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from detectron2.structures import Instances

ImageId: TypeAlias = int | str


@dataclass(frozen=True, kw_only=True)
class BoxBatch:
    """Images with their objects.

    Attributes:
        images: B uint8 tensors (3, H, W), RGB.
        instances: B detectron2 ``Instances`` of the size of their image, with ``gt_boxes`` (``Boxes``, xyxy pixels),
            ``gt_classes`` (int64 in [0, C)) and, where masks are trained, ``gt_masks`` (``PolygonMasks`` or
            ``BitMasks``) with ``gt_masked`` (bool, whether the object has one); may hold no object.
        image_ids: B identifiers, as the annotation file has them.
        skipped: Names of images that were planned for this batch and left out because they cannot be read.
    """

    images: tuple[torch.Tensor, ...]
    instances: tuple[Instances, ...]
    image_ids: tuple[ImageId, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lengths(len(self.images), len(self.instances), len(self.image_ids))

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> BoxBatch:
        """Return the batch with its images on ``device``; the network moves the objects there, in one piece."""
        return BoxBatch(
            images=tuple(image.to(device, non_blocking=True) for image in self.images),
            instances=self.instances,
            image_ids=self.image_ids,
            skipped=self.skipped,
        )

    def pin_memory(self) -> BoxBatch:
        """Return the batch with its images in page-locked memory (called by torch's loader)."""
        return BoxBatch(
            images=tuple(image.pin_memory() for image in self.images),
            instances=self.instances,
            image_ids=self.image_ids,
            skipped=self.skipped,
        )


@dataclass(frozen=True, kw_only=True)
class ImageLabelBatch:
    """Images of which only the classes are known.

    Attributes:
        images: B uint8 tensors (3, H, W), RGB.
        labels: B int64 tensors (L,), the classes in the image, in [0, C).
        image_ids: B identifiers, as the source has them.
        skipped: Names of images that were planned for this batch and left out because they cannot be read.
    """

    images: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    image_ids: tuple[ImageId, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lengths(len(self.images), len(self.labels), len(self.image_ids))

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageLabelBatch:
        """Return the batch with its images on ``device``; the network moves the labels there, in one piece."""
        return ImageLabelBatch(
            images=tuple(image.to(device, non_blocking=True) for image in self.images),
            labels=self.labels,
            image_ids=self.image_ids,
            skipped=self.skipped,
        )

    def pin_memory(self) -> ImageLabelBatch:
        """Return the batch with its images in page-locked memory (called by torch's loader)."""
        return ImageLabelBatch(
            images=tuple(image.pin_memory() for image in self.images),
            labels=self.labels,
            image_ids=self.image_ids,
            skipped=self.skipped,
        )


Batch: TypeAlias = BoxBatch | ImageLabelBatch


def _check_lengths(*lengths: int) -> None:
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            f"a batch needs as many annotations and ids as images, at least 1: {lengths}"
        )
