"""From a results file to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.curves import Curves, Limits
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.hotcoco_engine import run_hotcoco
from proxydet.evaluation.metrics import (
    average_precision,
    category_groups,
    category_precision,
    official_metrics,
)
from proxydet.evaluation.official_engine import run_official
from proxydet.evaluation.report import CategoryScore, Counts, GroupScore, Report, TypeReport
from proxydet.evaluation.results import Results
from proxydet.evaluation.results_file import read_results
from proxydet.evaluation.selection import Selection, select

COCO_LIMITS = (1, 10, 100)
Groups = Mapping[str, NDArray[np.bool_] | Sequence[bool]]


def evaluate_results(
    results: Path | str | list[dict[str, Any]] | Results,
    ground_truth: Path | str | dict[str, Any] | GroundTruth,
    *,
    config: EvaluationConfig | None = None,
    groups: Groups | None = None,
) -> Report:
    """Score detections that are already made.

    Args:
        results: A results file in LVIS's or COCO's format, plain or gzipped, or its content.
        ground_truth: An annotation file in LVIS's or COCO's format, or its content.
        config: How to score; the defaults of :class:`~proxydet.evaluation.config.EvaluationConfig` are the published
            protocol.
        groups: Sets of categories to average over besides the frequency groups, as ``{"novel": mask}``; a mask is
            bool (C,) over the categories in ascending order of ids.

    Returns:
        The report. Its metrics carry the official evaluators' names.

    Raises:
        DataError: The annotations or the detections cannot be used; the message has the first offenders.
        ConfigError: A group is not a mask over the categories, or masks are asked for where there are none.
        EnvironmentProblem: The fast engine failed.
    """
    config = config or EvaluationConfig()
    truth = (
        ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth.load(ground_truth)
    )
    if not isinstance(results, Results):
        results = read_results(
            results,
            truth,
            keep_every_mask=config.engine == "lvis",
            allow_outside=config.allow_outside,
        )
    partition = _checked_groups(groups or {}, truth)
    types: dict[str, TypeReport] = {}
    selections: dict[str, Selection] = {}
    for iou_type in iou_types(config, results):
        selection = select(results, truth, iou_type=iou_type, **_limits(config, truth))
        curves = _curves(truth, results, selection, iou_type, config)
        selections[iou_type] = selection
        types[iou_type] = _type_report(truth, selection, curves, iou_type, partition)
    return Report(
        dataset=truth.name,
        protocol=truth.protocol,
        engine=config.engine,
        fixed=config.fixed,
        counts=_counts(truth, results, selections),
        types=types,
    )


def iou_types(config: EvaluationConfig, results: Results) -> tuple[str, ...]:
    """Return what is scored: what was asked for, or boxes, and masks where every detection has one.

    Raises:
        DataError: Masks are asked for, and some detection has none.
    """
    if config.iou_types:
        if "segm" in config.iou_types and not results.has_masks:
            raise DataError(
                f"{results.path or 'The detections given'}: masks are to be scored, and some detections have none.",
                hint="score boxes only: --iou-type bbox",
                path=results.path,
            )
        return config.iou_types
    return ("bbox", "segm") if results.has_masks else ("bbox",)


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
    per_image = None if config.fixed else config.max_detections
    if config.fixed:
        # The official evaluator has no fixed AP: it gets the chosen detections, without a limit of its own.
        results = results.take(selection.detection_S)
    return run_official(truth, results, iou_type=iou_type, limits=limits, per_image=per_image)


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
    selection: Selection,
    curves: Curves,
    iou_type: str,
    partition: dict[str, NDArray[np.bool_]],
) -> TypeReport:
    categories = len(truth.category_ids)
    ap_C, ap50_C = category_precision(curves), category_precision(curves, iou=0.5)
    annotations_C = np.bincount(truth.ann_category_A[truth.counted_A], minlength=categories)
    detections_C = np.bincount(selection.category_S, minlength=categories)
    training_C = truth.training_images_C
    scores = tuple(
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
    groups = category_groups(truth.frequencies, partition)
    return TypeReport(
        iou_type=iou_type,
        metrics=official_metrics(curves, truth.protocol, truth.frequencies),
        groups=tuple(
            GroupScore(
                name=name,
                categories=int(mask_C.sum()),
                scored=int(np.count_nonzero(~np.isnan(ap_C[mask_C]))),
                ap=average_precision(curves, categories=mask_C),
                ap50=average_precision(curves, iou=0.5, categories=mask_C),
                ap75=average_precision(curves, iou=0.75, categories=mask_C),
            )
            for name, mask_C in groups.items()
        ),
        categories=scores,
        curves=curves,
    )


def _counts(truth: GroundTruth, results: Results, selections: Mapping[str, Selection]) -> Counts:
    first = next(iter(selections.values()))
    return Counts(
        images=len(truth.image_ids),
        images_with_detections=len(np.unique(results.image_D)),
        annotations=len(truth.ann_image_A),
        detections=len(results),
        capped=first.capped,
        unjudged=first.unjudged,
        without_area={kind: selection.without_area for kind, selection in selections.items()},
    )
