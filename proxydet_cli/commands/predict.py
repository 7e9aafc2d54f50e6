"""``proxydet predict``: images and videos in; drawn ones, JSON, data sets, crops or tables out."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxydet.wording import counted
from proxydet_cli.jobs import JobOptions, list_on_stdin, request_of
from proxydet_cli.opening import (
    BaseAbove,
    BatchSize,
    ClassOptions,
    DetectorOptions,
    InferenceOptions,
    open_detector,
)
from proxydet_cli.options import (
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
    from proxydet.detections import Detections, FrameResult
    from proxydet.detector import Detector
    from proxydet.inference.jobs import ImageResult, PredictionSummary, VideoSummary
    from proxydet.inference.sharded import OpenWork
    from proxydet.inference.sources import ImageFile
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.vocabulary import Vocabulary

app = command_app()

# More detections than these make a line that nobody reads.
_SHOWN = 10
# Nor lines of more images than these.
_MANY = 1000

_output = panel("Output")


@app.command(
    epilog=examples(
        "proxydet predict photo.jpg -v 'headphone, webcam, coffee cup'",
        "proxydet predict photos/ --vocabulary lvis --save images,csv --output found",
        "proxydet predict photo.jpg --vocabulary all",
        "proxydet predict photo.jpg --run runs/quickstart -v 'red striped circle' --json",
        "proxydet predict photos/ -v 'cup, plate' --save yolo --output to-correct",
        "proxydet predict clip.mp4 --vocabulary coco --save images,json",
        "proxydet predict street.mp4 -v 'car, bicycle' --track --save images,csv",
        "proxydet predict aerial.tif -v 'boat' --tiles 800",
        "proxydet predict webcam -v 'cup, phone'",
        "proxydet predict photos/ 's3://bucket/*.tar' -v names.txt --save jsonl --output found --workers 4",
        "find photos -name '*.jpg' -print0 | proxydet predict - -v names.txt --save coco",
    )
)
def predict(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|VIDEO",
            help="Files, folders of images, patterns in quotes ('photos/*.jpg'), tars, URLs of object stores (s3://bucket/photos/), "
            "@FILE for a list of these, webcam or webcam:1, or - for a list of "
            "files on stdin, one a line or separated by NUL.",
        ),
    ],
    classes: ClassOptions,
    model: DetectorOptions,
    inference: InferenceOptions,
    *,
    score_threshold: Threshold = 0.3,
    top: Top = 300,
    one_label: OneLabel = True,
    masks: Annotated[
        bool | None,
        detections(
            "--masks/--no-masks",
            help="Predict masks, or boxes only. [default: masks, by a detector that has a mask head]",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int,
        detections(
            "--every",
            min=1,
            help="Of a video, run on each frame (1), each second one (2), ...",
        ),
    ] = 1,
    track: Annotated[
        bool,
        detections(
            "--track",
            help="Of a video, follow the objects: each has an id, and in drawn frames a colour.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        _output(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where files are saved. [default: predictions; predictions-2, ... where that holds results]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, _output("--overwrite", help="Replace results that are in the output folder.")
    ] = False,
    save: Annotated[
        list[str] | None,
        _output(
            "--save",
            metavar="KINDS",
            help="What to save: images, json, coco, yolo, voc, labelstudio, crops, csv; several with commas, or repeated; none for nothing. Of a video: "
            "images (an annotated video), json, csv. Alone, for any number of images in a job that can be continued: jsonl, jsonl.gz, parquet. "
            "[default: images, or none with --json]",
        ),
    ] = None,
    quiet: Annotated[
        bool | None,
        _output(
            "--quiet/--no-quiet",
            help="Print one line at the end, not one an image. [default: of more than 1,000 images]",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 4,
    base_above: BaseAbove = 0.9,
    job: JobOptions,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Detect objects in images and videos from any class names.

    Without -v and --vocabulary it detects the classes that the model was trained on. An image or video that cannot be
    read is reported and left out, and of a video that breaks off what came before is kept; the exit code is then 3.
    Ctrl-C keeps what was found before. What is missing of model and text encoder is downloaded after one question.
    """
    from PIL.Image import DecompressionBombWarning

    from proxydet.data.images import read_large_images
    from proxydet.inference.sources import (
        describe_left_out,
        find_images,
        name_videos,
        pyav,
        read_list,
        split_sources,
    )
    from proxydet.inference.writers import (
        KINDS,
        PART_KINDS,
        VIDEO_KINDS,
        check_kinds,
        choose_folder,
        make_writers,
        output_files,
        part_format,
        reserved_names,
    )
    from proxydet_cli.progress import show_progress

    classes.check()
    # A user's own image may be as large as it likes; beyond twice Pillow's limit it is an error all the same.
    warnings.simplefilter("ignore", DecompressionBombWarning)
    named = model.find()
    inference.check(named)
    kinds = _kinds(save, json=json)
    check_kinds(kinds, (*KINDS, *PART_KINDS))
    kind = _job_kind(save, kinds, given_options(context, JobOptions))
    out = Output(json=json)

    def opened() -> tuple[Detector, Vocabulary, InferenceConfig]:
        # Loads torch, for seconds: what can be refused was refused.
        detector = inference.apply(open_detector(named, classes, device=model.device, yes=yes))
        if inference.precision is None and (faster := detector.faster_precision()) is not None:
            out.message(f"hint: {faster}")
        detector = detector.with_settings(agnostic_nms=one_label, masks=masks)
        if detector.inference.tiles:
            read_large_images()
        vocabulary = classes.open(detector, base_above=base_above, yes=yes)
        settings = detector.settings(score_threshold=score_threshold, max_detections=top)
        return detector, vocabulary, settings

    def prepared() -> tuple[OpenWork, dict[str, Any]]:
        detector, vocabulary, settings = opened()
        from proxydet.inference.rows import DetectionWork, OpenDetection

        work = DetectionWork(detector=detector, vocabulary=vocabulary, settings=settings)
        opening = OpenDetection(
            named=named, **job.spread(model.device), vocabulary=vocabulary, settings=settings
        )
        return (lambda _: work) if job.here else opening, work.identity

    if kind is not None:
        if track:
            raise typer.BadParameter(
                f"--track follows objects in videos, --save {kind} is of images"
            )
        asked = (model, classes, inference, score_threshold, top, one_label, masks, base_above)
        job.run(
            out,
            output or Path("predictions"),
            sources,
            prepared,
            request=request_of(named, *asked, job.part_size),
            parts=part_format(kind),
            overwrite=overwrite,
            batch_size=batch_size,
        )
        return

    left_out: Counter[str] = Counter()
    images: tuple[ImageFile, ...] = ()
    with list_on_stdin(sources) as stdin:
        listed = [] if stdin is None else list(read_list(stdin))
    named_images, named_videos = split_sources(
        [name for source in sources for name in (listed if source == "-" else [source])]
    )
    if track and not named_videos:
        raise typer.BadParameter("--track follows objects in videos, and none is given")
    if named_videos:
        pyav()
        if track:
            from proxydet.inference.tracking import tracking_library

            tracking_library()
        check_kinds(kinds, VIDEO_KINDS)
    if named_images or not named_videos:
        images = find_images(
            named_images, left_out, reserved=reserved_names(kinds), listed=frozenset(listed)
        )
    # The table of all images is called detections.csv.
    videos = name_videos(named_videos, reserved=["detections"] if images else [])
    targets = list(output_files(kinds, images)) if images else []
    for video in videos:
        name = video.name.name
        targets += [video.name.with_name(name + VIDEO_KINDS[saved]) for saved in kinds]
    folder = choose_folder(output, targets, overwrite=overwrite) if kinds else Path()
    if left_out:
        out.message(f"left out: {describe_left_out(left_out)}")

    detector, vocabulary, settings = opened()
    from proxydet.inference.jobs import predict_files, predict_video

    if quiet is None:
        quiet = len(images) > _MANY
    shown = _Shown(out, left_out, lines=bool(videos), quiet=quiet)
    alone = len(images) + len(videos) == 1
    progress = show_progress()
    if images:
        with shown.continuing(images[0].source.name, alone=alone):
            done = predict_files(
                detector,
                images,
                vocabulary=vocabulary,
                settings=settings,
                batch_size=batch_size,
                writers=make_writers(kinds, folder, vocabulary.reported),
                on_result=shown.image,
                progress=progress,
            )
            shown.images_done(done)
    for video in videos:
        with shown.continuing(video.source.name, alone=alone):
            summary = predict_video(
                detector,
                video,
                vocabulary=vocabulary,
                settings=settings,
                output=folder,
                kinds=kinds,
                batch_size=batch_size,
                every=every,
                track=track,
                on_result=shown.frame,
                progress=progress,
            )
            shown.video_done(summary)
    shown.conclude()


