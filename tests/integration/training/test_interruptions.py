"""The quickstart recipe at small scale: stopped in any way at any step, and started again, it is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

STEPS = 16
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(drawn, tmp_path) -> Start:
    """Start ``proxydet train`` with two loader workers."""
    small = [
        "data.boxes.batch_size=2",
        "data.boxes.size=96",
        "data.image_labels.batch_size=2",
        "data.image_labels.size=48",
        "data.workers=2",
        f"training.iterations={STEPS}",
        "training.scaling=none",
        "training.checkpoints.period=3",
        "training.log.period=1",
        "training.log.tensorboard=false",
        "training.evaluation.at_end=false",
    ]
    sets = [word for item in [*drawn, *small] for word in ("--set", item)]

    def run(folder: str, processes: int, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "proxydet_cli", "train", "--recipe", "quickstart"]
        command += ["--device", "cpu", "--gpus", str(processes), "--output", folder, *sets, *more]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        _, errors = process.communicate(timeout=900)
    return process.returncode, errors


def steps_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while len(steps_of(folder)) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same(whole: Path, cut: Path) -> None:
    left, right = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (whole, cut)
    )
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert [r["losses"] for r in steps_of(whole)] == [r["losses"] for r in steps_of(cut)]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_or_stopped_at_a_random_step_it_ends_bit_for_bit_the_same(
    start, tmp_path, processes
):
    code, errors = finish(start("whole", processes))
    assert code == 0, errors
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
        step = random.randrange(1, STEPS - 5)
        process = start(how.name, processes)
        wait_for_step(tmp_path / how.name, step, process)
        # Only the first process is told: those that it started end with it, whatever ends it.
        process.send_signal(how)
        code, errors = finish(process)
        assert code == (-9 if how == signal.SIGKILL else 128 + how), errors
        assert not (tmp_path / how.name / "model_final.pth").exists()
        code, errors = finish(start(how.name, processes))
        assert code == 0, errors
        assert_same(tmp_path / "whole", tmp_path / how.name)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(start, tmp_path):
    code, errors = finish(start("whole", 1))
    assert code == 0, errors
    process = start("cut", 1)
    wait_for_step(tmp_path / "cut", 8, process)
    process.kill()
    finish(process)
    newest = max((tmp_path / "cut/checkpoints").glob("step_*.pth"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    code, errors = finish(start("cut", 1))
    assert code == 0, errors
    assert f"{newest.name} is damaged" in errors.replace("\n", "")
    assert "Falling back to the checkpoint before it" in errors.replace("\n", " ")
    assert_same(tmp_path / "whole", tmp_path / "cut")
