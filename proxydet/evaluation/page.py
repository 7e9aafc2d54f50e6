"""The HTML page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from proxydet.evaluation.analysis import Calibration, ErrorBreakdown
from proxydet.evaluation.curves import RECALL_THRESHOLDS_R
from proxydet.evaluation.evaluate import Evaluation
from proxydet.evaluation.metrics import FREQUENCY_NAMES
from proxydet.evaluation.pictures import (
    ImageReader,
    best_examples,
    draw_example,
    extreme_categories,
    worst_examples,
)
from proxydet.evaluation.report import IOU_TYPE_NAMES, Interval, Report, TypeReport
from proxydet.evaluation.scatter import scatter_svg
from proxydet.evaluation.tables import group_rows, metric_rows
from proxydet.visualization.plots import PALETTE, bar_plot, precision_recall_plot, svg_of
from proxydet.visualization.report import Command, Picture, Section, Table, write_report
from proxydet.visualization.report import Report as Page

_SHOWN_CATEGORIES = 4
_SHOWN_EXAMPLES = 2
_SHORT_KINDS = {
    "classification": "wrong class",
    "localisation": "badly placed",
    "classification and localisation": "both",
}
"""Names of kinds of errors that fit below a bar."""


def write_page(
    evaluation: Evaluation,
    path: Path,
    *,
    errors: ErrorBreakdown | None,
    calibration: Calibration | None,
    read: ImageReader | None,
    commands: Mapping[str, str],
) -> Path:
    """Write an evaluation as one self-contained HTML file.

    Args:
        evaluation: What to show.
        path: The file.
        errors: Errors by kind; None leaves that section out, as in the next two.
        calibration: Scores against precision.
        read: Reads an image by its id, for pictures of the best and worst categories.
        commands: Command lines to go on with, and what each does.
    """
    report = evaluation.report
    sections = [_scores(report), _categories(evaluation)]
    if evaluation.scored:
        sections.append(_curves(evaluation))
    if errors is not None:
        sections.append(_errors(errors, report))
    if calibration is not None:
        sections.append(_calibration(calibration, report))
    if read is not None and evaluation.scored:
        sections += _pictures(evaluation, read)
    shown = [Command(command=command, does=does) for command, does in commands.items()]
    if shown:
        sections.append(Section(title="Go on", commands=shown))
    page = Page(
        title=f"Evaluation on {report.dataset}",
        summary=_summary(report),
        facts=_facts(report),
        sections=sections,
    )
    return write_report(page, path)


def _summary(report: Report) -> str:
    counts = report.counts
    protocol = {
        "lvis": "LVIS's federated protocol, at most 300 detections an image",
        "coco": "COCO's protocol",
        "openimages": "OpenImages' protocol",
    }[report.protocol]
    if report.fixed:
        protocol = (
            "fixed AP: no limit an image, 10,000 detections a category; not comparable with AP"
        )
    text = (
        f"{counts.detections:,} detections in {counts.images_with_detections:,} of {counts.images:,} images, against "
        f"{counts.annotations:,} annotations, by {protocol}."
    )
    if counts.unjudged:
        text += (
            f" {counts.unjudged:,} detections are of categories that nobody verified in their image; they are neither "
            "right nor wrong."
        )
    return text


def _facts(report: Report) -> list[tuple[str, str]]:
    part = report.main
    name, prefix = IOU_TYPE_NAMES[part.iou_type], report.metric_prefix
    facts = []
    for metric in ("AP", "AP50", "APr"):
        value = part.metrics.get(metric)
        if value is not None:
            facts.append(
                (
                    f"{name} {prefix}{metric}",
                    f"{100 * value:.1f}{_spread(part.intervals.get(metric))}",
                )
            )
    return facts


def _scores(report: Report) -> Section:
    resampling = report.main.resampling
    text = "In percent."
    if resampling is not None:
        text += (
            f" ± is half of a {100 * resampling.confidence:g} % confidence interval: from {resampling.number} resamples "
            "of the images, what could have come out on other images of the same kind."
        )
        if resampling.rare is not None:
            text += (
                f" Rare categories have few images each: of the {resampling.rare[0]} that are annotated here, a resample "
                f"has {resampling.rare[1]:.1f} on average. Their interval says how the images move the result, and less "
                "of how other rare categories would."
            )
    bars: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float]] = {}
    for kind, part in report.types.items():
        name = f"{IOU_TYPE_NAMES[kind]} {report.metric_prefix}AP"
        for label, value, interval in _bar_values(part):
            bars.setdefault(label, {})[name] = 100 * value
            spreads.setdefault(label, {})[name] = _half(interval)
    return Section(
        title="Scores",
        text=text,
        tables=[
            _table(metric_rows(report)),
            *([_table(group_rows(report))] if report.main.groups else []),
        ],
        plots=[svg_of(bar_plot(bars, label="AP", errors=spreads))] if bars else [],
    )


def _bar_values(part: TypeReport) -> list[tuple[str, float, Interval | None]]:
    values = []
    if part.metrics.get("AP") is not None:
        values.append(("all", part.metrics["AP"] or 0.0, part.intervals.get("AP")))
    for group in part.groups:
        if group.ap is not None:
            values.append((group.name, group.ap, part.intervals.get(f"{group.name}/AP")))
    return values


def _categories(evaluation: Evaluation) -> Section:
    report = evaluation.report
    part = report.main
    metric = "AP" if "AP" in part.metrics else "AP50"
    values = [score.ap if metric == "AP" else score.ap50 for score in part.categories]
    rows = sorted(
        (
            (score.name, score.annotations, score.training_images, 100 * value)
            for score, value in zip(part.categories, values, strict=True)
            if value is not None
        ),
        key=lambda row: -row[3],
    )
    columns = ("category", "annotations", "training images", f"{report.metric_prefix}{metric}")
    shown = rows if len(rows) <= 40 else [*rows[:20], *rows[-20:]]
    caption = (
        ""
        if len(shown) == len(rows)
        else "The best 20 and the last 20; all are in per_category.csv."
    )
    return Section(
        title="Categories",
        tables=[Table(columns=columns, rows=shown, caption=caption)],
        plots=_scatter(part),
    )


def _scatter(part: TypeReport) -> list[str]:
    series: dict[str, list[tuple[float, float, str]]] = {}
    for score in part.categories:
        if score.ap is not None and score.training_images is not None:
            name = FREQUENCY_NAMES.get(score.frequency or "", "categories")
            point = (float(score.training_images), 100 * score.ap, score.name)
            series.setdefault(name, []).append(point)
    return [scatter_svg(series, PALETTE)] if series else []


def _curves(evaluation: Evaluation) -> Section:
    scored = evaluation.scored.get("segm") or evaluation.scored["bbox"]
    precision_RC = scored.curves.precision_TRCA[0, :, :, 0]
    sets = {"all": np.ones(precision_RC.shape[1], dtype=bool), **evaluation.groups}
    curves = {}
    for name, mask_C in sets.items():
        present_C = mask_C & (precision_RC[0] > -1)
        if present_C.any():
            curves[name] = (RECALL_THRESHOLDS_R, precision_RC[:, present_C].mean(axis=1))
    return Section(
        title="Precision over recall",
        text=f"Of {IOU_TYPE_NAMES[scored.iou_type]}es at IoU 0.5, averaged over categories."
        if scored.iou_type == "bbox"
        else "Of masks at IoU 0.5, averaged over categories.",
        plots=[svg_of(precision_recall_plot(curves))] if curves else [],
    )


def _errors(errors: ErrorBreakdown, report: Report) -> Section:
    rows = [(name, errors.counts[name], 100 * errors.costs[name]) for name in errors.counts]
    bars = {
        _SHORT_KINDS.get(name, name): {"AP50": 100 * cost} for name, cost in errors.costs.items()
    }
    return Section(
        title="What costs precision",
        text=(
            f"Errors of {IOU_TYPE_NAMES[report.main.iou_type]} detections at IoU 0.5 by kind (TIDE), and by how much AP50 "
            "would rise if those of one kind were mended. Only detections that can be judged are counted."
        ),
        tables=[Table(columns=("kind", "errors", "AP50 lost"), rows=rows)],
        plots=[svg_of(bar_plot(bars, label="AP50 lost"))],
    )


def _calibration(calibration: Calibration, report: Report) -> Section:
    bars = {}
    for index, count in enumerate(calibration.count_B.tolist()):
        if count:
            label = f"{calibration.edges[index]:.1f} to {calibration.edges[index + 1]:.1f}"
            bars[label] = {
                "mean score": 100 * float(calibration.score_B[index]),
                "right": 100 * float(calibration.precision_B[index]),
            }
    error = (
        ""
        if calibration.error is None
        else f" Mean difference: {100 * calibration.error:.1f} points."
    )
    return Section(
        title="Do scores mean what they say?",
        text=(
            f"{IOU_TYPE_NAMES[report.main.iou_type].capitalize()} detections by score: the mean score of each bin, and the "
            f"share that is right at IoU 0.5, in percent.{error}"
        ),
        plots=[svg_of(bar_plot(bars, label="percent"))] if bars else [],
    )


def _pictures(evaluation: Evaluation, read: ImageReader) -> list[Section]:
    scored = evaluation.scored.get("segm") or evaluation.scored["bbox"]
    best, worst = extreme_categories(evaluation.report.per_class(), _SHOWN_CATEGORIES)

    def drawn(categories: Sequence[int], *, errors: bool) -> list[Picture]:
        choose = worst_examples if errors else best_examples
        return [
            draw_example(evaluation, example, category, read)
            for category in categories
            for example in choose(scored, category, _SHOWN_EXAMPLES)
        ]

    return [
        Section(title="The best categories", pictures=drawn(best, errors=False)),
        Section(
            title="The worst categories",
            text="Wrong detections with the highest scores, and annotated objects that nothing found.",
            pictures=drawn(worst, errors=True),
        ),
    ]


def _table(rows: Sequence[Mapping[str, object]]) -> Table:
    columns = list(rows[0])
    return Table(columns=columns, rows=[[_cell(row.get(name)) for name in columns] for row in rows])


def _cell(value: object) -> str | float | int | None:
    return value if value is None or isinstance(value, str | float | int) else str(value)


def _half(interval: Interval | None) -> float:
    return 0.0 if interval is None else 50 * (interval.high - interval.low)


def _spread(interval: Interval | None) -> str:
    return "" if interval is None else f" ± {_half(interval):.1f}"
