"""Where average precision is lost, and whether scores mean what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.evaluation.matching import FOUND, IGNORED, LEAST_OVERLAP, UNMATCHED, Matches
from proxydet.evaluation.report import percent
from proxydet.evaluation.results import fingerprint
from proxydet.evaluation.scoring import (
    IOU_THRESHOLDS_T,
    RECALL_THRESHOLDS_R,
    hotcoco_errors,
    narrow,
    place_in_group,
)
from proxydet.reporting import SILENT, Progress

if TYPE_CHECKING:
    from proxydet.evaluation.evaluate import Evaluation, Scored
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.results import Results
    from proxydet.vocabulary.vocabulary import Vocabulary

ERROR_NAMES = (
    "classification",
    "localisation",
    "classification and localisation",
    "duplicate",
    "background",
    "missed",
)
_RIGHT = 0.5
"""IoU from which a detection is right."""
_RECALL_IMAGES = 200
_BLOCK = 256
"""Boxes of an image that NMS compares with the others at a time: 60 MB where the image has 30,000."""


@dataclass(frozen=True, kw_only=True)
class ErrorBreakdown:
    """Errors by kind, after TIDE (Bolya et al. 2020), at IoU 0.5.

    A false detection is of the first kind that fits: *localisation* (right class, IoU 0.1 to 0.5), *classification*
    (IoU above 0.5 with another class), *duplicate* (its object is found already), *background* (IoU below 0.1 with
    everything), *classification and localisation* (all others). *Missed*: objects that no detection comes near.
    Detections that cannot be judged are not counted.

    Attributes:
        ap50: Average precision at IoU 0.5.
        counts: Errors of each kind.
        costs: How much AP50 would rise if the errors of one kind were mended, as a fraction.
    """

    ap50: float
    counts: Mapping[str, int]
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether a detection of score p is right in a share p of cases, at IoU 0.5.

    Attributes:
        edges: float64 (B + 1,), the bins' limits, from 0 to 1.
        score_B: Mean score in each bin; NaN where it is empty, as the next.
        precision_B: Share of detections that are right.
        count_B: Detections.
        error: Mean of the absolute differences of the two, weighted by the counts (expected calibration error).
    """

    edges: NDArray[np.float64]
    score_B: NDArray[np.float64]
    precision_B: NDArray[np.float64]
    count_B: NDArray[np.int64]
    error: float | None


@dataclass(frozen=True, kw_only=True)
class ErrorKinds:
    """Of what kind each wrong detection is, and which objects are missed.

    Attributes:
        kinds_S: For each kind of wrong detection a bool array (S,).
        aim_S: int64 (S,), the annotation (in [0, G)) that a badly placed detection, or one of another class, should have found; -1
            for all others.
        found_G: bool (G,), annotations that a detection found.
        missed_G: bool (G,), annotations that no detection found or came near.
    """

    kinds_S: Mapping[str, NDArray[np.bool_]]
    aim_S: NDArray[np.int64]
    found_G: NDArray[np.bool_]
    missed_G: NDArray[np.bool_]


