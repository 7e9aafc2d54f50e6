"""The files of an evaluation: results.json, per_category.csv, report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from proxydet.data.config import PROTOCOL_NAMES
from proxydet.data.images import Pixels
from proxydet.data.records import Identifier
from proxydet.errors import DataError
from proxydet.evaluation.analysis import (
    Analysis,
    Calibration,
    ErrorBreakdown,
    error_kinds,
    operating_rows,
)
from proxydet.evaluation.evaluate import Evaluation, Scored
from proxydet.evaluation.report import (
    IOU_TYPE_NAMES,
    Interval,
    Report,
    category_csv,
    group_rows,
    metric_rows,
)
from proxydet.evaluation.scoring import FREQUENCY_NAMES, RECALL_THRESHOLDS_R
from proxydet.files import write_bytes, write_text
from proxydet.visualization.drawing import COLOURS, DrawingStyle, DrawnObject, draw_objects
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

_SHOWN_ERRORS = 6
"""Errors of each kind that the page shows."""
_PANEL = 320
"""Longest side of a crop, in pixels."""
_LEAST_SCORE = 0.3
_MOST_OBJECTS = 30
"""Objects that are drawn on a crop."""
_TRUTH, _WRONG = COLOURS[1], COLOURS[0]
_SHORT_KINDS = {
    "classification": "wrong class",
    "localisation": "badly placed",
    "classification and localisation": "both",
}
"""Names of kinds of errors that fit below a bar."""
_AROUND = 2.5
"""Sides of a crop, as a multiple of the object's extent."""
_LEAST_CLOSE_UP = 120
"""The least sides of a crop, in pixels of the image."""

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
    if analysis.operating_points:
        points = [asdict(point) for point in analysis.operating_points]
        sections.append(
            Section(
                title="Above a threshold",
                text="With one label a box, as predict reports them: detections at IoU 0.5 that find an object and that do not; an empty image has no object of the classes.",
                tables=[_table(operating_rows(points))],
            )
        )
    if analysis.calibration is not None:
        sections.append(_calibration(analysis.calibration, report))
    if evaluation.main is not None:
        sections += _gallery(evaluation, evaluation.main, read)
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
        value, interval = part.metrics.get(metric), part.intervals.get(metric)
        if value is not None:
            spread = "" if interval is None else f" ± {_half(interval):.1f}"
            facts.append((f"{name} {prefix}{metric}", f"{100 * value:.1f}{spread}"))
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
        values = {"all": ("AP", part.metrics.get("AP"))}
        values |= {group.name: (f"{group.name}/AP", group.ap) for group in part.groups}
        for label, (metric, value) in values.items():
            if value is not None:
                bars.setdefault(label, {})[name] = 100 * value
                spreads.setdefault(label, {})[name] = _half(part.intervals.get(metric))
    return Section(
        title="Scores",
        text=text,
        tables=[
            _table(metric_rows(report, digits=12)),
            *([_table(group_rows(report, digits=12))] if report.main.groups else []),
        ],
        plots=[svg_of(bar_plot(bars, label="AP", errors=spreads))] if bars else [],
    )


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
    series: dict[str, list[tuple[float, float, str]]] = {}
    for score in part.categories:
        if score.ap is not None and score.training_images is not None:
            name = FREQUENCY_NAMES.get(score.frequency or "", "categories")
            point = (float(score.training_images), 100 * score.ap, score.name)
            series.setdefault(name, []).append(point)
    return Section(
        title="Categories",
        tables=[Table(columns=columns, rows=shown, caption=caption)],
        plots=[scatter_svg(series, PALETTE)] if series else [],
    )


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


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(rows[0])
    return Table(columns=columns, rows=[[row.get(name) for name in columns] for row in rows])


def _half(interval: Interval | None) -> float:
    return 0.0 if interval is None else 50 * (interval.high - interval.low)


# -- the error gallery -------------------------------------------------------------------------------------------------

