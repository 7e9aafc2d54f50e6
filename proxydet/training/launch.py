"""Starts the processes of a training by torchrun, on whatever cluster this is, and reports why they failed."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from proxydet import errors
from proxydet.errors import (
    ConfigError,
    InputError,
    JobInterruptedError,
    NumericsError,
    ProxydetError,
    RuntimeEnvironmentError,
    TrainingError,
)
from proxydet.files import read_json, write_json
from proxydet.training.distributed import (
    KEPT_HINT,
    START_AGAIN,
    StartedProcess,
    number_in,
)
from proxydet.wording import first_line

logger = logging.getLogger(__name__)

_DEFAULT_PORT = "29400"
# Seconds that processes get to write a checkpoint after a stop signal, before they are killed.
_SHUTDOWN_SECONDS = "120"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_PAUSE_SECONDS = 5.0
# Variables of a cluster that state how many nodes there are, the number of this one, where they meet, and at which port.
_CLUSTERS = (
    ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", ""),
)
# Set by `launch` to its process id, for its processes: it reports their errors, so they need not.
LAUNCHER = "PROXYDET_LAUNCHER"


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The processes of a training, and who starts them.

    Attributes:
        processes: Processes on each node: one a GPU.
        nodes: Nodes.
        world_size: Processes in all.
        started: Whether this process is one of them: torchrun, srun or another program has started them all.
        torchrun: Options of torchrun that start them on each node, or would; empty where this process is all.
    """

    processes: int
    nodes: int = 1
    world_size: int
    started: bool = False
    torchrun: tuple[str, ...] = ()

    def command(self, words: Sequence[str]) -> tuple[str, ...]:
        """Return the command line that does the work of ``proxydet WORDS`` in all these processes."""
        if not self.torchrun:
            return ("proxydet", *words)
        return ("torchrun", *self.torchrun, "-m", "proxydet_cli", *words)


