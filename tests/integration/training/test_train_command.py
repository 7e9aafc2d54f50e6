"""``proxydet train`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "proxydet_cli", "train", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=900,
    )


def sets(overrides: list[str]) -> list[str]:
    return [word for item in overrides for word in ("--set", item)]


def test_two_processes_train_with_boxes_and_image_labels_at_once(base, tmp_path):
    words = ["--recipe", "tiny", "--device", "cpu", "--gpus", "2", "--output", "run"]
    more = ["training.scaling=none", "training.evaluation.at_end=false", "data.workers=1"]
    done = command(*words, *sets([*base, *more]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "next: proxydet eval --run" in done.stdout
    folder = tmp_path / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    mixed = [r for r in records if r["losses"]["loss_mask"] and r["losses"]["image_loss_stage0"]]
    assert mixed, "no step had a box batch on one process and an image batch on the other"
    assert (folder / "model_final.pth").exists()
    assert (folder / "logs/rank_1.log").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["world_size"] == 2


def test_result_in_json_and_a_second_start_has_nothing_to_do(base, tmp_path):
    words = ["--recipe", "tiny", "--output", "run", "--json", *sets(base)]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["iterations"] == 6
    assert Path(result["weights"]).is_file()
    (tmp_path / "log.txt").write_text("iter: 3  total_loss: 9.5  loss_cls_stage0: 1.2\n")
    again = command(*words, "--reference", "log.txt", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["evaluations"] == result["evaluations"]
    assert (tmp_path / "run/plots/reference.png").is_file()


def test_backbone_and_recipe_exclude_each_other(tmp_path):
    done = command("--backbone", "r50", "--recipe", "tiny", "--show-config", cwd=tmp_path)
    assert done.returncode == 2
    assert "either --backbone or --recipe" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "r51"], "Did you mean 'r50'?"),
        (["--set", "training.iteration=1"], "Did you mean training.iterations"),
        (["--recipe", "tiny", "--resume", "absent.pth"], "there is no file absent.pth"),
        (["--recipe", "tiny", "--nodes", "2"], "need an address"),
        (["--recipe", "tiny"], "data.description is not set"),
    ],
)
def test_mistakes_end_with_code_3(words, expected, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 3
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
