"""What a training would do, without doing it: data it needs and what is missing, rough memory and time, launch command.

For the estimate the network is run on torch's meta device, which computes shapes only: that gives the multiply-adds of a step and
the bytes that its backward pass keeps, for any configuration. Pooling, proposals, losses and the optimiser are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from proxydet.config import differences, dump_yaml, to_mapping
from proxydet.data.config import SourceConfig
from proxydet.data.dataset import Dataset, DatasetConfig, command_that_makes, embedding_dimension
from proxydet.data.store import AnnotationSource, AnnotationStore
from proxydet.errors import CheckpointError, DataError, ProxydetError
from proxydet.files import Lock
from proxydet.modeling.backbone import build_backbone
from proxydet.modeling.centernet import CenterNet
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.roi_heads import RoiHeads
from proxydet.training.checkpoint import list_checkpoints
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
    question_length,
)

if TYPE_CHECKING:
    from proxydet.recipes import RunConfig

# Annotation files up to this are read; it takes well under a second.
_LARGEST_READ = 64 * 1024 * 1024
# AdamW: weight, gradient and two moments in float32.
_BYTES_PER_PARAMETER = 16
# The operations of a step over its time, as a share of what the probe's convolution reaches. Measured for R50 on a 2-core CPU
# (benchmarks/training_step_cpu2_202611.md, 220 GFLOP/s): 1.17 for box batches, with fewer masks than are counted here,
# 0.65 for image-label batches. No GPU was measured.
_EFFICIENCY = 0.85
_PROBE_SECONDS = 0.3


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
class Estimate:
    """What a training takes, roughly: within a factor of two on an idle machine."""

    device: str
    """Where it would compute."""

    parameters: int
    """Parameters of the network."""

    memory_gib: float
    """Memory of the device, a process."""

    seconds_per_step: float
    """Time of a step."""

    operations_per_second: float
    """Floating-point operations a second that a large float32 convolution reached in a short probe of the device."""

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
            f"device       {self.device}, at least {self.memory_gib:.1f} GiB a process, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"time         about {duration}: {self.seconds_per_step:.2g} s a step, "
            f"{self.images:,} images; a rough guess: a convolution reaches {self.operations_per_second / 1e9:.3g} GFLOP/s "
            "here just now (less where other programs run)",
        ]
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
    except ProxydetError as error:
        unusable("precision", str(device), error)
    check_own_code(scaled)
    scaled = fit_to_backbone(scaled)
    if training.weights is not None and resumes_after is None:
        need("starting weights", training.weights)
    path = scaled.data.description
    notes: list[str] = []
    decided = False
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
                needs.append(_annotations(name, split.source))
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
            if (
                large
                and not AnnotationStore.path_for(description.train.source, cache=cache).is_file()
            ):
                notes = ["masks        decided when training reads the annotations (data.masks)"]
            else:
                try:
                    data = Dataset(config=description, cache=cache, warn=False)
                    scaled, note = fit_to_masks(scaled, data.store("train"), data.vocabulary)
                    notes, decided = [f"masks        {note}"] if note else [], True
                    if question := question_length(scaled, len(data.store("train").image_ids)):
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
            steps=float(left / start.step),
        ),
        command=launch.command(words),
    )


def _annotations(split: str, source: AnnotationSource) -> Need:
    """Open the annotations of a split as training and evaluation do, unless they are large."""
    what, path = f"{split} annotations", source.path
    if not path.exists() or path.stat().st_size > _LARGEST_READ:
        return Need(what=what, path=str(path), present=path.exists())
    try:
        AnnotationStore.open(source, warn=False).require_objects(groups=split != "training")
    except DataError as error:
        problem = error.message
    else:
        problem = ""
    return Need(what=what, path=str(path), present=not problem, problem=problem)


@dataclass(frozen=True, kw_only=True)
class BatchCost:
    """What one batch of a source takes."""

    images: int
    """Images."""

    operations: float
    """Floating-point operations, forward and backward; a multiply-add is two."""

    backbone_operations: float
    """Those of backbone and pyramid among them, which are computed in ``training.precision.backbone``; the others in that of the heads."""

    kept_bytes: float
    """What the forward pass keeps for the backward pass."""

    share: float
    """Share of the steps that take such a batch, in [0, 1]."""


def estimate_run(
    model: ModelConfig,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
    processes: int,
    *,
    steps: float | None = None,
) -> Estimate:
    """Estimate a training.

    Args:
        model: Sizes of the network.
        boxes: Batches of annotated images.
        labels: Batches of images with labels; None where there are none.
        training: Settings, scaled to the number of processes.
        processes: How many processes train.
        steps: How many steps are left; None takes the settings' iterations.
    """
    steps = training.iterations if steps is None else steps
    device = choose_device(training.device)
    parts = MetaNetwork(model)
    costs = batch_costs(parts, boxes, labels, training)
    backbone, operations = (
        sum(getattr(cost, name) * cost.share for cost in costs) * training.accumulation
        for name in ("backbone_operations", "operations")
    )
    images = sum(cost.images * cost.share for cost in costs) * training.accumulation * processes
    speed = device_speed(device, "fp32", tf32=training.precision.heads == "tf32")
    fast = speed
    if device.type == "cuda" and training.precision.backbone in ("bf16", "fp16"):
        fast = device_speed(device, training.precision.backbone)
    seconds = (backbone / fast + (operations - backbone) / speed) / _EFFICIENCY
    parameters = sum(p.numel() for p in parts.parameters())
    return Estimate(
        device=str(device),
        parameters=parameters,
        memory_gib=(_BYTES_PER_PARAMETER * parameters + max(cost.kept_bytes for cost in costs))
        / 2**30,
        seconds_per_step=seconds,
        operations_per_second=speed,
        hours=seconds * steps / 3600,
        images=round(images * steps),
    )


def batch_costs(
    network: MetaNetwork,
    boxes: SourceConfig,
    labels: SourceConfig | None,
    training: TrainingConfig,
) -> list[BatchCost]:
    """Return what the batches of each source take.

    Sources are drawn by image: one with twice the batch size at the same ratio makes half as many batches.
    """
    sources = [source for source in (boxes, labels) if source is not None]
    weights = [source.ratio / source.batch_size for source in sources]
    small = 0.5 if training.precision.backbone in ("bf16", "fp16") else 1.0
    costs = []
    for source, weight in zip(sources, weights, strict=True):
        features, pyramid = count(network.pyramid, source.batch_size, source.size)
        regions = network.config.cascade.samples_per_image if source is boxes else 1
        heads = count(network.heads, source.batch_size, regions, source is boxes)[1]
        proposals = count(network.proposals, features)[1]
        operations = pyramid[0] + proposals[0] + heads[0]
        kept = small * pyramid[1] + proposals[1] + heads[1]
        costs.append(
            BatchCost(
                images=source.batch_size,
                operations=3 * operations,
                backbone_operations=3 * pyramid[0],
                kept_bytes=kept,
                share=weight / sum(weights),
            )
        )
    return costs


def count(function: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[float, float]]:
    """Run a function on meta tensors; return its result, and its operations and the bytes that it keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    return result, (float(counter.get_total_flops()), float(sum(kept.values())))


