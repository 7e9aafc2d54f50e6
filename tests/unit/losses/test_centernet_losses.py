"""CenterNet targets and losses against slow loops written from the description."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxydet.errors import ConfigError
from proxydet.losses.config import CenterNetLossConfig
from proxydet.modeling.centernet import (
    Cells,
    CenterNetOutput,
    centernet_losses,
    centernet_targets,
    giou_of_distances,
    losses_from_targets,
    zero_centernet_losses,
)

RANGES = ((0.0, 20.0), (16.0, 40.0))
CONFIG = CenterNetLossConfig(size_ranges=RANGES)
SHAPES, STRIDES = ((6, 8), (3, 4)), (8, 16)
CELLS = Cells.of_levels(SHAPES, STRIDES, RANGES, torch.device("cpu"))
BIG = 64.0

corner = st.floats(0, 40, width=32)
extent = st.floats(2, 24, width=32)
some_box = st.tuples(corner, corner, extent, extent).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], BIG), min(b[1] + b[3], 48.0)]
)


def all_cells():
    for level, ((height, width), stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
        for row in range(height):
            for column in range(width):
                yield level, stride, column * stride + stride // 2, row * stride + stride // 2


def slow_heat(x: float, y: float, stride: int, box: list[float]) -> float:
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    delta = 0.2 / 1.8
    radius = max(2 * delta**2 * (box[2] - box[0]) * (box[3] - box[1]), 16.0)
    holds = x == cx // stride * stride + stride / 2 and y == cy // stride * stride + stride / 2
    squared = 0.0 if holds else (x - cx) ** 2 + (y - cy) ** 2
    return squared / radius


@settings(max_examples=40)
@given(st.lists(some_box, max_size=4))
def test_targets_equal_the_slow_ones(boxes):
    targets = centernet_targets(torch.tensor(boxes).reshape(-1, 4), CELLS, CONFIG)
    for index, (level, stride, x, y) in enumerate(all_cells()):
        nearness = [slow_heat(x, y, stride, box) for box in boxes]
        heat = max((math.exp(-value) for value in nearness), default=0.0)
        got = float(targets.heatmap_M[index])
        assert got == pytest.approx(heat if heat >= 1e-4 else 0.0, abs=2e-4)
        candidates, on_an_edge = [], False
        for box, near in zip(boxes, nearness, strict=True):
            cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            ccx, ccy = cx // stride * stride + stride / 2, cy // stride * stride + stride / 2
            sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
            half = math.hypot(sides[0] + sides[2], sides[1] + sides[3]) / 2
            low, high = RANGES[level]
            # How far each condition holds; near 0, float32 may decide otherwise.
            around = stride - max(abs(x - ccx), abs(y - ccy))
            margins = (around + 0.5, min(sides), half - low, high - half)
            on_an_edge |= min(map(abs, margins)) < 1e-3
            if min(margins) > 0:
                candidates.append((near, [side / stride for side in sides]))
        if on_an_edge:
            continue
        assert bool(targets.learnt_M[index]) is bool(candidates)
        if candidates:
            best = min(near for near, _ in candidates)
            winners = [sides for near, sides in candidates if near <= best + 1e-3]
            distances = targets.distances_M4[index].tolist()
            assert any(distances == pytest.approx(sides, abs=1e-3) for sides in winners)


def test_a_known_object():
    # 16 x 12 around (20, 18): half diagonal 10, so it is learnt on the first level only.
    targets = centernet_targets(torch.tensor([[12.0, 12.0, 28.0, 24.0]]), CELLS, CONFIG)
    assert targets.positive_GL.tolist() == [[True, False]]
    assert targets.centres_GL.tolist() == [[2 * 8 + 2, 48 + 1 * 4 + 1]]
    assert targets.heatmap_M[18] == 1
    assert targets.heatmap_M[48 + 5] == 1  # on all levels
    learnt = targets.learnt_M.nonzero()[:, 0].tolist()
    # Centres at 12, 20, 28 across and 12, 20 down; strictly inside leaves one of each.
    assert learnt == [18]
    assert targets.distances_M4[18].tolist() == [1.0, 1.0, 1.0, 0.5]


def test_an_object_whose_centre_is_on_the_border_stays_inside():
    targets = centernet_targets(torch.tensor([[60.0, 44.0, 68.0, 52.0]]), CELLS, CONFIG)
    assert targets.centres_GL.tolist() == [[47, 59]]


def test_no_objects():
    targets = centernet_targets(torch.zeros(0, 4), CELLS, CONFIG)
    assert targets.heatmap_M.sum() == 0
    assert not targets.learnt_M.any()
    assert targets.positive_GL.shape == (0, 2)


def test_losses_equal_the_slow_ones():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 60, generator=generator) * 3
    distances = torch.rand(2, 60, 4, generator=generator) * 3
    boxes = [
        torch.tensor([[12.0, 12, 28, 24], [30, 4, 60, 44], [12, 12, 28, 24]]),
        torch.zeros(0, 4),
    ]
    targets = [centernet_targets(image, CELLS, CONFIG) for image in boxes]
    losses = losses_from_targets(logits, distances, targets, CONFIG)
    positive = negative = location = 0.0
    count = cells = 0
    for image, target in enumerate(targets):
        p = logits[image].sigmoid().clamp(1e-4, 1 - 1e-4).double()
        for index, level in target.positive_GL.nonzero().tolist():
            at = p[target.centres_GL[index, level]]
            positive -= 0.25 * float(at.log() * (1 - at) ** 2)
            count += 1
        for cell in range(60):
            if p[cell] < 0.85:
                fade = (1 - float(target.heatmap_M[cell])) ** 4
                negative -= 0.75 * float((1 - p[cell]).log() * p[cell] ** 2) * fade
            if target.learnt_M[cell]:
                location += slow_giou(distances[image, cell], target.distances_M4[cell])
                cells += 1
    assert count == 3  # an object that is there twice counts twice
    assert float(losses["loss_centernet_agn_pos"]) == pytest.approx(
        0.5 * positive / count, rel=1e-4
    )
    assert float(losses["loss_centernet_agn_neg"]) == pytest.approx(
        0.5 * negative / count, rel=1e-4
    )
    assert float(losses["loss_centernet_loc"]) == pytest.approx(location / cells, rel=1e-4)


def slow_giou(first: torch.Tensor, second: torch.Tensor) -> float:
    (l1, t1, r1, b1), (l2, t2, r2, b2) = first.tolist(), second.tolist()
    shared = (min(l1, l2) + min(r1, r2)) * (min(t1, t2) + min(b1, b2))
    union = (l1 + r1) * (t1 + b1) + (l2 + r2) * (t2 + b2) - shared
    hull = (max(l1, l2) + max(r1, r2)) * (max(t1, t2) + max(b1, b2))
    return 1 - ((shared + 1) / (union + 1) - (hull - union) / hull)


def test_giou_of_equal_and_of_empty_boxes():
    some = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(giou_of_distances(some, some)) == 0
    empty = torch.zeros(4, requires_grad=True)
    loss = giou_of_distances(empty, torch.zeros(4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


def test_as_many_ranges_as_levels(tiny):
    network = tiny.network().train()
    output = network(tiny.box_batch())
    with pytest.raises(ConfigError, match="size_ranges has 5 entries for 4"):
        centernet_losses(output.centernet, output.truth, CenterNetLossConfig())


def test_the_silent_losses_are_zero_with_a_zero_gradient():
    heatmap = torch.randn(1, 1, 2, 2, requires_grad=True)
    distances = torch.rand(1, 4, 2, 2, requires_grad=True)
    output = CenterNetOutput(heatmaps=(heatmap,), distances=(distances,), strides=(8,))
    losses = zero_centernet_losses(output)
    assert len(losses) == 3
    torch.stack(list(losses.values())).sum().backward()
    assert heatmap.grad is not None
    assert distances.grad is not None
    assert heatmap.grad.abs().sum() == distances.grad.abs().sum() == 0
