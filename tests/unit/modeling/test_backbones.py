"""ResNet and Swin: names, frozen norms, shapes, windows, shifts, checkpointing, stochastic depth."""

import pytest
import torch
from torchvision.models import resnet50

from proxydet.modeling.backbone import (
    FrozenBatchNorm,
    ResNet,
    SwinBackbone,
    build_backbone,
    from_windows,
    relative_positions,
    shift_mask,
    to_windows,
)
from proxydet.modeling.config import (
    BackboneConfig,
    PyramidConfig,
    ResNetConfig,
    SwinConfig,
)

SMALL_SWIN = SwinConfig(embed_dim=8, depths=(2, 2, 2), heads=(1, 2, 4), window=4, drop_path=0.0)


def test_resnet50_computes_what_torchvisions_does():
    torch.manual_seed(0)
    theirs = resnet50(norm_layer=None).eval()
    ours = ResNet(ResNetConfig()).eval()
    names = {
        name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")
    }
    ours.base.load_state_dict(names)
    images = torch.randn(1, 3, 64, 64)
    trunk = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["layer5"], trunk(images))


def test_frozen_norms_never_change():
    network = ResNet(ResNetConfig(depths=(1, 1), width=8)).train()
    before = {name: value.clone() for name, value in network.state_dict().items() if "bn" in name}
    images = torch.randn(2, 3, 32, 32)
    outputs = network(images)
    sum(maps.sum() for maps in outputs.values()).backward()
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for name, parameter in network.named_parameters()
        if "bn" in name or "downsample.1" in name
    )
    assert network.base.conv1.weight.grad is not None
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = network.eval()(images)
    torch.testing.assert_close(again["layer3"], outputs["layer3"])


@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_fresh_resnet_keeps_the_size_of_its_signal(norm, block):
    torch.manual_seed(0)
    config = ResNetConfig(depths=(2, 2, 2), width=16, norm=norm, block=block, norm_groups=8)
    outputs = ResNet(config)(torch.randn(4, 3, 64, 64))
    assert list(outputs) == ["layer2", "layer3", "layer4"]
    for level, maps in outputs.items():
        assert maps.shape[2:] == (64 // 2 ** int(level[-1]),) * 2
        assert 0.05 < maps.std() < 20


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("levels", [(2, 3, 4), (3, 4, 5), (4,)])
def test_pyramid_levels(levels, extra):
    backbone = BackboneConfig(
        resnet=ResNetConfig(depths=(1, 1, 1, 1), width=8, norm="gn", norm_groups=4)
    )
    pyramid = PyramidConfig(levels=levels, extra_levels=extra, channels=8)
    outputs = build_backbone(backbone, pyramid)(torch.randn(1, 3, 128, 64))
    assert list(outputs) == [f"p{level}" for level in pyramid.all_levels]
    for name, stride in zip(outputs, pyramid.strides, strict=True):
        assert outputs[name].shape == (1, 8, max(128 // stride, 1), max(64 // stride, 1))


def test_windows_come_back_as_they_were():
    maps = torch.arange(2 * 6 * 9 * 5.0).view(2, 6, 9, 5)
    windows = to_windows(maps, 3)
    assert windows.shape == (2 * 2 * 3, 9, 5)
    assert torch.equal(windows[1].view(3, 3, 5), maps[0, :3, 3:6])
    assert torch.equal(from_windows(windows, 3, 6, 9), maps)


def test_relative_positions_depend_on_the_offset_only():
    index = relative_positions(3)
    assert index.shape == (9, 9)
    assert index.min() == 0
    assert index.max() == 24
    offsets = {}
    for first in range(9):
        for second in range(9):
            offset = (first // 3 - second // 3, first % 3 - second % 3)
            assert offsets.setdefault(offset, int(index[first, second])) == int(
                index[first, second]
            )
    assert len(set(offsets.values())) == len(offsets) == 25


def test_shift_mask_parts_only_what_the_shift_wrapped():
    side, shift, height, width = 4, 2, 8, 12
    rows = torch.arange(height).roll(-shift)
    columns = torch.arange(width).roll(-shift)
    mask = shift_mask(height, width, side, torch.device("cpu"))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[None]
    for window, positions in zip(mask, to_windows(grid, side), strict=True):
        # Neighbours of a window without wrap lie less than a window apart.
        near = ((positions[:, None] - positions[None]).abs() < side).all(dim=-1)
        assert torch.equal(window == 0, near)


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (4, 4), (33, 17)])
def test_swin_takes_any_size(size):
    torch.manual_seed(0)
    outputs = SwinBackbone(SMALL_SWIN, out_levels=(2, 3, 4)).eval()(torch.randn(2, 3, *size))
    height, width = size
    for level, maps in outputs.items():
        stride = 2 ** int(level[-1])
        assert maps.shape[2:] == (-(-height // stride), -(-width // stride))
        assert maps.isfinite().all()


def test_checkpointed_activations_change_nothing():
    images = torch.randn(1, 3, 32, 48)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = SwinConfig(
            embed_dim=8,
            depths=(2, 2),
            heads=(1, 2),
            window=4,
            drop_path=0.5,
            checkpoint_activations=checkpointed,
        )
        network = SwinBackbone(config, out_levels=(3,)).train()
        torch.manual_seed(1)
        network(images)["layer3"].square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_stochastic_depth_grows_over_the_blocks_and_acts_in_training_only():
    config = SwinConfig(embed_dim=8, depths=(2, 3), heads=(1, 2), window=4, drop_path=0.4)
    network = SwinBackbone(config, out_levels=(3,))
    chances = [block.drop_path.p for stage in network.layers for block in stage.blocks]
    assert chances == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    images = torch.randn(1, 3, 32, 32)
    network.eval()
    assert torch.equal(network(images)["layer3"], network(images)["layer3"])
    network.train()
    torch.manual_seed(0)
    outputs = [network(images)["layer3"] for _ in range(8)]
    assert any(not torch.equal(outputs[0], output) for output in outputs)


def test_a_frozen_norm_takes_an_empty_batch():
    maps = torch.zeros(0, 5, 6, 7, requires_grad=True)
    FrozenBatchNorm(5)(maps).sum().backward()
    assert maps.grad.shape == maps.shape


def test_a_frozen_norm_that_is_unfrozen_learns():
    norm, maps = FrozenBatchNorm(5), torch.randn(2, 5, 6, 7, requires_grad=True)
    norm.bias.requires_grad_(True)
    norm(maps).sum().backward()
    assert norm.bias.grad.tolist() == [2 * 6 * 7] * 5
    assert norm.weight.grad is None
    assert maps.grad is not None


def test_the_frozen_norm_of_inference_is_that_of_training():
    generator = torch.Generator().manual_seed(0)
    norm = FrozenBatchNorm(5)
    norm.running_mean.copy_(torch.randn(5, generator=generator))
    norm.running_var.copy_(torch.rand(5, generator=generator) + 0.1)
    norm.weight.copy_(torch.randn(5, generator=generator))
    norm.bias.copy_(torch.randn(5, generator=generator))
    maps = torch.randn(2, 5, 6, 7, generator=generator)
    before = maps.clone()
    trained = norm(maps)
    assert torch.equal(maps, before)
    with torch.inference_mode():
        inferred = norm(maps.clone())
    torch.testing.assert_close(inferred, trained, rtol=1e-5, atol=1e-6)
