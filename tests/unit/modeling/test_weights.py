"""Loading weights: what fits, what is explained, what is refused; the network is untouched on any error."""

from __future__ import annotations

import os
import pickle
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proxydet.errors import CheckpointError
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.weights import MIXUP_BRANCH, load_weights, weights_digest

RESNET = "backbone.bottom_up.base."


class Harm:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture
def source(tiny) -> dict[str, torch.Tensor]:
    return tiny.network(seed=1).state_dict()


@pytest.fixture
def network(tiny):
    return tiny.network(seed=2)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def equal(network: ProxyDetNetwork, source: dict[str, torch.Tensor], part: str = "") -> bool:
    state = network.state_dict()
    return all(torch.equal(state[name], value) for name, value in source.items() if part in name)


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_whole_detector(network, source, tmp_path, key):
    content = source if key is None else {key: source, "iteration": np.float64(3), "epoch": 2}
    report = load_weights(network, saved(tmp_path / "w.pth", content))
    assert equal(network, source)
    assert report.loaded == len(source)
    assert report.missing == report.unexpected == report.mismatched == report.ignored == ()


def test_parameters_saved_from_a_distributed_wrapper(network, source, tmp_path):
    wrapped = {f"module.{name}": value for name, value in source.items()}
    load_weights(network, saved(tmp_path / "w.pth", wrapped))
    assert equal(network, source)


def test_an_old_pickle_of_arrays(network, source, tmp_path):
    arrays = {name: value.numpy() for name, value in source.items()}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}, protocol=2))
    load_weights(network, path)
    assert equal(network, source)


def test_a_mask_head_is_not_used_by_a_network_without_one(tiny, source, tmp_path):
    path = saved(tmp_path / "w.pth", source)
    network = tiny.network(tiny.model_config(masks=None), seed=2)
    report = load_weights(network, path)
    assert report.ignored
    assert all(name.startswith("roi_heads.mask_head.") for name in report.ignored)
    assert report.unexpected == report.missing == ()
    path = saved(tmp_path / "boxes.pth", network.state_dict())
    with pytest.raises(CheckpointError, match=r"missing \(roi_heads\.mask_head\.") as caught:
        load_weights(tiny.network(), path)
    assert "model.masks" in str(caught.value.hint)
    load_weights(tiny.network(), path, expect=("roi_heads.mask_head.",))


def test_published_names_without_a_use_are_ignored(network, source, tmp_path):
    extra = {f"{RESNET}fc.weight": torch.zeros(2, 2), "pixel_mean": torch.zeros(3, 1, 1)}
    report = load_weights(network, saved(tmp_path / "w.pth", {**source, **extra}))
    assert report.ignored == (f"{RESNET}fc.weight", "pixel_mean")
    assert "2 not used" in str(report)


