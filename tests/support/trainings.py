"""Trainings as processes of their own, and what a training leaves in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

TOY = Path(__file__).parents[1] / "unit/training/toy_run.py"


def start(
    *words: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start Python with a command line; its stderr is kept."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and stderr."""
    with process:
        _, errors = process.communicate(timeout=900)
    return process.returncode, errors


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Return the final weights."""
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def same(first: Path, second: Path) -> bool:
    """Whether two trainings end with the same weights, bit for bit."""
    left, right = final(first), final(second)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def records(folder: Path, name: str = "metrics") -> list[dict]:
    """Return the whole lines of a log; none where there is no log yet."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
