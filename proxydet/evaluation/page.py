"""The files of an evaluation: results.json, per_category.csv, report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from hotcoco import mask as coco_mask
from numpy.typing import NDArray
from PIL import Image

from proxydet.data.config import PROTOCOL_NAMES
from proxydet.data.images import Pixels
from proxydet.data.records import Identifier
from proxydet.evaluation.analysis import Analysis, Calibration, ErrorBreakdown, right_and_wrong
from proxydet.evaluation.evaluate import Evaluation, Scored
from proxydet.evaluation.report import (
    IOU_TYPE_NAMES,
    CategoryScore,
    Interval,
    Report,
    TypeReport,
    category_csv,
    group_rows,
    metric_rows,
)
from proxydet.evaluation.scoring import FREQUENCY_NAMES, RECALL_THRESHOLDS_R
from proxydet.files import write_bytes, write_text
from proxydet.visualization.drawing import DrawnObject, draw_objects
from proxydet.visualization.plots import PALETTE, bar_plot, precision_recall_plot, svg_of
from proxydet.visualization.report import (
    CaptionedImage,
    Command,
    Section,
    Table,
    escape,
    write_report,
)
from proxydet.visualization.report import Report as Page

_SHOWN_CATEGORIES = 4
_SHOWN_EXAMPLES = 2
_SHORT_KINDS = {
    "classification": "wrong class",
    "localisation": "badly placed",
    "classification and localisation": "both",
}
"""Names of kinds of errors that fit below a bar."""
_AROUND = 2.5
"""Sides of an image of an error, as a multiple of the objects' extent."""
_LEAST_CLOSE_UP = 200
"""The least sides of such an image, in pixels."""

ImageReader = Callable[[Identifier], Pixels]


def write_files(
    evaluation: Evaluation,
    analysis: Analysis,
    folder: Path,
    *,
    read: ImageReader | None = None,
    commands: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write an evaluation's files.

    Args:
        evaluation: What was measured.
        analysis: What is behind the numbers.
        folder: Where to; made when it is not there.
        read: Reads an image by its id, for images of errors; None leaves them out.
        commands: Command lines to continue with, and what each does.

    Returns:
        The files by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**evaluation.report.to_dict(), "analysis": analysis.to_dict()}
    text = msgspec.json.format(msgspec.json.encode(content), indent=2)
    return {
        "results.json": write_bytes(folder / "results.json", text + b"\n", durable=False),
        "per_category.csv": write_text(
            folder / "per_category.csv", category_csv(evaluation.report), durable=False
        ),
        "report.html": write_report(
            _page(evaluation, analysis, read, commands or {}), folder / "report.html"
        ),
    }


def _page(
    evaluation: Evaluation,
    analysis: Analysis,
    read: ImageReader | None,
    commands: Mapping[str, str],
) -> Page:
    """Return an evaluation as one self-contained HTML page; arguments as of `write_files`."""
    report = evaluation.report
    sections = [_scores(report), _categories(report)]
    if evaluation.main is not None:
        sections.append(_curves(evaluation, evaluation.main))
    if analysis.errors is not None:
        sections.append(_errors(analysis.errors, report))
    if analysis.calibration is not None:
        sections.append(_calibration(analysis.calibration, report))
    if read is not None and evaluation.main is not None:
        sections += _examples(evaluation, evaluation.main, read)
    shown = [Command(command=command, does=does) for command, does in commands.items()]
    if shown:
        sections.append(Section(title="Next", commands=shown))
    return Page(
        title=f"Evaluation on {report.dataset}",
        summary=_summary(report),
        facts=_facts(report),
        sections=sections,
    )


def _summary(report: Report) -> str:
    counts = report.counts
    text = (
        f"{counts.detections:,} detections in {counts.images_with_detections:,} of {counts.images:,} images, against "
        f"{counts.annotations:,} annotations. Protocol: {PROTOCOL_NAMES[report.protocol]}"
    )
    if report.fixed:
        text += (
            "; fixed AP: no limit an image, 10,000 detections a category; not comparable with AP."
        )
    elif report.protocol == "lvis":
        text += ", at most 300 detections an image."
    else:
        text += "."
    if report.masks_left_out:
        text += f" Masks are not scored: {report.masks_left_out}."
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


def _categories(report: Report) -> Section:
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


