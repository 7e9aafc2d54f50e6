"""Training from a configuration: data, vocabulary, network and losses are put together and handed to `fit`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from proxydet._version import __version__
from proxydet.compat.modes import Mode
from proxydet.compat.roi_align import reproducibility_mode
from proxydet.config import differences, dump_yaml, to_mapping
from proxydet.data.batches import Targets
from proxydet.data.config import DataConfig
from proxydet.data.dataset import DatasetConfig, image_counts, load_vocabulary, open_split
from proxydet.data.loader import TrainingLoader, TrainingSources, open_training_sources
from proxydet.data.store import AnnotationStore
from proxydet.errors import ConfigError
from proxydet.files import sha256, write_bytes, write_text
from proxydet.losses.config import LossConfig
from proxydet.losses.criterion import Criterion
from proxydet.manifest import build_manifest, write_run_records
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.weights import MASK_HEAD, MIXUP_BRANCH, load_weights
from proxydet.reporting import SILENT, Progress
from proxydet.training.checkpoint import read_iteration
from proxydet.training.config import TrainingConfig, scale_training
from proxydet.training.distributed import DistInfo, check_agreement, connect, wait_for_all
from proxydet.training.runfolder import (
    EVALUATION_KEYS,
    EarlierRun,
    Resume,
    RunFolder,
    after_restart,
    check_same,
    check_same_data,
    earlier_run,
)
from proxydet.training.step import check_precision, seed_everything
from proxydet.training.trainer import Evaluate, FitJob, TrainResult, fit
from proxydet.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# The recipes for CPUs have less than half of these, the published ones six times as many.
_MANY_PARAMETERS = 20_000_000


class RunSettings(Protocol):
    """What training reads of a run's configuration (`proxydet.recipes.RunConfig`)."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    @property
    def seed(self) -> int:
        """Seed of every random draw."""

    @property
    def reproducibility(self) -> Mode:
        """Reproducibility mode."""

    @property
    def data(self) -> DataConfig:
        """Data."""

    @property
    def model(self) -> ModelConfig:
        """Sizes of the detector."""

    @property
    def losses(self) -> LossConfig:
        """Losses."""

    @property
    def training(self) -> TrainingConfig:
        """Training."""


