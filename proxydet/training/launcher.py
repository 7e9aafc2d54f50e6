"""Starts the processes of a training through torch's elastic launcher, and says why they failed."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from proxydet.errors import Interrupted, ProxydetError, TrainingError
from proxydet.training.cluster import Topology
from proxydet.training.failures import LAUNCHED, as_error, first_failure

logger = logging.getLogger(__name__)

# Seconds that processes get to write a checkpoint after a stop signal, before they are killed.
_SHUTDOWN_SECONDS = "120"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_MEETING_FAILURES = (RendezvousError, DistError)
_PAUSE_SECONDS = 5.0


def in_worker(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher (ours, or torchrun) started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment and "LOCAL_RANK" in environment


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Make the system kill this process when the launcher that started it is killed (Linux; elsewhere nothing).

    The elastic launcher gives its processes sessions of their own, so that they would outlive it, and go on writing to
    the folder of a run that was started again.

    Raises:
        TrainingError: The launcher is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    launcher = environment.get(LAUNCHED, "")
    if launcher and os.getppid() != int(launcher):
        raise TrainingError(
            "The process that started this one is gone.",
            hint="Start the same command again: it goes on from the newest checkpoint.",
        )


def launch(topology: Topology, arguments: Sequence[str], logs: Path) -> None:
    """Run this Python with ``arguments`` in every process of a topology, and wait for all of them.

    The first process of a machine shares its terminal; the others write below ``logs``.

    Args:
        topology: How many processes where.
        arguments: What follows the interpreter on the command line.
        logs: Folder of logs, the same on all machines.

    Raises:
        Interrupted: A stop signal came; the processes wrote a checkpoint.
        TrainingError: A process failed, or the machines did not find each other.
        ProxydetError: A process failed with this error.
    """
    since = time.time()
    os.environ[LAUNCHED] = str(os.getpid())
    # Otherwise DDP warns in each process about steps whose losses reach every parameter.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    _silence("torch.distributed.elastic")
    received: list[int] = []
    try:
        with _preemption_as_sigterm(received):
            _launch_until_met(topology, arguments, logs)
    except SignalException as error:
        number = received[0] if received else int(error.sigval)
        raise _interrupted(number, logs, since) from error
    except ChildFailedError as error:
        raise _failure(error, topology, logs, since) from error
    except _MEETING_FAILURES as error:
        raise TrainingError(
            f"The {topology.nodes} nodes did not find, or lost, each other at {topology.endpoint}: {error}",
            hint="Start the same command on every node. Each must reach that address, and the run ends with the node that "
            "owns it; starting anew goes on from the newest checkpoint.",
        ) from error


def _silence(package: str) -> None:
    """Keep a package's log off the terminal; its modules' loggers have levels of their own."""
    names = [name for name in logging.Logger.manager.loggerDict if name.startswith(package)]
    for name in [package, *names]:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _launch_until_met(topology: Topology, arguments: Sequence[str], logs: Path) -> None:
    """Run the elastic agent; where several nodes meet, run it again when the meeting breaks.

    When a node dies, the others may meet once more with its ghost before its heartbeat is missed, and wait for it in vain.
    """
    for attempt in range(topology.max_restarts + 1):
        config = _launch_config(topology, logs)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except _MEETING_FAILURES as error:
            if topology.nodes == 1 or attempt == topology.max_restarts:
                raise
            logger.warning("The nodes lost each other (%s); meeting again.", error)
        else:
            return
        time.sleep(_PAUSE_SECONDS)


def requeue(
    environment: Mapping[str, str] = os.environ,
    run: Callable[[list[str]], object] = lambda words: subprocess.run(words, check=True),  # noqa: S603
) -> bool:
    """Put the SLURM job that runs this process back into the queue; once a job, from its first node.

    Args:
        environment: Environment variables.
        run: Runs a command.

    Returns:
        Whether it was done.
    """
    job = environment.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol")
    if not job or environment.get("SLURM_NODEID", "0") != "0" or scontrol is None:
        return False
    run([scontrol, "requeue", job])
    return True


def _launch_config(topology: Topology, logs: Path) -> LaunchConfig:
    quiet = dict.fromkeys(range(1, topology.processes), Std.ALL)
    alone = topology.nodes == 1
    return LaunchConfig(
        min_nodes=topology.nodes,
        max_nodes=topology.nodes,
        nproc_per_node=topology.processes,
        run_id=topology.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if alone else topology.endpoint,
        max_restarts=topology.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
    )


@contextmanager
def _preemption_as_sigterm(received: list[int]) -> Iterator[None]:
    """Treat SIGUSR1, which the elastic launcher does not know, like SIGTERM, and note that it came."""

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGUSR1, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _interrupted(number: int, logs: Path, since: float) -> Interrupted:
    record = first_failure(logs, since)
    name = signal.Signals(number).name
    if record is not None and record.kind == Interrupted.__name__:
        return Interrupted(record.message, signal_number=number, hint=record.hint)
    return Interrupted(
        f"Training was stopped by {name} before its processes could write a checkpoint.",
        signal_number=number,
        hint="Start the same command again: it goes on from the newest checkpoint.",
    )


def _failure(
    error: ChildFailedError, topology: Topology, logs: Path, since: float
) -> ProxydetError:
    record = first_failure(logs, since)
    rank, killed = _killed(error)
    if record is not None and (record.expected or not killed):
        return as_error(record, topology.world_size)
    how = f"was killed by {killed}" if killed else "ended"
    return TrainingError(
        f"Process {rank} of {topology.world_size} {how} without saying why.",
        hint=f"Its log: {logs / f'rank_{rank}.log'}."
        + (" SIGKILL is most often the system's answer to memory running out." if killed else ""),
    )


def _killed(error: ChildFailedError) -> tuple[int, str]:
    """Return the process that a signal other than the launcher's own ended, and the signal's name if there is one."""
    first: int = error.get_first_failure()[0]
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            return rank, str(failure.signal_name())
    return first, ""
