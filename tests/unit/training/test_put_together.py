"""How a training is put together: seeds of its steps, what DDP is told, starting weights, threads."""

from __future__ import annotations

import json
import logging
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from proxydet.errors import NumericsError
from proxydet.recipes import resolve_config
from proxydet.training import step, train
from proxydet.training.checkpoint import TrainingState, load_checkpoint
from proxydet.training.config import OptimizerConfig
from proxydet.training.distributed import DistInfo
from proxydet.training.step import build_optimizer, train_step
from proxydet.weight_files import write_state

CPU = torch.device("cpu")


class SeedsSeen(nn.Module):
    """A model that remembers the seeds it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seeds: list[int] = []

    def forward(self, batch: object, seed: int) -> dict[str, torch.Tensor]:
        self.seeds.append(seed)
        return {"loss": self.weight * 1.0}


def test_each_batch_of_a_run_has_a_seed_of_its_own_whichever_process_computes_it(
    toy, tmp_path, monkeypatch
):
    monkeypatch.setattr(step.dist, "all_reduce", lambda _: None)

    def seeds(seed: int, world_size: int, accumulation: int) -> dict[int, list[int]]:
        found = {}
        for rank in range(world_size):
            model = SeedsSeen()
            state = TrainingState(
                network=model,
                model=model,
                optimizer=build_optimizer(model.parameters(), OptimizerConfig()),
                scaler=torch.amp.GradScaler("cpu", enabled=False),
                seed=seed,
                replicas=4,
            )
            for _ in range(2):
                train_step(
                    state,
                    [toy.toy_batch(part) for part in range(accumulation)],
                    config=toy.BASE,
                    step=Fraction(accumulation * world_size, 4),
                    ranks=DistInfo(rank=rank, world_size=world_size, device=CPU),
                    failures=tmp_path,
                )
            assert state.batches == 8
            assert state.draws == 2 * accumulation
            found[rank] = model.seeds
        return found

    one, four, two = seeds(7, 1, 4)[0], seeds(7, 4, 1), seeds(7, 2, 2)
    assert len(set(one)) == 8
    assert one == [four[rank][turn] for turn in range(2) for rank in range(4)]
    assert one == [two[rank][turn] for turn in range(4) for rank in range(2)]
    assert not set(one) & set(seeds(8, 1, 4)[0])


@pytest.mark.parametrize(("unused", "searched"), [("zero", False), ("skip", True)])
def test_ddp_searches_the_graph_only_where_gradients_may_be_missing(
    toy, tmp_path, monkeypatch, unused, searched
):
    told: list[bool] = []

    def wrap(model: nn.Module, ranks: DistInfo, *, find_unused: bool) -> nn.Module:
        told.append(find_unused)
        raise Stop

    monkeypatch.setattr(train, "wrap_for_ranks", wrap)
    ranks = DistInfo(world_size=2, device=CPU)
    with pytest.raises(Stop):
        toy.run(tmp_path, {"optimizer": {"unused_gradients": unused}}, ranks=ranks)
    assert told == [searched]


def test_every_process_names_the_one_whose_loss_is_not_finite(toy, tmp_path, monkeypatch):
    batch = toy.toy_batch(5, rank=1)

    def gather(into: list[Any], _: object) -> None:
        into[:] = [([1.0], [[7, 8]]), ([math.nan], [list(batch.image_ids)])]

    monkeypatch.setattr(
        step.dist, "all_reduce", lambda v: v.copy_(v.new_tensor([math.nan, 1, 8, 0]))
    )
    monkeypatch.setattr(step.dist, "all_gather_object", gather)
    for rank in (0, 1):
        model = SeedsSeen()
        state = TrainingState(
            network=model,
            model=model,
            optimizer=build_optimizer(model.parameters(), OptimizerConfig()),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            seed=7,
            replicas=1,
        )
        ranks = DistInfo(rank=rank, world_size=2, device=CPU)
        with pytest.raises(NumericsError, match="in process 1 on images 510, 511") as caught:
            train_step(
                state, [batch], config=toy.BASE, step=Fraction(2), ranks=ranks, failures=tmp_path
            )
        assert caught.value.rank == 1


class Stop(RuntimeError):
    """Ends a training before it opens its data."""


def test_training_computes_with_as_many_threads_as_asked_for(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    seen: list[int] = []

    def open_data(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise Stop

    monkeypatch.setattr(train, "DatasetConfig", SimpleNamespace(from_toml=open_data))
    try:
        for asked in (before + 1, before + 2):
            words = ["training.device=cpu", f"training.threads={asked}", "data.description=d.toml"]
            with pytest.raises(Stop):
                train.train(resolve_config("tiny", None, words), output=tmp_path)
            assert seen[-1] == asked
    finally:
        torch.set_num_threads(before)


def test_a_skipped_step_is_left_out_of_the_means(toy, tmp_path, monkeypatch):
    losses, calls = toy.toy_losses, iter(range(9))

    def poisoned(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        values = losses(found, generator=generator)
        factor = math.nan if next(calls) == 1 else 1.0
        return {name: value * 0 + factor for name, value in values.items()}

    monkeypatch.setattr(toy, "toy_losses", poisoned)
    toy.run(tmp_path, {"iterations": 3, "log": {"period": 3}, "guards": {"non_finite": "skip"}})
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["losses"] == {"total": 2.0, "loss_box": 1.0, "loss_class": 1.0}
    assert record["images"] == 12


def test_tensorboard_hides_steps_that_are_taken_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tensorboard"), "disabled", True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {
        "iterations": 4,
        "log": {"period": 1, "tensorboard": True},
        "checkpoints": {"period": 2, "keep_last": 9},
    }
    for start in (0, 2):
        found = tmp_path / "checkpoints" / f"step_{start:07d}.pth"
        toy.run(tmp_path, changes, **({"resume": found} if start else {}))
        # The reader goes by file names, which tell seconds and then count on through a process: 10 before 9.
        folder = tmp_path / "tensorboard"
        (written,) = folder.glob("events.out.tfevents.*.*")
        written.rename(folder / f"events.out.tfevents.{start}")
    events = EventAccumulator(str(folder)).Reload().Scalars("loss/total")
    assert [event.step for event in events] == [1, 2, 3, 4]


def test_speed_after_a_resume_counts_its_own_steps(toy, tmp_path, monkeypatch):
    """A record that began before an interruption holds the losses of all its steps, and the time of those after it."""
    changes = {"iterations": 8, "checkpoints": {"period": 7}, "log": {"period": 8}}
    toy.run(tmp_path, {**changes, "iterations": 7, "log": {"period": 100}})
    found = tmp_path / "checkpoints/step_0000007.pth"
    state = load_checkpoint(found)
    state["window"] = {"steps": 7, "images": 28, "losses": {}, "shares": {}}
    write_state(state, found)
    toy.run(tmp_path, changes, pause=0.3)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["iteration"] == 8
    assert 0.2 < record["step_seconds"] < 30
    assert record["images_per_second"] == pytest.approx(4 / record["step_seconds"], rel=0.05)
