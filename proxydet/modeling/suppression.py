"""Non-maximum suppression that stops when enough boxes are kept.

Greedy suppression decides from the best box down, so the best ``limit`` survivors depend only on the boxes that score
at least as high: looking at a short prefix first and going on only if it does not yield enough gives the same boxes.

The result's length depends on the data, so each call waits for the device once; batches are handled image by image,
because boxes of several images in one call would cost the square of their number.
"""

from __future__ import annotations

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import batched_nms
from torch import Tensor
from torchvision.ops import nms

# torchvision's batched_nms keeps classes apart by moving them to places of their own up to these counts, and handles
# class by class above. Its float32 coordinates get coarse in far places, which decides near ties.
_SHIFTED_UP_TO = {"cpu": 1000}
_SHIFTED_UP_TO_ELSEWHERE = 25_000


def keep_best(boxes_N4: Tensor, scores_N: Tensor, iou: float, limit: int) -> Tensor:
    """Suppress overlapping boxes regardless of class.

    Args:
        boxes_N4: Boxes by descending score.
        scores_N: Their scores.
        iou: Overlap above which the lower-scored box is dropped.
        limit: Boxes to keep at most.

    Returns:
        int64, positions of the kept boxes, best first.
    """
    looked_at = 2 * limit
    while True:
        kept: Tensor = nms(boxes_N4[:looked_at], scores_N[:looked_at], iou)
        if len(kept) >= limit or looked_at >= len(boxes_N4):
            return kept[:limit]
        looked_at *= 4


def suppressed_at_once(device: torch.device) -> int:
    """Most boxes of several classes that ``batched_nms`` handles in one piece on a device."""
    return _SHIFTED_UP_TO.get(device.type, _SHIFTED_UP_TO_ELSEWHERE)


def keep_best_by_class(
    boxes_N4: Tensor,
    scores_N: Tensor,
    classes_N: Tensor,
    iou: float,
    limit: int,
    *,
    candidates: int | None = None,
) -> Tensor:
    """Suppress overlapping boxes of the same class, as detectron2's ``batched_nms`` does.

    Few boxes go to ``batched_nms`` itself. For many, where it would loop over the classes, the classes are moved apart
    in float64, which is exact, and only as many boxes are looked at as are needed.

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
    if many <= suppressed_at_once(boxes_N4.device):
        kept: Tensor = batched_nms(boxes_N4, scores_N, classes_N, iou)
        return kept[:limit]
    order_N = scores_N.argsort(descending=True, stable=True)
    far = boxes_N4.max().double() + 1
    looked_at = 4 * limit
    while True:
        prefix = order_N[:looked_at]
        apart = boxes_N4[prefix].double() + (classes_N[prefix].double() * far)[:, None]
        kept = nms(apart, scores_N[prefix].double(), iou)
        if len(kept) >= limit or looked_at >= len(order_N):
            return prefix[kept[:limit]]
        looked_at *= 4
