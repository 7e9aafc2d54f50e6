"""The federated loss: which classes it looks at and what it computes; the box loss."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from hypothesis import given
from hypothesis import strategies as st

from proxydet.losses.criterion import box_loss, choose_categories, federated_loss

CLASSES = 30


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looked_at(columns: torch.Tensor, weights: torch.Tensor) -> list[int]:
    return columns[weights > 0].tolist()


@given(
    st.lists(st.integers(-1, CLASSES), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_all_that_appear_and_others_up_to_the_number(labels, sampled, seed):
    present = {label for label in labels if 0 <= label < CLASSES}
    columns, weights = choose_categories(
        torch.tensor(labels),
        torch.ones(CLASSES),
        sampled=sampled,
        objects=len(present),
        generator=generator(seed),
    )
    chosen = looked_at(columns, weights)
    assert len(set(columns.tolist())) == len(columns)
    assert present <= set(chosen)
    # The background takes one of the places where it appears.
    places = sampled - (CLASSES in labels)
    assert len(chosen) == min(max(places, len(present)), CLASSES)


def test_classes_without_weight_are_never_drawn():
    weights = torch.ones(CLASSES)
    weights[5:] = 0
    columns, kept = choose_categories(
        torch.tensor([20]), weights, sampled=25, objects=1, generator=generator()
    )
    assert sorted(looked_at(columns, kept)) == [0, 1, 2, 3, 4, 20]


def test_zero_looks_at_all():
    columns, weights = choose_categories(
        torch.tensor([3]), torch.zeros(CLASSES), sampled=0, objects=1, generator=None
    )
    assert looked_at(columns, weights) == list(range(CLASSES))


def test_the_draw_is_without_replacement_by_weight():
    # torch.multinomial without replacement is the reference; both draw 3 of 6.
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.5])
    source, counts = generator(), torch.zeros(6)
    rounds = 1500
    for _ in range(rounds):
        columns, kept = choose_categories(
            torch.tensor([6]), weights, sampled=4, objects=0, generator=source
        )
        counts[looked_at(columns, kept)] += 1
    target = torch.zeros(6)
    for row in torch.multinomial(weights.expand(rounds, -1), 3, generator=generator(1)):
        target[row] += 1
    assert (counts - target).abs().max() < 5 * (2 * rounds * 0.25) ** 0.5


def test_the_loss_equals_the_slow_one_over_all_columns():
    labels = torch.tensor([2, CLASSES, 2, 7, -1, CLASSES])
    logits = torch.randn(6, CLASSES, generator=generator())
    chosen = [2, 7, 11, 0]
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        for column in chosen if label >= 0 else ():
            p = 1 / (1 + np.exp(-float(logits[row, column])))
            total -= np.log(p if label == column else 1 - p)
    columns = torch.tensor([*chosen, 20])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    loss = federated_loss(logits[:, columns], labels, columns, weights)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


def test_without_regions_the_loss_is_zero_and_connected():
    logits = torch.zeros(0, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = federated_loss(logits, labels, torch.arange(4), torch.ones(4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None


def test_the_box_loss_equals_detectron2s_deltas():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 25], [1, 1, 4, 9], [0, 0, 0, 0]])
    targets = torch.tensor([[1.0, 2, 9, 12], [4, 4, 33, 22], [0, 0, 5, 5], [0, 0, 0, 0]])
    labels = torch.tensor([3, CLASSES, 0, -1])
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = torch.randn(4, 4, generator=generator(), requires_grad=True)
    loss = box_loss(deltas, boxes, targets, labels, classes=CLASSES, delta_weights=weights)
    target = Box2BoxTransform(weights=weights).get_deltas(boxes[[0, 2]], targets[[0, 2]])
    assert float(loss.detach()) == pytest.approx(
        float((deltas.detach()[[0, 2]] - target).abs().sum()) / 3, rel=1e-5
    )
    loss.backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    assert deltas.grad[[1, 3]].abs().sum() == 0
