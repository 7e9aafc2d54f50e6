"""Where scores tie, the order is a rule or at least the same each time, in every reproducibility mode."""

from __future__ import annotations

import dataclasses

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pytest
import torch

from proxydet.losses.criterion import choose_categories
from proxydet.modeling import boxes as box_functions
from proxydet.modeling.config import InferenceConfig
from proxydet.runtime.modes import MODES, reproducibility_mode
from proxydet.runtime.roi_align import RegionGrid, align_regions
from proxydet.vocabulary.vocabulary import Vocabulary

SIZES = [40, box_functions.SHIFTED_UP_TO, box_functions.SHIFTED_UP_TO + 1, 6000]


def places(count: int, step: float) -> torch.Tensor:
    """Squares of 10 pixels in a row, each ``step`` pixels right of the one before."""
    left_N = torch.arange(count) * step
    zero_N, ten_N = torch.zeros(count), torch.full((count,), 10.0)
    return torch.stack([left_N, zero_N, left_N + 10, ten_N], dim=1)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("classes", [None, 3])
def test_of_boxes_of_one_score_the_first_are_kept(monkeypatch, count, waits, classes):
    monkeypatch.setattr(box_functions, "_waits", lambda _device: waits)
    own_N = (
        torch.zeros(count, dtype=torch.int64) if classes is None else torch.arange(count) % classes
    )
    crowd = box_functions.NmsInput(
        boxes_N4=places(count, step=20.0),
        scores_N=torch.full((count,), 0.5),
        classes_N=None if classes is None else own_N,
        counts=[count],
    )
    (kept,) = box_functions.suppress(crowd, iou=0.5, limit=30)
    assert kept.tolist() == list(range(30))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("waits", [False, True])
def test_of_boxes_of_one_score_and_place_the_first_drops_the_others(monkeypatch, count, waits):
    monkeypatch.setattr(box_functions, "_waits", lambda _device: waits)
    crowd = box_functions.NmsInput(
        boxes_N4=places(1, step=0.0).repeat(count, 1),
        scores_N=torch.full((count,), 0.5),
        classes_N=torch.arange(count) % 2,
        counts=[count],
    )
    (kept,) = box_functions.suppress(crowd, iou=0.5, limit=30)
    assert kept.tolist() == [0, 1]


def test_a_prediction_full_of_ties_repeats_itself_in_every_mode(tiny):
    network = tiny.lively(tiny.network())
    settings = dataclasses.replace(InferenceConfig(), score_threshold=0.0)
    same = np.tile(np.random.default_rng(0).normal(size=tiny.DIMENSIONS), (1500, 1))
    alike = Vocabulary.from_arrays([f"class {n}" for n in range(1500)], same, np.ones(1500, bool))
    blank = torch.full((3, 96, 96), 90, dtype=torch.uint8)
    found = {}
    for mode in MODES:
        with reproducibility_mode(mode):
            runs = [network.detect([blank], alike, settings=settings)[0] for _ in range(3)]
        found[mode] = runs[0]
        assert (runs[0].scores_N.diff() == 0).sum() > 100
        for other in runs[1:]:
            assert torch.equal(other.boxes_N4, runs[0].boxes_N4)
            assert torch.equal(other.classes_N, runs[0].classes_N)
    assert torch.equal(found["off"].boxes_N4, found["strict"].boxes_N4)
    assert torch.equal(found["off"].classes_N, found["strict"].classes_N)


def test_tied_classes_of_the_federated_loss_are_drawn_alike_in_every_mode():
    labels_N, frequency_C = torch.arange(300) % 60, torch.ones(1203)
    drawn = []
    for mode in MODES:
        with reproducibility_mode(mode):
            generator = torch.Generator().manual_seed(3)
            drawn.append(
                choose_categories(
                    labels_N, frequency_C, sampled=50, objects=60, generator=generator
                )
            )
    for columns_K, weights_K in drawn[1:]:
        assert torch.equal(columns_K, drawn[0][0])
        assert torch.equal(weights_K, drawn[0][1])


def test_sums_of_samples_that_share_a_cell_repeat_in_every_mode():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn((1, 8, 20, 20), generator=generator, requires_grad=True)
    # Small regions: all samples of a pooled cell fall on the same few feature cells.
    corner_N2 = torch.rand((50, 2), generator=generator) * 150
    rois_N5 = torch.cat([torch.zeros(50, 1), corner_N2, corner_N2 + 3], dim=1)
    found = []
    for mode in (*MODES, *MODES):
        with reproducibility_mode(mode):
            grid = RegionGrid(side=7, scales=[0.125], sampling_ratio=2)
            pooled = align_regions([maps], rois_N5, torch.zeros(50, dtype=torch.int64), grid)
            (gradient,) = torch.autograd.grad(pooled.square().sum(), [maps])
        found.append((pooled, gradient))
    for pooled, gradient in found[1:]:
        assert torch.equal(pooled, found[0][0])
        assert torch.equal(gradient, found[0][1])
