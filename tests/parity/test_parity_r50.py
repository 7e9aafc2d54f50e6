"""The full-size detector gives the recorded numbers: every stage of inference, losses, gradients."""

import json
from pathlib import Path

import numpy as np
import pytest

from proxydet.modeling import boxes as box_functions

KIND = "r50"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"


@pytest.fixture(scope="module")
def network(parity):
    base = parity("parity_trim").base_classes(FIXTURES)
    return parity("parity_model").network_of(KIND, base)


def test_state_dict_has_the_published_names_shapes_and_types(network):
    published = json.loads((FIXTURES / f"state_dict_{KIND}.json").read_text())
    ours = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in network.state_dict().items()
    }
    unused = {name for name in published if ".base.fc." in name}
    assert ours == {name: entry for name, entry in published.items() if name not in unused}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("prepared", [False, True])
def test_inference(network, parity, numbers, index, prepared, monkeypatch):
    # A GPU suppresses a batch in one call; the second image goes that way.
    monkeypatch.setattr(box_functions, "_waits", lambda _device: index == 1)
    groups, trim = parity("parity_groups"), parity("parity_trim").trim
    used = network.prepared() if prepared else network
    rows = list(groups.compare_inference(used, numbers(f"parity_{KIND}"), index, trim))
    # The second image's fixture holds its detections only.
    assert len(rows) == (11 if index == 0 else 2)
    assert [row for row in rows if not row.passed] == []


def test_an_own_vocabulary_is_looked_for_and_leaves_no_trace(network, parity, numbers):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = list(parity("parity_groups").compare_vocabulary(network, numbers(f"parity_{KIND}")))
    assert len(rows) == 2
    assert [row for row in rows if not row.passed] == []
    after = network.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_losses_and_gradients(network, parity, numbers):
    rows = list(parity("parity_groups").compare_training(network, numbers(f"parity_{KIND}")))
    assert len(rows) == 6
    assert [row for row in rows if not row.passed] == []


@pytest.mark.slow
def test_trajectory_of_four_steps(network, parity, numbers):
    # The last test of this file: it changes the weights.
    groups, trim = parity("parity_groups"), parity("parity_trim").trim
    images, trajectory = numbers("parity_r50"), numbers("parity_trajectory")
    rows = list(groups.compare_trajectory(network, images, trajectory, trim))
    assert len(rows) == 5
    assert [row for row in rows if not row.passed] == []