def _kinds(save: list[str] | None, *, json: bool) -> list[str]:
    if not save:
        return [] if json else ["images"]
    kinds = [kind.strip() for kind in ",".join(save).split(",") if kind.strip()]
    if not kinds:
        raise typer.BadParameter("--save is empty; to save nothing: --save none")
    # Their name in version 0.1.
    renamed = ["images" if kind == "pictures" else kind for kind in kinds]
    return [] if kinds == ["none"] else list(dict.fromkeys(renamed))


def _job_kind(save: list[str] | None, kinds: list[str], options: list[str]) -> str | None:
    """Return the form of a job's results; None: images are run on one by one. ``options``: those of a job that are given."""
    from proxydet.errors import ConfigError
    from proxydet.inference.writers import PART_KINDS

    parts = [kind for kind in kinds if kind in PART_KINDS]
    if (parts and len(kinds) > len(parts)) or (options and save and not parts):
        other = next((kind for kind in kinds if kind not in PART_KINDS), "none")
        raise ConfigError(
            f"--save {other} cannot be combined with {f'--save {parts[0]}' if parts else options[0]}",
            hint=f"save one of {', '.join(PART_KINDS)} alone",
        )
    if len(parts) > 1:
        raise ConfigError(f"a job saves {parts[0]} or {parts[1]}, not both", hint="choose one")
    return parts[0] if parts else PART_KINDS[0] if options else None


