"""The processes of one training: which one this is, what they agree on, what they exchange in each step."""

from __future__ import annotations

import inspect
import os
import re
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
# SLURM numbers its own steps (batch script, salloc's shell) down from here.
_SPECIAL_STEPS = 0xFFFF_FFF0


@dataclass(frozen=True, kw_only=True)
class DistInfo:
    """This process, among the processes of one training."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    local_rank: int = 0
    """Number of this process on its node."""

    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class SlurmStep:
    """The job step that srun started this process in, by the variables that ``srun(1)`` states."""

    name: str
    """``JOB.STEP.RESTARTS``: the same for all its tasks, and for no other step's."""

    tasks: int
    """Tasks in all."""

    nodes: int
    """Nodes that they run on."""

    endpoint: tuple[str, str]
    """Host and port to meet at: ``MASTER_ADDR`` and ``MASTER_PORT`` where they are set, else the step's first node and a
    port that follows from the numbers of job and step."""

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> SlurmStep | None:
        """Return the step that an environment describes; None outside of one, as in a batch script.

        A batch script has task variables too (``SLURM_PROCID``, ``SLURM_NTASKS``); one submitted from within a step even
        has that step's, which then contradict its own.
        """
        get = environment.get
        job, number = get("SLURM_JOB_ID", ""), get("SLURM_STEP_ID", "")
        if not number.isdigit() or int(number) >= _SPECIAL_STEPS:
            return None
        tasks, per_node = environment["SLURM_STEP_NUM_TASKS"], get("SLURM_STEP_TASKS_PER_NODE")
        if (tasks, per_node) != (get("SLURM_NTASKS"), get("SLURM_TASKS_PER_NODE")):
            return None
        # `srun --pty bash` runs the shell in one task; those next to it have ended.
        own = get("SLURM_TASK_PID") == str(os.getpid())
        if tasks != "1" and "SLURM_PTY_PORT" in environment and not own and os.isatty(0):
            return None
        first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"])
        port = 20_000 + (31 * int(job) + int(number)) % 12_000
        return cls(
            name=f"{job}.{number}.{get('SLURM_RESTART_COUNT', '0')}",
            tasks=int(tasks),
            nodes=int(environment["SLURM_STEP_NUM_NODES"]),
            endpoint=(
                get("MASTER_ADDR") or first.split(",")[0],
                get("MASTER_PORT") or str(port),
            ),
        )


