"""``proxydet search``: images, boxes and scores of any classes, from an index that proxydet index wrote."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet.wording import table_cell
from proxydet_cli.opening import BaseAbove, ClassOptions, add_background
from proxydet_cli.options import (
    IndexFolder,
    Json,
    OneLabel,
    Threshold,
    Top,
    Yes,
    command_app,
    detections,
    examples,
    given_options,
    panel,
)
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.index.search import ImageHit, RegionIndex
    from proxydet.vocabulary.vocabulary import Vocabulary

app = command_app()

_SUFFIXES = (".json", ".csv", ".html")
_evaluation = panel("Evaluation")


@app.command(
    epilog=examples(
        "proxydet search photos.index -v 'red mug'",
        "proxydet search photos.index -v 'cup, plate' -o found.html",
        "proxydet search photos.index -v mugs.vocab --score-threshold 0.5 --json",
        "proxydet search photos.index --vocabulary lvis --limit 1000 -o found.csv",
        "proxydet search photos.index --like photos/mug.jpg --box 40,25,120,90",
        "proxydet search photos.index --eval pets.toml",
    )
)
def search(
    context: typer.Context,
    index: IndexFolder,
    classes: ClassOptions,
    *,
    like: Annotated[
        str | None,
        panel("Classes")(
            "--like",
            metavar="IMAGE",
            help="Instead of class names: find more like what is in --box of this image of the index.",
        ),
    ] = None,
    box: Annotated[
        str | None,
        panel("Classes")(
            "--box",
            metavar="X,Y,W,H",
            help="The box, for --like: left, top, width and height, in pixels of the image; of the stored regions the one that overlaps it most counts.",
        ),
    ] = None,
    score_threshold: Threshold = 0.3,
    limit: Annotated[int, detections("--limit", min=1, help="At most this many images.")] = 100,
    top: Top = 300,
    one_label: OneLabel = True,
    approximately: Annotated[
        bool,
        detections(
            "--approximate",
            help="Score only regions near the classes (proxydet index approximate): faster beyond some million regions, and misses some.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        panel("Output")(
            "--output",
            "-o",
            metavar="FILE",
            help="Write what was found: .json, .csv, or .html (a page of thumbnails with boxes).",
        ),
    ] = None,
    data: Annotated[
        str | None,
        _evaluation(
            "--eval",
            metavar="NAME|FILE",
            help="Compute average precision on a data set whose images are in the index, see proxydet eval --data.",
        ),
    ] = None,
    split: Annotated[
        str, _evaluation("--split", metavar="val|test|train", help="Which split, for --eval.")
    ] = "val",
    base_above: BaseAbove = 0.9,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Find images with objects of any class names in an index, without the images and without the network.

    Without -v and --vocabulary it looks for the classes that the model was trained on. The images with the best scores come
    first.
    """
    from proxydet.errors import ConfigError
    from proxydet.index.store import StoredIndex, read_words, require_faiss
    from proxydet.vocabulary.sources import TrainedClasses

    classes.check()
    if (like is None) != (box is None):
        raise typer.BadParameter("--like IMAGE and --box X,Y,W,H go together")
    if like is not None and (useless := given_options(context, ClassOptions, "data", "base_above")):
        raise typer.BadParameter(
            f"--like looks for what is in the box: leave out {', '.join(useless)}"
        )
    region = None if box is None else _box_xyxy(box)
    if data is None:
        if given_options(context, "split"):
            raise typer.BadParameter("--split requires --eval")
    elif useless := given_options(
        context,
        "output",
        "limit",
        "score_threshold",
        "top",
        "one_label",
        "approximately",
        "base_above",
    ):
        raise typer.BadParameter(
            f"--eval scores all detections as proxydet eval does: leave out {', '.join(useless)}"
        )
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"{output} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}",
            hint="-o found.html is a page of thumbnails",
        )
    out = Output(json=json)
    stored = StoredIndex(index)
    stored.require_whole()
    if approximately:
        require_faiss()
        stored.require_tree()
    words = TrainedClasses(*read_words(stored.path))
    own = classes.classes is not None or classes.vocabulary is not None
    wanted = None
    if like is None and (data is None or own):
        wanted = classes.open(words, base_above=base_above, yes=yes)
    # Loads torch, for seconds: what can be refused was refused.
    from proxydet.index.search import RegionIndex

    opened = RegionIndex(index)
    if data is not None:
        _evaluate(opened, data, split, wanted, classes.background, out)
        return
    shown_like = {}
    if like is not None and region is not None:
        found_like = opened.like(like, region)
        wanted, shown_like = found_like.vocabulary, {"like": found_like.to_dict()}
    assert wanted is not None
    began = time.perf_counter()
    hits = opened.search(
        wanted,
        score_threshold=score_threshold,
        max_detections=top,
        one_label=one_label,
        top=limit,
        approximately=approximately,
    )
    seconds = time.perf_counter() - began
    searched = f"{len(opened):,} images, {opened.stored.regions:,} regions, {seconds:.3f} s"
    value = {
        "index": index,
        **shown_like,
        "images": [hit.to_dict() for hit in hits],
        "searched": {"images": len(opened), "regions": opened.stored.regions},
        "seconds": round(seconds, 6),
    }
    if output is not None:
        shown = (
            f"like {like} {box}"
            if like
            else ", ".join(wanted.reported[:5]) + (" ..." if len(wanted.reported) > 5 else "")
        )
        _write(output, hits, value, shown, searched)
    if json:
        out.data(value)
        return
    for hit in hits if output is None else ():
        found = zip(hit.found.labels[:10], hit.found.scores[:10], strict=True)
        out.row(f"{hit.path}: {', '.join(f'{label} {score:.2f}' for label, score in found)}")
    more = f" (the best; more with --limit {10 * limit})" if len(hits) == limit else ""
    out.message(f"{len(hits)} images{more}; searched {searched}")
    if output is not None:
        out.message(f"saved {output}")


