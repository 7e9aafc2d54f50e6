"""How a training is put together: seeds of its steps, what DDP is told, starting weights, threads."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from proxydet.errors import NumericsError
from proxydet.recipes import resolve_config
from proxydet.training import fit, guards, train
from proxydet.training.config import OptimizerConfig
from proxydet.training.distributed import DistInfo
from proxydet.training.fit import FitJob
from proxydet.training.guards import NonFiniteGuard
from proxydet.training.logs import LossWindow, TensorBoard
from proxydet.training.optimizer import build_optimizer
from proxydet.training.runfolder import RunFolder
from proxydet.training.state import TrainingState
from proxydet.training.step import Stepper, StepResult

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


def test_seed_iteration_rank_and_part_all_decide_what_a_step_draws(
    toy: ModuleType, tmp_path: Path
) -> None:
    model = SeedsSeen()
    state = TrainingState(
        network=model,
        model=model,
        optimizer=build_optimizer(model.parameters(), OptimizerConfig()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        seed=1,
    )
    for seed in (7, 8):
        for rank in (0, 1):
            ranks = DistInfo(rank=rank, device=CPU)
            guard = NonFiniteGuard(toy.BASE.guards, ranks, tmp_path)
            stepper = Stepper(state, config=toy.BASE, ranks=ranks, guard=guard, seed=seed)
            for iteration in (0, 1):
                stepper([toy.toy_batch(0), toy.toy_batch(1)], iteration)
    assert len(set(model.seeds)) == len(model.seeds) == 16


@pytest.mark.parametrize(("unused", "searched"), [("zero", False), ("skip", True)])
def test_ddp_searches_the_graph_only_where_gradients_may_be_missing(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused: str, searched: bool
) -> None:
    told: list[bool] = []

    def wrap(model: nn.Module, ranks: DistInfo, *, find_unused: bool) -> nn.Module:
        told.append(find_unused)
        return model

    monkeypatch.setattr(fit, "wrap_for_ranks", wrap)
    optimizer = dataclasses.replace(toy.BASE.optimizer, unused_gradients=unused)
    job = FitJob(
        config=dataclasses.replace(toy.BASE, optimizer=optimizer),
        folder=RunFolder(tmp_path),
        ranks=DistInfo(world_size=2, device=CPU),
        seed=7,
    )
    fit._build_state(toy.ToyNetwork(), toy.toy_losses, job)
    assert told == [searched]


def test_every_process_names_the_one_whose_loss_is_not_finite(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.tensor([math.nan])
    batch = toy.toy_batch(5, rank=1)

    def gather(into: list[Any], _: object) -> None:
        into[:] = [[[7, 8]], [list(batch.image_ids)]]

    monkeypatch.setattr(guards, "gather_over_ranks", lambda *_: [torch.ones(1), bad])
    monkeypatch.setattr(guards.dist, "all_gather_object", gather)
    for rank in (0, 1):
        ranks = DistInfo(rank=rank, world_size=2, device=CPU)
        guard = NonFiniteGuard(toy.BASE.guards, ranks, tmp_path)
        with pytest.raises(NumericsError, match="in process 1 on images 510, 511") as caught:
            guard.refuses({"loss_box": math.nan}, bad, [batch], 5)
        assert caught.value.rank == 1


@pytest.mark.parametrize("anew", [True, False])
def test_starting_weights_are_read_only_where_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """A run that goes on has its own; the file that it began with may be gone."""
    loaded: list[Path] = []
    monkeypatch.setattr(train, "ProxyDetNetwork", lambda *_: nn.Linear(1, 1))

    def load(_: object, path: Path, **__: object) -> SimpleNamespace:
        loaded.append(path)
        return SimpleNamespace(ignored=())

    monkeypatch.setattr(train, "load_weights", load)
    config = resolve_config("tiny", None, [f"training.weights={tmp_path / 'w.pth'}"])
    data: Any = SimpleNamespace(vocabulary=None, counts=None)
    train._build_network(config, data, from_weights=anew)
    assert loaded == [tmp_path / "w.pth"] * anew


class Stop(RuntimeError):
    """Ends a training before it opens its data."""


def test_training_computes_with_as_many_threads_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def open_data(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise Stop

    monkeypatch.setattr(train, "_open_data", open_data)
    try:
        for asked in (before + 1, before + 2):
            words = ["training.device=cpu", f"training.threads={asked}"]
            with pytest.raises(Stop):
                train.train(resolve_config("tiny", None, words), output=tmp_path)
            assert seen[-1] == asked
    finally:
        torch.set_num_threads(before)


def test_a_skipped_step_is_left_out_of_the_means() -> None:
    window = LossWindow()
    for value, skipped in ((2.0, False), (float("nan"), True)):
        window.add(
            StepResult(
                losses={"loss_box": value},
                shares={"loss_box": 1.0},
                learning_rate=0.1,
                images=4,
                skipped=skipped,
                stop=False,
            )
        )
    assert window.means() == {"total": 2.0, "loss_box": 2.0}
    assert (window.steps, window.images) == (1, 4)


def test_tensorboard_hides_steps_that_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tensorboard"), "disabled", True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (3, 2.0)):
        board = TensorBoard(tmp_path, start)
        for step in range(start + 1, 6 if start == 0 else 5):
            board.add({"loss/total": value}, step)
        board.close()
        # The reader goes by file names, which tell seconds and then count on through a process: 10 before 9.
        (written,) = tmp_path.glob("events.out.tfevents.*.*")
        written.rename(tmp_path / f"events.out.tfevents.{start}")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/total")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2)]
