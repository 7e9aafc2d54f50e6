"""How much of what is annotated has a box at all, whatever its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.matching import FOUND, match
from proxydet.evaluation.results import Results
from proxydet.evaluation.selection import select


@dataclass(frozen=True, kw_only=True)
class BoxRecall:
    """Share of annotations that a box overlaps, among an image's best boxes, classes left aside.

    Attributes:
        limit: How many boxes of an image count, the best by score.
        average: Mean over IoU thresholds from 0.5 to 0.95; None where nothing is annotated.
        at_50: At IoU 0.5.
    """

    limit: int
    average: float | None
    at_50: float | None


def box_recall(
    truth: GroundTruth, results: Results, limits: Sequence[int] = (100, 300)
) -> tuple[BoxRecall, ...]:
    """Measure the recall of boxes without regard to class: of proposals, or of detections taken as such.

    Each annotation, crowds aside, is matched to at most one box. For a class-agnostic proposal file give all boxes one
    category.

    Args:
        truth: The annotations.
        results: Boxes with scores.
        limits: How many boxes of an image count.
    """
    one_class = _without_classes(truth)
    boxes = replace(results, category_D=np.zeros_like(results.category_D))
    measured = []
    for limit in limits:
        selection = select(boxes, one_class, iou_type="bbox", per_image=limit)
        matches = match(one_class, boxes, selection, "bbox")
        wanted = int(matches.counts_GA[:, 0].sum())
        found_T = np.count_nonzero(matches.state_NAT[:, 0] == FOUND, axis=0)
        measured.append(
            BoxRecall(
                limit=limit,
                average=float(found_T.mean() / wanted) if wanted else None,
                at_50=float(found_T[0] / wanted) if wanted else None,
            )
        )
    return tuple(measured)


def _without_classes(truth: GroundTruth) -> GroundTruth:
    """Return the same annotations as if all were of one class, every image being judged for it."""
    everywhere = np.column_stack([np.arange(len(truth.image_ids)), np.zeros(len(truth.image_ids))])
    return replace(
        truth,
        protocol="lvis",
        category_ids=(0,),
        category_names=("object",),
        frequencies=("f",),
        ann_category_A=np.zeros_like(truth.ann_category_A),
        ann_ignore_A=truth.ann_ignore_A | truth.ann_crowd_A,
        negatives_N2=everywhere.astype(np.int64),
        unexhaustive_N2=np.zeros((0, 2), dtype=np.int64),
        positives_N2=np.zeros((0, 2), dtype=np.int64),
    )
