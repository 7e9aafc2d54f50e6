"""What a training would do, without doing it: data it needs and what is missing, rough memory and time, launch command.

For the estimate the network is run on torch's meta device, which computes shapes only: that gives the multiply-adds of a step and
the bytes that its backward pass keeps, for any configuration, part by part: each computes in a precision of its own. Pooling,
proposals, losses and the optimiser are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from proxydet.config import differences, dump_yaml, to_mapping
from proxydet.data.config import SourceConfig
from proxydet.data.dataset import Dataset, DatasetConfig, command_that_makes, embedding_dimension
from proxydet.data.loader import Targets
from proxydet.data.records import AnnotationSource
from proxydet.data.store import AnnotationStore
from proxydet.errors import CheckpointError, DataError, ProxydetError
from proxydet.files import Lock
from proxydet.modeling.backbone import build_backbone
from proxydet.modeling.centernet import CenterNet
from proxydet.modeling.config import ModelConfig, Precision
from proxydet.modeling.network import usable_precision
from proxydet.modeling.roi_heads import RoiHeads
from proxydet.paths import list_checkpoints
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo, choose_device
from proxydet.training.launch import LaunchPlan
from proxydet.training.runfolder import (
    Resume,
    RunFolder,
    check_same,
    earlier_run,
    is_whole,
    prepare,
)
from proxydet.training.step import check_precision
from proxydet.training.train import (
    check_own_code,
    fit_to_backbone,
    fit_to_embeddings,
    fit_to_masks,
    lacking_weights,
    question_length,
)

if TYPE_CHECKING:
    from proxydet.recipes import RunConfig

# Annotation files up to this are read; it takes well under a second.
_LARGEST_READ = 64 * 1024 * 1024
# AdamW: weight, gradient and two moments in float32.
_BYTES_PER_PARAMETER = 16
# What the backward pass keeps is written and read, and so is its gradient; a weight is read forward and backward, and its gradient
# written; gradients, moments and weights in the optimiser.
_TIMES_MOVED = 4
_WEIGHT_BYTES = 12
_OPTIMIZER_BYTES = 44
# Launches of kernels for a batch, or calls of operators on a CPU, which do not grow with it.
_LAUNCHES = {"boxes": 2200, "labels": 1000}
# Where the annotations are not read: objects of an image in LVIS' training annotations, crowds none.
_OBJECTS_AN_IMAGE = 12.7
# Proposals that match an object, and its own box. Measured with the quickstart's trained detector (100 proposals an image): 7.6 to
# 11 in 13 batches. With fresh weights it is the object's own box.
_REGIONS_AN_OBJECT = 9
# What a CPU takes of an operator within a step, over the probe's, which calls the same few again: other code and data are in its
# caches. Measured on steps of the quickstart: 2,300 calls in 0.15 s, of which 0.05 s were arithmetic.
_COLD = 3
# What a part keeps for its backward pass in 16 bits, over that in float32: autocast computes group norms in float32 on a GPU, and
# keeps what they were given and return next to the 16-bit input of the next convolution (r50: 10 maps in place of 9, and the
# weights in 16 bits: 1.12; on a CPU, whose group norms stay in 16 bits, 0.62).
_KEPT_IN_16_BITS = {"backbone": 0.5, "tower": 1.125, "box heads": 0.5, "mask head": 0.5}
_PROBE_SECONDS = 0.3
_PROBE_ROUNDS = 3
_PROBE_BYTES = 128 << 20
_PROBE_LAUNCHES = 500
# Operations a second from which a large convolution is worth the time.
_FAST = 5e9


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

    command: str = ""
    """A command that makes it where it is absent; empty where none is known."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """What a device reaches."""

    operations: dict[str, float]
    """Floating-point operations a second of a large convolution, by precision."""

    moved: float
    """Bytes a second that are read or written by a copy of a large tensor over another."""

    fresh: float
    """Bytes a second that are read or written by an operation that returns a new large tensor."""

    launch: float
    """Seconds of a small operation within a step."""


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What a part of the network takes of one batch."""

    name: str
    """backbone (with the pyramid), tower (of the proposal network), box heads or mask head."""

    precision: Precision
    """Of its products."""

    operations: float
    """Floating-point operations, forward and backward; a multiply-add is two."""

    kept_bytes: float
    """What the forward pass keeps for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class BatchCost:
    """What one batch of a source takes."""

    kind: str
    """boxes or labels."""

    images: int
    """Images."""

    share: float
    """Share of the batches that are of this source, in [0, 1]."""

    regions: int
    """Regions that the box heads learn from."""

    on_objects: int
    """Those of them that stand for objects, expected once proposals find them: mixup branch and mask head learn from these."""

    weight_bytes: float
    """Weights that are read, and gradients that are written."""

    parts: tuple[PartCost, ...]
    """What each part takes."""

    @property
    def kept_bytes(self) -> float:
        """What the forward pass keeps for the backward pass."""
        return sum(part.kept_bytes for part in self.parts)

    def seconds(self, speed: DeviceSpeed) -> float:
        """Return its time: arithmetic, each part in its precision; moving what is kept; and launching."""
        arithmetic = sum(part.operations / speed.operations[part.precision] for part in self.parts)
        moving = (_TIMES_MOVED * self.kept_bytes + self.weight_bytes) / speed.fresh
        return arithmetic + moving + _LAUNCHES[self.kind] * speed.launch


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training takes, roughly: within a factor of two on an idle machine."""

    device: str
    """Where it would compute."""

    parameters: int
    """Parameters of the network."""

    memory_gib: float
    """Memory of the device, a process."""

    seconds_per_step: float
    """Time of a step: of the slowest process, on average over the steps."""

    speed: DeviceSpeed
    """What the device reached in a short probe: of a CPU, what it would reach if no other program ran."""

    objects_an_image: float
    """Objects of a training image: of the annotations where they were read, else LVIS'."""

    batches: tuple[BatchCost, ...]
    """What the time and memory are computed from."""

    together: bool
    """Whether the batches of a step are of one kind on all processes, or each process draws its own."""

    processes: int
    """How many processes train."""

    hours: float
    """Time of all steps that are left."""

    images: int
    """Images that all processes see in them."""

    def lines(self) -> list[str]:
        """Return the estimate for people to read."""
        hours = self.hours
        duration = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
        if hours < 1:
            duration = f"{max(hours * 60, 0.1):.2g} minutes"
        lines = [
            f"device       {self.device}, at least {self.memory_gib:.2g} GiB a process, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"time         about {duration}: {self.seconds_per_step:.2g} s a step, "
            f"{self.images:,} images; a rough guess: a convolution reaches "
            + ", ".join(
                f"{speed / 1e9:.3g} GFLOP/s in {precision}"
                for precision, speed in self.speed.operations.items()
            )
            + f", a copy {self.speed.moved / 1e9:.3g} GB/s, into new memory {self.speed.fresh / 1e9:.3g}, "
            f"a small operation {self.speed.launch * 1e6:.2g} us (it takes longer where other programs run)",
        ]
        for batch in self.batches:
            parts = ", ".join(
                f"{part.name} {part.operations / 1e12:.2g} in {part.precision}"
                for part in batch.parts
            )
            lines.append(
                f"{'of ' + batch.kind:12} {batch.images} images a process, {batch.share:.0%} of the batches: "
                f"{batch.seconds(self.speed):.2g} s, {batch.kept_bytes / 2**30:.2g} GiB kept for the backward "
                f"pass; TFLOP: {parts}; box heads learn from {batch.regions:,} regions"
                + (
                    f", {batch.on_objects:,} on objects (of {self.objects_an_image:.3g} objects an image, {_REGIONS_AN_OBJECT} "
                    "regions each, up to cascade.positive_fraction; with fresh weights fewer at first)"
                    * bool(batch.on_objects)
                )
            )
        if self.processes > 1 and len(self.batches) > 1:
            lines.append(
                "of a step    all processes take the same kind of batch (data.ranks_share_group)"
                if self.together
                else f"of a step    the slowest of {self.processes} processes, which draw the kinds of their batches independently "
                "(data.ranks_share_group=true: the same kind)"
            )
        if self.device == "cpu" and self.hours > 24:
            lines.append("slow         this recipe is made for GPUs; on a CPU it takes very long")
        return lines


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training would do."""

    folder: Path
    """The run folder."""

    resumes_after: int | None
    """Iteration of the checkpoint that it would resume from; None starts a new run."""

    removes: int | None
    """Iterations of the run in the folder that it would remove; None where it removes none."""

    finished: bool
    """Whether the run is finished, so that nothing would be done."""

    launch: LaunchPlan
    """Processes."""

    config: RunConfig
    """The configuration of the run: resolved, scaled to the number of processes, fitted to the text embeddings."""

    given: TrainingConfig
    """The training's settings as they are given, before scaling."""

    needs: tuple[Need, ...]
    """What it reads."""

    notes: tuple[str, ...]
    """What to know of it: that no masks are trained, or not by all objects; that it is long for so few images."""

    estimate: Estimate
    """Memory and time."""

    command: tuple[str, ...]
    """The launch command, as words."""

    @property
    def missing(self) -> tuple[Need, ...]:
        """What is not there, or not usable; a finished run needs nothing."""
        return () if self.finished else tuple(need for need in self.needs if not need.present)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return {
            "folder": str(self.folder),
            "resumes_after": self.resumes_after,
            "removes": self.removes,
            "finished": self.finished,
            "processes": self.launch.world_size,
            "needs": [dataclasses.asdict(need) for need in self.needs],
            "notes": [note.partition(" ")[2].strip() for note in self.notes],
            "scaled": {
                key: list(values)
                for key, values in differences(self.given, self.config.training, "training").items()
            },
            "estimate": dataclasses.asdict(self.estimate),
            "command": list(self.command),
            "configuration": to_mapping(self.config),
        }

    def to_text(self) -> str:
        """Return the plan for people to read: the configuration first, what to do about it last."""
        start = (
            "finished: nothing to do"
            if self.finished
            else f"starts a new run; removes the run of {self.removes} iterations that it holds"
            if self.removes is not None
            else "starts a new run"
            if self.resumes_after is None
            else f"resumes after iteration {self.resumes_after}"
        )
        lines = [
            dump_yaml(self.config, comments=False).rstrip(),
            "",
            f"run folder   {self.folder} ({start})",
            f"processes    {self.launch.world_size} on {self.launch.nodes} machine(s)",
            *self.notes,
            *self._scaling(),
            *self.estimate.lines(),
            "",
            "what it needs",
            *(
                f"  {'there' if need.present else 'UNUSABLE' if need.problem and need.path else 'MISSING':8} "
                f"{need.what:22} {': '.join(filter(None, [need.path, need.problem]))}"
                for need in self.needs
            ),
            "",
            "command"
            + (
                " (the same by torchrun, on each node)"
                * bool(self.launch.started and self.launch.torchrun)
            ),
            f"  {shlex.join(self.command)}",
        ]
        if self.missing:
            lines += ["", f"{len(self.missing)} missing or unusable: training cannot start yet."]
        commands = dict.fromkeys(need.command for need in self.missing if need.command)
        if commands:
            lines += ["what is missing comes with", *(f"  {command}" for command in commands)]
        return "\n".join(lines)

    def _scaling(self) -> list[str]:
        """What other numbers of batches a step made of the settings, as one line; none where they are used as given."""
        now, given = self.config.training, self.given
        if now.iterations == given.iterations or now.replicas == given.replicas:
            return []
        factor = f"x {given.replicas / now.replicas:g}"
        return [
            f"scaled       {now.iterations:,} iterations, scaled from {given.iterations:,} {factor}; learning rate "
            f"{now.optimizer.learning_rate:.3g}, scaled from {given.optimizer.learning_rate:.3g}: the recipe counts on "
            f"{given.replicas} batches a step, here {now.replicas} (training.scaling)"
        ]


