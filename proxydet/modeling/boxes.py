"""Boxes as tensors: overlap, regression deltas, clipping, cell centres, and non-maximum suppression (NMS) of a batch.

Boxes are (x1, y1, x2, y2) in pixels. Dimensions: B images, R regions of an image (padded), G objects of an image
(padded), N boxes, M cells. Nothing but NMS waits for the device.

NMS stops when enough boxes are kept. It decides from the best box down, so the best ``limit`` survivors depend only on
the boxes that score at least as high: taking a short prefix first, and a longer one only if it does not yield enough,
gives the same boxes.

How many boxes survive depends on the data, so each call of torchvision's kernel waits for a GPU. There, one call
suppresses all images of a batch, moved away from each other in float64, and the number of waits is that of the prefixes
taken, whatever the number of images and classes. A call costs the square of its number of boxes: a GPU has room for
that, but a CPU has not, and nothing to wait for. There, each image has a call of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

Weights = tuple[float, float, float, float]

# A refined box grows at most by this factor in each direction: from 16 to 1000 pixels.
_LARGEST_LOG_SCALE = math.log(1000.0 / 16.0)
SHIFTED_UP_TO = 1000
"""Most boxes of several classes that ``batched_nms`` handles in one piece: it moves the classes to places of their own, and
handles class by class above. Its float32 coordinates get coarse in far places, which decides near ties."""
# Bounds a call's memory on a GPU, a bit for each pair of boxes, to 512 MiB; a larger batch takes several calls.
_TOGETHER_UP_TO = 65_536


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Boxes of a batch of images that may hold an object: proposals, and what the heads make of them.

    Attributes:
        boxes_BR4: xyxy pixels; zero where padded. Proposals are not clipped to the image.
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
        return image_of_each([regions] * images, self.valid_BR.device)

    def with_boxes(self, boxes_BR4: Tensor, valid_BR: Tensor) -> Regions:
        """Return the same regions with other boxes, zero where not valid."""
        return Regions(
            boxes_BR4=torch.where(valid_BR[:, :, None], boxes_BR4, 0.0),
            objectness_BR=self.objectness_BR,
            valid_BR=valid_BR,
        )


def areas(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(dim=-1)
    return width * height


def pairwise_iou(boxes_BR4: Tensor, others_BG4: Tensor) -> Tensor:
    """Return intersection over union of all pairs within an image: (B, R, G), 0 where two boxes are apart."""
    top_left = torch.maximum(boxes_BR4[:, :, None, :2], others_BG4[:, None, :, :2])
    bottom_right = torch.minimum(boxes_BR4[:, :, None, 2:], others_BG4[:, None, :, 2:])
    shared_BRG = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union_BRG = areas(boxes_BR4)[:, :, None] + areas(others_BG4)[:, None, :] - shared_BRG
    return torch.where(shared_BRG > 0, shared_BRG / union_BRG, torch.zeros_like(shared_BRG))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Move corners into the image.

    Args:
        boxes: (..., 4).
        sizes: (..., 2), height and width of each box's image; broadcast against the boxes.
    """
    bounds = torch.stack([sizes[..., 1], sizes[..., 0]] * 2, dim=-1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), bounds)


