"""A training in seconds: a small network with two kinds of batches. Run as a script for tests of whole processes."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from proxydet.config import merge
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import connect
from proxydet.training.fit import FitJob, TrainResult, fit
from proxydet.training.runfolder import RunFolder


@dataclass(frozen=True)
class ToyBatch:
    images: torch.Tensor
    image_ids: tuple[int, ...]
    boxes: bool

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ToyBatch:
        return replace(self, images=self.images.to(device))


class ToyNetwork(nn.Module):
    """A backbone, a head that only box batches reach, and one that both reach."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout))
        self.box_head = nn.Linear(16, 4)
        self.class_head = nn.Linear(16, 3)

    def forward_train(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        features = self.backbone(batch.images)
        found = {"classes": self.class_head(features)}
        if batch.boxes:
            found["boxes"] = self.box_head(features)
        return found


def toy_losses(
    found: dict[str, torch.Tensor], *, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    weight = torch.rand((), generator=generator, device=generator.device)
    boxes = found.get("boxes")
    return {
        "loss_class": weight * (found["classes"] - 1).square().mean(),
        "loss_box": boxes.abs().mean() if boxes is not None else found["classes"].new_zeros(()),
    }


def plain_losses(
    found: dict[str, torch.Tensor], *, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The losses without their random weight."""
    return toy_losses(found, generator=generator.manual_seed(1))


class ToyData(torch.utils.data.IterableDataset):
    """Endless batches; batch i depends on (i, rank) alone, whatever the number of worker processes."""

    def __init__(self, start: int, rank: int = 0, pause: float = 0.0, size: int = 4) -> None:
        self.start, self.rank, self.pause, self.size = start, rank, pause, size

    def __iter__(self) -> Iterator[ToyBatch]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        number = self.start + first
        while True:
            time.sleep(self.pause)
            yield toy_batch(number, self.rank, self.size)
            number += step


def toy_batch(number: int, rank: int = 0, size: int = 4) -> ToyBatch:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    images = torch.randn(size, 6, generator=generator)
    ids = tuple(100 * number + 10 * rank + i for i in range(size))
    return ToyBatch(images, ids, boxes=(number + rank) % 3 != 1)


def toy_loader(start: int, rank: int = 0, workers: int = 0, pause: float = 0.0) -> Iterator:
    return torch.utils.data.DataLoader(
        ToyData(start, rank, pause), batch_size=None, num_workers=workers
    )


BASE = merge(
    TrainingConfig(),
    {
        "iterations": 12,
        "device": "cpu",
        "replicas": 1,
        "schedule": {"warmup_iterations": 3},
        "optimizer": {"learning_rate": 0.01},
        "precision": {"dtype": "fp32"},
        "checkpoints": {"period": 4},
        "log": {"period": 2, "tensorboard": False},
        "guards": {"loader_timeout": 60.0},
    },
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--set", type=json.loads, default={})
    options = parser.parse_args()
    result = run(options.folder, options.set, workers=options.workers, pause=options.pause)
    if int(os.environ.get("RANK", "0")) == 0:
        (options.folder / "result.json").write_text(json.dumps(result.losses))


def run(
    folder: Path,
    changes: dict,
    workers: int = 0,
    pause: float = 0.0,
    plain: bool = False,
    **job: object,
) -> TrainResult:
    folder.mkdir(parents=True, exist_ok=True)
    config = merge(BASE, changes)
    torch.set_num_threads(1)
    with connect(config.device) as ranks:
        settings = {"config": config, "folder": RunFolder(folder), "ranks": ranks, "seed": 7}
        return fit(
            ToyNetwork(dropout=0.0 if plain else 0.3),
            plain_losses if plain else toy_losses,
            lambda start: toy_loader(start, ranks.rank, workers, pause),
            FitJob(**{**settings, **job}),
        )


if __name__ == "__main__":
    main()
