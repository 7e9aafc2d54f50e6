"""Training: from a configuration (`train`), or from a network, losses and batches (`fit`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from proxydet._version import __version__
from proxydet.config import dump_yaml, merge, to_mapping
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.loader import Targets, TrainingLoader, TrainingSources
from proxydet.data.store import AnnotationStore
from proxydet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    JobInterruptedError,
    RuntimeEnvironmentError,
    TrainingError,
    VocabularyError,
)
from proxydet.extensions import load_extension, python_path, require_signature, source_digests
from proxydet.files import sha256, write_bytes, write_text
from proxydet.losses.criterion import Losses, build_criterion
from proxydet.manifest import build_manifest, write_run_records
from proxydet.modeling.backbone import how_to_get_timm, pixel_statistics
from proxydet.modeling.config import BACKBONES
from proxydet.modeling.network import ProxyDetNetwork, usable_precision
from proxydet.modeling.precision import tf32_kept
from proxydet.modeling.weights import MASK_HEAD, MIXUP_BRANCH, load_weights
from proxydet.models import (
    PUBLISHED_MODELS,
    NamedDetector,
    digests_of,
    run_encoder,
    run_of,
    run_vocabulary,
    vocabulary_of,
)
from proxydet.reporting import SILENT, Progress
from proxydet.runtime.modes import reproducibility_mode
from proxydet.runtime.processes import keep_freed_memory
from proxydet.training.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_checkpoint,
)
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import (
    START_AGAIN,
    DistInfo,
    broadcast_value,
    check_agreement,
    connect,
    share_statistics,
    wait_for_all,
    wrap_for_ranks,
)
from proxydet.training.logs import Best, MetricLogger, best_of, find_loggers, stopped_early
from proxydet.training.runfolder import (
    Resume,
    RunFolder,
    after_restart,
    check_same,
    check_same_data,
    prepare,
    read_last_iteration,
)
from proxydet.training.step import (
    TrainingModel,
    apply_precision,
    build_optimizer,
    build_scaler,
    check_precision,
    freeze,
    seed_everything,
    train_step,
)
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import read_safetensors, write_safetensors, write_state

if TYPE_CHECKING:
    from proxydet.recipes import RunConfig

logger = logging.getLogger(__name__)

# Millions. The recipes for CPUs have less than half of these, the published ones six times as many.
_MANY_PARAMETERS = 20

# A recipe for hundreds of images has a few hundred epochs on the smallest of them, the published ones about 60 on LVIS.
_MOST_EPOCHS = 2000
_START_GONE = "copy it back from where it is whole, or train again: --overwrite"

Evaluate = Callable[[nn.Module, int, Path], dict[str, float]]
"""Evaluates a network in eval mode at an iteration, keeping its files in a folder. Runs on every process, which may
work together; the main process returns the metrics by name, larger being better, the others may return nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training gives.

    Attributes:
        folder: The run folder.
        weights: The weights after the last step; ``model_best.safetensors`` next to it those of the best evaluation, where
            ``training.checkpoints.best_weights`` is on.
        iterations: Iterations of the run.
        losses: Means of the last record: ``total``, and each loss over the batches that have it.
        evaluations: Metrics by iteration.
        best: The best evaluation.
        stopped_early: Whether it ended before its last iteration: the metric did not improve for
            ``training.evaluation.patience`` evaluations.
        skipped: Steps that left the weights alone because a loss was not finite.
        seconds: Wall-clock time of this call.
        finetune: Of a fine-tuning by `proxydet.training_run.run_training`: the report in ``finetune.json``.
    """

    folder: Path
    weights: Path
    iterations: int
    losses: dict[str, float]
    evaluations: dict[int, dict[str, float]]
    best: Best | None
    stopped_early: bool
    skipped: int
    seconds: float
    finetune: Mapping[str, Any] | None = None


def train(
    config: RunConfig,
    *,
    output: Path,
    resume: Resume = "auto",
    overwrite: bool = False,
    evaluate: Evaluate | None = None,
    criterion: Callable[..., Any] | None = None,
    backbone: Callable[..., Any] | None = None,
    loggers: Sequence[Callable[..., Any]] = (),
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a detector, alone or as one of the processes that a launcher started.

    Args:
        config: The whole configuration; see `proxydet.recipes`. Its training is scaled to the number of processes.
        output: The run folder; see `proxydet.training.runfolder`. Several machines must share it.
        resume: What to do with checkpoints that are there.
        overwrite: With ``resume="never"``, remove the run that the folder holds.
        evaluate: Evaluates the network by the schedule of the configuration.
        criterion: A class of your own for ``losses.criterion``; its Python path is recorded in the run's configuration.
        backbone: A class of your own for ``model.backbone.kind``, likewise; who opens the run needs it.
        loggers: Classes of your own, added to ``training.log.loggers``, likewise.
        progress: Where progress is shown.

    Raises:
        ConfigError: Own code cannot be used, the configuration does not fit the data, or the folder holds a run of another one.
        LockedError: Another training holds the folder.
        DataError: The data cannot be used.
        CheckpointError: The starting weights, or the checkpoints to resume from, do not fit.
        RuntimeEnvironmentError: The machine cannot compute as configured.
        ProxydetError: As `fit`.
    """
    resume = after_restart(resume)
    own: dict[str, Any] = {}
    if criterion is not None:
        own["losses"] = {"criterion": python_path(criterion, "criterion")}
    if backbone is not None:
        own["model"] = {"backbone": {"kind": python_path(backbone, "backbone")}}
    if loggers:
        paths = [python_path(logger, "loggers") for logger in loggers]
        own["training"] = {"log": {"loggers": [*config.training.log.loggers, *paths]}}
    config = merge(config, own)
    losses = check_own_code(config)
    with ExitStack() as stack:
        ranks = stack.enter_context(connect(config.training.device, config.data.worker_timeout_s))
        check_precision(config.training.precision, ranks.device)
        usable_precision(config.inference.precision, ranks.device)
        folder = RunFolder(output.resolve())
        still_ours = stack.enter_context(folder.held()) if ranks.is_main else lambda: None
        start = prepare(config, folder, ranks, resume, overwrite=overwrite)
        config, earlier, step = start.config, start.earlier, start.step
        settings = config.training
        resumed = None if start.resumes_after is None else folder
        if resumed is None and (lacking := lacking_weights(config)) is not None:
            raise lacking
        stack.enter_context(reproducibility_mode(config.reproducibility))
        if ranks.device.type == "cpu":
            keep_freed_memory()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

        if config.data.description is None:
            raise ConfigError(
                "There is no data to train on: data.description is not set.",
                hint="Give a dataset config: --data DATA.toml. proxydet data init FOLDER writes one for annotations.",
            )
        description = DatasetConfig.from_toml(config.data.description)
        data = Dataset(config=description, cache=config.data.cache, progress=progress)
        vocabulary, store = data.vocabulary, data.store("train")
        config, note = fit_to_masks(config, store, vocabulary)
        config = fit_to_backbone(fit_to_embeddings(config, vocabulary.dimension))
        question = question_length(config, len(store.image_ids)) if resumed is None else ""
        for text in filter(None, (note, question)) if ranks.is_main else ():
            logger.warning("%s", text)
        sources = TrainingSources(start.batches(config.data), data)
        digests = {
            "vocabulary": vocabulary.digest,
            # Of the annotations, whatever the version of their store.
            "annotations": store.path.stem.partition("-v")[0],
            **sources.digests(),
            **source_digests(
                (config.losses.criterion, config.model.backbone.kind, config.model.cascade.box_head)
            ),
        }
        encoder = _text_encoder(description, settings, resumed)
        if encoder is not None:
            digests["text encoder"] = sha256(encoder)
        for run in earlier:
            check_same(run, config)
            check_same_data(run, digests, mode=config.reproducibility)
        facts = {
            "configuration": dump_yaml(config, comments=False),
            **digests,
            "accumulation": str(start.accumulation),
            "number of iterations that a step counts as": str(step),
            "run folder": str(folder.root),
        }
        check_agreement(ranks, facts)
        if settings.finetune.start is not None:
            vocabulary = _with_known(vocabulary, settings, resumed)
        if resumed is not None and earlier and "weights" in earlier[-1].digests:
            digests["weights"] = earlier[-1].digests["weights"]

        seed_everything(config.seed)  # the same weights everywhere
        counts = data.image_counts(with_novel=config.data.count_novel_classes)
        network = ProxyDetNetwork(config.model, vocabulary, counts)
        loaded: set[str] = set()
        timm = config.model.backbone.timm if config.model.backbone.kind == "timm" else None
        if settings.weights is None and resumed is None and timm is not None:
            how = how_to_get_timm(timm)
            logger.warning("model.backbone.timm starts from fresh weights; %s", how)
        if settings.weights is not None and resumed is None:
            expect = (*settings.ignore_in_weights, *MIXUP_BRANCH)
            report = load_weights(network, settings.weights, expect=expect, vocabulary="keep")
            loaded = network.state_dict().keys() - {*report.missing, *report.mismatched}
            if ranks.is_main:  # which writes the records
                digests["weights"] = sha256(settings.weights)
            logger.info("Starting from %s: %s", settings.weights, report)
            if any(name.startswith(MASK_HEAD) for name in report.ignored):
                logger.warning("%s: the weights of its mask head are not used", settings.weights)

        if ranks.is_main:
            warn_of_slow_device(network, ranks.device)
            if overwrite and resume == "never":
                folder.clear()
            records = (folder.config, folder.vocabulary, folder.manifest, folder.environment)
            here = resumed is not None and folder.root in [run.root for run in earlier]
            gone = [str(path) for path in records if here and not path.exists()]
            write_text(folder.config, dump_yaml(config))
            vocabulary.save(folder.vocabulary)
            digests.update(source_digests(settings.log.loggers))
            if encoder not in (None, folder.text_encoder):
                write_bytes(folder.text_encoder, encoder.read_bytes())
            manifest = build_manifest(
                "training",
                configuration=to_mapping(config),
                digests=digests,
                mode=config.reproducibility,
                seeds={"seed": config.seed},
                world_size=ranks.world_size,
            )
            write_run_records(folder.root, manifest)
            if gone:
                logger.warning("wrote %s again", " and ".join(gone))
        wait_for_all(ranks)

        def make_loader(batches: int, draws: int) -> TrainingLoader:
            return TrainingLoader(
                sources,
                rank=ranks.rank,
                world_size=ranks.world_size,
                seed=config.seed,
                start=draws if config.data.ranks_share_group else batches,
            )

        timeout = config.data.worker_timeout_s
        distilled = config.losses.distillation.weight > 0 and settings.weights is not None
        return fit(
            network,
            losses,
            make_loader,
            config=settings,
            folder=folder,
            ranks=ranks,
            seed=config.seed,
            loaded=loaded,
            keep_reference=network.keep_reference if distilled else None,
            accumulation=start.accumulation,
            step=step,
            batches=(start.began, start.now),
            # A little longer than the loader itself waits for its workers.
            loader_timeout=timeout + 30.0 if timeout else None,
            resume=resume,
            run=json.dumps({"configuration": to_mapping(config), "digests": digests}),
            about={
                "proxydet": __version__,
                "recipe": config.recipe,
                "classes": vocabulary.names,
                "vocabulary_sha256": vocabulary.digest,
                "model": to_mapping(config.model),
            },
            still_ours=still_ours,
            evaluate=evaluate,
            progress=progress,
        )


