"""Which detections are scored, decided once before any engine sees them.

The official evaluators drop detections at several places, and other engines differ from them exactly there. So the
choice is made here, and every engine and analysis gets the same detections in the same order.

Dimensions: D detections in all, S selected ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Detections to score, ordered by image, then category, then descending score, then their place in the file.

    Attributes:
        detection_S: int64, their numbers among all detections.
        image_S: int64 in [0, I).
        category_S: int64 in [0, C).
        score_S: float64.
        area_S: float64, pixels: of the box when boxes are scored (of the mask where the file has no box), of the mask when
            masks are.
        capped: Detections left out because their image, or for fixed AP their category, has better ones enough.
        unjudged: Detections left out because their category is not judged in their image.
        without_area: Detections left out because they cover no pixel (LVIS only, as its evaluator does).
    """

    detection_S: NDArray[np.int64]
    image_S: NDArray[np.int64]
    category_S: NDArray[np.int64]
    score_S: NDArray[np.float64]
    area_S: NDArray[np.float64]
    capped: int
    unjudged: int
    without_area: int

    def __len__(self) -> int:
        return len(self.detection_S)

    def best_of_each_category(self, most: int) -> Selection:
        """Return the selection with at most ``most`` detections of a category in an image, COCO's own limit."""
        new_S = np.append(True, (np.diff(self.image_S) != 0) | (np.diff(self.category_S) != 0))[
            : len(self)
        ]
        starts = np.flatnonzero(new_S)
        place_S = np.arange(len(self)) - np.repeat(starts, np.diff(np.append(starts, len(self))))
        kept = place_S < most
        return replace(
            self,
            detection_S=self.detection_S[kept],
            image_S=self.image_S[kept],
            category_S=self.category_S[kept],
            score_S=self.score_S[kept],
            area_S=self.area_S[kept],
        )


def select(
    results: Results,
    truth: GroundTruth,
    *,
    iou_type: str,
    per_image: int | None = None,
    per_category: int | None = None,
) -> Selection:
    """Choose the detections that are scored.

    Args:
        results: All detections.
        truth: The data set.
        iou_type: ``"bbox"`` or ``"segm"``.
        per_image: The most detections of one image, over all its categories, the best first; None for no limit.
        per_category: The most detections of one category over the data set; None for no limit.

    Returns:
        The detections that are within the limits, cover at least a pixel where the protocol asks for that, and
        whose category is judged in their image. The limits come first: a detection of an unjudged category takes
        a place, as it does in the official evaluator.
    """
    kept = np.arange(len(results))
    if per_image is not None:
        kept = _best(kept, results.image_D, results.score_D, per_image)
    if per_category is not None:
        kept = _best(kept, results.category_D, results.score_D, per_category)
    capped = len(results) - len(kept)
    judged = truth.judged_IC[results.image_D[kept], results.category_D[kept]]
    unjudged = int(np.count_nonzero(~judged))
    kept = kept[judged]
    area = _areas(results, kept, iou_type)
    covers = area > 0 if truth.protocol == "lvis" else np.ones(len(kept), dtype=bool)
    kept, area = kept[covers], area[covers]
    # lexsort is stable: among equal scores the earlier detection of the file stays first.
    order = np.lexsort((-results.score_D[kept], results.category_D[kept], results.image_D[kept]))
    kept = kept[order]
    return Selection(
        detection_S=kept,
        image_S=results.image_D[kept],
        category_S=results.category_D[kept],
        score_S=results.score_D[kept],
        area_S=area[order],
        capped=capped,
        unjudged=unjudged,
        without_area=int(np.count_nonzero(~covers)),
    )


def _best(
    kept: NDArray[np.int64], group_D: NDArray[np.int64], score_D: NDArray[np.float64], most: int
) -> NDArray[np.int64]:
    """Return the ``most`` best detections of each group, in their file's order."""
    if not len(kept) or np.bincount(group_D[kept]).max() <= most:
        return kept
    order = np.lexsort((-score_D[kept], group_D[kept]))
    ordered = group_D[kept][order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    return np.sort(kept[order[rank < most]])


def _areas(results: Results, kept: NDArray[np.int64], iou_type: str) -> NDArray[np.float64]:
    if iou_type == "segm":
        masks: NDArray[np.float64] = results.mask_area_M[results.mask_D[kept]]
        return masks
    area: NDArray[np.float64] = results.box_D4[kept, 2] * results.box_D4[kept, 3]
    # Without a box of its own a detection is as large as its mask, for the official evaluators too.
    drawn = results.drawn_D[kept]
    area[drawn] = results.mask_area_M[results.mask_D[kept[drawn]]]
    return area