def plan_training(
    config: RunConfig,
    launch: LaunchPlan,
    output: Path,
    words: Sequence[str],
    *,
    resume: Resume = "auto",
    overwrite: bool = False,
) -> TrainingPlan:
    """Find out what a training would do. Reads no large file, but the weights of a run that is finished.

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
    needs: list[Need] = []
    finished = False

    def need(what: str, path: Path) -> None:
        needs.append(
            Need(
                what=what,
                path=str(path),
                present=path.exists(),
                command=command_that_makes(path) or "",
            )
        )

    def unusable(what: str, path: Path | str, problem: ProxydetError | str) -> None:
        if isinstance(problem, ProxydetError):
            text = " ".join(filter(None, [problem.message, problem.hint]))
            problem = text.removeprefix(f"{path} ")
        needs.append(Need(what=what, path=str(path), present=False, problem=problem))

    owner = Lock(folder.lock).owner()
    if owner is not None and not owner.has_ended:
        unusable("run folder", folder.root, f"it is in use by {owner}")
    ranks = DistInfo(world_size=launch.world_size, device=torch.device("cpu"))
    try:
        start = prepare(config, folder, ranks, resume, overwrite=overwrite)
        if isinstance(resume, Path):
            need("checkpoint", resume)
    except ProxydetError as error:
        if isinstance(error, CheckpointError):
            unusable("checkpoint", error.path or folder.checkpoints, error)
        else:
            unusable("run folder", folder.root, error)
        start = prepare(config, folder, ranks, "never", overwrite=True)
    scaled, resumes_after = start.config, start.resumes_after
    removes: int | None = None
    there = (folder.config, folder.manifest, folder.checkpoints, folder.final_weights)
    if overwrite and resume == "never" and any(path.exists() for path in there):
        removes = max((at for at, _ in list_checkpoints(folder.checkpoints)), default=0)
        with contextlib.suppress(ProxydetError):
            run = earlier_run(folder, type(config)) if folder.final_weights.exists() else None
            removes = run.config.training.iterations if run else removes
    compared = len(needs)

    training = scaled.training
    try:
        device = choose_device(training.device)
        check_precision(training.precision, device)
        usable_precision(config.inference.precision, device)
    except ProxydetError as error:
        unusable("precision", str(device), error)
    check_own_code(scaled)
    scaled = fit_to_backbone(scaled)
    if training.weights is not None and resumes_after is None:
        need("starting weights", training.weights)
    if resumes_after is None and (lacking := lacking_weights(scaled)) is not None:
        unusable("starting weights", "", lacking)
    path = scaled.data.description
    notes: list[str] = []
    decided, objects_an_image = False, _OBJECTS_AN_IMAGE
    description = None
    if path is None:
        unusable("dataset config", "", "give one with --data")
    else:
        need("dataset config", path)
        try:
            description = DatasetConfig.from_toml(path) if path.is_file() else None
        except ProxydetError as error:
            needs[-1] = dataclasses.replace(needs[-1], present=False, problem=error.message)
    if description is not None:
        embeddings = description.classes.embeddings
        need("text embeddings", embeddings)
        try:
            if embeddings.is_file():
                scaled = fit_to_embeddings(scaled, embedding_dimension(embeddings))
        except ProxydetError as error:
            text = " ".join(filter(None, [error.message, error.hint]))
            needs[-1] = dataclasses.replace(needs[-1], present=False, problem=text)
        if description.train is None:
            unusable("training annotations", "", "the dataset config has no [train] table")
        usable = needs[-1].present
        for name, split in (("training", description.train), ("validation", description.val)):
            if split is not None:
                needs.append(_annotations(name, split, scaled.data.cache))
                usable = usable and (name != "training" or needs[-1].present)
                for root in split.roots:
                    need(f"{name} images", root)
        labels = description.image_labels
        if scaled.data.image_labels is not None and labels is not None:
            for place in (labels.tars, labels.annotations, *labels.roots):
                if place:
                    need("image labels", place)
        if usable and description.train is not None:
            annotations, cache = description.train.annotations, scaled.data.cache
            large = annotations.stat().st_size > _LARGEST_READ
            if large and not AnnotationStore.path_for(description.train, cache=cache).is_file():
                notes = ["masks        decided when training reads the annotations (data.masks)"]
            else:
                try:
                    data = Dataset(config=description, cache=cache, warn=False)
                    store = data.store("train")
                    data.vocabulary.require_plain()
                    scaled, note = fit_to_masks(scaled, store, data.vocabulary)
                    notes, decided = [f"masks        {note}"] if note else [], True
                    usable_A = Targets.of(store, data.vocabulary, "auto").usable(store)
                    with_objects = np.unique(store.column("image")[usable_A])
                    objects_an_image = float(usable_A.sum() / max(len(with_objects), 1))
                    if question := question_length(scaled, len(store.image_ids)):
                        notes.append(f"length       {question}")
                except ProxydetError as error:
                    unusable("classes and masks", annotations, error)
    before = len(needs)
    for run in start.earlier if decided else ():
        try:
            check_same(run, scaled)
        except ProxydetError as error:
            unusable("run folder", folder.root, error)
            needs.insert(compared, needs.pop())
    if resume == "auto" and start.earlier and start.earlier[0].finished and len(needs) == before:
        try:
            finished = is_whole(folder, start.earlier[0], config.training.evaluation)
        except ProxydetError as error:
            unusable("finished run", error.path or folder.root, error)
    left = max(scaled.training.iterations - (resumes_after or 0), 0)
    used = start.batches(scaled.data)
    labelled = description is None or description.image_labels is not None
    return TrainingPlan(
        folder=folder.root,
        resumes_after=resumes_after,
        removes=removes,
        finished=finished,
        launch=launch,
        config=scaled,
        given=config.training,
        needs=tuple(needs),
        notes=tuple(notes),
        estimate=estimate_run(
            scaled.model,
            used.boxes,
            used.image_labels if labelled else None,
            dataclasses.replace(scaled.training, accumulation=start.accumulation),
            launch.world_size,
            together=scaled.data.ranks_share_group,
            objects_an_image=objects_an_image,
            steps=float(left / start.step),
        ),
        command=launch.command(words),
    )


def _annotations(split: str, source: AnnotationSource, cache: Path | None) -> Need:
    """Open the annotations of a split as training and evaluation do, unless they are large."""
    what, path = f"{split} annotations", source.annotations
    if not path.exists() or path.stat().st_size > _LARGEST_READ:
        return Need(what=what, path=str(path), present=path.exists())
    try:
        store = AnnotationStore.open(source, cache=cache, warn=False)
        store.require_objects(groups=split != "training")
    except DataError as error:
        problem = error.message
    else:
        problem = ""
    return Need(what=what, path=str(path), present=not problem, problem=problem)


def estimate_run(
    model: ModelConfig,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
    processes: int,
    *,
    together: bool = False,
    objects_an_image: float = _OBJECTS_AN_IMAGE,
    steps: float | None = None,
) -> Estimate:
    """Estimate a training.

    Args:
        model: Sizes of the network.
        boxes: Batches of annotated images.
        labels: Batches of images with labels; None where there are none.
        training: Settings, scaled to the number of processes.
        processes: How many processes train.
        together: Whether all processes draw the same kind of batch; else each draws its own.
        objects_an_image: Objects of a training image that may be trained on, on average.
        steps: How many steps are left; None takes the settings' iterations.
    """
    steps = training.iterations if steps is None else steps
    device = choose_device(training.device)
    network = MetaNetwork(model)
    costs = batch_costs(network, boxes, labels, training, objects_an_image)
    images = sum(cost.images * cost.share for cost in costs) * training.accumulation * processes
    used = dict.fromkeys(part.precision for cost in costs for part in cost.parts)
    speed = device_speed(device, tuple(used), channels_last=training.precision.channels_last)
    parameters = network.parameters()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Losses count the objects of all processes, so that these meet in every batch.
    seconds = training.accumulation * expected_slowest(
        [cost.seconds(speed) for cost in costs],
        [cost.share for cost in costs],
        1 if together else processes,
    )
    seconds += _OPTIMIZER_BYTES * trained / speed.moved
    total = sum(p.numel() for p in parameters)
    held = 4 * (total - trained) + _BYTES_PER_PARAMETER * trained
    return Estimate(
        device=str(device),
        parameters=total,
        memory_gib=(held + max(cost.kept_bytes for cost in costs)) / 2**30,
        seconds_per_step=seconds,
        speed=speed,
        objects_an_image=objects_an_image,
        batches=tuple(costs),
        together=together,
        processes=processes,
        hours=seconds * steps / 3600,
        images=round(images * steps),
    )


def expected_slowest(seconds: Sequence[float], shares: Sequence[float], processes: int) -> float:
    """Return the mean of the longest time among processes, each of which draws one independently.

    Args:
        seconds: The times that may be drawn.
        shares: The chance of each; their sum is 1.
        processes: How many draw.
    """
    total = below = 0.0
    for time_drawn, share in sorted(zip(seconds, shares, strict=True)):
        # All are at most this long, less those cases in which all are shorter.
        total += time_drawn * ((below + share) ** processes - below**processes)
        below += share
    return total


def batch_costs(
    network: MetaNetwork,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
    objects_an_image: float = _OBJECTS_AN_IMAGE,
) -> list[BatchCost]:
    """Return what the batches of each source take, once proposals find the objects.

    Sources are drawn by image: one with twice the batch size at the same ratio makes half as many batches. What learns takes
    three times its forward pass. What only moves regions or proposes them takes one: the first steps of the mixup branch, and
    for image labels the proposal network and the first steps of the detection branch.
    """
    sources = [source for source in (boxes, labels) if source is not None]
    weights = [source.ratio / source.batch_size for source in sources]
    cascade, masks = network.config.cascade, network.config.masks is not None
    sampled = min(
        cascade.samples_per_image, network.config.proposals.keep_train + math.ceil(objects_an_image)
    )
    found = min(
        _REGIONS_AN_OBJECT * objects_an_image,
        int(cascade.samples_per_image * cascade.positive_fraction),
    )
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    costs = []
    for source, weight in zip(sources, weights, strict=True):
        images, learnt = source.batch_size, source is boxes
        features, backbone = network.count(network.pyramid, images, source.size)
        _, tower = network.count(network.proposals, features)
        regions = images * (sampled if learnt else 1)
        objects = max(round(images * found), 1) if learnt else 0
        _, heads = network.count(network.heads, regions, objects)
        moved = regions if learnt else images * cascade.image_label_proposals
        moving = 0.0
        if network.config.mixup_branch or not learnt:
            moving = (cascade.steps - 1) * network.count(network.move, moved)[1][0]
        work = {
            "backbone": (3 * backbone[0], backbone[1]),
            "tower": (3 * tower[0], tower[1]) if learnt else (tower[0], 0.0),
            "box heads": (3 * heads[0] + moving, heads[1]),
        }
        if masks and learnt:
            _, mask_head = network.count(network.mask_head, objects)
            work["mask head"] = (3 * mask_head[0], mask_head[1])
        parts = []
        for name, (operations, kept) in work.items():
            precision = (
                training.precision.backbone if name == "backbone" else training.precision.heads
            )
            small = _KEPT_IN_16_BITS[name] if precision in ("bf16", "fp16") else 1.0
            parts.append(
                PartCost(
                    name=name, precision=precision, operations=operations, kept_bytes=small * kept
                )
            )
        costs.append(
            BatchCost(
                kind="boxes" if learnt else "labels",
                images=images,
                share=weight / sum(weights),
                regions=regions * (1 if learnt else cascade.steps),
                on_objects=objects,
                weight_bytes=float(_WEIGHT_BYTES * trained),
                parts=tuple(parts),
            )
        )
    return costs


def device_speed(
    device: torch.device, precisions: Sequence[str], *, channels_last: bool = False
) -> DeviceSpeed:
    """Probe what a device reaches, on a CPU whether or not other programs run: the best of a few repetitions counts.

    Args:
        device: Which.
        precisions: For which convolutions are timed.
        channels_last: Their layout.
    """
    # Of a CPU, the time of this thread, which has its share of the work of all of torch's threads, and waits for none of the others'
    # programs.
    clock = time.thread_time if device.type == "cpu" else time.perf_counter

    def rate(work: float, run: Callable[[], Tensor], longest: float = _PROBE_SECONDS) -> float:
        """Return units of work a second; reading a number waits for the device."""
        seconds: list[float] = []
        end = time.perf_counter() + longest
        while len(seconds) <= _PROBE_ROUNDS or time.perf_counter() < end:
            start = clock()
            run().sum().item()
            seconds.append(clock() - start)
        return work / min(seconds[1:])

    layout = torch.channels_last if channels_last else torch.contiguous_format

    def convolutions(precision: str, images: int, side: int, longest: float) -> float:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        values, weight = (
            torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)
            for shape in ((images, 256, side, side), (256, 256, 3, 3))
        )
        work = 2 * values.numel() * weight[0].numel()
        return rate(work, lambda: functional.conv2d(values, weight, padding=1)[:, 0], longest)

    operations = {}
    for precision in precisions:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            operations[precision] = convolutions(precision, 1, 16, 0.0)
            # Where 16 bits are emulated, a large one takes minutes.
            if operations[precision] > _FAST:
                operations[precision] = convolutions(precision, 2, 64, _PROBE_SECONDS)
    large = torch.zeros(_PROBE_BYTES // 4, device=device)
    other = torch.empty_like(large)
    layer = nn.Linear(8, 8).to(device)

    def many() -> Tensor:
        values = torch.ones(1, 8, device=device)
        for _ in range(_PROBE_LAUNCHES // 5):
            values = layer(values)
        values.sum().backward()  # three operations for each layer, and the sum of its gradients
        return values

    return DeviceSpeed(
        operations=operations,
        moved=rate(2.0 * _PROBE_BYTES, lambda: other.copy_(large)[:8], _PROBE_SECONDS / 3),
        fresh=rate(2.0 * _PROBE_BYTES, lambda: (large + 1)[:8], _PROBE_SECONDS / 3),
        launch=(_COLD if device.type == "cpu" else 1)
        / rate(_PROBE_LAUNCHES, many, _PROBE_SECONDS / 3),
    )


class MetaNetwork:
    """The network's parts on the meta device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        dimension = config.classifier.embedding_dim
        self._backbone = build_backbone(config.backbone, config.pyramid).to("meta")
        channels, strides = config.pyramid.channels, config.pyramid.strides
        self._centernet = CenterNet(config.proposals, channels, strides).to("meta")
        self._roi_heads = RoiHeads(config, torch.zeros(dimension, 2), torch.ones(1)).to("meta")

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        modules = (self._backbone, self._centernet, self._roi_heads)
        return [parameter for module in modules for parameter in module.parameters()]

    def count(self, part: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[float, float]]:
        """Run a part; return its result, and its operations and the bytes that it keeps for backward next to the parameters."""
        own = {parameter.untyped_storage()._cdata for parameter in self.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = part(*arguments)
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        return result, (float(counter.get_total_flops()), float(kept_bytes))

    def pyramid(self, images: int, size: int) -> list[Tensor]:
        """Run backbone and pyramid on images of a size, padded as the network pads them."""
        side = -(-size // self._backbone.size_divisibility) * self._backbone.size_divisibility
        pixels = torch.empty(images, 3, side, side, device="meta")
        return list(self._backbone(pixels).values())

    def proposals(self, features: list[Tensor]) -> object:
        """Run the proposal network's convolutions."""
        return self._centernet(features)

    def heads(self, regions: int, objects: int) -> None:
        """Run the detection branch on a number of regions, and the mixup branch's last step on those that may be objects."""
        heads = self._roi_heads
        pooled = self._pooled(regions, self.config.cascade.pool_size)
        for step in range(self.config.cascade.steps):
            features = heads.detection.features(step, pooled)
            heads.detection.deltas(step, features)
            heads.detection.classifier(step)(features)
        if heads.mixup is not None and objects:
            last = self.config.cascade.steps - 1
            pooled = self._pooled(objects, self.config.cascade.pool_size)
            heads.mixup.classifier(last)(heads.mixup.features(last, pooled))

    def move(self, regions: int) -> None:
        """Run one step of a branch on a number of regions, as to refine their boxes."""
        branch = self._roi_heads.detection
        pooled = self._pooled(regions, self.config.cascade.pool_size)
        branch.deltas(0, branch.features(0, pooled))

    def mask_head(self, objects: int) -> None:
        """Run the mask head on a number of objects."""
        assert self.config.masks is not None
        assert self._roi_heads.mask_head is not None
        self._roi_heads.mask_head.layers(self._pooled(objects, self.config.masks.pool_size))

    def _pooled(self, regions: int, side: int) -> Tensor:
        # As pooling returns them: with a gradient to the maps.
        return torch.empty(
            regions, self.config.pyramid.channels, side, side, device="meta", requires_grad=True
        )
