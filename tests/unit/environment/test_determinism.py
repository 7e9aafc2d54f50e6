"""Repeated steps are compared bit by bit, and a difference is found where it arises."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proxydet.compat import roi_align, roi_operators
from proxydet.compat.modes import MODES
from proxydet.compat.roi_operators import RoiGeometry
from proxydet.config import to_mapping
from proxydet.data.batches import BoxBatch, ImageLabelBatch
from proxydet.determinism import verify, worker
from proxydet.determinism.batches import random_batches, random_vocabulary
from proxydet.determinism.report import Part
from proxydet.determinism.worker import Job
from proxydet.errors import EnvironmentProblem
from proxydet.modeling import heads, pooling
from proxydet.recipes import r50, tiny
from proxydet_cli.main import main

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


@pytest.fixture(autouse=True)
def leave_the_mode():
    yield
    roi_align.apply_mode("off")


def job(**changes) -> Job:
    values = {
        "configuration": to_mapping(tiny()),
        "mode": "strict",
        "device": "cpu",
        "steps": 2,
        "repetitions": 2,
        "classes": 40,
    }
    return Job(**{**values, **changes})


@pytest.mark.parametrize("mode", ["off", "published", "strict"])
def test_every_mode_repeats_itself_on_a_cpu(mode):
    found = worker.run(job(mode=mode))
    assert found["differing"] == [{"first": None, "elements": 0}]
    assert found["elements"] > 100_000
    assert len(found["digests"]) == 2
    names = list(found["digests"][0])
    assert any(name.startswith("gradient of backbone") for name in names)
    assert any(name.startswith("weight roi_heads") for name in names)


def test_what_others_draw_from_the_global_generators_does_not_matter():
    bench = worker.Bench(tiny(), job(mode="off"))
    first = bench.repeat(None)
    torch.rand(3)
    np.random.rand(5)  # noqa: NPY002 - the global generator is what is meant
    random.random()
    other = bench.repeat(first)
    assert (other.first, other.elements) == (None, 0)


def test_strict_of_a_gpu_gives_a_step_the_losses_and_gradients_of_the_kernel(monkeypatch):
    def pool_with(backward):
        def pool(maps, rois, *, side, scale, sampling_ratio):
            geometry = RoiGeometry(
                output_size=(side, side),
                spatial_scale=scale,
                sampling_ratio=sampling_ratio,
                aligned=True,
            )
            return roi_operators._RoiAlign.apply(maps, rois.to(maps.dtype), geometry, backward)

        return pool

    bench = worker.Bench(tiny(), job(steps=1))
    found = {}
    for name in ("kernel_backward", "separable_backward"):
        monkeypatch.setattr(pooling, "align_regions", pool_with(getattr(roi_operators, name)))
        found[name] = bench.repeat(None)
    assert bench.repeat(found["separable_backward"]).first is None
    ((kernel,), (strict,)) = (repetition.steps for repetition in found.values())
    losses = [key for key in kernel.digests if key.startswith("loss ")]
    assert losses
    assert all(kernel.digests[key] == strict.digests[key] for key in losses)
    assert kernel.digests != strict.digests
    for name, gradient in kernel.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            strict.gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name
        )


def test_a_gradient_that_varies_is_found_where_it_arises(monkeypatch):
    real, calls = roi_operators.kernel_backward, count()

    def noisy(*arguments):
        return real(*arguments) * (1 + 1e-6 * next(calls))

    monkeypatch.setattr(roi_operators, "kernel_backward", noisy)
    found = worker.run(job(mode="published", steps=1))
    (other,) = found["differing"]
    step, name = other["first"]
    assert step == 0
    # Regions feel it through the maps that they are cut from: the heads' own gradients stay as they are.
    assert name.startswith(("gradient of backbone", "gradient of proposal_generator"))
    assert 0 < other["elements"] < found["elements"]


def test_zeros_of_both_signs_and_nan_are_told_by_their_bits():
    first = torch.tensor([0.0, 0.0, float("nan")])
    other = torch.tensor([-0.0, -0.0, float("nan")])
    repetition = worker._Repetition()
    records = [
        worker.StepRecord(digests={"gradient of w": worker._digest(g)}, gradients={"w": g})
        for g in (first, other)
    ]
    worker._compare(repetition, *records, 3)
    assert (repetition.elements, repetition.first) == (2, [3, "gradient of w"])


def test_processes_are_compared_with_each_other():
    same = verify._summarise("off", [ANSWER, ANSWER], 2)
    assert same.identical
    assert same.repetitions == 4
    other = {**ANSWER, "digests": [{"loss a": "1", "weight w": "3"}]}
    result = verify._summarise("off", [ANSWER, other], 2)
    assert not result.identical
    assert result.first_difference == Part(process=1, repetition=0, step=0, where="weight w")
    result = verify._summarise("off", [NOISY, ANSWER], 2)
    assert (result.differing_repetitions, result.differing_elements) == (1, 7)


def test_batches_have_the_recipes_sizes():
    config = dataclasses.replace(
        tiny().data, image_labels=dataclasses.replace(tiny().data.image_labels, batch_size=3)
    )
    boxes, labels = random_batches(config, classes=9)
    assert isinstance(boxes, BoxBatch)
    assert isinstance(labels, ImageLabelBatch)
    assert (len(boxes), len(labels)) == (2, 3)
    assert boxes.images[0].shape == (3, 64, 64)
    for instances in boxes.instances:
        assert bool((instances.gt_boxes.area() >= 64).all())
        assert int(instances.gt_classes.max()) < 9
    assert len(random_batches(dataclasses.replace(config, image_labels=None), 9)) == 1
    assert len(random_vocabulary(12, 8)) == 12


def test_a_process_that_fails_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(verify, "_WORKER", "a_module_that_is_not_there")
    with pytest.raises(EnvironmentProblem, match="No module named a_module_that_is_not_there"):
        verify._run_process(job())


def test_the_modes_take_turns_and_keep_their_own_answers(monkeypatch):
    turns: list[str] = []

    def answer(asked: Job) -> dict:
        turns.append(asked.mode)
        return {**ANSWER, "step_seconds": float(len(turns))}

    monkeypatch.setattr(verify, "_run_process", answer)
    report = verify.verify_determinism(tiny(), modes=("off", "strict"))
    assert turns == ["off", "strict", "off", "strict"]
    assert [(r.mode, r.step_seconds) for r in report.modes] == [("off", 1.0), ("strict", 2.0)]


def test_on_a_gpu_the_time_is_that_of_the_clock(monkeypatch, capsys):
    answers = {"off": NOISY, "strict": ANSWER}
    monkeypatch.setattr(
        verify, "_run_process", lambda asked: {**answers[asked.mode], "device": "NVIDIA X"}
    )
    with pytest.raises(SystemExit):
        main(["verify", "determinism", "--mode", "off", "--mode", "strict"])
    assert "0.50 x the time and 1.00 x the memory of off" in capsys.readouterr().out


def test_an_operation_that_draws_without_a_seed_is_found_in_the_loss_that_it_enters(monkeypatch):
    real, source = heads.functional.normalize, random.Random()

    def noisy(embedding, dim):
        return real(embedding, dim=dim) * (1 + 1e-6 * source.random())

    monkeypatch.setattr(heads, "functional", SimpleNamespace(normalize=noisy))
    found = worker.run(job(mode="strict", steps=1))
    (other,) = found["differing"]
    step, where = other["first"]
    assert step == 0
    assert where.startswith("loss ")
    assert 0 < other["elements"] < found["elements"]


_NOISY_WORKER = """
import os, runpy
from torch.nn import functional
real = functional.normalize
def noisy(*arguments, **settings):
    return real(*arguments, **settings) * (1 + 1e-6 * os.urandom(1)[0])
