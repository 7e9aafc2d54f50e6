"""What ``proxydet eval`` does with its options: open, predict or read, score, write, show."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet_cli.evaluation_options import (
    PREDICTIONS,
    EvalOptions,
    read_description,
    results_of,
)
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.data.dataset import DatasetConfig
    from proxydet.detector import Detector
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.evaluate import Evaluation, ResultsSource
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.report import Report
    from proxydet.evaluation.split import DescribedSplit
    from proxydet.reporting import Progress


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
    from proxydet.evaluation.records import record_results
    from proxydet.inference.writers import check_folder

    options.check()
    if options.output is not None:
        check_folder(options.output)
    progress = _progress()
    if options.results is not None:
        subject = open_subject(options, progress)
        evaluation = _score(options.results, subject, options.config, progress)
        record_results(
            options.folder(subject.truth.name), options.results, subject.truth, options.config
        )
        _conclude(evaluation, subject.split, options, output, progress)
        return
    description = read_description(options)
    with _processes(options, options.folder(description.name), json=output.json) as device:
        if device is None:
            return
        options = dataclasses.replace(options, device=device)
        split = _open_split(description, options, progress)
        try:
            detected = _detect_and_score(_detector(options), split, options, progress)
        except KeyboardInterrupt:
            output.message("stopped: the same command goes on from here")
            raise
        if detected is not None:  # the first process of several shows the result
            _conclude(detected, split, options, output, progress)


@contextlib.contextmanager
def _processes(options: EvalOptions, folder: Path, *, json: bool) -> Iterator[str | None]:
    """Give the device to work on here, or None when several processes have been started, and have done it."""
    import torch

    from proxydet.training.distributed import connect
    from proxydet.training.launch import launch, plan_launch, worker

    logs = folder / "logs"
    on_gpus = options.device in ("auto", "cuda") and torch.cuda.is_available()
    plan = plan_launch(
        gpus=options.gpus, whole_job=False, available=torch.cuda.device_count() if on_gpus else 1
    )
    if plan.started:
        with worker(logs), connect(options.device) as info:
            yield str(info.device)
    elif plan.torchrun:
        words = ["-m", "proxydet_cli", "eval", *options.words(), *(["--json"] if json else [])]
        launch(plan, words, logs)
        yield None
    else:
        yield options.device


def _conclude(
    evaluation: Evaluation,
    split: DescribedSplit | None,
    options: EvalOptions,
    output: Output,
    progress: Progress,
) -> None:
    """Write the files and show the numbers."""
    from proxydet.evaluation.analysis import analyse
    from proxydet.evaluation.page import write_files

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
    from proxydet.evaluation.evaluate import compare_results
    from proxydet.evaluation.report import difference_rows

    options.check_comparison()
    files = results_of(first), results_of(second)
    progress = _progress()
    subject = open_subject(options, progress)
    compared = compare_results(
        *files, subject.truth,
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
    from proxydet.data.protocol import PROTOCOL_NAMES
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


def open_subject(options: EvalOptions, progress: Progress) -> Subject:
    """Open the data set that results are scored on."""
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.split import imagenet_groups

    if options.annotations_only():
        truth = GroundTruth.load(Path(options.data or ""), protocol=options.config.protocol)
        return Subject(truth=truth, groups=imagenet_groups(truth), split=None)
    split = _open_split(read_description(options), options, progress)
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

    folder = options.folder(split.description.name)
    return evaluate_split(
        detector, split, folder / PREDICTIONS,
        records=folder, config=options.config, progress=progress,
    )  # fmt: skip


def _detector(options: EvalOptions) -> Detector:
    from proxydet.detector import Detector
    from proxydet.detector_files import open_named

    detector = open_named(
        Detector,
        run=options.run,
        weights=options.weights,
        config=options.model,
        device=options.device,
    )
    return detector.with_augmentation() if options.tta else detector


def _open_split(
    description: DatasetConfig, options: EvalOptions, progress: Progress
) -> DescribedSplit:
    from proxydet.evaluation.split import DescribedSplit

    if options.vocabulary is not None:
        spec = dataclasses.replace(description.classes, embeddings=options.vocabulary.absolute())
        description = dataclasses.replace(description, vocabulary=spec)
    return DescribedSplit.open(
        description, options.split, protocol=options.config.protocol, progress=progress
    )


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
