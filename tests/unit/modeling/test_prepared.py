"""The copy that inference runs: folded norms, nothing of the network itself changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from proxydet.errors import ConfigError
from proxydet.modeling.config import BackboneConfig, InferenceConfig, ResNetConfig
from proxydet.modeling.network import ProxyDetNetwork, fold_norms, usable_precision

LOW = InferenceConfig(score_threshold=0.0)


def with_statistics(network: ProxyDetNetwork) -> ProxyDetNetwork:
    """Give every BatchNorm statistics and affine of its own."""
    source = torch.Generator().manual_seed(5)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            for values in (norm.running_mean, norm.bias):
                values.data.copy_(0.3 * torch.randn(values.shape, generator=source))
            for values in (norm.running_var, norm.weight):
                values.data.copy_(0.5 + torch.rand(values.shape, generator=source))
    return network.eval()


def of_kind(tiny, kind: str) -> ProxyDetNetwork:
    backbone = tiny.model_config(kind).backbone
    if kind == "timm":
        backbone = BackboneConfig(kind="timm", timm="test_resnet")
    elif kind == "resnet":
        sizes = ResNetConfig(depths=(1, 2, 1, 1), width=8, block="bottleneck", norm="frozen_bn")
        backbone = dataclasses.replace(backbone, resnet=sizes)
    return with_statistics(tiny.lively(tiny.network(tiny.model_config(backbone=backbone))))


@pytest.mark.parametrize(("kind", "norms"), [("resnet", True), ("timm", True), ("swin", False)])
def test_a_prepared_network_finds_the_same(tiny, kind, norms):
    network = of_kind(tiny, kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prepared = network.prepared()
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, maps = network.backbone(image), prepared.backbone(image)
    for name, values in wanted.items():
        assert (maps[name] - values).abs().max() <= 1e-5 * values.abs().max()
    assert any(isinstance(part, _BatchNorm) for part in network.modules()) == norms
    assert not any(isinstance(part, _BatchNorm) for part in prepared.modules())
    image = tiny.image(64, 96)
    for one, two in zip(
        network.detect([image], settings=LOW), prepared.detect([image], settings=LOW), strict=True
    ):
        torch.testing.assert_close(one.scores_N, two.scores_N, rtol=0, atol=1e-4)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_prepared_network_shares_what_stays_and_is_neither_trained_nor_saved(tiny):
    network = tiny.lively(tiny.network())
    prepared = network.prepared()
    assert prepared.roi_heads.box_head[0].fc1.weight is network.roi_heads.box_head[0].fc1.weight
    assert prepared.vocabulary is network.vocabulary
    with pytest.raises(RuntimeError, match="prepared"):
        prepared.train()
    with pytest.raises(RuntimeError, match="prepared"):
        prepared.state_dict()
    network.train()


@pytest.mark.parametrize("kind", ["resnet", "timm", "swin"])
def test_weights_are_converted_once_and_what_decides_stays_in_float32(tiny, kind, monkeypatch):
    monkeypatch.setenv("PROXYDET_ALLOW_SLOW_PRECISION", "1")
    network = of_kind(tiny, kind)
    half = network.prepared("bf16")
    heads = half.roi_heads
    head = half.proposal_generator.centernet_head
    assert head.agn_hm.weight.dtype == head.bbox_pred.weight.dtype == torch.float32
    for part in (half.backbone, head.bbox_tower, heads.box_head, heads.mask_head):
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                assert module.weight.dtype == torch.bfloat16
    assert half.class_table().text_DC1.dtype == torch.float32
    assert all(values.dtype == torch.float32 for values in network.parameters())
    images = [tiny.image(64, 96, seed) for seed in range(2)]
    settings = dataclasses.replace(LOW, precision="bf16", max_detections=20)
    # The same as autocast, which converts in each call.
    for one, two in zip(
        half.detect(images, settings=settings),
        network.detect(images, settings=settings),
        strict=True,
    ):
        assert one.scores_N.dtype == one.boxes_N4.dtype == torch.float32
        assert one.mask_probs_MSS.dtype == torch.float32
        torch.testing.assert_close(one.scores_N, two.scores_N, rtol=0, atol=0.02)
    (full,) = network.detect(images[:1], settings=dataclasses.replace(settings, precision="fp32"))
    (found,) = half.detect(images[:1], settings=settings)
    assert not torch.equal(full.scores_N, found.scores_N)
    torch.testing.assert_close(full.scores_N, found.scores_N, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"bf16": 0.01, "fp16": 0.01}, "fp32"),
        ({"bf16": 8.0, "fp16": 0.01}, "bf16"),
        ({"bf16": 0.5, "fp16": 8.0}, "fp16"),
    ],
)
def test_what_a_device_has_units_for_is_measured(monkeypatch, speeds, chosen):
    monkeypatch.delenv("PROXYDET_ALLOW_SLOW_PRECISION", raising=False)
    monkeypatch.setattr("proxydet.modeling.network.half_speed", lambda name, _device: speeds[name])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert usable_precision("auto", gpu) == chosen
    assert usable_precision("auto", cpu) == (chosen if chosen == "bf16" else "fp32")
    for name, speed in speeds.items():
        if speed > 1:
            assert usable_precision(name, gpu) == name
            continue
        with pytest.raises(ConfigError, match=f"no units for {name}"):
            usable_precision(name, gpu)
    with pytest.raises(ConfigError, match="needs a GPU"):
        usable_precision("fp16", cpu)


def test_a_vocabulary_is_moved_to_the_device_once(tiny, monkeypatch):
    network, vocabulary = tiny.network(), tiny.vocabulary(5)
    (found,) = network.detect([tiny.image(64, 64)], vocabulary, settings=LOW)
    with monkeypatch.context() as patch:
        patch.setattr(type(vocabulary), "normalised", lambda _self: pytest.fail("moved again"))
        (again,) = network.detect([tiny.image(64, 64)], vocabulary, settings=LOW)
    assert torch.equal(found.scores_N, again.scores_N)
    (other,) = network.detect([tiny.image(64, 64)], tiny.vocabulary(5, seed=1), settings=LOW)
    assert not torch.equal(found.scores_N, other.scores_N)


class TwoReaders(nn.Module):
    """Reads the output of its first convolution past the norm behind it, too."""

    def __init__(self, *, past: bool) -> None:
        super().__init__()
        self.past = past
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        nn.init.uniform_(self.norm.running_mean, 1, 2)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.first(images)
        found = self.second(self.norm(maps))
        return {"p3": found + maps if self.past else found}


def test_a_convolution_that_others_read_too_is_left_as_it_is():
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for past, folded in ((True, 0), (False, 1)):
        backbone = TwoReaders(past=past).eval().requires_grad_(False)
        wanted = backbone(image)["p3"]
        assert fold_norms(backbone, 8) == folded
        assert isinstance(backbone.norm, nn.Identity) == bool(folded)
        torch.testing.assert_close(backbone(image)["p3"], wanted, rtol=1e-5, atol=1e-5)
    training = TwoReaders(past=False).train()
    assert fold_norms(training, 8) == 0


def test_images_of_two_sizes_in_one_call_are_found_as_one_by_one(tiny):
    network = tiny.lively(tiny.network()).prepared()
    sizes = [(64, 96), (96, 64), (64, 90), (60, 60)]
    images = [tiny.image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    for settings in (LOW, dataclasses.replace(LOW, masks=False, agnostic_nms=True)):
        together = network.detect(images, settings=settings)
        for image, found in zip(images, together, strict=True):
            (alone,) = network.detect([image], settings=settings)
            assert len(found) == len(alone) > 0
            assert torch.equal(found.classes_N, alone.classes_N)
            assert torch.equal(found.mask_index_N, alone.mask_index_N)
            torch.testing.assert_close(found.boxes_N4, alone.boxes_N4, rtol=0, atol=1e-3)
            torch.testing.assert_close(found.scores_N, alone.scores_N, rtol=0, atol=1e-5)
            assert found.has_masks == alone.has_masks == settings.masks
            if found.has_masks:
                torch.testing.assert_close(
                    found.mask_probs_MSS, alone.mask_probs_MSS, rtol=0, atol=1e-4
                )
