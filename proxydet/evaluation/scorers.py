"""Learns a threshold for each class from annotated images.

A detector's scores mean different things for different classes: 0.3 can be mostly right for one and mostly wrong for another.
The detections of a few annotated images, each right or wrong, give a calibration: the log-odds of being right are
``slope * logit(score) + offset``, with one slope for all classes and an offset of each class around a shared one. How far the
offsets may lie apart is learned too, so that a class with many detections has its own, one with few lies near the shared one, and one
with none has the shared one. A threshold on that probability, one for all classes, is a threshold on the score of each.

Dimensions: C classes, S detections that are right or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.analysis import OperatingPoint, operating_point, right_and_wrong
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_split
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.names import quote_names
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.evaluation.split import DescribedSplit

Floats = NDArray[np.float64]

_STEPS = 50
_MOST_SPREAD = 4.0
# Scores of exactly 0 and 1 have no logit.
_EDGE = 1e-6
# Classes with fewer annotated objects are reported as such.
_FEW = 5
# Parts of the images, of which each is counted with what was learned from the others.
_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class ScoreCalibration:
    """The probability that a detection is right, by its class and score.

    Attributes:
        slope: Of the log-odds over the logit of the score, above 0.
        offset_C: float64 (C,).
        shared: The offset of a class without detections.
        spread: Standard deviation of the classes' offsets around the shared one.
    """

    slope: float
    offset_C: Floats
    shared: float
    spread: float

    @classmethod
    def fit(
        cls, score_S: Floats, class_S: NDArray[np.int64], right_S: NDArray[np.bool_], classes: int
    ) -> ScoreCalibration:
        """Fit by penalised maximum likelihood; the spread by its posterior.

        Args:
            score_S: In [0, 1].
            class_S: In [0, C).
            right_S: Which detections are right; at least one is, and one is not.
            classes: C.
        """
        x_S = _logit(score_S)
        counts_C = np.bincount(class_S, minlength=classes).astype(np.float64)
        slope, shared, offset_C, variance = 1.0, 0.0, np.zeros(classes), 1.0
        for _ in range(_STEPS):
            p_S = _sigmoid(slope * x_S + shared + offset_C[class_S])
            weight_S = np.maximum(p_S * (1 - p_S), 1e-9)
            error_S = right_S - p_S
            # A Newton step; the offsets, each of which has detections of its own, are eliminated.
            weight_C = np.bincount(class_S, weight_S, classes)
            curvature_C = weight_C + 1 / variance
            gradient_C = np.bincount(class_S, error_S, classes) - offset_C / variance
            design_S2 = np.stack([x_S, np.ones_like(x_S)], axis=1)
            cross_C2 = np.stack(
                [np.bincount(class_S, weight_S * column, classes) for column in design_S2.T], axis=1
            )
            hessian_22 = (design_S2 * weight_S[:, None]).T @ design_S2
            hessian_22 -= (cross_C2 / curvature_C[:, None]).T @ cross_C2
            gradient_2 = design_S2.T @ error_S - cross_C2.T @ (gradient_C / curvature_C)
            # Slightly damped towards a slope of 1, where the scores do not tell.
            hessian_22 += 1e-3 * np.eye(2)
            gradient_2 += 1e-3 * np.array([1 - slope, -shared])
            step_2 = np.clip(np.linalg.solve(hessian_22, gradient_2), -1, 1)
            step_C = (gradient_C - cross_C2 @ step_2) / curvature_C
            slope, shared = max(slope + float(step_2[0]), 0.05), shared + float(step_2[1])
            offset_C = offset_C + np.clip(step_C, -1, 1)
            seen_C = counts_C > 0
            variance = float((offset_C**2 + 1 / curvature_C)[seen_C].mean())
            variance = min(max(variance, 1e-4), _MOST_SPREAD**2)
        return cls(
            slope=slope, offset_C=shared + offset_C, shared=shared, spread=float(np.sqrt(variance))
        )

    def probability(self, score_S: Floats, class_S: NDArray[np.int64]) -> Floats:
        """Return the probability that detections are right: (S,) in (0, 1)."""
        return _sigmoid(self.slope * _logit(score_S) + self.offset_C[class_S])

    def thresholds(self, probability: float) -> Floats:
        """Return the score at which each class is right with a probability: (C + 1,) in (0, 1), last that of a class without any."""
        offsets = np.append(self.offset_C, self.shared)
        return _sigmoid((float(_logit(np.array(probability))) - offsets) / self.slope)


def _logit(share: Floats) -> Floats:
    clipped = np.clip(share, _EDGE, 1 - _EDGE)
    logits: Floats = np.log(clipped) - np.log1p(-clipped)
    return logits


def _sigmoid(logit: Floats) -> Floats:
    values: Floats = 1 / (1 + np.exp(-np.clip(logit, -60, 60)))
    return values


@dataclass(frozen=True, kw_only=True)
class CalibratedClass:
    """A class, and what its threshold changes on the images that it was learned from."""

    name: str
    """Its name."""
    objects: int
    """Its annotated objects."""
    threshold: float
    """Detections must score above this."""
    basis: str
    """What it was learned from: ``own`` detections, ``few`` of its own and those of all classes, or ``shared``: none of its own."""
    right_before: int
    """Detections above the general threshold that find an object,"""
    wrong_before: int
    """and that do not."""
    right: int
    """Detections above the class's threshold that find an object,"""
    wrong: int
    """and that do not."""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """A vocabulary with thresholds, and what they change."""

    vocabulary: Vocabulary
    """The classes with their thresholds."""
    classes: tuple[CalibratedClass, ...]
    """In the vocabulary's order, background left out."""
    points: tuple[OperatingPoint, ...]
    """At the general threshold; at the classes' own; and at own ones of which each was learned from other images than those that it is
    counted on, where there are enough images."""
    images: int
    """Images that it was learned from."""
    reached: bool
    """Whether the wanted precision is reached on these images; where no thresholds do, they are those with the highest. True without one."""
    not_asked: tuple[str, ...]
    """Annotated categories that are not among the classes."""


