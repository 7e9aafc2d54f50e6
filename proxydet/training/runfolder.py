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
    ├── tensorboard/
    ├── checkpoints/         step_XXXXXXX.pth
    ├── evaluations/         predictions and report of each evaluation
    ├── plots/               losses and metrics over the iterations
    ├── failures/            batches whose loss was not finite
    ├── logs/                what each process wrote
    ├── aside/               what came after a checkpoint that the run went back to
    ├── train.lock           while it trains
    ├── model_final.safetensors  the weights after the last step, with recipe and classes
    └── model_final.pth      the same as a file of torch.save; written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from proxydet.config import differences, from_mapping, load_mapping
from proxydet.errors import ConfigError, InputError, LockedError
from proxydet.files import JsonLines, Lock, read_json, sweep, write_text
from proxydet.manifest import require_whole
from proxydet.training.checkpoint import CheckpointFolder, read_iteration, read_run
from proxydet.training.config import CheckpointConfig, S, scale_training
from proxydet.training.distributed import DistInfo
from proxydet.training.launch import LAUNCHER

logger = logging.getLogger(__name__)

C = TypeVar("C")

Resume = Literal["auto", "never"] | Path
"""``auto`` resumes from the newest checkpoint of the run folder if there is one, ``never`` starts a new run, a path resumes
from that checkpoint."""


# Keys that may differ when a run is resumed: they do not change what is learnt, or by a stated rule.
_FREE_KEYS = (
    "recipe",
    "training.device",
    "training.threads",
    "training.accumulation",
    "training.checkpoints",
    "training.evaluation",
    "training.log",
    "training.guards",
    "training.weights",
    "data.workers",
    "data.prefetch",
    "data.worker_timeout_s",
    "data.cache",
    *(EVALUATION_KEYS := ("data.test_", "inference", "evaluation")),
)
# What training decides when it has read the data.
_DATA_DECIDES = ("data.masks", "model.masks", "model.classifier.embedding_dim")


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
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.plots = root / "plots"
        self.failures = root / "failures"
        self.logs = root / "logs"
        self.lock = root / "train.lock"
        self.final_safetensors = root / "model_final.safetensors"
        self.final_weights = root / "model_final.pth"
        """A run that has them is finished."""

    def list_checkpoints(self) -> list[tuple[int, Path]]:
        """Return (iteration, path) of the checkpoints, oldest first."""
        return CheckpointFolder(self.checkpoints, CheckpointConfig()).list()

    def evaluation(self, iteration: int) -> Path:
        """Return the folder for the predictions and the report of one evaluation during training."""
        return self.root / "evaluations" / f"step_{iteration:07d}"

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Keep other trainings out of the folder, and remove what killed ones were writing.

        For the first process of a training: the launcher that starts the others, or the main one. Where this process or its
        launcher holds the folder already, nothing is done.

        Yields:
            A function that makes sure that the folder is still held. It raises LockedError where another training has taken
            over, because this one was suspended and taken for dead.

        Raises:
            LockedError: Another training holds the folder; nothing in it was changed.
            EnvironmentProblem: The folder cannot be written to.
        """
        lock = Lock(
            self.lock,
            subject=f"the run folder {self.root}",
            hint="wait for it to end, or stop it; or train in another folder: --output",
        )
        owner = lock.owner()
        ours = (os.getpid(), int(os.environ.get(LAUNCHER, "0")))
        mine = owner is None or owner.has_ended or not (owner.is_here and owner.pid in ours)
        made = not self.root.exists()
        if mine:
            lock.acquire(wait=False)
            owner = lock.owner()
            if lock.held:
                for folder in (self.root, self.checkpoints, self.failures, self.plots):
                    sweep(folder, sole_writer=True)

        def check() -> None:
            now = lock.owner()
            if owner is not None and now is not None and now.since and now != owner:
                raise LockedError(
                    f"another training has taken over the run folder {self.root} ({now}), as this one did not show life "
                    "for long",
                    hint="leave the folder to it",
                    path=self.root,
                )

        try:
            yield check
        finally:
            if mine:
                lock.release()
                if made:
                    with contextlib.suppress(OSError):
                        self.root.rmdir()  # a training that was refused leaves no empty folder

    def set_aside_after(self, iteration: int) -> None:
        """Move away all that came after an iteration that the run goes back to; it is not part of the run any more.

        Log lines alone, which a killed process wrote after its last checkpoint, are removed: the same ones come again.
        """
        later = [path for at, path in self.list_checkpoints() if at > iteration]
        for path in (self.root / "evaluations").glob("step_*"):
            if path.name > f"step_{iteration:07d}":
                later.append(path)
        if not later:
            return
        # First what makes it a finished run: a kill in between leaves one that is not.
        finals = [p for p in (self.final_weights, self.final_safetensors) if p.exists()]
        aside = self.root / "aside" / f"after_step_{iteration:07d}"
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"after_step_{iteration:07d}-{number}")
        for path in (*finals, *later):
            target = aside / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        for path in (self.metrics, self.evaluations):
            removed = JsonLines(path).keep(lambda r: not _later(r.get("iteration"), iteration))
            if removed:
                write_text(aside / path.name, "".join(json.dumps(r) + "\n" for r in removed))
        logger.warning(
            "The run goes back to iteration %d; what came after it is now in %s", iteration, aside
        )

    def remove_unfinished_evaluations(self) -> None:
        """Remove the predictions of an evaluation that was interrupted: with other settings it starts again."""
        done = {record.get("iteration") for record in JsonLines(self.evaluations).read()}
        for path in (self.root / "evaluations").glob("step_*"):
            if path.name.removeprefix("step_").isdigit() and int(path.name[5:]) not in done:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove the run that the folder holds; files that are not a run's stay."""
        for path in (self.checkpoints, self.tensorboard, self.plots, self.failures):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("evaluations", "aside"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in (self.config, self.vocabulary, self.text_encoder, self.environment, self.manifest,
                     self.metrics, self.evaluations, self.final_safetensors, self.final_weights):  # fmt: skip
            path.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path, what="manifest", default={})
    require_whole(content)
    return content


