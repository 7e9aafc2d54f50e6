"""A whole training run: evaluation by the schedule, and plots at the end.

::

    from proxydet.recipes import resolve_config
    from proxydet.training_run import run_training

    config = resolve_config("small", overrides=["data.description=pets.toml"])
    result = run_training(config, output=Path("runs/pets"))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from proxydet.config import dump_yaml
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.detector import Detector
from proxydet.errors import ConfigError, LockedError, RuntimeEnvironmentError
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.evaluation.evaluate import check_protocol
from proxydet.evaluation.report import Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import JsonLines, write_json, write_text
from proxydet.recipes import RunConfig, get_recipe
from proxydet.reporting import SILENT, Progress
from proxydet.training.checkpoint import step_of
from proxydet.training.distributed import launched_rank
from proxydet.training.logs import best_of, iteration_of, read_evaluations, read_steps
from proxydet.training.runfolder import (
    Resume,
    RunFolder,
    earlier_run,
    is_whole,
    keep_weights,
    read_last_iteration,
    same_run,
)
from proxydet.training.train import Evaluate, TrainResult, train
from proxydet.visualization.plots import loss_plot, save_figure
from proxydet.visualization.reference import read_reference

if TYPE_CHECKING:
    from torch import nn

    from proxydet.modeling.network import ProxyDetNetwork

logger = logging.getLogger(__name__)

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


def finished_run(folder: RunFolder, config: RunConfig) -> TrainResult | None:
    """Return what a finished run gave, from its records; None where training has something to do in the folder.

    What a run can be completed by without training is: plots that a kill prevented, a lost or damaged ``config.yaml``.

    Args:
        folder: The run folder; may be absent.
        config: The configuration, before scaling. A run with other settings is for `run_training` to refuse.

    Raises:
        CheckpointError: The run is finished, and a file of it is damaged that cannot be written again.
    """
    try:
        earlier = same_run(folder, config)
    except ConfigError:
        return None
    if (
        earlier is None
        or not earlier.finished
        or not is_whole(folder, earlier, config.training.evaluation)
    ):
        return None
    keep_weights(config, [earlier])
    # Unless another one is at it, or nothing can be written there.
    with suppress(LockedError, RuntimeEnvironmentError), folder.held():
        if earlier.source != folder.config:
            write_text(folder.config, dump_yaml(earlier.config))
            logger.warning("wrote %s again, from %s", folder.config, earlier.source)
        plot_run(folder, again=False)
    records = read_steps(JsonLines(folder.metrics))
    planned = earlier.config.training.iterations
    iterations = read_last_iteration(folder.final_weights) or planned
    last = records[-1] if records and iteration_of(records[-1]) == iterations else {}
    evaluations = read_evaluations(JsonLines(folder.evaluations))
    if not last:
        logger.warning(
            "%s is missing or holds no record of iteration %d, the last: the losses of this finished run are not known; its "
            "weights are whole",
            folder.metrics,
            iterations,
        )
    reports = folder.root.glob("evaluations/step_*/report.json")
    if {step_of(path.parent.name) for path in reports} - {None, *evaluations}:
        logger.warning(
            "%s is missing or lacks records: see evaluations/ for the metrics", folder.evaluations
        )
    return TrainResult(
        folder=folder.root,
        weights=folder.final_weights,
        iterations=iterations,
        losses=last.get("losses", {}),
        evaluations=evaluations,
        best=best_of(evaluations, config.training.evaluation.metric),
        stopped_early=iterations < planned,
        skipped=skipped if type(skipped := last.get("skipped")) is int else 0,
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
    data = Dataset(config=description, cache=config.data.cache, progress=progress)
    # What evaluation would refuse is refused here, before hours of training.
    split = DescribedSplit.open(data, protocol=config.evaluation.protocol)
    _ = split.images
    check_protocol(config.evaluation, split.truth)

    def evaluate_network(network: nn.Module, iteration: int, folder: Path) -> dict[str, float]:  # noqa: ARG001
        detector = Detector(
            cast("ProxyDetNetwork", network),
            inference=config.inference,
            shortest=config.data.test_shortest_side,
            longest=config.data.test_longest_side,
        )
        report = evaluate(
            detector,
            data,
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


def plot_run(folder: RunFolder, *, again: bool = True) -> list[Path]:
    """Plot the losses and the evaluation metrics of a run into its ``plots`` folder.

    Args:
        folder: The run folder.
        again: Whether those that are there are drawn again.

    Returns:
        The files that were written.
    """
    steps, evaluations = read_steps(JsonLines(folder.metrics)), JsonLines(folder.evaluations)
    groups = {
        "losses": _curves((record["iteration"], record["losses"]) for record in steps),
        "evaluations": _curves(read_evaluations(evaluations).items()),
    }
    written = []
    for name, curves in groups.items():
        path = folder.plots / f"{name}.png"
        if curves and (again or not path.exists()):
            save_figure(loss_plot(curves), path)
            written.append(path)
    return written


def plot_reference(folder: RunFolder, log: Path) -> Path:
    """Plot a run's losses next to those of a detectron2 log, into ``plots/reference.png``.

    Iterations are those of the recipe's number of batches a step, which a published log counts too: a run of fewer has more of them.

    Args:
        folder: The run folder, of a run that began.
        log: What `read_reference` reads.

    Returns:
        The file that was written.

    Raises:
        DataError: The log cannot be used.
    """
    reference = read_reference(log)
    run = earlier_run(folder, RunConfig)
    stretch = 1.0
    if run is not None and run.config.training.scaling == "linear":
        recipe = get_recipe(run.config.recipe).training
        stretch = run.config.training.replicas / recipe.replicas
    steps = read_steps(JsonLines(folder.metrics))
    curves = _curves((record["iteration"] * stretch, record["losses"]) for record in steps)
    if not set(curves) & set(reference):
        logger.warning(
            "no loss of %s has a name of this run's: %s", log, ", ".join(sorted(reference)[:8])
        )
    # What both have comes first.
    names = sorted(curves, key=lambda name: name not in reference)
    path = folder.plots / "reference.png"
    save_figure(loss_plot({name: curves[name] for name in names}, reference=reference), path)
    return path


def _curves(points: Iterable[tuple[float, dict[str, float]]]) -> Curves:
    """Return one curve for each name from values by iteration."""
    curves: Curves = {}
    for iteration, values in points:
        for name, value in values.items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((iteration, value))
    return curves