def _curves(evaluation: Evaluation, scored: Scored) -> Section:
    precision_RC = scored.curves.precision_TRCA[0, :, :, 0]
    sets = {"all": np.ones(precision_RC.shape[1], dtype=bool), **evaluation.groups}
    curves = {}
    for name, mask_C in sets.items():
        present_C = mask_C & (precision_RC[0] > -1)
        if present_C.any():
            curves[name] = (RECALL_THRESHOLDS_R, precision_RC[:, present_C].mean(axis=1))
    return Section(
        title="Precision over recall",
        text=f"Of {'boxes' if scored.iou_type == 'bbox' else 'masks'} at IoU 0.5, averaged over categories.",
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


def _table(rows: Sequence[Mapping[str, object]]) -> Table:
    columns = list(rows[0])
    return Table(columns=columns, rows=[[_cell(row.get(name)) for name in columns] for row in rows])


def _cell(value: object) -> str | float | int | None:
    return value if value is None or isinstance(value, str | float | int) else str(value)


def _half(interval: Interval | None) -> float:
    return 0.0 if interval is None else 50 * (interval.high - interval.low)


def _spread(interval: Interval | None) -> str:
    return "" if interval is None else f" ± {_half(interval):.1f}"


# -- images of errors --------------------------------------------------------------------------------------------------


def _examples(evaluation: Evaluation, scored: Scored, read: ImageReader) -> list[Section]:
    best, worst = extreme_categories(evaluation.report.per_class(), _SHOWN_CATEGORIES)
    return [
        Section(
            title=title,
            text=text,
            images=[
                draw_example(evaluation, example, category, read)
                for category in categories
                for example in choose(scored, category, _SHOWN_EXAMPLES)
            ],
        )
        for title, text, categories, choose in (
            ("The best categories", "", best, best_examples),
            (
                "The worst categories",
                "Wrong detections with the highest scores, and annotated objects that nothing found.",
                worst,
                worst_examples,
            ),
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A detection or annotation that the page shows.

    Attributes:
        kind: ``found``: a right detection; ``false``: a wrong one; ``missed``: an annotation that nothing found.
        image: Number of the image.
        detection: Number of the detection among all; -1 for what was missed.
        annotation: Number of the annotation; -1 for wrong detections.
    """

    kind: Literal["found", "false", "missed"]
    image: int
    detection: int = -1
    annotation: int = -1


def extreme_categories(
    scores: tuple[CategoryScore, ...], number: int, least_annotations: int = 3
) -> tuple[list[int], list[int]]:
    """Return the positions of the best and of the worst categories, no category being in both.

    Args:
        scores: All categories.
        number: How many of each.
        least_annotations: Categories with fewer are passed over, unless too few are left: their AP says little.
    """
    measured = [index for index, score in enumerate(scores) if score.ap is not None]
    weighty = [index for index in measured if scores[index].annotations >= least_annotations]
    chosen = weighty if len(weighty) >= 2 * number else measured
    ordered = sorted(chosen, key=lambda index: (scores[index].ap or 0.0, scores[index].name))
    worst = ordered[: min(number, len(ordered) // 2)]
    best = ordered[len(worst) :][::-1][:number]
    return best, worst


def best_examples(scored: Scored, category: int, number: int) -> list[Example]:
    """Return a category's right detections with the highest scores, from different images."""
    right_S, _ = right_and_wrong(scored.matches)
    matches = scored.matches
    annotation_S = np.full(len(matches.selection), -1, dtype=np.int64)
    annotation_S[matches.near_N] = matches.annotation_N
    return [
        Example(
            kind="found",
            image=int(matches.selection.image_S[index]),
            detection=int(matches.selection.detection_S[index]),
            annotation=int(annotation_S[index]),
        )
        for index in _top_of_images(scored, right_S, category, number)
    ]


def worst_examples(scored: Scored, category: int, number: int) -> list[Example]:
    """Return a category's errors: its wrong detections with the highest scores, and annotations that were missed."""
    _, wrong_S = right_and_wrong(scored.matches)
    matches = scored.matches
    false = [
        Example(
            kind="false",
            image=int(matches.selection.image_S[index]),
            detection=int(matches.selection.detection_S[index]),
        )
        for index in _top_of_images(scored, wrong_S, category, number)
    ]
    found = matches.annotation_N[matches.state_NAT[:, 0, 0] > 0]
    missed_G = (
        (matches.ann_category_G == category)
        & matches.counts_GA[:, 0]
        & ~np.isin(matches.ann_index_G, found)
    )
    missed = [
        Example(
            kind="missed",
            image=int(matches.ann_image_G[index]),
            annotation=int(matches.ann_index_G[index]),
        )
        for index in np.flatnonzero(missed_G)
    ]
    # Half of each kind where there is enough of both.
    half = max(number - len(missed), (number + 1) // 2)
    return [*false[:half], *missed][:number]


def draw_example(
    evaluation: Evaluation, example: Example, category: int, read: ImageReader
) -> CaptionedImage:
    """Draw an example: the detection with its score, and the category's annotations.

    Args:
        evaluation: Annotations and detections.
        example: What to show.
        category: Number of the category.
        read: Reads an image by its id.

    Raises:
        DataError: The image cannot be read.
    """
    truth, results = evaluation.truth, evaluation.results
    name = truth.category_names[category]
    image_id = truth.image_ids[example.image]
    objects = []
    if example.detection >= 0:
        mask = results.mask_D[example.detection]
        objects.append(
            DrawnObject(
                label=name,
                box_xyxy=_corners(results.box_D4[example.detection]),
                score=float(results.score_D[example.detection]),
                mask_HW=_mask(results.masks[mask]) if mask >= 0 else None,
            )
        )
    annotated = (truth.ann_image_A == example.image) & (truth.ann_category_A == category)
    objects += [
        DrawnObject(label=f"{name} (annotated)", box_xyxy=_corners(truth.ann_box_A4[index]))
        for index in np.flatnonzero(annotated)
        if example.annotation < 0 or index == example.annotation
    ]
    picture = draw_objects(*_close_up(Image.fromarray(read(image_id)), objects))
    return CaptionedImage(
        image=picture, caption=f"{name}: {_KINDS[example.kind]}, image {image_id}"
    )


def _close_up(
    image: Image.Image, objects: list[DrawnObject]
) -> tuple[Image.Image, list[DrawnObject]]:
    """Cut out what is to be seen with as much around it, and move the objects along; large objects keep the image."""
    boxes_N4 = np.array([item.box_xyxy for item in objects])
    low_2, high_2 = boxes_N4[:, :2].min(axis=0), boxes_N4[:, 2:].max(axis=0)
    reach = max(float((high_2 - low_2).max()) * _AROUND, _LEAST_CLOSE_UP) / 2
    size_2 = np.array(image.size)
    middle_2 = (low_2 + high_2) / 2
    start_2 = np.floor(np.clip(middle_2 - reach, 0, size_2 - 1)).astype(int)
    end_2 = np.ceil(np.clip(middle_2 + reach, start_2 + 1, size_2)).astype(int)
    (left, top), (right, bottom) = start_2.tolist(), end_2.tolist()
    moved = [
        replace(
            item,
            box_xyxy=_moved(item.box_xyxy, left, top),
            mask_HW=None
            if item.mask_HW is None
            else np.asarray(item.mask_HW)[top:bottom, left:right],
        )
        for item in objects
    ]
    return image.crop((left, top, right, bottom)), moved


def _moved(
    box: tuple[float, float, float, float], left: int, top: int
) -> tuple[float, float, float, float]:
    return (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


_KINDS = {"found": "found", "false": "false detection", "missed": "missed"}


def _top_of_images(
    scored: Scored, chosen_S: NDArray[np.bool_], category: int, number: int
) -> list[int]:
    """Return the chosen detections of a category with the highest scores, at most one an image."""
    selection = scored.matches.selection
    listed = np.flatnonzero(chosen_S & (selection.category_S == category))
    listed = listed[np.argsort(-selection.score_S[listed], kind="stable")]
    _, first = np.unique(selection.image_S[listed], return_index=True)
    return [int(index) for index in listed[np.sort(first)][:number]]


def _corners(box_4: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x, y, width, height = (float(side) for side in box_4)
    return (x, y, x + width, y + height)


def _mask(rle: dict[str, object]) -> NDArray[np.bool_]:
    decoded: NDArray[np.bool_] = np.asarray(coco_mask.decode(rle)).astype(bool)
    return decoded


# -- the scatter plot ---------------------------------------------------------------------------------------------------


_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 30, 40

Point = tuple[float, float, str]
"""Number of training images (at least 0), AP in percent, name."""


def scatter_svg(series: Mapping[str, Sequence[Point]], colours: Sequence[str]) -> str:
    """Return an ``<svg>`` element: AP upwards, training images to the right on a logarithmic scale.

    Args:
        series: Points by name of the series.
        colours: One for each series, as CSS has them.
    """
    most = max((x for points in series.values() for x, _, _ in points), default=1.0)
    decades = max(1, math.ceil(math.log10(max(most, 1.0) + 1)))
    parts = [_axes(decades)]
    for (name, points), colour in zip(series.items(), colours, strict=False):
        dots = "".join(
            f'<circle cx="{_x(x, decades):.1f}" cy="{_y(y):.1f}" r="3">'
            f"<title>{escape(label)}: AP {y:.1f}, {x:.0f} training images</title></circle>"
            for x, y, label in points
        )
        parts.append(
            f'<g fill="{colour}" fill-opacity="0.6"><title>{escape(name)}</title>{dots}</g>'
        )
    parts.append(_legend(list(series), colours))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _x(images: float, decades: int) -> float:
    """Horizontal place; 0 images stand at the left edge, 1 a little to the right of it."""
    share = math.log10(images + 1) / decades
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(percent: float) -> float:
    return _TOP + (1 - percent / 100) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(decades: int) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    lines = []
    for percent in range(0, 101, 20):
        y = _y(percent)
        lines.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" opacity="0.15"/>')
        lines.append(_text(_LEFT - 6, y + 4, str(percent), "end"))
    for images in [0, *(10**power for power in range(decades + 1))]:
        x = _x(images, decades)
        if x <= right + 1:
            lines.append(
                f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="currentColor" opacity="0.15"/>'
            )
            lines.append(_text(x, bottom + 15, f"{images:,}", "middle"))
    lines.append(_text((_LEFT + right) / 2, _HEIGHT - 6, "training images", "middle"))
    lines.append(_text(_LEFT - 6, 14, "AP", "end"))
    return "".join(lines)


def _legend(names: Sequence[str], colours: Sequence[str]) -> str:
    entries = []
    x = float(_LEFT + 14)
    for name, colour in zip(names, colours, strict=False):
        entries.append(f'<circle cx="{x}" cy="10" r="4" fill="{colour}"/>')
        entries.append(_text(x + 10, 14, name, "start"))
        x += 34 + 6.5 * len(name)
    return "".join(entries)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'
