"""What a training would do, without doing it: data it needs and what is missing, rough memory and time, launch command.

For the estimate the network is run on torch's meta device, which computes shapes only: that gives the multiply-adds of a step and
the bytes that its backward pass keeps, for any configuration, part by part: each computes in a precision of its own. Pooling,
proposals, losses and the optimiser are left out.
"""

from __future__ import annotations

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
    is_whole,
    prepare,
    read_last_iteration,
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
    """A file or folder that a training reads.

    Attributes:
        what: What it is for.
        path: Where it is expected; empty where nothing names it.
        present: Whether it is there.
        problem: What is wrong with it, where that is more than being absent.
        command: A command that makes it where it is absent; empty where none is known.
    """

    what: str
    path: str
    present: bool
    problem: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """What a device reaches.

    Attributes:
        operations: Floating-point operations a second of a large convolution, by precision.
        memory: Bytes a second that are read or written by an operation that returns a new large tensor.
        launch: Seconds of a small operation within a step.
    """

    operations: dict[str, float]
    memory: float
    launch: float


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What a part of the network takes of one batch.

    Attributes:
        name: backbone (with the pyramid), tower (of the proposal network), box heads or mask head.
        precision: Of its products.
        operations: Floating-point operations, forward and backward; a multiply-add is two.
        kept_bytes: What the forward pass keeps for the backward pass.
    """

    name: str
    precision: Precision
    operations: float
    kept_bytes: float


@dataclass(frozen=True, kw_only=True)
class BatchCost:
    """What one batch of a source takes.

    Attributes:
        kind: boxes or labels.
        images: Images.
        share: Share of the batches that are of this source, in [0, 1].
        regions: Regions that the box heads learn from.
        on_objects: Those of them that stand for objects, expected once proposals find them: mixup branch and mask head
            learn from these.
        parts: What each part takes.
    """

    kind: str
    images: int
    share: float
    regions: int
    on_objects: int
    parts: tuple[PartCost, ...]

    @property
    def kept_bytes(self) -> float:
        """What the forward pass keeps for the backward pass."""
        return sum(part.kept_bytes for part in self.parts)

    def seconds(self, speed: DeviceSpeed) -> float:
        """Return its time: arithmetic, each part in its precision; moving what is kept; and launching."""
        arithmetic = sum(part.operations / speed.operations[part.precision] for part in self.parts)
        moving = _TIMES_MOVED * self.kept_bytes / speed.memory
        return arithmetic + moving + _LAUNCHES[self.kind] * speed.launch


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training takes, roughly: within a factor of two on an idle machine.

    Attributes:
        device: Where it would compute.
        parameters: Parameters of the network.
        memory_gib: Memory of the device, a process.
        seconds_per_step: Time of a step: of the slowest process, on average over the steps.
        speed: What the device reached in a short probe: of a CPU, what it would reach if no other program ran.
        objects_an_image: Objects of a training image: of the annotations where they were read, else LVIS'.
        batches: What the time and memory are computed from.
        hours: Time of all steps that are left.
        images: Images that all processes see in them.
    """

    device: str
    parameters: int
    memory_gib: float
    seconds_per_step: float
    speed: DeviceSpeed
    objects_an_image: float
    batches: tuple[BatchCost, ...]
    hours: float
    images: int

    def lines(self) -> list[str]:
        """Return the estimate for people to read."""
        hours = self.hours
        duration = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
        if hours < 1:
            duration = f"{max(hours * 60, 0.1):.2g} minutes"
        reached = (
            f"{rate / 1e9:.3g} GFLOP/s in {name}" for name, rate in self.speed.operations.items()
        )
        lines = [
            f"device       {self.device}, at least {self.memory_gib:.2g} GiB a process, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"time         about {duration}: {self.seconds_per_step:.2g} s a step, {self.images:,} images; a rough guess: a "
            f"convolution reaches {', '.join(reached)}, memory {self.speed.memory / 1e9:.3g} GB/s, a small operation "
            f"{self.speed.launch * 1e6:.2g} us (it takes longer where other programs run)",
        ]
        for batch in self.batches:
            parts = (f"{p.name} {p.operations / 1e12:.2g} in {p.precision}" for p in batch.parts)
            objects = (
                f", {batch.on_objects:,} on objects (of {self.objects_an_image:.3g} objects an image, {_REGIONS_AN_OBJECT} "
                "regions each, up to cascade.positive_fraction; with fresh weights fewer at first)"
            )
            lines.append(
                f"{'of ' + batch.kind:12} {batch.images} images a process, {batch.share:.0%} of the batches: "
                f"{batch.seconds(self.speed):.2g} s, {batch.kept_bytes / 2**30:.2g} GiB kept for the backward pass; "
                f"TFLOP: {', '.join(parts)}; box heads learn from {batch.regions:,} regions"
                + objects
                * bool(batch.on_objects)
            )
        if self.device == "cpu" and hours > 24:
            lines.append("slow         this recipe is made for GPUs; on a CPU it takes very long")
        return lines


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training would do.

    Attributes:
        folder: The run folder.
        resumes_after: Iteration of the checkpoint that it would resume from; None starts a new run.
        removes: Iterations of the run in the folder that it would remove; None where it removes none.
        finished: Whether the run is finished, so that nothing would be done.
        launch: Processes.
        config: The configuration of the run: resolved, scaled to the number of processes, fitted to the text embeddings.
        given: The training's settings as they are given, before scaling.
        needs: What it reads.
        notes: What to know of it: that no masks are trained, or not by all objects; that it is long for so few images.
        estimate: Memory and time.
        command: The launch command, as words.
    """

    folder: Path
    resumes_after: int | None
    removes: int | None
    finished: bool
    launch: LaunchPlan
    config: RunConfig
    given: TrainingConfig
    needs: tuple[Need, ...]
    notes: tuple[str, ...]
    estimate: Estimate
    command: tuple[str, ...]

    @property
    def missing(self) -> tuple[Need, ...]:
        """What is not there, or not usable; a finished run needs nothing."""
        return () if self.finished else tuple(need for need in self.needs if not need.present)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        scaled = differences(self.given, self.config.training, "training")
        return {
            "folder": str(self.folder),
            "resumes_after": self.resumes_after,
            "removes": self.removes,
            "finished": self.finished,
            "processes": self.launch.world_size,
            "needs": [dataclasses.asdict(need) for need in self.needs],
            "notes": [note.partition(" ")[2].strip() for note in self.notes],
            "scaled": {key: list(values) for key, values in scaled.items()},
            "estimate": dataclasses.asdict(self.estimate),
            "command": list(self.command),
            "configuration": to_mapping(self.config),
        }

    def to_text(self) -> str:
        """Return the plan for people to read: the configuration first, what to do about it last."""
        start, processes = "starts a new run", self.launch.world_size
        if self.finished:
            start = "finished: nothing to do"
        elif self.removes is not None:
            start += f"; removes the run of {self.removes} iterations that it holds"
        elif self.resumes_after is not None:
            start = f"resumes after iteration {self.resumes_after}"
        lines = [
            dump_yaml(self.config, comments=False).rstrip(),
            "",
            f"run folder   {self.folder} ({start})",
            f"processes    {processes} on {self.launch.nodes} machine(s)",
            *self.notes,
        ]
        now, given = self.config.training, self.given
        if now.iterations != given.iterations and now.replicas != given.replicas:
            lines.append(
                f"scaled       {now.iterations:,} iterations, scaled from {given.iterations:,} x "
                f"{given.replicas / now.replicas:g}; learning rate {now.optimizer.learning_rate:.3g}, scaled from "
                f"{given.optimizer.learning_rate:.3g}: the recipe counts on {given.replicas} batches a step, here "
                f"{now.replicas} (training.scaling)"
            )
        lines += self.estimate.lines()
        if processes > 1 and len(self.estimate.batches) > 1:
            lines.append(
                "of a step    all processes take the same kind of batch (data.ranks_share_group)"
                if self.config.data.ranks_share_group
                else f"of a step    the slowest of {processes} processes, which draw the kinds of their batches independently "
                "(data.ranks_share_group=true: the same kind)"
            )
        lines += ["", "what it needs"]
        for need in self.needs:
            unusable = "UNUSABLE" if need.problem and need.path else "MISSING"
            place = ": ".join(filter(None, [need.path, need.problem]))
            lines.append(f"  {'there' if need.present else unusable:8} {need.what:22} {place}")
        same = " (the same by torchrun, on each node)"
        same *= bool(self.launch.started and self.launch.torchrun)
        lines += ["", f"command{same}", f"  {shlex.join(self.command)}"]
        if self.missing:
            lines += ["", f"{len(self.missing)} missing or unusable: training cannot start yet."]
        if commands := dict.fromkeys(need.command for need in self.missing if need.command):
            lines += ["what is missing comes with", *(f"  {command}" for command in commands)]
        return "\n".join(lines)


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

    def need(what: str, path: Path) -> None:
        command = command_that_makes(path) or ""
        needs.append(Need(what=what, path=str(path), present=path.exists(), command=command))

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
        newest = max((at for at, _ in list_checkpoints(folder.checkpoints)), default=0)
        removes = read_last_iteration(folder.final_weights) or newest

    training = scaled.training
    try:
        device = choose_device(training.device)
        check_precision(training.precision, device)
        usable_precision(config.inference.precision, device)
    except ProxydetError as error:
        unusable("precision", str(device), error)
    check_own_code(scaled)
    scaled = fit_to_backbone(scaled)
    if resumes_after is None:
        if training.weights is not None:
            need("starting weights", training.weights)
        if (lacking := lacking_weights(scaled)) is not None:
            unusable("starting weights", "", lacking)
    path, cache = scaled.data.description, scaled.data.cache
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
        embeddings, train = description.classes.embeddings, description.train
        try:
            need("text embeddings", embeddings)
            if embeddings.is_file():
                scaled = fit_to_embeddings(scaled, embedding_dimension(embeddings))
        except ProxydetError as error:
            needs.pop()
            unusable("text embeddings", embeddings, error)
        usable = needs[-1].present
        if train is None:
            unusable("training annotations", "", "the dataset config has no [train] table")
        for name, split in (("training", train), ("validation", description.val)):
            if split is not None:
                needs.append(_annotations(name, split, cache))
                usable = usable and (name != "training" or needs[-1].present)
                for root in split.roots:
                    need(f"{name} images", root)
        labels = description.image_labels
        if scaled.data.image_labels is not None and labels is not None:
            for place in filter(None, (labels.tars, labels.annotations, *labels.roots)):
                need("image labels", place)
        if usable and train is not None:
            large = train.annotations.stat().st_size > _LARGEST_READ
            if large and not AnnotationStore.path_for(train, cache=cache).is_file():
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
                    unusable("classes and masks", train.annotations, error)
    same, finished = len(needs), False
    for run in start.earlier if decided else ():
        try:
            check_same(run, scaled)
        except ProxydetError as error:
            unusable("run folder", folder.root, error)
    if resume == "auto" and start.earlier and start.earlier[0].finished and len(needs) == same:
        try:
            finished = is_whole(folder, start.earlier[0], config.training.evaluation)
        except ProxydetError as error:
            unusable("finished run", error.path or folder.root, error)
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
            steps=float(max(scaled.training.iterations - (resumes_after or 0), 0) / start.step),
        ),
        command=launch.command(words),
    )


def _annotations(split: str, source: AnnotationSource, cache: Path | None) -> Need:
    """Open the annotations of a split as training and evaluation do, unless they are large."""
    path, problem = source.annotations, ""
    if path.exists() and path.stat().st_size <= _LARGEST_READ:
        try:
            store = AnnotationStore.open(source, cache=cache, warn=False)
            store.require_objects(groups=split != "training")
        except DataError as error:
            problem = error.message
    present = path.exists() and not problem
    return Need(what=f"{split} annotations", path=str(path), present=present, problem=problem)


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
    trained = sum(p.numel() for p in network.parameters if p.requires_grad)
    total = sum(p.numel() for p in network.parameters)
    # Losses count the objects of all processes, so that these meet in every batch.
    seconds = training.accumulation * expected_slowest(
        [cost.seconds(speed) for cost in costs],
        [cost.share for cost in costs],
        1 if together else processes,
    )
    weight_bytes = training.accumulation * _WEIGHT_BYTES + _OPTIMIZER_BYTES
    seconds += weight_bytes * trained / speed.memory
    held = 4 * (total - trained) + _BYTES_PER_PARAMETER * trained
    return Estimate(
        device=str(device),
        parameters=total,
        memory_gib=(held + max(cost.kept_bytes for cost in costs)) / 2**30,
        seconds_per_step=seconds,
        speed=speed,
        objects_an_image=objects_an_image,
        batches=tuple(costs),
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
    proposed = network.config.proposals.keep_train + math.ceil(objects_an_image)
    sampled = min(cascade.samples_per_image, proposed)
    most_found = int(cascade.samples_per_image * cascade.positive_fraction)
    found = min(_REGIONS_AN_OBJECT * objects_an_image, most_found)
    costs = []
    for source, weight in zip(sources, weights, strict=True):
        images, learnt = source.batch_size, source is boxes
        regions = images * (sampled if learnt else 1)
        objects = max(round(images * found), 1) if learnt else 0
        features, *backbone = network.count(network.pyramid, images, source.size)
        _, *tower = network.count(network.centernet, features)
        _, *heads = network.count(network.box_heads, regions, objects)
        moving = 0.0
        if network.config.mixup_branch or not learnt:
            moved = regions if learnt else images * cascade.image_label_proposals
            moving = (cascade.steps - 1) * network.count(network.move, moved)[1]
        work = {
            "backbone": (3 * backbone[0], backbone[1]),
            "tower": (3 * tower[0], tower[1]) if learnt else (tower[0], 0.0),
            "box heads": (3 * heads[0] + moving, heads[1]),
        }
        if masks and learnt:
            _, *mask_head = network.count(network.mask_head, objects)
            work["mask head"] = (3 * mask_head[0], mask_head[1])
        parts = []
        for name, (operations, kept) in work.items():
            asked = training.precision
            precision = asked.backbone if name == "backbone" else asked.heads
            kept *= _KEPT_IN_16_BITS[name] if precision in ("bf16", "fp16") else 1.0
            part = PartCost(name=name, precision=precision, operations=operations, kept_bytes=kept)
            parts.append(part)
        costs.append(
            BatchCost(
                kind="boxes" if learnt else "labels",
                images=images,
                share=weight / sum(weights),
                regions=regions * (1 if learnt else cascade.steps),
                on_objects=objects,
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
    layer = nn.Linear(8, 8).to(device)

    def many() -> Tensor:
        values = torch.ones(1, 8, device=device)
        for _ in range(_PROBE_LAUNCHES // 5):
            values = layer(values)
        values.sum().backward()  # three operations for each layer, and the sum of its gradients
        return values

    cold = _COLD if device.type == "cpu" else 1
    return DeviceSpeed(
        operations=operations,
        memory=rate(2.0 * _PROBE_BYTES, lambda: (large + 1)[:8], _PROBE_SECONDS / 3),
        launch=cold / rate(_PROBE_LAUNCHES, many, _PROBE_SECONDS / 3),
    )


class MetaNetwork:
    """The network's parts on the meta device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        channels, strides = config.pyramid.channels, config.pyramid.strides
        directions = torch.zeros(config.classifier.embedding_dim, 2)
        self.backbone = build_backbone(config.backbone, config.pyramid).to("meta")
        self.centernet = CenterNet(config.proposals, channels, strides).to("meta")
        self.roi_heads = RoiHeads(config, directions, torch.ones(1)).to("meta")
        modules = (self.backbone, self.centernet, self.roi_heads)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]

    def count(self, part: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
        """Run a part; return its result, its operations, and the bytes that it keeps for backward next to the parameters."""
        own = {parameter.untyped_storage()._cdata for parameter in self.parameters}
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
        return result, float(counter.get_total_flops()), float(kept_bytes)

    def pyramid(self, images: int, size: int) -> list[Tensor]:
        """Run backbone and pyramid on images of a size, padded as the network pads them."""
        side = -(-size // self.backbone.size_divisibility) * self.backbone.size_divisibility
        return list(self.backbone(torch.empty(images, 3, side, side, device="meta")).values())

    def box_heads(self, regions: int, objects: int) -> None:
        """Run the detection branch on a number of regions, and the mixup branch's last step on those that may be objects."""
        heads, cascade = self.roi_heads, self.config.cascade
        pooled = self._pooled(regions, cascade.pool_size)
        for step in range(cascade.steps):
            features = heads.detection.features(step, pooled)
            heads.detection.deltas(step, features)
            heads.detection.classifier(step)(features)
        if heads.mixup is not None and objects:
            pooled, last = self._pooled(objects, cascade.pool_size), cascade.steps - 1
            heads.mixup.classifier(last)(heads.mixup.features(last, pooled))

    def move(self, regions: int) -> None:
        """Run one step of a branch on a number of regions, as to refine their boxes."""
        branch = self.roi_heads.detection
        pooled = self._pooled(regions, self.config.cascade.pool_size)
        branch.deltas(0, branch.features(0, pooled))

    def mask_head(self, objects: int) -> None:
        """Run the mask head on a number of objects."""
        assert self.config.masks is not None
        assert self.roi_heads.mask_head is not None
        self.roi_heads.mask_head.layers(self._pooled(objects, self.config.masks.pool_size))

    def _pooled(self, regions: int, side: int) -> Tensor:
        # As pooling returns them: with a gradient to the maps.
        channels = self.config.pyramid.channels
        return torch.empty(regions, channels, side, side, device="meta", requires_grad=True)
