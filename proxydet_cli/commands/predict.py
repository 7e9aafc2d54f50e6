"""``proxydet predict``: pictures and videos in; drawn ones, JSON, COCO, crops or tables out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.detector_options import (
    Augment,
    BaseAbove,
    Classes,
    Device,
    NamesFile,
    Precision,
    PrecisionOption,
    Run,
    Sizes,
    VocabularySource,
    Weights,
    check_choice,
    chosen_vocabulary,
    tuned,
)
from proxydet_cli.options import Json, command_app, examples

if TYPE_CHECKING:
    from proxydet.picture_files import PictureFile
    from proxydet.video.run import VideoFile

app = command_app()


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="PICTURE|VIDEO",
        help="Files, folders of pictures, patterns in quotes ('photos/*.jpg'), webcam or webcam:1, or - for a list of "
        "files on stdin.",
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
        help="What to save: pictures, json, coco, crops, csv; several with commas; none for nothing. Of a video: "
        "pictures (an annotated video), json, csv. [default: pictures, or none with --json]",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pictures in the network at once.")
]
Every = Annotated[
    int,
    typer.Option(
        "--every", min=1, help="Of a video, look at each frame (1), each second one (2), ..."
    ),
]


@app.command(
    epilog=examples(
        "proxydet predict photo.jpg -v 'headphone, webcam, coffee cup'",
        "proxydet predict photos/ --vocabulary lvis --save pictures,csv --output found",
        "proxydet predict photo.jpg --run runs/quickstart -v 'red striped circle' --json",
        "proxydet predict clip.mp4 --vocabulary coco --save pictures,json",
        "proxydet predict webcam -v 'cup, phone'",
        "find photos -name '*.jpg' | proxydet predict - --vocabulary names.txt --save coco",
    )
)
def predict(
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
    every: Every = 1,
    tta: Augment = False,
    precision: PrecisionOption = Precision.fp32,
    base_above: BaseAbove = 0.9,
    json: Json = False,
) -> None:
    """Find objects in pictures and videos, by any words.

    Without -v and --vocabulary it looks for the classes that the model was trained on. A picture or video that cannot
    be read is reported and left out, and of a video that breaks off what came before is kept; the exit code is then 3.
    """
    from PIL.Image import DecompressionBombWarning

    from proxydet.detector import Detector
    from proxydet.detector_files import open_named
    from proxydet.prediction_output import check_folder
    from proxydet_cli.output import Output
    from proxydet_cli.prediction import Job, look

    check_choice(classes, vocabulary, names)
    # A user's own picture may be as large as it likes; beyond twice Pillow's limit it is an error all the same.
    warnings.simplefilter("ignore", DecompressionBombWarning)
    kinds = _kinds(save, json=json)
    pictures, videos = _find(sources, kinds)
    if kinds:
        check_folder(output)
    opened = open_named(Detector, run=run, weights=weights, config=config, device=device)
    detector = tuned(opened, tta=tta, precision=precision)
    kept = detector.with_settings(one_class_per_proposal=one_label, masks=masks)
    job = Job(
        pictures=pictures,
        videos=videos,
        vocabulary=chosen_vocabulary(detector, classes, vocabulary, names, base_above),
        settings=kept.settings(score_threshold=score_threshold, max_detections=top),
        output=output,
        kinds=kinds,
        batch_size=batch_size,
        every=every,
    )
    look(detector, job, Output(json=json))


def _find(
    sources: list[str], kinds: list[str]
) -> tuple[tuple[PictureFile, ...], tuple[VideoFile, ...]]:
    """Find pictures and videos, and check that what is to be saved can be saved of them."""
    from proxydet.picture_files import find_pictures
    from proxydet.prediction_output import reserved_names
    from proxydet.video.run import name_videos
    from proxydet.video.saving import check_kinds
    from proxydet.video.source import pyav, split_sources

    named_pictures, named_videos = split_sources(_with_stdin(sources))
    if named_videos:
        pyav()
        check_kinds(kinds)
    pictures = (
        find_pictures(named_pictures, reserved=reserved_names(kinds))
        if named_pictures or not named_videos
        else ()
    )
    # The table of all pictures is called detections.csv.
    return pictures, name_videos(named_videos, reserved=["detections"] if pictures else [])


def _with_stdin(sources: list[str]) -> list[str]:
    """Replace ``-`` by the lines of stdin."""
    listed = [line.strip() for line in sys.stdin if line.strip()] if "-" in sources else []
    return [name for source in sources for name in (listed if source == "-" else [source])]


def _kinds(save: str | None, *, json: bool) -> list[str]:
    if save is None:
        return [] if json else ["pictures"]
    kinds = [kind.strip() for kind in save.split(",") if kind.strip()]
    if not kinds:
        raise typer.BadParameter("--save names nothing; for nothing: --save none")
    return [] if kinds == ["none"] else kinds
