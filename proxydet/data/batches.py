"""What the loader hands to the trainer: a batch of one kind of supervision.

Dimensions: H, W the size of one image after augmentation (images of a batch may differ), L labels of an image,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from proxydet.data.formats.records import Identifier

if TYPE_CHECKING:
    from detectron2.structures import Instances

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
        return self._with_images(lambda image: image.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """Return the batch with its images in page-locked memory (called by torch's loader)."""
        return self._with_images(torch.Tensor.pin_memory)

    def _with_images(self: B, change: Callable[[torch.Tensor], torch.Tensor]) -> B:
        return replace(self, images=tuple(map(change, self.images)))

    def _check(self, annotations: int) -> None:
        lengths = (len(self.images), annotations, len(self.image_ids))
        if len(set(lengths)) != 1 or not self.images:
            raise ValueError(
                f"a batch needs as many annotations and ids as images, at least 1: {lengths}"
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

    def __post_init__(self) -> None:
        self._check(len(self.instances))


@dataclass(frozen=True, kw_only=True)
class ImageLabelBatch(_Batch):
    """Images of which only the classes are known.

    Attributes:
        labels: B int64 tensors (L,), the classes in the image, in [0, C).
    """

    labels: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        self._check(len(self.labels))


Batch: TypeAlias = BoxBatch | ImageLabelBatch
