"""Scoring of detections that are in memory: select, run the engine, match, resample."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from proxydet.errors import DataError, EnvironmentProblem
from proxydet.evaluation.bootstrap import Resamples, Sets, resample
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.curves import Curves, Limits
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.hotcoco_engine import run_hotcoco
from proxydet.evaluation.json_input import first_offenders
from proxydet.evaluation.matching import Matches, match
from proxydet.evaluation.official_engine import run_official
from proxydet.evaluation.resampling import WeightedPrecision
from proxydet.evaluation.results import Results
from proxydet.evaluation.selection import Selection, select
from proxydet.reporting import SILENT, Progress

logger = logging.getLogger(__name__)

COCO_LIMITS = (1, 10, 100)
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Everything that scoring boxes, or masks, gave.

    Attributes:
        iou_type: ``"bbox"`` or ``"segm"``.
        truth: The annotations.
        results: All detections.
        selection: The detections that were scored.
        curves: Precision and recall, from the engine.
        known_matches: What became of each detection, where that was needed already.
        resamples: Metrics of resampled images; None when none were asked for.
    """

    iou_type: str
    truth: GroundTruth
    results: Results
    selection: Selection
    curves: Curves
    known_matches: Matches | None = field(default=None, repr=False)
    resamples: Resamples | None = None

    @cached_property
    def matches(self) -> Matches:
        """What became of each detection; worked out when it is first asked for."""
        if self.known_matches is not None:
            return self.known_matches
        return match(self.truth, self.results, self.selection, self.iou_type)


def scores_masks(config: EvaluationConfig, truth: GroundTruth, *, predicted: bool) -> bool:
    """Return whether masks are scored; warn where predicted ones are not because the ground truth has none.

    Args:
        config: Asks for masks, for boxes only, or for what is there.
        truth: The annotations.
        predicted: Whether the detections have masks.

    Raises:
        DataError: Masks are asked for, and the ground truth has none.
    """
    if "segm" in config.iou_types and not truth.has_masks:
        raise DataError(
            f"Masks are to be scored, and {truth.name} has none.",
            hint="score boxes only: --iou-type bbox",
            path=truth.path,
        )
    if config.iou_types or truth.protocol == "openimages":
        return "segm" in config.iou_types
    if predicted and not truth.has_masks:
        logger.warning("masks are not scored: %s has none", truth.name)
    return predicted and truth.has_masks


def scored_types(config: EvaluationConfig, truth: GroundTruth, results: Results) -> tuple[str, ...]:
    """Return what is scored: what was asked for, or boxes, and masks where ground truth and results both have them.

    Raises:
        DataError: Masks are asked for, and the ground truth or some detection has none.
    """
    masks = scores_masks(config, truth, predicted=results.has_masks)
    if not config.iou_types:
        return ("bbox", "segm") if masks else ("bbox",)
    if masks and not results.has_masks:
        raise DataError(
            f"{results.path or 'The detections given'}: masks are to be scored, and "
            f"{results.without_mask} of {len(results)} detections have none.",
            hint="score boxes only: --iou-type bbox",
            path=results.path,
        )
    return config.iou_types


def score(
    truth: GroundTruth,
    results: Results,
    iou_type: str,
    config: EvaluationConfig,
    groups: Mapping[str, NDArray[np.bool_]],
    progress: Progress = SILENT,
) -> Scored:
    """Score boxes or masks.

    Args:
        truth: The annotations.
        results: All detections.
        iou_type: ``"bbox"`` or ``"segm"``.
        config: How to score.
        groups: Sets of categories to average over, bool (C,) each.
        progress: Where progress is shown.

    Raises:
        EnvironmentProblem: The engine failed, or is found to be wrong.
    """
    selection = select(results, truth, iou_type=iou_type, **_limits(config, truth))
    curves = _curves(truth, results, selection, iou_type, config)
    matches = match(truth, results, selection, iou_type) if config.bootstrap else None
    resamples = None
    if matches is not None:
        precision = WeightedPrecision(matches, len(truth.category_ids))
        _check_against_engine(precision, curves, truth, config.engine)
        resamples = resample(
            precision,
            truth,
            Sets(frequencies=truth.frequencies, groups=groups),
            number=config.bootstrap,
            seed=config.seed,
            progress=progress,
        )
    return Scored(
        iou_type=iou_type,
        truth=truth,
        results=results,
        selection=selection,
        curves=curves,
        known_matches=matches,
        resamples=resamples,
    )


def _limits(config: EvaluationConfig, truth: GroundTruth) -> dict[str, int | None]:
    if config.fixed:
        return {"per_image": None, "per_category": config.fixed_detections}
    if truth.protocol == "lvis":
        return {"per_image": config.max_detections, "per_category": None}
    return {"per_image": None, "per_category": None}


def _curves(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    iou_type: str,
    config: EvaluationConfig,
) -> Curves:
    limits: Limits = COCO_LIMITS
    if config.fixed:
        limits = (None,)
    elif truth.protocol == "lvis":
        limits = (config.max_detections,)
    if config.engine == "hotcoco":
        return run_hotcoco(truth, results, selection, iou_type=iou_type, limits=limits)
    if config.fixed:
        # The official evaluator has no fixed AP: it gets the chosen detections, without a limit of its own.
        results = results.take(selection.detection_S)
    per_image = None if config.fixed else config.max_detections
    return run_official(truth, results, iou_type=iou_type, limits=limits, per_image=per_image)


def _check_against_engine(
    precision: WeightedPrecision, curves: Curves, truth: GroundTruth, engine: str
) -> None:
    """Intervals come from our own matches: without resampling these must give the engine's average precision.

    Raises:
        EnvironmentProblem: They do not.
    """
    ours_ATC = precision.precision(np.ones(len(truth.image_ids)))
    theirs_ATC = curves.average_TCA.transpose(2, 0, 1)
    apart_ATC = np.abs(ours_ATC - theirs_ATC) > _ROUNDING
    apart_ATC |= np.isnan(ours_ATC) != np.isnan(theirs_ATC)
    if not apart_ATC.any():
        return
    names = [truth.category_names[index] for index in np.flatnonzero(apart_ATC.any(axis=(0, 1)))]
    raise EnvironmentProblem(
        f"The engine {engine!r} gives another average precision than the matches that intervals are made from, in "
        f"{len(names)} categories ({first_offenders(names)}).",
        hint="evaluate with the official one, the yardstick: --engine lvis"
        if engine == "hotcoco"
        else "report this with the files; --bootstrap 0 gives the metrics without intervals",
    )
