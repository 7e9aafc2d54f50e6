"""Modes change the operator and the flags of the process, and put both back."""

from __future__ import annotations

import os

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from proxydet.errors import ConfigError
from proxydet.runtime.modes import (
    CUBLAS_VARIABLE,
    CUBLAS_WORKSPACE,
    MODES,
    apply_mode,
    current_mode,
    reproducibility_mode,
)


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    yield
    apply_mode("off")


def pooled(features: torch.Tensor) -> torch.Tensor:
    pooler = ROIPooler(7, [1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2")
    return pooler([features], [Boxes(torch.tensor([[3.3, 5.1, 100.7, 90.9]]))])


def flags() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS_VARIABLE),
    )


@pytest.mark.parametrize("mode", ["published", "strict"])
def test_flags_are_set_and_restored(mode):
    before, forward = flags(), ROIAlign.forward
    with reproducibility_mode(mode):
        assert current_mode() == mode
        assert flags() == (True, False, True, False, False, CUBLAS_WORKSPACE)
        assert ROIAlign.forward is not forward
    assert current_mode() == "off"
    assert flags() == before
    assert ROIAlign.forward is forward


def test_settings_of_the_user_come_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    os.environ[CUBLAS_VARIABLE] = ":16:8"
    try:
        apply_mode("published")
        apply_mode("strict")
        assert flags() == (True, False, True, False, False, CUBLAS_WORKSPACE)
        apply_mode("off")
        assert flags() == (True, True, False, True, True, ":16:8")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_modes_nest_and_return_the_one_before():
    assert apply_mode("published") == "off"
    with reproducibility_mode("strict"):
        assert current_mode() == "strict"
    assert current_mode() == "published"
    assert apply_mode("published") == "published"


def test_a_failing_block_leaves_no_trace():
    before = flags()
    with pytest.raises(ZeroDivisionError), reproducibility_mode("strict"):
        _ = 1 / 0
    assert flags() == before


def test_the_pooler_uses_the_operator_of_the_mode():
    features = torch.randn((1, 4, 16, 16))
    values = {}
    for mode in MODES:
        with reproducibility_mode(mode):
            values[mode] = pooled(features)
    assert torch.equal(values["off"], values["strict"])
    assert not torch.equal(values["off"], values["published"])


def test_a_mode_that_comes_after_the_first_use_of_a_gpu_warns(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for used in (False, True):
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        with reproducibility_mode("strict"):
            pass
        assert ("comes too late" in caplog.text) is used


def test_gradients_reach_the_features_in_every_mode():
    for mode in MODES:
        features = torch.randn((1, 4, 16, 16), requires_grad=True)
        with reproducibility_mode(mode):
            pooled(features).sum().backward()
        assert float(features.grad.abs().sum()) == pytest.approx(4 * 49, rel=1e-3)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        apply_mode("exact")
    assert "published" in (caught.value.hint or "")
