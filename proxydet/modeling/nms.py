"""Non-maximum suppression of a batch that stops when enough boxes are kept.

Greedy suppression decides from the best box down, so the best ``limit`` survivors depend only on the boxes that score
at least as high: taking a short prefix first, and a longer one only if it does not yield enough, gives the same boxes.

How many boxes survive depends on the data, so each call of torchvision's kernel waits for a GPU. There, one call
suppresses all images of a batch, moved away from each other in float64, and the number of waits is that of the prefixes
taken, whatever the number of images and classes. A call costs the square of its number of boxes: a GPU has room for
that, but a CPU has not, and nothing to wait for. There, each image has a call of its own.

Dimensions: B images, N boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import proxydet.runtime.d2  # noqa: F401

import torch
from detectron2.layers import batched_nms
from torch import Tensor
from torchvision.ops import nms

from proxydet.modeling import geometry

SHIFTED_UP_TO = 1000
"""Most boxes of several classes that ``batched_nms`` handles in one piece: it moves the classes to places of their own, and
handles class by class above. Its float32 coordinates get coarse in far places, which decides near ties."""
# Bounds a call's memory on a GPU, a bit for each pair of boxes, to 512 MiB; a larger batch takes several calls.
_TOGETHER_UP_TO = 65_536


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
    """Suppress overlapping boxes of the same class in one image, as detectron2's ``batched_nms`` does.

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
        kept: Tensor = batched_nms(boxes_N4, scores_N, classes_N, iou)
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
    image_N = geometry.image_of_each(inputs.counts, device)
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
        image = geometry.image_of_each([len(prefix) for prefix in part], places.device)
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
