"""Where average precision is lost, and whether scores mean what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.evaluate import Evaluation, Scored
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.matching import (
    FOUND,
    IGNORED,
    Matches,
    greedy,
    image_pairs,
    place_in_group,
)
from proxydet.evaluation.results import Results
from proxydet.evaluation.scoring import guarded, hotcoco_evaluator, select
from proxydet.reporting import SILENT, Progress

ERROR_NAMES = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "classification and localisation",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


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


def break_down_errors(scored: Scored) -> ErrorBreakdown:
    """Count errors by kind, and what each kind costs, with hotcoco's implementation of TIDE.

    Args:
        scored: The result of scoring boxes or masks.

    Raises:
        EnvironmentProblem: The engine failed.
    """
    if not len(scored.selection):
        counted = int(scored.truth.counted_A.sum())
        return ErrorBreakdown(
            ap50=0.0,
            counts={name: counted if key == "Miss" else 0 for key, name in ERROR_NAMES.items()},
            costs=dict.fromkeys(ERROR_NAMES.values(), 0.0),
        )

    def job() -> dict[str, Any]:
        evaluator = scored.evaluator or hotcoco_evaluator(
            scored.truth,
            scored.results,
            scored.matches.selection,
            scored.iou_type,
            (None,),
        )
        errors: dict[str, Any] = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)
        return errors

    errors = guarded(job)
    return ErrorBreakdown(
        ap50=float(errors["ap_base"]),
        counts={name: int(errors["counts"].get(key, 0)) for key, name in ERROR_NAMES.items()},
        costs={name: float(errors["delta_ap"].get(key, 0.0)) for key, name in ERROR_NAMES.items()},
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
        matches: What became of each detection.
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

    Each annotation, crowds aside, is matched to at most one box, as evaluators match detections of one class. For a
    class-agnostic proposal file give all boxes one category.

    Args:
        truth: The annotations.
        results: Boxes with scores.
        limits: How many boxes of an image count, in ascending order.
    """
    # COCO's protocol selects boxes that cover no pixel too, and LVIS's counts no annotations of area 0.
    one_class = replace(truth, protocol="coco", category_ids=(0,))
    boxes = replace(results, category_D=np.zeros_like(results.category_D))
    selection = select(boxes, one_class, iou_type="bbox", per_image=max(limits))
    annotations = np.flatnonzero((truth.ann_area_A > 0) & (truth.ann_area_A < np.inf))
    annotations = annotations[np.argsort(truth.ann_image_A[annotations], kind="stable")]
    counts_G = ~(truth.ann_ignore_A | truth.ann_crowd_A)[annotations]
    pairs = image_pairs(truth, boxes, selection, annotations)
    near_N, state_NAT, _, _ = greedy(pairs, counts_G[:, None], np.zeros_like(counts_G))
    place_N = place_in_group(selection.image_S)[near_N]
    to_find = int(np.count_nonzero(counts_G))
    recalls = []
    for limit in limits:
        found_T = np.count_nonzero(state_NAT[place_N < limit, 0] == FOUND, axis=0)
        recalls.append(
            BoxRecall(
                limit=limit,
                average=float(found_T.mean() / to_find) if to_find else None,
                at_50=float(found_T[0] / to_find) if to_find else None,
            )
        )
    return tuple(recalls)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What lies behind the numbers, for boxes or masks; all None where the protocol has no matches (OpenImages).

    Attributes:
        errors: Errors by kind.
        calibration: Scores against precision.
        recall: Recall of boxes, classes left aside.
    """

    errors: ErrorBreakdown | None
    calibration: Calibration | None
    recall: tuple[BoxRecall, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None where there is nothing to measure."""
        calibration = None
        if self.calibration is not None:
            calibration = {
                "edges": self.calibration.edges.tolist(),
                "score": [
                    None if math.isnan(value) else value
                    for value in self.calibration.score_B.tolist()
                ],
                "precision": [
                    None if math.isnan(value) else value
                    for value in self.calibration.precision_B.tolist()
                ],
                "detections": self.calibration.count_B.tolist(),
                "error": self.calibration.error,
            }
        return {
            "errors": asdict(self.errors) if self.errors else None,
            "calibration": calibration,
            "box_recall": [asdict(value) for value in self.recall],
        }


def analyse(evaluation: Evaluation, progress: Progress = SILENT) -> Analysis:
    """Look behind the numbers of the masks, or of the boxes where no masks were scored.

    Raises:
        EnvironmentProblem: The engine failed.
    """
    scored = evaluation.main
    with progress.task("analysing errors", total=None):
        # In this order: the engine's breakdown takes the memory that the recall has given back.
        return Analysis(
            recall=box_recall(evaluation.truth, evaluation.results),
            errors=break_down_errors(scored) if scored else None,
            calibration=calibrate(scored.matches) if scored else None,
        )
