"""A step of two processes with half the batch each, and of one process with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxydet.data.synthetic.config import SyntheticConfig
from proxydet.data.synthetic.dataset import make_dataset

pytestmark = pytest.mark.slow

# No process draws anything, all classes count, and all images have as many regions: every loss that is an average over
# regions, cells or images is then the same however the images are spread.
SETTLED = [
    "data.ranks_share_group=true",
    "data.boxes.size=96",
    "data.image_labels.size=48",
    "data.workers=0",
    "model.proposals.keep_train=40",
    "model.cascade.samples_per_image=100",
    "model.cascade.positive_fraction=1.0",
    "losses.classification.sampled_categories=0",
    "losses.mixup.beta=0",
    "training.scaling=none",
    "training.schedule.warmup_iterations=0",
    "training.optimizer.learning_rate=1e-9",
    "training.log.period=1",
    "training.log.tensorboard=false",
    "training.evaluation.at_end=false",
    "training.threads=1",
]
# The mask loss is a mean over the regions that stand for an object, and the mixup loss one over the classes of the
# batch; each process has others.
PER_PROCESS = {"loss_mask", "cmm_loss_stage2", "total"}
TOLERANCE = 1e-4


def train(folder: Path, processes: int, batch: int, steps: int, sets: list[str]) -> list[dict]:
    words = ["--recipe", "quickstart", "--device", "cpu", "--gpus", str(processes)]
    more = [
        f"data.boxes.batch_size={batch}",
        f"data.image_labels.batch_size={batch}",
        f"training.iterations={steps}",
    ]
    words += [word for item in [*SETTLED, *sets, *more] for word in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "proxydet_cli", "train", *words, "--output", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"] for line in lines]


def test_two_processes_see_what_one_with_twice_the_batch_sees(tmp_path: Path) -> None:
    config = SyntheticConfig(
        images_train=24,
        images_val=2,
        image_label_images_per_class=2,
        size=96,
        image_label_size=48,
        objects_least=3,
        objects_most=3,
    )
    path = make_dataset(tmp_path / "data", config)
    sets = [f"data.description={path}", f"data.cache={tmp_path / 'cache'}"]
    two = train(tmp_path / "two", 2, 2, 6, sets)
    one = train(tmp_path / "one", 1, 4, 6, sets)
    assert {bool(losses["loss_mask"]) for losses in one} == {True, False}
    for mine, theirs in zip(one, two, strict=True):
        same = {name: value for name, value in mine.items() if name not in PER_PROCESS}
        assert {name: theirs[name] for name in same} == pytest.approx(same, rel=TOLERANCE, abs=1e-7)
        for name in PER_PROCESS:
            assert theirs[name] == pytest.approx(mine[name], rel=0.1)