Examples = dict[str, list["Example"]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An error that the page shows.

    Attributes:
        image: Number of the image.
        detection: Number of the wrong detection among all; -1 for what was missed.
        annotation: Number of the annotation that was missed or taken for another class; -1 for other wrong detections.
    """

    image: int
    detection: int = -1
    annotation: int = -1


def worst_errors(scored: Scored, number: int) -> Examples:
    """Return the errors that are worth to be seen first, at most one an image and kind.

    Args:
        scored: The result of scoring boxes or masks.
        number: Most of each kind.

    Returns:
        By kind: ``false``, wrong detections with the highest scores; ``missed``, the largest objects that no detection comes near;
        ``confused``, detections of objects of another class, with the highest scores.
    """
    matches, errors = scored.matches, error_kinds(scored)
    selection = matches.selection
    confused_S = errors.kinds_S["classification"]
    false_S = np.any(
        [of for kind, of in errors.kinds_S.items() if kind != "classification"], axis=0
    )

    def wrong(chosen_S: NDArray[np.bool_]) -> list[Example]:
        return [
            Example(
                image=int(selection.image_S[index]),
                detection=int(selection.detection_S[index]),
                annotation=int(matches.ann_index_G[errors.aim_S[index]])
                if confused_S[index]
                else -1,
            )
            for index in _one_an_image(chosen_S, selection.score_S, selection.image_S, number)
        ]

    areas_A = scored.truth.ann_box_A4[:, 2] * scored.truth.ann_box_A4[:, 3]
    areas_G, image_G = areas_A[matches.ann_index_G], matches.ann_image_G
    missed = [
        Example(image=int(image_G[index]), annotation=int(matches.ann_index_G[index]))
        for index in _one_an_image(errors.missed_G, areas_G, image_G, number)
    ]
    return {"false": wrong(false_S), "missed": missed, "confused": wrong(confused_S)}


def _one_an_image(
    chosen_X: NDArray[np.bool_],
    order_X: NDArray[np.float64],
    image_X: NDArray[np.int64],
    number: int,
) -> list[int]:
    """Return the chosen ones that are highest in order, at most one an image."""
    listed = np.flatnonzero(chosen_X)
    listed = listed[np.argsort(-order_X[listed], kind="stable")]
    _, first = np.unique(image_X[listed], return_index=True)
    return [int(index) for index in listed[np.sort(first)][:number]]


def _gallery(evaluation: Evaluation, scored: Scored, read: ImageReader | None) -> list[Section]:
    """Crops of errors: ground truth next to prediction; without images a line that says so."""
    title = "Errors: ground truth next to prediction"
    if read is None:
        text = "No images: only results and annotations were given. An evaluation with --data and --run shows crops of errors."
        return [Section(title=title, text=text)]
    sections, unread = [], ""
    for kind, examples in worst_errors(scored, _SHOWN_ERRORS).items():
        images = []
        for example in examples:
            try:
                images.append(draw_error(evaluation, example, read))
            except (DataError, KeyError) as error:
                unread = f" Some images cannot be read: {error}"
        heading, text = _KINDS[kind]
        if examples:
            sections.append(Section(title=heading, text=text + unread, images=images))
    return sections or [Section(title=title, text="There are none.")]


_KINDS = {
    "false": (
        "Errors: false detections",
        "The wrong detections with the highest scores: on the left what is annotated there, on the right the detection.",
    ),
    "missed": (
        "Errors: missed",
        "The largest objects that no detection comes near: on the left the object, on the right what was detected there "
        f"with a score of at least {_LEAST_SCORE}.",
    ),
    "confused": (
        "Errors: taken for another class",
        "The detections of objects of another class with the highest scores: on the left the object, on the right the detection.",
    ),
}


def draw_error(evaluation: Evaluation, example: Example, read: ImageReader) -> CaptionedImage:
    """Draw an error as two equal crops of its image, what is annotated next to what was detected.

    Args:
        evaluation: Annotations and detections.
        example: What to show.
        read: Reads an image by its id.

    Returns:
        At most 2 x `_PANEL` + 8 pixels wide and `_PANEL` high.

    Raises:
        DataError: The image cannot be read.
    """
    truth, results = evaluation.truth, evaluation.results
    names, image_id = truth.category_names, truth.image_ids[example.image]
    if example.detection < 0:
        confident_D = (results.image_D == example.image) & (results.score_D >= _LEAST_SCORE)
        detected = np.flatnonzero(confident_D)[:_MOST_OBJECTS].tolist()
        name = names[truth.ann_category_A[example.annotation]]
        focus_4 = _corners(truth.ann_box_A4[example.annotation])
    else:
        detected = [example.detection]
        name = f"{names[results.category_D[example.detection]]} {results.score_D[example.detection]:.2f}"
        focus_4 = _corners(results.box_D4[example.detection])
    if example.annotation >= 0:
        annotated = [example.annotation]
    else:
        annotated = np.flatnonzero(truth.ann_image_A == example.image).tolist()
    image = Image.fromarray(read(image_id))
    reach = max(float((focus_4[2:] - focus_4[:2]).max()) * _AROUND, _LEAST_CLOSE_UP) / 2
    middle_2, size_2 = (focus_4[:2] + focus_4[2:]) / 2, np.array(image.size)
    start_2 = np.floor(np.clip(middle_2 - reach, 0, size_2 - 1)).astype(int)
    end_2 = np.ceil(np.clip(middle_2 + reach, start_2 + 1, size_2)).astype(int)
    crop = image.crop((*start_2.tolist(), *end_2.tolist()))
    scale = _PANEL / max(crop.size)
    crop = crop.resize((max(round(crop.width * scale), 1), max(round(crop.height * scale), 1)))

    def shown(box_4: NDArray[np.float64], **more: Any) -> list[DrawnObject]:
        """The object, moved and scaled; nothing where it is outside the crop."""
        box = (_corners(box_4) - np.tile(start_2, 2)) * scale
        low, high = np.maximum(box[:2], 0), np.minimum(box[2:], crop.size)
        if (low >= high).any():
            return []
        return [DrawnObject(box_xyxy=(*low.tolist(), *high.tolist()), **more)]

    truths = [
        item
        for index in annotated
        for item in shown(
            truth.ann_box_A4[index],
            label=names[truth.ann_category_A[index]],
            colour=_TRUTH,
        )
    ][:_MOST_OBJECTS]
    found = [
        item
        for index in detected
        for item in shown(
            results.box_D4[index],
            label=names[results.category_D[index]],
            score=float(results.score_D[index]),
            colour=_WRONG if index == example.detection else None,
        )
    ]
    style = DrawingStyle(shortest_edge=0, font_size=13)
    both = Image.new("RGB", (2 * crop.width + 8, crop.height), "white")
    both.paste(draw_objects(crop, truths, style), (0, 0))
    both.paste(draw_objects(crop, found, style), (crop.width + 8, 0))
    if example.detection >= 0 and example.annotation >= 0:
        name = f"{names[truth.ann_category_A[example.annotation]]} taken for {name}"
    return CaptionedImage(image=both, caption=f"{name}, image {image_id}")


def _corners(box_4: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([box_4[:2], box_4[:2] + box_4[2:]])


# -- the scatter plot ---------------------------------------------------------------------------------------------------

Point = tuple[float, float, str]
"""Number of training images (at least 0), AP in percent, name."""


def scatter_svg(series: Mapping[str, Sequence[Point]], colours: Sequence[str]) -> str:
    """Return an ``<svg>`` element: AP upwards, training images to the right on a logarithmic scale; each point has its name.

    Args:
        series: Points by name of the series.
        colours: One for each series, as CSS has them.
    """
    width, height, left, right, top, bottom = 560, 300, 44, 548, 30, 260
    most = max((x for points in series.values() for x, _, _ in points), default=1.0)
    decades = max(1, math.ceil(math.log10(max(most, 1.0) + 1)))

    def across(images: float) -> float:
        """Horizontal place; 0 images stand at the left edge, 1 a little to the right of it."""
        return left + math.log10(images + 1) / decades * (right - left)

    def up(percent: float) -> float:
        return top + (1 - percent / 100) * (bottom - top)

    def text(x: float, y: float, content: str, anchor: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(content)}</text>'

    def line(path: str) -> str:
        return f'<path d="{path}" stroke="currentColor" opacity="0.15"/>'

    parts = [text((left + right) / 2, height - 6, "training images", "middle")]
    parts.append(text(left - 6, 14, "AP", "end"))
    for percent in range(0, 101, 20):
        y = up(percent)
        parts += [line(f"M{left} {y:.1f}H{right}"), text(left - 6, y + 4, str(percent), "end")]
    for images in [0, *(10**power for power in range(decades + 1))]:
        x = across(images)
        if x <= right + 1:
            parts.append(line(f"M{x:.1f} {top}V{bottom}"))
            parts.append(text(x, bottom + 15, f"{images:,}", "middle"))
    legend = left + 14.0
    for (name, points), colour in zip(series.items(), colours, strict=False):
        dots = "".join(
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3">'
            f"<title>{escape(label)}: AP {y:.1f}, {x:.0f} training images</title></circle>"
            for x, y, label in points
        )
        title = f"<title>{escape(name)}</title>"
        parts.append(f'<g fill="{colour}" fill-opacity="0.6">{title}{dots}</g>')
        parts.append(f'<circle cx="{legend}" cy="10" r="4" fill="{colour}"/>')
        parts.append(text(legend + 10, 14, name, "start"))
        legend += 34 + 6.5 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )
