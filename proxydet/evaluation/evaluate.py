"""From a results file to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.errors import ConfigError
from proxydet.evaluation.bootstrap import Resamples
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.metrics import (
    average_precision,
    category_groups,
    category_precision,
    official_metrics,
)
from proxydet.evaluation.openimages import (
    read_hierarchy,
    resample_openimages,
    score_openimages,
)
from proxydet.evaluation.report import (
    CategoryScore,
    Counts,
    GroupScore,
    Report,
    Resampling,
    TypeReport,
)
from proxydet.evaluation.results import Results, read_results
from proxydet.evaluation.scoring import Scored, score, scored_types
from proxydet.reporting import SILENT, Progress

Groups = Mapping[str, NDArray[np.bool_] | Sequence[bool]]
ResultsSource = Path | str | list[dict[str, Any]] | Results
TruthSource = Path | str | dict[str, Any] | GroundTruth


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A report with what it was made from, for those who look further.

    Attributes:
        report: The numbers.
        truth: The annotations.
        results: The detections.
        scored: By iou type, the selected detections, curves and matches.
        groups: Sets of categories that were averaged over, bool (C,) each.
    """

    report: Report
    truth: GroundTruth
    results: Results
    scored: Mapping[str, Scored]
    groups: Mapping[str, NDArray[np.bool_]]


