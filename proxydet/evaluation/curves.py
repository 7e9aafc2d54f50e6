"""Precision and recall of a data set, as every engine returns them.

Dimensions: T IoU thresholds, R recall thresholds, C categories, A areas (all, small, medium, large), M limits of
detections an image and category.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.ground_truth import GroundTruth

Limits: TypeAlias = tuple[int | None, ...]
NO_LIMIT = 2**31 - 1

IOU_THRESHOLDS_T: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS_R: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
AREAS = ("all", "small", "medium", "large")
AREA_RANGES_A2: NDArray[np.float64] = np.array(
    [[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]]
)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision at fixed recalls, and the recall reached.

    Attributes:
        precision_TRCA: float64 in [0, 1]; -1 where a category has no annotation of that area.
        recall_TCAM: float64 in [0, 1]; -1 likewise.
        limits: M: the most detections counted (None: no limit); precision is computed with the last.
    """

    precision_TRCA: NDArray[np.float64]
    recall_TCAM: NDArray[np.float64]
    limits: Limits

    @cached_property
    def average_TCA(self) -> NDArray[np.float64]:
        """Mean precision over recalls, float64 (T, C, A); NaN where a category has no annotation of that area."""
        average_TCA: NDArray[np.float64] = self.precision_TRCA.mean(axis=1)
        average_TCA[average_TCA < 0] = np.nan
        return average_TCA


def nothing_detected(truth: GroundTruth, limits: Limits) -> Curves:
    """Return the curves of no detection at all, on which the official evaluators fail: 0 where there is something to find."""
    categories, thresholds = len(truth.category_ids), len(IOU_THRESHOLDS_T)
    areas = len(AREA_RANGES_A2)
    precision_TRCA = np.full((thresholds, len(RECALL_THRESHOLDS_R), categories, areas), -1.0)
    recall_TCAM = np.full((thresholds, categories, areas, len(limits)), -1.0)
    ignored_A = truth.ann_crowd_A if truth.protocol == "coco" else truth.ann_ignore_A
    for area, (least, most) in enumerate(AREA_RANGES_A2):
        inside_A = (truth.ann_area_A >= least) & (truth.ann_area_A <= most)
        present = np.unique(truth.ann_category_A[inside_A & truth.counted_A & ~ignored_A])
        precision_TRCA[:, :, present, area] = 0
        recall_TCAM[:, present, area] = 0
    return Curves(precision_TRCA=precision_TRCA, recall_TCAM=recall_TCAM, limits=limits)
