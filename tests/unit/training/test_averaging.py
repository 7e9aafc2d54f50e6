"""Weights that are averaged over the iterations, mixed with the starting ones or frozen; the best kept; an early stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proxydet.errors import CheckpointError, ConfigError
from proxydet.training.checkpoint import load_checkpoint
from proxydet.training.config import EmaConfig, TrainingConfig, scale_training
from proxydet.training.logs import stopped_early
from proxydet.weight_files import read_safetensors, read_state_dict, write_safetensors

NAMES = ["backbone.0.weight", "box_head.weight", "class_head.weight", "class_head.bias"]
ALL = {
    "weights": "start.pth",
    "interpolation": 0.6,
    "ema": {"decay": 0.9, "warmup_iterations": 2},
    "checkpoints": {"period": 4, "best_weights": True},
    "evaluation": {"period": 3, "at_start": True},
}


class Stop(RuntimeError):
    """Stands for a crash."""


class Evaluation:
    """Reports given values by iteration, and what the network holds meanwhile."""

    def __init__(self, values: dict[int, float], crash: int | None = None) -> None:
        self.values, self.crash = values, crash
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        assert not network.training
        self.seen[at] = {name: value.clone() for name, value in network.state_dict().items()}
        if at == self.crash:
            raise Stop
        return {"AP": self.values.get(at, 0.0)}


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_the_average_is_that_of_the_weights_after_each_iteration(toy, tmp_path):
    changes = {
        "iterations": 6,
        "ema": {"decay": 0.8, "warmup_iterations": 4},
        "checkpoints": {"period": 1, "keep_last": 9},
    }
    toy.run(tmp_path, changes)
    expected = dict(toy.ToyNetwork().state_dict())
    for iteration in range(1, 7):
        trained = load_checkpoint(tmp_path / f"checkpoints/step_{iteration:07d}.pth")["trained"]
        decay = min(0.8, (1 + iteration) / (4 + iteration))
        expected = {n: decay * v + (1 - decay) * trained[n] for n, v in expected.items()}
    final = read_state_dict(tmp_path / "model_final.safetensors")
    assert final.keys() == expected.keys()
    for name, value in final.items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, trained[name])


def test_averaging_mixing_and_evaluating_leave_what_is_trained_alone(toy, tmp_path):
    toy.run(tmp_path / "plain", {})
    toy.run(tmp_path / "averaged", ALL, evaluate=Evaluation({}), loaded=NAMES)
    last = "checkpoints/step_0000012.pth"
    plain, averaged = (load_checkpoint(tmp_path / name / last) for name in ("plain", "averaged"))
    assert equal(plain["model"], {**averaged["model"], **averaged["trained"]})
    assert not equal(plain["model"], averaged["model"])
    assert "trained" not in plain


def test_trained_weights_are_mixed_with_the_starting_ones_that_were_loaded(toy, tmp_path):
    changes = {"weights": "start.pth", "interpolation": 0.25}
    toy.run(tmp_path, changes, loaded=NAMES)
    start = toy.ToyNetwork().state_dict()
    trained = load_checkpoint(tmp_path / "checkpoints/step_0000012.pth")["trained"]
    assert sorted(trained) == sorted(NAMES), "what is fresh is not mixed"
    final = read_state_dict(tmp_path / "model_final.safetensors")
    for name in NAMES:
        torch.testing.assert_close(final[name], 0.75 * start[name] + 0.25 * trained[name])


@pytest.mark.parametrize("crash", [0, 6, 9])
def test_a_crash_changes_nothing(toy, tmp_path, crash):
    values = {0: 0.1, 3: 0.3, 6: 0.9, 9: 0.2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy.run(whole, ALL, evaluate=(first := Evaluation(values)), loaded=NAMES)
    with pytest.raises(Stop):
        toy.run(cut, ALL, evaluate=Evaluation(values, crash), loaded=NAMES)
    # As `train` does, which loads no starting weights to resume.
    toy.run(cut, ALL, evaluate=(second := Evaluation(values)))
    for name in ("model_final.safetensors", "model_best.safetensors", "evaluations.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    last = "checkpoints/step_0000012.pth"
    left, right = load_checkpoint(whole / last), load_checkpoint(cut / last)
    for part in ("model", "trained", "average"):
        assert equal(left[part], right[part]), part
    assert equal(first.seen[12], second.seen[12])
    assert equal(first.seen[12], read_state_dict(whole / "model_final.pth"))
    assert equal(first.seen[6], read_state_dict(whole / "model_best.safetensors"))
    assert equal(first.seen[6], read_state_dict(whole / "checkpoints/step_0000006.pth"))


def test_starting_weights_are_those_of_the_session_that_wrote_the_first_checkpoint(toy, tmp_path):
    toy.run(tmp_path / "whole", ALL, evaluate=Evaluation({}), loaded=NAMES)
    kept = [tmp_path / run / "model_start.safetensors" for run in ("whole", "cut")]
    others = {name: value + 1 for name, value in read_state_dict(kept[0]).items()}
    write_safetensors(kept[1], others, {"iteration": 0, "mixed": NAMES})
    with pytest.raises(Stop):
        toy.run(tmp_path / "cut", ALL, evaluate=Evaluation({}, 6), loaded=NAMES)
    toy.run(tmp_path / "cut", ALL, evaluate=Evaluation({}))
    whole, cut = (path.with_name("model_final.safetensors").read_bytes() for path in kept)
    assert whole == cut


def test_starting_weights_that_are_gone_are_named(toy, tmp_path):
    with pytest.raises(Stop):
        toy.run(tmp_path, ALL, evaluate=Evaluation({}, 6), loaded=NAMES)
    (tmp_path / "model_start.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model_start\.safetensors"):
        toy.run(tmp_path, ALL, evaluate=Evaluation({}))


def test_best_weights_that_a_kill_kept_from_being_written_are_written(toy, tmp_path):
    values = {3: 0.5, 6: 0.9, 9: 0.1}
    toy.run(tmp_path, ALL, evaluate=(seen := Evaluation(values)), loaded=NAMES)
    best = tmp_path / "model_best.safetensors"
    content = best.read_bytes()
    for damage in (lambda: best.unlink(), lambda: best.write_bytes(content[:-9])):
        damage()
        toy.run(tmp_path, ALL, evaluate=Evaluation(values))
        assert best.read_bytes() == content
    assert read_safetensors(best)[1]["value"] == 0.9
    # A run that goes back has the best of what is left.
    toy.run(
        tmp_path,
        ALL,
        evaluate=Evaluation({7: 1.0}),
        resume=tmp_path / "checkpoints/step_0000006.pth",
    )
    aside = tmp_path / "aside/after_step_0000006"
    assert not (aside / best.name).exists()
    assert equal(seen.seen[6], read_state_dict(best))


def test_training_stops_early(toy, tmp_path):
    changes = {
        "evaluation": {"period": 2, "patience": 2},
        "iterations": 40,
        "checkpoints": {"best_weights": True},
    }
    values = {2: 0.2, 4: 0.5, 6: 0.4, 8: 0.5}
    result = toy.run(tmp_path, changes, evaluate=Evaluation(values))
    assert (result.stopped_early, result.iterations, result.best.iteration) == (True, 8, 4)
    assert (tmp_path / "model_final.pth").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 8
    again = toy.run(tmp_path, changes, evaluate=Evaluation(values, crash=10))
    assert (again.stopped_early, again.iterations) == (True, 8), "nothing is left to do"
    changes["evaluation"]["patience"] = 3
    more = toy.run(tmp_path, changes, evaluate=Evaluation({10: 0.1}))
    assert (more.stopped_early, more.iterations) == (True, 10)
    changes["evaluation"]["patience"] = None
    more = toy.run(tmp_path, changes, evaluate=Evaluation({}))
    assert (more.stopped_early, more.iterations) == (False, 40)
    assert more.best.iteration == 4


def test_a_run_that_continues_after_an_early_stop_is_not_finished(toy, tmp_path):
    changes = {"evaluation": {"period": 2, "patience": 1}, "iterations": 40}
    values = {2: 0.5, 4: 0.4}
    assert toy.run(tmp_path, changes, evaluate=Evaluation(values)).iterations == 4
    # What a fine-tuning adds.
    report = ["finetune.html", "finetune.json", "forgetting/finetuned"]
    for name in report:
        (tmp_path / name).mkdir(parents=True)
    toy.run(tmp_path, changes, evaluate=Evaluation(values))
    assert not (tmp_path / "aside").exists(), "nothing was left to do"
    changes["evaluation"]["patience"] = 2
    with pytest.raises(Stop):
        toy.run(tmp_path, changes, evaluate=Evaluation(values, crash=6))
    finals = ["model_final.pth", "model_final.safetensors", *report]
    assert not [name for name in finals if (tmp_path / name).exists()]
    aside = tmp_path / "aside/after_step_0000004"
    assert [name for name in finals if not (aside / name).exists()] == []


def test_patience_counts_the_evaluations_after_the_best():
    schedule = TrainingConfig().evaluation
    evaluations = {1: {"AP": 0.5, "AP50": 0.1}, 2: {"AP": 0.4, "AP50": 0.2}, 3: {"AP50": 0.3}}
    cases = [("AP", 1, True), ("AP", 2, False), ("AP50", 1, False), ("AP", None, False)]
    for metric, patience, expected in cases:
        asked = type(schedule)(metric=metric, patience=patience)
        assert stopped_early(evaluations, asked) is expected


def test_frozen_parameters_keep_their_values(toy, tmp_path):
    toy.run(tmp_path, {"freeze": ["backbone.", "*head.bias"]})
    start, final = toy.ToyNetwork().state_dict(), read_state_dict(tmp_path / "model_final.pth")
    same = [name for name in start if torch.equal(start[name], final[name])]
    assert same == ["backbone.0.weight", "backbone.0.bias", "box_head.bias", "class_head.bias"]
    with pytest.raises(ConfigError, match="neck"):
        toy.run(tmp_path / "other", {"freeze": ["neck."]})


def test_frozen_batch_norms_keep_their_statistics(toy, tmp_path):
    changes = {"freeze": ["backbone."], "evaluation": {"period": 5}}
    toy.run(tmp_path, changes, norm=True, evaluate=Evaluation({}))
    start, final = (
        toy.ToyNetwork(norm=True).state_dict(),
        read_state_dict(tmp_path / "model_final.pth"),
    )
    assert all(torch.equal(start[n], final[n]) for n in start if n.startswith("backbone."))


def test_the_decay_is_scaled_with_the_batches_of_a_step():
    config = TrainingConfig(replicas=1, ema=EmaConfig(decay=0.99, warmup_iterations=20))
    scaled = scale_training(config, 4)
    assert scaled.ema == EmaConfig(decay=0.99**4, warmup_iterations=5)
    assert scale_training(config, 1) == config


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("interpolation", {"interpolation": 0.5}),
        ("interpolation", {"interpolation": 0.0, "weights": Path("a.pth")}),
    ],
)
def test_values_that_make_no_sense_are_refused(key, values):
    with pytest.raises(ConfigError, match=key):
        TrainingConfig(**values)
    with pytest.raises(ConfigError, match="decay"):
        EmaConfig(decay=1.0)
