"""What ``proxydet eval`` does with its options: open, predict or read, score, write, show."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.errors import ConfigError, DataError, InputError
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.data.description import DatasetDescription
    from proxydet.detector import Detector
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.evaluate import Evaluation, ResultsSource
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.report import Report
    from proxydet.evaluation.split import DescribedSplit
    from proxydet.reporting import Progress

PREDICTIONS = "predictions"
"""Folder below an evaluation's output that holds what the detector found."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on what, and how."""

    run: Path | None
    weights: str | None
    model: str | None
    results: Path | None
    data: str | None
    split: str
    vocabulary: Path | None
    output: Path | None
    device: str
    config: EvaluationConfig

    def check(self) -> None:
        """Raise ConfigError where options contradict each other or something is missing."""
        if self.results is not None and (self.run or self.weights):
            raise ConfigError(
                "--results are scored as they are; --run and --weights make new ones.",
                hint="give either",
            )
        if self.results is not None and self.data is None:
            raise ConfigError(
                "--results need the data set that they are of.",
                hint="--data with an annotation file (JSON) or a data description (TOML)",
            )
        if self.results is None and self.vocabulary is not None and self.data is None:
            raise ConfigError("--vocabulary belongs to a data set.", hint="give --data too")

    def annotations_only(self) -> bool:
        """Whether ``--data`` names an annotation file rather than a description."""
        return self.data is not None and _is_json(self.data)

    def folder(self, dataset: str) -> Path:
        """Return where the files of the evaluation go."""
        if self.output is not None:
            return self.output
        place = f"{dataset}-{self.split}"
        if self.run is not None:
            return self.run / "evaluation" / place
        if self.results is not None:
            return Path("evaluation") / f"{self.results.name.split('.')[0]}-{place}"
        return Path("evaluation") / f"{Path(self.weights or 'proxydet-r50-inl').stem}-{place}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated on.

    Attributes:
        truth: Annotations.
        groups: Sets of categories.
        split: The described split; None where only an annotation file was given.
    """

    truth: GroundTruth
    groups: Mapping[str, Any]
    split: DescribedSplit | None


def run(options: EvalOptions, output: Output) -> None:
    """Evaluate, write the files and show the numbers."""
    from proxydet.evaluation.output import analyse, write_files

    options.check()
    progress = _progress()
    if options.results is not None:
        subject = open_subject(options, progress)
        evaluation: Evaluation | None = _score(options.results, subject, options.config, progress)
        split = subject.split
    else:
        detector = _detector(options)
        description = _description(options)
        split = _open_split(description, options, progress)
        evaluation = _detect_and_score(detector, split, options, progress)
    if evaluation is None:  # another process of several shows the result
        return
    folder = options.folder(evaluation.report.dataset)
    analysis = analyse(evaluation, progress)
    with progress.task("writing report", total=None):
        written = write_files(
            evaluation,
            analysis,
            folder,
            read=None if split is None else split.images.read_id,
            commands=_next_commands(options, folder),
        )
    show(evaluation.report, analysis.to_dict(), output)
    output.message(f"written: {', '.join(str(path) for path in written.values())}")


def compare(first: Path, second: Path, options: EvalOptions, output: Output) -> None:
    """Say whether the second of two results is better than the first."""
    from proxydet.evaluation.compare import compare_results
    from proxydet.evaluation.tables import difference_rows

    if options.data is None:
        raise ConfigError(
            "--compare needs the data set that both results are of.",
            hint="--data with an annotation file (JSON) or a data description (TOML)",
        )
    progress = _progress()
    subject = open_subject(options, progress)
    compared = compare_results(
        results_of(first), results_of(second), subject.truth,
        config=options.config, groups=subject.groups, progress=progress,
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
    from proxydet.evaluation.tables import group_rows, metric_rows

    if output.json:
        output.data({**report.to_dict(), "analysis": analysis})
        return
    counts = report.counts
    output.message(
        f"{report.dataset}: {counts.detections} detections in {counts.images_with_detections} of {counts.images} images, "
        f"{counts.annotations} annotations, engine {report.engine}, in percent"
    )
    if report.fixed:
        output.warning("this is fixed AP; it cannot be compared with AP")
    output.table(metric_rows(report))
    if report.main.groups:
        output.data(None, "")
        output.table(group_rows(report))
    resampling = report.main.resampling
    if resampling is not None:
        output.message(
            f"±: {100 * resampling.confidence:g} % confidence, from {resampling.number} resamples of the images"
        )
        if resampling.rare is not None:
            scored, present = resampling.rare
            output.message(
                f"rare: {scored} categories are annotated, {present:.0f} of them in a resample on average"
            )


def results_of(place: Path) -> Path:
    """Return the results file that a path means: itself, or the one in an evaluation's folder.

    Raises:
        InputError: There is none.
    """
    if not place.is_dir():
        return place
    for file in (place / "predictions.json", place / PREDICTIONS / "predictions.json"):
        if file.is_file():
            return file
    raise InputError(
        f"{place} holds no finished predictions.",
        hint="give a results file, or the output folder of a finished proxydet eval",
        path=place,
    )


def open_subject(options: EvalOptions, progress: Progress) -> Subject:
    """Open the data set that results are scored on."""
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.groups import imagenet_groups

    if options.annotations_only():
        truth = GroundTruth.load(Path(options.data or ""))
        return Subject(truth=truth, groups=imagenet_groups(truth), split=None)
    split = _open_split(_description(options), options, progress)
    return Subject(truth=split.truth, groups=split.groups, split=split)


def _score(
    results: ResultsSource, subject: Subject, config: EvaluationConfig, progress: Progress
) -> Evaluation:
    from proxydet.evaluation.evaluate import run_evaluation

    return run_evaluation(
        results, subject.truth, config=config, groups=subject.groups, progress=progress
    )


def _detect_and_score(
    detector: Detector, split: DescribedSplit, options: EvalOptions, progress: Progress
) -> Evaluation | None:
    from proxydet.evaluation.detector_evaluation import evaluate_split

    folder = options.folder(split.description.name) / PREDICTIONS
    return evaluate_split(detector, split, folder, config=options.config, progress=progress)


def _detector(options: EvalOptions) -> Detector:
    from proxydet.detector import Detector
    from proxydet.detector_files import open_named

    return open_named(
        Detector,
        run=options.run,
        weights=options.weights,
        config=options.model,
        device=options.device,
    )


def _description(options: EvalOptions) -> DatasetDescription:
    """Read the data description that was named, or that the run was trained with."""
    from proxydet.data.description import DatasetDescription

    path = _description_path(options)
    if not path.is_file():
        raise DataError(
            f"there is no data description {path}",
            hint="--data takes a TOML file, or the name of a prepared data set: proxydet data prepare --help",
            path=path,
        )
    return DatasetDescription.from_toml(path)


def _description_path(options: EvalOptions) -> Path:
    from proxydet.paths import datasets_folder

    if options.data is not None:
        path = Path(options.data)
        if path.suffix or path.exists():
            return path
        return datasets_folder() / f"{options.data}.toml"
    if options.run is not None:
        from proxydet.recipes import resolve_config

        found = resolve_config(None, options.run / "config.yaml", []).data.description
        if found is not None:
            return found
    return datasets_folder() / "lvis.toml"


def _open_split(
    description: DatasetDescription, options: EvalOptions, progress: Progress
) -> DescribedSplit:
    from proxydet.evaluation.split import DescribedSplit

    if options.vocabulary is not None:
        spec = dataclasses.replace(description.vocabulary, embeddings=options.vocabulary.absolute())
        description = dataclasses.replace(description, vocabulary=spec)
    return DescribedSplit.open(description, options.split, progress=progress)


def _is_json(name: str) -> bool:
    return name.endswith((".json", ".json.gz"))


def _next_commands(options: EvalOptions, folder: Path) -> dict[str, str]:
    results = options.results or folder / PREDICTIONS / "predictions.json"
    data = "" if options.data is None else f" --data {shlex.quote(options.data)}"
    quoted = shlex.quote(str(results))
    commands = {
        f"proxydet eval --results {quoted}{data} --engine lvis": "Check the numbers with the official evaluators.",
        f"proxydet eval --compare {quoted} OTHER.json{data}": "Say whether another detector is better.",
    }
    return commands if options.data is not None else {}


def _progress() -> Progress:
    from proxydet_cli.progress import show_progress

    return show_progress(quiet=not _first_process())


def _first_process() -> bool:
    if "torch" not in sys.modules:
        return True
    from proxydet.training.distributed import launched_rank

    return launched_rank() == 0
