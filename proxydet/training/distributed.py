"""The processes of one training: who they are, what they agree on, what they share in each step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proxydet.errors import ConfigError, EnvironmentProblem, TrainingError

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class DistInfo:
    """This process, among the processes of one training."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    local_rank: int = 0
    """Number of this process on its machine."""

    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def launched_world_size() -> int:
    """Return how many processes a launcher (torchrun, ours) started this one among; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return the number that a launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def connect(device: str) -> Iterator[DistInfo]:
    """Join the other processes that the launcher started, and leave them at the end.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        EnvironmentProblem: A GPU is asked for and there is none for this process.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = choose_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    world_size = launched_world_size()
    if world_size == 1:
        yield DistInfo(device=place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield DistInfo(
            rank=dist.get_rank(), world_size=world_size, local_rank=local_rank, device=place
        )
    finally:
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Resolve ``auto``, ``cuda`` or ``cpu`` to this process's device.

    Raises:
        ConfigError: The word is none of these.
        EnvironmentProblem: ``cuda`` is asked for and there is no usable GPU with this number.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device must be auto, cuda or cpu; it is {device!r}.")
    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise EnvironmentProblem(
            f"There is no GPU for this process, which takes number {local_rank}: torch sees {count}.",
            hint="Use fewer --gpus, or --device cpu; proxydet env says what torch sees.",
        )
    return torch.device("cuda", local_rank)


def check_agreement(ranks: DistInfo, facts: Mapping[str, str]) -> None:
    """Make sure that every process runs the same job on the same data.

    Args:
        ranks: This process.
        facts: Name to digest or value, the same names everywhere (configuration, vocabulary, data...).

    Raises:
        TrainingError: Some process has another value; the message names the fact and the ranks.
    """
    if ranks.world_size == 1:
        return
    gathered: list[Mapping[str, str]] = [{}] * ranks.world_size
    dist.all_gather_object(gathered, dict(facts))
    for name in gathered[0]:
        by_value: dict[str, list[int]] = {}
        for rank, theirs in enumerate(gathered):
            by_value.setdefault(theirs.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            values = "; ".join(f"ranks {where}: {value}" for value, where in by_value.items())
            raise TrainingError(
                f"The processes do not agree on the {name}: {values}.",
                hint="Give every node the same files and the same version of proxydet.",
            )


def sum_over_ranks(values: torch.Tensor, ranks: DistInfo) -> torch.Tensor:
    """Add up a tensor over all processes, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: torch.Tensor, ranks: DistInfo) -> list[torch.Tensor]:
    """Return every process's tensor of the same shape, in the order of ranks."""
    if ranks.world_size == 1:
        return [values]
    gathered = [torch.empty_like(values) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, values)
    return gathered


def wrap_for_ranks(
    model: nn.Module, ranks: DistInfo, *, find_unused: bool
) -> DistributedDataParallel:
    """Make the backward pass of a model average its gradients over all processes.

    Args:
        model: The same on every process.
        ranks: This process.
        find_unused: Search each step's graph for parameters that it does not reach, and leave their gradients alone.
    """
    # Buffers are the same everywhere and never change; newer versions of torch renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    no_sync: dict[str, Any] = {switch: False}
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
        **no_sync,
    )


def wait_for_all(ranks: DistInfo) -> None:
    """Return when every process has arrived here."""
    if ranks.world_size > 1:
        dist.barrier()


def broadcast_value(value: object, ranks: DistInfo) -> object:
    """Return rank 0's value of a picklable object on every process."""
    if ranks.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
