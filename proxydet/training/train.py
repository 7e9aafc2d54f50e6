"""Training from a configuration: data, vocabulary, network and losses are put together and handed to `fit`."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from proxydet.compat.modes import Mode
from proxydet.compat.roi_align import reproducibility_mode
from proxydet.config import dump_yaml, to_mapping
from proxydet.data.classes import image_counts, load_vocabulary, open_split
from proxydet.data.config import DataConfig
from proxydet.data.description import DatasetDescription
from proxydet.data.instances import Targets
from proxydet.data.loader import open_training_sources
from proxydet.data.store import AnnotationStore
from proxydet.data.stream import Place, TrainingLoader
from proxydet.data.training_sources import TrainingSources
from proxydet.errors import ConfigError
from proxydet.losses.config import LossConfig
from proxydet.losses.criterion import Criterion
from proxydet.manifest import build_manifest, file_digest, write_run_records
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.weights import MASK_HEAD, MIXUP_BRANCH, load_weights
from proxydet.reporting import SILENT, Progress
from proxydet.training.config import TrainingConfig
from proxydet.training.continuation import check_folder
from proxydet.training.distributed import DistInfo, check_agreement, connect, wait_for_all
from proxydet.training.fit import FitJob, Resume, TrainResult, fit
from proxydet.training.loop import Evaluate
from proxydet.training.precision import check_precision
from proxydet.training.runfolder import RunFolder
from proxydet.training.scaling import scale_training
from proxydet.training.seeding import seed_everything
from proxydet.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# The recipes for CPUs have less than half of these, the published ones six times as many.
_MANY_PARAMETERS = 20_000_000


class RunSettings(Protocol):
    """What training reads of a run's configuration (`proxydet.recipes.RunConfig`)."""

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
    description: DatasetDescription
    vocabulary: Vocabulary
    sources: TrainingSources
    counts: Any
    digests: dict[str, str]


def train(
    config: RunSettings,
    *,
    output: Path,
    resume: Resume = "auto",
    evaluate: Evaluate | None = None,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a detector, alone or as one of the processes that a launcher started.

    Args:
        config: The whole configuration; see `proxydet.recipes`. Its training is scaled to the number of processes.
        output: The run folder; see `proxydet.training.runfolder`. Several machines must share it.
        resume: What to do with checkpoints that are there.
        evaluate: Evaluates the network by the schedule of the configuration.
        progress: Where progress is shown.

    Raises:
        ConfigError: The configuration does not fit the data, or the folder holds a run of another one.
        DataError: The data cannot be used.
        CheckpointError: The starting weights, or the checkpoints to go on with, do not fit.
        EnvironmentProblem: The machine cannot compute as it is told.
        ProxydetError: As `proxydet.training.fit.fit`.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(connect(config.training.device))
        config = scale_run(config, ranks.world_size)
        settings = config.training
        check_precision(settings.precision, ranks.device)
        stack.enter_context(reproducibility_mode(config.reproducibility))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        folder = RunFolder(output.resolve())
        config, data = _open_data(config, ranks, progress)
        starts_anew = check_folder(folder, to_mapping(config), digests=data.digests, resume=resume)
        check_agreement(ranks, _facts(config, data))
        network = _build_network(config, data, from_weights=starts_anew)
        if ranks.is_main:
            warn_of_slow_device(network, ranks.device)
            _write_folder(folder, config, data, ranks)
        wait_for_all(ranks)

        def make_loader(start: int) -> TrainingLoader:
            place = Place(
                rank=ranks.rank,
                world_size=ranks.world_size,
                seed=config.seed,
                start_iteration=start,
            )
            return TrainingLoader(data.sources, config.data, place)

        job = FitJob(
            config=settings,
            folder=folder,
            ranks=ranks,
            seed=config.seed,
            loader_timeout=_patience(config.data),
            resume=resume,
            evaluate=evaluate,
            progress=progress,
        )
        return fit(network, Criterion(config.losses), make_loader, job)


def scale_run(config: S, processes: int) -> S:
    """Return a run's configuration with its training scaled to a number of processes; see `scale_training`."""
    training = config.training
    scaled = scale_training(training, processes * training.accumulation)
    return cast("S", dataclasses.replace(cast("Any", config), training=scaled))


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
            hint="Give a data description: --data DATA.toml. docs/reference/data-description.md says what it holds.",
        )
    description = DatasetDescription.from_toml(settings.description)
    vocabulary = load_vocabulary(description, cache=settings.cache, progress=progress)
    store = open_split(description, "train", cache=settings.cache, progress=progress)
    config, note = fit_to_masks(config, store, vocabulary)
    if note and ranks.is_main:
        logger.warning("%s", note)
    config = fit_to_embeddings(config, vocabulary.dimension)
    return config, _Data(
        description=description,
        vocabulary=vocabulary,
        sources=open_training_sources(config.data, description, progress=progress),
        counts=image_counts(store, vocabulary, with_novel=settings.count_novel_classes),
        digests={"vocabulary": vocabulary.digest, "annotations": store.path.stem},
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


def _patience(config: DataConfig) -> float | None:
    """Seconds to wait for a batch: a little longer than the loader itself waits for its workers."""
    return config.worker_timeout_s + 30.0 if config.worker_timeout_s else None


def _facts(config: RunSettings, data: _Data) -> dict[str, str]:
    """Return what all processes must have in common."""
    return {"configuration": dump_yaml(config, comments=False), **data.digests}


def _write_folder(folder: RunFolder, config: RunSettings, data: _Data, ranks: DistInfo) -> None:
    """Write down what the run is made from."""
    folder.root.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a run that goes on on a full disk must not lose what it is compared with.
    temporary = folder.config.with_name(f".{folder.config.name}.new")
    try:
        temporary.write_text(dump_yaml(config), encoding="utf-8")
        temporary.replace(folder.config)
    finally:
        temporary.unlink(missing_ok=True)
    data.vocabulary.save(folder.vocabulary)
    encoder = data.description.vocabulary.encoder
    if encoder is not None and Path(encoder).suffix == ".json" and Path(encoder).is_file():
        shutil.copyfile(encoder, folder.text_encoder)
    digests = dict(data.digests)
    weights = config.training.weights
    if weights is not None and weights.is_file():
        digests["weights"] = file_digest(weights)
    manifest = build_manifest(
        "training",
        configuration=to_mapping(config),
        digests=digests,
        mode=config.reproducibility,
        seeds={"seed": config.seed},
        world_size=ranks.world_size,
    )
    write_run_records(folder.root, manifest)
