"""A training in seconds: a small network with two kinds of batches. Run as a script for tests of whole processes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from proxydet.config import merge
from proxydet.errors import DataError, ProxydetError
from proxydet.modeling.precision import compute_in
from proxydet.modeling.weights import weights_digest
from proxydet.training.config import TrainingConfig, scale_training
from proxydet.training.distributed import connect
from proxydet.training.launch import launch, plan_launch, worker
from proxydet.training.runfolder import RunFolder
from proxydet.training.train import TrainResult, fit


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

    def __init__(self, dropout: float = 0.3, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout))
        if norm:
            self.backbone.extend([nn.BatchNorm1d(16), nn.BatchNorm1d(16, affine=False)])
        self.box_head = nn.Linear(16, 4)
        self.class_head = nn.Linear(16, 3)
        self.backbone_precision = self.heads_precision = "fp32"

    def forward_train(
        self, batch: ToyBatch, *, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        features = compute_in(self.backbone_precision, self.backbone, batch.images)
        found = {"classes": compute_in(self.heads_precision, self.class_head, features)}
        if batch.boxes:
            found["boxes"] = compute_in(self.heads_precision, self.box_head, features)
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
        "scaling": "none",
        "schedule": {"warmup_iterations": 3},
        "optimizer": {"learning_rate": 0.01},
        "precision": {"backbone": "fp32"},
        "checkpoints": {"period": 4},
        "log": {"period": 2, "tensorboard": False},
    },
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--set", type=json.loads, default={})
    parser.add_argument("--launch", type=int)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--fail", default="", help="rank:iteration:how")
    parser.add_argument("--group", action="store_true", help="in a process group that exists")
    parser.add_argument("--plain", action="store_true", help="no dropout, no random weight")
    parser.add_argument(
        "--norm", action="store_true", help="with BatchNorms; keep what a process sees"
    )
    parser.add_argument("--pairs", action="store_true", help="the batches of two ranks in turn")
    options = parser.parse_args()
    logs = RunFolder(options.folder).logs
    try:
        plan = plan_launch(
            gpus=options.launch,
            nodes=options.nodes,
            rendezvous=None if "RANK" in os.environ else options.endpoint or None,
            available=1,
        )
        if options.group:
            torch.distributed.init_process_group("gloo")
            work(options)
            torch.distributed.barrier()  # it is still there
            torch.distributed.destroy_process_group()
        elif plan.started:
            with worker(logs):
                work(options)
        elif plan.torchrun:
            launch(plan, sys.argv, logs)
        else:
            work(options)
    except ProxydetError as error:
        sys.stderr.write(f"{type(error).__name__}: {error.message} | {error.hint}\n")
        sys.exit(error.exit_code)


def work(options: argparse.Namespace) -> None:
    if options.fail:
        fail_at(*options.fail.split(":"))
    if options.pairs:
        global toy_batch
        single = toy_batch
        toy_batch = lambda number, rank, size: single(number // 2, number % 2, size)  # noqa: E731
    kind = {"workers": options.workers, "pause": options.pause, "plain": options.plain}
    rank, seen = os.environ.get("RANK", "0"), {}
    if options.norm:

        def evaluate(network: nn.Module, at: int, _: Path) -> dict[str, float]:
            seen[at] = weights_digest(network)
            return {"AP": 0.0}

        # The main process takes longer.
        kind |= {"norm": True, "evaluate": evaluate, "still_ours": lambda: time.sleep(0.3)}
    result = run(options.folder, options.set, **kind)
    if options.norm:
        seen["written"] = (options.folder / "model_final.pth").exists()
        (options.folder / f"seen_{rank}.json").write_text(json.dumps(seen))
    if int(rank) == 0:
        (options.folder / "result.json").write_text(json.dumps(result.losses))


def fail_at(rank: str, iteration: str, how: str) -> None:
    """Make the criterion of one process fail in one of its calls."""
    global toy_losses
    good, calls = toy_losses, iter(range(10**6))

    def failing(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        losses = good(found, generator=generator)
        if rank == os.environ.get("RANK", "0") and next(calls) == int(iteration):
            if how == "nan":
                losses["loss_class"] = losses["loss_class"] * float("nan")
            elif how == "data":
                raise DataError("The image 12.jpg cannot be read.", hint="Look at it.")
            elif how == "bug":
                raise KeyError("boxes")
            elif how == "kill":
                os.kill(os.getpid(), 9)
        return losses

    toy_losses = failing


def run(
    folder: Path,
    changes: dict,
    workers: int = 0,
    pause: float = 0.0,
    plain: bool = False,
    norm: bool = False,
    **job: object,
) -> TrainResult:
    folder.mkdir(parents=True, exist_ok=True)
    config = merge(BASE, changes)
    torch.set_num_threads(1)
    with connect(config.device) as ranks:
        if "replicas" not in changes:
            config = scale_training(config, ranks.world_size * config.accumulation)
        settings = {"config": config, "folder": RunFolder(folder), "ranks": ranks, "seed": 7}
        settings["loader_timeout"] = 60.0
        return fit(
            ToyNetwork(dropout=0.0 if plain else 0.3, norm=norm),
            plain_losses if plain else toy_losses,
            lambda _, draws: toy_loader(draws, ranks.rank, workers, pause),
            **{**settings, **job},
        )


if __name__ == "__main__":
    main()
