"""How many processes run where, in the environments that clusters make; and which failure the user reads."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from proxydet.errors import (
    ConfigError,
    DataError,
    JobInterruptedError,
    LockedError,
    NumericsError,
    ProxydetError,
    TrainingError,
)
from proxydet.training.distributed import StartedProcess, connect, launched_rank
from proxydet.training.launch import LaunchPlan, launch, plan_launch, requeue_job, worker

RECORDED = json.loads(
    (Path(__file__).parents[2] / "fixtures/slurm_environments.json").read_text(encoding="utf-8")
)["environments"]


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Start without a cluster's variables, and undo what a launcher leaves for its processes."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(
            ("SLURM", "PET_", "SKYPILOT", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        ):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def plan(environment: dict[str, str], available: int = 8, **asked: object) -> LaunchPlan:
    return plan_launch(**asked, available=available, environment=environment)


def slurm(name: str, **more: str) -> dict[str, str]:
    found = [env for title, env in RECORDED.items() if title.startswith(name)]
    assert len(found) == 1
    return {**found[0], **more}


def understood(found: LaunchPlan) -> dict[str, object]:
    """Return what torchrun makes of a plan's options."""
    config, _, _ = torchrun.config_from_args(
        torchrun.get_args_parser().parse_args([*found.torchrun, "script.py"])
    )
    return {
        "nodes": (config.min_nodes, config.max_nodes),
        "processes": config.nproc_per_node,
        "backend": config.rdzv_backend,
        "endpoint": config.rdzv_endpoint,
        "id": config.run_id,
        "restarts": config.max_restarts,
        "rank": config.rdzv_configs.get("rank"),
    }


def test_one_machine():
    assert plan({}).command(["train"]) == (
        "torchrun", "--standalone", "--nproc-per-node=8", "-m", "proxydet_cli", "train",
    )  # fmt: skip
    assert (plan({}).world_size, plan({}, gpus=3).world_size) == (8, 3)
    alone = plan({}, available=0)
    assert (alone.world_size, alone.torchrun, alone.started) == (1, (), False)
    assert alone.command(["train", "--device", "cpu"]) == ("proxydet", "train", "--device", "cpu")


def test_several_machines_need_an_address():
    with pytest.raises(ConfigError, match="2 nodes") as caught:
        plan({}, nodes=2)
    assert "--rendezvous HOST:PORT" in str(caught.value.hint)
    found = plan({}, nodes=2, rendezvous="host1")
    assert understood(found) == {
        "nodes": (2, 2), "processes": 8, "backend": "c10d", "endpoint": "host1:29400",
        "id": "proxydet", "restarts": 3, "rank": None,
    }  # fmt: skip
    again = understood(plan({}, nodes=2, rendezvous="host1:1234", max_restarts=0))
    assert (again["endpoint"], again["restarts"]) == ("host1:1234", 0)


# ---- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "sbatch -N1 -n8: the batch",  # SLURM_PROCID=0, SLURM_NTASKS=8, and nobody to wait for
        "sbatch -N1 -n8, srun -n1",
        "salloc -N2, srun -N1 -n1",
        "srun -N1 -n4, sbatch -N1 -n2",  # the SLURM_STEP_ variables are those of another job
        "sbatch -N1 -n1 --requeue",
    ],
)
def test_one_node_of_slurm_is_one_machine(name):
    found = plan(slurm(name))
    assert (found.nodes, found.world_size, found.started) == (1, 8, False)
    assert "--standalone" in found.torchrun
    os.environ.update(slurm(name))
    with connect("cpu") as info:
        assert info.world_size == 1


