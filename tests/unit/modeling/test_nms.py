"""Suppression that stops early keeps exactly what the whole one keeps."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.layers import batched_nms
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from proxydet.modeling import boxes as box_functions


def crowd(count: int, seed: int, spread: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * spread
    sides = torch.rand(count, 2, generator=generator) * 60 + 5
    scores = torch.rand(count, generator=generator)
    return torch.cat([corners, corners + sides], dim=1), scores


@pytest.mark.parametrize("limit", [1, 10, 100, 5000])
@pytest.mark.parametrize("spread", [5.0, 300.0])
def test_keep_best_equals_the_whole_suppression(limit, spread):
    boxes, scores = crowd(2000, 0, spread)
    scores, order = scores.sort(descending=True)
    boxes = boxes[order]
    kept = box_functions.keep_best(boxes, scores, 0.7, limit)
    assert kept.tolist() == nms(boxes, scores, 0.7)[:limit].tolist()


def test_keep_best_of_nothing():
    assert box_functions.keep_best(torch.zeros(0, 4), torch.zeros(0), 0.5, 10).tolist() == []


@pytest.mark.parametrize("count", [0, 1, 900, 1000, 1001, 6000])
@pytest.mark.parametrize("limit", [20, 300])
def test_keep_best_by_class_equals_detectron2s(count, limit):
    boxes, scores = crowd(count, 1)
    classes = torch.randint(1200, (count,), generator=torch.Generator().manual_seed(2))
    kept = box_functions.keep_best_by_class(boxes, scores, classes, 0.5, limit)
    assert kept.tolist() == batched_nms(boxes, scores, classes, 0.5)[:limit].tolist()


def test_keep_best_by_class_goes_on_when_the_first_look_yields_too_few():
    # 3000 nearly equal boxes of one class above, the boxes that are wanted below.
    boxes, scores = crowd(3000, 3, spread=0.01)
    boxes[:] = torch.tensor([0.0, 0.0, 50.0, 50.0]) + boxes * 1e-4
    others, _ = crowd(500, 4, spread=2000.0)
    together = torch.cat([boxes, others])
    together_scores = torch.cat([scores + 1, torch.linspace(0.9, 0.1, 500)])
    classes = torch.zeros(3500, dtype=torch.int64)
    kept = box_functions.keep_best_by_class(together, together_scores, classes, 0.5, 50)
    assert kept.tolist() == batched_nms(together, together_scores, classes, 0.5)[:50].tolist()
    assert len(kept) == 50


@given(
    scores=st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9]), max_size=60), count=st.integers(1, 80)
)
def test_the_best_places_are_those_of_a_whole_stable_sort(scores, count):
    scores_N = torch.tensor(scores)
    whole = scores_N.argsort(descending=True, stable=True)
    assert box_functions._best_places(scores_N, count).tolist() == whole[:count].tolist()


def test_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(2000, 1)
    classes = torch.arange(2000)
    kept = box_functions.keep_best_by_class(boxes, torch.linspace(1, 0.1, 2000), classes, 0.5, 300)
    assert kept.tolist() == list(range(300))


def batch(counts: list[int], spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes of several images, some left of and above the image, each image's by descending score."""
    boxes, scores = [], []
    for image, count in enumerate(counts):
        own, own_scores = crowd(count, image, spread)
        own_scores, order = own_scores.sort(descending=True)
        boxes.append(own[order] - 30.0)
        scores.append(own_scores)
    return torch.cat(boxes), torch.cat(scores)


@pytest.mark.parametrize("counts", [[0], [0, 0], [700], [0, 50, 3000, 1, 900, 0]])
@pytest.mark.parametrize("limit", [1, 20, 300])
@pytest.mark.parametrize("spread", [5.0, 300.0])
@pytest.mark.parametrize("with_classes", [False, True])
def test_all_images_at_once_keep_what_each_keeps_alone(
    monkeypatch, counts, limit, spread, with_classes
):
    boxes, scores = batch(counts, spread)
    classes = None
    if with_classes:
        classes = torch.randint(40, (len(boxes),), generator=torch.Generator().manual_seed(2))
    one_by_one, together = (
        _suppress(monkeypatch, waits, boxes, scores, classes, counts, limit)
        for waits in (False, True)
    )
    assert together == one_by_one
    start = 0
    for count, kept in zip(counts, together, strict=True):
        own = slice(start, start + count)
        alone = (
            nms(boxes[own], scores[own], 0.6)
            if classes is None
            else batched_nms(boxes[own], scores[own], classes[own], 0.6)
        )
        assert kept == (start + alone[:limit]).tolist()
        start += count


def test_a_batch_that_would_take_too_much_memory_is_split(monkeypatch):
    counts = [300, 10, 900, 200, 0, 400]
    boxes, scores = batch(counts, 300.0)
    sizes = []

    def watched(boxes, scores, iou):
        sizes.append(len(boxes))
        return nms(boxes, scores, iou)

    monkeypatch.setattr(box_functions, "nms", watched)
    whole = _suppress(monkeypatch, True, boxes, scores, None, counts, 500)
    assert sizes == [sum(counts)]
    monkeypatch.setattr(box_functions, "_TOGETHER_UP_TO", 700)
    sizes.clear()
    assert _suppress(monkeypatch, True, boxes, scores, None, counts, 500) == whole
    assert sizes == [310, 900, 600]


def _suppress(monkeypatch, waits, boxes, scores, classes, counts, limit) -> list[list[int]]:
    monkeypatch.setattr(box_functions, "_waits", lambda _device: waits)
    crowd = box_functions.NmsInput(
        boxes_N4=boxes, scores_N=scores, classes_N=classes, counts=counts
    )
    kept = box_functions.suppress(crowd, iou=0.6, limit=limit)
    return [places.tolist() for places in kept]
