"""Which detection finds which annotation, in columns: what the bootstrap, kinds of errors and their images need.

The engines give precision and recall of the whole data set; here each match is kept. The rules are the official
evaluators': within an image and category, detections choose in descending order of score; each takes the annotation
it overlaps most among those free, the later one of equals, one that counts before one that is ignored.

All images and categories are matched at once: a step handles the k-th detection of every (image, category).

Dimensions: S selected detections, A areas (all, small, medium, large), T IoU thresholds, G counted annotations,
P pairs of a detection and an annotation of its image that overlap.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.evaluation.scoring import AREA_RANGES_A2, IOU_THRESHOLDS_T, Selection, place_in_group

if TYPE_CHECKING:
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.results import Results

UNMATCHED, FOUND, IGNORED = 0, 1, 2
LEAST_OVERLAP = 0.1
"""IoU below which a detection and an annotation are no pair."""
_IMAGES_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Detections and annotations of the same image that overlap by at least `LEAST_OVERLAP`, whatever their categories.

    Attributes:
        detection_P: int64 in [0, S), ascending.
        annotation_P: int64 in [0, G), ascending within a detection.
        iou_P: float64: intersection over union; over the detection's area for crowds.
        same_P: Whether the two are of one category.
    """

    detection_P: NDArray[np.int64]
    annotation_P: NDArray[np.int64]
    iou_P: NDArray[np.float64]
    same_P: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.bool_]) -> Pairs:
        """Return the chosen pairs."""
        return Pairs(
            detection_P=self.detection_P[chosen],
            annotation_P=self.annotation_P[chosen],
            iou_P=self.iou_P[chosen],
            same_P=self.same_P[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The result of each detection.

    Attributes:
        selection: The detections; for COCO's protocol only the best 100 of a category in an image.
        near_N: int64, the detections that overlap an annotation of their category by IoU 0.5, ascending; no other
            one can be matched.
        state_NAT: int8: `UNMATCHED`, `FOUND` or `IGNORED` (matched to an annotation that does not count).
        annotation_N: int64, the annotation matched at IoU 0.5 over all areas; -1 without.
        iou_N: float64, the largest overlap with an annotation of the category.
        silent_SA: Whether an unmatched detection does not count as an error: it is out of the area's range, or nobody knows all
            objects of its category in its image.
        pairs: What overlaps, other categories included.
        ann_image_G: int64 in [0, I).
        ann_category_G: int64 in [0, C).
        ann_index_G: int64 in [0, A), the number among all annotations.
        counts_GA: Whether an annotation of the area is to be found.
    """

    selection: Selection
    near_N: NDArray[np.int64]
    state_NAT: NDArray[np.int8]
    annotation_N: NDArray[np.int64]
    iou_N: NDArray[np.float64]
    silent_SA: NDArray[np.bool_]
    pairs: Pairs
    ann_image_G: NDArray[np.int64]
    ann_category_G: NDArray[np.int64]
    ann_index_G: NDArray[np.int64]
    counts_GA: NDArray[np.bool_]


def match(truth: GroundTruth, results: Results, selection: Selection, iou_type: str) -> Matches:
    """Match detections to annotations by the rules of the data set's protocol.

    Args:
        truth: The annotations.
        results: All detections.
        selection: Those that are scored.
        iou_type: ``"bbox"`` or ``"segm"``.
    """
    if truth.protocol == "coco":
        selection = selection.best_of_each_category()
    counted = np.flatnonzero(truth.counted_A)
    order = np.lexsort((truth.ann_category_A[counted], truth.ann_image_A[counted]))
    annotations = counted[order]
    crowd_G = truth.ann_crowd_A[annotations] & (truth.protocol == "coco")
    ignored_G = crowd_G if truth.protocol == "coco" else truth.ann_ignore_A[annotations]
    counts_GA = _in_area(truth.ann_area_A[annotations]) & ~ignored_G[:, None]
    pairs = overlapping_pairs(truth, results, selection, annotations, crowd_G, iou_type)
    close = pairs.take(pairs.same_P & (pairs.iou_P >= IOU_THRESHOLDS_T[0]))
    image_P = selection.image_S[close.detection_P]
    edges = np.searchsorted(image_P, np.arange(0, len(truth.image_ids), _IMAGES_AT_ONCE))
    at_once_P = np.repeat(np.arange(len(edges)), np.diff(edges, append=len(image_P)))
    parts = [
        greedy(close.take(at_once_P == part), selection, counts_GA, crowd_G)
        for part in range(len(edges))
    ]
    near, state, taken, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(
        selection=selection,
        near_N=near,
        state_NAT=state,
        annotation_N=np.where(taken < 0, -1, annotations[taken]) if len(annotations) else taken,
        iou_N=iou,
        silent_SA=~_in_area(selection.area_S) | _unexhaustive(truth, selection)[:, None],
        pairs=pairs,
        ann_image_G=truth.ann_image_A[annotations],
        ann_category_G=truth.ann_category_A[annotations],
        ann_index_G=annotations,
        counts_GA=counts_GA,
    )


def _in_area(area: NDArray[np.float64]) -> NDArray[np.bool_]:
    least, most = AREA_RANGES_A2.T
    inside: NDArray[np.bool_] = (area[:, None] >= least) & (area[:, None] <= most)
    return inside


def _unexhaustive(truth: GroundTruth, selection: Selection) -> NDArray[np.bool_]:
    """Bool (S,): detections of categories whose objects are not all annotated in their image."""
    if truth.protocol != "lvis":
        return np.zeros(len(selection), dtype=bool)
    categories = len(truth.category_ids)
    listed = truth.unexhaustive_N2[:, 0] * categories + truth.unexhaustive_N2[:, 1]
    return np.isin(selection.image_S * categories + selection.category_S, listed)


def greedy(
    pairs: Pairs,
    selection: Selection,
    counts_GA: NDArray[np.bool_],
    crowd_G: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int8], NDArray[np.int64], NDArray[np.float64]]:
    """Match detections to annotations that overlap enough.

    Args:
        pairs: These detections and annotations, of one category each.
        selection: All detections.
        counts_GA: Whether an annotation of each area counts; it is ignored otherwise.
        crowd_G: Annotations that any number of detections may find.

    Returns:
        The detections that have a pair, int64 (N,); their states, int8 (N, A, T); the annotations they took at IoU 0.5
        in the first area, int64 (N,), -1 without; their largest overlap, float64 (N,).
    """
    areas, thresholds = counts_GA.shape[1], len(IOU_THRESHOLDS_T)
    near, first, owner_P = np.unique(pairs.detection_P, return_index=True, return_inverse=True)
    state = np.full((len(near), areas, thresholds), UNMATCHED, dtype=np.int8)
    taken = np.full(len(near), -1, dtype=np.int64)
    if not len(near):
        return near, state, taken, np.zeros(0)
    iou = np.maximum.reduceat(pairs.iou_P, first)
    offset = int(pairs.annotation_P.min())
    free_GAT = np.ones((int(pairs.annotation_P.max()) - offset + 1, areas, thresholds), dtype=bool)
    categories = int(selection.category_S.max()) + 1
    step_N = place_in_group(selection.image_S[near] * categories + selection.category_S[near])
    # Within a detection's pairs the last is the one to prefer: the largest overlap, of equals the later annotation.
    order = np.lexsort((pairs.annotation_P, pairs.iou_P, owner_P, step_N[owner_P]))
    bounds = np.searchsorted(step_N[owner_P][order], np.arange(step_N.max() + 2))
    for start, end in itertools.pairwise(bounds):
        chosen = order[start:end]
        annotation_P = pairs.annotation_P[chosen]
        able_PAT = free_GAT[annotation_P - offset] & (
            pairs.iou_P[chosen, None, None] >= IOU_THRESHOLDS_T
        )
        # Pairs whose annotation counts come after all others in preference.
        rank_P = np.arange(1, len(chosen) + 1)
        value_PAT = np.where(
            able_PAT, (rank_P[:, None] + len(chosen) * counts_GA[annotation_P])[:, :, None], 0
        )
        heads = np.flatnonzero(np.append(True, np.diff(owner_P[chosen]) != 0))
        best_DAT = np.maximum.reduceat(value_PAT, heads, axis=0)
        winner_DAT = annotation_P[(best_DAT - 1) % len(chosen)]
        matched_DAT = best_DAT > 0
        detections = owner_P[chosen][heads]
        state[detections] = np.where(
            matched_DAT, np.where(best_DAT > len(chosen), FOUND, IGNORED), UNMATCHED
        )
        taken[detections] = np.where(matched_DAT[:, 0, 0], winner_DAT[:, 0, 0], -1)
        _, area, threshold = np.nonzero(matched_DAT)
        lost = winner_DAT[matched_DAT]
        free_GAT[lost - offset, area, threshold] = crowd_G[lost]
    return near, state, taken, iou


def overlapping_pairs(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    annotations: NDArray[np.int64],
    crowd_G: NDArray[np.bool_],
    iou_type: str,
) -> Pairs:
    """Return what overlaps, computed by the COCO tools image by image.

    Args:
        truth: All annotations.
        results: All detections.
        selection: The S detections.
        annotations: The G annotations, ordered by image and category.
        crowd_G: Annotations for which the union is replaced by the detection's area.
        iou_type: ``"bbox"`` or ``"segm"``.
    """
    images = np.arange(len(truth.image_ids) + 1)
    edges_S = np.searchsorted(selection.image_S, images).tolist()
    edges_G = np.searchsorted(truth.ann_image_A[annotations], images).tolist()
    none = np.zeros(0, dtype=np.int64)
    parts = [(none, none, np.zeros(0))]
    for first_S, end_S, first_G, end_G in zip(
        edges_S[:-1], edges_S[1:], edges_G[:-1], edges_G[1:], strict=True
    ):
        if first_S == end_S or first_G == end_G:
            continue
        chosen_D, of_image_G = selection.detection_S[first_S:end_S], annotations[first_G:end_G]
        crowd = crowd_G[first_G:end_G].tolist()
        if iou_type == "bbox":
            boxes_G4 = truth.ann_box_A4[of_image_G]
            iou_DG = coco_mask.iou(results.box_D4[chosen_D], boxes_G4, crowd)
        else:
            # Detections share masks: one box of several classes has one.
            masks, mask_D = np.unique(results.mask_D[chosen_D], return_inverse=True)
            found = [results.masks[index] for index in masks.tolist()]
            drawn = [truth.masks[index] for index in of_image_G.tolist()]
            iou_DG = coco_mask.iou(found, drawn, crowd)[mask_D]
        row_P, column_P = np.nonzero(iou_DG >= LEAST_OVERLAP)
        parts.append((row_P + first_S, column_P + first_G, iou_DG[row_P, column_P]))
    detection_P, annotation_P, iou_P = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    category_G = truth.ann_category_A[annotations]
    return Pairs(
        detection_P=detection_P,
        annotation_P=annotation_P,
        iou_P=iou_P,
        same_P=selection.category_S[detection_P] == category_G[annotation_P],
    )
