"""timm's backbones and networks at Python paths: maps, norms, weights, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from proxydet.errors import CheckpointError, ConfigError
from proxydet.modeling.backbone import build_backbone
from proxydet.modeling.config import BackboneConfig, CascadeConfig, PyramidConfig, ResNetConfig
from proxydet.modeling.weights import load_weights
from proxydet.weight_files import write_safetensors

PYRAMID = PyramidConfig(levels=(3, 4, 5), extra_levels=0, channels=8)
timm = pytest.importorskip("timm")


def timm_config(name: str, **changes: object) -> BackboneConfig:
    return BackboneConfig(kind="timm", timm=name, **changes)


def detector(tiny, backbone: BackboneConfig):
    return tiny.network(tiny.model_config(backbone=backbone))


@pytest.fixture
def own(monkeypatch):
    """A module of networks, as a user's would be."""
    module = types.ModuleType("own_networks")

    class Network(nn.Module):
        pixel_mean, pixel_std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)

        def __init__(self, channels=8, claimed=8, strides=(8, 16, 32), inner=False):
            super().__init__()
            self.channels, self.strides = (claimed,) * len(strides), strides
            self.convs = nn.ModuleList(nn.Conv2d(3, channels, s, stride=s) for s in (8, 16, 32))
            self.norm, self.inner = nn.BatchNorm2d(channels), inner

        def forward(self, images):
            maps = [self.norm(conv(images)) for conv in self.convs]
            return [found.permute(0, 2, 3, 1) for found in maps] if self.inner else maps

    class Head(nn.Module):
        def __init__(self, channels, pool_size, features, wrong=0):
            super().__init__()
            self.linear = nn.Linear(channels, features + wrong)

        def forward(self, pooled):
            return self.linear(pooled.mean(dim=(2, 3)))

    for thing in (Network, Head):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
    module.not_a_module = lambda: 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_resnet"])
def test_maps_of_a_timm_model_have_the_pyramids_sizes(name):
    network = build_backbone(timm_config(name), PYRAMID)
    maps = network(torch.zeros(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "p3": (2, 8, 8, 12),
        "p4": (2, 8, 4, 6),
        "p5": (2, 8, 2, 3),
    }


def test_later_stages_than_those_in_use_are_not_made():
    whole = build_backbone(timm_config("test_resnet"), PYRAMID)
    short = build_backbone(timm_config("test_resnet"), PyramidConfig(levels=(3, 4), channels=8))
    count = [sum(p.numel() for p in n.bottom_up.parameters()) for n in (short, whole)]
    assert count[0] < count[1]


def test_pixel_statistics_are_those_that_timm_states(tiny):
    mean, std = detector(tiny, timm_config("tf_efficientnet_lite0")).pixel_mean, (127.5,) * 3
    assert tuple(mean.flatten().tolist()) == std
    given = tiny.model_config(backbone=timm_config("test_resnet"), pixel_mean=(1.0, 2.0, 3.0))
    assert tuple(tiny.network(given).pixel_mean.flatten().tolist()) == (1.0, 2.0, 3.0)
    assert tiny.network().pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_stay_as_they_are(frozen):
    network = build_backbone(timm_config("test_efficientnet", frozen_norms=frozen), PYRAMID).train()
    norms = [m for m in network.bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    network(torch.randn(2, 3, 64, 64))["p3"].sum().backward()
    assert norms
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) is frozen
        assert (norm.weight.grad is None) is frozen


def kept_for_backward(network, images):
    """Return how many bytes a forward pass keeps, and the gradients of the weights."""
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = sum(maps.square().sum() for maps in network(images).values())
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in network.named_parameters()}


