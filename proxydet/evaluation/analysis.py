"""Where average precision is lost, and whether scores mean what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.hotcoco_engine import tide_errors
from proxydet.evaluation.matching import FOUND, IGNORED, Matches
from proxydet.evaluation.results import Results
from proxydet.evaluation.scoring import Scored

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


def break_down_errors(truth: GroundTruth, results: Results, scored: Scored) -> ErrorBreakdown:
    """Count errors by kind, and what each kind costs.

    Args:
        truth: The annotations.
        results: All detections.
        scored: What scoring boxes or masks gave.

    Raises:
        EnvironmentProblem: The engine failed.
    """
    if not len(scored.selection):
        counted = int(truth.counted_A.sum())
        return ErrorBreakdown(
            ap50=0.0,
            counts={name: counted if key == "Miss" else 0 for key, name in ERROR_NAMES.items()},
            costs=dict.fromkeys(ERROR_NAMES.values(), 0.0),
        )
    errors = tide_errors(truth, results, scored.matches.selection, scored.iou_type)
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