def check_own_code(config: RunConfig) -> Callable[..., Losses]:
    """Import what a configuration names by Python paths, and return what computes the losses.

    Raises:
        ConfigError: Something is not there, or cannot be called as it would be.
        MissingDependencyError: The package of a logger is not installed.
    """
    find_loggers(config.training.log)
    backbone, head = config.model.backbone, config.model.cascade.box_head
    if backbone.kind not in BACKBONES:
        made = load_extension(backbone.kind, "model.backbone.kind")
        require_signature(made, "model.backbone.kind", backbone.kind, *backbone.options)
    if head is not None:
        load_extension(head, "model.cascade.box_head")
    return build_criterion(config.losses)


def fit_to_backbone(config: RunConfig) -> RunConfig:
    """Return a run's configuration with the pixel statistics of its backbone where it leaves them open."""
    mean, std = pixel_statistics(config.model)
    return merge(config, {"model": {"pixel_mean": mean, "pixel_std": std}})


def _with_known(
    vocabulary: Vocabulary, settings: TrainingConfig, resumed: RunFolder | None
) -> Vocabulary:
    """Return the vocabulary with what the detector that a fine-tuning starts from knew, so that fusion treats it as before.

    A run that is resumed holds it, and the starting detector may be gone.
    """
    if resumed is not None:
        with suppress(VocabularyError):
            before = run_vocabulary(resumed.root)
            if before == vocabulary:
                return before
    run = None if settings.weights is None else run_of(settings.weights)
    name = settings.finetune.start
    published = name if name in PUBLISHED_MODELS else None
    start = vocabulary_of(NamedDetector(published=published, run=run))
    return vocabulary if start is None else vocabulary.with_known(start)


