"""From results and annotations to a report, from two results to their difference, and the records of what a report was made from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.config import to_mapping
from proxydet.data.formats.coco import no_garbage_collection
from proxydet.errors import ConfigError, DataError, InputError, RuntimeEnvironmentError
from proxydet.evaluation.bootstrap import (
    Difference,
    Resamples,
    WeightedPrecision,
    differences,
    resample,
)
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.matching import Matches, match
from proxydet.evaluation.openimages import ancestors_in, resample_openimages, score_openimages
from proxydet.evaluation.report import (
    AP_KEYS,
    CategoryScore,
    Counts,
    GroupScore,
    Report,
    Resampling,
    TypeReport,
)
from proxydet.evaluation.results import Results, read_results
from proxydet.evaluation.scoring import (
    COCO_LIMITS,
    Curves,
    Limits,
    Selection,
    frequency_groups,
    mean_of_known,
    official_metrics,
    run_hotcoco,
    run_official,
    select,
)
from proxydet.files import sha256
from proxydet.manifest import MANIFEST_NAME, build_manifest, read_manifest, write_run_records
from proxydet.reporting import SILENT, Progress
from proxydet.runtime.modes import Mode
from proxydet.runtime.report import environment
from proxydet.wording import first_of

_LOG = logging.getLogger(__name__)

Groups = Mapping[str, NDArray[np.bool_] | Sequence[bool]]
ResultsSource = Path | str | list[dict[str, Any]] | dict[str, Any] | Results
TruthSource = Path | str | dict[str, Any] | GroundTruth

_ROUNDING = 1e-9


@dataclass(kw_only=True)
class Scored:
    """All that scoring boxes, or masks, gave.

    Attributes:
        iou_type: ``"bbox"`` or ``"segm"``.
        truth: The annotations as they were scored against.
        results: All detections.
        selection: The detections that were scored.
        curves: Precision and recall, from the engine.
        resamples: Metrics of resampled images; None when none were asked for.
    """

    iou_type: str
    truth: GroundTruth
    results: Results
    selection: Selection
    curves: Curves
    resamples: Resamples | None = None

    @cached_property
    def matches(self) -> Matches:
        """Which detection finds which annotation; worked out when it is first asked for."""
        return match(self.truth, self.results, self.selection, self.iou_type)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A report with what it was made from.

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

    @property
    def main(self) -> Scored | None:
        """What was scored of masks, or of boxes where masks were not; None for OpenImages."""
        return self.scored.get("segm") or self.scored.get("bbox")


@no_garbage_collection()
def run_evaluation(
    results: ResultsSource,
    ground_truth: TruthSource,
    *,
    config: EvaluationConfig | None = None,
    groups: Groups | None = None,
    progress: Progress = SILENT,
    predicted: bool | None = None,
) -> Evaluation:
    """Score detections that are already made.

    Args:
        results: A results file in LVIS's or COCO's format, plain or gzipped, or its content.
        ground_truth: An annotation file in LVIS's or COCO's format, or its content.
        config: How to score; the defaults of :class:`~proxydet.evaluation.config.EvaluationConfig` are the published
            protocol.
        groups: Sets of categories to average over besides the frequency groups, as ``{"novel": mask}``; a mask is
            bool (C,) over the categories in ascending order of ids.
        progress: Where progress is shown.
        predicted: As for `scored_types`.

    Returns:
        The report, whose metrics carry the official evaluators' names, and what it was made from.

    Raises:
        DataError: The annotations or the detections cannot be used; the message has the first offenders.
        ConfigError: A group is not a mask over the categories.
        RuntimeEnvironmentError: The fast engine failed.
    """
    config = config or EvaluationConfig()
    if not isinstance(ground_truth, GroundTruth):
        truth = GroundTruth.load(ground_truth, protocol=config.protocol)
    elif config.protocol in (None, ground_truth.protocol):
        truth = ground_truth
    else:
        truth = GroundTruth.from_store(
            ground_truth.store,
            name=ground_truth.name,
            path=ground_truth.path,
            protocol=config.protocol,
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
    categories = len(truth.category_ids)
    all_groups = frequency_groups(truth.frequencies)
    for name, mask in (groups or {}).items():
        all_groups[name] = np.asarray(mask)
        if all_groups[name].dtype != bool or all_groups[name].shape != (categories,):
            raise ConfigError(
                f"The group {name!r} is of type {all_groups[name].dtype} and shape {all_groups[name].shape}; it must be "
                f"one bool for each of the {categories} categories of {truth.name}."
            )
    kinds, masks_left_out = scored_types(config, truth, predicted=predicted, results=results)
    scored: dict[str, Scored] = {}
    for kind in kinds:
        scored[kind] = _score(truth, results, kind, config, all_groups, progress)
    report = Report(
        dataset=truth.name,
        protocol=truth.protocol,
        engine=config.engine,
        fixed=config.fixed,
        masks_left_out=masks_left_out,
        counts=_counts(truth, results, scored),
        types={kind: _type_report(part, all_groups, config) for kind, part in scored.items()},
    )
    return Evaluation(report=report, truth=truth, results=results, scored=scored, groups=all_groups)


def scored_types(
    config: EvaluationConfig,
    truth: GroundTruth,
    *,
    predicted: bool | None = None,
    results: Results | None = None,
) -> tuple[tuple[str, ...], str | None]:
    """Return what is scored, and why masks are not where nobody said so.

    What was asked for; by default boxes, and masks where the annotations, the detector and every detection have them.
    OpenImages' protocol scores boxes only.

    Args:
        config: How to score.
        truth: The annotations.
        predicted: Whether the detector predicts masks; None where it is not known.
        results: The detections; None before there are any.

    Raises:
        DataError: Masks are asked for, and one of the three has none.
    """
    if truth.protocol == "openimages":
        return ("bbox",), None
    reason, source = None, truth.path
    if not truth.has_masks:
        reason = "the annotations have none"
    elif predicted is False:
        reason = "the detector predicts none"
    elif results is not None and not results.has_masks:
        reason = f"{results.without_mask} of {len(results)} detections have none"
        source = results.path
    if not config.iou_types:
        return ("bbox", "segm") if reason is None else ("bbox",), reason
    if "segm" in config.iou_types and reason is not None:
        raise DataError(
            f"{source or truth.name}: masks are to be scored, and {reason}.",
            hint="score boxes only: --iou-type bbox",
            path=source,
        )
    # Boxes first: masks are what is analysed.
    return tuple(sorted(config.iou_types)), None


def check_protocol(config: EvaluationConfig, truth: GroundTruth) -> None:
    """Raise ConfigError where a setting belongs to another protocol than that of the annotations."""
    if config.hierarchy is not None and truth.protocol != "openimages":
        raise ConfigError(
            f"{truth.name} is scored by {truth.protocol.upper()}'s protocol, which does not use a class hierarchy.",
            hint="leave --hierarchy out, or give OpenImages' annotations with --data",
        )
    if truth.protocol == "openimages" and "segm" in config.iou_types:
        raise ConfigError(
            f"{truth.name} is scored by OpenImages' protocol, which scores boxes only.",
            hint="leave --iou-type out, or choose another protocol with --protocol",
        )
    if truth.protocol == "openimages" and (config.fixed or config.engine != "hotcoco"):
        what = "--fixed" if config.fixed else f"--engine {config.engine}"
        raise ConfigError(
            f"{truth.name} is scored by OpenImages' protocol, which has no fixed AP and one engine: {what} cannot be used.",
            hint=f"leave {what} out, or choose another protocol with --protocol",
        )


def _score(
    truth: GroundTruth,
    results: Results,
    iou_type: str,
    config: EvaluationConfig,
    groups: Mapping[str, NDArray[np.bool_]],
    progress: Progress,
) -> Scored:
    """Score boxes or masks: select, run the engine, match, resample.

    Raises:
        RuntimeEnvironmentError: The engine failed, or is found to be wrong.
    """
    if iou_type == "segm":
        truth = truth.for_masks()
    limits: Limits = COCO_LIMITS
    per_image = per_category = None
    if config.fixed:
        limits, per_category = (None,), config.fixed_detections
    elif truth.protocol == "lvis":
        limits, per_image = (config.max_detections,), config.max_detections
    selection = select(
        results, truth, iou_type=iou_type, per_image=per_image, per_category=per_category
    )
    if config.engine == "hotcoco":
        curves = run_hotcoco(truth, results, selection, iou_type=iou_type, limits=limits)
    else:
        # The official evaluator has no fixed AP: it gets the chosen detections, without a limit of its own.
        given = results.take(selection.detection_S) if config.fixed else results
        curves = run_official(truth, given, iou_type=iou_type, limits=limits, per_image=per_image)
    scored = Scored(
        iou_type=iou_type, truth=truth, results=results, selection=selection, curves=curves
    )
    if not config.bootstrap:
        return scored
    scored.resamples = resample(
        WeightedPrecision(scored.matches, len(truth.category_ids)),
        truth,
        groups,
        number=config.bootstrap,
        seed=config.seed,
        progress=progress,
    )
    # Intervals come from our own matches: without resampling these must give the engine's average precision.
    ours_A3C, engine_A3C = scored.resamples.whole_A3C, curves.summary_A3C
    assert ours_A3C is not None
    apart_A3C = np.abs(ours_A3C - engine_A3C) > _ROUNDING
    apart_A3C |= np.isnan(ours_A3C) != np.isnan(engine_A3C)
    if apart_A3C.any():
        apart_C = np.flatnonzero(apart_A3C.any(axis=(0, 1)))
        raise RuntimeEnvironmentError(
            f"The engine {config.engine!r} gives another average precision than the matches that intervals are made from, in "
            f"{len(apart_C)} categories ({first_of([truth.category_names[index] for index in apart_C])}).",
            hint="evaluate with the official one: --engine lvis"
            if config.engine == "hotcoco"
            else "report this with the files; --bootstrap 0 gives the metrics without intervals",
        )
    return scored


def _openimages(truth: GroundTruth, results: Results, config: EvaluationConfig) -> Evaluation:
    """Score by OpenImages' own protocol, which has one metric: AP50, plain and expanded."""
    plain = score_openimages(truth, results, max_detections=config.max_detections)
    scores = {"AP50": plain}
    if config.hierarchy is not None:
        ancestors = ancestors_in(config.hierarchy, truth)
        scores["AP50 expanded"] = score_openimages(
            truth, results, ancestors=ancestors, max_detections=config.max_detections
        )
    resamples = None
    if config.bootstrap:
        resamples = resample_openimages(scores, truth, number=config.bootstrap, seed=config.seed)
    part = TypeReport(
        iou_type="bbox",
        metrics={name: score.ap50 for name, score in scores.items()},
        groups=(),
        categories=_category_scores(
            truth, results.category_D, np.full(len(truth.category_ids), np.nan), plain.ap50_C
        ),
        **_intervals(resamples, config),
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


def _type_report(
    scored: Scored, groups: Mapping[str, NDArray[np.bool_]], config: EvaluationConfig
) -> TypeReport:
    curves, truth = scored.curves, scored.truth
    ap_C, ap50_C, _ = precision_3C = curves.summary_A3C[0]
    return TypeReport(
        iou_type=scored.iou_type,
        metrics=official_metrics(curves, truth.protocol, truth.frequencies),
        groups=tuple(
            GroupScore(
                name=name,
                categories=int(mask_C.sum()),
                scored=int(np.count_nonzero(~np.isnan(ap_C[mask_C]))),
                **{
                    k: mean_of_known(row[mask_C])
                    for k, row in zip(AP_KEYS, precision_3C, strict=True)
                },
            )
            for name, mask_C in groups.items()
            if mask_C.any()
        ),
        categories=_category_scores(truth, scored.selection.category_S, ap_C, ap50_C),
        curves=curves,
        **_intervals(scored.resamples, config),
    )


def _intervals(resamples: Resamples | None, config: EvaluationConfig) -> dict[str, Any]:
    if resamples is None:
        return {}
    resampling = Resampling(
        number=config.bootstrap,
        confidence=config.confidence,
        seed=config.seed,
        rare=resamples.rare,
    )
    return {"intervals": resamples.intervals(config.confidence), "resampling": resampling}


def _category_scores(
    truth: GroundTruth,
    category_S: NDArray[np.int64],
    ap_C: NDArray[np.float64],
    ap50_C: NDArray[np.float64],
) -> tuple[CategoryScore, ...]:
    categories = len(truth.category_ids)
    training_C, counted_A = truth.training_images_C, truth.counted_A
    columns: dict[str, Sequence[Any]] = {
        "id": truth.category_ids,
        "name": truth.category_names,
        "frequency": truth.frequencies or (None,) * categories,
        "training_images": (None,) * categories if training_C is None else training_C.tolist(),
        "annotations": np.bincount(truth.ann_category_A[counted_A], minlength=categories).tolist(),
        "detections": np.bincount(category_S, minlength=categories).tolist(),
        "ap": [None if np.isnan(ap) else ap for ap in ap_C.tolist()],
        "ap50": [None if np.isnan(ap) else ap for ap in ap50_C.tolist()],
    }
    rows = zip(*columns.values(), strict=True)
    return tuple(CategoryScore(**dict(zip(columns, row, strict=True))) for row in rows)


def _counts(truth: GroundTruth, results: Results, scored: Mapping[str, Scored]) -> Counts:
    first = next((part.selection for part in scored.values()), None)
    return Counts(
        images=len(truth.image_ids),
        images_with_detections=int(np.count_nonzero(np.bincount(results.image_D))),
        annotations=len(truth.ann_image_A),
        annotations_without_mask=int(np.count_nonzero(~truth.masked_A)),
        detections=len(results),
        capped=first.capped if first else 0,
        unjudged=first.unjudged if first else 0,
        without_mask=results.without_mask,
        damaged_masks=results.damaged_masks,
        without_area={kind: part.selection.without_area for kind, part in scored.items()},
        deviations=tuple(results.report.lines("detection")),
    )


# -- two results ------------------------------------------------------------------------------------------------------


def compare_results(
    first: Path,
    second: Path,
    truth: GroundTruth,
    *,
    config: EvaluationConfig,
    groups: Mapping[str, NDArray[np.bool_]],
    progress: Progress = SILENT,
) -> dict[str, tuple[Difference, ...]]:
    """Compare two results files by pairs of resamples of the same images.

    Args:
        first: One detector's results.
        second: The other's.
        truth: The data set that both are of.
        config: How to score.
        groups: Sets of categories to average over.
        progress: Where progress is shown.

    Returns:
        By iou type (masks where both have them), one difference a metric: second minus first.

    Raises:
        DataError: A results file cannot be used.
        ConfigError: No resamples are to be drawn, or the protocol has none (OpenImages).
    """
    if not config.bootstrap:
        raise ConfigError("A comparison needs resamples.", hint="give --bootstrap at least 2")
    evaluations = [
        run_evaluation(results, truth, config=config, groups=groups, progress=progress)
        for results in (first, second)
    ]
    with_masks = ["segm" in evaluation.scored for evaluation in evaluations]
    if with_masks[0] != with_masks[1]:
        lacking = second if with_masks[0] else first
        _LOG.warning("masks are not compared: not every detection of %s has one", lacking)
    compared = {}
    for kind in evaluations[0].scored:
        pair = [evaluation.scored.get(kind) for evaluation in evaluations]
        resamples = [part.resamples for part in pair if part is not None and part.resamples]
        if len(resamples) == 2:
            compared[kind] = differences(resamples[0], resamples[1], config.confidence)
    if not compared:
        raise ConfigError(
            f"Results on {truth.name} cannot be compared: its protocol has no resamples, or the two files share neither "
            "boxes nor masks."
        )
    return compared


# -- records ----------------------------------------------------------------------------------------------------------

RESULTS = "results"
"""What the results file that was scored is called in the configuration and among the digests."""


def record_results(
    folder: Path, results: Path, truth: GroundTruth, config: EvaluationConfig
) -> None:
    """Write the records of scoring a results file; arguments as of `write_records`, and the annotations, read from a file."""
    digests = {RESULTS: sha256(results), "annotations": truth.store.digest()}
    chosen = {"dataset": truth.name, RESULTS: str(results.resolve())}
    write_records(folder, config, digests, chosen)


def recorded_results(folder: Path) -> Path | None:
    """Return the results file that an evaluation in this folder scored; None where it made its own or nothing says.

    Raises:
        InputError: The file is not there any more, or holds something else by now.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    place = manifest.configuration.get(RESULTS)
    if place is None:
        return None
    path = Path(place)
    if not path.is_file():
        changed = "is not there any more"
    elif sha256(path) != manifest.digests[RESULTS]:
        changed = "has changed since"
    else:
        return path
    raise InputError(
        f"{folder} is an evaluation of {path}, which {changed}.",
        hint="give the results file itself, or evaluate again",
        path=path,
    )


def write_records(
    folder: Path,
    config: EvaluationConfig,
    digests: Mapping[str, str],
    configuration: Mapping[str, Any],
    *,
    processes: int = 1,
) -> None:
    """Write ``manifest.json`` and ``environment.json``, the records that a training has: ``proxydet env --diff`` compares them.

    Args:
        folder: The evaluation's folder; made when it is not there.
        config: How it is scored.
        digests: By name, digests of what goes in.
        configuration: What else was chosen, as plain values.
        processes: How many work on it.
    """
    mode: Mode = "off"
    # Scoring a file needs no torch: then it is not imported to be asked about GPUs either.
    if with_torch := "torch" in sys.modules:
        from proxydet.runtime.modes import current_mode

        mode = current_mode()
    manifest = build_manifest(
        "evaluation",
        configuration={"scoring": to_mapping(config), **configuration},
        digests=digests,
        mode=mode,
        seeds={"resamples": config.seed},
        world_size=processes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_run_records(folder, manifest, environment(quick=not with_torch))
