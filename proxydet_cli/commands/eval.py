"""``proxydet eval``: average precision of a detector or of a results file, with error bars."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxydet.errors import ConfigError, DataError, InputError
from proxydet_cli.opening import (
    Background,
    BatchSize,
    DetectorOptions,
    InferenceOptions,
    add_background,
    open_here,
)
from proxydet_cli.options import (
    Json,
    command_app,
    detections,
    examples,
    given_options,
    panel,
)
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.data.dataset import DatasetConfig, PublishedSplit
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.evaluate import Evaluation
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.report import Report
    from proxydet.evaluation.split import DescribedSplit
    from proxydet.reporting import Progress

app = command_app()

PREDICTIONS = "predictions"
"""Folder below an evaluation's output that holds what the detector found."""

_data, _scoring = panel("Data"), panel("Scoring")


def _iou_types(text: str) -> tuple[str, ...]:
    types = tuple(text.lower().split(","))
    if not set(types) <= {"bbox", "segm"} or len(set(types)) < len(types):
        raise typer.BadParameter(f"{text!r} is not bbox (boxes), segm (masks), or bbox,segm.")
    return types


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on what, and how."""

    model: DetectorOptions
    inference: InferenceOptions
    results: Annotated[
        Path | None,
        detections(
            "--results",
            metavar="FILE",
            help="Score this LVIS or COCO results file (JSON, plain or gzipped), or what predict --save coco wrote, instead of detecting.",
        ),
    ] = None
    data: Annotated[
        str | None,
        _data(
            "--data",
            "--dataset",
            metavar="NAME|FILE",
            help="Dataset config (TOML), or a prepared data set (lvis, coco, objects365, openimages); for --results an "
            "annotation file (JSON) will do. [default: the run's, else lvis]",
        ),
    ] = None
    split: Annotated[
        str,
        _data(
            "--split",
            metavar="val|test|train|NAME",
            help="Which split of the data set; or one that papers report, which needs no --data: minival (of LVIS), lvis-val, coco-val, "
            "coco-zero-shot, objects365-val, openimages-val.",
        ),
    ] = "val"
    vocabulary: Annotated[
        Path | None,
        detections(
            "--vocabulary",
            metavar="FILE",
            help="Text embeddings (.npz, .npy) to use instead of the dataset config's.",
        ),
    ] = None
    background: Background = None
    protocol: Annotated[
        Literal["lvis", "coco", "openimages"] | None,
        _scoring(
            "--protocol",
            metavar="lvis|coco|openimages",
            case_sensitive=False,
            help="Whose protocol to score by: lvis (federated annotations), coco (exhaustive) or openimages. "
            "[default: by what the annotations say]",
        ),
    ] = None
    iou_type: Annotated[
        Any,
        _scoring(
            "--iou-type",
            metavar="bbox,segm",
            parser=_iou_types,
            help="What is scored. [default: boxes, and masks where objects and detections have them]",
        ),
    ] = None
    engine: Annotated[
        Literal["hotcoco", "lvis"],
        _scoring(
            "--engine",
            metavar="hotcoco|lvis",
            case_sensitive=False,
            help="hotcoco: fast; lvis: the official evaluators (lvis, pycocotools), the reference.",
        ),
    ] = "hotcoco"
    fixed: Annotated[
        bool,
        _scoring(
            "--fixed",
            help="Fixed AP: no limit of detections an image, 10,000 a category. Not comparable with AP.",
        ),
    ] = False
    bootstrap: Annotated[
        int, _scoring("--bootstrap", min=0, help="Resamples for confidence intervals; 0: none.")
    ] = 200
    score_threshold: Annotated[
        float,
        _scoring(
            "--score-threshold",
            min=0.0,
            max=1.0,
            help="Report precision, recall and false positives above this, too (one label a box); classes with a threshold of their own have that.",
        ),
    ] = 0.3
    hierarchy: Annotated[
        Path | None,
        _scoring("--hierarchy", metavar="FILE", help="OpenImages' hierarchy, for expanded AP50."),
    ] = None
    allow_outside: Annotated[
        bool, _scoring("--allow-outside", help="Accept boxes that reach out of their image.")
    ] = False
    allow_duplicates: Annotated[
        bool, _scoring("--allow-duplicates", help="Accept results that hold every detection twice.")
    ] = False
    output: Annotated[
        Path | None,
        panel("Output")(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where files are written. [default: in the run folder, else below evaluation]",
        ),
    ] = None
    compare: Annotated[
        tuple[Path, Path] | None,
        detections(
            "--compare",
            metavar="A B",
            help="Test whether B is better than A: two results files, or two folders of evaluations.",
        ),
    ] = None
    gpus: Annotated[
        int | None, panel("Detector")("--gpus", min=1, help="Processes. [default: one a GPU]")
    ] = None
    batch_size: BatchSize = 1

    @property
    def config(self) -> EvaluationConfig:
        """How detections are scored."""
        from proxydet.evaluation.config import EvaluationConfig

        return EvaluationConfig(
            engine=self.engine,
            protocol=self.protocol,
            iou_types=self.iou_type or (),
            fixed=self.fixed,
            bootstrap=self.bootstrap,
            score_threshold=self.score_threshold,
            hierarchy=self.hierarchy,
            allow_outside=self.allow_outside,
            allow_duplicates=self.allow_duplicates,
            batch_size=self.batch_size,
        )

    @property
    def published(self) -> PublishedSplit | None:
        """The split that papers report, where ``--split`` names one."""
        from proxydet.data.dataset import PUBLISHED_SPLITS

        return PUBLISHED_SPLITS.get(self.split)

    def check(self, detecting: list[str]) -> None:
        """Raise ConfigError where options contradict each other or something is missing.

        Args:
            detecting: The given options of detecting, which results that are there exclude.
        """
        from proxydet.data.dataset import PARTS, PUBLISHED_SPLITS

        if self.split not in PARTS and self.published is None:
            raise ConfigError(
                f"--split is {self.split!r}; it can be {', '.join((*PARTS, *PUBLISHED_SPLITS))}.",
                hint="to evaluate on other images, name their annotations as [test] in a dataset config",
            )
        if self.published is not None and self.data not in (None, self.published.data):
            raise ConfigError(
                f"--split {self.split} ({self.published.title}) is a split of {self.published.data}, not of {self.data}.",
                hint="leave out --data, or name the split of your data set: val, test, train",
            )
        if self.results is not None and detecting:
            raise ConfigError(
                f"--results cannot be combined with {', '.join(detecting)}: they are scored as given.",
                hint="leave it out, or leave out --results to detect again",
            )
        if self.hierarchy is not None and not self.hierarchy.is_file():
            raise InputError(
                f"there is no class hierarchy {self.hierarchy}",
                hint="--hierarchy takes OpenImages' own file, challenge-2019-label500-hierarchy.json",
                path=self.hierarchy,
            )
        named = self.data is not None or self.published is not None
        if self.results is not None and not named:
            raise ConfigError(
                "--results requires the data set that was predicted.",
                hint="--data with an annotation file (JSON) or a dataset config (TOML), or --split minival",
            )
        if self.results is None and self.vocabulary is not None and not named:
            raise ConfigError("--vocabulary requires --data.", hint="give --data too")

    def check_comparison(self, detecting: list[str]) -> None:
        """Raise ConfigError where the options are not those of a comparison, as `check`."""
        if detecting:
            raise ConfigError(
                f"--compare cannot be combined with {', '.join(detecting)}: it reads results that are there and writes no files.",
                hint="make each result with a proxydet eval of its own, then compare the two folders",
            )
        if self.data is None and self.published is None:
            raise ConfigError(
                "--compare requires the data set that was predicted.",
                hint="--data with an annotation file (JSON) or a dataset config (TOML), or --split minival",
            )

    def annotations_only(self) -> bool:
        """Whether ``--data`` names annotations (a JSON file, Pascal VOC) rather than a dataset config."""
        from proxydet.data.dataset import names_annotations

        path = self.data_path()
        return self.published is None and path is not None and names_annotations(path)

    def data_path(self) -> Path | None:
        """Return what ``--data`` names."""
        from proxydet.paths import dataset_path

        return None if self.data is None else dataset_path(self.data)

    def folder(self, dataset: str) -> Path:
        """Return where the files of the evaluation go."""
        if self.output is not None:
            return self.output
        place = dataset if self.published is not None else f"{dataset}-{self.split}"
        if self.annotations_only():
            place = Path(self.data or "").resolve().name.split(".")[0]
        if self.model.run is not None:
            return self.model.run / "evaluation" / place
        if self.results is not None:
            return Path("evaluation") / f"{self.results.name.split('.')[0]}-{place}"
        return Path("evaluation") / f"{Path(self.model.weights or 'proxydet-r50-inl').stem}-{place}"


@app.command(
    epilog=examples(
        "proxydet eval --run runs/quickstart",
        "proxydet eval --weights proxydet-r50-inl --data lvis",
        "proxydet eval --weights proxydet-r50-inl --split minival --fixed",
        "proxydet eval --results detections.json.gz --data lvis_v1_val.json",
        "proxydet eval --run runs/pets --data pets.toml --split train --json",
        "proxydet eval --compare runs/a/evaluation/lvis-val runs/b/evaluation/lvis-val --data lvis",
    )
)
def evaluate(context: typer.Context, options: EvalOptions, *, json: Json = False) -> None:
    """Compute average precision with confidence intervals.

    Predictions are kept in the output folder: a stopped evaluation resumes where it stopped.
    """
    output = Output(json=json)
    detecting = given_options(
        context, DetectorOptions, InferenceOptions, "gpus", "batch_size", "background"
    )
    if options.compare is not None:
        options.check_comparison(detecting + given_options(context, "results", "output"))
        compare_results(*options.compare, options, output)
    else:
        options.check(detecting)
        evaluate_options(options, output)


def results_of(place: Path) -> Path:
    """Return the results file that a path means: itself, or the one that an evaluation's folder holds or scored.

    Raises:
        InputError: There is none.
    """
    from proxydet.evaluation.evaluate import recorded_results
    from proxydet.paths import run_in

    if not place.exists():
        raise InputError(
            f"there is no {place}",
            hint="give a results file, or the output folder of a finished proxydet eval",
            path=place,
        )
    if not place.is_dir():
        return place
    for file in (place / "predictions.json", place / PREDICTIONS / "predictions.json"):
        if file.is_file():
            return file
    recorded = recorded_results(place)
    if recorded is not None:
        return recorded
    below = sorted((run_in(place) / "evaluation").glob("*/results.json"))
    raise InputError(
        f"{place} contains no finished predictions.",
        hint=f"its evaluations are in {', '.join(str(file.parent) for file in below)}"
        if below
        else "give a results file, or the output folder of a finished proxydet eval",
        path=place,
    )


def read_description(options: EvalOptions) -> DatasetConfig:
    """Read the dataset config that was named, or that the run was trained with."""
    from proxydet.config import from_mapping
    from proxydet.data.config import DataConfig
    from proxydet.data.dataset import DatasetConfig, published_split
    from proxydet.models import configuration_of
    from proxydet.paths import datasets_folder, require_run

    if options.published is not None:
        detecting = options.results is None and options.compare is None
        return published_split(options.split, with_images=detecting)
    path = options.data_path()
    if path is None and options.model.run is not None:
        run = configuration_of(require_run(options.model.run))
        path = from_mapping(DataConfig, run.get("data", {})).description
    path = path or datasets_folder() / "lvis.toml"
    if not path.is_file():
        raise DataError(
            f"{path} is a folder, not a dataset config"
            if path.is_dir()
            else f"there is no dataset config {path}",
            hint="--data takes a TOML file, or the name of a prepared data set: proxydet data prepare --help",
            path=path,
        )
    return DatasetConfig.from_toml(path)


def evaluate_options(options: EvalOptions, output: Output) -> None:
    """Evaluate, write the files and show the numbers."""
    from proxydet.evaluation.evaluate import record_results, run_evaluation
    from proxydet.inference.writers import check_folder

    if options.output is not None:
        check_folder(options.output)
    progress = _progress()
    if options.results is not None:
        from proxydet.runtime.processes import keep_freed_memory

        keep_freed_memory()
        truth, groups, split = open_subject(options, progress)
        evaluation = run_evaluation(
            options.results, truth, config=options.config, groups=groups, progress=progress
        )
        record_results(options.folder(truth.name), options.results, truth, options.config)
        _conclude(evaluation, split, options, output, progress)
        return
    description = read_description(options)
    named = options.model.find()
    options.inference.check(named)
    with _processes(options, options.folder(description.name)) as device:
        if device is None:
            return
        from proxydet.evaluation.detector_evaluation import (
            evaluate_split,
            fusion_vocabulary,
            held,
        )

        split = _open_split(description, options, progress)
        opened = open_here(named, device=device)
        detector = options.inference.apply(opened)
        folder = options.folder(description.name)
        classes = None
        if options.background is not None:
            classes = add_background(detector, split.data.vocabulary, options.background)
            classes = fusion_vocabulary(classes, detector.vocabulary)
        with held(folder / PREDICTIONS):
            try:
                detected = evaluate_split(
                    detector, split, folder / PREDICTIONS,
                    vocabulary=classes, records=folder, config=options.config, progress=progress,
                )  # fmt: skip
            except KeyboardInterrupt:
                output.message("stopped: the same command resumes from here")
                raise
            if detected is not None:  # the first process of several shows the result
                nms_iou = detector.inference.nms_iou
                _conclude(detected, split, options, output, progress, nms_iou)


@contextlib.contextmanager
def _processes(options: EvalOptions, folder: Path) -> Iterator[str | None]:
    """Give the device to work on here, or None when several processes have been started, and have done it."""
    import torch

    from proxydet.training.distributed import connect
    from proxydet.training.launch import launch, plan_launch, worker

    logs = folder / "logs"
    on_gpus = options.model.device in ("auto", "cuda") and torch.cuda.is_available()
    plan = plan_launch(
        gpus=options.gpus, whole_job=False, available=torch.cuda.device_count() if on_gpus else 1
    )
    if plan.started:
        with worker(logs), connect(options.model.device) as info:
            yield str(info.device)
    elif plan.torchrun:
        launch(plan, ["-m", "proxydet_cli", *sys.argv[1:]], logs)
        yield None
    else:
        yield options.model.device


def _conclude(
    evaluation: Evaluation,
    split: DescribedSplit | None,
    options: EvalOptions,
    output: Output,
    progress: Progress,
    nms_iou: float = 0.5,
) -> None:
    """Write the files and show the numbers."""
    from proxydet.evaluation.analysis import analyse
    from proxydet.evaluation.page import write_files

    folder = options.folder(evaluation.report.dataset)
    described = split is not None and split.data.config.vocabulary is not None
    analysis = analyse(
        evaluation,
        progress,
        vocabulary=split.data.vocabulary if split is not None and described else None,
        score_threshold=options.config.score_threshold,
        nms_iou=nms_iou,
    )
    # Results are scored without images too; of images without names none can be shown.
    unseen = split is None or "image.name" in split.store.report.counts
    with progress.task("writing report", total=None):
        written = write_files(
            evaluation,
            analysis,
            folder,
            read=None if split is None or unseen else split.read_id,
            commands=_next_commands(options, folder),
        )
    show(evaluation.report, analysis.to_dict(), output)
    output.message(f"written: {', '.join(str(path) for path in written.values())}")


def compare_results(first: Path, second: Path, options: EvalOptions, output: Output) -> None:
    """Say whether the second of two results is better than the first."""
    from proxydet.evaluation import evaluate as core
    from proxydet.evaluation.report import difference_rows

    files = results_of(first), results_of(second)
    progress = _progress()
    truth, groups, _ = open_subject(options, progress)
    compared = core.compare_results(
        *files, truth,
        config=options.config, groups=groups, progress=progress,
    )  # fmt: skip
    if output.json:
        output.data({kind: list(rows) for kind, rows in compared.items()})
        return
    output.message(f"A: {first}\nB: {second}\nin percent, on the same resamples of the images")
    for kind, rows in compared.items():
        output.message("")
        output.data(None, {"bbox": "boxes", "segm": "masks"}[kind])
        output.table(difference_rows(rows))


def show(report: Report, analysis: Mapping[str, Any], output: Output) -> None:
    """Write the numbers to stdout."""
    from proxydet.data.config import PROTOCOL_NAMES
    from proxydet.evaluation.analysis import operating_rows
    from proxydet.evaluation.report import group_rows, metric_rows

    if output.json:
        output.data({**report.to_dict(), "analysis": analysis})
        return
    counts = report.counts
    output.message(
        f"{report.dataset}: {counts.detections} detections in {counts.images_with_detections} of {counts.images} images, "
        f"{counts.annotations} annotations, engine {report.engine}, in percent"
    )
    output.message(f"protocol: {PROTOCOL_NAMES[report.protocol]}")
    if report.masks_left_out and 0 < counts.without_mask < counts.detections:
        output.warning(f"masks are not scored: {report.masks_left_out}")
    elif report.masks_left_out:
        output.message(f"masks are not scored: {report.masks_left_out}")
    if "segm" in report.types and counts.annotations_without_mask:
        output.message(
            f"{counts.annotations_without_mask} of {counts.annotations} annotations have no mask: for masks they neither "
            "help nor harm"
        )
    if report.fixed:
        output.warning("this is fixed AP; it cannot be compared with AP")
    output.table(metric_rows(report))
    if report.main.groups:
        output.data(None, "")
        output.table(group_rows(report))
    if analysis["operating_points"]:
        output.data(None, "")
        output.table(operating_rows(analysis["operating_points"]))
        output.message(
            "above: one label a box counts, as predict reports them; average precision sees all labels"
        )
    resampling = report.main.resampling
    if resampling is not None:
        output.message(
            f"±: {100 * resampling.confidence:g} % confidence, from {resampling.number} resamples of the images"
        )
        if resampling.rare is not None:
            scored, present = resampling.rare
            output.message(
                f"rare: {scored} categories are annotated, {present:.1f} of them in a resample on average"
            )


def open_subject(
    options: EvalOptions, progress: Progress
) -> tuple[GroundTruth, Mapping[str, Any], DescribedSplit | None]:
    """Open the data set that results are scored on; return annotations, sets of categories, and the split of a config."""
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.split import imagenet_groups

    if options.annotations_only():
        path = options.data_path() or Path()
        truth = GroundTruth.load(path, protocol=options.config.protocol)
        return truth, imagenet_groups(truth), None
    split = _open_split(read_description(options), options, progress)
    return split.truth, split.groups, split


def _open_split(
    description: DatasetConfig, options: EvalOptions, progress: Progress
) -> DescribedSplit:
    from proxydet.evaluation.split import DescribedSplit

    if options.vocabulary is not None:
        spec = dataclasses.replace(description.classes, embeddings=options.vocabulary.absolute())
        description = dataclasses.replace(description, vocabulary=spec)
    name = "val" if options.published is not None else options.split
    return DescribedSplit.open(
        description, name, protocol=options.config.protocol, progress=progress
    )


def _next_commands(options: EvalOptions, folder: Path) -> dict[str, str]:
    results = options.results or folder / PREDICTIONS / "predictions.json"
    data = "" if options.data is None else f" --data {shlex.quote(options.data)}"
    data += "" if options.published is None else f" --split {options.split}"
    quoted = shlex.quote(str(results))
    commands = {
        f"proxydet eval --results {quoted}{data} --engine lvis": "Check the numbers with the official evaluators.",
        f"proxydet eval --compare {quoted} OTHER.json{data}": "Say whether another detector is better.",
    }
    return commands if data else {}


def _progress() -> Progress:
    from proxydet_cli.progress import show_progress

    if "torch" not in sys.modules:
        return show_progress()
    from proxydet.training.distributed import launched_rank

    return show_progress(quiet=launched_rank() != 0)
