"""What a training would do, without doing it: data it needs and what is missing, size, time, launch command."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proxydet.config import dump_yaml, to_mapping
from proxydet.data.dataset import DatasetConfig, embedding_dimension, load_vocabulary, open_split
from proxydet.data.store import AnnotationStore
from proxydet.errors import CheckpointError, DataError, InputError, ProxydetError
from proxydet.files import Lock
from proxydet.training.checkpoint import CheckpointFolder, read_iteration
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo, choose_device
from proxydet.training.estimate import Estimate, estimate_run
from proxydet.training.launch import LaunchPlan
from proxydet.training.runfolder import EarlierRun, Resume, RunFolder, check_same
from proxydet.training.step import check_precision
from proxydet.training.train import (
    RunSettings,
    S,
    continue_run,
    find_earlier,
    fit_to_embeddings,
    fit_to_masks,
)

# Annotation files up to this are looked into; it takes well under a second.
_LARGEST_READ = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Need:
    """A file or folder that a training reads."""

    what: str
    """What it is for."""

    path: str
    """Where it is expected; empty where nothing names it."""

    present: bool
    """Whether it is there."""

    problem: str = ""
    """What is wrong with it, where that is more than being absent."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training would do."""

    folder: Path
    """The run folder."""

    resumes_after: int | None
    """Iteration of the checkpoint that it would go on with; None starts anew."""

    launch: LaunchPlan
    """Processes."""

    config: RunSettings
    """The configuration of the run: resolved, scaled to the number of processes, fitted to the text embeddings."""

    needs: tuple[Need, ...]
    """What it reads."""

    notes: tuple[str, ...]
    """What to know of it: that no masks are trained, or not by all objects."""

    estimate: Estimate
    """Memory and time."""

    command: tuple[str, ...]
    """The launch command, as words."""

    @property
    def missing(self) -> tuple[Need, ...]:
        """What is not there, or not usable."""
        return tuple(need for need in self.needs if not need.present)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return {
            "folder": str(self.folder),
            "resumes_after": self.resumes_after,
            "processes": self.launch.world_size,
            "needs": [dataclasses.asdict(need) for need in self.needs],
            "notes": list(self.notes),
            "estimate": dataclasses.asdict(self.estimate),
            "command": list(self.command),
            "configuration": to_mapping(self.config),
        }

    def to_text(self) -> str:
        """Return the plan for people to read: the configuration first, what to do about it last."""
        start = (
            "starts anew"
            if self.resumes_after is None
            else f"goes on after iteration {self.resumes_after}"
        )
        lines = [
            dump_yaml(self.config, comments=False).rstrip(),
            "",
            f"run folder   {self.folder} ({start})",
            f"processes    {self.launch.world_size} on {self.launch.nodes} machine(s)",
            *(f"masks        {note}" for note in self.notes),
            *self.estimate.lines(),
            "",
            "what it needs",
            *(f"  {_mark(need):8} {need.what:22} {_place(need)}" for need in self.needs),
            "",
            "command",
            f"  {shlex.join(self.command)}",
        ]
        if self.missing:
            lines += ["", f"{len(self.missing)} missing or unusable: training cannot start yet."]
        return "\n".join(lines)


def plan_training(
    config: S,
    launch: LaunchPlan,
    output: Path,
    words: Sequence[str],
    *,
    resume: Resume = "auto",
    overwrite: bool = False,
) -> TrainingPlan:
    """Find out what a training would do. Looks at files, reads none of the large ones.

    Args:
        config: The configuration, before scaling to the number of processes.
        launch: Processes.
        output: The run folder.
        words: What follows ``proxydet`` on the command line, without the choice of processes.
        resume: What to do with checkpoints that are there. A run folder that the training would refuse, and a checkpoint
            that is not one, are among the needs; whether the data changed since is not checked.
        overwrite: Whether ``never`` removes the run that is there.
    """
    folder = RunFolder(output)
    earlier, start_needs, resumes_after = _start(folder, config, resume, overwrite=overwrite)
    ranks = DistInfo(world_size=launch.world_size, device=torch.device("cpu"))
    scaled, _ = continue_run(config, earlier, ranks)
    description, needs = _description(scaled.data.description)
    notes: list[str] = []
    decided = False
    if description is not None:
        scaled, embeddings = _embeddings(description, scaled)
        needs += [embeddings, *_data_needs(description, scaled)]
        readable = all(need.present for need in needs if need.what == "training annotations")
        if embeddings.present and readable:
            scaled, notes, problems = _masks(description, scaled)
            needs += problems
            decided = not problems and scaled.data.masks != "auto"
    for run in earlier:
        try:
            check_same(folder, run, scaled, before_data=not decided)
        except ProxydetError as error:
            start_needs.append(_unusable("run folder", folder.root, error))
    return TrainingPlan(
        folder=folder.root,
        resumes_after=resumes_after,
        launch=launch,
        config=scaled,
        needs=(*start_needs, *_machine_needs(scaled.training), *needs),
        notes=tuple(notes),
        estimate=estimate_run(
            scaled.model,
            scaled.data.boxes,
            scaled.data.image_labels,
            scaled.training,
            launch.world_size,
        ),
        command=launch.command(words),
    )


