"""Learns what scores mean from annotated images: a threshold for each class, and a scale and bias that make scores probabilities.

A detector's scores mean different things for different classes: 0.3 can be mostly right for one and mostly wrong for another.
The detections of a few annotated images, each right or wrong, give a calibration: the log-odds of being right are
``slope * logit(score) + offset``, with one slope for all classes and an offset of each class around a shared one. How far the
offsets may lie apart is learned too, so that a class with many detections has its own, one with few lies near the shared one, and one
with none has the shared one. A threshold on that probability, one for all classes, is a threshold on the score of each.

Calibrated scores come from the classes' scorers: a scale and a bias of each class's logits, near those that all classes share unless
its detections say otherwise, under which the scores themselves are as likely as can be (Platt's scaling, inside the score's formula:
what the proposal network and the branches add to a score stays). Within a class the logits keep their order; the scores may not, as they
hold the proposals' too, so of several steepnesses the best is taken that costs no more than half a point of AP.

Dimensions: C classes, S detections that are right or wrong, K steps of the detection branch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from proxydet.errors import DataError
from proxydet.evaluation.analysis import (
    OperatingPoint,
    calibrate,
    operating_point,
    right_and_wrong,
)
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_split
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.split import FOLDS
from proxydet.modeling.postprocess import ClassText, agreed_scores, class_scores
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.names import quote_names
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.evaluation.evaluate import Evaluation, Scored
    from proxydet.evaluation.split import DescribedSplit

Floats = NDArray[np.float64]

_STEPS = 50
_MOST_SPREAD = 4.0
# Scores of exactly 0 and 1 have no logit.
_EDGE = 1e-6
# Classes with fewer annotated objects are reported as such.
_FEW = 5
_CONFIG = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
# By what the logits of all classes may be multiplied. Steeper ones let the proposals' scores decide, which costs AP.
_SCALES = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0)
# How far the logarithm of a class's scale, and its bias, lie from those that classes share, and that bias from 0: standard deviations.
_OWN_SPREAD, _SHARED_SPREAD = (0.1, 0.7), 3.0
# Pixels between the boxes of a detection and of its region, beyond those of the nearest region.
_SAME_BOX = 0.1
# AP of the same detections that calibrated scores may cost.
_MOST_LOST = 0.005


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
class ScoreParts:
    """What the scores of detections are made of; make it with `of_detections`.

    Attributes:
        class_S: int64, rows of the vocabulary.
        logit_KS: float64, temperature times scale times cosine, of each step.
        mixup_S: The same of the mixup branch; None where there is none.
        rest_KS: float64, what else the logits hold: biases of classifier and class; of the mixup branch last.
        proposal_S: float64 in [0, 1], scores of the proposals.
        share_S: float64 in [0, 1], weights of the mixup branch.
    """

    class_S: NDArray[np.int64]
    logit_KS: Tensor
    mixup_S: Tensor | None
    rest_KS: Tensor
    proposal_S: Tensor
    share_S: Tensor

    @classmethod
    def of_detections(
        cls,
        detector: Detector,
        split: DescribedSplit,
        vocabulary: Vocabulary,
        scored: Scored,
        progress: Progress = SILENT,
    ) -> ScoreParts:
        """Find the regions of detections again, which are those of their boxes.

        Args:
            detector: What made the detections.
            split: Its images.
            vocabulary: The classes.
            scored: The detections.
            progress: Where progress is shown.

        Raises:
            ConfigError: Detections come from tiles or test-time augmentation, whose regions have several logits.
            DataError: An image cannot be read.
        """
        selection, settings = scored.selection, detector.inference
        names = [name.strip() for name in scored.truth.category_names]
        row_C = np.array(
            [vocabulary.names.index(n) if n in vocabulary.names else -1 for n in names]
        )
        class_S = row_C[selection.category_S]
        box_S4 = scored.results.box_D4[selection.detection_S].copy()
        box_S4[:, 2:] += box_S4[:, :2]
        device = detector.network.device
        text, classifiers = ClassText.of(vocabulary, device), detector.network.classifiers()
        parts: list[Tensor] = []
        edges = np.searchsorted(selection.image_S, np.arange(len(scored.truth.image_ids) + 1))
        with progress.task("finding regions", total=len(edges) - 1, unit="images") as task:
            for image_id, start, end in zip(scored.truth.image_ids, edges, edges[1:], strict=False):
                if start < end:
                    image = detector.scaled(split.read_id(image_id), settings)
                    regions = detector.embed([image], settings)
                    view, (height, width) = image.views[0].image, image.size
                    scale_4 = torch.tensor([width / view.shape[2], height / view.shape[1]] * 2)
                    apart_SR = torch.cdist(
                        torch.from_numpy(box_S4[start:end]).float(),
                        regions.boxes_BR4[0].cpu() * scale_4,
                        p=torch.inf,
                    ).masked_fill(~regions.valid_BR[0].cpu(), torch.inf)
                    # Of several regions of one box, the one of the score.
                    score_SR = class_scores(regions, text, classifiers, settings).cpu().T
                    score_S1 = torch.from_numpy(selection.score_S[start:end])[:, None]
                    unlike_SR = (score_SR[class_S[start:end]] - score_S1).abs()
                    near_SR = apart_SR <= apart_SR.amin(dim=1, keepdim=True) + _SAME_BOX
                    region_S = unlike_SR.masked_fill(~near_SR, torch.inf).argmin(dim=1).to(device)
                    steps = [*regions.detection]
                    steps += [] if regions.mixup_BRD is None else [regions.mixup_BRD]
                    if settings.rescore:
                        regions = dataclasses.replace(
                            regions, proposal_scores_BR=agreed_scores(regions)
                        )
                    text_SD = text.text_DC.T[class_S[start:end]]
                    rows = [
                        classifier.temperature * (values[0, region_S] * text_SD).sum(dim=1)
                        for classifier, values in zip(classifiers, steps, strict=True)
                    ]
                    parts.append(torch.stack([regions.proposal_scores_BR[0, region_S], *rows]))
                task.advance()
        proposal_S, *logits = torch.cat(parts, dim=1).double().cpu()
        mixup = detector.network.roi_heads.mixup is not None
        own_S = torch.from_numpy(vocabulary.bias.astype(np.float64))[class_S]
        share_C = np.where(vocabulary.base, settings.alpha, settings.beta)
        return cls(
            class_S=class_S,
            logit_KS=torch.stack(logits[: len(logits) - mixup]),
            mixup_S=logits[-1] if mixup else None,
            rest_KS=torch.stack(
                [own_S + (0.0 if c.cls_bias is None else c.cls_bias.item()) for c in classifiers]
            ),
            proposal_S=proposal_S,
            share_S=torch.from_numpy(share_C)[class_S],
        )

    def log_scores(self, scale_S: Tensor, bias_S: Tensor) -> Tensor:
        """Return the logarithm of the scores with other scorers: (S,), below 0.

        Args:
            scale_S: By what the scale of each detection's class is multiplied.
            bias_S: What is added to its bias.
        """
        steps = len(self.logit_KS)
        chance_KS = logsigmoid(scale_S * self.logit_KS + self.rest_KS[:steps] + bias_S)
        log_S = chance_KS.logsumexp(dim=0) - np.log(steps)
        if self.mixup_S is not None:
            mixup_S = logsigmoid(scale_S * self.mixup_S + self.rest_KS[-1] + bias_S)
            log_S = (1 - self.share_S) * log_S + self.share_S * mixup_S
        scores_S: Tensor = (self.proposal_S.log() + log_S) / 2
        return scores_S.clamp(max=-1e-6)

    def fit(
        self, right_S: NDArray[np.bool_], chosen_S: NDArray[np.bool_], classes: int, scale: float
    ) -> NDArray[np.float64]:
        """Fit the scorers of the classes to which detections are right, by penalised maximum likelihood.

        Args:
            right_S: Which detections are right.
            chosen_S: Those that are learned from.
            classes: C.
            scale: What the scales of the classes lie around.

        Returns:
            (2, C): by what the scale of each class is multiplied, and what is added to its bias.
        """
        values_2C = torch.zeros(2, classes + 1, dtype=torch.float64, requires_grad=True)
        own_21 = torch.tensor(_OWN_SPREAD)[:, None]
        right, wrong = (torch.from_numpy(part & chosen_S) for part in (right_S, ~right_S))
        optimiser = torch.optim.LBFGS(
            [values_2C], max_iter=200, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            scale_C, bias_C = values_2C[0].exp() * scale, values_2C[1] + values_2C[1, -1]
            log_S = self.log_scores(scale_C[self.class_S], bias_C[self.class_S])
            total = -log_S[right].sum() - torch.log(-torch.expm1(log_S[wrong])).sum()
            total = total + ((values_2C[:, :-1] / own_21) ** 2).sum() / 2
            total = total + (values_2C[1, -1] / _SHARED_SPREAD) ** 2 / 2
            total.backward()
            return total

        with torch.enable_grad():
            optimiser.step(loss)
        own_C, bias_C = values_2C.detach().numpy()
        return np.stack([np.exp(own_C[:-1]) * scale, bias_C[:-1] + bias_C[-1]])


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """What calibrated scores change in the same detections."""

    error_before: float
    """Mean difference of score and share of right detections (expected calibration error, 10 bins) of the detector's scores,"""
    error: float
    """and of scores that were calibrated on other images."""
    ap_before: float
    """Box AP by the detector's scores,"""
    ap: float
    """and by the calibrated ones: what their order costs, since boxes and images are those that they were learned from."""
    saved: bool
    """Whether the vocabulary has them: the error is smaller and AP no more than half a point lower, or they were asked for in any case."""


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
    worse: bool
    """Whether thresholds that were learned from other images serve what was asked for less than the general one: by F1; with a precision,
    it is neither reached nor better; with a share to keep, recall and F1 are lower. False where there are too few images to know."""
    saved: bool
    """Whether the vocabulary has these thresholds: they are not worse, or were asked for in any case; else it keeps what it had."""
    scores: ScoreChange | None
    """What calibrated scores change, where they were asked for."""
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
    scores: bool = False,
    even_if_worse: bool = False,
    progress: Progress = SILENT,
) -> CalibrationReport:
    """Learn a threshold for each class, for detections with one label a box, as ``predict`` and ``serve`` give them.

    What is worse on images that it was not learned from is not put into the vocabulary.

    Args:
        detector: Finds objects.
        split: Annotated images; a few dozen will do. Their categories are found among the classes by name.
        vocabulary: The classes, background too; marked base as it is.
        precision: The share of detections that shall be right, in (0, 1); see `CalibrationReport.reached`.
        keep: Instead, the share of the objects that are found at all, however low they score, that shall stay found, in (0, 1).
            Without both: the thresholds with the best F1.
        score_threshold: The general threshold that they are compared with.
        scores: Calibrate the scores too, before; thresholds are then of these.
        even_if_worse: Put what was learned into the vocabulary in any case.
        progress: Where progress is shown.

    Raises:
        ConfigError: A share is not in (0, 1), or both are given; or scores are to be calibrated with tiles or augmentation.
        DataError: No category is one of the classes, nothing that is annotated is found, or for scores there are too few images.
    """
    split.check_calibration(detector.inference, precision=precision, keep=keep, scores=scores)
    shared = split.annotated(vocabulary.reported)
    least, images = detector.inference.score_threshold, len(split.truth.image_ids)
    one_label = detector.with_settings(agnostic_nms=True, masks=False)

    def evaluated(words: Vocabulary) -> Evaluation:
        found = evaluate_split(
            one_label, split, vocabulary=words, config=_CONFIG, progress=progress
        )
        if found is None or found.main is None:
            raise DataError(
                f"{split.truth.name} is scored by a protocol without matches of single detections",
                hint="calibrate on annotations of COCO's or LVIS's kind",
                path=split.truth.path,
            )
        return found

    fold_I = np.random.default_rng(0).permutation(images) % FOLDS
    evaluation, change = evaluated(vocabulary), None
    assert evaluation.main is not None
    names = tuple(name.strip() for name in evaluation.main.truth.category_names)
    asked_C = np.isin(names, shared)

    def judged(scored: Scored) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which detections are right, and which of the classes asked for are right or wrong."""
        right_S, wrong_S = right_and_wrong(scored.matches)
        return right_S, (right_S | wrong_S) & asked_C[scored.matches.selection.category_S]

    if not np.logical_and(*judged(evaluation.main)).any():
        raise DataError(
            f"{split.truth.name}: no detection of {quote_names(shared)} finds an annotated object: there is nothing to learn from",
            hint="calibrate on other images, or on more of them",
            path=split.truth.path,
        )
    if scores:
        calibrated, change = _with_scores(
            one_label, split, vocabulary, evaluation, fold_I, progress, even_if_worse
        )
        if change.saved:
            vocabulary, evaluation = calibrated, evaluated(calibrated)
    scored = evaluation.main
    assert scored is not None
    selection, (right_S, used_S) = scored.matches.selection, judged(scored)
    class_S, score_S = selection.category_S, selection.score_S
    matches = scored.matches
    counted_G = matches.counts_GA[:, 0] & asked_C[matches.ann_category_G]

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
        thresholds = np.clip(fitted.thresholds(limit), least, 1)
        return thresholds[:-1], float(thresholds[-1])

    everything_I = np.ones(images, dtype=bool)
    threshold_C, without = learn(everything_I)
    general_S = np.full(len(class_S), score_threshold)
    points = [
        operating_point(scored, general_S, f"score above {score_threshold:g}", classes=asked_C),
        operating_point(scored, threshold_C[class_S], "thresholds of the classes", classes=asked_C),
    ]
    worse = False
    if images >= 2 * FOLDS:
        elsewhere_FC = np.stack([learn(fold_I != fold)[0] for fold in range(FOLDS)])
        elsewhere_S = elsewhere_FC[fold_I[selection.image_S], class_S]
        name = "the same, learned from other images"
        points.append(operating_point(scored, elsewhere_S, name, classes=asked_C))
        worse = _is_worse(points[2], points[0], precision, keep)
    row_of = {name: row for row, name in enumerate(names)}
    kept = [score_S > general_S, score_S > threshold_C[class_S]]
    judged_parts = [
        used_S,
        *(part & used_S & found for part in kept for found in (right_S, ~right_S)),
    ]
    # One more for classes that are not annotated.
    detections, *counts = np.stack(
        [np.bincount(class_S[part], minlength=len(names) + 1) for part in judged_parts]
    ).tolist()
    objects = np.bincount(matches.ann_category_G[counted_G], minlength=len(names) + 1).tolist()
    classes = []
    for name in vocabulary.reported:
        row = row_of.get(name, len(names))
        basis = "shared"
        if detections[row]:
            basis = "own" if objects[row] >= _FEW else "few"
        right_before, wrong_before, right, wrong = (column[row] for column in counts)
        classes.append(
            CalibratedClass(
                name=name,
                objects=objects[row],
                threshold=without if basis == "shared" else float(threshold_C[row]),
                basis=basis,
                right_before=right_before,
                wrong_before=wrong_before,
                right=right,
                wrong=wrong,
            )
        )
    if saved := even_if_worse or not worse:
        threshold_V = np.full(len(vocabulary), np.nan)
        threshold_V[: len(classes)] = [entry.threshold for entry in classes]
        vocabulary = vocabulary.with_scorers(threshold=threshold_V)
    return CalibrationReport(
        vocabulary=vocabulary,
        classes=tuple(classes),
        points=tuple(points),
        images=images,
        reached=precision is None or (points[1].precision or 0.0) >= precision,
        worse=worse,
        saved=saved,
        scores=change,
        not_asked=tuple(name for name in names if name not in shared),
    )


def _with_scores(
    detector: Detector,
    split: DescribedSplit,
    vocabulary: Vocabulary,
    evaluation: Evaluation,
    fold_I: NDArray[np.int64],
    progress: Progress,
    even_if_worse: bool,
) -> tuple[Vocabulary, ScoreChange]:
    """Return the vocabulary with calibrated scores, and what they change.

    The calibration error is that of images that they were not learned from, AP that of the same images.
    """
    scored = evaluation.main
    assert scored is not None
    selection, results = scored.selection, evaluation.results
    parts = ScoreParts.of_detections(detector, split, vocabulary, scored, progress)
    # The matches may be of fewer detections; those left out are neither right nor wrong.
    place_D = np.full(len(results), -1)
    place_D[selection.detection_S] = np.arange(len(selection))
    right_S, used_S = np.zeros((2, len(selection)), dtype=bool)
    right_M, wrong_M = right_and_wrong(scored.matches)
    place_M = place_D[scored.matches.selection.detection_S]
    right_S[place_M], used_S[place_M] = right_M, right_M | wrong_M
    fold_S = fold_I[selection.image_S]

    def scores_of(scale: float, learned_S: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Learn from some detections; return scale and bias of the classes, and the scores of all."""
        found_2C = parts.fit(right_S, used_S & learned_S, len(vocabulary), scale)
        scale_S, bias_S = torch.from_numpy(found_2C)[:, parts.class_S]
        return found_2C, parts.log_scores(scale_S, bias_S).exp().numpy()

    def scored_by(score_S: Floats) -> Evaluation:
        score_D = results.score_D.copy()
        score_D[selection.detection_S] = score_S
        changed = dataclasses.replace(results, score_D=score_D)
        return run_evaluation(changed, split.truth, config=_CONFIG)

    def error_of(part: Scored | None) -> float:
        return 1.0 if part is None else calibrate(part.matches).error or 0.0

    before, ap_before = error_of(scored), evaluation.report.ap or 0.0
    tried: list[tuple[bool, float, float, Floats]] = []
    for scale in _SCALES:
        found_2C, score_S = scores_of(scale, np.ones(len(selection), dtype=bool))
        ap = scored_by(score_S).report.ap or 0.0
        elsewhere_S = np.zeros(len(selection))
        for fold in range(FOLDS):
            here_S = fold_S == fold
            elsewhere_S[here_S] = scores_of(scale, ~here_S)[1][here_S]
        error = error_of(scored_by(elsewhere_S).main)
        tried.append((ap < ap_before - _MOST_LOST, error, ap, found_2C))
    # The smallest error of those that keep the order well enough.
    costs, error, ap, (scale_C, bias_C) = min(tried, key=lambda each: each[:2])
    reported_C = ~vocabulary.background
    calibrated = vocabulary.with_scorers(
        scale=np.where(reported_C, scale_C, 1) * vocabulary.scale,
        bias=np.where(reported_C, bias_C, 0) + vocabulary.bias,
    )
    saved = even_if_worse or (error < before and not costs)
    change = ScoreChange(error_before=before, error=error, ap_before=ap_before, ap=ap, saved=saved)
    return calibrated, change


def _is_worse(
    point: OperatingPoint, general: OperatingPoint, precision: float | None, keep: float | None
) -> bool:
    """Whether thresholds serve what was asked for less than the general one; see `CalibrationReport.worse`."""
    if precision is not None:
        return (point.precision or 0.0) < min(precision, general.precision or 0.0)

    def f1(of: OperatingPoint) -> float:
        return 2 * of.right / max(of.right + of.wrong + of.objects, 1)

    return f1(point) < f1(general) and (keep is None or point.right < general.right)


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
