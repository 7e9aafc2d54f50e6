"""All that changes while a network is trained, in one place: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from proxydet.errors import CheckpointError, NumericsError


@dataclass(kw_only=True)
class TrainingState:
    """The changing parts of a training.

    There is no random state among them: each step draws from (seed, iteration, rank) alone; nor a position of the
    sampler or the learning-rate schedule: both are functions of the iteration.
    """

    network: nn.Module
    """The detector; its state dict has the published names."""

    model: nn.Module
    """The module whose forward pass gives losses: a `TrainingModel` around the network, or DDP around that."""

    optimizer: torch.optim.Optimizer
    """Optimiser over the trained parameters."""

    scaler: torch.amp.GradScaler
    """Loss scaler; disabled unless fp16."""

    seed: int
    """Seed of the run."""

    iteration: int = 0
    """Steps taken."""

    skipped: int = 0
    """Steps that left the weights alone because a loss was not finite."""

    images: int = 0
    """Images seen by all processes."""

    window: dict[str, Any] = field(default_factory=dict)
    """Sums of the log record that is being collected."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, as tensors and plain values.

        Raises:
            NumericsError: A weight is not finite; such a state is not worth keeping.
        """
        check_finite(self.network)
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "seed": self.seed,
            "iteration": self.iteration,
            "skipped": self.skipped,
            "images": self.images,
            "window": dict(self.window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises:
            CheckpointError: It belongs to another model or another seed.
        """
        if state["seed"] != self.seed:
            raise CheckpointError(
                f"The checkpoint was written with seed {state['seed']}, this run has {self.seed}.",
                hint="Resume with the run's own configuration; to start from its weights use --weights.",
            )
        try:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint belongs to another model: {error}",
                hint="Resume with the run's own configuration; to start from its weights use --weights.",
            ) from error
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        self.skipped = state["skipped"]
        self.images = state["images"]
        self.window = dict(state["window"])


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
