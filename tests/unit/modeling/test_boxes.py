"""Boxes: overlap against a slow loop, deltas that undo each other, clipping, cell centres."""

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.structures import pairwise_iou as reference_iou
from hypothesis import given
from hypothesis import strategies as st

from proxydet.modeling import boxes as box_functions

coordinate = st.floats(0, 500, width=32)
side = st.floats(0.125, 300, width=32)
box = st.tuples(coordinate, coordinate, side, side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@given(st.lists(box, min_size=1, max_size=5), st.lists(box, min_size=1, max_size=5))
def test_overlap_equals_detectron2s(first, second):
    ours = box_functions.pairwise_iou(torch.tensor([first]), torch.tensor([second]))[0]
    theirs = reference_iou(Boxes(torch.tensor(first)), Boxes(torch.tensor(second)))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_overlap_of_an_empty_box_is_zero_not_nan():
    empty = torch.zeros(1, 1, 4)
    assert box_functions.pairwise_iou(empty, empty).item() == 0


@given(box, box)
def test_deltas_turn_one_box_into_the_other(first, second):
    boxes, targets = torch.tensor([first]), torch.tensor([second])
    deltas = box_functions.deltas_between(boxes, targets, WEIGHTS)
    if deltas[0, 2:].max() < 4 * WEIGHTS[2]:  # below the clamp on growth
        back = box_functions.apply_deltas(deltas, boxes, WEIGHTS)
        torch.testing.assert_close(back, targets, atol=2e-2, rtol=1e-3)


@given(box, st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4))
def test_deltas_are_applied_as_detectron2_does(first, changes):
    boxes, deltas = torch.tensor([first]), torch.tensor([changes])
    theirs = Box2BoxTransform(weights=WEIGHTS).apply_deltas(deltas, boxes)
    ours = box_functions.apply_deltas(deltas, boxes, WEIGHTS)
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-4)


def test_clipping_uses_each_images_own_size():
    boxes = torch.tensor([[[-5.0, -5.0, 300.0, 300.0]], [[10.0, 20.0, 30.0, 300.0]]])
    sizes = torch.tensor([[100.0, 200.0], [50.0, 20.0]])
    clipped = box_functions.clip(boxes, sizes[:, None])
    assert clipped.tolist() == [[[0, 0, 200, 100]], [[10, 20, 20, 50]]]


@pytest.mark.parametrize(
    ("corners", "solid"),
    [([0, 0, 1, 1], True), ([0, 0, 0, 1], False), ([0, 1, 1, 1], False), ([2, 0, 1, 1], False)],
)
def test_nonempty(corners, solid):
    assert bool(box_functions.nonempty(torch.tensor(corners))) is solid


def test_cell_centres_go_row_by_row():
    centres = box_functions.cell_centres(2, 3, 8, torch.device("cpu"))
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