functional.normalize = noisy
runpy.run_module("proxydet.determinism.worker", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_command_finds_a_draw_without_a_seed_in_fresh_processes(tmp_path, monkeypatch, capsys):
    (tmp_path / "noisy_worker.py").write_text(_NOISY_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(verify, "_WORKER", "noisy_worker")
    with pytest.raises(SystemExit) as end:
        main(["verify", "determinism", "--mode", "strict", "--steps", "1"])
    assert end.value.code == 5
    out = capsys.readouterr().out
    assert "strict     NO" in out
    assert "in step 0, loss " in out


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command with canned answers of its processes: mode off varies, the others as told."""

    def call(*words: str, noisy: tuple[str, ...] = ("off",)) -> tuple[int, str]:
        answers = {mode: NOISY if mode in noisy else ANSWER for mode in MODES}
        monkeypatch.setattr(verify, "_run_process", lambda asked: answers[asked.mode])
        try:
            code = main(["verify", "determinism", *words])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    return call


def test_the_command_compares_the_modes(run):
    code, out = run()
    assert code == 0
    rows = [
        line.split()[:5] for line in out.splitlines() if line.startswith(("off ", "pub", "str"))
    ]
    assert rows[0] == ["off", "NO", "7", "of", "10"]
    assert rows[1][:2] == ["published", "yes"]
    assert "0.25 x the processor time and 1.00 x the memory of off" in out
    assert "off: 2 repetitions differ; the first (process 0, repetition 1) in step 0, loss a" in out


def test_the_command_fails_where_strict_varies(run):
    code, out = run("--mode", "strict", "--json", noisy=("strict",))
    assert code == 5
    assert json.loads(out)["modes"][0]["identical"] is False


def test_an_unknown_mode_is_a_usage_error(run):
    assert run("--mode", "exact")[0] == 2


@pytest.mark.slow
def test_fresh_processes_agree():
    report = verify.verify_determinism(tiny(), modes=("strict",), steps=1, repetitions=1)
    assert report.modes[0].identical
    assert report.modes[0].repetitions == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("recipe", "repetitions"), [(tiny, 25), pytest.param(r50, 25, marks=pytest.mark.slow)]
)
def test_strict_repeats_itself_on_a_gpu_within_half_as_much_memory_again(recipe, repetitions):
    report = verify.verify_determinism(
        recipe(), modes=("off", "strict"), device="cuda", steps=2, repetitions=repetitions
    )
    off, strict = report.modes
    assert strict.identical, strict.first_difference
    assert strict.memory_mib <= 1.5 * off.memory_mib
