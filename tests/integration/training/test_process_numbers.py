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

# No process draws anything for itself, and all classes count. Losses that are averages over cells or images are then the
# same however the images are spread. Those over regions are averages of averages, and processes differ by a region or two.
SETTLED = [
    "data.ranks_share_group=true",
    "data.boxes.size=96",
    "data.boxes.scale=[1.0,1.0]",
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
TOLERANCES = {
    "loss_centernet": 1e-4,
    "image_loss": 1e-4,
    "loss_cls": 5e-3,
    "loss_box": 5e-3,
    "loss_mask": 0.1,
    "cmm_loss": 0.1,
    "total": 0.05,
}


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
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            (tolerance,) = (t for start, t in TOLERANCES.items() if name.startswith(start))
            assert theirs[name] == pytest.approx(value, rel=tolerance, abs=1e-7), name