def calibrate_vocabulary(
    detector: Detector,
    split: DescribedSplit,
    vocabulary: Vocabulary,
    *,
    precision: float | None = None,
    keep: float | None = None,
    score_threshold: float = 0.3,
    progress: Progress = SILENT,
) -> CalibrationReport:
    """Learn a threshold for each class, for detections with one label a box, as ``predict`` and ``serve`` give them.

    Args:
        detector: Finds objects.
        split: Annotated images; a few dozen will do. Their categories are found among the classes by name.
        vocabulary: The classes, background too; marked base as it is.
        precision: The share of detections that shall be right, in (0, 1); see `CalibrationReport.reached`.
        keep: Instead, the share of the objects that are found at all, however low they score, that shall stay found, in (0, 1).
            Without both: the thresholds with the best F1.
        score_threshold: The general threshold that they are compared with.
        progress: Where progress is shown.

    Raises:
        ConfigError: A share is not in (0, 1), or both are given.
        DataError: No category is one of the classes, or nothing that is annotated is found.
    """
    if precision is not None and keep is not None:
        raise ConfigError("precision and keep cannot be combined", hint="leave one of them out")
    for name, share in {"precision": precision, "keep": keep}.items():
        if share is not None and not 0 < share < 1:
            raise ConfigError(
                f"{name} is {share}; it must be above 0 and below 1", hint="0.9: nine of ten"
            )
    annotated = [category.name.strip() for category in split.store.categories]
    shared = [name for name in vocabulary.reported if name in annotated]
    if not shared:
        raise DataError(
            f"{split.truth.name}: none of the classes ({quote_names(vocabulary.reported)}) is among its categories "
            f"({quote_names(annotated)})",
            hint="name the classes as the annotations do, or calibrate on images in which they are annotated",
            path=split.truth.path,
        )
    evaluation = evaluate_split(
        detector.with_settings(agnostic_nms=True, masks=False),
        split,
        vocabulary=vocabulary,
        config=EvaluationConfig(bootstrap=0, iou_types=("bbox",)),
        progress=progress,
    )
    if evaluation is None or (scored := evaluation.main) is None:
        raise DataError(
            f"{split.truth.name} is scored by a protocol without matches of single detections",
            hint="calibrate on annotations of COCO's or LVIS's kind",
            path=split.truth.path,
        )
    names = [name.strip() for name in scored.truth.category_names]
    asked_C = np.isin(names, shared)
    selection = scored.matches.selection
    class_S, score_S = selection.category_S, selection.score_S
    right_S, wrong_S = right_and_wrong(scored.matches)
    used_S = (right_S | wrong_S) & asked_C[class_S]
    if not (right_S & used_S).any():
        raise DataError(
            f"{split.truth.name}: no detection of {quote_names(shared)} finds an annotated object: there is nothing to learn from",
            hint="calibrate on other images, or on more of them",
            path=split.truth.path,
        )
    matches = scored.matches
    counted_G = matches.counts_GA[:, 0] & asked_C[matches.ann_category_G]
    images = len(scored.truth.image_ids)

    def learn(image_I: NDArray[np.bool_]) -> tuple[Floats, float]:
        """Learn from some images: the thresholds of the categories, and that of a class without detections."""
        chosen_S = used_S & image_I[selection.image_S]
        if not (right_S & chosen_S).any():
            return np.full(len(names), score_threshold), score_threshold
        fitted = ScoreCalibration.fit(
            score_S[chosen_S], class_S[chosen_S], right_S[chosen_S], len(names)
        )
        probability_S = fitted.probability(score_S[chosen_S], class_S[chosen_S])
        objects = int((counted_G & image_I[matches.ann_image_G]).sum())
        limit = _best_probability(probability_S, right_S[chosen_S], objects, precision, keep)
        least = detector.inference.score_threshold
        thresholds = np.clip(fitted.thresholds(limit), least, 1)
        return thresholds[:-1], float(thresholds[-1])

    everything_I = np.ones(images, dtype=bool)
    threshold_C, without = learn(everything_I)
    general_S = np.full(len(class_S), score_threshold)
    points = [
        operating_point(scored, general_S, f"score above {score_threshold:g}", classes=asked_C),
        operating_point(scored, threshold_C[class_S], "thresholds of the classes", classes=asked_C),
    ]
    if images >= 2 * _FOLDS:
        fold_I = np.random.default_rng(0).permutation(images) % _FOLDS
        elsewhere_FC = np.stack([learn(fold_I != fold)[0] for fold in range(_FOLDS)])
        elsewhere_S = elsewhere_FC[fold_I[selection.image_S], class_S]
        name = "the same, learned from other images"
        points.append(operating_point(scored, elsewhere_S, name, classes=asked_C))
    own = dict(zip(names, threshold_C.tolist(), strict=True))
    number = {name: row for row, name in enumerate(names)}
    objects_C = np.bincount(matches.ann_category_G[counted_G], minlength=len(names))
    detections_C = np.bincount(class_S[used_S], minlength=len(names))

    def counted(chosen_S: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(class_S[chosen_S & used_S], minlength=len(names))

    kept = [score_S > general_S, score_S > threshold_C[class_S]]
    columns = [counted(part & found_S) for part in kept for found_S in (right_S, wrong_S)]
    classes = []
    for name in vocabulary.reported:
        row = number.get(name)
        basis = "shared"
        if row is not None and detections_C[row]:
            basis = "own" if objects_C[row] >= _FEW else "few"
        counts = [0] * 4 if row is None else [int(column[row]) for column in columns]
        classes.append(
            CalibratedClass(
                name=name,
                objects=0 if row is None else int(objects_C[row]),
                threshold=without if basis == "shared" else own[name],
                basis=basis,
                right_before=counts[0],
                wrong_before=counts[1],
                right=counts[2],
                wrong=counts[3],
            )
        )
    threshold_V = np.full(len(vocabulary), np.nan)
    threshold_V[: len(classes)] = [entry.threshold for entry in classes]
    return CalibrationReport(
        vocabulary=vocabulary.with_scorers(threshold=threshold_V),
        classes=tuple(classes),
        points=tuple(points),
        images=images,
        reached=precision is None or (points[1].precision or 0.0) >= precision,
        not_asked=tuple(name for name in annotated if name not in shared),
    )


def _best_probability(
    probability_S: Floats,
    right_S: NDArray[np.bool_],
    objects: int,
    precision: float | None,
    keep: float | None,
) -> float:
    """Return the probability above which detections have the best F1, or reach a precision with the most right ones, or keep some."""
    order = np.argsort(-probability_S, kind="stable")
    found_S, place_S = np.cumsum(right_S[order]), np.arange(1, len(order) + 1)
    if keep is not None:
        last = int(np.searchsorted(found_S, keep * found_S[-1]))
    elif precision is None:
        last = int(np.argmax(2 * found_S / (place_S + objects)))
    else:
        precise = np.flatnonzero(found_S >= precision * place_S)
        last = int(precise[-1]) if len(precise) else int(np.argmax(found_S / place_S))
    sorted_S = probability_S[order]
    below = sorted_S[last + 1] if last + 1 < len(order) else sorted_S[last] * 0.99
    return float((sorted_S[last] + below) / 2)
