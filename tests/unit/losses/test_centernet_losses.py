"""CenterNet targets and losses against slow loops written from the description."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proxydet.errors import ConfigError
from proxydet.losses.config import CenterNetLossConfig
from proxydet.modeling import centernet
from proxydet.modeling.centernet import (
    Cells,
    centernet_losses,
    centernet_targets,
    giou_of_distances,
    losses_from_targets,
    zero_centernet_losses,
    zero_with_gradient,
)

RANGES = ((0.0, 20.0), (16.0, 40.0))
CONFIG = CenterNetLossConfig(size_ranges=RANGES)
SHAPES, STRIDES = ((6, 8), (3, 4)), (8, 16)
CELLS = Cells.of_levels(SHAPES, STRIDES, RANGES, torch.device("cpu"))
BIG = 64.0


def targets_of(*images):
    """Return the targets of images with these boxes, padded to as many as the fullest image has."""
    most = max(len(boxes) for boxes in images)
    boxes_BG4 = torch.full((len(images), most, 4), 7.0)
    valid_BG = torch.zeros(len(images), most, dtype=torch.bool)
    for image, boxes in enumerate(images):
        boxes_BG4[image, : len(boxes)] = torch.tensor(boxes).reshape(-1, 4)
        valid_BG[image, : len(boxes)] = True
    return centernet_targets(boxes_BG4, valid_BG, CELLS, CONFIG)


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor which is made in it has."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))]
        )
        return found


def test_many_objects_do_not_take_much_memory():
    shapes, strides = ((80, 80), (40, 40), (20, 20)), (8, 16, 32)
    cells = Cells.of_levels(shapes, strides, (*RANGES, (32.0, 1e8)), torch.device("cpu"))
    boxes_BG4 = torch.tensor([[100.0, 100.0, 140.0, 150.0]]).expand(8, 200, 4)
    with Largest() as largest:
        centernet_targets(boxes_BG4, torch.ones(8, 200, dtype=torch.bool), cells, CONFIG)
    assert largest.elements <= 2**22


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
    # Next to an image with more objects, so that this one is padded.
    targets = targets_of(boxes, [[1.0, 1.0, 30.0, 30.0]] * 5)
    for index, (level, stride, x, y) in enumerate(all_cells()):
        nearness = [slow_heat(x, y, stride, box) for box in boxes]
        heat = max((math.exp(-value) for value in nearness), default=0.0)
        got = float(targets.heatmap_BM[0, index])
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
        assert bool(targets.learnt_BM[0, index]) is bool(candidates)
        if candidates:
            best = min(near for near, _ in candidates)
            winners = [sides for near, sides in candidates if near <= best + 1e-3]
            distances = targets.distances_BM4[0, index].tolist()
            assert any(distances == pytest.approx(sides, abs=1e-3) for sides in winners)


def test_a_known_object():
    # 16 x 12 around (20, 18): half diagonal 10, so it is learnt on the first level only.
    targets = targets_of([[12.0, 12.0, 28.0, 24.0]])
    assert targets.positive_BGL.tolist() == [[[True, False]]]
    assert targets.centres_BGL.tolist() == [[[2 * 8 + 2, 48 + 1 * 4 + 1]]]
    assert targets.heatmap_BM[0, 18] == 1
    assert targets.heatmap_BM[0, 48 + 5] == 1  # on all levels
    learnt = targets.learnt_BM[0].nonzero()[:, 0].tolist()
    # Centres at 12, 20, 28 across and 12, 20 down; strictly inside leaves one of each.
    assert learnt == [18]
    assert targets.distances_BM4[0, 18].tolist() == [1.0, 1.0, 1.0, 0.5]


def test_an_object_whose_centre_is_on_the_border_stays_inside():
    assert targets_of([[60.0, 44.0, 68.0, 52.0]]).centres_BGL.tolist() == [[[47, 59]]]


@pytest.mark.parametrize("others", [[], [[[1.0, 1.0, 30.0, 30.0]]]])
def test_no_objects(others):
    targets = targets_of([], *others)
    assert targets.heatmap_BM[0].sum() == 0
    assert not targets.learnt_BM[0].any()
    assert targets.distances_BM4[0].sum() == 0
    assert not targets.positive_BGL[0].any()
    assert targets.positive_BGL.shape == (1 + len(others), len(others), 2)


def test_what_an_image_learns_does_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    images = [[[12.0, 12, 28, 24], [30, 4, 60, 44]], [], [[2.0, 3, 50, 40]]]
    together = targets_of(*images)
    monkeypatch.setattr(centernet, "_PAIRS_AT_ONCE", 1)
    apart = targets_of(*images)
    for name, value in vars(together).items():
        assert torch.equal(value, getattr(apart, name)), name


def test_losses_equal_the_slow_ones():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 60, generator=generator) * 3
    distances = torch.rand(2, 60, 4, generator=generator) * 3
    targets = targets_of([[12.0, 12, 28, 24], [30, 4, 60, 44], [12, 12, 28, 24]], [])
    losses = losses_from_targets(logits, distances, targets, CONFIG)
    positive = negative = location = 0.0
    count = cells = 0
    for image in range(2):
        p = logits[image].sigmoid().clamp(1e-4, 1 - 1e-4).double()
        for index, level in targets.positive_BGL[image].nonzero().tolist():
            at = p[targets.centres_BGL[image, index, level]]
            positive -= 0.25 * float(at.log() * (1 - at) ** 2)
            count += 1
        for cell in range(60):
            if p[cell] < 0.85:
                fade = (1 - float(targets.heatmap_BM[image, cell])) ** 4
                negative -= 0.75 * float((1 - p[cell]).log() * p[cell] ** 2) * fade
            if targets.learnt_BM[image, cell]:
                location += slow_giou(distances[image, cell], targets.distances_BM4[image, cell])
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
    weight, frozen = torch.randn(2, 3, requires_grad=True), torch.ones(2)
    losses = zero_centernet_losses(zero_with_gradient([frozen, weight]))
    assert [float(loss.detach()) for loss in losses.values()] == [0, 0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 3))
    assert frozen.grad is None
    assert not zero_with_gradient([frozen]).requires_grad