def _box_xyxy(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = map(float, text.split(","))
    except ValueError:
        width = height = 0.0
    if not (width > 0 and height > 0):
        raise typer.BadParameter(
            f"the box {text[:80]!r} is not four numbers: left, top, width and height in pixels"
        )
    return left, top, left + width, top + height


def _write(
    output: Path, hits: list[ImageHit], value: dict[str, object], shown: str, searched: str
) -> None:
    from proxydet.files import write_json, write_text
    from proxydet.index.search import results_page
    from proxydet.visualization.report import write_report

    if output.suffix.lower() == ".html":
        summary = f"{len(hits)} images, the best first. Searched: {searched}."
        write_report(results_page(hits, title=shown, summary=summary), output)
    elif output.suffix.lower() == ".json":
        write_json(output, {**value, "index": str(value["index"])})
    else:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["file", "label", "score", "x0", "y0", "x1", "y1"])
        for hit in hits:
            for item in hit.found:
                label = table_cell(item.label)
                writer.writerow([table_cell(hit.path), label, item.score, *item.box_xyxy])
        write_text(output, text.getvalue())


def _evaluate(
    opened: RegionIndex,
    data: str,
    split: str,
    vocabulary: Vocabulary | None,
    background: str | None,
    out: Output,
) -> None:
    """Print the average precision on a split, of its own classes where no vocabulary is chosen."""
    from proxydet.data.dataset import DatasetConfig
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.detector_evaluation import evaluate_index
    from proxydet.evaluation.report import group_rows, metric_rows
    from proxydet.evaluation.split import DescribedSplit
    from proxydet.paths import dataset_path
    from proxydet_cli.progress import show_progress

    description = DatasetConfig.from_toml(dataset_path(data))
    progress = show_progress()
    config = EvaluationConfig(iou_types=("bbox",))
    opened_split = DescribedSplit.open(description, split, progress=progress)
    if vocabulary is None and background is not None:
        vocabulary = add_background(opened, opened_split.data.vocabulary, background)
    report = evaluate_index(
        opened, opened_split, vocabulary=vocabulary, config=config, progress=progress
    ).report
    if out.json:
        out.data(report.to_dict())
        return
    counts = report.counts
    out.message(
        f"{report.dataset}: {counts.detections} detections in {counts.images} images of the index, in percent"
    )
    out.table(metric_rows(report))
    if report.main.groups:
        out.table(group_rows(report))
