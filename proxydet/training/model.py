"""The network and its losses as one module whose forward pass gives the losses: what DDP wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from proxydet.training.seeding import derive_seed, seed_everything

Losses = dict[str, torch.Tensor]
"""Loss name to scalar tensor; the same names for every kind of batch on every rank."""


class TrainingModel(nn.Module):
    """Network and criterion in one forward pass.

    Args:
        network: A module with ``forward_train(batch, generator=...)``.
        criterion: Called with that method's result and the same generator; returns `Losses`.
        device: Where both compute, and where their random numbers are drawn.
        touch_all: Whether every trained parameter shall be in the graph of the losses, be it with gradient 0.
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
        """Compute the losses of a batch, drawing every random number from one seed.

        Args:
            batch: A box batch or an image-label batch.
            seed: Seed of this step on this rank.

        Returns:
            The losses.
        """
        seed_everything(seed)
        generator = self._generator.manual_seed(derive_seed(seed, "generator"))
        output = self.network.forward_train(batch, generator=generator)  # type: ignore[operator]
        losses: Losses = self._criterion(output, generator=generator)
        return _touch_all(losses, self.parameters()) if self._touch_all else losses


def _touch_all(losses: Losses, parameters: Iterable[nn.Parameter]) -> Losses:
    """Connect every trained parameter to the first loss without changing a value or a gradient.

    DDP waits for every parameter's gradient. An image-label batch reaches neither mask head nor mixup branch; with
    this link their gradients arrive (as absent, which DDP counts as 0) and it need not search the graph for them.
    """
    first = next(iter(losses))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
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