@pytest.mark.parametrize(
    "name",
    [
        "sbatch -N2 --ntasks-per-node=1: the batch",
        "salloc -N2: the shell",
        "salloc -N2 --ntasks-per-node=4, LaunchParameters=use_interactive_step",
    ],
)
def test_a_script_on_the_first_of_two_nodes_is_told_to_use_srun(name):
    with pytest.raises(ConfigError, match="2 nodes") as caught:
        plan(slurm(name))
    assert "srun --ntasks=2 --ntasks-per-node=1 proxydet train" in str(caught.value.hint)
    assert plan(slurm(name), nodes=1).world_size == 8
    assert plan(slurm(name), whole_job=False).world_size == 8
    by_hand = understood(plan(slurm(name), nodes=2, rendezvous="a:1"))
    assert (by_hand["nodes"], by_hand["endpoint"]) == ((2, 2), "a:1")


def test_one_task_a_node_starts_the_processes_of_its_node():
    first, second = (plan(slurm(f"sbatch -N2 --ntasks-per-node=1, srun: task {n}")) for n in (0, 1))
    assert (first.nodes, first.processes, first.world_size) == (2, 8, 16)
    assert set(first.torchrun) - set(second.torchrun) == {"--rdzv-conf=is_host=1"}
    assert set(second.torchrun) - set(first.torchrun) == {"--rdzv-conf=is_host=0"}
    assert understood(first) == {
        "nodes": (2, 2), "processes": 8, "backend": "c10d", "endpoint": "node-1:20124",
        "id": "proxydet", "restarts": 3, "rank": None,
    }  # fmt: skip
    assert plan(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0"), nodes=2) == first
    with pytest.raises(ConfigError, match=r"--nodes is 3, but there are 2"):
        plan(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0"), nodes=3)


@pytest.mark.parametrize(
    ("name", "world", "nodes", "rank", "local_rank", "port"),
    [
        ("sbatch -N1 --ntasks-per-node=8, srun: task 5", 8, 1, 5, 5, "20155"),
        ("sbatch -N2 --ntasks-per-node=4, srun: task 6", 8, 2, 6, 2, "20434"),
        ("sbatch -N2 -n5, srun: task 4", 5, 2, 4, 1, "20496"),
    ],
)
def test_one_task_a_gpu_takes_part_as_it_is(
    name, world, nodes, rank, local_rank, port, monkeypatch
):
    found = plan(slurm(name), available=1)
    assert (found.started, found.world_size, found.nodes) == (True, world, nodes)
    line = found.command(["train"])
    if world % nodes:  # torchrun starts as many on each node
        assert line == ("proxydet", "train")
    else:
        assert line[0] == "torchrun"
        assert understood(found)["processes"] * understood(found)["nodes"][0] == world
        assert line[-3:] == ("-m", "proxydet_cli", "train")
    os.environ.update(slurm(name))
    assert launched_rank() == rank
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with connect("cpu") as info:
        assert (info.rank, info.world_size, info.local_rank) == (rank, world, local_rank)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    expected = [str(rank), str(world), str(local_rank), "node-1", port]
    assert [os.environ[name] for name in names] == expected


def test_what_srun_has_decided_cannot_be_asked_for():
    environment = slurm("sbatch -N2 --ntasks-per-node=4, srun: task 6")
    assert plan(environment, gpus=4, nodes=2) == plan(environment, gpus=1) == plan(environment)
    with pytest.raises(ConfigError, match="--gpus and --nodes") as caught:
        plan(environment, gpus=8, nodes=1)
    assert "--ntasks-per-node=1" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="--rendezvous"):
        plan(environment, rendezvous="a:1")


def test_gpus_that_stay_idle_are_told_once(caplog):
    environment = slurm("sbatch -N2 --ntasks-per-node=4, srun: task 6")
    for rank in ("0", "6"):
        plan({**environment, "SLURM_PROCID": rank}, available=8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "4 of 8 GPUs" in caplog.text


def test_the_address_can_be_chosen():
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    agents = plan(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0", **chosen))
    assert understood(agents)["endpoint"] == "10.0.0.7:1234"
    assert not any("is_host" in option for option in agents.torchrun)
    task = StartedProcess.of(slurm("sbatch -N2 -n5, srun: task 4", **chosen))
    assert task is not None
    assert (task.address, task.port) == ("10.0.0.7", "1234")


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu[08-10,12],login-1", "gpu08"),
        ("login-1,gpu[08-10]", "login-1"),
        ("r[1-2]n[3,4]", "r1n3"),
        ("a-b", "a-b"),
    ],
)
def test_the_first_of_a_node_list(names, first):
    task = StartedProcess.of(slurm("sbatch -N2 -n5, srun: task 4", SLURM_STEP_NODELIST=names))
    assert task is not None
    assert task.address == first


def test_a_shell_of_srun_is_one_machine(monkeypatch):
    """``srun -n8 --pty bash``: seven of the eight shells have ended, and would be waited for."""
    environment = slurm("srun -N1 -n8 --pty")
    monkeypatch.setattr(os, "isatty", lambda number: True)
    assert not plan(environment).started
    assert plan(environment).world_size == 8
    itself = {**environment, "SLURM_TASK_PID": str(os.getpid())}
    assert plan(itself).started, "srun -n8 --pty proxydet train"
    monkeypatch.setattr(os, "isatty", lambda number: False)
    assert plan(environment).started, "srun -n8 proxydet train, within such a shell"


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch):
    os.environ.update(slurm("sbatch -N1 --ntasks-per-node=8, srun: task 5"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    os.environ["SLURM_GPUS_ON_NODE"] = "8"
    with connect("auto") as info:
        assert (info.device, info.rank, info.world_size) == (torch.device("cuda", 0), 5, 8)
    os.environ["SLURM_GPUS_ON_NODE"] = "gpu:8"
    with pytest.raises(ConfigError, match="SLURM_GPUS_ON_NODE"), connect("auto"):
        pass
    os.environ["SLURM_GPUS_ON_NODE"] = "1"
    with pytest.raises(ProxydetError, match="number 5"), connect("auto"):
        pass


def test_requeue_once_a_job(tmp_path, caplog):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\n')
    scontrol.chmod(0o755)
    os.environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert requeue_job(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0"))
    assert not requeue_job(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 1"))
    assert not requeue_job(slurm("sbatch -N1 --ntasks-per-node=8, srun: task 5"))
    assert not requeue_job({})
    assert (tmp_path / "ran").read_text() == "requeue 4\n"
    scontrol.write_text("#!/bin/sh\necho Access/permission denied >&2; exit 1\n")
    assert not requeue_job(slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0"))
    assert "permission denied" in caplog.text


# ---- other clusters --------------------------------------------------------------------------------------------------

KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


def test_kubeflow_states_the_nodes():
    expected = {
        "nodes": (2, 2), "processes": 4, "backend": "static", "id": "none",
        "endpoint": "job-node-0-0.job:29400", "restarts": 3, "rank": 1,
    }  # fmt: skip
    assert understood(plan(KUBEFLOW)) == expected
    # PyTorchJob describes its pod by the variables of a process, too.
    pod = {"RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    found = plan({**KUBEFLOW, **pod})
    assert understood(found) == expected
    assert not found.started
    assert StartedProcess.of({**KUBEFLOW, **pod}) is None
    process = {**KUBEFLOW, **pod, "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert plan({**process, "GROUP_WORLD_SIZE": "2"}, available=4).started
    assert understood(plan({**KUBEFLOW, "PET_NPROC_PER_NODE": "auto"}))["processes"] == 8
    assert understood(plan(KUBEFLOW, gpus=2))["processes"] == 2


def test_kubeflow_states_a_rendezvous():
    elastic = {
        "PET_NNODES": "2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "job-worker-0:23456",
        "PET_RDZV_ID": "job",
        "PET_MAX_RESTARTS": "10",
    }
    os.environ.update(elastic)
    assert understood(plan(elastic)) == {
        "nodes": (2, 2), "processes": 8, "backend": "c10d", "endpoint": "job-worker-0:23456",
        "id": "job", "restarts": 10, "rank": None,
    }  # fmt: skip
    assert plan({**elastic, "PET_NNODES": "2:2"}).nodes == 2
    with pytest.raises(ConfigError, match="PET_NNODES") as caught:
        plan({**elastic, "PET_NNODES": "1:2"})
    assert "the same" in str(caught.value.hint)


@pytest.mark.parametrize("lacking", ["PET_NODE_RANK", "PET_MASTER_ADDR"])
def test_nodes_without_an_address_or_a_number_do_not_wait(lacking):
    environment = {name: value for name, value in KUBEFLOW.items() if name != lacking}
    with pytest.raises(ConfigError, match=lacking) as caught:
        plan(environment)
    assert "--rendezvous" in str(caught.value.hint)
    assert understood(plan(environment, rendezvous="a:1"))["endpoint"] == "a:1"


def test_skypilot_states_the_nodes():
    environment = {
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_RANK": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6\n10.0.0.7\n",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    assert understood(plan(environment)) == {
        "nodes": (3, 3), "processes": 8, "backend": "static", "endpoint": "10.0.0.5:29400",
        "id": "none", "restarts": 3, "rank": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="SKYPILOT_NUM_NODES"):
        plan(environment, nodes=1)
    alone = {**environment, "SKYPILOT_NUM_NODES": "1"}
    assert plan(alone).torchrun == ("--standalone", "--nproc-per-node=8")


def test_a_process_of_torchrun_takes_part_as_it_is():
    environment = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_WORLD_SIZE": "2",
    }
    # Within a SLURM step of one task a node, too.
    for around in ({}, slurm("sbatch -N2 --ntasks-per-node=1, srun: task 1")):
        assert understood(plan({**around, **environment, "MASTER_ADDR": "a", "MASTER_PORT": "7"})) == {
            "nodes": (2, 2), "processes": 8, "backend": "c10d", "endpoint": "a:7",
            "id": "proxydet", "restarts": 0, "rank": None,
        }  # fmt: skip
    with pytest.raises(ConfigError, match="--rendezvous"):
        plan({**environment, "MASTER_ADDR": "a", "MASTER_PORT": "7"}, rendezvous="a:1")


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("RANK", {"RANK": "gold", "WORLD_SIZE": "2"}),
        ("RANK", {"RANK": "2", "WORLD_SIZE": "2"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "0"}),
        ("MASTER_PORT", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}),
        ("MASTER_ADDR", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "7"}),
        (
            "MASTER_PORT",
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999999"},
        ),
        ("WORLD_SIZE", {"RANK": "0"}),
        ("RANK", {"WORLD_SIZE": "2"}),
        ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "2"}),
        (
            "SKYPILOT_NODE_IPS",
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "a"},
        ),
        ("GROUP_WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "0"}),
        ("PET_NPROC_PER_NODE", {**KUBEFLOW, "PET_NPROC_PER_NODE": "banana"}),
        ("PET_NPROC_PER_NODE", {**KUBEFLOW, "PET_NPROC_PER_NODE": "0"}),
        ("PET_NODE_RANK", {**KUBEFLOW, "PET_NODE_RANK": "2"}),
        ("PET_NODE_RANK", {**KUBEFLOW, "PET_NODE_RANK": "-1"}),
        ("PET_MASTER_PORT", {**KUBEFLOW, "PET_MASTER_PORT": "65536"}),
        ("PET_RDZV_ENDPOINT", {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:0"}),
        ("SKYPILOT_NUM_NODES", {"SKYPILOT_NUM_NODES": "0"}),
        (
            "SKYPILOT_NODE_RANK",
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "3", "SKYPILOT_NODE_IPS": "a\nb"},
        ),
        ("SKYPILOT_NODE_IPS", {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}),
    ],
)
def test_variables_that_cannot_be_right_are_named(name, environment):
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as caught:
        plan(environment)
    assert caught.value.hint


def test_ports_that_do_not_exist_are_refused():
    for address in ("a:70000", "127.0.0.1::", "127.0.0.1:", ":7", "a b:7"):
        with pytest.raises(ConfigError, match="--rendezvous"):
            plan({}, nodes=2, rendezvous=address)
    assert understood(plan({}, nodes=2, rendezvous="::1"))["endpoint"] == "[::1]:29400"
    environment = slurm("sbatch -N2 --ntasks-per-node=1, srun: task 0", MASTER_PORT="0")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        plan(environment)


def test_variables_that_srun_did_not_renew_are_named():
    """``srun --preserve-env`` passes the job's number of tasks on, in place of the step's."""
    kept = {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NPROCS": "1"}
    for task in (0, 1):
        with pytest.raises(ConfigError) as caught:
            plan(slurm(f"sbatch -N2 --ntasks-per-node=1, srun: task {task}", **kept))
        assert "--preserve-env" in str(caught.value.hint)
    # The variables that differ, not those that are the same.
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE is 2 and") as caught:
        plan(slurm("sbatch -N2 --ntasks-per-node=4, srun: task 6", SLURM_TASKS_PER_NODE="2"))
    assert "NTASKS" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"), [("timed out\nframe #0", "timed out"), ("", "DistNetworkError")]
)
def test_processes_that_do_not_find_each_other_say_where(monkeypatch, text, said):
    def refuse(*_: object, **__: object) -> None:
        raise torch.distributed.DistNetworkError(text)

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    os.environ.update(slurm("sbatch -N2 -n5, srun: task 4"))
    with pytest.raises(TrainingError, match=rf"node-1:20496: {said}$") as caught, connect("cpu"):
        pass
    assert "MASTER_PORT" in str(caught.value.hint)


# ---- a process group that exists -------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Callable[[str], None]]:
    """Make this process number 1 of 4 by a backend that exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(backend: str) -> None:
        torch.distributed.init_process_group(backend, store=FakeStore(), rank=1, world_size=4)

    yield make
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_group_that_exists_is_joined_and_left_as_it_is(group):
    group("fake")
    os.environ.update(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1")
    assert launched_rank() == 1
    for _ in range(2):
        with connect("cpu") as info:
            assert (info.rank, info.world_size, info.device.type) == (1, 4, "cpu")
        assert torch.distributed.is_initialized()


@pytest.mark.parametrize("error", [None, KeyError()])
def test_in_a_group_that_exists_the_group_of_the_waits_is_left(group, monkeypatch, error):
    group("fake")
    make, leave = torch.distributed.new_group, torch.distributed.destroy_process_group
    made, left = [], []
    monkeypatch.setattr(
        torch.distributed, "new_group", lambda **how: made.append(make(**how)) or made[-1]
    )
    monkeypatch.setattr(
        torch.distributed,
        "destroy_process_group",
        lambda *which: left.extend(which) or leave(*which),
    )

    def work() -> None:
        with connect("cpu"):
            assert left == []
            if error is not None:
                raise error

    with pytest.raises(KeyError) if error else contextlib.nullcontext():
        work()
    assert len(made) == 1
    assert left == made
    assert torch.distributed.is_initialized()


def test_a_wrong_network_interface_of_the_waits_is_named(group, monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr.")

    group("fake")
    monkeypatch.setattr(torch.distributed, "new_group", refuse)
    with pytest.raises(TrainingError, match="gloo") as caught, connect("cpu"):
        pass
    assert "GLOO_SOCKET_IFNAME" in str(caught.value.hint)


@pytest.mark.parametrize(("current", "expected"), [(0, 1), (3, 3)])
def test_the_device_is_the_one_that_was_chosen(group, monkeypatch, current, expected):
    group("cpu:fake,cuda:fake")
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = "1"
    os.environ["WORLD_SIZE"] = "4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with connect("auto") as info:
        assert info.device == torch.device("cuda", expected)


def test_a_group_without_the_device_is_refused(group, monkeypatch):
    group("cpu:fake")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="cuda") as caught, connect("cuda"):
        pass
    assert "cpu:gloo,cuda:nccl" in str(caught.value.hint)
    with connect("auto") as info:
        assert info.device.type == "cpu"


# ---- failures --------------------------------------------------------------------------------------------------------

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def failing(monkeypatch, tmp_path) -> Callable[..., ProxydetError]:
    """Launch four processes, of which some fail, and return the error that is raised."""

    def run(*errors: tuple[int, BaseException], by: BaseException | None = None) -> ProxydetError:
        def processes(arguments: object) -> None:
            assert "--redirects=1:3,2:3,3:3" in seen
            failures = {}
            for rank, error in errors:
                folder = tmp_path / f"none_x/attempt_0/{rank}"
                folder.mkdir(parents=True)
                variables = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}
                os.environ.update(variables, TORCHELASTIC_ERROR_FILE=str(folder / "error.json"))
                code = -signal.SIGKILL
                if error is not KILLED:
                    with pytest.raises(SystemExit) as caught, worker(tmp_path):
                        raise error
                    code = caught.value.code
                failures[rank] = ProcessFailure(rank, 1, code, str(folder / "error.json"))
            raise by or ChildFailedError("proxydet", failures)

        seen: list[str] = []
        parse = torchrun.get_args_parser().parse_args
        parser = type(
            "Parser", (), {"parse_args": lambda _, words: seen.extend(words) or parse(words)}
        )
        monkeypatch.setattr(torchrun, "get_args_parser", parser)
        monkeypatch.setattr(torchrun, "run", processes)
        with pytest.raises(ProxydetError) as caught:
            launch(plan({}, gpus=4), ["script.py"], tmp_path)
        return caught.value

    return run


KILLED = BaseException("killed")


def test_the_cause_comes_before_its_echoes(failing, tmp_path):
    error = failing((0, LOST), (2, DataError("no image", hint="look")), (1, NumericsError("nan")))
    assert type(error) is DataError
    assert error.message == "Process 2 of 4: no image"
    assert error.hint == f"look Its log: {tmp_path / 'rank_2.log'}"
    assert "no image" in (tmp_path / "rank_2.log").read_text()


def test_a_bug_comes_before_its_echoes_and_its_traceback_is_logged(failing, tmp_path):
    error = failing((0, LOST), (3, KeyError("boxes")))
    assert type(error) is TrainingError
    assert "Process 3 of 4: KeyError: 'boxes'" in error.message
    assert "Traceback" in (tmp_path / "rank_3.log").read_text()


def test_an_error_of_all_processes_names_the_one_where_it_arose(failing, tmp_path):
    message = "At iteration 5, loss_box is nan in process 2 on images 7."
    error = failing(*((rank, NumericsError(message, hint="look", rank=2)) for rank in (0, 2, 1)))
    assert type(error) is NumericsError
    assert error.message == message
    assert error.hint == f"look Its log: {tmp_path / 'rank_2.log'}"


def test_a_damaged_report_of_a_process_is_passed_over(failing, tmp_path):
    other = {"kind": "NewerError", "weight": 0, "message": "newer", "hint": None, "signal": 0}
    record = {**other, "process": 8, "log": "rank_8.log", "time": 1e10}
    reports = (b"\0" * 64, b'{"proxydet": 1}', json.dumps({"proxydet": record}).encode())
    for rank, content in enumerate(reports, start=6):
        path = tmp_path / f"none_x/attempt_0/{rank}/error.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert "there" in failing((1, DataError("there"))).message
    (tmp_path / "none_x/attempt_0/1/error.json").write_bytes(b"")
    error = failing((2, LOST))
    assert type(error) is TrainingError
    assert "newer" in error.message


def test_options_of_the_program_are_not_taken_for_torchruns(monkeypatch, tmp_path):
    started: list[argparse.Namespace] = []
    monkeypatch.setattr(torchrun, "run", started.append)
    words = ["eval", "--run", "runs/a", "--data", "pets.toml"]
    launch(plan({}, gpus=2), ["-m", "proxydet_cli", *words], tmp_path)
    (arguments,) = started
    assert (arguments.training_script, arguments.training_script_args) == ("proxydet_cli", words)


def test_a_killed_process_is_named_before_what_that_caused(failing):
    error = failing((0, LOST), (1, KILLED), (2, KeyError("boxes")))
    assert type(error) is TrainingError
    assert "Process 1 of 4 was killed by SIGKILL" in error.message


def test_a_stop_keeps_its_signal_and_what_the_processes_wrote(failing):
    stopped = JobInterruptedError("stopped after 5", signal_number=15, hint="again")
    error = failing((0, stopped), (1, stopped), by=SignalException("", signal.SIGTERM))
    assert isinstance(error, JobInterruptedError)
    assert (error.message, error.hint, error.exit_code) == ("stopped after 5", "again", 143)
    at_once = failing(by=SignalException("", signal.SIGINT))
    assert isinstance(at_once, JobInterruptedError)
    assert at_once.exit_code == 130


def test_nodes_that_do_not_meet_are_named(failing):
    error = failing(by=torch.distributed.DistNetworkError("timed out\nframe #0"))
    assert type(error) is TrainingError
    assert "timed out" in error.message
    assert "frame" not in error.message


def test_without_our_launcher_a_process_reports_for_itself(tmp_path):
    os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    with pytest.raises(DataError), worker(tmp_path):
        raise DataError("no image")
    with (
        pytest.raises(TrainingError, match="Process 1 of 2 lost the others") as lost,
        worker(tmp_path),
    ):
        raise LOST
    assert str(tmp_path / "rank_1.log") in str(lost.value.hint)
    # The first process reports the stop for all.
    with pytest.raises(SystemExit) as stopped, worker(tmp_path):
        raise JobInterruptedError("stopped", signal_number=15)
    assert stopped.value.code == 143
    os.environ["RANK"] = "0"
    with pytest.raises(JobInterruptedError), worker(tmp_path):
        raise JobInterruptedError("stopped", signal_number=15)


def test_who_may_not_write_in_the_folder_opens_no_log_there(tmp_path):
    @contextlib.contextmanager
    def refused() -> Iterator[None]:
        raise LockedError("in use")
        yield

    with pytest.raises(LockedError), worker(tmp_path / "run/logs", refused()):
        pytest.fail("it began")
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_process_is_its_own_and_its_level_is_put_back(tmp_path):
    package, logger = logging.getLogger("proxydet"), logging.getLogger("proxydet.training")
    package.setLevel(logging.ERROR)
    with worker(tmp_path / "logs"):
        # A process may be killed before it has anything to say; the error of its launcher names the log.
        assert str(os.getpid()) in (tmp_path / "logs/rank_0.log").read_text()
        logger.info("hello")
    logger.info("after")
    assert package.level == logging.ERROR
    text = (tmp_path / "logs/rank_0.log").read_text()
    assert "hello" in text
    assert "after" not in text


@pytest.mark.skipif(
    sys.platform != "linux", reason="a process can only be tied to its parent on Linux"
)
def test_a_process_whose_launcher_is_gone_does_not_begin(tmp_path, monkeypatch):
    import ctypes

    tied: list[tuple[int, int]] = []
    library = type("Library", (), {"prctl": lambda self, *words: tied.append(words)})
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library())
    os.environ.update(TORCHELASTIC_RUN_ID="x", PROXYDET_LAUNCHER=str(os.getpid()))
    with pytest.raises(TrainingError, match="parent process"), worker(tmp_path):
        pytest.fail("it began")
    assert tied == [(1, signal.SIGKILL)]
    os.environ["PROXYDET_LAUNCHER"] = str(os.getppid())
    with worker(tmp_path):
        pass


def test_a_number_of_restarts_that_is_none_is_named():
    with pytest.raises(ConfigError, match="PET_MAX_RESTARTS"):
        plan({**KUBEFLOW, "PET_MAX_RESTARTS": "banana"})
    assert not [o for o in plan({**KUBEFLOW, "PET_MAX_RESTARTS": "5"}).torchrun if "restarts" in o]