def _text_encoder(
    description: DatasetConfig, settings: TrainingConfig, resumed: RunFolder | None
) -> Path | None:
    """Return what embeds words that are not trained; None where that is CLIP.

    A run that is resumed keeps its own: that of the data, or of the detector that a fine-tuning starts from, may be gone.

    Raises:
        VocabularyError: The run's own is damaged or gone, and so is that.
    """
    if resumed is not None:
        with suppress(VocabularyError):
            own = run_encoder(resumed.root)
            if own is not None and own.is_file():
                return own
    encoder, finetuned = (
        Path(description.classes.encoder or ""),
        settings.finetune.start is not None,
    )
    if finetuned and settings.weights is not None and not description.classes.encoder:
        origin = run_of(settings.weights)
        encoder = (origin and run_encoder(origin)) or encoder
    if encoder.suffix == ".json" and encoder.is_file():
        return encoder
    if resumed is not None and "text encoder" in digests_of(resumed.root):
        raise VocabularyError(
            f"{resumed.text_encoder} is damaged or gone, and so is what it was copied from",
            hint="copy it back from where it is whole, or train again: --overwrite",
            path=resumed.text_encoder,
        )
    return None


def fit_to_embeddings(config: RunConfig, dimension: int) -> RunConfig:
    """Return a run's configuration with a classifier of as many dimensions as the data's text embeddings.

    Raises:
        ConfigError: They differ, and starting weights fix the number.
    """
    asked, weights = config.model.classifier.embedding_dim, config.training.weights
    if asked == dimension:
        return config
    if weights is not None:
        raise ConfigError(
            f"The data's text embeddings have {dimension} dimensions; model.classifier.embedding_dim is {asked}.",
            hint=f"Embed the class names with the text encoder of {weights}; if its weights have {dimension} dimensions, "
            f"add --set model.classifier.embedding_dim={dimension}.",
        )
    what = "model.classifier.embedding_dim is %d, as the data's text embeddings have it, not %d"
    logger.warning(what, dimension, asked)
    return merge(config, {"model": {"classifier": {"embedding_dim": dimension}}})