def plan_launch(
    *,
    gpus: int | None = None,
    nodes: int | None = None,
    rendezvous: str | None = None,
    max_restarts: int | None = None,
    whole_job: bool = True,
    available: int,
    environment: Mapping[str, str] = os.environ,
) -> LaunchPlan:
    """Decide how many processes run where, from what is asked for and what the cluster has put into the environment.

    - A process that torchrun, Ray or another program has started as one of several takes part as it is; so does a task of a
      SLURM step with several tasks a node.
    - Kubeflow (``PET_*``), SkyPilot (``SKYPILOT_*``) and a SLURM step with one task a node state how many nodes there are and
      where they meet.
    - Otherwise there is one node; in a SLURM batch script too, which runs on the first of the job's.

    Args:
        gpus: Processes on each node, as asked for; None for one a GPU (one on a node without).
        nodes: Nodes, as asked for; None for what the cluster states, or 1.
        rendezvous: ``HOST[:PORT]`` at which the nodes meet, as asked for.
        max_restarts: How often processes are started again after a failure, as asked for; None for 3 on several nodes and 0
            on one.
        whole_job: Refuse to work on one of several nodes of a SLURM job, unless ``nodes`` asks for it.
        available: GPUs that torch sees here.
        environment: Environment variables.

    Raises:
        ConfigError: What is asked for and what the cluster states do not make one training; the hint says what to change.
    """
    process = StartedProcess.of(environment)
    if process and (process.by == "torchrun" or process.world_size > process.nodes):
        asked = {
            "--gpus": gpus not in (None, 1, process.local_world_size),
            "--nodes": nodes not in (None, process.nodes),
            "--rendezvous": rendezvous is not None,
            "--max-restarts": max_restarts is not None,
        }
        if any(asked.values()):
            names = " and ".join(name for name, given in asked.items() if given)
            raise ConfigError(
                f"{names} cannot be given here: {process.by}, or a program like it, has started {process.world_size} processes, "
                "of which this is one.",
                hint=f"Leave out {names}. To let proxydet start the processes of a node: srun --ntasks-per-node=1.",
            )
        if process.by == "torchrun" and process.world_size > 1 and not dist.is_initialized():
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if not environment.get(name, "").strip():
                    raise ConfigError(
                        f"{process.world_size} processes need an address to meet at, and {name} is not set.",
                        hint="Set MASTER_ADDR and MASTER_PORT, the same for all: the host of the first process and a free port.",
                    )
        if process.port:
            _port(process.port, "MASTER_PORT")
        if process.local_world_size < available and process.rank == 0:
            logger.warning(
                "%d of %d GPUs of a node are used: so many processes were started on it",
                process.local_world_size,
                available,
            )
        options = ["--standalone"]
        if process.nodes > 1:
            address = f"{process.address}:{process.port or _DEFAULT_PORT}"
            options = [f"--nnodes={process.nodes}", *_rendezvous(address, "MASTER_PORT")]
        options.append(f"--nproc-per-node={process.local_world_size}")
        # torchrun starts as many on each node.
        even = process.world_size == process.nodes * process.local_world_size > 1
        return LaunchPlan(
            processes=process.local_world_size,
            nodes=process.nodes,
            world_size=process.world_size,
            started=True,
            torchrun=tuple(options) if even else (),
        )

    cluster = next((names for names in _CLUSTERS if names[0] in environment), None)
    source, found, options, lacking = "", 1, list[str](), list[str]()
    if cluster is not None:
        source, rank, addresses, port = cluster
        found, meeting = _count(environment, source), environment.get("PET_RDZV_ENDPOINT")
        if source == "PET_NNODES":
            each = environment.get("PET_NPROC_PER_NODE", "")
            if each.isdecimal():
                gpus = gpus or number_in(environment, "PET_NPROC_PER_NODE", least=1)
            elif each not in ("", "auto", "cpu", "gpu"):
                raise ConfigError(
                    f"The environment variable PET_NPROC_PER_NODE must be a number of processes, auto, cpu or gpu; it is {each!r}.",
                    hint="Correct it, or unset it: then one process a GPU is started.",
                )
        if source == "PET_NNODES" and meeting:
            if ":" in meeting:
                _port(meeting.rpartition(":")[2], "PET_RDZV_ENDPOINT")
            for name in ("backend", "endpoint", "id"):
                value = environment.get(f"PET_RDZV_{name.upper()}")
                options += [f"--rdzv-{name}={value}"] if value else []
        elif found > 1:
            lacking = [name for name in (rank, addresses) if not environment.get(name, "").strip()]
            hosts = environment.get(addresses, "").split()
            if not lacking and source == "SKYPILOT_NUM_NODES" and len(hosts) != found:
                raise ConfigError(
                    f"SKYPILOT_NUM_NODES is {found}, and SKYPILOT_NODE_IPS names {len(hosts)}.",
                    hint="Set both as SkyPilot does: SKYPILOT_NODE_IPS has the address of each node on a line of its own.",
                )
            if not lacking:
                number = number_in(environment, rank)
                if number >= found:
                    raise ConfigError(
                        f"{rank} is {number}; the {found} nodes have the numbers 0 to {found - 1}.",
                        hint=f"Set {rank} to the number of this node, another one on each.",
                    )
                options = [
                    f"--node-rank={number}",
                    f"--master-addr={hosts[0]}",
                    f"--master-port={_port(environment.get(port) or _DEFAULT_PORT, port)}",
                ]
    elif process is not None:
        source, found = "the SLURM step", process.nodes
        options = _rendezvous(f"{process.address}:{process.port}", "MASTER_PORT")
        if "MASTER_ADDR" not in environment:
            options.append(f"--rdzv-conf=is_host={int(process.rank == 0)}")
    elif whole_job and nodes is None and environment.get("SLURM_JOB_NUM_NODES", "1") != "1":
        count = environment["SLURM_JOB_NUM_NODES"]
        why = "the command runs on one of them: srun has not started it on each."
        advice = f"srun --ntasks={count} --ntasks-per-node=1 proxydet train ... trains on all; --nodes 1 trains on this one."
        if environment.get("SLURM_STEP_ID", "").isdecimal():
            why = (
                "its variables are not those of a step on each of them: the command runs on one node only, or srun has passed on "
                "the job's variables in place of those of its step."
            )
            advice = f"{KEPT_HINT} {advice}"
        raise ConfigError(f"This SLURM job has {count} nodes, and {why}", hint=advice)
    if source and nodes not in (None, found):
        raise ConfigError(
            f"--nodes is {nodes}, but there are {found} ({source}).",
            hint="Leave out --nodes; or start the command on as many nodes as it should use.",
        )
    nodes = nodes or found
    if rendezvous is not None:
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(rendezvous).version == 6:
                rendezvous = f"[{rendezvous}]"
        host, _, port = rendezvous.rpartition(":")
        if not host or rendezvous.endswith("]"):
            host, port = rendezvous, _DEFAULT_PORT
        if not re.fullmatch(r"\[[\w:.%]+\]|[^\s:\[\]]+", host):
            raise ConfigError(
                f"--rendezvous must be HOST:PORT; it is {rendezvous!r}.",
                hint=f"Give the name of one node and a free port of it: --rendezvous node1:{_DEFAULT_PORT}",
            )
        options = _rendezvous(f"{host}:{port}", "--rendezvous")
    if nodes == 1:
        options = ["--standalone"]
    elif options:
        options = [f"--nnodes={nodes}", *options]
    else:
        how = f"{' and '.join(lacking)} must be set" if lacking else "none is given"
        raise ConfigError(
            f"{nodes} nodes need an address to meet at, and {how}.",
            hint=("Set it as your cluster does; or give" if lacking else "Give")
            + " the same --rendezvous HOST:PORT on every node: the name of one of them and a free port.",
        )
    if max_restarts is None:
        if "PET_MAX_RESTARTS" in environment:  # torchrun reads it
            number_in(environment, "PET_MAX_RESTARTS")
        else:
            max_restarts = 0 if nodes == 1 else 3
    if max_restarts:
        options = [*options, f"--max-restarts={max_restarts}"]
    processes = gpus or max(available, 1)
    options = [*options, f"--nproc-per-node={processes}"]
    return LaunchPlan(
        processes=processes,
        nodes=nodes,
        world_size=processes * nodes,
        torchrun=tuple(options) if processes * nodes > 1 else (),
    )


