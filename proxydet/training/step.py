"""One optimiser step: losses of the batches, their exchange between processes, the guard against NaN, clipping, AdamW.

Everything random in a step is drawn from the seed of the run and the number of the batch, counted over all processes and
steps: no random state is carried from step to step or stored, what one step draws does not depend on how many numbers
another one drew, and a batch draws the same whichever process computes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proxydet.errors import ConfigError, NumericsError, RuntimeEnvironmentError
from proxydet.files import write_json
from proxydet.modeling.precision import allow_tf32, tf32_kept
from proxydet.paths import step_name
from proxydet.training.checkpoint import TrainingState
from proxydet.training.config import (
    EmaConfig,
    GuardConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
)
from proxydet.training.distributed import DistInfo

if TYPE_CHECKING:
    from proxydet.losses.criterion import Losses

logger = logging.getLogger(__name__)

# detectron2's scheduler (fvcore) decides on this tolerance, in units of the whole training, whether warm-up is over.
_WARMUP_TOLERANCE = 1e-6
# What torch.compile calls on a CPU, in this order, where CXX names no other.
_CPP_COMPILERS = ("g++", "clang++")


# ---- random numbers --------------------------------------------------------------------------------------------------


def derive_seed(*parts: int | str) -> int:
    """Mix integers and words into one seed of 63 bits, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (the CPU's and every GPU's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the call above would note down for each kind of accelerator where it came from
        torch.default_generator.manual_seed(seed)


# ---- learning rate ---------------------------------------------------------------------------------------------------


def learning_rate_factor(iteration: float, iterations: int, config: ScheduleConfig) -> float:
    """Return the fraction of the learning rate with which a step is taken.

    During warm-up the factor runs linearly from ``warmup_start`` to the value that the cosine has at the end of
    warm-up, so that the two parts meet; this is how detectron2 joins them.

    Args:
        iteration: Iterations before the step, from 0; a fraction where a step has fewer images than an iteration.
        iterations: Iterations of the whole training.
        config: Shape and warm-up.

    Returns:
        A number in (0, 1].
    """

    def course(progress: float) -> float:
        """Factor without warm-up at a fraction of the training (above 1 during a warm-up longer than it)."""
        if config.shape == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    progress = iteration / iterations
    warmup_end = config.warmup_iterations / iterations
    if progress + _WARMUP_TOLERANCE >= warmup_end:
        return course(progress)
    start, end = config.warmup_start * course(0.0), course(warmup_end)
    done = progress / warmup_end
    return end * done + start * (1 - done)


# ---- number formats --------------------------------------------------------------------------------------------------


def check_precision(config: PrecisionConfig, device: torch.device) -> None:
    """Make sure that a device can compute as configured, before a run begins.

    Args:
        config: What is asked for.
        device: Where it will be computed.

    Raises:
        ConfigError: fp16 is asked for on a CPU, which has no fast way to do it: a step would take minutes.
        RuntimeEnvironmentError: torch.compile is asked for and what it needs is not there.
    """
    for part in ("backbone", "heads"):
        if getattr(config, part) == "fp16" and device.type == "cpu":
            raise ConfigError(
                f"training.precision.{part} is fp16, which needs a GPU; on a CPU it is about a hundred times slower than fp32.",
                hint=f"Add --set training.precision.{part}=fp32, or bf16.",
            )
    if not config.compile:
        return
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else list(_CPP_COMPILERS)
    needs, there, advice = "the package triton", bool(importlib.util.find_spec("triton")), "triton"
    if device.type == "cpu":
        needs = f"a C++ compiler ({' or '.join(compilers)})"
        there, advice = any(map(shutil.which, compilers)), "one (for example: apt install g++)"
    if not there:
        raise RuntimeEnvironmentError(
            f"training.precision.compile needs {needs} on this device, which is not installed.",
            hint=f"Install {advice}, or leave training.precision.compile off.",
        )


def apply_precision(network: nn.Module, config: PrecisionConfig) -> None:
    """Set the number formats of a network's parts, its memory layout, and compilation of backbone and pyramid, in place.

    Args:
        network: Has a module ``backbone``; computes by its ``backbone_precision`` and ``heads_precision``.
        config: What to set.
    """
    allow_tf32(allowed=False)  # but in the parts that compute in it
    network.backbone_precision = config.backbone  # type: ignore[assignment]
    network.heads_precision = config.heads  # type: ignore[assignment]
    if config.channels_last:
        # Maps take the layout of the weights that they are multiplied with.
        network.to(memory_format=torch.channels_last)
    if config.compile:
        network.get_submodule("backbone").compile()


def build_scaler(config: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler: active where a part is in fp16, passing everything through otherwise."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=config.initial_loss_scale,
        enabled="fp16" in (config.backbone, config.heads),
    )


# ---- losses and gradients --------------------------------------------------------------------------------------------


class TrainingModel(nn.Module):
    """Network and criterion as one module whose forward pass gives the losses: what DDP wraps.

    Args:
        network: A module with ``forward_train(batch, generator=...)``.
        criterion: Called with that method's result and the same generator; returns `Losses`.
        device: Where both compute, and where their random numbers are drawn.
        touch_all: Whether every trained parameter shall be in the graph of the losses, if only with a gradient of 0.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Callable[..., Losses],
        *,
        device: torch.device,
        touch_all: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self._criterion = criterion
        self._generator = torch.Generator(device=device)
        self._touch_all = touch_all

    def forward(self, batch: Any, seed: int) -> Losses:
        """Compute the losses of a box batch or an image-label batch, drawing every random number from one seed."""
        seed_everything(seed)
        generator = self._generator.manual_seed(derive_seed(seed, "generator"))
        output = self.network.forward_train(batch, generator=generator)  # type: ignore[operator]
        losses: Losses = self._criterion(output, generator=generator)
        if not self._touch_all:
            return losses
        # DDP waits for every parameter's gradient. An image-label batch reaches neither mask head nor mixup branch; with this
        # link their gradients arrive (as absent, which DDP counts as 0) and it need not search the graph for them.
        first = next(iter(losses))
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {**losses, first: _Touch.apply(losses[first], *trained)}


class _Touch(torch.autograd.Function):
    """Identity on the first argument; the others only become part of the graph."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (gradient, *([None] * ctx.count))


def freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Exclude parameters from training, in place.

    Args:
        network: Whose parameters.
        names: Prefixes of their names, or patterns with ``*``.

    Raises:
        ConfigError: One matches no parameter.
    """
    parameters = dict(network.named_parameters())
    for name in names:
        pattern = name if "*" in name else f"{name}*"
        matched = [own for own in parameters if fnmatchcase(own, pattern)]
        if not matched:
            parts = dict.fromkeys(own.partition(".")[0] + "." for own in parameters)
            raise ConfigError(
                f"training.freeze names {name}, and no parameter's name begins so.",
                hint=f"The parts of the network: {', '.join(parts)}",
            )
        for own in matched:
            parameters[own].requires_grad_(False)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Build AdamW, as published, over the parameters that are trained, all in one group.

    Raises:
        ConfigError: No parameter is trained.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError("The network has no parameter to train: all are frozen.")
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], value: float) -> None:
    """Cut every gradient element to [-value, value] in place; parameters without a gradient are passed over.

    A gradient element that is not a number stays so: clipping must not hide it.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if with_gradient:
        nn.utils.clip_grad_value_(with_gradient, value)


def zero_unused_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give a gradient of zero to parameters that the losses did not reach now but have reached in an earlier step.

    So they move on by their momentum, as with torch before 2.0, whose ``zero_grad`` kept gradients and set them to zero.
    Parameters that were never reached are left alone: a group of processes hands them zeros, which are taken away. Which
    ones were reached is read from the optimiser's state, and so outlives an interruption.
    """
    absent, unknown = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reached = parameter in optimizer.state
            if reached and parameter.grad is None:
                absent.append(parameter)
            elif not reached and parameter.grad is not None:
                unknown.append(parameter)
    # In one piece, which is one launch, but for weights with another layout in memory.
    plain = [p for p in absent if p.is_contiguous() and p.dtype == torch.float32]
    sizes = [p.numel() for p in plain]
    pieces = plain[0].new_zeros(sum(sizes)).split(sizes) if plain else ()
    for parameter, piece in zip(plain, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    for parameter in absent:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # One wait for the device for all of them, in the steps until every parameter has been reached.
    found = torch.stack([p.grad.any() for p in unknown]).tolist() if unknown else []
    for parameter, reached in zip(unknown, found, strict=True):
        if not reached:
            parameter.grad = None


# ---- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        losses: Name to mean over all processes and accumulated batches.
        shares: Name to the fraction of those batches in which the loss was not 0, in [0, 1].
        learning_rate: With which the step was taken.
        images: Number of images on all processes.
        skipped: Whether the weights were left alone because a loss was not finite.
        stop: Whether a process has received a stop signal.
    """

    losses: dict[str, float]
    shares: dict[str, float]
    learning_rate: float
    images: int
    skipped: bool
    stop: bool


@tf32_kept()
def train_step(
    state: TrainingState,
    batches: Sequence[Any],
    *,
    config: TrainingConfig,
    step: Fraction,
    ranks: DistInfo,
    failures: Path,
    stop: bool = False,
) -> StepResult:
    """Take one optimiser step, and count it in the state.

    Args:
        state: What changes.
        batches: The batches of this process: as many as are accumulated, at least 1.
        config: Training settings.
        step: How many iterations the step counts as: its images, over those of an iteration. Where ``scaling`` is linear, the learning rate
            is multiplied by it. The last step ends with the last iteration.
        ranks: This process.
        failures: Folder for the record of a batch whose loss is not finite.
        stop: Whether this process wants to stop; all processes learn of it.

    Raises:
        NumericsError: A loss is not finite, and the step is not to be skipped.
    """
    learning_rate = config.optimizer.learning_rate * learning_rate_factor(
        float(state.progress), config.iterations, config.schedule
    )
    learning_rate *= float(step) if config.scaling == "linear" else 1.0
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate

    names: list[str] = []
    rows = []
    for part, batch in enumerate(batches):
        seed = derive_seed(state.seed, state.batches + part * ranks.world_size + ranks.rank)
        last = part + 1 == len(batches)
        exchanging = isinstance(state.model, DistributedDataParallel)
        with state.model.no_sync() if exchanging and not last else nullcontext():  # type: ignore[operator]
            losses = state.model(batch.to(ranks.device), seed)
            total = torch.stack(list(losses.values())).sum() / len(batches)
            state.scaler.scale(total).backward()
        names = sorted(losses)
        rows.append(torch.stack([losses[name].detach().float() for name in names]))
    values_BL = torch.stack(rows)
    local_L = values_BL.mean(dim=0)

    # One collective averages over the processes; reading its result waits for the device, until the backward pass is done.
    images = sum(len(batch) for batch in batches)
    counts = torch.tensor([images, stop], dtype=local_L.dtype)
    counts = counts.to(local_L.device, non_blocking=True)
    shared = torch.cat([local_L, (values_BL != 0).float().mean(dim=0), counts])
    if ranks.world_size > 1:
        dist.all_reduce(shared)
    *means, total_images, stops = shared.tolist()
    means = [number / ranks.world_size for number in means]
    result = StepResult(
        losses=dict(zip(names, means, strict=False)),
        shares=dict(zip(names, means[len(names) :], strict=True)),
        learning_rate=learning_rate,
        images=round(total_images),
        skipped=not all(math.isfinite(value) for value in means[: len(names)]),
        stop=stops > 0,
    )
    if result.skipped:
        _skip_or_stop(state, names, local_L, batches, config.guards, ranks, failures)
    else:
        if config.optimizer.unused_gradients == "zero":
            zero_unused_gradients(state.optimizer)
        state.scaler.unscale_(state.optimizer)
        if config.optimizer.clip_value is not None:
            trained = (p for group in state.optimizer.param_groups for p in group["params"])
            clip_gradients(trained, config.optimizer.clip_value)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.progress = min(state.progress + step, Fraction(config.iterations))
    state.step = step
    state.batches += len(batches) * ranks.world_size
    state.draws += len(batches)
    state.images += result.images
    if state.average is not None:
        _move_average(state, state.average, config.ema, float(step))
    return result


def _move_average(
    state: TrainingState, average: dict[str, torch.Tensor], config: EmaConfig, iterations: float
) -> None:
    """Move the average towards the network's values; equal values stay as they are, bit for bit."""
    done = float(state.progress)
    decay = min(config.decay or 0.0, (1 + done) / (config.warmup_iterations + done)) ** iterations
    values = state.network.state_dict()
    torch._foreach_lerp_(list(average.values()), [values[name] for name in average], 1 - decay)


def _skip_or_stop(
    state: TrainingState,
    names: list[str],
    local: torch.Tensor,
    batches: Sequence[Any],
    config: GuardConfig,
    ranks: DistInfo,
    folder: Path,
) -> None:
    """Write down all processes' batches of a step whose losses are not finite, and count the skipped step or raise."""
    own = (local.tolist(), [list(batch.image_ids) for batch in batches])
    by_rank: list[Any] = [own] * ranks.world_size
    several = ranks.world_size > 1
    if several:
        dist.all_gather_object(by_rank, own)
    found, parts = [], []
    for rank, (values, ids) in enumerate(by_rank):
        losses = {n: v for n, v in zip(names, values, strict=True) if not math.isfinite(v)}
        if losses:
            found.append({"rank": rank, "losses": losses, "images": ids})
            said = []
            for value in dict.fromkeys(map(str, losses.values())):
                group = [name for name, other in losses.items() if str(other) == value]
                said.append(f"{' and '.join(group)} {'are' if len(group) > 1 else 'is'} {value}")
            images = ", ".join(str(item) for group in ids for item in group)
            where = f" in process {rank}" if several else ""
            parts.append(f"{', '.join(said)}{where} on images {images}")
    iteration = state.iteration
    record = folder / f"{step_name(iteration)}.json"
    if ranks.is_main:
        batches_by_rank = [ids for _, ids in by_rank]
        content = {"iteration": iteration, "not_finite": found, "batches_by_rank": batches_by_rank}
        write_json(record, content)
    message = f"At iteration {iteration}, {'; '.join(parts)}."
    if config.non_finite == "skip" and state.skipped < config.max_skipped:
        state.skipped += 1
        logger.warning("%s Skipping this step (%d so far).", message, state.skipped)
        return
    advice = (
        f"{state.skipped} steps were skipped, as many as training.guards.max_skipped allows: the weights have most "
        "likely diverged. Go back to an earlier checkpoint (--resume FILE), or start again, with a lower "
        "training.optimizer.learning_rate."
        if config.non_finite == "skip"
        else "Check their annotations, lower training.optimizer.learning_rate, or resume with "
        "--set training.guards.non_finite=skip."
    )
    raise NumericsError(
        f"{message} The weights are as they were before this step; no checkpoint was touched.",
        hint=f"{record} lists the images. {advice}",
        path=record,
        rank=found[0]["rank"] if several else None,
    )