def fit_to_masks(
    config: RunConfig, store: AnnotationStore, vocabulary: Vocabulary
) -> tuple[RunConfig, str]:
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
    usable, note = targets.usable(store), ""
    without = int((usable & ~store.masked_A).sum())
    if targets.masks:
        if without:
            of = f"{without} of {int(usable.sum())} objects in {store.source_name}"
            note = f"{of} have no mask: they train boxes and classes only"
        return merge(config, {"data": {"masks": True}}), note
    if asked == "auto":
        why = f"no object in {store.source_name} has a mask" if head else "model.masks is null"
        note = f"{why}: training a detector of boxes, without a mask head"
    return merge(config, {"data": {"masks": False}, "model": {"masks": None}}), note


def lacking_weights(config: RunConfig) -> ConfigError | None:
    """Return why a new run cannot start without weights; None: it can, or names some."""
    training, backbone = config.training, config.model.backbone
    if training.weights is not None or not training.freeze:
        return None
    fetch = f"; {how_to_get_timm(backbone.timm)}" if backbone.kind == "timm" else ""
    return ConfigError(
        "There are no starting weights, and parts are frozen (training.freeze), which would keep random values.",
        hint=f"give weights with --weights FILE{fetch}",
    )


def question_length(config: RunConfig, images: int) -> str:
    """Return a line about a training that would see each image thousands of times, as of a recipe for much more data; else nothing.

    Args:
        config: The configuration.
        images: Annotated training images.
    """
    training = config.training
    planned = training.iterations * training.replicas * config.data.boxes.batch_size
    if planned <= _MOST_EPOCHS * images:
        return ""
    return (
        f"{planned:,} images are planned, of {images:,} that there are: each {planned // images:,} times. "
        f"--epochs 50 sets a length by the data; --finetune starts from a trained detector"
    )


