"""How many processes where, from the command line or from SLURM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.errors import ConfigError
from proxydet.training.cluster import Topology, expand_hosts, plan_topology

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[08-10],node7",
    "SLURM_NTASKS_PER_NODE": "1",
}


def plan(environment: dict, available: int = 8, **asked: object) -> Topology:
    words = {"gpus": None, "nodes": None, "rendezvous": None, "max_restarts": None, **asked}
    return plan_topology(**words, available=available, environment=environment)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a[1-3]", ["a1", "a2", "a3"]),
        ("gpu[08-10,12],login-1", ["gpu08", "gpu09", "gpu10", "gpu12", "login-1"]),
        ("r[1-2]n,x[5]", ["r1n", "r2n", "x5"]),
        ("", []),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["a[3-1]", "a[x]", "a[1-", "a[1]b[2]"])
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_hosts(text)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
def test_brackets_and_names_say_the_same(numbers: list[int]) -> None:
    folded = f"n[{','.join(f'{n:02d}' for n in numbers)}]"
    assert expand_hosts(folded) == [f"n{n:02d}" for n in numbers]


def test_one_machine() -> None:
    assert plan({}) == Topology(processes=8, run_id="proxydet")
    assert plan({}, available=0).world_size == 1
    assert plan({}, gpus=3).world_size == 3


def test_several_machines_need_a_meeting_place() -> None:
    with pytest.raises(ConfigError, match="2 nodes need a place to meet") as caught:
        plan({}, nodes=2)
    assert "--rendezvous HOST:PORT" in str(caught.value.hint)
    found = plan({}, nodes=2, rendezvous="host1")
    assert found.endpoint == "host1:29400"
    assert found.max_restarts == 3
    assert plan({}, nodes=2, rendezvous="host1:1234", max_restarts=0).endpoint == "host1:1234"


def test_slurm_says_where() -> None:
    found = plan(SLURM)
    assert found.nodes == 4
    assert found.world_size == 32
    assert found.endpoint == f"gpu08:{20_000 + 123456 % 20_000}"
    assert found.run_id == "123456"
    assert plan(SLURM, nodes=1).nodes == 1
    assert plan(SLURM, rendezvous="other:1").endpoint == "other:1"


def test_slurm_outside_of_a_step_is_one_machine() -> None:
    batch = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-4]"}
    assert plan(batch).nodes == 1


def test_torchrun_would_start_the_same() -> None:
    from pathlib import Path

    alone = Topology(processes=2).torchrun_arguments(Path("logs"))
    assert alone == [
        "--nproc-per-node=2",
        "--nnodes=1",
        "--max-restarts=0",
        "--log-dir=logs",
        "--standalone",
    ]
    several = Topology(processes=2, nodes=3, endpoint="a:1", run_id="x", max_restarts=3)
    assert several.torchrun_arguments(Path("logs"))[-3:] == [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=a:1",
        "--rdzv-id=x",
    ]
