"""The sparse RoIAlign against torchvision's kernel, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from proxydet.runtime.roi_align import RegionGrid, align_regions

SCALE = 1 / 8


def _rois(count, batch, size, generator):
    """Regions inside, across and outside the map, some empty, some turned inside out."""
    height, width = size
    extent = torch.tensor([width, height]).double() / SCALE
    corners = (
        torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * extent * 2 - extent / 2
    )
    low, high = corners.amin(1), corners.amax(1)
    rois = torch.cat([torch.randint(batch, (count, 1), generator=generator).double(), low, high], 1)
    rois[: count // 8, 3:] = rois[: count // 8, 1:3]
    rois[count // 8 : count // 4, 1:] = rois[count // 8 : count // 4][:, [3, 4, 1, 2]]
    return rois


def _pool(features, rois, *, side, ratio):
    grid = RegionGrid(side=side, scales=[SCALE], sampling_ratio=ratio)
    return align_regions([features], rois, torch.zeros(len(rois), dtype=torch.int64), grid)


def _both(features, rois, side, ratio):
    results = []
    for pool in (
        lambda x: roi_align(x, rois, (side, side), SCALE, ratio, aligned=True),
        lambda x: _pool(x, rois, side=side, ratio=ratio),
    ):
        leaf = features.clone().requires_grad_()
        pooled = pool(leaf)
        weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view(pooled.shape)
        (pooled * weights).sum().backward()
        results.append((pooled.detach(), leaf.grad))
    return results


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    side=st.sampled_from([1, 3, 7, 14]),
    ratio=st.integers(0, 3),
)
def test_equals_torchvision(seed, height, width, side, ratio):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    rois = _rois(24, 2, (height, width), generator)
    (value, gradient), (own_value, own_gradient) = _both(features, rois, side, ratio)
    torch.testing.assert_close(own_value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-11, atol=1e-11)


def test_equals_torchvision_in_single_precision():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 16, 40, 52, generator=generator)
    rois = _rois(200, 2, (40, 52), generator).float()
    (value, gradient), (own_value, own_gradient) = _both(features, rois, 7, 0)
    torch.testing.assert_close(own_value, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0, 2])
def test_no_regions_give_an_empty_result_and_no_gradient(ratio):
    features = torch.randn(1, 4, 6, 6, requires_grad=True)
    pooled = _pool(features, torch.zeros(0, 5), side=7, ratio=ratio)
    assert pooled.shape == (0, 4, 7, 7)
    pooled.sum().backward()
    assert not features.grad.any()


def test_repeats_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 8, 30, 30, generator=generator)
    rois = _rois(100, 1, (30, 30), generator).float()
    runs = [_both(features, rois, 7, 0)[1] for _ in range(3)]
    for value, gradient in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert torch.equal(gradient, runs[0][1])
