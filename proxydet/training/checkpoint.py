"""Checkpoints: what they hold, written behind the training, whole or not at all, rotated, and proved when read.

A checkpoint ``step_0001000.pth`` is a file of `proxydet.weight_files.write_state`, with a SHA-256 that is compared when it
is read: whatever damaged the file, nothing else than what was written is ever resumed from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from proxydet.errors import CheckpointError, NumericsError, ProxydetError
from proxydet.paths import list_checkpoints, step_name
from proxydet.weight_files import FORMAT, read_content, write_state

if TYPE_CHECKING:
    from proxydet.training.config import CheckpointConfig

logger = logging.getLogger(__name__)

_NO_ROOM = "make room and start the same command again: it resumes from the newest checkpoint"
_OTHER_WEIGHTS = "start a new run from its weights with --weights; --resume takes a checkpoint, RUN/checkpoints/step_....pth"
_OLDER = "resume from an older one: --resume RUN/checkpoints/step_....pth"


@dataclass(kw_only=True)
class TrainingState:
    """All that changes while a network is trained: what a checkpoint holds.

    There is no random state among it: each batch draws from the seed and its number alone; nor a position of the
    sampler or of the learning-rate schedule: they are functions of the number of batches and of the progress.

    Attributes:
        network: The detector; its state dict has the published names.
        model: The module whose forward pass gives losses: a `TrainingModel` around the network, or DDP around that.
        optimizer: Optimiser over the trained parameters.
        scaler: Loss scaler; disabled unless fp16.
        seed: Seed of the run.
        replicas: Batches of an iteration when the run began.
        run: JSON of what the run is made from: ``configuration`` and ``digests``.
        progress: Iterations so far: images used, over those of an iteration when the run began, for batches of average
            size.
        step: How many iterations the last step counted as: above or below 1 where a step has more or fewer images than when
            the run began.
        batches: Batches that all processes have used: the number of the next one, from which it draws.
        draws: Batches that each process has used; differs from ``batches`` by the numbers of processes.
        images: Images in all batches.
        skipped: Steps that left the weights alone because a loss was not finite.
        window: Sums of the log record that is being collected.
        average: Moving average of trained parameters and of buffers, by name; None where none is kept.
        start: Starting values that the trained weights are mixed with to be evaluated and written, by name; empty where
            they are not.
        share: Share of the trained weights in that mixture.
    """

    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    seed: int
    replicas: int
    run: str = ""
    progress: Fraction = Fraction(0)
    step: Fraction = Fraction(1)
    batches: int = 0
    draws: int = 0
    images: int = 0
    skipped: int = 0
    window: dict[str, Any] = field(default_factory=dict)
    average: dict[str, torch.Tensor] | None = None
    start: Mapping[str, torch.Tensor] = field(default_factory=dict)
    share: float = 1.0

    @property
    def iteration(self) -> int:
        """Whole iterations so far."""
        return int(self.progress)

    def learnt(self) -> dict[str, torch.Tensor]:
        """Return copies of what training changes, by name: the trained parameters and the buffers."""
        parameters = dict(self.network.named_parameters())
        return {
            name: value.detach().clone()
            for name, value in self.network.state_dict().items()
            if value.is_floating_point()
            and (name not in parameters or parameters[name].requires_grad)
        }

    def evaluated(self) -> dict[str, torch.Tensor]:
        """Return the values, by name, in which the weights that are evaluated and written differ from the network's.

        They are averaged, then mixed with the starting weights.
        """
        values = dict(self.average or {})
        if self.start:
            trained = {**self.network.state_dict(), **values}
            values.update(
                (name, start.lerp(trained[name], self.share)) for name, start in self.start.items()
            )
        return values

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the network's state dict as it is evaluated and written."""
        return {**self.network.state_dict(), **self.evaluated()}

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Within this context the network is in evaluation mode and has the weights that `weights` returns."""
        values, trained = self.evaluated(), self.network.state_dict()
        kept = {name: trained[name].clone() for name in values}
        self.network.eval()
        try:
            self.network.load_state_dict(values, strict=False)
            yield
        finally:
            self.network.load_state_dict(kept, strict=False)
            self.train()

    def train(self) -> None:
        """Set the network's training mode, but for BatchNorms of frozen parts: they keep their statistics, and apply them."""
        self.network.train()
        for part in self.network.modules():
            frozen = [not parameter.requires_grad for parameter in part.parameters()]
            for norm in part.modules() if frozen and all(frozen) else ():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, as tensors and plain values.

        Raises:
            NumericsError: A weight is not finite; such a state is not worth keeping.
        """
        check_finite(self.network)
        trained, evaluated = self.network.state_dict(), self.evaluated()
        # What opens a checkpoint as a detector finds the weights that were evaluated.
        content: dict[str, Any] = {"model": {**trained, **evaluated}}
        if evaluated:
            content["trained"] = {name: trained[name] for name in evaluated}
        if self.average is not None and self.start:
            content["average"] = dict(self.average)
        plain = ("seed", "iteration", "batches", "draws", "images", "skipped", "run")
        return {
            **content,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": str(self.progress),
            "step": str(self.step),
            "window": dict(self.window),
            **{name: getattr(self, name) for name in plain},
        }

    def load_state_dict(self, state: Mapping[str, Any], draws: int = 1) -> None:
        """Go back to a saved state.

        Args:
            state: What `state_dict` returned.
            draws: Batches of one process in a step, where the state, of version 0.1, does not say.

        Raises:
            CheckpointError: It belongs to another model or another seed.
        """
        other = "resume with the run's own configuration; to start from its weights use --weights"
        if (seed := state.get("seed")) != self.seed:
            message = f"the checkpoint was written with seed {seed}, this run has {self.seed}"
            raise CheckpointError(message, hint=other)
        try:
            self.network.load_state_dict({**state["model"], **state.get("trained", {})})
            if self.average is not None:
                # A checkpoint of a run that kept none begins one with its weights.
                source = state.get("average", state["model"])
                self.average = {
                    name: source[name].to(value).clone() for name, value in self.average.items()
                }
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            # Version 0.1 resumed on as many processes with as much accumulation only; later ones first counted in batches.
            self.batches = state.get("batches", state["iteration"] * self.replicas)
            self.draws = state.get("draws", state["iteration"] * draws)
            self.progress = Fraction(state.get("progress", Fraction(self.batches, self.replicas)))
            self.step = Fraction(state.get("step", 1))
            self.images, self.skipped = state["images"], state["skipped"]
            self.window = dict(state["window"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:  # fmt: skip
            raise CheckpointError(
                f"the checkpoint belongs to another model: {error}", hint=other
            ) from error


def check_finite(network: nn.Module) -> None:
    """Make sure that no weight is NaN or infinite.

    Raises:
        NumericsError: One is; the message names the first such tensors.
    """
    tensors = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    bad = torch.stack([~torch.isfinite(t).all() for t in tensors.values()]).tolist()
    names = [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]
    if names:
        raise NumericsError(
            f"{len(names)} weights are not finite, the first: {', '.join(names[:3])}.",
            hint="The last checkpoint is good. Lower the learning rate, or use precision bf16 or fp32.",
        )


class CheckpointFolder:
    """The checkpoints of one run. One thread writes them, one at a time; leaving this context waits for it, but on Ctrl-C.

    Args:
        folder: Where they lie; made when the first one is written.
        config: Which are kept.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self._config = config
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is KeyboardInterrupt:  # who presses Ctrl-C twice does not want to wait
                self._given_up.set()
            else:
                self.wait()
        except KeyboardInterrupt:
            self._given_up.set()
            raise
        except Exception as failed:
            if kind is None:
                raise
            # Next to what ends the training.
            known = failed.message if isinstance(failed, ProxydetError) else None
            logger.warning("%s", known or f"A checkpoint was not written: {failed!r}")

    def path(self, iteration: int) -> Path:
        """Return the name of the checkpoint after a number of iterations."""
        return self.folder / f"{step_name(iteration)}.pth"

    def save(self, state: dict[str, Any], iteration: int, best: int | None = None) -> None:
        """Copy the state of an iteration and let its checkpoint be written; then those that need not be kept are removed.

        Waits for the checkpoint before it. The copy takes as much host memory as the file, until that is written.

        Args:
            state: What `load_checkpoint` shall return; its tensors may change when this returns.
            iteration: Iterations so far.
            best: Iteration of the best checkpoint so far, which is kept.

        Raises:
            ProxydetError: As `wait`, of the checkpoint before it.
        """
        self.wait()
        copied = _copy_to_host(state)
        event = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

        def write() -> None:
            if event is not None:
                event.synchronize()
            path = self.path(iteration)
            write_state(copied, path, hint=_NO_ROOM, given_up=self._given_up)
            self.rotate(best)
            logger.info("Wrote %s", path)

        self._writing = self._writer.submit(write)

    def check(self) -> None:
        """Raise as `wait` where the checkpoint that was being written has failed; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the checkpoint that is being written, if any, is there.

        Raises:
            DiskFullError: There is no room for it; nothing is left of it, and the earlier ones are untouched.
            RuntimeEnvironmentError: It cannot be written; likewise.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_newest(self) -> tuple[dict[str, Any], Path] | None:
        """Read the newest checkpoint that is whole, with a warning when a newer one is damaged.

        Returns:
            The state and its file; None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
            RuntimeEnvironmentError: The machine cannot read one, which may be whole: nothing older is taken in its place.
        """
        found = list_checkpoints(self.folder)
        for number, (_, path) in reversed(list(enumerate(found))):
            try:
                return load_checkpoint(path), path
            except CheckpointError as error:
                then = "Falling back to the checkpoint before it." if number else ""
                logger.warning("%s. %s", error.message.rstrip("."), then)
        if found:
            raise CheckpointError(
                f"None of the {len(found)} checkpoints in {self.folder} can be read.",
                hint="Train in another folder (--output), give a checkpoint with --resume PATH, or remove the run: --overwrite",
                path=self.folder,
            )
        return None

    def rotate(self, best: int | None) -> None:
        """Remove the checkpoints that need not be kept; ``best`` is the best one's iteration, if any."""
        found = list_checkpoints(self.folder)
        every, passed = self._config.keep_every, 0
        for iteration, path in found[: -self._config.keep_last]:
            milestone = every is not None and iteration // every > passed
            passed = iteration // every if every is not None else 0
            keep_best = self._config.keep_best or self._config.best_weights
            if not milestone and not (keep_best and iteration == best):
                path.unlink(missing_ok=True)


