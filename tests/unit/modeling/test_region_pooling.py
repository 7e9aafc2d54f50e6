"""Pooling equals detectron2's pooler, whatever the regions."""

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from proxydet.modeling.config import CascadeConfig
from proxydet.modeling.roi_heads import RegionPooler


@pytest.mark.parametrize("levels", [(3, 4, 5), (2, 3), (4,)])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_equals_detectron2s(levels, sampling_ratio):
    config = CascadeConfig(pool_levels=levels, sampling_ratio=sampling_ratio)
    ours = RegionPooler(config, 7)
    theirs = ROIPooler(7, [2.0**-level for level in levels], sampling_ratio, "ROIAlignV2")
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(2, 4, 512 // 2**level, 512 // 2**level, generator=generator).requires_grad_()
        for level in levels
    ]
    corners = torch.rand(60, 2, generator=generator) * 300 - 20
    sides = 2 ** (torch.rand(60, 2, generator=generator) * 10 - 1)
    boxes = torch.cat([corners, corners + sides], dim=1)
    images = torch.arange(60) // 25 % 2
    wanted = theirs(features, [Boxes(boxes[images == image]) for image in range(2)])
    order = images.argsort(stable=True)
    own_features = [maps.clone().requires_grad_() for maps in features]
    pooled = ours(own_features, boxes[order], images[order])
    torch.testing.assert_close(pooled, wanted, atol=1e-4, rtol=1e-4)
    weights = torch.randn(pooled.shape, generator=generator)
    own_gradients = torch.autograd.grad((pooled * weights).sum(), own_features)
    gradients = torch.autograd.grad((wanted * weights).sum(), features)
    for own_gradient, gradient in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(own_gradient, gradient, atol=1e-4, rtol=1e-4)


def test_a_box_is_pooled_alike_whatever_is_pooled_with_it():
    pooler = RegionPooler(CascadeConfig(canonical_size=64.0), 7)
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(1, 16, size, size, generator=generator) for size in (32, 16, 8)]
    corners = torch.rand(40, 2, generator=generator) * 200
    boxes = torch.cat([corners, corners + 5 + torch.rand(40, 2, generator=generator) * 250], 1)
    image = torch.zeros(40, dtype=torch.int64)
    assert len(pooler.level(boxes).unique()) == 3
    together = pooler(features, boxes, image)
    for row in range(40):
        assert torch.equal(pooler(features, boxes[row : row + 1], image[:1])[0], together[row])
    by_parts = torch.cat(list(pooler.parts([(features, len(boxes))], boxes, image, 7)))
    assert torch.equal(by_parts, together)


def test_no_regions_and_empty_regions():
    pooler = RegionPooler(CascadeConfig(), 7)
    features = [torch.ones(1, 4, size, size) for size in (32, 16, 8)]
    assert pooler(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (
        0,
        4,
        7,
        7,
    )
    pooled = pooler(features, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    assert pooled.isfinite().all()
