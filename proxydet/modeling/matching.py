"""Which region stands for which object: ground truth, matching and sampling for a whole batch at once.

Dimensions: B images, R regions of an image (padded), G objects of an image (padded), C classes.
Labels: [0, C) a class, C background, -1 a padded row. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from proxydet.modeling.geometry import pairwise_iou

if TYPE_CHECKING:
    from detectron2.structures import BitMasks, Instances, PolygonMasks

PADDING = -1
# What the published code gives ground-truth boxes that join the proposals: the logit of a probability of nearly 1.
GROUND_TRUTH_OBJECTNESS = math.log((1.0 - 1e-10) / (1 - (1.0 - 1e-10)))


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The objects of a batch of images.

    Attributes:
        boxes_BG4: xyxy pixels; zero where padded.
        classes_BG: int64 in [0, C); zero where padded.
        valid_BG: bool, False where padded.
        counts: Objects of each image, known without asking the device.
        masks: Each image's masks, one an object; None where an image comes without.
        masked_BG: bool, whether the object has a mask: of one without, the entry in ``masks`` is empty.
    """

    boxes_BG4: Tensor
    classes_BG: Tensor
    valid_BG: Tensor
    counts: tuple[int, ...]
    masks: tuple[PolygonMasks | BitMasks | None, ...]
    masked_BG: Tensor

    @classmethod
    def from_instances(cls, instances: tuple[Instances, ...], device: torch.device) -> GroundTruth:
        """Collect ``gt_boxes``, ``gt_classes`` and (where there) ``gt_masks`` of every image, on one device.

        Every object of an image with ``gt_masks`` has a mask, unless ``gt_masked`` (bool) says otherwise.

        Boxes and classes are put together where they are and moved in one piece, so that moving them does not wait for
        the device once an image.
        """
        counts = tuple(len(image) for image in instances)
        boxes_BG4 = pad_sequence([image.gt_boxes.tensor.float() for image in instances], True)
        valid_BG = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return cls(
            boxes_BG4=boxes_BG4.to(device, non_blocking=True),
            classes_BG=pad_sequence([image.gt_classes for image in instances], True).to(
                device, non_blocking=True
            ),
            valid_BG=valid_BG.to(device, non_blocking=True),
            counts=counts,
            masks=tuple(
                image.gt_masks.to(device, non_blocking=True) if image.has("gt_masks") else None
                for image in instances
            ),
            masked_BG=pad_sequence([_masked(image) for image in instances], True).to(
                device, non_blocking=True
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Boxes that the heads pool from.

    Attributes:
        boxes_BR4: xyxy pixels; zero where padded.
        objectness_BR: What the proposal network gave them; carried through the cascade.
        valid_BR: bool, False where padded.
    """

    boxes_BR4: Tensor
    objectness_BR: Tensor
    valid_BR: Tensor

    @property
    def image_N(self) -> Tensor:
        """The image of each region when all are put in one row: int64 (B * R,)."""
        images, regions = self.valid_BR.shape
        return torch.arange(images, device=self.valid_BR.device).repeat_interleave(regions)

    def with_boxes(self, boxes_BR4: Tensor, valid_BR: Tensor) -> Regions:
        """Return the same regions with other boxes, zero where not valid."""
        return Regions(
            boxes_BR4=torch.where(valid_BR[:, :, None], boxes_BR4, 0.0),
            objectness_BR=self.objectness_BR,
            valid_BR=valid_BR,
        )


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each region stands for.

    Attributes:
        labels_BR: int64 in [-1, C].
        objects_BR: int64, the object of its image that overlaps most (also for background); 0 where there is none.
    """

    labels_BR: Tensor
    objects_BR: Tensor

    def boxes_from(self, truth: GroundTruth) -> Tensor:
        """Return the box of each region's object: (B, R, 4), zeros where the image has none."""
        if truth.boxes_BG4.shape[1] == 0:
            return truth.boxes_BG4.new_zeros(*self.labels_BR.shape, 4)
        index_BR4 = self.objects_BR[:, :, None].expand(-1, -1, 4)
        return truth.boxes_BG4.gather(1, index_BR4)

    def masked_from(self, truth: GroundTruth) -> Tensor:
        """Return whether each region's object has a mask: bool (B, R), False where the image has no object."""
        if truth.masked_BG.shape[1] == 0:
            return torch.zeros_like(self.labels_BR, dtype=torch.bool)
        return truth.masked_BG.gather(1, self.objects_BR)


def _masked(image: Instances) -> Tensor:
    """Return which objects of an image have a mask: bool (G,)."""
    if image.has("gt_masked"):
        masked_G: Tensor = image.gt_masked
        return masked_G
    return torch.full((len(image),), image.has("gt_masks"), dtype=torch.bool)


def match(regions: Regions, truth: GroundTruth, threshold: float, classes: int) -> Assignment:
    """Give each region the class of the object that it overlaps most.

    Args:
        regions: The boxes.
        truth: The objects.
        threshold: Overlap from which a region counts as the object; below, it is background.
        classes: C, which is also the background's label.
    """
    if truth.boxes_BG4.shape[1] == 0:
        objects_BR = torch.zeros_like(regions.valid_BR, dtype=torch.int64)
        labels_BR = torch.full_like(objects_BR, classes)
    else:
        iou_BRG = pairwise_iou(regions.boxes_BR4, truth.boxes_BG4)
        iou_BRG = iou_BRG.masked_fill(~truth.valid_BG[:, None, :], -1.0)
        best_BR, objects_BR = iou_BRG.max(dim=2)
        labels_BR = truth.classes_BG.gather(1, objects_BR)
        labels_BR = torch.where(best_BR >= threshold, labels_BR, classes)
    return Assignment(
        labels_BR=torch.where(regions.valid_BR, labels_BR, PADDING), objects_BR=objects_BR
    )


def append_ground_truth(regions: Regions, truth: GroundTruth) -> Regions:
    """Return the regions with every object's own box added at the end of its image."""
    objectness_BG = torch.full_like(truth.boxes_BG4[:, :, 0], GROUND_TRUTH_OBJECTNESS)
    return Regions(
        boxes_BR4=torch.cat([regions.boxes_BR4, truth.boxes_BG4], dim=1),
        objectness_BR=torch.cat([regions.objectness_BR, objectness_BG * truth.valid_BG], dim=1),
        valid_BR=torch.cat([regions.valid_BR, truth.valid_BG], dim=1),
    )


def sample(
    regions: Regions,
    assignment: Assignment,
    *,
    size: int,
    positive_fraction: float,
    classes: int,
    generator: torch.Generator | None,
) -> tuple[Regions, Assignment]:
    """Draw the regions to train on: objects up to a share, the rest background.

    Args:
        regions: All boxes.
        assignment: What they stand for.
        size: Regions to draw an image; fewer where there are not enough.
        positive_fraction: Largest share of ``size`` that may be objects.
        classes: C, the background's label.
        generator: Source of randomness; None is torch's global one.
    """
    labels_BR = assignment.labels_BR
    positive_BR = (labels_BR >= 0) & (labels_BR < classes)
    background_BR = labels_BR == classes
    positives_B = positive_BR.sum(dim=1, keepdim=True).clamp(max=int(size * positive_fraction))
    chance_BR = random_like(regions.objectness_BR, generator)
    chosen_BR = (_rank(positive_BR, chance_BR) < positives_B) & positive_BR
    chosen_BR |= (_rank(background_BR, chance_BR) < size - positives_B) & background_BR
    # A stable sort on "not chosen" moves the drawn rows to the front and keeps their order.
    order_BS = (~chosen_BR).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    valid_BS = chosen_BR.gather(1, order_BS)
    drawn = Regions(
        boxes_BR4=regions.boxes_BR4.gather(1, order_BS[:, :, None].expand(-1, -1, 4)),
        objectness_BR=regions.objectness_BR.gather(1, order_BS),
        valid_BR=valid_BS,
    )
    return drawn, Assignment(
        labels_BR=torch.where(valid_BS, labels_BR.gather(1, order_BS), PADDING),
        objects_BR=assignment.objects_BR.gather(1, order_BS),
    )


def random_like(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers in [0, 1) of the shape, type and device of ``values``, drawn where the generator lives."""
    device = values.device if generator is None else generator.device
    drawn = torch.rand(values.shape, generator=generator, device=device, dtype=values.dtype)
    return drawn.to(values.device, non_blocking=True)


def _rank(among_BR: Tensor, chance_BR: Tensor) -> Tensor:
    """Return each row's place in a random order of the rows that are ``among``; the others come after them."""
    order_BR = (chance_BR + (~among_BR)).argsort(dim=1, stable=True)
    return order_BR.argsort(dim=1)
