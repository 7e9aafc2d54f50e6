"""A whole training run: evaluation by the schedule, and plots at the end.

::

    from proxydet.recipes import resolve_config
    from proxydet.training_run import run_training

    config = resolve_config("small", overrides=["data.description=pets.toml"])
    result = run_training(config, output=Path("runs/pets"))
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torchvision.ops import box_iou

from proxydet.config import dump_yaml, from_mapping
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.detector import Detector, open_named
from proxydet.errors import ConfigError, InputError, LockedError, RuntimeEnvironmentError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import current_process, evaluate
from proxydet.evaluation.evaluate import check_protocol
from proxydet.evaluation.report import IOU_TYPE_NAMES, Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import JsonLines, read_json, sha256, write_json, write_text
from proxydet.models import (
    PUBLISHED_MODELS,
    NamedDetector,
    configuration_of,
    digests_of,
    newest_weights,
    run_of,
    vocabulary_of,
)
from proxydet.paths import step_of
from proxydet.recipes import RunConfig, get_recipe
from proxydet.reporting import SILENT, Progress
from proxydet.training.distributed import connect, launched_rank
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
from proxydet.visualization.report import Command, Section, Table, write_report
from proxydet.visualization.report import Report as Page
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import first_of

if TYPE_CHECKING:
    from torch import nn

    from proxydet.modeling.network import ProxyDetNetwork

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 32
_PROBE_SCORE = 0.3

Curves = dict[str, list[tuple[float, float]]]


def run_training(
    config: RunConfig,
    *,
    output: Path,
    resume: Resume = "auto",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a detector, evaluate it by the schedule where the data has validation images, plot the course; report a fine-tuning.

    Args:
        config: The whole configuration.
        output: The run folder.
        resume: What to do with checkpoints that are there.
        overwrite: With ``resume="never"``, remove the run that the folder holds.
        progress: Where progress is shown.

    Raises:
        ProxydetError: As `proxydet.training.train.train`, and what evaluation raises.
    """
    finetuned = config.training.finetune.start is not None
    # The report's predictions are shared between the processes, as those of the training's evaluations are.
    processes = connect(config.training.device, config.data.worker_timeout_s)
    with processes if finetuned else nullcontext():
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
        if finetuned:
            run = earlier_run(RunFolder(result.folder), RunConfig)
            config = keep_weights(config, [run] if run is not None else [])
            report = finetune_report(result.folder, config, progress=progress)
            result = dataclasses.replace(result, finetune=report)
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
    schedule = config.training.evaluation
    if earlier is None or not earlier.finished or not is_whole(folder, earlier, schedule):
        return None
    report: dict[str, Any] = {}
    with suppress(InputError):  # a damaged one is made again
        report = read_json(folder.report, default={})
    same = bool(report) and report.get("keep_check") == _keep_check(config)
    if config.training.finetune.start is not None and not same:
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
        finetune=report or None,
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
    _ = split.roots
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
            again=True,
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


# --- The report -------------------------------------------------------------------------------------------------------


def finetune_report(
    folder: Path, config: RunConfig, *, progress: Progress = SILENT
) -> dict[str, Any] | None:
    """Measure what a finished fine-tuning gained and what it forgot, and write it into its run folder.

    Own classes: the evaluations of the run before the first step and of the weights that the folder opens. Classes that were not
    trained: average precision of the starting and of the fine-tuned detector on the validation images of ``keep_check``, else of
    the starting detector's own data; where there are none, the objects of such classes that the starting detector finds in a few
    of the new images, and how many of them the fine-tuned one still finds.

    Args:
        folder: The run folder, finished.
        config: The run's configuration.
        progress: Where progress is shown.

    Returns:
        The report as JSON values, written as ``finetune.json``; None in processes other than the main one.

    Raises:
        DataError: The validation images cannot be used.
        ConfigError: The evaluation's settings do not fit them.
    """
    run, asked = RunFolder(folder), config.training.finetune
    info = current_process()
    evaluations = read_evaluations(JsonLines(run.evaluations))
    opened = newest_weights(folder)
    after = read_last_iteration(opened)
    classes = list(Vocabulary.load(run.vocabulary).names)
    content: dict[str, Any] = {
        "format": 1,
        "start": asked.start,
        "run": str(folder),
        "keep_check": _keep_check(config),
        "weights": opened.name,
        "own": {
            "classes": classes,
            "before": evaluations.get(0),
            "after": None if after is None else evaluations.get(after),
            "iteration": after,
        },
    }
    start, why = _named_start(folder, config)
    if start is None or vocabulary_of(start) is None:
        why = why or f"the classes of {asked.start} are not known"
        content["kept"] = {"how": "none", "why": why}
    else:
        before = open_named(start, device=config.training.device)
        masks = before.inference.masks and config.model.masks is not None
        before.inference = dataclasses.replace(before.inference, masks=masks)
        tuned = Detector.from_run(folder, device=config.training.device)
        check, why = _check_data(start, asked.keep_check)
        if check is not None:
            settings = EvaluationConfig(bootstrap=0, batch_size=config.evaluation.batch_size)
            scores = [
                evaluate(
                    detector,
                    check,
                    output=run.forgetting / name,
                    config=settings,
                    again=True,
                    progress=progress,
                )
                for name, detector in (("start", before), ("finetuned", tuned))
            ]
            if scores[0] is not None and scores[1] is not None:
                types = _compared(scores[0], scores[1], set(classes))
                data = str(asked.keep_check or check.name)
                content["kept"] = {"how": "ap", "data": data, "types": types}
        elif info.is_main:
            found = _probe(before, tuned, config, set(classes))
            content["kept"] = {"how": "probe", "why": why, **found}
    if not info.is_main:
        return None
    write_json(run.report, content)
    _write_page(run, content)
    return content