def _count(environment: Mapping[str, str], name: str) -> int:
    least, colon, greatest = environment[name].partition(":")
    if colon and least == greatest:
        return number_in({name: least}, name, least=1)
    if colon:
        raise ConfigError(
            f"{name} must be one number; it is {environment[name]!r}.",
            hint="A training has a fixed number of nodes: set the least and the greatest number to the same.",
        )
    return number_in(environment, name, least=1)


def _port(text: str, source: str) -> str:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise ConfigError(
            f"The port of {source} must be a number from 1 to 65535; it is {text!r}.",
            hint=f"Give a free port of the first node, such as {_DEFAULT_PORT}.",
        )
    return text


def _rendezvous(address: str, source: str) -> list[str]:
    _port(address.rpartition(":")[2], source)
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=proxydet"]


def launch(plan: LaunchPlan, words: Sequence[str], logs: Path) -> None:
    """Run a Python program in every process of a plan by torchrun, and wait for all of them.

    The first process of a node shares its terminal; the others write below ``logs``.

    Args:
        plan: How many processes where.
        words: The program and its arguments, as torchrun takes them: ``-m MODULE ...`` or ``SCRIPT ...``.
        logs: Folder of logs, the same on all nodes.

    Raises:
        JobInterruptedError: A stop signal came; the processes wrote a checkpoint.
        TrainingError: A process failed, or the nodes did not find each other.
        ProxydetError: A process failed with this error.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    since = time.time()
    os.environ[LAUNCHER] = str(os.getpid())
    # Otherwise DDP warns in each process about steps whose losses reach every parameter.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    # torchrun would give each process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // plan.processes)))
    # What it logs, our errors report; its modules' loggers have levels of their own.
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = [*plan.torchrun, f"--log-dir={logs}"]
    if plan.processes > 1:
        options.append("--redirects=" + ",".join(f"{n}:3" for n in range(1, plan.processes)))
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    # Older versions of torchrun do not know this signal.
    before = signal.signal(signal.SIGUSR1, forward)
    parser = torchrun.get_args_parser()
    parser.allow_abbrev = False  # or it takes the program's --run for one of its own
    arguments = parser.parse_args([*options, *words])
    try:
        for left in reversed(range(arguments.max_restarts + 1)):
            try:
                torchrun.run(arguments)
                return
            except (RendezvousError, dist.DistError) as error:
                if plan.nodes == 1 or not left:
                    raise
                # When a node dies, the others may join its last rendezvous before its heartbeat is missed, and time out.
                logger.warning("Rendezvous lost (%s), retrying.", first_line(error))
                time.sleep(_PAUSE_SECONDS)
    except SignalException as error:
        number = received[0] if received else int(error.sigval)
        message = f"Training was stopped by {signal.Signals(number).name} before its processes could write a checkpoint."
        hint: str | None = START_AGAIN
        recorded = _recorded_error(logs, since, plan.world_size)
        if isinstance(recorded, JobInterruptedError):
            message, hint = recorded.message, recorded.hint
        raise JobInterruptedError(message, signal_number=number, hint=hint) from error
    except ChildFailedError as error:
        raise _failure(error, plan.world_size, logs, since) from error
    except (RendezvousError, dist.DistError) as error:
        raise TrainingError(
            f"The {plan.nodes} nodes did not find, or lost, each other ({' '.join(plan.torchrun)}): {first_line(error)}",
            hint="Start the same command on every node. Each must reach that address, and the run ends with the node that owns "
            "it; started again, it resumes from the newest checkpoint.",
        ) from error
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def worker(
    logs: Path, entered: contextlib.AbstractContextManager[object] | None = None
) -> Iterator[None]:
    """Be one of several processes: log to ``rank_N.log``, end with the launcher, and say why this process fails.

    A process whose torchrun is killed is killed too (Linux). torchrun gives its processes sessions of their own, so that
    they would outlive it, and write to the folder of a run that was started again.

    Args:
        logs: The run's folder of logs.
        entered: Entered before the log is opened, left before a failure is recorded: whoever may not write in the run folder
            fails in it.

    Raises:
        TrainingError: The launcher is gone already; or this process lost the others.
        SystemExit: In place of any error that `launch`, or the first process, reports.
    """
    process = StartedProcess.of()
    rank, world_size = (process.rank, process.world_size) if process else (0, 1)
    launcher = os.environ.get(LAUNCHER)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if launcher and os.getppid() != number_in(os.environ, LAUNCHER):
            raise TrainingError("The parent process exited.", hint=START_AGAIN)
    log = logs / f"rank_{rank}.log"
    handler: logging.Handler = logging.NullHandler()
    package = logging.getLogger("proxydet")
    before = package.level
    try:
        with entered or contextlib.nullcontext():
            logs.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(log, encoding="utf-8")
            form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            handler.setFormatter(form)
            package.setLevel(min(logging.INFO, package.getEffectiveLevel()))
            package.addHandler(handler)
            # So that the log that an error names is there, even where the process was killed before it had anything to say.
            place = f"{os.getpid()} on {socket.gethostname()}"
            logger.info("Process %d of %d begins: %s", rank, world_size, place)
            yield
    except BaseException as error:
        known = error if isinstance(error, ProxydetError) else None
        logger.critical("Process %d failed: %s", rank, error, exc_info=None if known else error)
        _record_error(error, rank, logs)
        if launcher or (isinstance(error, JobInterruptedError) and rank > 0):
            raise SystemExit(known.exit_code if known else 1) from error
        if _is_echo(error):
            raise TrainingError(
                f"Process {rank} of {world_size} lost the others: {first_line(error)}",
                hint=f"One of them failed or was killed; its message, or its log next to {log}, says why.",
            ) from error
        raise
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        handler.close()


def _is_echo(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|Connection (closed|reset|refused)|Broken pipe", str(error)) is not None
    )


def holds_logs_only(run: Path) -> bool:
    """Whether a run folder holds nothing but logs: the training was refused before it began, and its error is all they say."""
    return run.is_dir() and all(
        path.name == "logs" or path.name.startswith("train.lock") for path in run.iterdir()
    )


def _record_error(error: BaseException, rank: int, logs: Path) -> None:
    """Write an error to the file from which torchrun, and `launch`, take the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    known = error if isinstance(error, ProxydetError) else None
    # Where every process raises the error, it names the one where it arose.
    arose = error.rank if isinstance(error, NumericsError) else None
    text = known.message if known else f"{type(error).__name__}: {first_line(error)}"
    refused = isinstance(error, (InputError, RuntimeEnvironmentError))
    log = logs / f"rank_{rank if arose is None else arose}.log"
    record = {
        "kind": type(error).__name__ if known else "TrainingError",
        "weight": 0 if known else 2 if _is_echo(error) else 1,
        "message": text,
        "hint": known.hint if known else None,
        "signal": error.signal_number if isinstance(error, JobInterruptedError) else 0,
        "process": None if arose is not None else rank,
        "log": None if refused and holds_logs_only(logs.parent) else str(log),
        "time": time.time(),
    }
    content = {"message": text, "timestamp": int(time.time()), "proxydet": record}
    write_json(Path(path), content, durable=False)


