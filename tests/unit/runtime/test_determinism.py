"""Repeated steps are compared bit by bit, and a difference is found where it arises."""

from __future__ import annotations

import dataclasses
import random
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proxydet.config import to_mapping
from proxydet.data.loader import BoxBatch, ImageLabelBatch
from proxydet.modeling import roi_heads
from proxydet.modeling import roi_heads as pooling
from proxydet.recipes import tiny
from proxydet.runtime import roi_align
from proxydet.runtime.determinism import (
    Bench,
    StepRecord,
    bits_digest,
    compare,
    random_batches,
    random_vocabulary,
    repeat_steps,
)
from proxydet.runtime.modes import apply_mode
from proxydet.runtime.roi_align import RoiGeometry


@pytest.fixture(autouse=True)
def leave_the_mode():
    yield
    apply_mode("off")


def run(mode: str, *, steps: int = 2) -> dict:
    return repeat_steps(
        to_mapping(tiny()), mode, device="cpu", steps=steps, repetitions=2, classes=40
    )


def bench(mode: str) -> Bench:
    apply_mode(mode)
    return Bench(tiny(), device="cpu", classes=40)


@pytest.mark.parametrize("mode", ["off", "published", "strict"])
def test_every_mode_repeats_itself_on_a_cpu(mode):
    found = run(mode)
    assert found["differing"] == [{"first": None, "elements": 0}]
    assert found["elements"] > 100_000
    assert len(found["digests"]) == 2
    names = list(found["digests"][0])
    assert any(name.startswith("gradient of backbone") for name in names)
    assert any(name.startswith("weight roi_heads") for name in names)


def test_steps_alternate_between_the_batches_of_all_sources():
    repeated = bench("off")
    assert [type(batch) for batch in repeated.batches] == [BoxBatch, ImageLabelBatch]
    both = repeated.repeat(2)
    del repeated.batches[1]
    assert compare(both, repeated.repeat(2))["first"][0] == 1


def test_what_others_draw_from_the_global_generators_does_not_matter():
    repeated = bench("off")
    first = repeated.repeat(2)
    torch.rand(3)
    np.random.rand(5)  # noqa: NPY002 - the global generator is what is meant
    random.random()
    assert compare(first, repeated.repeat(2)) == {"first": None, "elements": 0}


def test_strict_of_a_gpu_gives_a_step_the_losses_and_gradients_of_the_kernel(monkeypatch):
    def pool_with(backward):
        def pool(features, rois, level_N, grid):
            pooled = rois.new_zeros(len(rois), features[0].shape[1], grid.side, grid.side)
            for level, (maps, scale) in enumerate(zip(features, grid.scales, strict=True)):
                rows = (level_N == level).nonzero()[:, 0]
                geometry = RoiGeometry(
                    output_size=(grid.side, grid.side),
                    spatial_scale=scale,
                    sampling_ratio=grid.sampling_ratio,
                    aligned=True,
                )
                own = roi_align.roi_align(maps, rois[rows], geometry, backward)
                pooled.index_put_((rows,), own)
            return pooled

        return pool

    repeated = bench("off")
    found = {}
    for name in ("kernel_backward", "separable_backward"):
        monkeypatch.setattr(pooling, "align_regions", pool_with(getattr(roi_align, name)))
        found[name] = repeated.repeat(1)
    assert compare(found["separable_backward"], repeated.repeat(1))["first"] is None
    ((kernel,), (strict,)) = found.values()
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
    real, calls = roi_align.kernel_backward, count()

    def noisy(*arguments):
        return real(*arguments) * (1 + 1e-6 * next(calls))

    monkeypatch.setattr(roi_align, "kernel_backward", noisy)
    found = run("published", steps=1)
    (other,) = found["differing"]
    step, name = other["first"]
    assert step == 0
    # Regions feel it through the maps that they are cut from: the heads' own gradients stay as they are.
    assert name.startswith(("gradient of backbone", "gradient of proposal_generator"))
    assert 0 < other["elements"] < found["elements"]


def test_zeros_of_both_signs_and_nan_are_compared_by_their_bits():
    first = torch.tensor([0.0, 0.0, float("nan")])
    other = torch.tensor([-0.0, -0.0, float("nan")])
    records = [[StepRecord({"gradient of w": bits_digest(g)}, {"w": g})] for g in (first, other)]
    assert compare(*records) == {"first": [0, "gradient of w"], "elements": 2}


@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_that_only_one_repetition_has_differs_whole(turned):
    equal = StepRecord({"loss a": "0"})
    with_mask = StepRecord({"loss a": "1", "gradient of m": "2"}, {"m": torch.zeros(3)})
    records = [[equal, StepRecord({"loss a": "1"})], [equal, with_mask]]
    found = compare(*(reversed(records) if turned else records))
    assert found == {"first": [1, "gradient of m"], "elements": 3}


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


def test_an_operation_that_draws_without_a_seed_is_found_in_the_loss_that_it_enters(monkeypatch):
    real, source = roi_heads.functional.normalize, random.Random()

    def noisy(embedding, dim):
        return real(embedding, dim=dim) * (1 + 1e-6 * source.random())

    monkeypatch.setattr(roi_heads, "functional", SimpleNamespace(normalize=noisy))
    found = run("strict", steps=1)
    (other,) = found["differing"]
    step, where = other["first"]
    assert step == 0
    assert where.startswith("loss ")
    assert 0 < other["elements"] < found["elements"]