class _Shown:
    """Prints results as they come, and at the end what was saved and what could not be read.

    Args:
        out: Where they are printed.
        left_out: Files that are not run on, by kind.
        lines: With ``--json``, print each result on a line of its own as it comes; else all in one object at the end.
        quiet: Print a line for all images, and one a video, instead of one an image and frame.
    """

    def __init__(self, out: Output, left_out: Counter[str], *, lines: bool, quiet: bool) -> None:
        self._out = out
        self._left_out = left_out
        self._lines = lines
        self._quiet = quiet
        self._collected: list[dict[str, Any]] = []
        self._saved: list[Path] = []
        self._broken: list[str] = []
        self._hints: dict[str, None] = {}

    def image(self, result: ImageResult) -> None:
        """Print, or collect, the result of an image."""
        self._result(result.to_dict, result.image.source.name, result.found)

    def frame(self, video: str, result: FrameResult) -> None:
        """Print the result of a frame."""
        name = f"{video} {result.seconds:.2f} s"
        self._result(lambda: result.to_dict(video), name, result.found)

    def _result(self, value: Callable[[], dict[str, Any]], name: str, found: Detections) -> None:
        if not self._out.json:
            if not self._quiet:
                self._out.row(f"{name}: {_summary(found)}")
        elif self._lines:
            self._out.line(value())
        else:
            self._collected.append(value())

    def images_done(self, summary: PredictionSummary) -> None:
        """Print the summary of the images, or the whole JSON result."""
        if self._quiet and not self._out.json:
            found = counted(summary.detections, "detection")
            self._out.row(f"{counted(summary.images, 'image')}: {found}")
        self._saved += summary.saved
        if self._out.json and not self._lines:
            self._out.data(
                {
                    "images": self._collected,
                    "unreadable": summary.unreadable,
                    "left_out": dict(self._left_out),
                }
            )
        if summary.unreadable:
            total = summary.images + len(summary.unreadable)
            self._broken.append(f"{len(summary.unreadable)} of {total} images could not be read")
            self._hints["see the warnings above"] = None

    def video_done(self, summary: VideoSummary) -> None:
        """Print the summary of a video, or its JSON result."""
        if self._quiet and not self._out.json:
            found = counted(summary.detections, "detection")
            self._out.row(f"{summary.video}: {counted(summary.frames, 'frame')}, {found}")
        self._saved += summary.saved
        if summary.broken is not None:
            self._broken.append(summary.broken)
            self._hints["what was found before a video broke off is kept"] = None

    @contextlib.contextmanager
    def continuing(self, name: str, *, alone: bool) -> Iterator[None]:
        """Note what cannot be read at all, so that the next is run on.

        Args:
            name: What is read.
            alone: It is all that there is to read: its error is raised.
        """
        from proxydet.errors import DataError

        try:
            yield
        except DataError as error:
            if alone:
                raise
            self._out.warning(error.message)
            self._broken.append(f"{name} could not be read")
            self._hints["see the warnings above"] = None

    def conclude(self) -> None:
        """Print what was saved.

        Raises:
            DataError: Something could not be read.
        """
        from proxydet.errors import DataError

        if len(self._saved) == 1:
            self._out.message(f"saved {self._saved[0]}")
        elif self._saved:
            self._out.message(f"saved {len(self._saved)} files, the first: {self._saved[0]}")
        if self._broken:
            raise DataError(
                f"{'; '.join(self._broken)}; the rest is done",
                hint="; ".join(self._hints),
            )


def _summary(found: Detections) -> str:
    """The best few detections, for a line of text; files and JSON hold all."""
    best = zip(found.labels[:_SHOWN], found.scores[:_SHOWN], strict=True)
    shown = [f"{label} {score:.2f}" for label, score in best]
    if len(found) > _SHOWN:
        shown.append(f"... and {len(found) - _SHOWN} more")
    return ", ".join(shown) or "no detections"