def test_a_boxsup_checkpoint_starts_a_training_and_nothing_else(network, source, tmp_path):
    before = network.state_dict()["roi_heads.box_head_cmm.2.fc1.weight"].clone()
    boxsup = {name: value for name, value in source.items() if "_cmm" not in name}
    path = saved(tmp_path / "w.pth", boxsup)
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_weights(network, path)
    assert "mixup" in str(caught.value.hint)
    report = load_weights(network, path, expect=MIXUP_BRANCH)
    assert equal(network, boxsup)
    assert torch.equal(network.state_dict()["roi_heads.box_head_cmm.2.fc1.weight"], before)
    assert all("_cmm" in name for name in report.missing)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_an_unexplained_name_is_an_error(network, source, tmp_path, change):
    name = "roi_heads.mask_head.predictor.weight"
    if change == "missing":
        del source[name]
    elif change == "unexpected":
        name = "roi_heads.surprise"
        source[name] = torch.zeros(1)
    else:
        source[name] = torch.zeros(80, 16, 1, 1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path = saved(tmp_path / "w.pth", source)
    with pytest.raises(CheckpointError, match=name):
        load_weights(network, path)
    assert equal(network, before)
    report = load_weights(network, path, expect=["roi_heads.mask_head.predict", "*.surprise"])
    label = "mismatched" if change == "shape" else change
    assert getattr(report, label) == (name,)


def test_weights_for_other_classes(network, tiny, tmp_path):
    other = tiny.vocabulary(seed=9)
    path = saved(tmp_path / "w.pth", ProxyDetNetwork(tiny.model_config(), other).state_dict())
    with pytest.raises(CheckpointError, match="other classes: 6 of 6"):
        load_weights(network, path)
    own = network.class_table().text_DC1.clone()
    load_weights(network, path, vocabulary="keep")
    assert torch.equal(network.class_table().text_DC1, own)


def test_weights_for_another_number_of_classes(network, tiny, tmp_path):
    source = tiny.network(classes=4).state_dict()
    path = saved(tmp_path / "w.pth", source)
    with pytest.raises(CheckpointError, match="trained for 4 classes"):
        load_weights(network, path)
    report = load_weights(network, path, vocabulary="keep")
    assert equal(network, source, "linear")
    assert len(report.ignored) == 12


def test_embeddings_stored_in_half_precision_are_the_same_classes(network, source, tmp_path):
    for name in source:
        if name.endswith("zs_weight"):
            source[name] = source[name].half().float()
    load_weights(network, saved(tmp_path / "w.pth", source))
    assert equal(network, source)


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_a_classification_backbone(tiny, tmp_path, kind):
    config = tiny.model_config(kind)
    prefix = RESNET if kind == "resnet" else "backbone.bottom_up."
    source = tiny.network(config, seed=1).state_dict()
    backbone = {
        name.removeprefix(prefix): value
        for name, value in source.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith("norm")
    }
    surplus = {"fc.weight": torch.zeros(2, 2)}
    if kind == "swin":
        names = ("norm.weight", "head.weight", "layers.0.blocks.1.attn_mask")
        surplus = {name: torch.zeros(2) for name in names}
    network = tiny.network(config, seed=2)
    load_weights(network, saved(tmp_path / "w.pth", {"state_dict": {**backbone, **surplus}}))
    assert equal(network, {prefix + name: value for name, value in backbone.items()})


def test_a_classification_backbone_with_a_hole(tiny, tmp_path):
    source = tiny.network(seed=1).state_dict()
    backbone = {
        name.removeprefix(RESNET): value for name, value in source.items() if RESNET in name
    }
    del backbone["conv1.weight"]
    with pytest.raises(CheckpointError, match=f"{RESNET}conv1.weight"):
        load_weights(tiny.network(), saved(tmp_path / "w.pth", backbone))


@pytest.mark.parametrize(("prefix", "nested"), [("detector.", False), ("student.net.", True)])
def test_an_unknown_prefix_is_named_with_a_command_that_strips_it(
    network, source, tmp_path, monkeypatch, prefix, nested
):
    content = {prefix + name: value for name, value in source.items()}
    if nested:
        content = {prefix.removesuffix("."): source, "epoch": 3}
    path = saved(tmp_path / "with a blank.pth", content)
    with pytest.raises(CheckpointError, match=repr(prefix)) as caught:
        load_weights(network, path)
    hint = caught.value.hint or ""
    assert "state_dict" in hint
    python, flag, code, *arguments = shlex.split(hint.partition("to strip it: ")[2])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", [flag, *arguments])
    exec(code, {})
    load_weights(network, tmp_path / "with a blank_plain.pth")
    assert equal(network, source)


def test_two_unknown_containers_are_both_named(network, source, tmp_path):
    path = saved(tmp_path / "w.pth", {"student": source, "teacher": source})
    with pytest.raises(CheckpointError, match=r"(?s)student.*teacher"):
        load_weights(network, path)


def test_weights_of_something_else(network, tmp_path):
    path = saved(tmp_path / "w.pth", {"encoder.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"unexpected \(encoder.weight\)"):
        load_weights(network, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(network, source, tmp_path, value):
    source["roi_heads.box_head.0.fc1.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"not finite: roi_heads\.box_head\.0\.fc1\.bias"):
        load_weights(network, saved(tmp_path / "w.pth", source))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_file_that_would_run_code_is_refused(network, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"model": {"a": Harm()}}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Harm()}))
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(network, path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"PK\x03\x04 truncated", b"\x80\x02}q\x00"]
)
def test_a_damaged_file(network, tmp_path, content, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_weights(network, path)
    # What torch says of a pickle it refuses advises to load it without its guard.
    assert "weights_only" not in str(caught.value)
    assert not str(caught.value).endswith(("101", "104"))


def test_a_pickle_that_runs_code_is_refused_without_advice_to_run_it(
    network, tmp_path, monkeypatch, recwarn
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"model": Harm()}, protocol=4))
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, path)
    assert "weights_only" not in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "harmed").exists()
    assert not recwarn.list


def test_a_truncated_file(network, source, tmp_path):
    path = saved(tmp_path / "w.pth", source)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(network, path)


def test_no_file_and_no_parameters(network, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        load_weights(network, tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="no parameters"):
        load_weights(network, saved(tmp_path / "w.pth", {"iteration": 3}))
    with pytest.raises(CheckpointError, match="no parameters"):
        load_weights(network, saved(tmp_path / "l.pth", [torch.zeros(2)]))


def test_the_digest_is_of_the_weights(tiny):
    first, same, other = (tiny.network(seed=seed) for seed in (0, 0, 1))
    assert weights_digest(first) == weights_digest(same) != weights_digest(other)
