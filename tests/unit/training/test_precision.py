"""Where low precision applies, and that it trains."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from proxydet.training.config import PrecisionConfig
from proxydet.training.precision import autocast, build_scaler, prepare_backbone

CPU = torch.device("cpu")


class Probe(nn.Module):
    """Notes in which format its product comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        y = self.layer(x)
        self.seen.append(y.dtype)
        return {"maps": [y, torch.ones(2, dtype=torch.int64)]}


@pytest.mark.parametrize(("dtype", "inside"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_only_the_backbone_is_in_low_precision(dtype: str, inside: torch.dtype) -> None:
    probe = Probe()
    prepare_backbone(probe, PrecisionConfig(dtype=dtype), CPU)
    with autocast(PrecisionConfig(dtype=dtype), CPU):
        maps = probe(torch.ones(2, 4))["maps"]
        after = nn.Linear(4, 4)(maps[0])
    assert probe.seen == [inside]
    assert [m.dtype for m in maps] == [torch.float32, torch.int64]
    assert after.dtype == torch.float32
    probe.eval()
    probe(torch.ones(2, 4))
    assert probe.seen[-1] == torch.float32


def test_autocast_ends_when_the_backbone_fails() -> None:
    probe = Probe()
    prepare_backbone(probe, PrecisionConfig(dtype="bf16"), CPU)
    with pytest.raises(RuntimeError):
        probe(torch.ones(2, 3))
    assert not torch.is_autocast_enabled("cpu")


def test_the_whole_model_in_low_precision() -> None:
    with autocast(PrecisionConfig(dtype="bf16", scope="model"), CPU):
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.bfloat16
    with autocast(PrecisionConfig(dtype="fp32", scope="model"), CPU):
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.float32


def test_the_loss_is_scaled_in_fp16_only() -> None:
    scaled = build_scaler(PrecisionConfig(dtype="fp16", initial_loss_scale=8.0), CPU)
    assert scaled.scale(torch.ones(())).item() == 8.0
    assert not build_scaler(PrecisionConfig(dtype="bf16"), CPU).is_enabled()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("scope", ["backbone", "model"])
def test_low_precision_trains_close_to_fp32(
    toy: ModuleType, tmp_path: Path, dtype: str, scope: str
) -> None:
    changes = {"iterations": 30, "optimizer": {"learning_rate": 0.02}}
    exact = toy.run(tmp_path / "fp32", changes).losses
    low = toy.run(tmp_path / "low", {**changes, "precision": {"dtype": dtype, "scope": scope}})
    assert low.losses["total"] == pytest.approx(exact["total"], rel=0.05)


def test_an_overflow_in_fp16_is_skipped_and_the_scale_falls(
    toy: ModuleType, tmp_path: Path
) -> None:
    changes = {"iterations": 8, "precision": {"dtype": "fp16", "initial_loss_scale": 2.0**30}}
    result = toy.run(tmp_path, changes)
    assert result.skipped == 0
    saved = torch.load(tmp_path / "checkpoints/step_0000008.pth", weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**30
    assert all(torch.isfinite(w).all() for w in saved["model"].values())


def test_channels_last_changes_the_layout_of_convolutions_only() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    prepare_backbone(backbone, PrecisionConfig(dtype="fp32", channels_last=True), CPU)
    assert backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert backbone(torch.ones(1, 3, 8, 8)).shape == (1, 8, 6, 6)
