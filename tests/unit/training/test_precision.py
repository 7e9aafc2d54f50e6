"""What runs in low precision, and that it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proxydet.config import merge
from proxydet.errors import ConfigError, RuntimeEnvironmentError
from proxydet.recipes import get_recipe, resolve_config
from proxydet.training.config import PrecisionConfig
from proxydet.training.step import apply_precision, build_scaler, check_precision
from proxydet.training.train import train

CPU = torch.device("cpu")


def test_the_loss_is_scaled_in_fp16_only():
    scaled = build_scaler(PrecisionConfig(backbone="fp16", initial_loss_scale=8.0), CPU)
    assert scaled.scale(torch.ones(())).item() == 8.0
    assert build_scaler(PrecisionConfig(backbone="bf16", heads="fp16"), CPU).is_enabled()
    assert not build_scaler(PrecisionConfig(backbone="bf16", heads="tf32"), CPU).is_enabled()
    assert not build_scaler(PrecisionConfig(backbone="fp32"), CPU).is_enabled()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_trains_close_to_fp32(toy, tmp_path, dtype):
    changes = {"iterations": 30, "optimizer": {"learning_rate": 0.02}}
    exact = toy.run(tmp_path / "fp32", changes).losses
    precision = {"backbone": dtype, "initial_loss_scale": 256.0}
    low = toy.run(tmp_path / "low", {**changes, "precision": precision}).losses
    assert low["total"] != exact["total"]
    assert low["total"] == pytest.approx(exact["total"], rel=0.02)


def test_an_overflow_in_fp16_is_skipped_and_the_scale_falls(toy, tmp_path):
    changes = {"iterations": 8, "precision": {"backbone": "fp16", "initial_loss_scale": 2.0**30}}
    result = toy.run(tmp_path, changes)
    assert result.skipped == 0
    saved = torch.load(tmp_path / "checkpoints/step_0000008.pth", weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**30
    assert all(torch.isfinite(w).all() for w in saved["model"].values())


def test_tf32_is_as_it_was_after_a_step_that_failed(toy, tmp_path, monkeypatch, users_tf32):
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn

    def fail(*_: object) -> None:
        assert products.allow_tf32
        assert convolutions.allow_tf32
        raise ArithmeticError

    class Failing(toy.ToyNetwork):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            self.class_head.register_full_backward_hook(fail)

    monkeypatch.setattr(toy, "ToyNetwork", Failing)
    with pytest.raises(ArithmeticError):
        toy.run(tmp_path, {"precision": {"heads": "tf32"}})
    assert (products.allow_tf32, convolutions.allow_tf32) == users_tf32


def test_channels_last_changes_the_layout_of_convolutions():
    network = nn.Module()
    network.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    apply_precision(network, PrecisionConfig(backbone="fp32", channels_last=True))
    assert network.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network.backbone(torch.ones(1, 3, 8, 8)).shape == (1, 8, 6, 6)


def test_configurations_of_version_0_1_still_open():
    def opened(recipe: str = "r50", **precision: object) -> tuple[str, str]:
        now = merge(get_recipe(recipe), {"training": {"precision": precision}}).training.precision
        return now.backbone, now.heads

    assert opened(dtype="fp16", tf32=False) == ("fp16", "fp32")
    assert opened(dtype="bf16", tf32=True) == ("bf16", "tf32")
    assert opened(dtype="fp32", tf32=True) == ("tf32", "tf32")
    assert opened(dtype="fp32", heads="bf16") == ("fp32", "bf16")
    assert opened(tf32=True) == ("fp16", "tf32")
    assert opened("tiny", tf32=True) == ("tf32", "tf32")
    assert opened("tiny", tf32=True, dtype="bf16") == ("bf16", "tf32")
    for key, value, found in (
        ("dtype", "fp32", ("fp32", "fp32")),
        ("tf32", "true", ("fp16", "tf32")),
        ("tf32", "false", ("fp16", "fp32")),
    ):
        given = resolve_config("r50", None, [f"training.precision.{key}={value}"])
        assert (given.training.precision.backbone, given.training.precision.heads) == found
    for wrong in ({"dtype": "fp8"}, {"tf32": "yes"}):
        with pytest.raises(ConfigError, match=r"training\.precision"):
            opened(**wrong)


@pytest.mark.parametrize("key", ["training.precision.backbone", "inference.precision"])
def test_what_the_machine_cannot_do_is_refused_before_anything_is_written(
    key, monkeypatch, tmp_path
):
    monkeypatch.delenv("PROXYDET_ALLOW_SLOW_PRECISION", raising=False)
    config = resolve_config("tiny", None, ["training.device=cpu", f"{key}=fp16"])
    with pytest.raises(ConfigError, match="needs a GPU"):
        train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_machine_cannot_do_is_said_before_the_run(monkeypatch):
    with pytest.raises(ConfigError, match="fp16, which needs a GPU"):
        check_precision(PrecisionConfig(backbone="fp16"), CPU)
    with pytest.raises(ConfigError, match="heads is fp16, which needs a GPU"):
        check_precision(PrecisionConfig(backbone="bf16", heads="fp16"), CPU)
    check_precision(PrecisionConfig(backbone="fp16"), torch.device("cuda"))
    compiled = PrecisionConfig(backbone="bf16", compile=True)
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
