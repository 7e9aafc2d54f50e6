"""The three RoIAligns against an independent computation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from proxydet.environment import roi_align
from proxydet.environment.roi_align import (
    RoiGeometry,
    kernel_backward,
    published_roi_align,
    separable_backward,
    strict_roi_align,
)

SHAPE = (2, 3, 11, 13)


def geometry(size=(4, 5), scale=0.125, ratio=0, aligned=True) -> RoiGeometry:
    return RoiGeometry(output_size=size, spatial_scale=scale, sampling_ratio=ratio, aligned=aligned)


def boxes(count: int, seed: int, dtype=torch.float32, reach: float = 130.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 2, 2), generator=generator, dtype=torch.float64) * reach - 12
    low, high = corners.amin(1), corners.amax(1)
    owner = torch.randint(0, SHAPE[0], (count, 1), generator=generator).double()
    return torch.cat([owner, low, high], dim=1).to(dtype)


def reference_gradient(grad, boxes_K5, shape, how: RoiGeometry) -> np.ndarray:
    return pool_gradient(grad.double().numpy(), boxes_K5.double().numpy(), shape, how)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_separable_gradient_equals_the_sample_by_sample_one(aligned, ratio):
    how = geometry(aligned=aligned, ratio=ratio)
    boxes_K5 = boxes(7, seed=3, dtype=torch.float64)
    grad = torch.randn((7, 3, 4, 5), dtype=torch.float64)
    ours = separable_backward(grad, boxes_K5, SHAPE, how)
    np.testing.assert_allclose(ours, reference_gradient(grad, boxes_K5, SHAPE, how), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 6),
    seed=st.integers(0, 10_000),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    scale=st.sampled_from([0.03125, 0.0625, 0.125, 1.0]),
)
def test_separable_gradient_equals_the_kernels(count, seed, ratio, aligned, scale):
    how = geometry(ratio=ratio, aligned=aligned, scale=scale)
    boxes_K5 = boxes(count, seed, dtype=torch.float64)
    grad = torch.randn((count, 3, 4, 5), dtype=torch.float64)
    torch.testing.assert_close(
        separable_backward(grad, boxes_K5, SHAPE, how),
        kernel_backward(grad, boxes_K5, SHAPE, how),
        rtol=1e-9,
        atol=1e-9,
    )


def test_separable_gradient_in_pieces_is_the_sum_of_the_pieces(monkeypatch):
    how, boxes_K5, grad = geometry(), boxes(9, seed=1), torch.randn((9, 3, 4, 5))
    whole = separable_backward(grad, boxes_K5, SHAPE, how)
    monkeypatch.setattr(roi_align, "CHUNK_BYTES", 4 * 3 * 13 * 4 * 2)
    torch.testing.assert_close(separable_backward(grad, boxes_K5, SHAPE, how), whole)


def test_degenerate_boxes_get_what_the_kernel_gives_them():
    how = geometry()
    boxes_K5 = torch.tensor(
        [
            [0, 40.0, 40, 40, 40],
            [1, 60, 60, 20, 20],
            [0, -900, -900, -800, -800],
            [1, 900, 0, 990, 9],
        ]
    )
    grad = torch.ones((4, 3, 4, 5))
    torch.testing.assert_close(
        separable_backward(grad, boxes_K5, SHAPE, how), kernel_backward(grad, boxes_K5, SHAPE, how)
    )


def test_a_box_that_is_not_finite_gets_no_gradient():
    good = boxes(1, seed=5)
    bad = torch.tensor([[0, float("nan"), 1, 40, 50], [1, 3, 4, float("inf"), 60]])
    grad = torch.randn((3, 3, 4, 5))
    found = separable_backward(grad, torch.cat([good, bad]), SHAPE, geometry())
    torch.testing.assert_close(found, separable_backward(grad[:1], good, SHAPE, geometry()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_added_up_in_float32(dtype):
    boxes_K5, grad = boxes(40, seed=2), torch.rand((40, 3, 4, 5))
    found = separable_backward(grad.to(dtype), boxes_K5, SHAPE, geometry())
    exact = separable_backward(grad.to(dtype).double(), boxes_K5.double(), SHAPE, geometry())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.to(dtype).double(), rtol=1e-2, atol=1e-2)


def test_strict_values_are_torchvisions_bit_for_bit():
    features = torch.randn(SHAPE)
    boxes_K5 = boxes(6, seed=8)
    plain = torch.ops.torchvision.roi_align(features, boxes_K5, 0.125, 4, 5, 0, True)
    assert torch.equal(strict_roi_align(features, boxes_K5, geometry()), plain)


def test_strict_passes_the_gradient_back():
    features = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    boxes_K5 = boxes(3, seed=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda f: strict_roi_align(f, boxes_K5, geometry()), (features,)
    )


def test_published_equals_double_roi_align_of_rounded_inputs():
    features, boxes_K5 = torch.randn(SHAPE, requires_grad=True), boxes(5, seed=4)
    pooled = published_roi_align(features, boxes_K5, geometry())
    rounded = features.detach().half().double().numpy(), boxes_K5.half().double().numpy()
    expected = pool(*rounded, geometry())
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled.detach(), expected, rtol=1e-6, atol=1e-6)
    plain = torch.ops.torchvision.roi_align(features, boxes_K5, 0.125, 4, 5, 0, True)
    assert not torch.allclose(pooled, plain, atol=1e-5)


def test_published_gradient_is_rounded_to_half():
    features, boxes_K5 = torch.randn(SHAPE, requires_grad=True), boxes(5, seed=4)
    published_roi_align(features, boxes_K5, geometry()).sum().backward()
    assert torch.equal(features.grad, features.grad.half().float())


def test_published_loses_small_gradients_and_strict_keeps_them():
    boxes_K5 = torch.tensor([[0, 8.0, 8, 72, 72]])
    for operator, kept in ((published_roi_align, False), (strict_roi_align, True)):
        features = torch.ones(SHAPE, requires_grad=True)
        (operator(features, boxes_K5, geometry((2, 2))) * 1e-8).sum().backward()
        assert bool(features.grad.abs().sum() > 0) is kept


def test_published_moves_boxes_beyond_1024_pixels_to_whole_pixels():
    features = torch.linspace(0, 1, 200).expand(1, 1, 200, 200).contiguous()
    whole, fraction = (torch.tensor([[0, 1100.0, 0, 1500 + f, 80]]) for f in (0.0, 0.4))
    how = geometry((1, 1))
    assert torch.equal(
        published_roi_align(features, whole, how), published_roi_align(features, fraction, how)
    )
    assert not torch.equal(
        strict_roi_align(features, whole, how), strict_roi_align(features, fraction, how)
    )


def test_the_kernel_is_allowed_only_for_its_own_backward():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        grad = torch.ones((1, 3, 4, 5))
        kernel_backward(grad, boxes(1, seed=0), SHAPE, geometry())
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_strict_gradient_repeats_on_a_gpu_where_the_kernels_does_not():
    from proxydet.environment.modes import reproducibility_mode

    shape, how = (4, 256, 80, 80), geometry((7, 7), ratio=0)
    boxes_K5 = boxes(2000, seed=0, reach=640).cuda()
    grad = torch.randn((2000, 256, 7, 7), device="cuda")
    with reproducibility_mode("strict"):
        first = separable_backward(grad, boxes_K5, shape, how)
        for _ in range(50):
            assert torch.equal(separable_backward(grad, boxes_K5, shape, how), first)
        kernel = kernel_backward(grad, boxes_K5, shape, how)
    torch.testing.assert_close(first, kernel, rtol=1e-3, atol=1e-3)
    assert any(
        not torch.equal(kernel_backward(grad, boxes_K5, shape, how), kernel) for _ in range(50)
    )


# The slow reference: RoIAlign sample by sample.


def pool(features_NCHW: np.ndarray, boxes_K5: np.ndarray, geometry: RoiGeometry) -> np.ndarray:
    """Pool boxes out of feature maps.

    Args:
        features_NCHW: Feature maps.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        geometry: Bins, scale and sampling.

    Returns:
        Pooled features (K, C, P, Q).
    """
    pooled_KCPQ = np.zeros((len(boxes_K5), features_NCHW.shape[1], *geometry.output_size))
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, features_NCHW.shape, geometry):
        pooled_KCPQ[box, :, bin_y, bin_x] += weight * features_NCHW[image, :, y, x]
    return pooled_KCPQ


def pool_gradient(
    grad_KCPQ: np.ndarray, boxes_K5: np.ndarray, shape: tuple[int, ...], geometry: RoiGeometry
) -> np.ndarray:
    """Gradient of :func:`pool` with regard to the features.

    Args:
        grad_KCPQ: Gradient of the pooled features.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        shape: (N, C, H, W) of the features.
        geometry: Bins, scale and sampling.

    Returns:
        Gradient of the features (N, C, H, W).
    """
    grad_NCHW = np.zeros(shape)
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, shape, geometry):
        grad_NCHW[image, :, y, x] += weight * grad_KCPQ[box, :, bin_y, bin_x]
    return grad_NCHW


def _cells(
    boxes_K5: np.ndarray, shape: tuple[int, ...], geometry: RoiGeometry
) -> Iterator[tuple[int, int, int, int, int, int, float]]:
    """Every (box, bin row, bin column, image, cell row, cell column, weight) that contributes."""
    rows, columns = geometry.output_size
    for box, (image, x1, y1, x2, y2) in enumerate(boxes_K5):
        along_y = _samples(y1, y2, rows, geometry)
        along_x = _samples(x1, x2, columns, geometry)
        for bin_y, y_points in enumerate(along_y):
            for bin_x, x_points in enumerate(along_x):
                share = 1 / max(len(y_points) * len(x_points), 1)
                for y in y_points:
                    for x in x_points:
                        for row, weight_y in _neighbours(y, shape[2]):
                            for column, weight_x in _neighbours(x, shape[3]):
                                weight = share * weight_y * weight_x
                                yield box, bin_y, bin_x, int(image), row, column, weight


def _samples(start: float, end: float, bins: int, geometry: RoiGeometry) -> list[list[float]]:
    """Sample coordinates of each bin along one axis, in feature cells."""
    shift = 0.5 if geometry.aligned else 0.0
    low, high = start * geometry.spatial_scale - shift, end * geometry.spatial_scale - shift
    extent = high - low if geometry.aligned else max(high - low, 1.0)
    count = geometry.sampling_ratio if geometry.sampling_ratio > 0 else math.ceil(extent / bins)
    step = extent / bins
    return [
        [low + index * step + (sample + 0.5) * step / count for sample in range(count)]
        for index in range(bins)
    ]


def _neighbours(coordinate: float, cells: int) -> list[tuple[int, float]]:
    """The one or two cells around a coordinate and their linear weights; none where it lies outside."""
    if not -1.0 <= coordinate <= cells:
        return []
    inside = max(coordinate, 0.0)
    low = int(inside)
    if low >= cells - 1:
        return [(cells - 1, 1.0)]
    return [(low, 1.0 - (inside - low)), (low + 1, inside - low)]


class _Halvings(TorchDispatchMode):
    """Counts maps that are rounded to half precision."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += args[0].ndim == 4 and (kwargs or {}).get("dtype") == torch.half
        return func(*args, **(kwargs or {}))


def test_maps_are_rounded_once_for_all_poolings_of_them():
    maps = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn((6, 3, 4, 5), generator=torch.Generator().manual_seed(1))
    some, how = [boxes(6, seed=1), boxes(6, seed=2)], geometry()
    features = maps * 1.0
    with _Halvings() as halvings:
        pooled = [published_roi_align(features, boxes_K5, how) for boxes_K5 in some]
    assert halvings.count == 1
    for boxes_K5, values in zip(some, pooled, strict=True):
        # As it is written: round, compute in double, round the gradient of each pooling.
        leaf = maps.detach().clone().requires_grad_()
        rounded = leaf.half().double()
        plain = roi_align.roi_align(rounded, boxes_K5.half().double(), how, kernel_backward)
        assert torch.equal(values, plain.float())
        (expected,) = torch.autograd.grad(plain.float(), leaf, grad)
        (found,) = torch.autograd.grad(values, features, grad, retain_graph=True)
        assert torch.equal(found, expected)
    with torch.no_grad():
        features += 1.0
        assert not torch.equal(published_roi_align(features, some[0], how), pooled[0])
