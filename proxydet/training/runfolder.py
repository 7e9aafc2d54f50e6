"""A run folder: its files, who may write in it, and whether what it holds is the run that is asked for.

::

    RUN/
    ├── config.yaml          the resolved configuration; `proxydet train --config` repeats the run
    ├── vocabulary.npz       class names, text embeddings and base classes of the training
    ├── text_encoder.json    what embeds other class names, where the data came with an encoder of its own
    ├── environment.json     machine and packages
    ├── manifest.json        digests of data, vocabulary and starting weights, versions, seeds
    ├── metrics.jsonl        one record every few steps
    ├── evaluations.jsonl    one record an evaluation
    ├── tensorboard/         and wandb/, mlflow.db, where the records also go there
    ├── checkpoints/         step_XXXXXXX.pth
    ├── evaluations/         predictions and report of each evaluation
    ├── plots/               losses and metrics over the iterations
    ├── failures/            batches whose loss was not finite
    ├── logs/                what each process wrote
    ├── aside/               what came after a checkpoint that the run went back to
    ├── train.lock           while it trains
    ├── model_start.safetensors  starting weights, where trained ones are mixed or compared with them
    ├── model_best.safetensors  the weights of the best evaluation (training.checkpoints.best_weights)
    ├── model_final.safetensors  the weights after the last step, with recipe and classes
    ├── model_final.pth      the same as a file of torch.save; written last
    ├── forgetting/          of a fine-tuning: predictions of the starting and of the fine-tuned detector
    └── finetune.json        and finetune.html: what it gained and what it forgot
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proxydet.config import from_mapping, load_mapping
from proxydet.data.config import DataConfig, mean_batch
from proxydet.data.dataset import DatasetConfig
from proxydet.data.store import AnnotationStore
from proxydet.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ProxydetError,
    RuntimeEnvironmentError,
)
from proxydet.files import JsonLines, Lock, sha256, sweep, write_text
from proxydet.manifest import FREE_KEYS, differing, listed, read_run_records, read_values
from proxydet.paths import list_checkpoints, step_name, step_of
from proxydet.runtime.modes import Mode
from proxydet.training.checkpoint import load_checkpoint, read_header
from proxydet.training.config import EvaluationSchedule, scale_training
from proxydet.training.distributed import DistInfo, launched_rank, number_in
from proxydet.training.launch import LAUNCHER, holds_logs_only
from proxydet.training.logs import iteration_of, read_evaluations, stopped_early
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import read_content, read_safetensors

if TYPE_CHECKING:
    from proxydet.recipes import RunConfig

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path
"""``auto`` resumes from the newest checkpoint of the run folder if there is one, ``never`` starts a new run, a path resumes
from that checkpoint."""


# What training decides when it has read the data and knows the backbone.
_DATA_DECIDES = (
    "data.masks", "model.masks", "model.classifier.embedding_dim", "model.pixel_mean", "model.pixel_std"
)  # fmt: skip


class RunFolder:
    """Names of the files in a run folder, as the text above explains them.

    Args:
        root: The folder; may be absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.vocabulary = root / "vocabulary.npz"
        self.text_encoder = root / "text_encoder.json"
        self.environment = root / "environment.json"
        self.manifest = root / "manifest.json"
        self.metrics = root / "metrics.jsonl"
        self.evaluations = root / "evaluations.jsonl"
        self.checkpoints = root / "checkpoints"
        self.plots = root / "plots"
        self.failures = root / "failures"
        self.logs = root / "logs"
        self.lock = root / "train.lock"
        self.start_weights = root / "model_start.safetensors"
        self.best_weights = root / "model_best.safetensors"
        self.final_safetensors = root / "model_final.safetensors"
        self.final_weights = root / "model_final.pth"
        """A run that has them is finished."""
        self.forgetting = root / "forgetting"
        self.report = root / "finetune.json"
        self.report_page = root / "finetune.html"

    def evaluation(self, iteration: int) -> Path:
        """Return the folder for the predictions and the report of one evaluation during training."""
        return self.root / "evaluations" / step_name(iteration)

    def new_lock(self) -> Lock:
        """Return the lock of the folder, which `held` takes."""
        return Lock(
            self.lock,
            subject=f"the run folder {self.root}",
            hint="wait for it to end, or stop it; or train in another folder: --output",
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Keep other trainings out of the folder, and remove what killed ones were writing.

        For the first process of a training: the launcher that starts the others, or the main one. Where this process or its
        launcher holds the folder already, nothing is done. A training that is refused leaves nothing in a new folder.

        Yields:
            A function that makes sure that the folder is still held; see `proxydet.files.Lock.check`.

        Raises:
            LockedError: Another training holds the folder; nothing in it was changed.
            RuntimeEnvironmentError: The folder cannot be written to.
        """
        lock = self.new_lock()
        owner = lock.owner()
        ours = (os.getpid(), number_in(os.environ, LAUNCHER))
        mine = owner is None or owner.has_ended or not (owner.is_here and owner.pid in ours)
        made, logged = not self.root.exists(), self.logs.exists()
        if mine:
            lock.acquire(wait=False)
            if lock.held:
                sweep(self.root)  # evaluations on other machines write here, too
                sweep(self.plots)
                for folder in (self.checkpoints, self.failures):
                    sweep(folder, sole_writer=True)
        try:
            yield lambda: lock.check(None if mine else owner)
        except (InputError, RuntimeEnvironmentError):
            if mine and not logged and holds_logs_only(self.root):
                shutil.rmtree(self.logs, ignore_errors=True)
            raise
        finally:
            if mine:
                lock.release()
                if made:
                    with contextlib.suppress(OSError):
                        self.root.rmdir()

    def set_aside_after(self, iteration: int, end: int = sys.maxsize) -> None:
        """Move away all that came after the iteration from which the run is resumed; it is not part of the run any more.

        Log lines alone, which a killed process wrote after its last checkpoint, are removed: the same ones come again.

        Args:
            iteration: Iterations so far.
            end: Iterations after which the run ends: after fewer, final weights, and a report of them, are not this run's.
        """
        later = [path for at, path in list_checkpoints(self.checkpoints) if at > iteration]
        evaluations = (self.root / "evaluations").glob("step_*")
        later += [path for path in evaluations if (step_of(path.name) or 0) > iteration]
        if (read_last_iteration(self.best_weights) or 0) > iteration:
            later.append(self.best_weights)
        # First what makes it a finished run: a kill in between leaves one that is not.
        finals = (self.final_weights, self.final_safetensors, self.report, self.report_page,
                  self.forgetting / "finetuned")  # fmt: skip
        if iteration < end:
            later = [*(path for path in finals if path.exists()), *later]
        if not later:
            return
        name = f"after_{step_name(iteration)}"
        names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        aside = next(a for a in (self.root / "aside" / name for name in names) if not a.exists())
        for path in later:
            target = aside / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        then = f"training continues after iteration {iteration}"
        for path in (self.metrics, self.evaluations):
            removed = JsonLines(path).keep(lambda r: iteration_of(r) <= iteration, then=then)
            if removed:
                write_text(aside / path.name, "".join(json.dumps(r) + "\n" for r in removed))
        logger.warning(
            "Resuming from iteration %d; what came after it is now in %s", iteration, aside
        )

    def clear(self) -> None:
        """Remove the run that the folder holds; files that are not a run's stay, and logs where this process writes one."""
        folders = [
            "checkpoints",
            "tensorboard",
            "wandb",
            "plots",
            "failures",
            "evaluations",
            "forgetting",
        ]
        folders.append("aside")
        handlers = logging.getLogger("proxydet").handlers
        files = [Path(h.baseFilename) for h in handlers if isinstance(h, logging.FileHandler)]
        if self.config.exists() and self.logs.resolve() not in [f.parent.resolve() for f in files]:
            folders.append("logs")  # else the processes of this run append to them
        for name in folders:
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in (self.config, self.vocabulary, self.text_encoder, self.environment, self.manifest,
                     self.metrics, self.evaluations, self.start_weights, self.best_weights,
                     self.final_safetensors, self.final_weights, self.report, self.report_page,
                     self.root / "mlflow.db", self.root / "mlflow_run_id.txt"):  # fmt: skip
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """What the run in a folder, or of a checkpoint, was made from.

    Attributes:
        root: Its folder; the checkpoint itself where that lies in none.
        source: The file that says so.
        config: Its configuration; ``training.replicas`` is what an iteration means in it.
        digests: Digests of its data and vocabulary; empty where they are not known.
        finished: Whether it came to its end.
    """

    root: Path
    source: Path
    config: RunConfig
    digests: Mapping[str, str]
    finished: bool


def earlier_run(
    folder: RunFolder, kind: type[RunConfig], checkpoint: Path | None = None
) -> EarlierRun | None:
    """Find out what run a folder holds: from ``config.yaml``, ``manifest.json``, or else its newest checkpoint.

    The manifest has a SHA-256; version 0.1 wrote none, whose ``config.yaml`` is believed.

    Args:
        folder: The run folder; may be absent.
        kind: Class of the configuration; keys that an earlier version did not have get their defaults.
        checkpoint: Asked in place of the newest one of the folder.

    Returns:
        The run; None where there is none.

    Raises:
        ConfigError: It has checkpoints, and nothing says of which settings; or its ``config.yaml`` was edited.
    """
    problems: list[str] = []

    def read(path: Path, what: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return what(*arguments)
        except InputError as error:
            problem = error.message.rstrip(".")
            problems.append(problem if str(path) in problem else f"{path}: {problem}")
            return None

    found = [path for _, path in list_checkpoints(folder.checkpoints)]
    newest = [checkpoint] if checkpoint is not None else found[::-1]
    manifest: dict[str, Any] = {}
    if folder.manifest.exists():
        manifest = read(folder.manifest, read_values, folder.manifest) or {}
    config = read(folder.config, load_mapping, folder.config) if folder.config.is_file() else None
    if config is None and folder.config.exists() and not problems:
        problems.append(f"{folder.config} is not a regular file")
    records = itertools.chain(
        [(folder.config, {**manifest, "configuration": config}), (folder.manifest, manifest)],
        ((path, (read(path, read_header, path) or {}).get("run", {})) for path in newest),
    )
    for source, record in records:
        settings, digests = record.get("configuration"), record.get("digests")
        if not isinstance(settings, Mapping) or not settings:
            if settings is not None:
                problems.append(f"{source} holds no settings")
            continue
        known = read(source, from_mapping, kind, settings)
        if known is None:
            continue
        if source == folder.config and "sha256" in manifest:
            written = read(folder.manifest, from_mapping, kind, manifest.get("configuration"))
            if changed := {} if written is None else differing(written, known, FREE_KEYS):
                raise ConfigError(
                    f"{source} is not what the run was trained with, by {folder.manifest}: {listed(changed)}.",
                    hint=f"remove {source.name}, which is then written again, and train with other settings in another "
                    "folder (--output)",
                    path=source,
                )
        if problems:
            _warn_once(f"{'; '.join(problems)}; using {source}")
        return EarlierRun(
            root=folder.root,
            source=source,
            config=known,
            digests=digests if isinstance(digests, Mapping) else {},
            finished=folder.final_weights.exists(),
        )
    if not found and not (problems and folder.final_weights.exists()):
        return None
    raise ConfigError(
        f"{folder.root} holds a run, and its settings are not known: {'; '.join(problems) or 'there are no records'}",
        hint=f"put {folder.config.name} back, train in another folder (--output), or remove the run: --overwrite",
        path=folder.config,
    )


_reported: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn on the main process, once, and not where the launcher of this process has done so; log it everywhere."""
    started = number_in(os.environ, LAUNCHER) not in (0, os.getpid())
    report = launched_rank() == 0 and not started and text not in _reported
    _reported.add(text)
    logger.log(logging.WARNING if report else logging.INFO, "%s", text)


def _same_annotations(earlier: EarlierRun, config: RunConfig) -> bool:
    """Whether a dataset config, at another place than the earlier run's, names the same training annotations."""
    path, known = config.data.description, earlier.digests.get("annotations")
    if path is None or known is None:
        return False
    with contextlib.suppress(ProxydetError):
        train = DatasetConfig.from_toml(path).train
        if train is not None:
            store = AnnotationStore.path_for(train, cache=config.data.cache)
            return store.stem.partition("-v")[0] == known.partition("-v")[0]
    return False


def check_same(earlier: EarlierRun, config: RunConfig, *, before_data: bool = False) -> None:
    """Make sure that a configuration is that of an earlier run, apart from what may differ on resume.

    Args:
        earlier: The run.
        config: The configuration, scaled to the earlier one's ``training.replicas``.
        before_data: Leaves out what training decides when it has read the data.

    Raises:
        ConfigError: They differ; the message says in what.
    """
    changed = differing(earlier.config, config, FREE_KEYS + (_DATA_DECIDES if before_data else ()))
    if "data.description" in changed and _same_annotations(earlier, config):
        del changed["data.description"]  # moved; `check_same_data` compares the rest
    if changed:
        same = f" (--config {earlier.source})" if earlier.source.name == "config.yaml" else ""
        raise ConfigError(
            f"{earlier.root} holds a run with other settings ({listed(changed)}).",
            hint=f"train in another folder (--output); resume with the same settings{same}; start from its weights "
            "(--weights); or remove it: --overwrite",
            path=earlier.source,
        )


def check_same_data(earlier: EarlierRun, digests: Mapping[str, str], *, mode: Mode) -> None:
    """Make sure that the data of an earlier run, and own code in its configuration, are as they were.

    Code that changed is reported; in mode ``strict``, which repeats itself bit for bit, it is refused.

    Args:
        earlier: The run.
        digests: Of its data now, by name; those of code are called ``code PATH``.
        mode: The run's reproducibility mode.

    Raises:
        ConfigError: They are not; the message says which.
    """
    changed = []
    for name, digest in digests.items():
        before = earlier.digests.get(name, digest)
        # Version 0.1 wrote the version of the store behind the digest of the annotations.
        if not isinstance(before, str) or before.partition("-v")[0] != digest:
            changed.append(name)
    code = [name for name in changed if name.startswith("code ") and mode != "strict"]
    if code and launched_rank() == 0:
        logger.warning(
            "%s: the %s changed since the run began, which continues with it as it is now",
            earlier.root,
            " and the ".join(code),
        )
    if refused := [name for name in changed if name not in code]:
        raise ConfigError(
            f"{earlier.root} holds a run of which the {' and the '.join(refused)} changed since.",
            hint="put the files back as they were; or train in another folder (--output), from this run's weights if "
            "you like (--weights)",
            path=earlier.source,
        )


def same_run(folder: RunFolder, config: RunConfig) -> EarlierRun | None:
    """Return the run in a folder, which is one of this configuration (before scaling); None where there is none.

    Raises:
        ConfigError: The folder holds a run with other settings, or with settings that are not known.
    """
    earlier = earlier_run(folder, type(config))
    if earlier is not None:
        training = scale_training(config.training, earlier.config.training.replicas)
        data = _with_batches(config.data, earlier.config.data)
        resumed = dataclasses.replace(config, training=training, data=data)
        check_same(earlier, resumed, before_data=True)
    return earlier


def read_last_iteration(path: Path) -> int | None:
    """Return after which iteration a weight file of a run was written; None where they cannot be read."""
    if not path.is_file():
        return None
    with contextlib.suppress(InputError, RuntimeEnvironmentError):
        safe = path.suffix == ".safetensors"
        content = read_safetensors(path)[1] if safe else read_content(path, tensors=False)
        iteration = content.get("iteration") if isinstance(content, dict) else None
        return iteration if type(iteration) is int else None
    return None


def is_whole(folder: RunFolder, earlier: EarlierRun, schedule: EvaluationSchedule) -> bool:
    """Return whether `train` has nothing to do in the folder of a finished run; what is not as it was written, it writes again.

    Weights, vocabulary, text encoder and records are compared with their digests. A run that stopped early is continued where
    ``schedule``, which is asked for now, has more patience.

    Raises:
        CheckpointError: One that the detector needs is damaged, and the last checkpoint is not there, or damaged too.
    """
    problems: dict[Path, str] = {}

    def check(path: Path, read: Callable[[Path], object], name: str | None = None) -> None:
        expected = earlier.digests.get(name) if name else None
        try:
            found = read(path) if name or path.exists() else None
        except OSError as error:
            problems[path] = f"{path} cannot be read: {error.strerror or error}"
        except InputError as error:
            problems[error.path or path] = error.message.rstrip(".")
        else:
            if expected is not None and found != expected:
                problems[path] = f"{path} is not what the run wrote (SHA-256)"

    planned = earlier.config.training.iterations
    written = map(read_last_iteration, (folder.final_weights, folder.final_safetensors))
    iterations = next(filter(None, written), planned)
    evaluations = read_evaluations(JsonLines(folder.evaluations))
    if iterations < planned and evaluations and not stopped_early(evaluations, schedule):
        return False
    check(folder.final_safetensors, read_safetensors)
    check(folder.best_weights, read_safetensors)
    check(folder.final_weights, read_content)
    check(folder.vocabulary, lambda path: Vocabulary.load(path).digest, "vocabulary")
    if "text encoder" in earlier.digests:
        check(folder.text_encoder, sha256, "text encoder")
    else:  # of version 0.1
        check(folder.text_encoder, CompositionalEncoder.load)
    needed = list(problems)
    check(folder.root, read_run_records)
    if not problems:
        return True
    said = "; ".join(problems.values())
    last = folder.checkpoints / f"{step_name(iterations)}.pth"
    try:
        load_checkpoint(last)
    except CheckpointError as error:
        if not needed:
            logger.warning("%s; the weights are whole", said)
            return True
        finals = (folder.final_safetensors, folder.final_weights)
        whole = [path for path in finals if path.exists() and path not in problems]
        use = f"use the whole weights with --weights {whole[0]}, " if 0 < len(whole) < 2 else ""
        raise CheckpointError(
            f"the run in {folder.root} is finished, but {said}; it cannot be written again: {error.message.rstrip('.')}",
            hint=f"copy {needed[0].name} back from where it is whole, {use}or train again: --overwrite",
            path=needed[0],
        ) from error
    logger.warning("%s; writing the files of the finished run again from %s", said, last)
    return False


def after_restart(resume: Resume) -> Resume:
    """Return what to do with checkpoints when torchrun starts a process again: a new run has become the one that is there."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "auto" if resume == "never" and restarted else resume


def default_folder(base: Path, config: RunConfig, resume: Resume) -> tuple[Path, str]:
    """Choose the run folder where none is given: the run's own, or a new one next to those of other settings.

    Args:
        base: The first choice, ``runs/NAME``; then ``runs/NAME-2`` and so on.
        config: The configuration, before scaling.
        resume: With ``never`` a folder without a run is chosen; with a checkpoint, its own run's folder.

    Returns:
        The folder, and why, for people to read; empty where there is nothing to say.
    """
    if isinstance(resume, Path) and resume.parent.name == "checkpoints":
        return resume.resolve().parent.parent, "that of the checkpoint"
    reasons: list[str] = []
    for number in itertools.count(1):
        folder = RunFolder(base if number == 1 else base.with_name(f"{base.name}-{number}"))
        try:
            never = resume == "never"
            earlier = earlier_run(folder, type(config)) if never else same_run(folder, config)
        except ConfigError as error:
            reasons.append(error.message.rstrip("."))
            continue
        if earlier is None:
            break
        if not never:
            state = "which is finished" if earlier.finished else "which is not finished"
            return folder.root, f"it holds the same run, {state}"
        reasons.append(f"{folder.root} holds a run")
    return folder.root, reasons[0] if reasons else ""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a training starts: a new run, or one that is resumed.

    Attributes:
        config: Of the run: scaled to the number of processes with which it began, with the batch sizes that it had then.
        earlier: The runs that it continues: that in its folder, and that of the checkpoint that is given.
        resumes_after: Iteration of the checkpoint that is resumed from, if that is whole; None starts a new run.
        accumulation: Batches that each process accumulates in a step.
        step: How many iterations a step counts as, by its images.
        began: What a step was made of when the run began: processes, accumulation, images in the batches that are used,
            ``step``.
        now: What it is made of now.
        asked: Has the batch sizes that are asked for.
    """

    config: RunConfig
    earlier: tuple[EarlierRun, ...]
    resumes_after: int | None
    accumulation: int
    step: Fraction
    began: Mapping[str, Any]
    now: Mapping[str, Any]
    asked: DataConfig

    def batches(self, data: DataConfig) -> DataConfig:
        """Return data settings with the batch sizes that are asked for."""
        return _with_batches(data, self.asked)


def prepare(
    config: RunConfig,
    folder: RunFolder,
    ranks: DistInfo,
    resume: Resume,
    *,
    overwrite: bool = False,
) -> Start:
    """Decide how a training starts, before it opens its data; writes nothing.

    A new run is scaled to its number of processes; see `scale_training`. A run that is resumed keeps what an iteration was in
    it, so that its schedule continues. Where the number of processes alone is another one, a step keeps its batches by
    accumulation, as nearly as they can be shared evenly. Another batch size or accumulation is used as it is given. Progress is
    counted in images, and the learning rate follows ``training.scaling``. What differs is reported.

    Args:
        config: The configuration that is asked for, before scaling.
        folder: The run folder; may be absent.
        ranks: The processes.
        resume: What to do with checkpoints that are there.
        overwrite: Whether ``never`` removes the run that is there.

    Raises:
        ConfigError: The folder holds a run, and a new one is to be started; or the run that is resumed has other settings.
        CheckpointError: The checkpoint that is given is absent or damaged.
    """
    earlier: list[EarlierRun] = []
    resumes_after: int | None = None
    if not (resume == "never" and overwrite):
        here = earlier_run(folder, type(config))
        if resume == "never" and here is not None:
            raise ConfigError(
                f"{folder.root} already holds a run.",
                hint="train in another folder (--output), resume the run (--resume auto), or remove it: --overwrite",
                path=folder.root,
            )
        earlier = [] if here is None else [here]
        found = list_checkpoints(folder.checkpoints)
        resumes_after = found[-1][0] if found else None
        if isinstance(resume, Path):
            resumes_after = int(read_header(resume)["iteration"])
            own = resume.parent.parent if resume.parent.name == "checkpoints" else resume
            if here is None or own.resolve() != folder.root.resolve():
                other = earlier_run(RunFolder(own), type(config), resume)
                earlier += [] if other is None else [other]
                if other is None:
                    what = f"The settings with which {resume} was written are not known"
                    _warn_once(f"{what}; they are not compared")
    run = config if resumes_after is None else keep_weights(config, earlier)
    training, accumulation = run.training, run.training.accumulation
    labels = _has_image_labels(config.data)
    now = _batches(ranks.world_size, accumulation, config.data, labels)
    began, data_before = now, config.data
    if earlier:
        before, data_before = earlier[-1].config.training, earlier[-1].config.data
        processes = before.replicas // before.accumulation
        began = _batches(processes, before.accumulation, data_before, labels)
        if began == {**now, "processes": processes}:
            accumulation = max(1, round(before.replicas / ranks.world_size))
            now = {**now, "training.accumulation": accumulation}
        training = dataclasses.replace(
            scale_training(training, before.replicas), accumulation=before.accumulation
        )
        run = dataclasses.replace(run, data=_with_batches(run.data, data_before))
    else:
        training = scale_training(training, ranks.world_size * accumulation)
    run = dataclasses.replace(run, training=training)
    for one in earlier:
        check_same(one, run, before_data=True)
    images, images_before = (
        mean_batch(data.boxes, data.image_labels if labels else None)
        for data in (config.data, data_before)
    )
    step = Fraction(ranks.world_size * accumulation, training.replicas) * images / images_before
    changed = [f"{key} {now[key]} instead of {began[key]}" for key in now if now[key] != began[key]]
    if changed and ranks.is_main:
        times = f"{float(step):g}"
        rates = f"; learning rates are multiplied by {times}" * (training.scaling == "linear")
        then = f"{times} times the images a step{rates}; a step counts as {times} iterations"
        if step == 1:
            then = "as many images a step as before"
        logger.warning("Resuming with %s: %s", ", ".join(changed), then)
    return Start(
        config=run,
        earlier=tuple(earlier),
        resumes_after=resumes_after,
        accumulation=accumulation,
        step=step,
        began={**began, "step": "1"},
        now={**now, "step": str(step)},
        asked=config.data,
    )


def _has_image_labels(data: DataConfig) -> bool:
    """Whether images with labels are trained; by the settings alone where the dataset config cannot be read, which fails later."""
    if data.image_labels is not None and data.description is not None:
        with contextlib.suppress(ProxydetError):
            return DatasetConfig.from_toml(data.description).image_labels is not None
    return data.image_labels is not None


def _batches(processes: int, accumulation: int, data: DataConfig, labels: bool) -> dict[str, Any]:
    """Return what a step is made of, of the data that are used."""
    made = {"processes": processes, "training.accumulation": accumulation}
    made["data.boxes.batch_size"] = data.boxes.batch_size
    if labels and data.image_labels is not None:
        made["data.image_labels.batch_size"] = data.image_labels.batch_size
    return made


def _with_batches(data: DataConfig, like: DataConfig) -> DataConfig:
    """Return data settings with the batch sizes of others."""
    labels = data.image_labels
    if labels is not None and like.image_labels is not None:
        labels = dataclasses.replace(labels, batch_size=like.image_labels.batch_size)
    boxes = dataclasses.replace(data.boxes, batch_size=like.boxes.batch_size)
    return dataclasses.replace(data, boxes=boxes, image_labels=labels)


def keep_weights(config: RunConfig, earlier: Sequence[EarlierRun]) -> RunConfig:
    """Return the configuration of a run that is resumed from a checkpoint, or finished, with the weights it began from.

    Others that are asked for are not used, which is said.
    """
    asked = config.training.weights
    before = earlier[-1].config.training.weights if earlier else None
    if asked == before:
        return config
    if asked is not None:
        began = f" ({before})" if before is not None else ""
        _warn_once(
            f"The starting weights {asked} are not used: the run began from others{began}. A new run starts from them: "
            "--output FOLDER"
        )
    training = dataclasses.replace(config.training, weights=before)
    return dataclasses.replace(config, training=training)
