"""Class-wise mixup against a slow version written from the paper, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from proxydet.losses.config import MixupLossConfig
from proxydet.losses.criterion import (
    class_prototypes,
    class_wise_mixup_loss,
    mixup_loss,
    sample_mixing_ratio,
)
from proxydet.modeling.roi_heads import MixupOutput

DIMENSIONS = 5


def regions(labels: list[int], seed: int = 0) -> MixupOutput:
    generator = torch.Generator().manual_seed(seed)
    return MixupOutput(
        embeddings_PD=normalize(torch.randn(len(labels), DIMENSIONS, generator=generator), dim=1),
        labels_P=torch.tensor(labels, dtype=torch.int64),
        classes_K=torch.tensor(labels, dtype=torch.int64).unique(),
        objectness_P=torch.rand(len(labels), generator=generator) * 3,
    )


def slow_prototype(output: MixupOutput, label: int, temperature: float, center: bool) -> np.ndarray:
    rows = [row for row, other in enumerate(output.labels_P.tolist()) if other == label]
    weights = [
        1.0 if center else np.exp(float(output.objectness_P[row]) / temperature) for row in rows
    ]
    total = np.zeros(DIMENSIONS)
    for row, weight in zip(rows, weights, strict=True):
        total += weight / sum(weights) * output.embeddings_PD[row].double().numpy()
    return total / np.linalg.norm(total)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.sampled_from([0.1, 1.0, 5.0]),
    st.booleans(),
)
def test_prototypes_equal_the_slow_ones(labels, temperature, center):
    output = regions(labels)
    config = MixupLossConfig(
        temperature=temperature, prototype="center" if center else "objectness"
    )
    prototypes, classes = class_prototypes(output, config)
    assert classes.tolist() == sorted(set(labels))
    for prototype, label in zip(prototypes, classes.tolist(), strict=True):
        slow = slow_prototype(output, label, temperature, center)
        np.testing.assert_allclose(prototype.numpy(), slow, atol=1e-5)


def test_a_ground_truth_box_makes_up_nearly_all_of_its_class():
    output = regions([2, 2, 2])
    output.objectness_P[1] = 23.0
    prototypes, _ = class_prototypes(output, MixupLossConfig())
    torch.testing.assert_close(prototypes[0], output.embeddings_PD[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_loss_equals_the_slow_one(distance):
    generator = torch.Generator().manual_seed(1)
    visual, text = (normalize(torch.randn(4, 5, generator=generator), dim=1) for _ in range(2))
    permutation = torch.tensor([2, 0, 3, 1])
    loss = mixup_loss(visual, text, permutation, 0.3, distance)
    total = 0.0
    for row in range(4):
        mixed = []
        for table in (visual.double().numpy(), text.double().numpy()):
            sum_ = 0.3 * table[row] + 0.7 * table[permutation[row]]
            mixed.append(sum_ / np.linalg.norm(sum_))
        gap = np.abs(mixed[0] - mixed[1])
        total += (gap if distance == "l1" else gap**2).sum()
    assert float(loss) == pytest.approx(total / 20, rel=1e-5)


def test_equal_tables_have_no_loss_and_other_pairs_would_have():
    table = normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    permutation = torch.tensor([1, 2, 3, 0])
    assert float(mixup_loss(table, table, permutation, 0.4, "l1")) == 0
    other = mixup_loss(table, table[[1, 0, 2, 3]], permutation, 0.4, "l1")
    assert float(other) > 0.05


def test_no_class_in_the_batch_is_zero_and_connected():
    embeddings = torch.zeros(0, DIMENSIONS, requires_grad=True)
    output = MixupOutput(
        embeddings_PD=embeddings,
        labels_P=torch.zeros(0, dtype=torch.int64),
        classes_K=torch.zeros(0, dtype=torch.int64),
        objectness_P=torch.zeros(0),
    )
    loss = class_wise_mixup_loss(
        output, torch.randn(DIMENSIONS, 9), MixupLossConfig(), generator=None
    )
    assert float(loss.detach()) == 0
    loss.backward()
    assert embeddings.grad is not None


def test_a_single_class_mixes_with_itself():
    text = normalize(torch.randn(DIMENSIONS, 9), dim=0)
    output = regions([3, 3])
    loss = class_wise_mixup_loss(output, text, MixupLossConfig(weight=1.0), generator=None)
    prototypes, _ = class_prototypes(output, MixupLossConfig())
    assert float(loss) == pytest.approx(float((prototypes[0] - text[:, 3]).abs().mean()), rel=1e-5)


def test_the_loss_is_weighted_and_follows_the_generator():
    text = normalize(torch.randn(DIMENSIONS, 9, generator=torch.Generator().manual_seed(3)), dim=0)
    output = regions([0, 1, 2, 3, 4, 5])

    def loss(seed: int, weight: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        config = MixupLossConfig(weight=weight)
        return float(class_wise_mixup_loss(output, text, config, generator=generator))

    assert loss(0, 256.0) == pytest.approx(256 * loss(0, 1.0), rel=1e-6)
    assert loss(0, 1.0) == loss(0, 1.0)
    assert len({loss(seed, 1.0) for seed in range(5)}) == 5


def test_the_mixing_ratio_of_a_gpus_generator_is_not_waited_for():
    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, seed: int, offset: int) -> None:
            self._state = torch.tensor([seed, offset]).view(torch.uint8)  # as torch has it there

        def get_state(self) -> torch.Tensor:
            return self._state

    ratios = [sample_mixing_ratio(1.0, OnGpu(seed, place)) for seed in (1, 2) for place in (0, 4)]
    assert ratios[0] == sample_mixing_ratio(1.0, OnGpu(1, 0))
    assert len(set(ratios)) == 4


@pytest.mark.parametrize(("beta", "spread"), [(1.0, 1 / 12), (0.5, 1 / 8), (8.0, 1 / 68)])
def test_the_mixing_ratio_is_beta_distributed(beta, spread):
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([sample_mixing_ratio(beta, generator) for _ in range(3000)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.var() == pytest.approx(spread, rel=0.12)


def test_beta_zero_is_all_or_nothing():
    generator = torch.Generator().manual_seed(0)
    assert {sample_mixing_ratio(0.0, generator) for _ in range(50)} == {0.0, 1.0}