def device_speed(device: torch.device, dtype: str, *, tf32: bool = False) -> float:
    """Return the floating-point operations a second that a large convolution reaches on a device just now."""
    used = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    values = torch.randn(2, 256, 64, 64, device=device, dtype=used)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=used)
    operations = 2 * values.numel() * 256 * 9
    rounds, start = 0, 0.0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        while rounds < 3 or time.perf_counter() - start < _PROBE_SECONDS:
            if rounds == 2:
                start = time.perf_counter()
            functional.conv2d(values, weight, padding=1).mean().item()
            rounds += 1
    return operations * (rounds - 2) / (time.perf_counter() - start)


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

    def pyramid(self, images: int, size: int) -> list[Tensor]:
        """Run backbone and pyramid on images of a size, padded as the network pads them."""
        side = -(-size // self._backbone.size_divisibility) * self._backbone.size_divisibility
        pixels = torch.empty(images, 3, side, side, device="meta")
        return list(self._backbone(pixels).values())

    def proposals(self, features: list[Tensor]) -> object:
        """Run the proposal network's convolutions."""
        return self._centernet(features)

    def heads(self, images: int, regions: int, boxes: bool) -> None:
        """Run the heads with gradient on a number of regions an image, masks and mixup on as many as may be objects."""
        config, heads = self.config, self._roi_heads
        side, channels = config.cascade.pool_size, config.pyramid.channels
        pooled = torch.empty(images * regions, channels, side, side, device="meta")
        for step in range(config.cascade.steps):
            features = heads.detection.features(step, pooled)
            heads.detection.deltas(step, features)
        if not boxes:
            return
        objects = max(round(images * regions * config.cascade.positive_fraction), 1)
        if heads.mixup is not None:
            heads.mixup.features(config.cascade.steps - 1, pooled[:objects])
        if config.masks is not None and heads.mask_head is not None:
            mask_side = config.masks.pool_size
            pooled = torch.empty(objects, channels, mask_side, mask_side, device="meta")
            heads.mask_head.layers(pooled)