@pytest.mark.parametrize("name", ["resnet", "test_resnet", "test_efficientnet"])
def test_a_frozen_norm_keeps_no_map_and_computes_as_torchs(name):
    config = BackboneConfig(resnet=ResNetConfig(width=8, depths=(1, 1, 1, 1)))
    config = config if name == "resnet" else timm_config(name, frozen_norms=True)
    network = build_backbone(config, PYRAMID).train().bottom_up
    plain = copy.deepcopy(network)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
        act = getattr(norm, "act", None)
        norm.__class__ = nn.BatchNorm2d if act is None else timm.layers.BatchNormAct2d
        norm.eval()
    network.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    less, gradients = kept_for_backward(network, images)
    most, expected = kept_for_backward(plain, images)
    assert norms
    assert less < 0.8 * most
    for parameter, gradient in expected.items():
        if gradient is None:
            assert gradients[parameter] is None
        else:
            assert torch.equal(gradients[parameter], gradient), parameter


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ({"timm": "resnet5O"}, "Did you mean"),
        ({"timm": "test_vit"}, "strides 16, 16"),
        ({"timm": "test_resnet", "options": {"no_such_option": 1}}, "no_such_option"),
        ({"timm": "test_resnet", "options": {"pretrained": True}}, "not downloaded"),
    ],
)
def test_timm_models_that_cannot_be_used(backbone, reason):
    with pytest.raises(ConfigError, match=r"model\.backbone") as caught:
        build_backbone(BackboneConfig(kind="timm", **backbone), PYRAMID)
    assert reason in caught.value.message


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_classification_weights_of_timm_are_loaded_and_their_head_left_out(tiny, tmp_path, name):
    torch.manual_seed(3)
    whole = timm.create_model(name)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, whole.state_dict(), {})
    network = detector(tiny, timm_config(name))
    report = load_weights(network, path)
    stem = next(iter(whole.state_dict().values()))
    assert torch.equal(next(iter(network.backbone.bottom_up.base.state_dict().values())), stem)
    assert any("head" in n or "classifier" in n for n in report.unexpected)
    assert not any(n.startswith("backbone.bottom_up.") for n in report.missing)


def test_weights_under_other_names_are_taken_in_order(tiny, tmp_path, caplog):
    whole = timm.create_model("test_efficientnet").state_dict()
    renamed = {f"part{i}.{name.rpartition('.')[2]}": v for i, (name, v) in enumerate(whole.items())}
    path = tmp_path / "ported.pth"
    torch.save(renamed, path)
    network = detector(tiny, timm_config("test_efficientnet"))
    load_weights(network, path)
    assert "order" in caplog.text
    for name, value in network.backbone.bottom_up.base.state_dict().items():
        assert torch.equal(value, whole[name]) or name.endswith("num_batches_tracked")
    swapped = list(renamed.items())
    swapped[1], swapped[2] = swapped[2], swapped[1]  # a BatchNorm's weight and bias
    torch.save(dict(swapped), path)
    with pytest.raises(CheckpointError, match="ported"):
        load_weights(network, path)


def test_weights_of_another_network_are_refused_by_name(tiny, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    network = detector(tiny, timm_config("test_efficientnet"))
    before = {n: v.clone() for n, v in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="blocks"):
        load_weights(network, path)
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())


@pytest.mark.parametrize("inner", [False, True])
def test_a_network_of_ones_own(tiny, own, inner):
    options = {"inner": inner}
    backbone = BackboneConfig(kind="own_networks:Network", options=options, frozen_norms=True)
    network = detector(tiny, backbone)
    assert network.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert network.pixel_std.flatten().tolist() == [4.0, 5.0, 6.0]
    assert not network.train().backbone.bottom_up.base.norm.training
    (found,) = network.eval().detect([tiny.image(64, 96)])
    assert len(found.scores_N) >= 0


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("own_networks:Netwrok", {}, "Did you mean 'Network'"),
        ("own_networks:not_a_module", {}, "must make a torch.nn.Module"),
        ("own_networks:Network", {"claimed": 4}, "(1, 4, 12, 16)"),
        ("own_networks:Network", {"strides": "x"}, "must make a torch.nn.Module"),
        ("own_networks:Network", {"channels": 0}, "raised"),
        ("no_networks:Network", {}, "no module no_networks"),
    ],
)
def test_networks_that_cannot_be_used(own, kind, options, reason):
    with pytest.raises(ConfigError, match=r"model\.backbone\.kind") as caught:
        build_backbone(BackboneConfig(kind=kind, options=options), PYRAMID)
    assert reason in caught.value.message


def test_a_kind_that_is_none():
    with pytest.raises(ConfigError, match="Did you mean 'swin'"):
        BackboneConfig(kind="swim")


def test_a_box_head_of_ones_own(tiny, own):
    cascade = dataclasses.replace(tiny.model_config().cascade, box_head="own_networks:Head")
    network = tiny.network(tiny.model_config(cascade=cascade))
    assert {type(head) for head in network.roi_heads.box_head_cmm} == {own.Head}
    network.detect([tiny.image(64, 96)])
    wrong = dataclasses.replace(cascade, box_head_options={"wrong": 1})
    with pytest.raises(ConfigError, match=r"model\.cascade\.box_head.*33"):
        tiny.network(tiny.model_config(cascade=wrong))
    with pytest.raises(ConfigError, match=r"cascade\.box_head"):
        CascadeConfig(box_head=str(Path("heads.py")))
