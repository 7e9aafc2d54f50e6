"""The checker: proposals of near-equal scores may exchange their places, nothing else may differ; the seed is the file's."""

import numpy as np
import pytest
import tiny_detector as tiny
import torch

from proxydet.detections import Detections
from proxydet.modeling.network import ProxyDetNetwork


@pytest.fixture(scope="module")
def groups(parity):
    return parity("parity_groups")


@pytest.fixture(scope="module")
def network() -> ProxyDetNetwork:
    return tiny.lively(tiny.network())


@pytest.fixture
def fixture(groups, network) -> dict[str, np.ndarray]:
    """What the network itself gives for an image."""
    image = tiny.image(90, 120, 7)  # with two proposals of nearly equal scores
    prediction, arrays = groups.record_inference(network, image)
    found = Detections(prediction, [f"class {row}" for row in range(tiny.CLASSES)])
    pixels = image.permute(1, 2, 0).numpy()
    return {f"eval0.{name}": values.copy() for _, name, values in arrays} | {
        "image0": pixels,
        "image1": pixels,
        "eval0.boxes": found.boxes_xyxy,
        "eval0.scores": found.scores,
        "eval0.classes": found.class_ids,
    }


def failed(groups, network, fixture) -> list[str]:
    rows = list(groups.compare_inference(network, fixture, 0))
    assert len(rows) >= 9
    return [row.group for row in rows if not row.passed]


def of_regions(fixture) -> list[str]:
    return [key for key in fixture if key.startswith(("eval0.proposal", "eval0.pred"))]


def reorder(fixture, rows) -> None:
    for key in of_regions(fixture):
        fixture[key] = fixture[key][rows]


def test_proposals_of_nearly_equal_scores_may_exchange_their_places(groups, network, fixture):
    scores = fixture["eval0.proposal_scores"]
    row = int(np.diff(scores).argmax())
    assert scores[row] - scores[row + 1] < groups.NEAR_EQUAL
    rows = np.arange(len(scores))
    rows[[row, row + 1]] = row + 1, row
    reorder(fixture, rows)
    assert failed(groups, network, fixture) == []


def test_proposals_of_other_scores_may_not(groups, network, fixture):
    scores = fixture["eval0.proposal_scores"]
    row = int(np.diff(scores).argmin())
    rows = np.arange(len(scores))
    rows[[row, row + 1]] = row + 1, row
    reorder(fixture, rows)
    assert "eval0 proposals" in failed(groups, network, fixture)


def test_proposals_in_reverse_order_fail(groups, network, fixture):
    reorder(fixture, np.s_[::-1])
    assert "eval0 proposals" in failed(groups, network, fixture)
    # Nor do the boxes pass where the scores are in order.
    fixture["eval0.proposal_scores"] = fixture["eval0.proposal_scores"][::-1]
    assert "eval0 proposals" in failed(groups, network, fixture)


def test_a_wrong_box_fails_by_its_name(groups, network, fixture):
    fixture["eval0.proposal_boxes"][5] += 30
    assert failed(groups, network, fixture) == ["eval0 proposals"]


def test_values_of_another_region_fail(groups, network, fixture):
    fixture["eval0.pred0.deltas"][[3, 4]] = fixture["eval0.pred0.deltas"][[4, 3]]
    fixture["eval0.proposal_scores"][[0, 30]] = fixture["eval0.proposal_scores"][[30, 0]]
    assert failed(groups, network, fixture) == ["eval0 proposals", "eval0 detection branch, deltas"]


def test_a_missing_proposal_fails(groups, network, fixture):
    reorder(fixture, np.s_[1:])
    assert "eval0 proposals" in failed(groups, network, fixture)


def test_weights_are_made_from_the_files_seed(parity):
    model = parity("parity_model")
    assert model.seed_of({}) == model.SEED
    assert model.seed_of({"seed": np.array(5)}) == 5
    state = {"layer.weight": torch.zeros(4, 4)}
    default, same, other = (
        model.weights_from_names(state, *seed)["layer.weight"] for seed in ((), (model.SEED,), (5,))
    )
    assert torch.equal(default, same)
    assert not torch.equal(default, other)
