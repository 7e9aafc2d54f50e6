"""What a run that goes on takes with it, and what signals, guards and records do at their edges."""

from __future__ import annotations

import os
import signal
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

from proxydet.errors import JobInterruptedError, NumericsError
from proxydet.training.checkpoint import TrainingState, load_checkpoint
from proxydet.training.config import OptimizerConfig, ScheduleConfig
from proxydet.training.step import build_optimizer, learning_rate_factor
from proxydet.training.train import StopNow, StopSignals
from proxydet.weight_files import write_state

NEVER_SKIPPED = {"guards": {"non_finite": "skip", "max_skipped": 2}}


def make_state() -> TrainingState:
    network = torch.nn.Linear(2, 2)
    return TrainingState(
        network=network,
        model=network,
        optimizer=build_optimizer(network.parameters(), OptimizerConfig()),
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True),
        seed=1,
        replicas=8,
    )


def test_counts_and_the_loss_scale_are_restored():
    before = make_state()
    before.batches, before.draws, before.skipped, before.images = 40, 5, 2, 160
    before.progress, before.step = Fraction(11, 2), Fraction(1, 2)
    before.scaler.load_state_dict({**before.scaler.state_dict(), "scale": 2.0})
    after = make_state()
    after.load_state_dict(before.state_dict())
    assert (after.iteration, after.batches, after.draws) == (5, 40, 5)
    assert (after.progress, after.step) == (Fraction(11, 2), Fraction(1, 2))
    assert (after.skipped, after.images) == (2, 160)
    assert after.scaler.state_dict()["scale"] == 2.0


def poison(toy: ModuleType, monkeypatch: pytest.MonkeyPatch, value: float, *calls: int) -> None:
    losses, count = toy.toy_losses, iter(range(1000))

    def poisoned(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        values = losses(found, generator=generator)
        return (
            {**values, "loss_box": values["loss_box"] + value} if next(count) in calls else values
        )

    monkeypatch.setattr(toy, "toy_losses", poisoned)


def test_skipped_steps_count_over_the_whole_run(toy, tmp_path, monkeypatch):
    """A run that is started again may not skip as many steps once more."""

    def crash(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        raise KeyError(at)

    with monkeypatch.context() as patch:
        poison(toy, patch, float("nan"), 0, 1)
        changes = {**NEVER_SKIPPED, "evaluation": {"period": 4}}
        with pytest.raises(KeyError):
            toy.run(tmp_path, changes, evaluate=crash)
    assert load_checkpoint(tmp_path / "checkpoints/step_0000004.pth")["skipped"] == 2
    poison(toy, monkeypatch, float("nan"), 0)
    with pytest.raises(NumericsError, match="At iteration 4"):
        toy.run(tmp_path, NEVER_SKIPPED)


def test_the_seed_of_the_run_decides_what_steps_draw(toy, tmp_path):
    for seed in (7, 8):
        toy.run(tmp_path / str(seed), {"iterations": 2}, seed=seed)
    left, right = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("7", "8")
    )
    assert not torch.equal(left["backbone.0.weight"], right["backbone.0.weight"])


def test_an_evaluation_that_was_made_is_not_made_again(toy, tmp_path):
    seen: list[int] = []

    def evaluate(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        seen.append(at)
        return {"AP": 0.5}

    changes = {"iterations": 4, "evaluation": {"period": 2}}
    result = toy.run(tmp_path, changes, evaluate=evaluate)
    assert result.best.iteration == 2, "of equal ones the first is the best"
    toy.run(tmp_path, changes, evaluate=evaluate)
    assert seen == [2, 4]


def test_a_signal_in_the_last_step_lets_the_run_end(toy, tmp_path, monkeypatch):
    losses, count = toy.toy_losses, iter(range(100))

    def interrupting(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(found, generator=generator)

    monkeypatch.setattr(toy, "toy_losses", interrupting)
    with pytest.raises(JobInterruptedError):
        toy.run(tmp_path / "first", {"iterations": 4})
    count = iter(range(100))
    assert toy.run(tmp_path / "last", {"iterations": 3}).weights.exists()


def test_a_second_ctrl_c_stops_at_once_and_the_first_signal_is_told():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopNow), signals.immediate():
            pytest.fail("long work began after a signal")


def test_a_checkpoint_is_replaced_not_written_over(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write_state({"iteration": 1, "x": 1}, path)
    flushed: list[int] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(number), flush(number)))
    with path.open("rb") as reader:
        write_state({"iteration": 1, "x": 2}, path)
        assert torch.load(reader, weights_only=True)["x"] == 1
    assert load_checkpoint(path)["x"] == 2
    assert len(flushed) == 2, "the file and its folder"


def test_warm_up_ends_on_the_published_tolerance_and_may_outlast_the_training():
    constant = ScheduleConfig(shape="constant", warmup_iterations=10)
    assert learning_rate_factor(9, 20_000_000, constant) == 1.0
    long = ScheduleConfig(warmup_iterations=20)
    factors = [learning_rate_factor(step, 10, long) for step in range(10)]
    assert factors == pytest.approx([1e-3 * (1 - step / 20) for step in range(10)])
