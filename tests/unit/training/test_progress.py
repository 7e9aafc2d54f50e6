"""Progress is counted in images: the schedule continues whatever a step, or a batch, holds."""

from __future__ import annotations

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

from proxydet.files import JsonLines
from proxydet.training.checkpoint import load_checkpoint
from proxydet.training.logs import read_steps
from proxydet.training.step import learning_rate_factor
from proxydet.weight_files import write_state


class Stop(RuntimeError):
    """Stands for a crash."""


def train(
    toy: ModuleType,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    until: int,
    accumulation: int,
    size: int,
) -> None:
    """Train up to an iteration of 8 images, with so many batches of so many images a step."""

    def evaluate(network: torch.nn.Module, at: int, place: Path) -> dict[str, float]:
        if at == until:
            raise Stop
        return {}

    def loader(start: int, rank: int, workers: int, pause: float) -> torch.utils.data.DataLoader:
        data = toy.ToyData(start, rank, pause, size)
        return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)

    patch.setattr(toy, "toy_loader", loader)
    changes = {
        "replicas": 2,
        "accumulation": 2,
        "scaling": "linear",
        "log": {"period": 1},
        "checkpoints": {"period": 1},
        "evaluation": {"period": 1, "at_end": False},
    }
    step = Fraction(accumulation * size, 8)
    with suppress(Stop):
        toy.run(folder, changes, accumulation=accumulation, step=step, evaluate=evaluate)


def test_the_schedule_follows_the_images(toy, tmp_path, monkeypatch):
    expected: list[tuple[int, int, float]] = []
    at, config = Fraction(0), toy.BASE
    for until, accumulation, size in ((3, 2, 4), (5, 1, 4), (6, 1, 2), (10, 4, 4), (12, 3, 4)):
        train(toy, tmp_path, monkeypatch, until=until, accumulation=accumulation, size=size)
        step = Fraction(accumulation * size, 8)
        while at < until:
            factor = learning_rate_factor(float(at), config.iterations, config.schedule)
            before, at = at, at + step
            if (iteration := min(int(at), 12)) > int(before):
                rate = config.optimizer.learning_rate * factor * float(step)
                expected.append((iteration, int(8 * at), rate))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["iteration"], x["images"], x["learning_rate"]) for x in lines] == expected
    state = load_checkpoint(tmp_path / "checkpoints/step_0000012.pth")
    # 3 iterations of 2 batches, 2 of 2, 1 of 4 small ones, 4 of 2, and 2 of 3, the last of which ends the training.
    assert (state["batches"], state["images"]) == (28, 104)


def test_other_batches_are_recorded_once_each(toy, tmp_path):
    two, one = ({"processes": n, "step": f"{n}/2"} for n in (2, 1))

    def train(until: int, now: dict) -> None:
        def evaluate(network: torch.nn.Module, at: int, place: Path) -> dict[str, float]:
            if at == until:
                raise Stop
            return {}

        changes = {"log": {"period": 2}, "evaluation": {"period": 2}}
        with suppress(Stop):
            toy.run(tmp_path, changes, batches=(two, now), evaluate=evaluate)

    for until, now in ((2, two), (4, two), (6, one), (8, one), (12, two)):
        train(until, now)
    records = JsonLines(tmp_path / "metrics.jsonl")
    found = [(r["iteration"], r["batches"]) for r in records.read() if "batches" in r]
    assert found == [(4, one), (8, two)]
    assert [r["iteration"] for r in read_steps(records)] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    "lacking", [("progress", "step"), ("progress", "step", "batches", "draws")]
)
def test_checkpoints_of_earlier_versions_are_resumed_exactly(toy, tmp_path, lacking):
    """Which counted in batches; version 0.1 in iterations."""
    changes = {"accumulation": 2, "evaluation": {"period": 4}}
    evaluated: list[int] = []

    def evaluate(network: torch.nn.Module, at: int, place: Path) -> dict[str, float]:
        evaluated.append(at)
        return {"AP": 1.0}

    toy.run(tmp_path, changes, evaluate=evaluate)
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    path = tmp_path / "checkpoints/step_0000008.pth"
    state = load_checkpoint(path)
    write_state({key: value for key, value in state.items() if key not in lacking}, path)
    toy.run(tmp_path, changes, resume=path, evaluate=evaluate)
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert evaluated == [4, 8, 12, 12]
