"""The copy that inference runs: folded norms, nothing of the network itself changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from proxydet.modeling.config import BackboneConfig, InferenceConfig, ResNetConfig
from proxydet.modeling.network import ProxyDetNetwork, fold_norms

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