def _later(value: object, iteration: int) -> bool:
    return type(value) is int and value > iteration


@dataclass(frozen=True, kw_only=True)
class EarlierRun(Generic[C]):
    """What the run in a folder, or of a checkpoint, was made from."""

    source: Path
    """The file that says so."""

    config: C
    """Its configuration; ``training.replicas`` is what an iteration means in it."""

    digests: Mapping[str, str]
    """Digests of its data and vocabulary; empty where they are not known."""

    finished: bool
    """Whether it came to its end."""


def earlier_run(
    folder: RunFolder, kind: type[C], checkpoint: Path | None = None
) -> EarlierRun[C] | None:
    """Find out what run a folder holds: from ``config.yaml``, ``manifest.json``, or else its newest checkpoint.

    Args:
        folder: The run folder; may be absent.
        kind: Class of the configuration; keys that an earlier version did not have get their defaults.
        checkpoint: Asked in place of the newest one of the folder.

    Returns:
        The run; None where there is none.

    Raises:
        ConfigError: It has checkpoints, and nothing tells what of.
    """
    problems: list[str] = []

    def read(path: Path, what: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return what(*arguments)
        except InputError as error:
            problem = error.message.rstrip(".")
            problems.append(problem if str(path) in problem else f"{path}: {problem}")
            return None

    found = [path for _, path in folder.list_checkpoints()]
    newest = [checkpoint] if checkpoint is not None else found[::-1]
    manifest = read(folder.manifest, _read_manifest, folder.manifest) or {}
    config = read(folder.config, load_mapping, folder.config) if folder.config.is_file() else None
    if config is None and folder.config.exists() and not problems:
        problems.append(f"{folder.config} is not a regular file")
    records = itertools.chain(
        [(folder.config, {**manifest, "configuration": config}), (folder.manifest, manifest)],
        ((path, read(path, read_run, path) or {}) for path in newest),
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
        if problems:
            logger.warning("%s; using %s", "; ".join(problems), source)
        return EarlierRun(
            source=source,
            config=known,
            digests=digests if isinstance(digests, Mapping) else {},
            finished=folder.final_weights.exists(),
        )
    if not found and not (problems and folder.final_weights.exists()):
        return None
    raise ConfigError(
        f"{folder.root} holds a run, and nothing tells with which settings: {'; '.join(problems) or 'there are no records'}",
        hint=f"put {folder.config.name} back, train in another folder (--output), or remove the run: --resume never --overwrite",
        path=folder.config,
    )


def check_same(
    folder: RunFolder, earlier: EarlierRun[Any], config: Any, *, before_data: bool = False
) -> None:
    """Make sure that a configuration is that of an earlier run, apart from what may differ on resume.

    Args:
        folder: The run folder, for messages.
        earlier: The run.
        config: The configuration, scaled to the earlier one's ``training.replicas``.
        before_data: Leaves out what training decides when it has read the data.

    Raises:
        ConfigError: They differ; the message says in what.
    """
    free = _FREE_KEYS + (_DATA_DECIDES if before_data else ())
    changed = [
        f"{key}: {before!r} there, {now!r} now"
        for key, (before, now) in differences(earlier.config, config).items()
        if not key.startswith(free)
    ]
    if changed:
        raise ConfigError(
            f"{folder.root} holds a run with other settings ({'; '.join(changed[:5])}).",
            hint="train in another folder (--output); resume with the same settings "
            f"(--config {earlier.source}); start from its weights (--weights); or remove it: --resume never --overwrite",
            path=earlier.source,
        )


def check_same_data(
    folder: RunFolder, earlier: EarlierRun[Any], digests: Mapping[str, str]
) -> None:
    """Make sure that the data of an earlier run are as they were.

    Raises:
        ConfigError: They are not; the message says which.
    """
    changed = []
    for name, digest in digests.items():
        before = earlier.digests.get(name, digest)
        # Version 0.1 wrote the version of the store behind the digest of the annotations.
        if not isinstance(before, str) or before.partition("-v")[0] != digest:
            changed.append(name)
    if changed:
        raise ConfigError(
            f"{folder.root} holds a run on other data: the {' and the '.join(changed)} changed since.",
            hint="put the files back as they were; or train in another folder (--output), from this run's weights if "
            "you like (--weights)",
            path=folder.manifest,
        )


def after_restart(resume: Resume) -> Resume:
    """Return what to do with checkpoints when torchrun starts a process again: a new run has become the one that is there."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "auto" if resume == "never" and restarted else resume


def default_folder(base: Path, config: S, resume: Resume) -> tuple[Path, str]:
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
    for number in range(1, 10_000):
        folder = RunFolder(base if number == 1 else base.with_name(f"{base.name}-{number}"))
        try:
            earlier = earlier_run(folder, type(config))
            if earlier is None:
                break
            if resume == "never":
                raise ConfigError(f"{folder.root} holds a run")
            scaled = scale_to(config, earlier.config.training.replicas)
            check_same(folder, earlier, scaled, before_data=True)
        except ConfigError as error:
            reasons.append(error.message.rstrip("."))
            continue
        state = "which is finished" if earlier.finished else "which is not finished"
        return folder.root, f"it holds the same run, {state}"
    return folder.root, reasons[0] if reasons else ""


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
        scaled = scale_to(config, earlier.config.training.replicas)
        check_same(folder, earlier, scaled, before_data=True)
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