def error_kinds(scored: Scored) -> ErrorKinds:
    """Sort the errors by kind; see `ErrorBreakdown`.

    Args:
        scored: The result of scoring boxes or masks.
    """
    matches = scored.matches
    pairs, category_S = matches.pairs, matches.selection.category_S
    _, wrong_S = right_and_wrong(matches)
    counts_G = matches.counts_GA[:, 0]
    crowd_G = scored.truth.ann_crowd_A[matches.ann_index_G] & (scored.truth.protocol == "coco")
    taken = matches.annotation_N[matches.state_NAT[:, 0, 0] != UNMATCHED]
    taken_G = np.isin(matches.ann_index_G, taken)
    # Of equal overlaps those with annotations that count come first, then the earlier ones.
    preference_G = np.arange(len(counts_G)) + len(counts_G) * ~counts_G

    def largest(chosen_P: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return each detection's largest overlap among the chosen pairs (0 without), and with which annotation."""
        chosen = np.flatnonzero(chosen_P)
        detection_P, iou_P = pairs.detection_P[chosen], pairs.iou_P[chosen]
        iou_S = np.zeros(len(category_S))
        annotation_S = np.full(len(category_S), -1, dtype=np.int64)
        if len(chosen):
            first = np.flatnonzero(np.diff(detection_P, prepend=-1))
            iou_S[detection_P[first]] = np.maximum.reduceat(iou_P, first)
            preference_P = preference_G[pairs.annotation_P[chosen]]
            preference_P[iou_P < iou_S[detection_P]] = 2 * len(counts_G)
            annotation_S[detection_P[first]] = np.minimum.reduceat(preference_P, first)
            annotation_S[detection_P[first]] %= len(counts_G)
        return iou_S, annotation_S

    own_S, own_annotation_S = largest(pairs.same_P)
    other_S, other_annotation_S = largest(~pairs.same_P & ~crowd_G[pairs.annotation_P])
    again_S = np.zeros(len(category_S), dtype=bool)
    again_P = pairs.same_P & (pairs.iou_P >= _RIGHT) & taken_G[pairs.annotation_P]
    again_S[pairs.detection_P[again_P]] = True
    kinds_S = {
        "localisation": (own_S >= LEAST_OVERLAP) & (own_S <= _RIGHT),
        "classification": other_S >= _RIGHT,
        "duplicate": again_S,
        "background": other_S <= LEAST_OVERLAP,
        "classification and localisation": wrong_S,
    }
    rest_S = wrong_S
    for kind, fits_S in kinds_S.items():
        kinds_S[kind], rest_S = rest_S & fits_S, rest_S & ~fits_S
    aim_S = np.where(kinds_S["localisation"], own_annotation_S, -1)
    aim_S = np.where(kinds_S["classification"], other_annotation_S, aim_S)
    missed_G = counts_G & ~taken_G
    missed_G[aim_S[aim_S >= 0]] = False
    return ErrorKinds(kinds_S=kinds_S, aim_S=aim_S, found_G=taken_G, missed_G=missed_G)


def break_down_errors(scored: Scored) -> ErrorBreakdown:
    """Count errors by kind, and what each kind costs.

    Args:
        scored: The result of scoring boxes or masks.
    """
    matches, categories = scored.matches, len(scored.truth.category_ids)
    category_S, score_S = matches.selection.category_S, matches.selection.score_S
    right_S, wrong_S = right_and_wrong(matches)
    errors = error_kinds(scored)
    kinds_S, aim_S, missed_G = errors.kinds_S, errors.aim_S, errors.missed_G
    counts_G = matches.counts_GA[:, 0]
    # What should have been found, where that is still to be found.
    aimed = np.flatnonzero((aim_S >= 0) & (counts_G & ~errors.found_G)[aim_S])
    aimed = aimed[np.lexsort((-score_S[aimed], aim_S[aimed]))]
    mended_S = np.zeros(len(score_S), dtype=bool)
    mended_S[aimed[np.diff(aim_S[aimed], prepend=-1) != 0]] = True
    objects_C = np.bincount(matches.ann_category_G[counts_G], minlength=categories)
    present_C = objects_C > 0
    by_score = np.argsort(-score_S, kind="stable")

    def ap50(
        category_S: NDArray[np.int64],
        right_S: NDArray[np.bool_],
        judged_S: NDArray[np.bool_],
        objects_C: NDArray[np.int64],
    ) -> float:
        """Return average precision of these detections, where so many objects of each category are to be found."""
        judged = by_score[(judged_S & (objects_C[category_S] > 0))[by_score]]
        order = np.argsort(narrow(category_S[judged], categories), kind="stable")
        best_first = judged[order]
        category_L, right_L = category_S[best_first], right_S[best_first]
        category_K, place_K = category_L[right_L], place_in_group(category_L)[right_L]
        found_K = place_in_group(category_K) + 1
        # The largest precision here or later: earlier categories lie higher, so that nothing passes from one to the next.
        level_K = 2.0 * (categories - category_K)
        precision_K = found_K / (place_K + 1) + level_K
        precision_K = np.maximum.accumulate(precision_K[::-1])[::-1] - level_K
        reached_K, before_K = (
            np.searchsorted(RECALL_THRESHOLDS_R, found / objects_C[category_K], side="right")
            for found in (found_K, found_K - 1)
        )
        before_K[found_K == 1] = 0
        gain_K = precision_K * (reached_K - before_K) / len(RECALL_THRESHOLDS_R)
        ap_C = np.bincount(category_K, gain_K, minlength=categories)
        return float(ap_C[present_C].mean()) if present_C.any() else 0.0

    without = ap50(category_S, right_S, right_S | wrong_S, objects_C)
    costs = {}
    for kind, errors_S in kinds_S.items():
        better_S = right_S | (mended_S & errors_S)
        judged_S = better_S | (wrong_S & ~errors_S)
        changed_S = mended_S & errors_S
        moved_S = np.where(changed_S, matches.ann_category_G[aim_S], category_S)
        costs[kind] = ap50(moved_S, better_S, judged_S, objects_C) - without
    missed_C = np.bincount(matches.ann_category_G[missed_G], minlength=categories)
    costs["missed"] = ap50(category_S, right_S, right_S | wrong_S, objects_C - missed_C) - without
    counts = {kind: int(errors_S.sum()) for kind, errors_S in kinds_S.items()}
    counts["missed"] = int(missed_G.sum())
    return ErrorBreakdown(
        ap50=without,
        counts={kind: counts[kind] for kind in ERROR_NAMES},
        costs={kind: costs[kind] for kind in ERROR_NAMES},
    )


def right_and_wrong(matches: Matches) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which selected detections are right at IoU 0.5 and which are wrong; those ignored are neither.

    Returns:
        Two bool arrays (S,).
    """
    right_S = np.zeros(len(matches.selection), dtype=bool)
    wrong_S = ~matches.silent_SA[:, 0]
    state_N = matches.state_NAT[:, 0, 0]
    right_S[matches.near_N] = state_N == FOUND
    wrong_S[matches.near_N] &= (state_N != FOUND) & (state_N != IGNORED)
    return right_S, wrong_S


def calibrate(matches: Matches, bins: int = 10) -> Calibration:
    """Compare scores with how often detections are right.

    Args:
        matches: The result of each detection.
        bins: How many bins of equal width; scores outside of [0, 1] count in the first or last.
    """
    right_S, wrong_S = right_and_wrong(matches)
    judged = right_S | wrong_S
    score = matches.selection.score_S[judged]
    place = np.clip((score * bins).astype(np.int64), 0, bins - 1)
    count_B = np.bincount(place, minlength=bins)
    divisor_B = np.where(count_B > 0, count_B, np.nan)
    score_B = np.bincount(place, weights=score, minlength=bins) / divisor_B
    precision_B = np.bincount(place, weights=right_S[judged], minlength=bins) / divisor_B
    error = None
    if count_B.sum():
        error = float(np.nansum(np.abs(score_B - precision_B) * count_B) / count_B.sum())
    return Calibration(
        edges=np.linspace(0, 1, bins + 1),
        score_B=score_B,
        precision_B=precision_B,
        count_B=count_B,
        error=error,
    )


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is right, wrong and missed among the detections above a threshold, at IoU 0.5, over all classes.

    Detections that cannot be judged are not counted.

    Attributes:
        name: Which threshold.
        right: Detections that find an object.
        wrong: False positives.
        objects: Annotations that are to be found.
        precision: Share of detections that are right; None without any.
        recall: Share of objects that are found; None where there are none.
        false_positives_per_image: Mean over all images.
        empty_images: Images without an object of the classes.
        false_positives_per_empty_image: Mean over these; None where there are none.
    """

    name: str
    right: int
    wrong: int
    objects: int
    precision: float | None
    recall: float | None
    false_positives_per_image: float
    empty_images: int
    false_positives_per_empty_image: float | None


def operating_rows(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return operating points as a table shows them, shares in percent.

    Args:
        points: As `Analysis.to_dict` has them.
    """

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    return [
        {
            "detections": point["name"],
            "right": point["right"],
            "wrong": point["wrong"],
            "precision": percent(point["precision"], 1),
            "recall": percent(point["recall"], 1),
            "wrong an image": rounded(point["false_positives_per_image"], 3),
            "wrong an empty image": rounded(point["false_positives_per_empty_image"], 3),
        }
        for point in points
    ]


def one_label_a_box(results: Results, least: float, iou: float) -> NDArray[np.bool_]:
    """Return which detections NMS over all classes at once leaves, as ``predict`` reports them.

    Args:
        results: All detections; with several labels a box, as they are evaluated.
        least: Only detections that score above this are in the result.
        iou: Of two boxes that overlap by more than this, the one with the lower score is dropped.

    Returns:
        bool (D,).
    """
    chosen = np.flatnonzero(results.score_D > least)
    image_K = narrow(results.image_D[chosen], int(results.image_D.max(initial=0)))
    order = chosen[np.lexsort((-results.score_D[chosen], image_K))]
    # Labels of one box: only the best one can be left.
    key_K = fingerprint(results.image_D[order], *results.box_D4[order].T)
    order = order[np.sort(np.unique(key_K, return_index=True)[1])]
    box_K4, left_K = results.box_D4[order], np.ones(len(order), dtype=bool)
    starts = np.flatnonzero(np.diff(results.image_D[order], prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(order)]):
        # In blocks, for an image may have tens of thousands: what is left of one drops boxes of the later ones.
        for first in range(start, end, _BLOCK):
            block = slice(first, min(first + _BLOCK, end))
            rows_R = first + np.flatnonzero(left_K[block])
            rows_R = rows_R[_best_of_overlapping(box_K4[rows_R], iou)]
            left_K[block] = False
            left_K[rows_R] = True
            later_L = block.stop + np.flatnonzero(left_K[block.stop : end])
            if len(rows_R) and len(later_L):
                overlap_RL = _overlaps(box_K4[rows_R], box_K4[later_L])
                left_K[later_L[(overlap_RL > iou).any(0)]] = False
    left_D = np.zeros(len(results), dtype=bool)
    left_D[order[left_K]] = True
    return left_D


def _overlaps(first_R4: NDArray[np.float64], second_L4: NDArray[np.float64]) -> NDArray[np.float64]:
    overlap_RL: NDArray[np.float64] = coco_mask.iou(first_R4, second_L4, [False] * len(second_L4))
    return overlap_RL


def _best_of_overlapping(box_R4: NDArray[np.float64], iou: float) -> NDArray[np.bool_]:
    """Return which of some boxes, the best first, NMS leaves."""
    left_R = np.ones(len(box_R4), dtype=bool)
    if len(box_R4) < 2:
        return left_R
    better_P, worse_P = np.nonzero(np.triu(_overlaps(box_R4, box_R4) > iou, 1))
    while len(better_P):
        open_R = np.zeros(len(box_R4), dtype=bool)
        open_R[worse_P] = True  # a better box that is still there overlaps it
        left_R[worse_P[~open_R[better_P]]] = False
        still_P = open_R[better_P] & left_R[better_P] & left_R[worse_P]
        better_P, worse_P = better_P[still_P], worse_P[still_P]
    return left_R


def operating_point(
    scored: Scored,
    threshold_S: NDArray[np.float64],
    name: str,
    *,
    classes: NDArray[np.bool_] | None = None,
    left_D: NDArray[np.bool_] | None = None,
) -> OperatingPoint:
    """Count what is right, wrong and missed above a threshold.

    Args:
        scored: The result of scoring boxes or masks.
        threshold_S: What each selected detection must score above.
        name: Of the operating point.
        classes: bool (C,), the categories that count; None: all.
        left_D: bool (D,), the detections that count, from `one_label_a_box`; None: all.
    """
    matches, images = scored.matches, len(scored.truth.image_ids)
    counted_C = np.ones(len(scored.truth.category_ids), dtype=bool) if classes is None else classes
    category_S = matches.selection.category_S
    kept_S = (matches.selection.score_S > threshold_S) & counted_C[category_S]
    if left_D is not None:
        kept_S &= left_D[matches.selection.detection_S]
    right_S, wrong_S = right_and_wrong(matches)
    of_classes_G = counted_C[matches.ann_category_G]
    occupied = np.unique(matches.ann_image_G[of_classes_G])
    on_empty_S = wrong_S & kept_S & ~np.isin(matches.selection.image_S, occupied)
    right, wrong = int((right_S & kept_S).sum()), int((wrong_S & kept_S).sum())
    objects, empty = int((matches.counts_GA[:, 0] & of_classes_G).sum()), images - len(occupied)
    return OperatingPoint(
        name=name,
        right=right,
        wrong=wrong,
        objects=objects,
        precision=right / (right + wrong) if right + wrong else None,
        recall=right / objects if objects else None,
        false_positives_per_image=wrong / images,
        empty_images=empty,
        false_positives_per_empty_image=int(on_empty_S.sum()) / empty if empty else None,
    )


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

    Each annotation, crowds and ignored ones aside, is matched to at most one box, as evaluators match detections of one
    class. For a class-agnostic proposal file give all boxes one category.

    Args:
        truth: The annotations.
        results: Boxes with scores.
        limits: How many boxes of an image count, in ascending order.

    Raises:
        RuntimeEnvironmentError: The engine failed.
    """
    counted_A = (truth.ann_area_A > 0) & (truth.ann_area_A < np.inf)
    annotations = np.flatnonzero(counted_A & ~truth.ann_ignore_A & ~truth.ann_crowd_A)
    annotations = annotations[np.argsort(truth.ann_image_A[annotations], kind="stable")]
    detections = np.argsort(results.image_D, kind="stable")
    # The engine's objects of so many images at once take little memory.
    edges = np.arange(0, len(truth.image_ids) + _RECALL_IMAGES, _RECALL_IMAGES)
    found_TL = np.zeros((len(IOU_THRESHOLDS_T), len(limits)))
    for (first_G, end_G), (first_D, end_D) in zip(
        pairwise(np.searchsorted(truth.ann_image_A[annotations], edges)),
        pairwise(np.searchsorted(results.image_D[detections], edges)),
        strict=True,
    ):
        if end_G == first_G or end_D == first_D:
            continue
        of_G, of_D = annotations[first_G:end_G], detections[first_D:end_D]
        image_G, image_D = truth.ann_image_A[of_G] + 1, results.image_D[of_D] + 1
        one_G, one_D = np.ones(len(of_G), dtype=np.int64), np.ones(len(of_D))
        table_D7 = np.column_stack([image_D, results.box_D4[of_D], results.score_D[of_D], one_D])
        with hotcoco_errors():
            import hotcoco

            theirs = hotcoco.COCO.from_arrays(
                [{"id": i, "height": 1, "width": 1} for i in np.union1d(image_G, image_D).tolist()],
                [{"id": 1, "name": "object"}],
                image_G,
                one_G,
                truth.ann_box_A4[of_G],
                area=one_G.astype(np.float64),
            )
            evaluator = hotcoco.COCOeval(theirs, theirs.load_res(table_D7), "bbox")
            evaluator.params.use_cats = False
            evaluator.params.max_dets = list(limits)
            evaluator.params.iou_thrs = IOU_THRESHOLDS_T.tolist()
            evaluator.params.area_rng, evaluator.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
            evaluator.evaluate()
            evaluator.accumulate()
            accumulated: Any = evaluator.eval
        found_TL += np.rint(np.asarray(accumulated["recall"])[:, 0, 0] * len(of_G))
    to_find = len(annotations)
    return tuple(
        BoxRecall(
            limit=limit,
            average=float(found_T.mean() / to_find) if to_find else None,
            at_50=float(found_T[0] / to_find) if to_find else None,
        )
        for limit, found_T in zip(limits, found_TL.T, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What lies behind the numbers, for boxes or masks; all None where the protocol has no matches (OpenImages).

    Attributes:
        errors: Errors by kind.
        calibration: Scores against precision.
        recall: Recall of boxes, classes left aside.
        operating_points: What is above the general threshold, then above those of the classes where they have their own.
    """

    errors: ErrorBreakdown | None
    calibration: Calibration | None
    recall: tuple[BoxRecall, ...]
    operating_points: tuple[OperatingPoint, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None where there is nothing to measure."""

        def known(values: NDArray[np.float64]) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values.tolist()]

        calibration = None
        if (found := self.calibration) is not None:
            calibration = {
                "edges": found.edges.tolist(),
                "score": known(found.score_B),
                "precision": known(found.precision_B),
                "detections": found.count_B.tolist(),
                "error": found.error,
            }
        return {
            "errors": asdict(self.errors) if self.errors else None,
            "calibration": calibration,
            "box_recall": [asdict(value) for value in self.recall],
            "operating_points": [asdict(value) for value in self.operating_points],
        }


def analyse(
    evaluation: Evaluation,
    progress: Progress = SILENT,
    *,
    vocabulary: Vocabulary | None = None,
    score_threshold: float = 0.3,
    nms_iou: float = 0.5,
) -> Analysis:
    """Break down the errors of the masks, or of the boxes where no masks were scored.

    Args:
        evaluation: What was measured.
        progress: Where progress is shown.
        vocabulary: The classes, where they have thresholds of their own; found by the categories' names.
        score_threshold: The general threshold of the operating points, which count one label a box.
        nms_iou: Overlap above which two boxes of any classes count as one there: the detector's own.

    Raises:
        RuntimeEnvironmentError: The engine failed.
    """
    scored, points = evaluation.main, []
    with progress.task("analysing errors", total=None):
        if scored is not None:
            own: dict[str, float] = {}
            if vocabulary is not None:
                own = dict(zip(vocabulary.reported, vocabulary.threshold.tolist(), strict=False))
            names = [name.strip() for name in evaluation.truth.category_names]
            own_C = np.array([own.get(name, math.nan) for name in names])
            limits_C = {f"score above {score_threshold:g}": np.full(len(own_C), score_threshold)}
            if np.isfinite(own_C).any():
                own_C = np.where(np.isnan(own_C), score_threshold, own_C)
                limits_C["thresholds of the classes"] = own_C
            least = min(float(limit_C.min()) for limit_C in limits_C.values())
            left_D = one_label_a_box(evaluation.results, least, nms_iou)
            category_S = scored.matches.selection.category_S
            points = [
                operating_point(scored, limit_C[category_S], name, left_D=left_D)
                for name, limit_C in limits_C.items()
            ]
        return Analysis(
            operating_points=tuple(points),
            recall=box_recall(evaluation.truth, evaluation.results),
            errors=break_down_errors(scored) if scored else None,
            calibration=calibrate(scored.matches) if scored else None,
        )
