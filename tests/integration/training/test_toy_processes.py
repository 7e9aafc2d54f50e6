"""Whole processes of the toy training: launching, agreement, failures, signals, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainings import TOY, final, finish, records, same, start, wait_for

pytestmark = pytest.mark.slow


def run(folder: Path, *words: str) -> tuple[int, str]:
    return finish(start(TOY, folder, *words))


@pytest.mark.parametrize("unused", ["skip", "zero"])
def test_two_processes_compute_what_one_does(tmp_path, unused):
    """In most steps one rank has a box batch and the other an image-label batch; nothing hangs."""
    optimizer = {"unused_gradients": unused, "learning_rate": 0.01}
    two = json.dumps({"optimizer": optimizer, "log": {"period": 1}})
    one = json.dumps({"optimizer": optimizer, "log": {"period": 1}, "accumulation": 2})
    code, errors = run(tmp_path / "two", "--launch", "2", "--plain", "--set", two)
    assert code == 0, errors
    code, errors = run(tmp_path / "one", "--plain", "--pairs", "--set", one)
    assert code == 0, errors
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert left["losses"] == pytest.approx(right["losses"], rel=1e-4)
    for name, weight in final(tmp_path / "one").items():
        torch.testing.assert_close(final(tmp_path / "two")[name], weight, rtol=1e-4, atol=1e-6)


def test_processes_evaluate_the_same_statistics_and_end_when_all_is_written(tmp_path):
    changes = {"ema": {"decay": 0.9}, "evaluation": {"period": 5, "at_start": True}}
    code, errors = run(tmp_path, "--launch", "2", "--norm", "--set", json.dumps(changes))
    assert code == 0, errors
    main, other = (json.loads((tmp_path / f"seen_{rank}.json").read_text()) for rank in (0, 1))
    assert main == other
    assert list(main) == ["0", "5", "10", "12", "written"]
    assert len(set(main.values())) == 5
    assert main["written"]


@pytest.mark.parametrize("words", [[], ["--group"]])
def test_processes_of_plain_torchrun_train_as_ours_do(tmp_path, words):
    """Alone, and in a process group that exists already, as in Ray Train and Accelerate."""
    code, errors = run(tmp_path / "ours", "--launch", "2")
    assert code == 0, errors
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, str(TOY), str(tmp_path / "theirs"), *words],
        check=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert same(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [
        ("data", 3, "DataError: Process 1 of 2: The image 12.jpg cannot be read."),
        (
            "nan",
            5,
            "NumericsError: At iteration 5, loss_class is nan in process 1 on images 510, 511, 512, 513",
        ),
        ("bug", 6, "TrainingError: Process 1 of 2: KeyError: 'boxes'"),
        ("kill", 6, "Process 1 of 2 was killed by SIGKILL"),
    ],
)
def test_the_first_error_is_what_the_user_reads(tmp_path, how, code, expected):
    found, errors = run(tmp_path, "--launch", "2", "--fail", f"1:5:{how}")
    assert found == code, errors
    assert expected in errors
    assert "rank_1.log" in errors
    assert "rank_0.log" not in errors
    assert "Traceback" not in errors
    assert (tmp_path / "checkpoints/step_0000004.pth").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_step_and_started_again_is_the_same_run(tmp_path, processes, number):
    average = json.dumps({"ema": {"decay": 0.9}})
    words = ("--launch", str(processes), "--workers", "1", "--set", average)
    code, errors = run(tmp_path / "whole", *words)
    assert code == 0, errors
    process = start(TOY, tmp_path / "cut", *words, "--pause", "0.1")
    wait_for(lambda: (tmp_path / "cut/checkpoints/step_0000004.pth").exists(), process)
    process.send_signal(number)
    code, _ = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 143)
    assert not (tmp_path / "cut/result.json").exists()
    code, errors = run(tmp_path / "cut", *words)
    assert code == 0, errors
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert [r["losses"] for r in records(tmp_path / "whole")] == [
        r["losses"] for r in records(tmp_path / "cut")
    ]


def test_two_machines_train_together_and_outlive_one_of_them(tmp_path):
    with_port = ("--nodes", "2", "--endpoint", "localhost:29571", "--pause", "0.2")
    words = (*with_port, "--set", json.dumps({"iterations": 30}))
    first = start(TOY, tmp_path, *words)
    time.sleep(6)  # the first to come owns the meeting place
    second = start(TOY, tmp_path, *words)
    wait_for((tmp_path / "checkpoints/step_0000008.pth").exists, first)
    children = subprocess.run(
        ["pgrep", "-P", str(second.pid)], capture_output=True, text=True, check=True
    )
    for pid in (second.pid, *map(int, children.stdout.split())):
        os.kill(pid, signal.SIGKILL)
    finish(second)
    third = start(TOY, tmp_path, *words)
    code, errors = finish(first)
    assert code == 0, errors
    code, errors = finish(third)
    assert code == 0, errors
    assert records(tmp_path)[-1]["iteration"] == 30
    assert "Resuming after iteration" in (tmp_path / "logs/rank_0.log").read_text()


def test_two_machines_that_share_a_network_and_a_folder_train_as_two_processes_of_one_do(
    two_nodes, tmp_path
):
    words = [sys.executable, str(TOY), str(tmp_path / "apart")]
    words += ["--nodes", "2", "--endpoint", "node-1:29400"]
    for node in [two_nodes.start(name, words) for name in two_nodes.names]:
        output, _ = node.communicate(timeout=600)
        assert node.returncode == 0, output
    code, errors = run(tmp_path / "alone", "--launch", "2")
    assert code == 0, errors
    assert same(tmp_path / "apart", tmp_path / "alone")
