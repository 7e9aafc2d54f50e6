"""Processes' answers are compared and reported, mode by mode."""

from __future__ import annotations

import os

import pytest
import torch

from proxydet.errors import RuntimeEnvironmentError
from proxydet.recipes import r50, tiny
from proxydet.runtime import determinism
from proxydet.runtime.determinism import Part, summarize, verify_determinism
from proxydet.runtime.modes import MODES

ANSWER = {
    "device": "cpu",
    "elements": 10,
    "step_seconds": 1.0,
    "step_cpu_seconds": 1.0,
    "memory_mib": 5.0,
    "losses": {},
    "digests": [{"loss a": "1", "weight w": "2"}],
    "differing": [{"first": None, "elements": 0}],
}
NOISY = {
    **ANSWER,
    "step_seconds": 2.0,
    "step_cpu_seconds": 4.0,
    "differing": [{"first": [0, "loss a"], "elements": 7}],
}


def test_processes_are_compared_with_each_other():
    same = summarize("off", [ANSWER, ANSWER])
    assert same.identical
    assert same.repetitions == 4
    other = {**ANSWER, "digests": [{"loss a": "1", "weight w": "3"}]}
    result = summarize("off", [ANSWER, other])
    assert not result.identical
    assert result.first_difference == Part(process=1, repetition=0, step=0, where="weight w")
    result = summarize("off", [NOISY, ANSWER])
    assert (result.differing_repetitions, result.differing_elements) == (1, 7)


@pytest.mark.parametrize("turned", [1, -1])
def test_a_gradient_that_only_one_process_has_is_a_difference(turned):
    both, one = {"loss a": "1", "gradient of m": "2"}, {"loss a": "1"}
    answers = [{**ANSWER, "digests": [digests]} for digests in (both, one)][::turned]
    result = summarize("off", answers)
    assert result.first_difference == Part(process=1, repetition=0, step=0, where="gradient of m")


@pytest.fixture
def answer_with(monkeypatch):
    """Answer in place of the processes, by mode."""

    def call(answer) -> None:
        monkeypatch.setattr(determinism, "call_in_new_process", lambda *_, mode, **__: answer(mode))

    return call


def test_the_modes_alternate_and_keep_their_own_answers(answer_with):
    turns: list[str] = []

    def answer(mode: str) -> dict:
        turns.append(mode)
        return {**ANSWER, "step_seconds": float(len(turns))}

    answer_with(answer)
    report = verify_determinism(tiny(), modes=("off", "strict"))
    assert turns == ["off", "strict", "off", "strict"]
    assert [(r.mode, r.step_seconds) for r in report.modes] == [("off", 1.0), ("strict", 2.0)]


def test_a_process_that_fails_is_an_error_with_its_mode(answer_with):
    def fail(mode: str):
        raise RuntimeEnvironmentError("the process ended with exit code 7")

    answer_with(fail)
    with pytest.raises(RuntimeEnvironmentError, match=r"mode strict: .* exit code 7"):
        verify_determinism(tiny(), modes=("strict",))


def test_on_a_gpu_the_time_is_that_of_the_clock(answer_with, cli):
    answers = {"off": NOISY, "strict": ANSWER}
    answer_with(lambda mode: {**answers[mode], "device": "NVIDIA X"})
    out = cli("verify", "determinism", "--mode", "off", "--mode", "strict").out
    assert "0.50 x the time and 1.00 x the memory of off" in out


_NOISY_START = """
import os
from torch.nn import functional
real = functional.normalize
def noisy(*arguments, **settings):
    return real(*arguments, **settings) * (1 + 1e-6 * os.urandom(1)[0])
functional.normalize = noisy
"""


@pytest.mark.slow
def test_the_command_finds_a_draw_without_a_seed_in_fresh_processes(tmp_path, monkeypatch, cli):
    (tmp_path / "sitecustomize.py").write_text(_NOISY_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code, out, _ = cli("verify", "determinism", "--mode", "strict", "--steps", "1")
    assert code == 5
    assert "strict     NO" in out
    assert "in step 0, loss " in out


@pytest.fixture
def run(answer_with, cli):
    """Run the command with canned answers of its processes: mode off varies, the others as given."""

    def call(*words: str, noisy: tuple[str, ...] = ("off",)):
        answers = {mode: NOISY if mode in noisy else ANSWER for mode in MODES}
        answer_with(answers.__getitem__)
        return cli("verify", "determinism", *words)

    return call


def test_the_command_compares_the_modes(run):
    code, out, _ = run()
    assert code == 0
    rows = [
        line.split()[:5] for line in out.splitlines() if line.startswith(("off ", "pub", "str"))
    ]
    assert rows[0] == ["off", "NO", "7", "of", "10"]
    assert rows[1][:2] == ["published", "yes"]
    assert "0.25 x the processor time and 1.00 x the memory of off" in out
    assert "off: 2 repetitions differ; the first (process 0, repetition 1) in step 0, loss a" in out


def test_the_command_fails_where_strict_varies(run):
    ended = run("--mode", "strict", "--json", noisy=("strict",))
    assert ended.code == 5
    assert ended.data["modes"][0]["identical"] is False


def test_half_precision_on_a_cpu_is_refused_before_anything_runs(run):
    assert run("--recipe", "r50")[0] == 3
    assert run("--recipe", "r50", "--set", "training.precision.backbone=fp32")[0] == 0


@pytest.mark.parametrize("words", [("--mode", "exact"), ("--device", "gpu")])
def test_an_unknown_mode_or_device_is_a_usage_error(run, words):
    assert run(*words)[0] == 2


@pytest.mark.slow
def test_fresh_processes_agree():
    report = verify_determinism(tiny(), modes=("strict",), steps=1, repetitions=1)
    assert report.modes[0].identical
    assert report.modes[0].repetitions == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("recipe", "repetitions"), [(tiny, 25), pytest.param(r50, 25, marks=pytest.mark.slow)]
)
def test_strict_repeats_itself_on_a_gpu_within_half_as_much_memory_again(recipe, repetitions):
    report = verify_determinism(
        recipe(), modes=("off", "strict"), device="cuda", steps=2, repetitions=repetitions
    )
    off, strict = report.modes
    assert strict.identical, strict.first_difference
    assert strict.memory_mib <= 1.5 * off.memory_mib