def evaluate_results(
    results: ResultsSource,
    ground_truth: TruthSource,
    *,
    config: EvaluationConfig | None = None,
    groups: Groups | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Score detections that are already made.

    Args:
        results: A results file in LVIS's or COCO's format, plain or gzipped, or its content.
        ground_truth: An annotation file in LVIS's or COCO's format, or its content.
        config: How to score; the defaults of :class:`~proxydet.evaluation.config.EvaluationConfig` are the published
            protocol.
        groups: Sets of categories to average over besides the frequency groups, as ``{"novel": mask}``; a mask is
            bool (C,) over the categories in ascending order of ids.
        progress: Where progress is shown.

    Returns:
        The report. Its metrics carry the official evaluators' names.

    Raises:
        DataError: The annotations or the detections cannot be used; the message has the first offenders.
        ConfigError: A group is not a mask over the categories.
        EnvironmentProblem: The fast engine failed.
    """
    return run_evaluation(
        results, ground_truth, config=config, groups=groups, progress=progress
    ).report


def run_evaluation(
    results: ResultsSource,
    ground_truth: TruthSource,
    *,
    config: EvaluationConfig | None = None,
    groups: Groups | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Do as `evaluate_results`, and keep what the report was made from."""
    config = config or EvaluationConfig()
    truth = (
        ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth.load(ground_truth)
    )
    check_protocol(config, truth)
    if not isinstance(results, Results):
        results = read_results(
            results,
            truth,
            keep_every_mask=config.engine == "lvis",
            allow_outside=config.allow_outside,
            allow_duplicates=config.allow_duplicates,
        )
    if truth.protocol == "openimages":
        return _openimages(truth, results, config)
    all_groups = category_groups(truth.frequencies, _checked_groups(groups or {}, truth))
    scored = {
        iou_type: score(
            truth.for_masks() if iou_type == "segm" else truth,
            results,
            iou_type,
            config,
            all_groups,
            progress,
        )
        for iou_type in scored_types(config, truth, results)
    }
    report = Report(
        dataset=truth.name,
        protocol=truth.protocol,
        engine=config.engine,
        fixed=config.fixed,
        counts=_counts(truth, results, scored),
        types={
            kind: _type_report(truth, part, all_groups, config) for kind, part in scored.items()
        },
    )
    return Evaluation(report=report, truth=truth, results=results, scored=scored, groups=all_groups)


def check_protocol(config: EvaluationConfig, truth: GroundTruth) -> None:
    """Raise ConfigError where a setting belongs to another protocol than that of the annotations."""
    if config.hierarchy is not None and truth.protocol != "openimages":
        raise ConfigError(
            f"{truth.name} is scored by {truth.protocol.upper()}'s protocol, which has no use for a class hierarchy.",
            hint="leave --hierarchy out, or give OpenImages' annotations with --data",
        )


def _openimages(truth: GroundTruth, results: Results, config: EvaluationConfig) -> Evaluation:
    """Score by OpenImages' own protocol, which has one metric: AP50, plain and expanded."""
    limit = config.max_detections
    plain = score_openimages(truth, results, max_detections=limit)
    scores = {"AP50": plain}
    if config.hierarchy is not None:
        ancestors = read_hierarchy(config.hierarchy, truth)
        scores["AP50 expanded"] = score_openimages(
            truth, results, ancestors=ancestors, max_detections=limit
        )
    resamples = None
    if config.bootstrap:
        resamples = resample_openimages(scores, truth, number=config.bootstrap, seed=config.seed)
    unscored_C = np.full(len(truth.category_ids), np.nan)
    detections_C = np.bincount(results.category_D, minlength=len(truth.category_ids))
    part = TypeReport(
        iou_type="bbox",
        metrics={name: score.ap50 for name, score in scores.items()},
        groups=(),
        categories=_category_scores(truth, detections_C, unscored_C, plain.ap50_C),
        intervals=resamples.intervals(config.confidence) if resamples else {},
        resampling=_resampling(config, resamples),
    )
    report = Report(
        dataset=truth.name,
        protocol=truth.protocol,
        engine="proxydet",
        fixed=False,
        counts=_counts(truth, results, {}),
        types={"bbox": part},
    )
    return Evaluation(report=report, truth=truth, results=results, scored={}, groups={})


def _checked_groups(groups: Groups, truth: GroundTruth) -> dict[str, NDArray[np.bool_]]:
    checked = {}
    for name, mask in groups.items():
        mask_C = np.asarray(mask)
        if mask_C.dtype != bool or mask_C.shape != (len(truth.category_ids),):
            raise ConfigError(
                f"The group {name!r} is of type {mask_C.dtype} and shape {mask_C.shape}; it must be one bool for each "
                f"of the {len(truth.category_ids)} categories of {truth.name}."
            )
        checked[name] = mask_C
    return checked


def _type_report(
    truth: GroundTruth,
    scored: Scored,
    groups: Mapping[str, NDArray[np.bool_]],
    config: EvaluationConfig,
) -> TypeReport:
    curves, resamples = scored.curves, scored.resamples
    return TypeReport(
        iou_type=scored.iou_type,
        metrics=official_metrics(curves, truth.protocol, truth.frequencies),
        groups=tuple(
            _group_score(name, mask_C, scored) for name, mask_C in groups.items() if mask_C.any()
        ),
        categories=_category_scores(
            truth,
            np.bincount(scored.selection.category_S, minlength=len(truth.category_ids)),
            category_precision(curves),
            category_precision(curves, iou=0.5),
        ),
        intervals=resamples.intervals(config.confidence) if resamples else {},
        resampling=_resampling(config, resamples),
        curves=curves,
    )


def _resampling(config: EvaluationConfig, resamples: Resamples | None) -> Resampling | None:
    if resamples is None:
        return None
    return Resampling(
        number=config.bootstrap,
        confidence=config.confidence,
        seed=config.seed,
        rare=resamples.rare,
    )


def _group_score(name: str, mask_C: NDArray[np.bool_], scored: Scored) -> GroupScore:
    curves = scored.curves
    return GroupScore(
        name=name,
        categories=int(mask_C.sum()),
        scored=int(np.count_nonzero(~np.isnan(category_precision(curves)[mask_C]))),
        ap=average_precision(curves, categories=mask_C),
        ap50=average_precision(curves, iou=0.5, categories=mask_C),
        ap75=average_precision(curves, iou=0.75, categories=mask_C),
    )


def _category_scores(
    truth: GroundTruth,
    detections_C: NDArray[np.intp],
    ap_C: NDArray[np.float64],
    ap50_C: NDArray[np.float64],
) -> tuple[CategoryScore, ...]:
    categories = len(truth.category_ids)
    annotations_C = np.bincount(truth.ann_category_A[truth.counted_A], minlength=categories)
    training_C = truth.training_images_C
    return tuple(
        CategoryScore(
            id=truth.category_ids[index],
            name=truth.category_names[index],
            frequency=truth.frequencies[index] if truth.frequencies else None,
            training_images=int(training_C[index]) if training_C is not None else None,
            annotations=int(annotations_C[index]),
            detections=int(detections_C[index]),
            ap=None if np.isnan(ap_C[index]) else float(ap_C[index]),
            ap50=None if np.isnan(ap50_C[index]) else float(ap50_C[index]),
        )
        for index in range(categories)
    )


def _counts(truth: GroundTruth, results: Results, scored: Mapping[str, Scored]) -> Counts:
    first = next((part.selection for part in scored.values()), None)
    return Counts(
        images=len(truth.image_ids),
        images_with_detections=len(np.unique(results.image_D)),
        annotations=len(truth.ann_image_A),
        detections=len(results),
        capped=first.capped if first else 0,
        unjudged=first.unjudged if first else 0,
        without_mask=results.without_mask,
        without_area={kind: part.selection.without_area for kind, part in scored.items()},
    )
