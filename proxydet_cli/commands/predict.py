"""``proxydet predict``: pictures in; drawn pictures, JSON, COCO, crops or tables out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxydet_cli.detector_options import (
    Classes,
    Device,
    NamesFile,
    Run,
    Sizes,
    VocabularySource,
    Weights,
    check_choice,
    chosen_vocabulary,
)
from proxydet_cli.options import Json, command_app, examples

if TYPE_CHECKING:
    from proxydet.prediction_run import PictureResult, PredictionSummary
    from proxydet_cli.output import Output

app = command_app()

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="PICTURE",
        help="Files, folders, patterns in quotes ('photos/*.jpg'), or - for a list of files on stdin.",
    ),
]
Threshold = Annotated[
    float, typer.Option("--score-threshold", min=0.0, max=1.0, help="Keep what scores above this.")
]
Top = Annotated[int, typer.Option("--top", min=1, help="Keep at most this many a picture.")]
OneLabel = Annotated[
    bool, typer.Option("--one-label", help="Keep only the best class of each box.")
]
Masks = Annotated[bool, typer.Option("--masks/--no-masks", help="Predict masks, or boxes only.")]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where files are saved.")
]
Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="KINDS",
        help="What to save: pictures, json, coco, crops, csv; several with commas; none for nothing. [default: "
        "pictures, or none with --json]",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pictures in the network at once.")
]


@app.command(
    epilog=examples(
        "proxydet predict photo.jpg -v 'headphone, webcam, coffee cup'",
        "proxydet predict photos/ --vocabulary lvis --save pictures,csv --output found",
        "proxydet predict photo.jpg --run runs/quickstart -v 'red striped circle' --json",
        "find photos -name '*.jpg' | proxydet predict - --vocabulary names.txt --save coco",
    )
)
def predict(  # noqa: PLR0913 one parameter an option
    sources: Sources,
    classes: Classes = None,
    vocabulary: VocabularySource = None,
    names: NamesFile = None,
    run: Run = None,
    weights: Weights = None,
    config: Sizes = None,
    score_threshold: Threshold = 0.3,
    top: Top = 300,
    one_label: OneLabel = False,
    masks: Masks = True,
    output: OutputFolder = Path("predictions"),
    save: Save = None,
    device: Device = "auto",
    batch_size: BatchSize = 4,
    json: Json = False,
) -> None:
    """Find objects in pictures, by any words.

    Without -v and --vocabulary it looks for the classes that the model was trained on. A picture that cannot be read
    is reported and left out; the exit code is then 3.
    """
    from proxydet.detector import Detector
    from proxydet.detector_files import open_named
    from proxydet.picture_files import find_pictures
    from proxydet.prediction_output import check_folder, make_savers
    from proxydet.prediction_run import PredictionPlan, predict_files
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    out, collected = Output(json=json), list[dict[str, Any]]()
    pictures = find_pictures(_with_stdin(sources))
    check_choice(classes, vocabulary, names)
    kinds = _kinds(save, json=json)
    if kinds:
        check_folder(output)
    detector = open_named(Detector, run=run, weights=weights, config=config, device=device)
    detector = detector.with_settings(one_class_per_proposal=one_label, masks=masks)
    wanted = chosen_vocabulary(detector, classes, vocabulary, names)
    plan = PredictionPlan(
        vocabulary=wanted,
        settings=detector.settings(score_threshold=score_threshold, max_detections=top),
        batch_size=batch_size,
        savers=make_savers(kinds, output, wanted.names),
        on_result=lambda result: _tell(out, result, collected),
    )
    summary = predict_files(detector, pictures, plan, progress=show_progress())
    _conclude(out, summary, collected)


def _with_stdin(sources: list[str]) -> list[str]:
    """Replace ``-`` by the lines of stdin."""
    listed = [line.strip() for line in sys.stdin if line.strip()] if "-" in sources else []
    return [name for source in sources for name in (listed if source == "-" else [source])]


def _kinds(save: str | None, *, json: bool) -> list[str]:
    if save is None:
        return [] if json else ["pictures"]
    kinds = [kind.strip() for kind in save.split(",") if kind.strip()]
    return [] if kinds == ["none"] else kinds


def _tell(out: Output, result: PictureResult, collected: list[dict[str, Any]]) -> None:
    """Collect a result for ``--json``, or write it as one line."""
    if out.json:
        collected.append(result.to_dict())
        return
    found = result.found
    shown = ", ".join(
        f"{label} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)
    )
    out.data(None, f"{result.file}: {shown or 'nothing found'}")


def _conclude(out: Output, summary: PredictionSummary, collected: list[dict[str, Any]]) -> None:
    """Say what was saved, and end with an error where pictures could not be read."""
    from proxydet.errors import DataError

    if out.json:
        out.data({"images": collected, "unreadable": summary.unreadable})
    if len(summary.saved) == 1:
        out.message(f"saved {summary.saved[0]}")
    elif summary.saved:
        out.message(f"saved {len(summary.saved)} files, the first: {summary.saved[0]}")
    if summary.unreadable:
        total = summary.pictures + len(summary.unreadable)
        raise DataError(
            f"{len(summary.unreadable)} of {total} pictures could not be read; the others are done",
            hint="they are named in the warnings above",
        )
