"""The report of a quickstart as one HTML page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from PIL import Image

from proxydet.detections import Detections
from proxydet.evaluation.report import IOU_TYPE_NAMES, Report
from proxydet.quickstart.job import QuickstartFolder, QuickstartResult
from proxydet.visualization.drawing import DrawnObject, draw_objects
from proxydet.visualization.plots import bar_plot, loss_plot, svg_of
from proxydet.visualization.report import Command, Picture, Section, Table, write_report
from proxydet.visualization.report import Report as Page

LOSS_NAMES = {
    "total": "sum of all losses",
    "loss_centernet_agn_pos": "proposals: heatmap, objects",
    "loss_centernet_agn_neg": "proposals: heatmap, elsewhere",
    "loss_centernet_loc": "proposals: boxes",
    "loss_cls_stage2": "classes (federated, last step)",
    "loss_box_reg_stage2": "boxes (last step)",
    "loss_mask": "masks",
    "image_loss_stage2": "image labels (last step)",
    "cmm_loss_stage2": "class-wise mixup",
}
"""Losses that are plotted, and what the page calls them."""


def write_page(result: QuickstartResult) -> Path:
    """Write ``report.html``, and the drawn predictions as image files next to their JSON."""
    base, novel = result.base, result.novel
    total = sum(result.seconds.values())
    page = Page(
        title="ProxyDet quickstart",
        summary=(
            "A small ProxyDet was trained on synthetic images: boxes and masks of base classes, and images of single "
            "objects of which only the class is known. Novel classes are combinations of colour, texture and shape "
            "that no training box shows. It finds them by comparing regions with the text embeddings of their names."
        ),
        facts=[
            ("mask AP50, base classes", _percent(base.ap50)),
            ("mask AP50, novel classes", _percent(novel.ap50)),
            ("time in all", f"{total / 60:.1f} min"),
        ],
        sections=[
            _found_section(result),
            _words_section(result),
            _scores_section(result.evaluation),
            _training_section(result.folder),
            _time_section(result),
            _commands_section(result.folder),
        ],
    )
    return write_report(page, result.folder.report)


def draw(path: Path, detections: Detections) -> Image.Image:
    """Draw detections into an image."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    objects = [
        DrawnObject(label=item.label, box_xyxy=item.box_xyxy, score=item.score, mask_HW=item.mask)
        for item in detections
    ]
    return draw_objects(image, objects)


def _found_section(result: QuickstartResult) -> Section:
    return Section(
        title="What it finds",
        text="Validation images, not seen in training, searched for every class of the data set.",
        pictures=[
            Picture(
                image=draw(example.image, example.detections),
                caption=f"{example.image.name}: {len(example.detections)} found",
            )
            for example in result.examples
        ],
    )


def _words_section(result: QuickstartResult) -> Section:
    pictures = []
    for example in result.examples:
        drawn = draw(example.image, example.found)
        drawn.save(result.folder.predictions / f"{example.image.stem}.jpg", quality=92)
        pictures.append(Picture(image=drawn, caption=f"{example.image.name}"))
    asked = ", ".join(result.examples[0].asked) if result.examples else ""
    return Section(
        title="What it finds when asked for other words",
        text=f"The same images, searched for these names only: {asked}.",
        pictures=pictures,
    )


def _scores_section(evaluation: Report) -> Section:
    rows = []
    bars: dict[str, dict[str, float]] = {}
    for kind, part in evaluation.types.items():
        name = IOU_TYPE_NAMES[kind]
        metrics = part.metrics
        rows.append((name, "all", None, *(_number(metrics.get(k)) for k in ("AP", "AP50", "AP75"))))
        for group in part.groups:
            values = (_number(group.ap), _number(group.ap50), _number(group.ap75))
            rows.append((name, group.name, group.scored, *values))
            bars.setdefault(group.name, {})[f"{name} AP50"] = values[1]
    return Section(
        title="Scores",
        text=(
            "Average precision by LVIS's federated protocol, in percent. Novel classes are the rare ones here; some of "
            "them have images of single objects in training (covered), the others have none."
        ),
        tables=[Table(columns=("", "classes", "scored", "AP", "AP50", "AP75"), rows=rows)],
        plots=[svg_of(bar_plot(bars, label="AP50"))],
    )


def _training_section(folder: QuickstartFolder) -> Section:
    lines = folder.run.metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    curves = {
        title: [
            (record["iteration"], record["losses"][name])
            for record in records
            if name in record["losses"]
        ]
        for name, title in LOSS_NAMES.items()
    }
    shown = {title: points for title, points in curves.items() if points}
    return Section(title="Training", plots=[svg_of(loss_plot(shown, columns=3))])


def _time_section(result: QuickstartResult) -> Section:
    rows = [(step, seconds) for step, seconds in result.seconds.items()]
    return Section(title="Time", tables=[Table(columns=("step", "seconds"), rows=rows)])


def _commands_section(folder: QuickstartFolder) -> Section:
    first = min((folder.data / "val").iterdir())
    run, data, picture = (
        shlex.quote(str(path)) for path in (folder.run.root, folder.description, first)
    )
    return Section(
        title="Go on",
        commands=[
            Command(
                command=f'proxydet predict {picture} --run {run} -v "red striped circle, blue star"',
                does="Search an image for any combination of the words it knows.",
            ),
            Command(
                command=f"proxydet eval --run {run} --data {data} --split val",
                does="Evaluate again; the same command works for your own dataset config.",
            ),
            Command(
                command="proxydet train --recipe small --data my-data.toml --output runs/mine",
                does="Train on your own photographs; docs/how-to/own-data.md says what the file holds.",
            ),
        ],
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
