"""A whole training run: evaluation by the schedule, and plots at the end.

::

    from proxydet.recipes import resolve_config
    from proxydet.training_run import run_training

    config = resolve_config("small", overrides=["data.description=pets.toml"])
    result = run_training(config, output=Path("runs/pets"))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

from proxydet.data.dataset import DatasetConfig
from proxydet.detector import Detector
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.evaluation.report import Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import JsonLines, write_json
from proxydet.recipes import RunConfig
from proxydet.reporting import SILENT, Progress
from proxydet.training.distributed import launched_rank
from proxydet.training.logs import iteration_of, read_evaluations
from proxydet.training.runfolder import Resume, RunFolder
from proxydet.training.train import train
from proxydet.training.trainer import Evaluate, TrainResult, best_of
from proxydet.visualization.plots import loss_plot, save_figure

if TYPE_CHECKING:
    from torch import nn

    from proxydet.modeling.network import ProxyDetNetwork

Curves = dict[str, list[tuple[float, float]]]


def run_training(
    config: RunConfig,
    *,
    output: Path,
    resume: Resume = "auto",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a detector, evaluate it by the schedule where the data has validation images, and plot the course.

    Args:
        config: The whole configuration.
        output: The run folder.
        resume: What to do with checkpoints that are there.
        overwrite: With ``resume="never"``, remove the run that the folder holds.
        progress: Where progress is shown.

    Raises:
        ProxydetError: As `proxydet.training.train.train`, and what evaluation raises.
    """
    result = train(
        config,
        output=output,
        resume=resume,
        overwrite=overwrite,
        evaluate=scheduled_evaluation(config, progress),
        progress=progress,
    )
    if launched_rank() == 0:
        plot_run(RunFolder(result.folder))
    return result


def finished_run(folder: RunFolder, config: RunConfig) -> TrainResult:
    """Return what a run that is finished gave, from its records."""
    records = [record for record in JsonLines(folder.metrics).read() if "losses" in record]
    last = records[-1] if records else {}
    evaluations = read_evaluations(JsonLines(folder.evaluations))
    return TrainResult(
        folder=folder.root,
        weights=folder.final_weights,
        iterations=iteration_of(last) if last else config.training.iterations,
        losses=last.get("losses", {}),
        evaluations=evaluations,
        best=best_of(evaluations, config.training.evaluation.metric),
        skipped=last.get("skipped", 0),
        seconds=0.0,
    )


def scheduled_evaluation(config: RunConfig, progress: Progress = SILENT) -> Evaluate | None:
    """Return what training calls to evaluate the network; None where the data has no validation images.

    Raises:
        DataError: The dataset config, or its validation part, cannot be used.
        VocabularyError: Its class names and embeddings do not fit each other.
    """
    if config.data.description is None:
        return None
    description = DatasetConfig.from_toml(config.data.description)
    if description.val is None:
        return None
    # What evaluation would refuse is refused here, before hours of training.
    _ = DescribedSplit.open(description, progress=progress).images

    def evaluate_network(network: nn.Module, iteration: int, folder: Path) -> dict[str, float]:  # noqa: ARG001
        detector = Detector(
            cast("ProxyDetNetwork", network),
            inference=config.inference,
            shortest=config.data.test_shortest_side,
            longest=config.data.test_longest_side,
        )
        report = evaluate(
            detector,
            description,
            output=folder / "predictions",
            config=config.evaluation,
            progress=progress,
        )
        if report is None:
            return {}
        write_json(folder / "report.json", report.to_dict())
        return flat_metrics(report)

    return evaluate_network


def flat_metrics(report: Report) -> dict[str, float]:
    """Return a report's metrics by one name each: ``segm/AP``, ``segm/AP50 novel``; what was not measured is left out.

    The first is the average precision over all classes, of masks where masks were scored.
    """
    order = sorted(report.types.items(), key=lambda item: item[1] is not report.main)
    values: dict[str, float | None] = {}
    for kind, part in order:
        prefix = f"{kind}/{report.metric_prefix}"
        values.update({f"{prefix}{name}": value for name, value in part.metrics.items()})
        for group in part.groups:
            values[f"{prefix}AP {group.name}"] = group.ap
            values[f"{prefix}AP50 {group.name}"] = group.ap50
    return {name: value for name, value in values.items() if value is not None}


def plot_run(folder: RunFolder) -> list[Path]:
    """Plot the losses and the evaluation metrics of a run into its ``plots`` folder.

    Returns:
        The files that were written.
    """
    groups = {
        "losses": _curves(folder.metrics, "losses"),
        "evaluations": _curves(folder.evaluations, "metrics"),
    }
    written = []
    for name, curves in groups.items():
        if curves:
            folder.plots.mkdir(parents=True, exist_ok=True)
            path = folder.plots / f"{name}.png"
            save_figure(loss_plot(curves), path)
            written.append(path)
    return written


def _curves(path: Path, key: str) -> Curves:
    """Read one curve for each name from a file of JSON lines."""
    curves: Curves = {}
    for record in JsonLines(path).read():
        values = record.get(key)
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((iteration_of(record), value))
    return curves
