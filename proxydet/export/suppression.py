"""Non-maximum suppression in forms that can be exported.

Dimensions: K boxes, R regions, C classes, P pairs of region and class.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import nms

from proxydet.modeling.config import InferenceConfig

# torchvision's operator cannot stop early, and its time grows with the square of the pairs.
PAIRS_LOOKED_AT = 10_000


class Suppression(Protocol):
    """How overlapping boxes are dropped."""

    def keep_best(self, boxes_K4: Tensor, scores_K: Tensor, iou: float, limit: int) -> Tensor:
        """Return the positions (``limit``,) of the boxes to keep, best first; K where there are no more."""

    def keep_best_by_class(
        self,
        boxes_R4: Tensor,
        scores_RC: Tensor,
        score_threshold: Tensor,
        settings: InferenceConfig,
    ) -> tuple[Tensor, Tensor]:
        """Return region and class of the pairs to keep, in any order."""


def filled(kept_L: Tensor, limit: int, scores_K: Tensor) -> Tensor:
    """Cut positions to ``limit``, or fill them up with K."""
    return torch.cat([kept_L, kept_L.new_full((limit,), scores_K.shape[0])])[:limit]


class TorchvisionSuppression:
    """By torchvision's operator.

    Of more than `PAIRS_LOOKED_AT` pairs above the threshold only the best are looked at.
    """

    def keep_best(self, boxes_K4: Tensor, scores_K: Tensor, iou: float, limit: int) -> Tensor:
        """See `Suppression.keep_best`."""
        return filled(_nms(boxes_K4, scores_K, iou), limit, scores_K)

    def keep_best_by_class(
        self,
        boxes_R4: Tensor,
        scores_RC: Tensor,
        score_threshold: Tensor,
        settings: InferenceConfig,
    ) -> tuple[Tensor, Tensor]:
        """See `Suppression.keep_best_by_class`."""
        classes = scores_RC.shape[1]
        flat_P = torch.cat([scores_RC.flatten(), scores_RC.new_full((PAIRS_LOOKED_AT,), -1.0)])
        score_P, pair_P = flat_P.topk(PAIRS_LOOKED_AT)
        above = (score_P > score_threshold).nonzero()[:, 0]
        score_P, pair_P = score_P[above], pair_P[above]
        region_P, class_P = pair_P // classes, pair_P % classes
        # Classes are moved apart in float64, which is exact.
        far = boxes_R4.amax().double() + 1
        apart = boxes_R4[region_P].double() + (class_P.double() * far)[:, None]
        kept = _nms(apart, score_P.double(), settings.nms_iou)
        return region_P[kept], class_P[kept]


def _nms(boxes_K4: Tensor, scores_K: Tensor, iou: float) -> Tensor:
    # A traced operator may take it for granted that at least two boxes are kept: two more, apart from all others and
    # with the lowest scores, make that true.
    marks_24 = boxes_K4.new_tensor([[-3e9, -3e9, -2e9, -2e9], [-6e9, -6e9, -5e9, -5e9]])
    kept: Tensor = nms(
        torch.cat([boxes_K4, marks_24]),
        torch.cat([scores_K, scores_K.new_tensor([-2.0, -2.0])]),
        iou,
    )
    return kept[:-2]