def torch_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables by which torch knows one process among several; empty for a process that works alone.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` are the environment's own (torchrun, Ray,
    Kubernetes...), or those of a task of a SLURM step of several tasks.
    """
    # Kubeflow sets some of them for a pod that has yet to call torchrun.
    pod = "PET_NNODES" in environment and "LOCAL_RANK" not in environment
    if "RANK" in environment and "WORLD_SIZE" in environment and not pod:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {name: environment[name] for name in names if name in environment}
    step = None if pod else SlurmStep.of(environment)
    if step is None or step.tasks == 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": step.endpoint[0],
        "MASTER_PORT": step.endpoint[1],
    }


def launched_rank() -> int:
    """Return the number of this process among those of its training; 0 where it works alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(torch_variables().get("RANK", "0"))


@contextmanager
def connect(device: str) -> Iterator[DistInfo]:
    """Join the other processes of this training; leave them when the block ends well.

    A process group that exists already (Ray Train, Accelerate, Fabric) is used, and left as it is. One of our own is left
    only when the block ends well: after an error the process is about to end, and leaving first would make the others fail
    before this one has reported why.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        EnvironmentProblem: A GPU is asked for and there is none for this process.
        ConfigError: The process group that exists cannot exchange tensors of the device.
        TrainingError: The processes did not find each other.
    """
    variables = torch_variables()
    local_rank = int(variables.get("LOCAL_RANK", "0"))
    if dist.is_available() and dist.is_initialized():
        yield _existing_group(device, local_rank)
        return
    place = choose_device(device, 0 if _has_own_gpu(local_rank) else local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    world_size = int(variables.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistInfo(device=place)
        return
    os.environ.update(variables)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except RuntimeError as error:  # of torch.distributed, or gloo's own
        where = f"{variables.get('MASTER_ADDR')}:{variables.get('MASTER_PORT')}"
        raise TrainingError(
            f"The {world_size} processes did not find each other at {where}: {str(error).splitlines()[0]}",
            hint="Each must be able to reach that address. Set MASTER_ADDR and MASTER_PORT, the same for all, to take another.",
        ) from error
    yield DistInfo(rank=dist.get_rank(), world_size=world_size, local_rank=local_rank, device=place)
    dist.destroy_process_group()


def _existing_group(device: str, local_rank: int) -> DistInfo:
    """Describe this process in a process group that someone else made."""
    known = str(dist.get_backend_config())
    usable = {kind for kind in ("cpu", "cuda") if f"{kind}:" in known}
    if device == "auto" and "cuda" not in usable:
        device = "cpu"
    place = choose_device(device)
    if place.type not in usable:
        raise ConfigError(
            f"The process group that exists already exchanges tensors by {known}: none on {place.type}.",
            hint="Choose another --device (training.device), or make the group with the backend cpu:gloo,cuda:nccl.",
        )
    if place.type == "cuda":
        # Whoever made the group has chosen the device; number 0 may also mean that nobody has.
        chosen = torch.cuda.current_device()
        if chosen == 0 and local_rank < torch.cuda.device_count():
            chosen = local_rank
        place = torch.device("cuda", chosen)
        torch.cuda.set_device(place)
    return DistInfo(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=place,
    )


def _has_own_gpu(local_rank: int) -> bool:
    """Whether SLURM shows this task one GPU of several (``--gpus-per-task``, ``--gpu-bind``): always number 0."""
    return local_rank < int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) and (
        torch.cuda.is_available() and torch.cuda.device_count() == 1
    )


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
            hint="Start one process a GPU (--gpus, or tasks of srun), or use --device cpu; proxydet env reports what torch sees.",
        )
    return torch.device("cuda", local_rank)


def check_agreement(info: DistInfo, facts: Mapping[str, str]) -> None:
    """Make sure that every process runs the same job on the same data.

    Args:
        info: This process.
        facts: Name to digest or value, the same names everywhere (configuration, vocabulary, data...).

    Raises:
        TrainingError: Some process has another value; the message names the fact and the ranks.
    """
    if info.world_size == 1:
        return
    gathered: list[Mapping[str, str]] = [{}] * info.world_size
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


def sum_over_ranks(values: torch.Tensor, info: DistInfo) -> torch.Tensor:
    """Add up a tensor over all processes, in place."""
    if info.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: torch.Tensor, info: DistInfo) -> list[torch.Tensor]:
    """Return every process's tensor of the same shape, in the order of ranks."""
    if info.world_size == 1:
        return [values]
    gathered = [torch.empty_like(values) for _ in range(info.world_size)]
    dist.all_gather(gathered, values)
    return gathered


def wrap_for_ranks(
    model: nn.Module, info: DistInfo, *, find_unused: bool
) -> DistributedDataParallel:
    """Make the backward pass of a model average its gradients over all processes.

    Args:
        model: The same on every process.
        info: This process.
        find_unused: Search each step's graph for parameters that it does not reach, and leave their gradients alone.
    """
    # Buffers are the same everywhere and never change; newer versions of torch renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    no_sync: dict[str, Any] = {switch: False}
    return DistributedDataParallel(
        model,
        device_ids=[info.device] if info.device.type == "cuda" else None,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
        **no_sync,
    )


def wait_for_all(info: DistInfo) -> None:
    """Return when every process has arrived here."""
    if info.world_size > 1:
        dist.barrier()


def broadcast_value(value: object, info: DistInfo) -> object:
    """Return rank 0's value of a picklable object on every process."""
    if info.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