def _recorded_error(
    logs: Path, since: float, world_size: int, *, least: int = 2
) -> ProxydetError | None:
    """Return the error that came first in the last attempt, before those that it caused in other processes.

    Args:
        logs: The folder of logs, below which torchrun keeps a folder for each node and attempt.
        since: Seconds since 1970; older errors are of another run.
        world_size: Number of processes.
        least: 0 for this program's own errors, 1 for any, 2 for those too that another process may have caused.
    """
    records: list[dict[str, Any]] = []
    keys = ("kind", "message", "hint", "signal", "process", "log", "weight", "time")
    for folder in logs.iterdir() if logs.is_dir() else ():
        attempts = [path for path in folder.glob("attempt_*") if path.name[8:].isdecimal()]
        last = max(attempts, key=lambda path: int(path.name[8:]), default=folder)
        for path in last.glob("*/error.json"):
            # A process that was killed, or a power cut, may have left anything.
            with contextlib.suppress(InputError, LookupError, TypeError, ValueError):
                record = read_json(path)["proxydet"]
                if float(record["time"]) >= since and int(record["weight"]) <= least:
                    records.append({key: record[key] for key in keys})
    if not records:
        return None
    first = min(records, key=lambda record: (record["weight"], record["time"]))
    if first["kind"] == JobInterruptedError.__name__:
        number = first["signal"]
        return JobInterruptedError(first["message"], signal_number=number, hint=first["hint"])
    where = "" if first["process"] is None else f"Process {first['process']} of {world_size}: "
    log = f"Its log: {first['log']}" if first["log"] else None
    hint = " ".join(filter(None, [first["hint"], log]))
    # Another version may have written it.
    kind: type[ProxydetError] = getattr(errors, str(first["kind"]), TrainingError)
    return kind(where + first["message"], hint=hint)


def _failure(error: Any, world_size: int, logs: Path, since: float) -> ProxydetError:
    """Turn torchrun's report of failed processes into the error to raise."""
    rank, killed = error.get_first_failure()[0], ""
    for number, failure in error.failures.items():
        # When one process dies, torchrun ends the others with SIGTERM; which of them it lists first says nothing.
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            rank, killed = number, str(failure.signal_name())
            break
    recorded = _recorded_error(logs, since, world_size, least=0 if killed else 2)
    if recorded is not None:
        return recorded
    how = f"was killed by {killed}" if killed else "ended"
    return TrainingError(
        f"Process {rank} of {world_size} {how}, and left no message.",
        hint=f"Its log: {logs / f'rank_{rank}.log'}."
        + (" SIGKILL is most often the system's answer to memory running out." if killed else ""),
    )


def requeue_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Put the SLURM job that this process belongs to back into the queue; once a job, from its first task.

    Returns:
        Whether it was done.
    """
    job, scontrol = environment.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if not job or environment.get("SLURM_PROCID", "0") != "0" or scontrol is None:
        return False
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        logger.warning("scontrol did not requeue job %s: %s", job, done.stderr.strip())
    return done.returncode == 0
