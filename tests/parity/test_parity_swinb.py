"""The full-size detector gives the recorded numbers: every stage of inference, losses, gradients."""

import json
from pathlib import Path

import pytest

KIND = "swinb"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"

pytestmark = pytest.mark.slow


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
def test_inference(network, parity, numbers, index):
    groups, trim = parity("parity_groups"), parity("parity_trim").trim
    rows = list(groups.compare_inference(network, numbers(f"parity_{KIND}"), index, trim))
    # The second image's fixture holds its detections only.
    assert len(rows) == (11 if index == 0 else 2)
    assert [row for row in rows if not row.passed] == []


def test_inference_with_an_own_vocabulary(network, parity, numbers):
    rows = list(parity("parity_groups").compare_vocabulary(network, numbers(f"parity_{KIND}")))
    assert len(rows) == 2
    assert [row for row in rows if not row.passed] == []


def test_losses_and_gradients(network, parity, numbers):
    rows = list(parity("parity_groups").compare_training(network, numbers(f"parity_{KIND}")))
    assert len(rows) == 6
    assert [row for row in rows if not row.passed] == []