def warn_of_slow_device(network: torch.nn.Module, device: torch.device) -> None:
    """Say that a network of the published sizes takes very long on a CPU."""
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    if device.type == "cpu" and millions > _MANY_PARAMETERS:
        text = "Training %.0f million parameters on a CPU takes very long; --dry-run estimates how long."
        logger.warning(text, millions)


@tf32_kept()
def fit(
    network: nn.Module,
    criterion: Callable[..., Losses],
    make_loader: Callable[[int, int], Iterable[Any]],
    *,
    config: TrainingConfig,
    folder: RunFolder,
    ranks: DistInfo,
    seed: int,
    loaded: Iterable[str] = (),
    keep_reference: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    accumulation: int | None = None,
    step: Fraction | None = None,
    batches: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    loader_timeout: float | None = None,
    resume: Resume = "auto",
    run: str = "",
    about: Mapping[str, Any] | None = None,
    still_ours: Callable[[], None] = lambda: None,
    evaluate: Evaluate | None = None,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a network to the last iteration.

    Args:
        network: Has ``forward_train(batch, generator=...)`` and a ``backbone`` module; holds its starting weights.
        criterion: Gives losses of that method's result; see `TrainingModel`.
        make_loader: Called with the number of batches that all processes, and that each one, have used; returns the endless
            batches of this process after them.
        config: Settings; ``replicas`` is the number of batches of an iteration.
        folder: The run folder.
        ranks: This process.
        seed: Seed of every random draw.
        loaded: Names in the network's state dict that have starting weights of another training; ``interpolation`` mixes them.
        keep_reference: Called with the starting values of everything that training changes, by name, when the network is where it is
            trained.
        accumulation: Batches that this process accumulates in a step; None takes the settings'.
        step: How many iterations a step counts as, by its images; None takes its batches over ``replicas``. Progress is counted
            in it, and the learning rate follows ``scaling``.
        batches: What a step was made of when the run began, and now: a change is recorded in ``metrics.jsonl``.
        loader_timeout: Seconds without a batch after which the run stops; None waits for ever.
        resume: What to do with checkpoints that are there.
        run: JSON of what the run is made from, for its checkpoints.
        about: Plain values for the metadata of the final weights.
        still_ours: Raises when another training has taken over the run folder; called before anything is written.
        evaluate: Evaluates the network by the schedule of the settings.
        progress: Where progress is shown.

    Raises:
        JobInterruptedError: A stop signal came; a checkpoint is written.
        NumericsError: A loss is not finite.
        DiskFullError: There is no room for a checkpoint or a log.
        LockedError: Another training has taken over the run folder.
        TrainingError: The loader is stuck, or a device failed.
        CheckpointError: There are checkpoints to resume from, and none fits or can be read.
    """
    start = time.perf_counter()
    accumulation = accumulation or config.accumulation
    step = step or Fraction(accumulation * ranks.world_size, config.replicas)
    network.to(ranks.device)
    freeze(network, config.freeze)
    apply_precision(network, config.precision)
    touch = config.optimizer.unused_gradients == "zero"
    model: nn.Module = TrainingModel(network, criterion, device=ranks.device, touch_all=touch)
    if ranks.world_size > 1:
        model = wrap_for_ranks(model, ranks, find_unused=not touch)
    state = TrainingState(
        network=network,
        model=model,
        optimizer=build_optimizer(network.parameters(), config.optimizer),
        scaler=build_scaler(config.precision, ranks.device),
        seed=seed,
        replicas=config.replicas,
        run=run,
    )
    if config.ema.decay is not None:
        state.average = state.learnt()
    checkpoints = CheckpointFolder(folder.checkpoints, config.checkpoints)
    resumed: Path | None = None
    if resume != "never":  # the main process chooses the checkpoint for all
        saved: dict[str, Any] | None = None
        path: object = resume if isinstance(resume, Path) else None
        if ranks.is_main and path is None:
            saved, path = checkpoints.load_newest() or (None, None)
        path = broadcast_value(path, ranks)
        if isinstance(path, Path):
            resumed = path
            state.load_state_dict(saved or load_checkpoint(path), config.accumulation)
            logger.info("Resuming after iteration %d from %s", state.iteration, path)
            wait_for_all(ranks)  # every process has read its state
            if ranks.is_main:
                ended = read_last_iteration(folder.final_weights)
                folder.set_aside_after(state.iteration, ended or config.iterations)
    if config.interpolation < 1 or keep_reference is not None:
        values, mixed = _starting_weights(state, folder, ranks, loaded, resumed)
        if keep_reference is not None:
            keep_reference(values)
        if config.interpolation < 1:
            state.share, state.start = config.interpolation, {name: values[name] for name in mixed}

    with ExitStack() as stack:
        stack.enter_context(checkpoints)
        total, done = config.iterations, float(state.iteration)
        task = stack.enter_context(progress.task("training", total=total, unit="it", done=done))
        metrics = MetricLogger(folder, config.log, ranks=ranks, state=state, task=task)
        stack.enter_context(metrics)
        metrics.batches(*batches)
        loader = make_loader(state.batches, state.draws)
        prefetcher = stack.enter_context(Prefetcher(loader, loader_timeout))
        signals = stack.enter_context(StopSignals())
        stack.enter_context(_device_errors(state))

        def passes(period: int) -> bool:
            """Whether the last step reached or passed a multiple of a number of iterations."""
            before = max(state.progress - state.step, Fraction(0))
            return state.progress // period > before // period

        def evaluation_due() -> bool:
            schedule = config.evaluation
            if evaluate is None:
                return False
            if state.iteration in (0, config.iterations):
                return schedule.at_end if state.iteration else schedule.at_start
            period = schedule.period
            return period is not None and state.iteration >= schedule.start and passes(period)

        def best() -> Best | None:
            return best_of(metrics.evaluations(), config.evaluation.metric)

        def best_iteration() -> int | None:
            return None if (found := best()) is None else found.iteration

        def save() -> None:
            if ranks.is_main:
                still_ours()
                checkpoints.save(state.state_dict(), state.iteration, best_iteration())
            wait_for_all(ranks)  # the main process may have waited for the checkpoint before it

        def stopped() -> JobInterruptedError:
            checkpoints.wait()
            return JobInterruptedError(
                f"Training was stopped after {state.iteration} of {config.iterations} iterations; "
                f"{checkpoints.path(state.iteration)} holds its state.",
                signal_number=signals.received or int(signal.SIGTERM),
                hint="Start the same command again: it resumes from there.",
            )

        kept_best: int | None = None

        def keep_best() -> None:
            """Write the weights of the best evaluation where they are not there already; remove what need not be kept."""
            nonlocal kept_best
            found = best()
            checkpoints.rotate(best_iteration())
            if not config.checkpoints.best_weights or found is None:
                return
            known = read_last_iteration(folder.best_weights) if kept_best is None else kept_best
            if found.iteration != known:
                try:
                    weights = (
                        state.weights()
                        if found.iteration == state.iteration
                        else load_checkpoint(checkpoints.path(found.iteration))["model"]
                    )
                except CheckpointError as error:
                    logger.warning(
                        "the weights of the best evaluation, after %d iterations, are not kept any more: %s",
                        found.iteration,
                        error.message,
                    )
                else:
                    still_ours()
                    facts = {**(about or {}), **dataclasses.asdict(found)}
                    write_safetensors(folder.best_weights, weights, facts)
            kept_best = found.iteration

        def evaluate_if_due() -> bool:
            """Evaluate by the schedule; return whether training ends here, as the metric does not improve any more."""
            if evaluate is None or not evaluation_due():
                return False
            # An interrupted run may have done so at this very iteration.
            if broadcast_value(state.iteration in metrics.evaluations(), ranks):
                return ends_early()
            if state.iteration == 0:
                save()
            share_statistics(network, state.average or {}, ranks)
            checkpoints.wait()  # what is evaluated is there to go back to
            try:
                with state.in_evaluation(), signals.immediate():
                    found = evaluate(network, state.iteration, folder.evaluation(state.iteration))
            except StopNow:
                raise stopped() from None
            if ranks.is_main:
                still_ours()
            metrics.evaluation(found)
            if ranks.is_main:
                metric = config.evaluation.metric
                if metric is not None and metric not in found:
                    raise ConfigError(
                        f"training.evaluation.metric is {metric!r}, which the evaluation does not report.",
                        hint=f"It reports {', '.join(found) or 'nothing'}. Resume with one of them, or with null: "
                        "--set training.evaluation.metric=null",
                    )
                keep_best()
            wait_for_all(ranks)  # the main process may have scored for long
            return ends_early()

        def ends_early() -> bool:
            if config.evaluation.patience is None or state.iteration == config.iterations:
                return False
            ends = stopped_early(metrics.evaluations(), config.evaluation)
            return bool(broadcast_value(ends, ranks))

        state.train()
        early = evaluate_if_due()
        if ranks.is_main:  # a process that was killed may have left that to do
            keep_best()
            if resumed is not None and not early:  # one that had stopped early goes further
                folder.set_aside_after(state.iteration, config.iterations)
        while state.progress < config.iterations and not early:
            result = train_step(
                state,
                [prefetcher.next() for _ in range(accumulation)],
                config=config,
                step=step,
                ranks=ranks,
                failures=folder.failures,
                stop=signals.received > 0,
            )
            last = state.progress == config.iterations
            may_end = config.evaluation.patience is not None and evaluation_due()
            record = last or passes(config.log.period) or may_end
            if record and ranks.is_main:
                still_ours()
            metrics.step(result, prefetcher.waited, record=record)
            checkpoints.check()
            # One checkpoint an iteration, where a step is less: an evaluation belongs to the weights of that name.
            if result.stop and not last and passes(1):
                save()
                interrupted = stopped()
                wait_for_all(ranks)
                raise interrupted
            if last or passes(config.checkpoints.period) or evaluation_due():
                save()
            early = evaluate_if_due()
        checkpoints.wait()
        if early:
            logger.info("Stopped early, after %d of %d iterations", state.iteration, total)
        if ranks.is_main:
            still_ours()
            weights = state.weights()
            facts = {**(about or {}), "iteration": state.iteration}
            again = folder.final_weights.exists()  # of a finished run that was damaged
            write_safetensors(folder.final_safetensors, weights, facts)
            write_state({"model": weights, "iteration": state.iteration}, folder.final_weights)
            if again:
                files = folder.final_safetensors, folder.final_weights
                logger.warning("wrote %s and %s again", *files)
        wait_for_all(ranks)  # the others may read what is written
        return TrainResult(
            folder=folder.root,
            weights=folder.final_weights,
            iterations=state.iteration,
            losses=metrics.last,
            evaluations=metrics.evaluations(),
            best=best(),
            stopped_early=early,
            skipped=state.skipped,
            seconds=time.perf_counter() - start,
        )


def _starting_weights(
    state: TrainingState,
    folder: RunFolder,
    ranks: DistInfo,
    loaded: Iterable[str],
    resumed: Path | None,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the starting values of what training changes, and which of them are parameters that were loaded.

    Of a new run they are the network's, which its folder keeps; of one that is resumed, those that are kept.

    Raises:
        CheckpointError: The run that is resumed does not hold its starting weights any more.
    """
    own = state.network.state_dict()
    if resumed is None:
        values, parameters = state.learnt(), dict(state.network.named_parameters())
        mixed = sorted(values.keys() & parameters.keys() & set(loaded))
    else:
        other = RunFolder(resumed.absolute().parent.parent).start_weights
        source = folder.start_weights if folder.start_weights.exists() else other
        start, facts = read_safetensors(source, hint=_START_GONE)
        values = {name: value.to(own[name]) for name, value in start.items() if name in own}
        mixed = [name for name in facts.get("mixed", ()) if name in values]
        wait_for_all(ranks)
    # A session that was killed before its first checkpoint may have left others.
    if ranks.is_main and (resumed is None or not folder.start_weights.exists()):
        write_safetensors(folder.start_weights, values, {"iteration": 0, "mixed": mixed})
    return values, mixed


@contextmanager
def _device_errors(state: TrainingState) -> Iterator[None]:
    """Turn what a GPU, or the exchange between GPUs, raises into our errors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeEnvironmentError(
            f"The GPU has no memory left at iteration {state.iteration}: {error}",
            hint="Use smaller batches with more training.accumulation, a smaller input size, or "
            "model.backbone.swin.checkpoint_activations=true for Swin.",
        ) from error
    except RuntimeError as error:
        modules = ((torch, "AcceleratorError"), (torch.distributed, "DistBackendError"))
        kinds = tuple(getattr(module, name) for module, name in modules if hasattr(module, name))
        if not isinstance(error, kinds) and "CUDA error" not in str(error):
            raise
        message = f"The GPU failed at iteration {state.iteration}: {error}"
        raise TrainingError(message, hint=START_AGAIN) from error


# SIGUSR1 is what `#SBATCH --signal=USR1@120` sends before SLURM takes the machine away.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopNow(BaseException):
    """A stop signal came while nothing had to be finished first."""


class StopSignals:
    """Context in which SIGINT, SIGTERM and SIGUSR1 are noted instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once, for a user who does not want to wait. Outside the main thread,
    where Python cannot take signals, nothing is changed.
    """

    received = 0
    """Number of the first signal that came, 0 when none did."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._immediate = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within this context a signal raises `StopNow` as it comes: for long work that may be cut short."""
        self._immediate = True
        try:
            if self.received:
                raise StopNow
            yield
        finally:
            self._immediate = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._immediate:
            raise StopNow


class Prefetcher:
    """An endless source of batches, fetched ahead in a thread, which notices a loader that is stuck.

    Args:
        batches: The loader. It is iterated in a thread, beginning when the first batch is asked for.
        timeout: Seconds to wait for a batch; None waits for ever.

    Attributes:
        waited: Seconds spent waiting for batches so far.
    """

    def __init__(self, batches: Iterable[Any], timeout: float | None) -> None:
        self._batches, self._timeout = batches, timeout
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(2)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetcher", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            TrainingError: None came within the timeout.
            DataError: The loader came to an end.
            Exception: What the loader raised.
        """
        if not self._thread.is_alive() and self._queue.empty():
            self._thread.start()
        start = time.perf_counter()
        try:
            batch, error = self._queue.get(timeout=self._timeout)
        except queue.Empty as empty:
            raise TrainingError(
                f"The data loader returned no batch for {self._timeout:.0f} seconds.",
                hint="Check the file system that holds the images; data.worker_timeout_s sets how long to wait.",
            ) from empty
        finally:
            self.waited += time.perf_counter() - start
        if error is None:
            return batch
        if isinstance(error, StopIteration):
            raise DataError(
                "The data loader ended before training did.",
                hint="a loader that is given to training must yield batches without end",
            ) from error
        raise error

    def _fill(self) -> None:
        iterator: Iterator[Any] | None = None
        error: BaseException | None = None
        while error is None:
            batch = None
            try:
                iterator = iter(self._batches) if iterator is None else iterator
                batch = next(iterator)
            except BaseException as raised:  # noqa: BLE001 - handed to the thread that asks for the batch
                error = raised
            while True:
                if self._closed.is_set():
                    return
                with suppress(queue.Full):
                    self._queue.put((batch, error), timeout=0.2)
                    break
