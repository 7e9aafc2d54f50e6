"""Two machines that share nothing but a network and a folder train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOY = Path(__file__).parents[2] / "unit/training/toy_run.py"

pytestmark = pytest.mark.slow


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_two_machines_train_as_two_processes_of_one_do(two_nodes, tmp_path):
    words = [sys.executable, str(TOY), str(tmp_path / "apart")]
    words += ["--nodes", "2", "--endpoint", "node-1:29400"]
    for node in [two_nodes.start(name, words) for name in two_nodes.names]:
        output, _ = node.communicate(timeout=600)
        assert node.returncode == 0, output
    alone = [sys.executable, str(TOY), str(tmp_path / "alone"), "--launch", "2"]
    subprocess.run(alone, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    apart, together = weights(tmp_path / "apart"), weights(tmp_path / "alone")
    assert all(torch.equal(apart[name], together[name]) for name in together)
