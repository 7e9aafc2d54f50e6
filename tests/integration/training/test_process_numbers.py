"""Losses of two processes with half the batch each: by their definition, and against one process with all of it.

Every process averages the losses of its cascade, masks, mixup and image labels over what its own batch holds; a step then averages
over the processes. The proposal losses are averaged over the cells of all processes at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.loader import BoxBatch, ImageLabelBatch, TrainingLoader, TrainingSources
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.losses.criterion import Criterion
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.roi_heads import BoxTrainingOutput
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.step import TrainingModel, derive_seed, seed_everything

pytestmark = pytest.mark.slow

STEPS = 6
# Weights stay as they are; both processes take the two halves of one batch, whose images all have one size.
STILL = [
    "data.ranks_share_group=true",
    "data.boxes.batch_size=2",
    "data.boxes.size=96",
    "data.boxes.scale=[1.0,1.0]",
    "data.image_labels.batch_size=2",
    "data.image_labels.size=48",
    "data.image_labels.scale=[1.0,1.0]",
    "data.workers=0",
    f"training.iterations={STEPS}",
    "training.scaling=none",
    "training.schedule.warmup_iterations=0",
    "training.optimizer.learning_rate=1e-12",
    "training.log.period=1",
    "training.log.tensorboard=false",
    "training.evaluation.at_end=false",
    "training.threads=1",
]
# With these nothing is drawn in a step: every region and every class counts.
SETTLED = [
    "model.proposals.keep_train=40",
    "model.cascade.samples_per_image=100",
    "model.cascade.positive_fraction=1.0",
    "losses.classification.sampled_categories=0",
]
# Sums in another order.
EXACT = {"rel": 1e-5, "abs": 1e-7}
Losses = dict[str, float]


class Alone:
    """What a training of the same configuration computes, in this process and batch by batch."""

    def __init__(self, config: RunConfig) -> None:
        assert config.data.description is not None
        self.config = config
        description = DatasetConfig.from_toml(config.data.description)
        self.data = Dataset(config=description, cache=config.data.cache)
        counts = self.data.image_counts(with_novel=config.data.count_novel_classes)
        seed_everything(config.seed)
        self.network = ProxyDetNetwork(config.model, self.data.vocabulary, counts).train()
        self._seen: list[Any] = []
        self._criterion = Criterion(config.losses)
        self._model = TrainingModel(self.network, self._watch, device=torch.device("cpu"))

    def halves(self) -> Iterator[list[Any]]:
        """Yield the batches of both processes, step by step."""
        data, seed = self.config.data, self.config.seed
        sources = TrainingSources(data, self.data)
        loaders = [TrainingLoader(sources, rank=rank, world_size=2, seed=seed) for rank in (0, 1)]
        for step in range(STEPS):
            yield [loader.batch(step) for loader in loaders]

    def losses(self, batch: Any, step: int, rank: int) -> tuple[Losses, Regions]:
        """Return a batch's losses with the random numbers of a process, and how many regions they are about."""
        losses = self._model(batch, derive_seed(self.config.seed, 2 * step + rank))
        return {name: value.item() for name, value in losses.items()}, count(self._seen.pop())

    def _watch(self, output: Any, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        self._seen.append(output)
        return self._criterion(output, generator=generator)


@dataclass(frozen=True)
class Regions:
    """Over how many regions the losses of a batch are averaged: those of each cascade step, and the masks."""

    steps: tuple[int, ...]
    masks: int


def count(output: Any) -> Regions:
    if not isinstance(output, BoxTrainingOutput):
        return Regions((), 0)
    steps = tuple(int((step.assignment.labels_BR >= 0).sum()) for step in output.steps)
    return Regions(steps, 0 if output.masks is None else len(output.masks.logits_PSS))


def joined(halves: list[Any]) -> Any:
    """Put the batches of both processes into one."""
    first, second = halves
    if isinstance(first, BoxBatch):
        return BoxBatch(
            images=first.images + second.images,
            instances=first.instances + second.instances,
            image_ids=first.image_ids + second.image_ids,
        )
    return ImageLabelBatch(
        images=first.images + second.images,
        labels=first.labels + second.labels,
        image_ids=first.image_ids + second.image_ids,
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    config = SyntheticConfig(
        images_train=24, images_val=2, image_label_images_per_class=2, size=96, image_label_size=48
    )
    path = make_dataset(folder / "made", config)
    return [*STILL, f"data.description={path}", f"data.cache={folder / 'cache'}"]


def train_two(folder: Path, sets: list[str]) -> list[Losses]:
    words = ["--recipe", "quickstart", "--device", "cpu", "--gpus", "2", "--output", str(folder)]
    words += [word for item in sets for word in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "proxydet_cli", "train", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"] for line in lines]


def test_a_loss_of_two_processes_is_the_mean_of_theirs(tmp_path, sets):
    """With every random choice as published."""
    recorded = train_two(tmp_path / "two", sets)
    alone = Alone(resolve_config("quickstart", overrides=sets))
    kinds = set()
    for step, (halves, losses) in enumerate(zip(alone.halves(), recorded, strict=True)):
        kinds.add(type(halves[0]))
        parts = [alone.losses(half, step, rank)[0] for rank, half in enumerate(halves)]
        expected = {name: fmean(part[name] for part in parts) for name in parts[0]}
        whole, _ = alone.losses(joined(halves), step, 0)
        expected.update({n: v for n, v in whole.items() if n.startswith("loss_centernet")})
        expected["total"] = sum(expected.values())
        assert losses == pytest.approx(expected, **EXACT)
    assert kinds == {BoxBatch, ImageLabelBatch}


def test_losses_of_the_whole_batch_are_weighted_by_regions(sets):
    """What two processes report differs from the whole batch's only by what each half is weighted with."""
    alone = Alone(resolve_config("quickstart", overrides=[*sets, *SETTLED]))
    uneven = 0
    for step, halves in enumerate(alone.halves()):
        whole, _ = alone.losses(joined(halves), step, 0)
        parts = [alone.losses(half, step, 0) for half in halves]
        for name, value in whole.items():
            if name.startswith(("loss_centernet", "cmm_loss")):
                continue
            weights = [weight(name, regions) for _, regions in parts]
            uneven += weights[0] != weights[1]
            summed = sum(w * losses[name] for w, (losses, _) in zip(weights, parts, strict=True))
            assert value == pytest.approx(summed / max(sum(weights), 1), **EXACT), name
    assert uneven


def weight(name: str, regions: Regions) -> int:
    if name == "loss_mask":
        return regions.masks
    if name.startswith(("loss_cls", "loss_box")) and regions.steps:
        return regions.steps[int(name[-1])]
    return 1