def nonempty(boxes: Tensor) -> Tensor:
    """Return which boxes (..., 4) have a width and a height above 0: bool (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Return values as float32 on a device; unlike ``new_tensor``, it waits until they are staged at most, not for the device."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def apply_deltas(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """Move and scale boxes (R-CNN's parametrisation, Girshick 2015).

    Args:
        deltas: (..., 4): shift of the centre in box widths and heights, logarithm of the growth, each times its weight.
        boxes: (..., 4), the boxes to change.
        weights: The four factors by which ``deltas`` are scaled up.

    Returns:
        (..., 4) float32.
    """
    scaled = deltas.float() / constant(weights, deltas.device)
    sizes = boxes[..., 2:] - boxes[..., :2]
    # Factors of a half are exact, so each goes into the sum that it is needed for.
    centres = torch.add(boxes[..., :2], sizes, alpha=0.5) + scaled[..., :2] * sizes
    grown = sizes * scaled[..., 2:].clamp(max=_LARGEST_LOG_SCALE).exp()
    return torch.cat(
        [torch.sub(centres, grown, alpha=0.5), torch.add(centres, grown, alpha=0.5)], dim=-1
    )


def deltas_between(boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """Return the deltas (..., 4) by which `apply_deltas` turns ``boxes`` into ``targets``; both must be non-empty."""
    sizes, target_sizes = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    shift = (targets[..., :2] + 0.5 * target_sizes) - (boxes[..., :2] + 0.5 * sizes)
    deltas = torch.cat([shift / sizes, (target_sizes / sizes).log()], dim=-1)
    return deltas * constant(weights, deltas.device)


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Return the points (x, y) in pixels that the cells of a map stand for: (height * width, 2), row by row."""
    rows = torch.arange(height, device=device) * stride + stride // 2
    columns = torch.arange(width, device=device) * stride + stride // 2
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([across.flatten(), down.flatten()], dim=1).float()


def image_of_each(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return which image each of N rows belongs to, where the rows lie image after image: int64 (N,)."""
    if len(counts) == 1:  # of an export, too, which has no operator for what follows
        return torch.zeros(counts[0], dtype=torch.int64, device=device)
    repeats_B = torch.tensor(counts, dtype=torch.int64)
    image_N = torch.arange(len(counts)).repeat_interleave(repeats_B, output_size=sum(counts))
    return image_N.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class NmsInput:
    """Boxes of several images, image after image.

    Attributes:
        boxes_N4: xyxy.
        scores_N: Their scores; without classes, each image's must be in descending order.
        classes_N: int64, their classes, not negative; None where boxes are suppressed regardless of class.
        counts: Boxes of each image (B,).
        candidates: As for `keep_best_by_class`, of each image (B,); None where nothing was left out.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor | None = None
    counts: Sequence[int]
    candidates: Sequence[int] | None = None


def suppress(inputs: NmsInput, *, iou: float, limit: int) -> list[Tensor]:
    """Suppress overlapping boxes of the same image, and class where classes are given.

    Args:
        inputs: The boxes.
        iou: Overlap above which the lower-scored box is dropped.
        limit: Boxes to keep at most of each image.

    Returns:
        For each image int64, places of the kept boxes among all N, best first.
    """
    if _waits(inputs.boxes_N4.device):
        return _suppress_together(inputs, iou, limit)
    kept, start = [], 0
    for count, candidates in zip(inputs.counts, inputs.candidates or inputs.counts, strict=True):
        own = slice(start, start + count)
        boxes, scores = inputs.boxes_N4[own], inputs.scores_N[own]
        if inputs.classes_N is None:
            places = keep_best(boxes, scores, iou, limit)
        else:
            classes = inputs.classes_N[own]
            places = keep_best_by_class(boxes, scores, classes, iou, limit, candidates=candidates)
        kept.append(start + places)
        start += count
    return kept


def keep_best(boxes_N4: Tensor, scores_N: Tensor, iou: float, limit: int) -> Tensor:
    """Suppress overlapping boxes of one image regardless of class.

    Args:
        boxes_N4: Boxes by descending score.
        scores_N: Their scores.
        iou: Overlap above which the lower-scored box is dropped.
        limit: Boxes to keep at most.

    Returns:
        int64, positions of the kept boxes, best first.
    """
    prefix_length = 2 * limit
    while True:
        kept: Tensor = nms(boxes_N4[:prefix_length], scores_N[:prefix_length], iou)
        if len(kept) >= limit or prefix_length >= len(boxes_N4):
            return kept[:limit]
        prefix_length *= 4


def keep_best_by_class(
    boxes_N4: Tensor,
    scores_N: Tensor,
    classes_N: Tensor,
    iou: float,
    limit: int,
    *,
    candidates: int | None = None,
) -> Tensor:
    """Suppress overlapping boxes of the same class in one image, as torchvision's ``batched_nms`` does.

    Few boxes go to ``batched_nms`` itself. For many, where it would loop over the classes, the classes are moved apart
    in float64, which is exact, and only as many boxes are compared as are needed.

    Args:
        boxes_N4: Boxes in any order.
        scores_N: Their scores.
        classes_N: int64, their classes.
        iou: Overlap above which the lower-scored box is dropped.
        limit: Boxes to keep at most.
        candidates: How many boxes there were before some that cannot be in the result were left out: decides which of
            the two ways is taken, so that leaving out changes nothing; None: none were.

    Returns:
        int64, positions of the kept boxes, best first.
    """
    many = len(boxes_N4) if candidates is None else candidates
    if many <= SHIFTED_UP_TO:
        kept: Tensor = batched_nms(boxes_N4.float(), scores_N, classes_N, iou)
        return kept[:limit]
    spacing = _spacing(boxes_N4)
    prefix_length = 4 * limit
    while True:
        prefix = _best_places(scores_N, prefix_length)
        apart = _apart(boxes_N4[prefix], classes_N[prefix], spacing)
        kept = nms(apart, scores_N[prefix].double(), iou)
        if len(kept) >= limit or prefix_length >= len(scores_N):
            return prefix[kept[:limit]]
        prefix_length *= 4


def _best_places(scores_N: Tensor, count: int) -> Tensor:
    """Return the first ``count`` places of a stable sort by descending score, without sorting the others."""
    if count < len(scores_N):
        floor = scores_N.topk(count, sorted=False).values.min()
        places = (scores_N >= floor).nonzero()[:, 0]
    else:
        places = torch.arange(len(scores_N), device=scores_N.device)
    return places[scores_N[places].argsort(descending=True, stable=True)[:count]]


def _waits(device: torch.device) -> bool:
    """Return whether results reach the host late, so that one large call is better than many small ones."""
    return device.type == "cuda"


def _spacing(boxes_N4: Tensor) -> Tensor:
    """Return a distance by which any two of the boxes can be moved apart so that they do not touch."""
    return boxes_N4.max().double() + 1 - boxes_N4.min().double().clamp(max=0)


def _apart(boxes_N4: Tensor, group_N: Tensor, spacing: Tensor) -> Tensor:
    """Return the boxes in float64, each group in a place of its own."""
    return boxes_N4.double() + (group_N.double() * spacing)[:, None]


def _suppress_together(inputs: NmsInput, iou: float, limit: int) -> list[Tensor]:
    """Do what `suppress` does, with one call of the kernel for each prefix of all images."""
    device = inputs.boxes_N4.device
    if len(inputs.boxes_N4) == 0:
        return [torch.arange(0, device=device) for _ in inputs.counts]
    image_N = image_of_each(inputs.counts, device)
    group_N = image_N
    if inputs.classes_N is not None:
        group_N = image_N * (inputs.classes_N.max() + 1) + inputs.classes_N
    apart_N4 = _apart(inputs.boxes_N4, group_N, _spacing(inputs.boxes_N4))
    by_score_N = inputs.scores_N.argsort(descending=True, stable=True)
    order_N = by_score_N[image_N[by_score_N].argsort(stable=True)]
    orders = dict(enumerate(order_N.split(list(inputs.counts))))
    kept: dict[int, Tensor] = {}
    prefix_length = (2 if inputs.classes_N is None else 4) * limit
    while orders:
        places = _survivors(
            apart_N4, inputs.scores_N, [o[:prefix_length] for o in orders.values()], iou
        )
        for image, own in zip(list(orders), places, strict=True):
            if len(own) >= limit or prefix_length >= len(orders[image]):
                kept[image] = own[:limit]
                del orders[image]
        prefix_length *= 4
    return [kept[image] for image in range(len(inputs.counts))]


def _survivors(
    apart_N4: Tensor, scores_N: Tensor, prefixes: list[Tensor], iou: float
) -> list[Tensor]:
    """Suppress the boxes at some places of several images; return each image's surviving places, best first."""
    results: list[Tensor] = []
    while len(results) < len(prefixes):
        part = prefixes[len(results) :][: _fitting(prefixes[len(results) :])]
        places = torch.cat(part)
        image = image_of_each([len(prefix) for prefix in part], places.device)
        survivors = nms(apart_N4[places], scores_N[places].double(), iou)
        image = image[survivors]
        by_image = survivors[image.argsort(stable=True)]
        numbers = torch.arange(len(part), device=places.device)
        results += places[by_image].split((image[:, None] == numbers).sum(dim=0).tolist())
    return results


def _fitting(prefixes: list[Tensor]) -> int:
    """Return how many of the first prefixes fit into one call; at least 1."""
    total = 0
    for position, prefix in enumerate(prefixes):
        total += len(prefix)
        if position > 0 and total > _TOGETHER_UP_TO:
            return position
    return len(prefixes)