def _start(
    folder: RunFolder, config: S, resume: Resume, *, overwrite: bool
) -> tuple[list[EarlierRun[S]], list[Need], int | None]:
    """Return the runs that would be continued, what keeps the training from it, and the iteration to resume after."""
    needs, earlier, after = [], [], None
    owner = Lock(folder.lock).owner()
    if owner is not None and not owner.has_ended:
        problem = f"it is in use by {owner}"
        needs.append(Need(what="run folder", path=str(folder.root), present=False, problem=problem))
    try:
        earlier = find_earlier(folder, config, resume, overwrite=overwrite)
        if isinstance(resume, Path):
            after = read_iteration(resume)
            needs.append(_need("checkpoint", resume))
        elif resume == "auto":
            found = CheckpointFolder(folder.checkpoints, config.training.checkpoints).list()
            after = found[-1][0] if found else None
    except CheckpointError as error:
        needs.append(_unusable("checkpoint", error.path or folder.checkpoints, error))
    except ProxydetError as error:
        needs.append(_unusable("run folder", folder.root, error))
    return earlier, needs, after


def _description(path: Path | None) -> tuple[DatasetConfig | None, list[Need]]:
    """Read the dataset config, if it can be read."""
    if path is None:
        text = "give one with --data"
        return None, [Need(what="dataset config", path="", present=False, problem=text)]
    need = _need("dataset config", path)
    if not path.is_file():
        return None, [dataclasses.replace(need, present=False)]
    try:
        return DatasetConfig.from_toml(path), [need]
    except InputError as error:
        return None, [dataclasses.replace(need, present=False, problem=error.message)]


def _machine_needs(training: TrainingConfig) -> list[Need]:
    needs = []
    try:
        check_precision(training.precision, choose_device(training.device))
    except ProxydetError as error:
        needs.append(Need(what="precision", path="", present=False, problem=_in_full(error)))
    if training.weights is not None:
        needs.append(_need("starting weights", training.weights))
    return needs


def _data_needs(description: DatasetConfig, config: RunSettings) -> list[Need]:
    needs = []
    if description.train is None:
        text = "the dataset config has no [train] table"
        needs.append(Need(what="training annotations", path="", present=False, problem=text))
    for name, split in (("training", description.train), ("validation", description.val)):
        if split is not None:
            needs.append(_annotations(name, split.annotations))
            needs += [_need(f"{name} images", root) for root in split.roots]
    labels = description.image_labels
    if config.data.image_labels is not None and labels is not None:
        paths = [path for path in (labels.tars, labels.annotations, *labels.roots) if path]
        needs += [_need("image labels", path) for path in paths]
    return needs


def _embeddings(description: DatasetConfig, config: S) -> tuple[S, Need]:
    """Return the configuration with a classifier that fits the text embeddings, and whether they are usable."""
    path = description.classes.embeddings
    need = _need("text embeddings", path)
    if not path.is_file():
        return config, need
    try:
        return fit_to_embeddings(config, embedding_dimension(path)), need
    except ProxydetError as error:
        return config, dataclasses.replace(need, present=False, problem=_in_full(error))


def _masks(description: DatasetConfig, config: S) -> tuple[S, list[str], list[Need]]:
    """Decide whether masks are trained, as training does, unless that means to read a large annotation file."""
    split, cache = description.train, config.data.cache
    if split is None or not split.annotations.is_file():
        return config, [], []
    path = split.annotations
    try:
        large = path.stat().st_size > _LARGEST_READ
        if large and not AnnotationStore.path_for(path, cache=cache).is_file():
            return config, ["decided when training reads the annotations (data.masks)"], []
        store = open_split(description, "train", cache=cache, warn=False)
        fitted, note = fit_to_masks(config, store, load_vocabulary(description, cache=cache))
    except ProxydetError as error:
        return config, [], [_unusable("classes and masks", path, error)]
    return fitted, [note] if note else [], []


def _in_full(error: ProxydetError) -> str:
    return " ".join(filter(None, [error.message, error.hint]))


def _unusable(what: str, path: Path, error: ProxydetError) -> Need:
    problem = _in_full(error).removeprefix(f"{path} ")
    return Need(what=what, path=str(path), present=False, problem=problem)


def _need(what: str, path: Path) -> Need:
    return Need(what=what, path=str(path), present=path.exists())


def _annotations(split: str, path: Path) -> Need:
    """Open the annotations of a split as training and evaluation do, unless they are large."""
    what = f"{split} annotations"
    if not path.exists() or path.stat().st_size > _LARGEST_READ:
        return _need(what, path)
    try:
        AnnotationStore.open(path, warn=False).require_objects(groups=split != "training")
    except DataError as error:
        problem = error.message
    else:
        problem = ""
    return Need(what=what, path=str(path), present=not problem, problem=problem)


def _mark(need: Need) -> str:
    if need.present:
        return "there"
    return "UNUSABLE" if need.problem and need.path else "MISSING"


def _place(need: Need) -> str:
    return ": ".join(part for part in (need.path, need.problem) if part)
