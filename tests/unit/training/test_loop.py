"""The loop at small scale: it learns, goes on exactly, stops on signals, guards against NaN, evaluates by schedule."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch
from trainings import final, records, same

from proxydet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    JobInterruptedError,
    NumericsError,
    TrainingError,
)
from proxydet.training.checkpoint import CheckpointFolder, load_checkpoint
from proxydet.training.train import Prefetcher
from proxydet.weight_files import write_state


class Stop(RuntimeError):
    """Stands for a crash."""


def crash_at(iteration: int):
    def evaluate(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        if at == iteration:
            raise Stop
        return {"AP": float(at)}

    return evaluate


def test_training_learns_and_reports(toy, tmp_path):
    result = toy.run(tmp_path, {"iterations": 150, "optimizer": {"learning_rate": 0.05}})
    lines = records(tmp_path)
    assert lines[-1]["losses"]["total"] < 0.5 * lines[0]["losses"]["total"]
    assert [line["iteration"] for line in lines] == list(range(2, 151, 2))
    assert result.iterations == 150
    assert result.losses == lines[-1]["losses"]
    assert result.weights.exists()
    assert result.best is None


def test_losses_are_averaged_over_the_batches_that_have_them(toy, tmp_path):
    toy.run(tmp_path, {"iterations": 3, "log": {"period": 3}})
    losses = records(tmp_path)[0]["losses"]
    toy.run(tmp_path / "single", {"iterations": 3, "log": {"period": 1}})
    singles = [line["losses"] for line in records(tmp_path / "single")]
    boxes = [line["loss_box"] for line in singles if line["loss_box"]]
    assert len(boxes) == 2
    assert losses["loss_box"] == pytest.approx(sum(boxes) / 2)
    assert losses["total"] == pytest.approx(sum(line["total"] for line in singles) / 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_after_a_crash_is_exact(toy, tmp_path, workers):
    # Logs every 5 and checkpoints every 4: the crash falls into the middle of a record's window.
    changes = {"evaluation": {"period": 6}, "log": {"period": 5}}
    toy.run(tmp_path / "whole", changes, workers=workers, evaluate=crash_at(-1))
    with pytest.raises(Stop):
        toy.run(tmp_path / "cut", changes, workers=workers, evaluate=crash_at(6))
    assert not (tmp_path / "cut" / "model_final.pth").exists()
    toy.run(tmp_path / "cut", changes, workers=workers, evaluate=crash_at(-1))
    assert same(tmp_path / "whole", tmp_path / "cut")
    timeless = [
        [{k: line[k] for k in ("iteration", "losses", "learning_rate")} for line in records(folder)]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert timeless[0] == timeless[1]
    assert records(tmp_path / "whole", "evaluations") == records(tmp_path / "cut", "evaluations")


def test_an_interrupted_evaluation_is_made_up_for(toy, tmp_path):
    changes = {"evaluation": {"period": 4}}
    with pytest.raises(Stop):
        toy.run(tmp_path, changes, evaluate=crash_at(8))
    result = toy.run(tmp_path, changes, evaluate=crash_at(-1))
    assert list(result.evaluations) == [4, 8, 12]
    assert result.best == dataclasses.replace(result.best, iteration=12, metric="AP", value=12.0)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_follows_a_run_that_went_back_is_kept(toy, tmp_path, damaged):
    """Checkpoints that were left behind do not count among the newest, and push out none that is written now."""
    changes = {"checkpoints": {"period": 2, "keep_last": 2}}
    toy.run(tmp_path, changes)
    folder = tmp_path / "checkpoints"
    early = folder / "step_0000010.pth"
    if damaged:
        (folder / "step_0000012.pth").write_bytes(b"")
    with pytest.raises(Stop):
        toy.run(
            tmp_path,
            {"checkpoints": {"period": 1, "keep_last": 1}, "evaluation": {"period": 11}},
            evaluate=crash_at(11),
            **({} if damaged else {"resume": early}),
        )
    assert [path.name for path in folder.iterdir()] == ["step_0000011.pth"]
    aside = tmp_path / "aside/after_step_0000010"
    assert (aside / "checkpoints/step_0000012.pth").exists()
    assert (aside / "model_final.pth").exists()
    assert [line["iteration"] for line in records(aside)] == [12]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(toy, tmp_path, number, code):
    changes = {"checkpoints": {"period": 100}, "evaluation": {"period": 5}}
    toy.run(tmp_path / "whole", changes, evaluate=crash_at(-1))

    def interrupting(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        if at == 5:
            os.kill(os.getpid(), number)
        return {"AP": float(at)}

    handler = signal.getsignal(number)
    with pytest.raises(JobInterruptedError, match="after 5 of 12 iterations") as caught:
        toy.run(tmp_path / "cut", changes, evaluate=interrupting)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is handler
    assert (tmp_path / "cut/checkpoints/step_0000005.pth").exists()
    toy.run(tmp_path / "cut", changes, evaluate=crash_at(-1))
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_during_a_step_lets_it_finish(toy, tmp_path, monkeypatch):
    losses = toy.toy_losses
    calls = []

    def interrupting(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return losses(found, generator=generator)

    monkeypatch.setattr(toy, "toy_losses", interrupting)
    with pytest.raises(JobInterruptedError) as caught:
        toy.run(tmp_path / "cut", {})
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    saved = load_checkpoint(tmp_path / "cut/checkpoints/step_0000007.pth")
    assert saved["iteration"] == 7
    toy.run(tmp_path / "cut", {})
    monkeypatch.undo()
    toy.run(tmp_path / "whole", {})
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_stop_within_an_iteration_leaves_the_weights_that_were_evaluated(
    toy, tmp_path, monkeypatch
):
    """Where a step is a quarter of an iteration, four of them share a number."""
    losses, calls = toy.toy_losses, iter(range(1000))

    def interrupting(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if next(calls) == 21:
            os.kill(os.getpid(), signal.SIGUSR1)
        return losses(found, generator=generator)

    monkeypatch.setattr(toy, "toy_losses", interrupting)
    changes = {"evaluation": {"period": 5}}
    with pytest.raises(JobInterruptedError, match="after 6 of 12 iterations"):
        toy.run(tmp_path, changes, step=Fraction(1, 4), evaluate=crash_at(-1))
    for number in (5, 6):
        saved = load_checkpoint(tmp_path / f"checkpoints/step_000000{number}.pth")
        assert (saved["iteration"], saved["progress"]) == (number, str(number))


def test_the_display_counts_iterations_not_steps(toy, tmp_path):
    class Display:
        shown: list[float]

        @contextmanager
        def task(self, *_: object, **__: object) -> Iterator[Display]:
            self.shown = []
            yield self

        def advance(self, _: float = 1, **values: float) -> None:
            self.shown += [values["it/s"]] if values else []

    display = Display()
    toy.run(tmp_path, {"log": {"period": 3}}, step=Fraction(1, 4), progress=display)
    steps = [record["step_seconds"] for record in records(tmp_path)]
    assert [s * x for s, x in zip(steps, display.shown, strict=True)] == pytest.approx(
        [0.25] * 4, rel=0.05
    )


def poisoned(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch, *calls: int, by: float = math.nan
) -> None:
    """Make the box loss NaN, or infinite, in the given calls of the criterion."""
    losses, count = toy.toy_losses, iter(range(1000))

    def poison(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        values = losses(found, generator=generator)
        if next(count) in calls:
            values["loss_box"] = values["loss_box"] + by
        return values

    monkeypatch.setattr(toy, "toy_losses", poison)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch, value):
    poisoned(toy, monkeypatch, 5, by=float(value))
    with pytest.raises(NumericsError) as caught:
        toy.run(tmp_path, {})
    message = f"At iteration 5, loss_box is {value} on images 500, 501, 502, 503."
    assert message in caught.value.message
    record = json.loads((tmp_path / "failures/step_0000005.json").read_text())
    assert record["not_finite"][0]["images"] == [[500, 501, 502, 503]]
    assert (tmp_path / "checkpoints/step_0000004.pth").exists()
    assert not (tmp_path / "model_final.pth").exists()


def test_a_step_can_be_skipped_instead_and_is_counted(toy, tmp_path, monkeypatch):
    poisoned(toy, monkeypatch, 5, 7)
    skip = {"guards": {"non_finite": "skip", "max_skipped": 2}}
    result = toy.run(tmp_path / "a", skip)
    assert result.skipped == 2
    assert all(torch.isfinite(weight).all() for weight in final(tmp_path / "a").values())
    assert records(tmp_path / "a")[-1]["skipped"] == 2
    monkeypatch.undo()
    poisoned(toy, monkeypatch, 5, 7, 9)
    with pytest.raises(NumericsError) as caught:
        toy.run(tmp_path / "b", skip)
    assert "2 steps were skipped, as many as training.guards.max_skipped" in caught.value.hint
    assert "non_finite=skip" not in caught.value.hint


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_a_later_step(
    toy, tmp_path, monkeypatch
):
    def full(content: dict, path: Path, **options: object) -> None:
        if content["iteration"] == 8:
            raise DiskFullError(f"There is no room for {path}.", path=path)
        write_state(content, path, **options)

    monkeypatch.setattr("proxydet.training.checkpoint.write_state", full)
    with pytest.raises(DiskFullError, match="step_0000008"):
        toy.run(tmp_path, {"iterations": 40})
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step_0000004.pth"]


def test_processes_meet_where_the_main_one_may_wait_for_a_checkpoint(toy, tmp_path, monkeypatch):
    events, save = [], CheckpointFolder.save
    monkeypatch.setattr(
        CheckpointFolder, "save", lambda *state: (events.append("save"), save(*state))
    )
    monkeypatch.setattr("proxydet.training.train.wait_for_all", lambda _: events.append("meet"))
    toy.run(tmp_path, {"iterations": 12, "checkpoints": {"period": 4}})
    assert "".join(event[0] for event in events).startswith("smsmsm")


def test_weights_that_are_not_finite_are_not_saved(toy, tmp_path, monkeypatch):
    losses = toy.toy_losses

    def poison(found: dict, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        values = losses(found, generator=generator)
        found["classes"].register_hook(lambda gradient: gradient * math.inf)
        return values

    monkeypatch.setattr(toy, "toy_losses", poison)
    with pytest.raises(NumericsError, match="not finite"):
        toy.run(tmp_path, {"iterations": 1, "optimizer": {"clip_value": None}})
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_evaluation_keeps_to_its_schedule_and_marks_the_best(toy, tmp_path):
    seen = []

    def evaluate(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        assert not network.training
        seen.append((at, folder.name))
        return {"AP": 1.0 if at == 4 else 0.5, "AR": float(at)}

    changes = {"evaluation": {"period": 2, "start": 4}, "checkpoints": {"keep_last": 1}}
    result = toy.run(tmp_path, changes, evaluate=evaluate)
    assert [at for at, _ in seen] == [4, 6, 8, 10, 12]
    assert seen[0][1] == "step_0000004"
    assert result.best.iteration == 4
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_0000004.pth", "step_0000012.pth"]
    by_recall = {**changes, "evaluation": {**changes["evaluation"], "metric": "AR"}}
    assert toy.run(tmp_path / "b", by_recall, evaluate=evaluate).best.iteration == 12


def test_a_checkpoint_that_is_no_longer_the_best_goes_when_a_better_one_is_known(toy, tmp_path):
    changes = {"evaluation": {"period": 4}, "checkpoints": {"keep_last": 1}}
    toy.run(tmp_path, changes, evaluate=crash_at(-1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000012.pth"]


def test_evaluations_of_weights_that_a_run_goes_back_behind_are_made_again(toy, tmp_path):
    changes = {"evaluation": {"period": 4}, "checkpoints": {"keep_last": 3}}
    for value, resume in ((1.0, "auto"), (2.0, tmp_path / "checkpoints/step_0000004.pth")):
        toy.run(tmp_path, changes, resume=resume, evaluate=lambda *_, value=value: {"AP": value})
    found = [
        (line["iteration"], line["metrics"]["AP"]) for line in records(tmp_path, "evaluations")
    ]
    assert found == [(4, 1.0), (8, 2.0), (12, 2.0)]


def test_evaluation_does_not_change_what_is_learnt(toy, tmp_path):
    def evaluate(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        return {"AP": float(torch.rand(3).sum())}

    toy.run(tmp_path / "with", {"evaluation": {"period": 3}}, evaluate=evaluate)
    toy.run(tmp_path / "without", {})
    assert same(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("unused", ["zero", "skip"])
def test_accumulation_averages_batches(toy, tmp_path, unused):
    rate = {"learning_rate": 0.01, "unused_gradients": unused, "clip_value": 0.02}
    changes = {"iterations": 3, "accumulation": 2, "optimizer": rate}
    changes["schedule"] = {"shape": "constant", "warmup_iterations": 0}
    toy.run(tmp_path, changes, plain=True)

    network = toy.ToyNetwork(dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=1e-4)
    for step in range(3):
        for number in (2 * step, 2 * step + 1):
            found = network.forward_train(toy.toy_batch(number))
            losses = toy.plain_losses(found, generator=torch.Generator())
            (sum(losses.values()) / 2).backward()
        for parameter in network.parameters():
            parameter.grad.clamp_(-0.02, 0.02)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in final(tmp_path).items():
        torch.testing.assert_close(weight, network.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_what_a_batch_does_to_parameters_that_it_does_not_reach(toy, tmp_path):
    weights = {}
    for unused in ("zero", "skip"):
        for iterations in (1, 2):
            folder = tmp_path / f"{unused}{iterations}"
            rate = {"learning_rate": 0.01, "unused_gradients": unused}
            schedule = {"shape": "constant", "warmup_iterations": 0}
            changes = {"iterations": iterations, "optimizer": rate, "schedule": schedule}
            toy.run(folder, changes, plain=True)
            weights[unused, iterations] = final(folder)["box_head.weight"]
    # Batch 1 has image labels only: with zero the box head goes on with its momentum, with skip it rests.
    assert not torch.equal(weights["zero", 1], weights["zero", 2])
    assert torch.equal(weights["skip", 1], weights["skip", 2])
    assert torch.equal(weights["skip", 1], weights["zero", 1])


def test_resuming_elsewhere_and_refusing_what_does_not_fit(toy, tmp_path):
    toy.run(tmp_path / "whole", {})
    path = tmp_path / "whole/checkpoints/step_0000008.pth"
    toy.run(tmp_path / "branch", {}, resume=path)
    assert same(tmp_path / "whole", tmp_path / "branch")
    with pytest.raises(CheckpointError, match="seed 7, this run has 8"):
        toy.run(tmp_path / "other", {}, resume=path, seed=8)
    toy.run(tmp_path / "whole", {"iterations": 3}, resume="never")
    assert load_checkpoint(tmp_path / "whole/checkpoints/step_0000012.pth")


def test_a_finished_run_stays_finished(toy, tmp_path):
    toy.run(tmp_path, {})
    before = final(tmp_path)
    result = toy.run(tmp_path, {})
    assert result.iterations == 12
    assert all(torch.equal(before[n], w) for n, w in final(tmp_path).items())


def test_a_loader_that_is_stuck_or_ends_stops_the_run(toy, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="no batch for 0 seconds"):
        toy.run(tmp_path, {}, pause=2.0, loader_timeout=0.3)
    monkeypatch.setattr(toy, "toy_loader", lambda *_: iter([toy.toy_batch(0)]))
    with pytest.raises(DataError, match="ended before training"):
        toy.run(tmp_path, {})


def test_the_metric_that_decides_may_change_and_nan_is_never_the_best(toy, tmp_path):
    def evaluate(reported: dict[int, dict[str, float]], stop: int = -1):
        def function(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
            if at == stop:
                raise Stop
            return reported[at]

        return function

    changes = {"evaluation": {"period": 4}, "checkpoints": {"keep_last": 1}}
    with pytest.raises(Stop):
        toy.run(tmp_path, changes, evaluate=evaluate({4: {"segm": 0.9}}, stop=8))
    # With other settings of the evaluation: those of before are not compared with.
    newer = {8: {"bbox": math.nan, "segm": 0.1}, 12: {"bbox": 0.2, "segm": 0.1}}
    metric = {**changes, "evaluation": {"period": 4, "metric": "bbox"}}
    result = toy.run(tmp_path, metric, evaluate=evaluate(newer))
    assert (result.best.iteration, result.best.metric, result.best.value) == (12, "bbox", 0.2)
    result = toy.run(tmp_path, changes)
    assert (result.best.iteration, result.best.metric, result.best.value) == (12, "bbox", 0.2)


def test_a_metric_that_is_not_reported_is_an_error_when_that_is_known(toy, tmp_path):
    changes = {"evaluation": {"metric": "AQ"}}
    with pytest.raises(ConfigError, match=r"evaluation\.metric .*'AQ'") as caught:
        toy.run(tmp_path, changes, evaluate=lambda *_: {"AP": 1.0})
    assert "AP" in str(caught.value.hint)
    result = toy.run(tmp_path, {"evaluation": {"metric": None}}, evaluate=crash_at(-1))
    assert result.best.value == 1.0, "the evaluation is not lost"


def test_a_loader_that_cannot_begin_stops_the_run():
    class Broken:
        def __iter__(self) -> None:
            raise OSError(12, "Cannot allocate memory")

    with pytest.raises(OSError, match="memory"), Prefetcher(Broken(), timeout=20.0) as batches:
        batches.next()