def _keep_check(config: RunConfig) -> str | None:
    path = config.training.finetune.keep_check
    return None if path is None else str(path)


def _named_start(folder: Path, config: RunConfig) -> tuple[NamedDetector | None, str]:
    """Return the starting detector of a fine-tuning; where it is gone, or not known, None and why."""
    name, weights = config.training.finetune.start, config.training.weights
    if weights is None:
        return None, ""
    if not weights.is_file():
        return None, f"the starting weights {weights} are not there any more"
    if digests_of(folder).get("weights", digest := sha256(weights)) != digest:
        return None, f"the starting weights {weights} changed since the run began"
    if name in PUBLISHED_MODELS:
        return NamedDetector(published=name), ""
    run = run_of(weights)
    return None if run is None else NamedDetector(run=run, weights=weights), ""


def _check_data(start: NamedDetector, asked: Path | None) -> tuple[DatasetConfig | None, str]:
    """Return the data set whose validation images show what is kept, or why there is none."""
    if asked is not None:
        return DatasetConfig.from_toml(asked), ""
    if start.run is None:
        why = f"no annotated images of other classes are given (--keep-check), and those of {start.published} take hours"
        return None, why
    path = from_mapping(RunConfig, configuration_of(start.run)).data.description
    try:
        data = DatasetConfig.from_toml(path) if path is not None else None
    except InputError as error:
        return None, error.message
    if data is None or data.val is None:
        return None, f"the data of {start.run} have no validation images"
    gone = [str(p) for p in (data.val.annotations, *data.val.roots) if not p.exists()]
    if gone:
        return None, f"the validation data of {start.run} are not there any more: {first_of(gone)}"
    return data, ""


def _compared(before: Report, after: Report, own: set[str]) -> dict[str, Any]:
    """Return the mean AP, as fractions, over the classes that were not trained, for boxes and masks, and a row a class."""
    found: dict[str, Any] = {}
    names = ("before_ap", "after_ap", "before_ap50", "after_ap50")
    for kind in before.types.keys() & after.types.keys():
        pairs = [
            (left.name, left.ap, right.ap, left.ap50, right.ap50)
            for left, right in zip(
                before.types[kind].categories, after.types[kind].categories, strict=True
            )
            if left.name.strip() not in own and left.ap is not None and right.ap is not None
        ]
        columns = list(zip(*pairs, strict=True)) or [()] * 5
        means = [sum(values) / len(values) if values else None for values in columns[1:]]
        found[kind] = {
            "classes": len(pairs),
            **dict(zip(names, means, strict=True)),
            "by_class": [{"name": n, "before_ap": b, "after_ap": a} for n, b, a, *_ in pairs],
        }
    return found


def _probe(before: Any, after: Any, config: RunConfig, own: set[str]) -> dict[str, Any]:
    """Return how many objects of other classes, that the starting detector finds in new images, the fine-tuned one still finds."""
    description = config.data.description
    if description is None:
        raise ConfigError("A fine-tuning has data: data.description is not set.")
    data = Dataset(config=DatasetConfig.from_toml(description), cache=config.data.cache)
    split = DescribedSplit.open(data, "train" if data.config.val is None else "val")
    other = before.vocabulary.subset([name for name in before.vocabulary.names if name not in own])
    images = min(len(split.store.image_ids), _PROBE_IMAGES)
    found = still = 0
    for index in range(images):
        pixels = split.read(index)
        old, new = (
            detector.predict(pixels, other, score_threshold=_PROBE_SCORE)
            for detector in (before, after)
        )
        found += len(old)
        if len(old) and len(new):
            same_ON = np.array(old.labels)[:, None] == np.array(new.labels)
            boxes = (torch.as_tensor(one.boxes_xyxy, dtype=torch.float64) for one in (old, new))
            near_ON = box_iou(*boxes).numpy() >= 0.5
            still += int((same_ON & near_ON).any(axis=1).sum())
    return {"images": images, "found_before": found, "found_after": still, "score": _PROBE_SCORE}


