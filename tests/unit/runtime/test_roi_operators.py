"""The published and the strict RoIAlign against torchvision's kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from proxydet.runtime import roi_align
from proxydet.runtime.roi_align import (
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
    rounded = features.detach().half().double(), boxes_K5.half().double()
    expected = torch.ops.torchvision.roi_align(*rounded, 0.125, 4, 5, 0, True)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.detach(), expected.float(), rtol=1e-6, atol=1e-6)
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
    from proxydet.runtime.modes import reproducibility_mode

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
