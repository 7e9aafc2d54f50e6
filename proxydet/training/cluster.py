"""How many processes where: from the command line, or from the SLURM allocation that it runs in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxydet.errors import ConfigError

_DEFAULT_PORT = 29400
_GROUP = re.compile(r"([^,\[\]]*)(?:\[([^\]]*)\])?([^,\[\]]*)")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The processes of a training."""

    processes: int
    """Processes on each machine: one a GPU."""

    nodes: int = 1
    """Machines."""

    endpoint: str = ""
    """``host:port`` at which the machines meet; empty for a single machine."""

    run_id: str = ""
    """Word that all machines of one run share."""

    max_restarts: int = 0
    """How often the processes are started again after one failed."""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.nodes < 1:
            raise ConfigError(
                f"--gpus and --nodes must be at least 1; they are {self.processes} and {self.nodes}."
            )
        if self.nodes > 1 and not re.fullmatch(r".+:\d+", self.endpoint):
            raise ConfigError(
                f"{self.nodes} nodes need a place to meet; the rendezvous is {self.endpoint!r}.",
                hint="Give the same --rendezvous HOST:PORT on every node: a node's name and a free port.",
            )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.processes * self.nodes

    def torchrun_arguments(self, logs: Path) -> list[str]:
        """Return the arguments with which torchrun starts the same processes."""
        arguments = [
            f"--nproc-per-node={self.processes}",
            f"--nnodes={self.nodes}",
            f"--max-restarts={self.max_restarts}",
            f"--log-dir={logs}",
        ]
        if self.nodes == 1:
            return [*arguments, "--standalone"]
        meeting = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.run_id}",
        ]
        return [*arguments, *meeting]


def plan_topology(
    *,
    gpus: int | None,
    nodes: int | None,
    rendezvous: str | None,
    max_restarts: int | None,
    available: int,
    environment: Mapping[str, str],
) -> Topology:
    """Decide how many processes run where.

    Inside a SLURM job step with one task a node (``srun --ntasks-per-node=1``) the number of nodes, the meeting place
    and the run's word come from SLURM.

    Args:
        gpus: Processes on each node, as asked for; None for one a GPU (one on a machine without).
        nodes: Nodes, as asked for; None for what SLURM says, or 1.
        rendezvous: ``HOST:PORT``, as asked for.
        max_restarts: As asked for; None restarts up to 3 times on several nodes and never on one.
        available: GPUs that torch sees here.
        environment: Environment variables.

    Raises:
        ConfigError: The numbers do not fit together.
    """
    slurm = "SLURM_JOB_ID" in environment and environment.get("SLURM_PROCID") is not None
    in_step = slurm and environment.get("SLURM_NTASKS_PER_NODE", "1") == "1"
    steps = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    count = nodes or (steps if in_step else 1)
    run_id = environment.get("SLURM_JOB_ID", "proxydet")
    if count > 1 and rendezvous is None and slurm:
        names = expand_hosts(
            environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        )
        port = 20_000 + int(re.sub(r"\D", "", run_id) or 0) % 20_000
        rendezvous = f"{names[0]}:{port}" if names else None
    if rendezvous and ":" not in rendezvous:
        rendezvous = f"{rendezvous}:{_DEFAULT_PORT}"
    return Topology(
        processes=gpus or max(available, 1),
        nodes=count,
        endpoint=rendezvous or "",
        run_id=run_id,
        max_restarts=(3 if count > 1 else 0) if max_restarts is None else max_restarts,
    )


def expand_hosts(text: str) -> list[str]:
    """Expand a SLURM node list: ``a[01-03,7],b`` is a01, a02, a03, a7, b.

    Raises:
        ConfigError: The text is not a node list.
    """
    hosts: list[str] = []
    for part in _split_outside_brackets(text):
        match = _GROUP.fullmatch(part)
        if match is None:
            raise ConfigError(f"{part!r} in the node list {text!r} is not a node name.")
        before, numbers, after = match[1], match[2], match[3]
        if numbers is None:
            hosts.append(part)
            continue
        hosts += [f"{before}{number}{after}" for number in _expand_numbers(numbers, text)]
    return hosts


def _expand_numbers(numbers: str, text: str) -> list[str]:
    expanded: list[str] = []
    for item in numbers.split(","):
        first, _, last = item.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise ConfigError(f"{item!r} in the node list {text!r} is not a range of numbers.")
        expanded += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return expanded


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]