S = TypeVar("S", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class _Data:
    description: DatasetConfig
    vocabulary: Vocabulary
    sources: TrainingSources
    counts: Any
    digests: dict[str, str]


def train(
    config: S,
    *,
    output: Path,
    resume: Resume = "auto",
    overwrite: bool = False,
    evaluate: Evaluate | None = None,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a detector, alone or as one of the processes that a launcher started.

    Args:
        config: The whole configuration; see `proxydet.recipes`. Its training is scaled to the number of processes.
        output: The run folder; see `proxydet.training.runfolder`. Several machines must share it.
        resume: What to do with checkpoints that are there.
        overwrite: With ``resume="never"``, remove the run that the folder holds.
        evaluate: Evaluates the network by the schedule of the configuration.
        progress: Where progress is shown.

    Raises:
        ConfigError: The configuration does not fit the data, or the folder holds a run of another one.
        LockedError: Another training holds the folder.
        DataError: The data cannot be used.
        CheckpointError: The starting weights, or the checkpoints to resume from, do not fit.
        EnvironmentProblem: The machine cannot compute as configured.
        ProxydetError: As `proxydet.training.trainer.fit`.
    """
    resume = after_restart(resume)
    with ExitStack() as stack:
        ranks = stack.enter_context(connect(config.training.device))
        folder = RunFolder(output.resolve())
        still_ours = stack.enter_context(folder.held()) if ranks.is_main else lambda: None
        earlier = find_earlier(folder, config, resume, overwrite=overwrite)
        config, accumulation = continue_run(config, earlier, ranks)
        settings = config.training
        check_precision(settings.precision, ranks.device)
        stack.enter_context(reproducibility_mode(config.reproducibility))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        for run in earlier:
            check_same(folder, run, config, before_data=True)
        config, data = _open_data(config, ranks, progress)
        for run in earlier:
            check_same(folder, run, config)
            check_same_data(folder, run, data.digests)
        digests = dict(data.digests)
        if settings.weights is not None and settings.weights.is_file():
            digests["weights"] = sha256(settings.weights)
        facts = {"configuration": dump_yaml(config, comments=False), **data.digests}
        check_agreement(ranks, {**facts, "accumulation": str(accumulation)})
        resumes = isinstance(resume, Path) or (
            resume == "auto" and any(folder.checkpoints.glob("step_*.pth"))
        )
        network = _build_network(config, data, from_weights=not resumes)
        if ranks.is_main:
            warn_of_slow_device(network, ranks.device)
            if overwrite and resume == "never":
                folder.clear()
            changed = [key for run in earlier for key in differences(run.config, config)]
            if any(key.startswith(EVALUATION_KEYS) for key in changed):
                folder.remove_unfinished_evaluations()
            _write_folder(folder, config, data, digests, ranks)
        wait_for_all(ranks)

        def make_loader(batches: int, draws: int) -> TrainingLoader:
            return TrainingLoader(
                data.sources,
                config.data,
                rank=ranks.rank,
                world_size=ranks.world_size,
                seed=config.seed,
                start=draws if config.data.ranks_share_group else batches,
            )

        timeout = config.data.worker_timeout_s
        job = FitJob(
            config=settings,
            folder=folder,
            ranks=ranks,
            seed=config.seed,
            accumulation=accumulation,
            # A little longer than the loader itself waits for its workers.
            loader_timeout=timeout + 30.0 if timeout else None,
            resume=resume,
            run=json.dumps({"configuration": to_mapping(config), "digests": digests}),
            about={
                "proxydet": __version__,
                "recipe": config.recipe,
                "classes": data.vocabulary.names,
                "vocabulary_sha256": data.vocabulary.digest,
                "model": to_mapping(config.model),
            },
            still_ours=still_ours,
            evaluate=evaluate,
            progress=progress,
        )
        return fit(network, Criterion(config.losses), make_loader, job)


def find_earlier(
    folder: RunFolder, config: S, resume: Resume, *, overwrite: bool = False
) -> list[EarlierRun[S]]:
    """Return the runs that a training continues: that in its folder, and that of the checkpoint that is given.

    Raises:
        ConfigError: The folder holds a run, and a new one is to be started.
        CheckpointError: The checkpoint is absent or damaged.
    """
    if resume == "never" and overwrite:
        return []
    here = earlier_run(folder, type(config))
    if resume == "never" and here is not None:
        raise ConfigError(
            f"{folder.root} already holds a run.",
            hint="train in another folder (--output), resume the run (--resume auto), or remove it: "
            "--resume never --overwrite",
            path=folder.root,
        )
    found = [] if here is None else [here]
    if isinstance(resume, Path):
        read_iteration(resume)
        own = resume.parent.parent if resume.parent.name == "checkpoints" else resume
        if here is None or own.resolve() != folder.root.resolve():
            other = earlier_run(RunFolder(own), type(config), resume)
            if other is None:
                logger.warning(
                    "Nothing tells with which settings %s was written; they are not compared",
                    resume,
                )
            else:
                found.append(other)
    return found


def continue_run(config: S, earlier: Sequence[EarlierRun[S]], ranks: DistInfo) -> tuple[S, int]:
    """Return a run's configuration, and how many batches this many processes accumulate.

    A new run is scaled to its number of processes; see `scale_training`. A run that is resumed keeps what an iteration was in
    it, so that its schedule continues. On another number of processes, a step keeps its number of batches where they share
    it evenly; otherwise, or where another accumulation is asked for, the learning rate is scaled and progress is counted in
    batches.
    """
    training = config.training
    if not earlier:
        return scale_run(config, ranks.world_size), training.accumulation
    before = earlier[-1].config.training
    scaled = scale_training(training, before.replicas)
    accumulation = training.accumulation
    if accumulation == before.accumulation and before.replicas % ranks.world_size == 0:
        accumulation = before.replicas // ranks.world_size
    batches = accumulation * ranks.world_size
    processes = before.replicas // before.accumulation
    if ranks.is_main and (processes, before.accumulation) != (ranks.world_size, accumulation):
        k = batches / before.replicas
        rate = f"; learning rates are multiplied by {k:g}" if training.scaling == "linear" else ""
        logger.warning(
            "Resuming on %d processes with accumulation %d instead of %d with %d: %s",
            ranks.world_size,
            accumulation,
            processes,
            before.accumulation,
            "as many batches a step as before"
            if k == 1
            else f"{batches} batches a step instead of {before.replicas}{rate}; an iteration takes {1 / k:g} steps",
        )
    scaled = dataclasses.replace(scaled, accumulation=before.accumulation)
    return cast("S", dataclasses.replace(cast("Any", config), training=scaled)), accumulation


def same_finished_run(folder: RunFolder, config: S) -> bool:
    """Whether a folder holds a run of these settings that is finished.

    Raises:
        ConfigError: It holds a run, and nothing tells with which settings.
    """
    earlier = earlier_run(folder, type(config))
    if earlier is None or not earlier.finished:
        return False
    try:
        check_same(
            folder, earlier, scale_to(config, earlier.config.training.replicas), before_data=True
        )
    except ConfigError:
        return False
    return True


def scale_to(config: S, replicas: int) -> S:
    """Return a configuration whose training is scaled to a number of batches an iteration; see `scale_training`."""
    training = scale_training(config.training, replicas)
    return cast("S", dataclasses.replace(cast("Any", config), training=training))


def scale_run(config: S, processes: int) -> S:
    """Return a run's configuration with its training scaled to a number of processes; see `scale_training`."""
    return scale_to(config, processes * config.training.accumulation)


def fit_to_embeddings(config: S, dimension: int) -> S:
    """Return a run's configuration with a classifier of as many dimensions as the data's text embeddings.

    Raises:
        ConfigError: They differ, and starting weights fix the number.
    """
    model, weights = config.model, config.training.weights
    asked = model.classifier.embedding_dim
    if asked == dimension:
        return config
    if weights is not None:
        raise ConfigError(
            f"The data's text embeddings have {dimension} dimensions; model.classifier.embedding_dim is {asked}.",
            hint=f"Embed the class names with the text encoder of {weights}; if its weights have {dimension} dimensions, "
            f"add --set model.classifier.embedding_dim={dimension}.",
        )
    logger.warning(
        "model.classifier.embedding_dim is %d, as the data's text embeddings have it, not %d",
        dimension,
        asked,
    )
    classifier = dataclasses.replace(model.classifier, embedding_dim=dimension)
    fitted = dataclasses.replace(model, classifier=classifier)
    return cast("S", dataclasses.replace(cast("Any", config), model=fitted))


def fit_to_masks(config: S, store: AnnotationStore, vocabulary: Vocabulary) -> tuple[S, str]:
    """Decide whether masks are trained.

    Args:
        config: The configuration.
        store: The training annotations.
        vocabulary: The classes.

    Returns:
        The configuration with ``data.masks`` true, or with ``data.masks`` false and no mask head; and a line about objects
        without masks, empty where there is nothing to say.

    Raises:
        ConfigError: Masks are to be trained by a model without a mask head.
        DataError: Masks are to be trained, and no object has one.
    """
    asked, head = config.data.masks, config.model.masks
    if head is None and asked is True:
        raise ConfigError(
            "data.masks is true, and model.masks is null: there is no mask head to train.",
            hint="set data.masks to auto, or give the model a mask head: --set 'model.masks={}'",
        )
    targets = Targets.of(store, vocabulary, False if head is None else asked)
    fitted = dataclasses.replace(
        cast("Any", config),
        data=dataclasses.replace(config.data, masks=targets.masks),
        model=dataclasses.replace(config.model, masks=head if targets.masks else None),
    )
    usable = targets.usable(store)
    without = int((usable & ~store.masked_A).sum())
    note = ""
    if not targets.masks and asked == "auto":
        reason = (
            "model.masks is null"
            if head is None
            else f"no object in {store.source_name} has a mask"
        )
        note = f"{reason}: training a detector of boxes, without a mask head"
    elif targets.masks and without:
        note = (
            f"{without} of {int(usable.sum())} objects in {store.source_name} have no mask: "
            "they train boxes and classes only"
        )
    return cast("S", fitted), note


def _open_data(config: S, ranks: DistInfo, progress: Progress) -> tuple[S, _Data]:
    """Open the data, and return the configuration that fits it."""
    settings = config.data
    if settings.description is None:
        raise ConfigError(
            "There is no data to train on: data.description is not set.",
            hint="Give a dataset config: --data DATA.toml. docs/reference/dataset-config.md says what it holds.",
        )
    description = DatasetConfig.from_toml(settings.description)
    vocabulary = load_vocabulary(description, cache=settings.cache, progress=progress)
    store = open_split(description, "train", cache=settings.cache, progress=progress)
    config, note = fit_to_masks(config, store, vocabulary)
    if note and ranks.is_main:
        logger.warning("%s", note)
    config = fit_to_embeddings(config, vocabulary.dimension)
    sources = open_training_sources(config.data, description, progress=progress)
    return config, _Data(
        description=description,
        vocabulary=vocabulary,
        sources=sources,
        counts=image_counts(store, vocabulary, with_novel=settings.count_novel_classes),
        digests={
            "vocabulary": vocabulary.digest,
            # Of the annotations, whatever the version of their store.
            "annotations": store.path.stem.partition("-v")[0],
            **sources.digests(),
        },
    )


def _build_network(config: RunSettings, data: _Data, *, from_weights: bool) -> ProxyDetNetwork:
    """Build the network with fresh weights, the same everywhere, and load the starting weights where it begins."""
    seed_everything(config.seed)
    network = ProxyDetNetwork(config.model, data.vocabulary, data.counts)
    settings = config.training
    if settings.weights is not None and from_weights:
        expect = (*settings.ignore_in_weights, *MIXUP_BRANCH)
        report = load_weights(network, settings.weights, expect=expect, vocabulary="keep")
        logger.info("Starting from %s: %s", settings.weights, report)
        if any(name.startswith(MASK_HEAD) for name in report.ignored):
            logger.warning("%s: the weights of its mask head are not used", settings.weights)
    return network


def warn_of_slow_device(network: torch.nn.Module, device: torch.device) -> None:
    """Say that a network of the published sizes takes very long on a CPU."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if device.type == "cpu" and parameters > _MANY_PARAMETERS:
        logger.warning(
            "Training %.0f million parameters on a CPU takes very long; --dry-run estimates how long.",
            parameters / 1e6,
        )


def _write_folder(
    folder: RunFolder,
    config: RunSettings,
    data: _Data,
    digests: Mapping[str, str],
    ranks: DistInfo,
) -> None:
    """Write down what the run is made from."""
    write_text(folder.config, dump_yaml(config))
    data.vocabulary.save(folder.vocabulary)
    encoder = data.description.classes.encoder
    if encoder is not None and Path(encoder).suffix == ".json" and Path(encoder).is_file():
        write_bytes(folder.text_encoder, Path(encoder).read_bytes())
    manifest = build_manifest(
        "training",
        configuration=to_mapping(config),
        digests=digests,
        mode=config.reproducibility,
        seeds={"seed": config.seed},
        world_size=ranks.world_size,
    )
    write_run_records(folder.root, manifest)