def report_text(content: Mapping[str, Any]) -> str:
    """Return a report for people to read, AP in percent."""
    lines = []
    for title, before, after, change in _scores(content):
        was = "" if before is None else f"{before:.1f} before, "
        gain = "" if change is None else f" ({change:+.1f})"
        lines.append(f"{title}: {was}{after:.1f} after{gain}")
    return "\n".join([*lines, *_notes(content)])


def _scores(content: Mapping[str, Any]) -> list[tuple[str, float | None, float, float | None]]:
    """Return what was measured: its name, AP before and after in percent, and the change."""
    own, kept = content["own"], content["kept"]
    found: list[tuple[str, float | None, float]] = []
    for metric, after in sorted((own["after"] or {}).items()):
        if metric.endswith(("/AP", "/AP50")):
            kind, _, name = metric.partition("/")
            title = f"{len(own['classes'])} own classes, {IOU_TYPE_NAMES[kind]} {name}"
            found.append((title, (own["before"] or {}).get(metric), after))
    for kind, part in sorted(kept.get("types", {}).items()):
        if part["before_ap"] is not None:
            title = f"{part['classes']} classes that were not trained, {IOU_TYPE_NAMES[kind]} AP"
            found.append((title, part["before_ap"], part["after_ap"]))
    return [
        (title, *((None, 100 * now, None) if old is None else _row(old, now)))
        for title, old, now in found
    ]


def _row(before: float, after: float) -> tuple[float, float, float]:
    return 100 * before, 100 * after, 100 * (after - before)


def _notes(content: Mapping[str, Any]) -> list[str]:
    """Return what was counted, and what was not measured and why."""
    own, kept = content["own"], content["kept"]
    lines = []
    if not own["after"]:
        why = "there are no validation images, or these weights were not evaluated on them"
        lines.append(f"{len(own['classes'])} own classes: not measured: {why}")
    untrained = "classes that were not trained"
    if kept["how"] == "ap":
        if any(part["before_ap"] is None for part in kept["types"].values()):
            lines.append(f"{untrained}: {kept['data']} has no annotations of them")
    elif kept["how"] == "probe":
        before, after = kept["found_before"], kept["found_after"]
        share = f" ({after / before:.0%})" if before else ""
        lines += [
            f"{untrained}: of {before} objects that the starting detector found in {kept['images']} of the new images, "
            f"{after}{share} are still found",
            f"their AP is not measured: {kept['why']}; --keep-check DATA.toml names annotated images of them",
        ]
    else:
        lines.append(f"{untrained}: not measured: {kept['why']}")
    return lines


def _write_page(folder: RunFolder, content: Mapping[str, Any]) -> None:
    columns, scores = ("AP in percent", "before", "after", "change"), _scores(content)
    tables = [Table(columns=columns, rows=scores)] if scores else ()
    notes = "\n\n".join(note[0].upper() + note[1:] for note in _notes(content))
    sections = [Section(title="Result", text=notes, tables=tables)]
    for kind, part in sorted(content["kept"].get("types", {}).items()):
        rows = [(row["name"], *_row(row["before_ap"], row["after_ap"])) for row in part["by_class"]]
        if rows:
            rows.sort(key=lambda row: row[3])
            table = Table(columns=("class", *columns[1:]), rows=rows)
            title = f"Classes that were not trained, {IOU_TYPE_NAMES[kind]} AP in percent"
            sections.append(Section(title=title, tables=[table]))
    run, words = shlex.quote(str(folder.root)), "mug, kettle"
    if (folder.root / "text_encoder.json").exists():  # which knows few words
        names = Vocabulary.load(folder.root / "vocabulary.npz").names
        others = [name for name in names if name not in content["own"]["classes"]]
        words = ", ".join((others or content["own"]["classes"])[:2])
    predict = f"proxydet predict --run {run} photo.jpg"
    commands = [
        Command(command=predict, does="Find your classes."),
        Command(command=f"{predict} -v {shlex.quote(words)}", does="Find any other classes."),
    ]
    sections.append(Section(title="Next", commands=commands))
    own = content["own"]
    summary = f"{len(own['classes'])} classes, from {content['start']}. The run folder opens {content['weights']}."
    write_report(
        Page(title="Fine-tuning", summary=summary, facts=(), sections=sections),
        folder.report_page,
    )