def _copy_to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy nested values, tensors into host memory; those of a GPU arrive when its stream has come so far.

    A tensor that occurs several times is copied, and so written, once.
    """
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if place not in copies:
                own = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                copies[place] = own.copy_(value, non_blocking=True)
            return copies[place]
        if isinstance(value, Mapping):
            return {key: copy(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(inner) for inner in value)
        return value

    copied: dict[str, Any] = copy(state)
    return copied


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, and prove that it holds what was written.

    Raises:
        CheckpointError: The file is absent, damaged, unsafe, or not a training checkpoint of this program.
    """
    return _read(path, whole=True)


def read_header(path: Path) -> dict[str, Any]:
    """Return what a training checkpoint says of itself, without reading its weights.

    Returns:
        As `load_checkpoint`, without tensors; ``run`` is the mapping with ``configuration`` and ``digests`` of the run that wrote
        it, empty of version 0.1.

    Raises:
        CheckpointError: The file is absent, cut off, unsafe, or not a training checkpoint of this program.
    """
    header = _read(path, whole=False)
    try:
        run = json.loads(header.get("run") or "null")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint=_OLDER, path=path) from error
    return {**header, "run": run if isinstance(run, dict) else {}}


def _read(path: Path, *, whole: bool) -> dict[str, Any]:
    """Read a checkpoint: all of it, compared with its digest; or without its tensors."""
    if path.suffix == ".safetensors":
        message = f"{path} holds weights, and not the state of a training"
        raise CheckpointError(message, hint=_OTHER_WEIGHTS, path=path)
    state = read_content(path, tensors=whole, hint=_OLDER)
    ours = isinstance(state, dict) and state.get("format") in (1, FORMAT)
    final = ours and "model" in state and "optimizer" not in state
    if not ours or final or not isinstance(state.get("iteration"), int):
        weights = ": it holds final weights, and not the state of a training" * final
        message = f"{path} is not a training checkpoint of this program{weights}"
        raise CheckpointError(message, hint=_OTHER_WEIGHTS, path=path)
    return dict(state)
