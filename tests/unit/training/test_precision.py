"""What runs in low precision, and that it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proxydet.errors import ConfigError, RuntimeEnvironmentError
from proxydet.training.config import PrecisionConfig
from proxydet.training.step import apply_precision, build_scaler, check_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "inside"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_only_the_backbone_is_in_low_precision(toy, dtype, inside):
    network = toy.ToyNetwork()
    seen = []
    for module in (network.backbone, network.class_head):
        module.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    apply_precision(network, PrecisionConfig(dtype=dtype))
    network.forward_train(toy.toy_batch(0))
    assert seen == [inside, torch.float32]


def test_the_loss_is_scaled_in_fp16_only():
    scaled = build_scaler(PrecisionConfig(dtype="fp16", initial_loss_scale=8.0), CPU)
    assert scaled.scale(torch.ones(())).item() == 8.0
    assert not build_scaler(PrecisionConfig(dtype="bf16"), CPU).is_enabled()
    assert not build_scaler(PrecisionConfig(dtype="fp32"), CPU).is_enabled()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_trains_close_to_fp32(toy, tmp_path, dtype):
    changes = {"iterations": 30, "optimizer": {"learning_rate": 0.02}}
    exact = toy.run(tmp_path / "fp32", changes).losses
    precision = {"dtype": dtype, "initial_loss_scale": 256.0}
    low = toy.run(tmp_path / "low", {**changes, "precision": precision}).losses
    assert low["total"] != exact["total"]
    assert low["total"] == pytest.approx(exact["total"], rel=0.02)


def test_an_overflow_in_fp16_is_skipped_and_the_scale_falls(toy, tmp_path):
    changes = {"iterations": 8, "precision": {"dtype": "fp16", "initial_loss_scale": 2.0**30}}
    result = toy.run(tmp_path, changes)
    assert result.skipped == 0
    saved = torch.load(tmp_path / "checkpoints/step_0000008.pth", weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**30
    assert all(torch.isfinite(w).all() for w in saved["model"].values())


def test_channels_last_changes_the_layout_of_convolutions():
    network = nn.Module()
    network.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    apply_precision(network, PrecisionConfig(dtype="fp32", channels_last=True))
    assert network.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network.backbone(torch.ones(1, 3, 8, 8)).shape == (1, 8, 6, 6)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_told(toy, tf32):
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        apply_precision(toy.ToyNetwork(), PrecisionConfig(tf32=tf32))
        assert [switch.allow_tf32 for switch in switches] == [tf32, tf32]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def test_what_the_machine_cannot_do_is_said_before_the_run(monkeypatch):
    with pytest.raises(ConfigError, match="fp16, which needs a GPU"):
        check_precision(PrecisionConfig(dtype="fp16"), CPU)
    check_precision(PrecisionConfig(dtype="fp16"), torch.device("cuda"))
    compiled = PrecisionConfig(dtype="bf16", compile=True)
    monkeypatch.delenv("CXX", raising=False)
    there: set[str] = set()
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    with pytest.raises(RuntimeEnvironmentError, match=r"g\+\+"):
        check_precision(compiled, CPU)
    there.add("clang++")
    check_precision(compiled, CPU)
    there.add("g++")
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(RuntimeEnvironmentError, match="icpx"):
        check_precision(compiled, CPU)
