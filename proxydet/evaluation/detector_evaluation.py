"""From a detector to a report: predict what is not on disk yet, join, score."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed

from proxydet.data.dataset import DatasetConfig
from proxydet.errors import ConfigError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import (
    Evaluation,
    check_protocol,
    run_evaluation,
    scores_masks,
)
from proxydet.evaluation.prediction import (
    EvaluationTask,
    ImageDetector,
    Share,
    predict_split,
    weights_digest,
)
from proxydet.evaluation.prediction_files import PredictionFolder
from proxydet.evaluation.records import write_records
from proxydet.evaluation.report import Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary


def evaluate(
    detector: ImageDetector,
    description: DatasetConfig | Path | str,
    *,
    split: str = "val",
    output: Path | None = None,
    config: EvaluationConfig | None = None,
    progress: Progress = SILENT,
) -> Report | None:
    """Evaluate a detector on a data set.

    Predictions go to ``output`` as they are made; a stopped evaluation, started again with the same folder, goes on
    where it stopped. In a distributed run (torch.distributed is initialised) each process predicts its share, and the
    main one scores. The report is the same for any number of processes and any order of images.

    Args:
        detector: Finds objects.
        description: The data set, or its TOML file.
        split: ``"train"`` or ``"val"``.
        output: Where predictions are kept, with the records of what they were made from; None keeps predictions in a
            folder that is removed at the end (one process only).
        config: How to score.
        progress: Where progress is shown.

    Returns:
        The report; None in processes other than the main one.

    Raises:
        DataError: Annotations or images cannot be used, or the folder holds another detector's predictions.
        VocabularyError: The classes' embeddings do not fit the detector.
        DiskFullError: There is no room for the predictions.
    """
    config = config or EvaluationConfig()
    opened = DescribedSplit.open(description, split, protocol=config.protocol, progress=progress)
    evaluation = evaluate_split(
        detector, opened, output, records=output, config=config, progress=progress
    )
    return None if evaluation is None else evaluation.report


def evaluate_split(
    detector: ImageDetector,
    split: DescribedSplit,
    output: Path | None = None,
    *,
    records: Path | None = None,
    config: EvaluationConfig | None = None,
    progress: Progress = SILENT,
) -> Evaluation | None:
    """Do as `evaluate` on a split that is open, and keep what the report was made from.

    Args:
        detector: Finds objects.
        split: The images, their annotations and classes.
        output: Where predictions are kept, as for `evaluate`.
        records: Where ``manifest.json`` and ``environment.json`` are written; None writes none.
        config: How to score.
        progress: Where progress is shown.
    """
    config = config or EvaluationConfig()
    check_protocol(config, split.truth)
    share = current_share()
    if "segm" in config.iou_types and not detector.inference.masks:
        raise ConfigError(
            "Masks are to be scored, and the detector predicts none.",
            hint="score boxes only: --iou-type bbox",
        )
    masks = scores_masks(config, split.truth, predicted=detector.inference.masks)
    if not masks:
        config = dataclasses.replace(config, iou_types=("bbox",))
    settings = dataclasses.replace(detector.inference, masks=masks)
    if config.fixed:
        settings = dataclasses.replace(settings, max_detections=config.fixed_per_image)
    task = EvaluationTask.of(
        split.images,
        fusion_vocabulary(split.vocabulary, detector.vocabulary),
        settings,
        config.batch_size,
    )
    with _folder(output) as path:
        identity = _identity(detector, task)
        if share.rank == 0:
            # Before the others look: predictions that lack the masks wanted now are removed here.
            PredictionFolder(path, identity, masks=masks)
        wait_for_all(share)
        folder = PredictionFolder(path, identity, masks=masks)
        task = dataclasses.replace(task, settings=dataclasses.replace(settings, masks=folder.masks))
        if records is not None and share.rank == 0:
            _record(records, {**identity, "masks": folder.masks}, split, config, share)
        predict_split(detector, task, folder, share=share, progress=progress)
        wait_for_all(share)
        if share.rank > 0:
            return None
        results = folder.join(task.ids)
        return run_evaluation(
            results, split.truth, config=config, groups=split.groups, progress=progress
        )


@contextlib.contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    if current_share().processes > 1:
        raise ConfigError("Several processes need one folder to put their predictions in.")
    with tempfile.TemporaryDirectory(prefix="proxydet-eval-") as folder:
        yield Path(folder)


def _identity(detector: ImageDetector, task: EvaluationTask) -> dict[str, Any]:
    """Return what makes the predictions; masks are on top: those that have them serve where none are needed."""
    settings = dataclasses.asdict(task.settings)
    del settings["masks"]
    return {
        "weights": weights_digest(detector.network),
        "image sides": list(detector.sides),
        "inference settings": settings,
        "vocabulary": task.vocabulary.digest,
        "annotations": task.images.store.digest(),
    }


def _record(
    folder: Path,
    identity: dict[str, Any],
    split: DescribedSplit,
    config: EvaluationConfig,
    share: Share,
) -> None:
    """Write down what the evaluation is made from."""
    inputs = ("weights", "vocabulary", "annotations")
    chosen = {key: value for key, value in identity.items() if key not in inputs}
    write_records(
        folder,
        config,
        {name: identity[name] for name in inputs},
        {"dataset": split.description.name, "split": split.name, **chosen},
        processes=share.processes,
    )


def fusion_vocabulary(vocabulary: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """Return the classes to look for, marked base where the detector's fusion of scores shall treat them so.

    The classes that it was trained on keep the marks they had in training; of another vocabulary those are base whose
    text embedding has a cosine above 0.9 with one of a base class of training, as published.

    Args:
        vocabulary: What is looked for.
        trained: What the detector was trained on.
    """
    if len(vocabulary) == len(trained) and vocabulary.with_base(trained.base) == trained:
        return trained
    return vocabulary.base_by_similarity(trained.embeddings[trained.base])


def current_share() -> Share:
    """Return this process's share of the work: all of it outside of a distributed run."""
    if not _distributed():
        return Share()
    return Share(rank=torch.distributed.get_rank(), processes=torch.distributed.get_world_size())


def wait_for_all(share: Share) -> None:
    """Wait until every process has come here."""
    if share.processes > 1:
        torch.distributed.barrier()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
