"""Loads the toy training, which is also run as a script."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOY = Path(__file__).with_name("toy_run.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    if "toy_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toy_run", TOY)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["toy_run"] = module
        spec.loader.exec_module(module)
    return sys.modules["toy_run"]


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Leave out a plan's estimate, which takes a second."""
    from proxydet.training.plan import DeviceSpeed, Estimate

    estimate = Estimate(
        device="cpu",
        parameters=1,
        memory_gib=1.0,
        seconds_per_step=1.0,
        speed=DeviceSpeed(operations={}, memory=1.0, launch=1.0),
        objects_an_image=1.0,
        batches=(),
        hours=1.0,
        images=1,
    )
    monkeypatch.setattr("proxydet.training.plan.estimate_run", lambda *_, **__: estimate)
