"""The processes of one training: which one this is, what they agree on, what they exchange in each step."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proxydet.errors import ConfigError, ProxydetError, RuntimeEnvironmentError, TrainingError
from proxydet.wording import first_line

T = TypeVar("T")
# Of what a step exchanges, if the loader may not take longer; a process that has died or hangs is noticed after this time.
_STEP_TIMEOUT = timedelta(minutes=15)
# Of the waits around a start, an evaluation, a checkpoint: while one process works, the others wait for it.
_WAIT_TIMEOUT = timedelta(days=2)
# The group of these waits, on the CPU; None where `connect` made none.
_wait_group: dist.ProcessGroup | None = None
# SLURM numbers its own steps (batch script, salloc's shell) down from here.
_SPECIAL_STEPS = 0xFFFF_FFF0
START_AGAIN = "Start the same command again: it resumes from the newest checkpoint."
_INTERFACE_HINT = (
    "GLOO_SOCKET_IFNAME must name the network interface by which the nodes reach each other (ip address lists them), or be unset: "
    "then it is that of the host's name."
)
KEPT_HINT = "Leave out srun's option --preserve-env (-E)."


@dataclass(frozen=True, kw_only=True)
class DistInfo:
    """This process, among the processes of one training.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        local_rank: Number of this process on its node.
        device: Where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class StartedProcess:
    """This process among those that another program has started, by what that has put into the environment.

    Attributes:
        by: ``torchrun``, or a program that sets the same variables (Ray, Accelerate, Kubernetes); or SLURM's ``srun``.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        local_rank: Number of this process on its node.
        local_world_size: Number of processes on this node.
        nodes: Number of nodes.
        address: Host at which they meet: ``MASTER_ADDR``, else the first node of the SLURM step.
        port: Its port: ``MASTER_PORT``, else one that follows from the numbers of SLURM's job and step.
    """

    by: Literal["torchrun", "srun"]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    nodes: int
    address: str
    port: str

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> StartedProcess | None:
        """Return what an environment states; None for a process that was started by itself, as by a batch script.

        A batch script has variables of a task too (``SLURM_PROCID``, ``SLURM_NTASKS``). One that was submitted from within a
        step even has that step's, which then contradict its own.

        Raises:
            ConfigError: A variable is not a number.
        """
        get = environment.get

        def number(name: str, default: int = 0, least: int = 0) -> int:
            return number_in(environment, name, default, least=least)

        # Kubeflow sets these for a pod that has yet to call torchrun.
        pod = "PET_NNODES" in environment and "LOCAL_RANK" not in environment
        if "RANK" in environment and "WORLD_SIZE" in environment and not pod:
            nodes = number("GROUP_WORLD_SIZE", 1, least=1)
            rank, world_size = number("RANK"), number("WORLD_SIZE", least=1)
            if rank >= world_size:
                raise ConfigError(
                    f"The environment variable RANK is {rank}; with WORLD_SIZE={world_size} it must be below {world_size}.",
                    hint="Correct both; or unset them, if nothing starts several processes here.",
                )
            return cls(
                by="torchrun",
                rank=rank,
                world_size=world_size,
                local_rank=number("LOCAL_RANK"),
                local_world_size=number("LOCAL_WORLD_SIZE", world_size // nodes),
                nodes=nodes,
                address=get("MASTER_ADDR", ""),
                port=get("MASTER_PORT", ""),
            )
        if pod or "SLURM_STEP_ID" not in environment or number("SLURM_STEP_ID") >= _SPECIAL_STEPS:
            lone = ("RANK" in environment) != ("WORLD_SIZE" in environment)
            if lone and not pod and get("WORLD_SIZE") != "1":
                there, lacks = sorted(("RANK", "WORLD_SIZE"), key=lambda n: n not in environment)
                raise ConfigError(
                    f"The environment variable {there} is set, and {lacks} is not.",
                    hint=f"Set {lacks} too, as the program that starts the processes should; or unset {there}.",
                )
            if "RANK" not in environment and number("OMPI_COMM_WORLD_SIZE", 1) > 1:
                raise ConfigError(
                    f"mpirun has started {get('OMPI_COMM_WORLD_SIZE')} processes (OMPI_COMM_WORLD_SIZE), which do not know each "
                    "other: RANK and WORLD_SIZE are not set.",
                    hint="Start one process a node, and let proxydet start the others (--gpus, --nodes); or use torchrun or srun.",
                )
            return None
        shared = ("NTASKS", "STEP_NUM_TASKS"), ("TASKS_PER_NODE", "STEP_TASKS_PER_NODE")
        differ = [
            f"SLURM_{own} is {get(f'SLURM_{own}')} and SLURM_{step} is {get(f'SLURM_{step}')}"
            for own, step in shared
            if get(f"SLURM_{own}") != get(f"SLURM_{step}")
        ]
        if differ:
            if number("SLURM_PROCID") > 0:  # never in a batch script
                raise ConfigError(
                    f"{'; '.join(differ)}: srun has passed on the job's variables in place of those of its step.",
                    hint=KEPT_HINT,
                )
            return None
        tasks, nodes = number("SLURM_STEP_NUM_TASKS", 1, 1), number("SLURM_STEP_NUM_NODES", 1, 1)
        # `srun --pty bash` runs the shell in one task; those next to it have ended.
        itself = get("SLURM_TASK_PID") == str(os.getpid())
        if tasks > 1 and "SLURM_PTY_PORT" in environment and not itself and os.isatty(0):
            return None
        job, step = number("SLURM_JOB_ID"), number("SLURM_STEP_ID")
        first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", get("SLURM_STEP_NODELIST", "")).split(",")[0]
        return cls(
            by="srun",
            rank=number("SLURM_PROCID"),
            world_size=tasks,
            local_rank=number("SLURM_LOCALID"),
            local_world_size=-(-tasks // nodes),
            nodes=nodes,
            address=get("MASTER_ADDR") or first,
            port=get("MASTER_PORT") or str(20_000 + (31 * job + step) % 12_000),
        )


def number_in(
    environment: Mapping[str, str], name: str, default: int = 0, *, least: int = 0
) -> int:
    """Return the whole number that an environment variable holds; ``default`` where it is not set.

    Raises:
        ConfigError: It is not a whole number, or below ``least``.
    """
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < least:
        raise ConfigError(
            f"The environment variable {name} must be a whole number of at least {least}; it is {text!r}.",
            hint=f"Unset {name}, if nothing starts several processes here.",
        )
    return int(text)


def launched_rank() -> int:
    """Return the number of this process among those of its training; 0 where it works alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    process = StartedProcess.of()
    return process.rank if process else 0


@contextmanager
def connect(device: str, loader_timeout: float = 600.0) -> Iterator[DistInfo]:
    """Join the other processes of this training; leave them when the block ends well.

    A process group that exists already (Ray Train, Accelerate, Fabric) is used, and left as it is. One of our own is left
    only when the block ends well: after an error the process is about to end, and leaving first would make the others fail
    before this one has reported why.

    Exchanges of a step fail after 15 minutes, or 5 after a loader that hangs would have been reported: then a process is lost.
    `wait_for_all`, `broadcast_value` and what is built on them wait for days, without keeping a GPU busy.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.
        loader_timeout: Seconds that a process may wait for a batch; 0 for ever.

    Raises:
        RuntimeEnvironmentError: A GPU is asked for and there is none for this process.
        ConfigError: The process group that exists cannot exchange tensors of the device.
        TrainingError: The processes did not find each other, or cannot make the group of the waits.
    """
    process = StartedProcess.of()
    local_rank = process.local_rank if process else 0
    if dist.is_available() and dist.is_initialized():
        found = _existing_group(device, local_rank)
        # A backend of someone else's (MPI, a vendor's) may be all that these processes can reach each other by.
        ours = {"gloo", "nccl"} & set(re.split("[:,]", str(dist.get_backend_config())))
        with _waits_together(found.world_size, "gloo" if ours else None, leave=True):
            yield found
        return
    own_gpu = (  # SLURM shows each task its own only (--gpus-per-task, --gpu-bind)
        local_rank < number_in(os.environ, "SLURM_GPUS_ON_NODE")
        and torch.cuda.is_available()
        and torch.cuda.device_count() == 1
    )
    place = choose_device(device, 0 if own_gpu else local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if process is None or process.world_size == 1:
        yield DistInfo(device=place)
        return
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=process.address,
        MASTER_PORT=process.port,
    )
    try:
        longest = timedelta(seconds=loader_timeout, minutes=5) if loader_timeout else _WAIT_TIMEOUT
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo", timeout=max(longest, _STEP_TIMEOUT)
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"The {process.world_size} processes could not connect to each other at {process.address}:{process.port}: "
            f"{first_line(error)}",
            hint="Each must be able to reach that address. Set MASTER_ADDR and MASTER_PORT, the same for all, to take another. "
            f"{_INTERFACE_HINT}",
        ) from error
    with _waits_together(process.world_size):
        yield DistInfo(
            rank=process.rank, world_size=process.world_size, local_rank=local_rank, device=place
        )
    dist.destroy_process_group()


@contextmanager
def _waits_together(
    processes: int, backend: str | None = "gloo", *, leave: bool = False
) -> Iterator[None]:
    """Within this context `_wait_group` is there: of its own, whose timeout does not concern what a step exchanges.

    Args:
        processes: How many wait for each other.
        backend: What it exchanges by; None takes that of the process group that exists.
        leave: Whether to leave it after an error too.

    Raises:
        TrainingError: It cannot be made.
    """
    global _wait_group
    if _wait_group is not None or processes == 1:
        yield
        return
    try:
        made: Any = dist.new_group(backend=backend, timeout=_WAIT_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"The group in which the processes wait for each other cannot be made: {first_line(error)}",
            hint=_INTERFACE_HINT,
        ) from error
    _wait_group = made
    try:
        yield
        leave = True
    finally:
        _wait_group = None
        if leave and dist.is_initialized():
            dist.destroy_process_group(made)


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
    rank, processes = dist.get_rank(), dist.get_world_size()
    return DistInfo(rank=rank, world_size=processes, local_rank=local_rank, device=place)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Resolve ``auto``, ``cuda`` or ``cpu`` to this process's device.

    Raises:
        ConfigError: The word is none of these.
        RuntimeEnvironmentError: ``cuda`` is asked for and there is no usable GPU with this number.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device must be auto, cuda or cpu; it is {device!r}.")
    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise RuntimeEnvironmentError(
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
    dist.all_gather_object(gathered, dict(facts), group=_wait_group)
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


def wrap_for_ranks(
    model: nn.Module, info: DistInfo, *, find_unused: bool
) -> DistributedDataParallel:
    """Make the backward pass of a model average its gradients over all processes.

    Args:
        model: The same on every process.
        info: This process.
        find_unused: Search each step's graph for parameters that it does not reach, and leave their gradients alone.
    """
    # Running statistics decide nothing in a step; `share_statistics` exchanges them before an evaluation. Newer versions of
    # torch renamed the switch.
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


def share_statistics(
    network: nn.Module, average: Mapping[str, torch.Tensor], info: DistInfo
) -> None:
    """Give every process the main one's statistics of BatchNorms in training, which each takes of its own batches.

    Args:
        network: Whose BatchNorms.
        average: A moving average of its values, by name; what it holds of the statistics is shared too.
        info: This process.
    """
    for name, norm in network.named_modules() if info.world_size > 1 else ():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
            for own, value in norm.named_buffers():
                dist.broadcast(value, src=0)
                if (mean := average.get(f"{name}.{own}")) is not None:
                    dist.broadcast(mean, src=0)


def wait_for_all(info: DistInfo) -> None:
    """Return when every process has arrived here."""
    if info.world_size > 1:
        dist.barrier(group=_wait_group)


def decided_by_main(info: DistInfo, decide: Callable[[], T]) -> T:
    """Return on every process what the main one computes; raises on every one what that raises.

    Args:
        info: This process.
        decide: Called on the main process; its result must be picklable.
    """
    if info.world_size == 1:
        return decide()
    value: Any = None
    if info.is_main:
        try:
            value = decide()
        except ProxydetError as error:
            value = error
    value = broadcast_value(value, info)
    if isinstance(value, ProxydetError):
        raise value
    return cast("T", value)


def broadcast_value(value: object, info: DistInfo) -> object:
    """Return rank 0's value of a picklable object on every process."""
    if info.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=_wait_group)
    return holder[0]
