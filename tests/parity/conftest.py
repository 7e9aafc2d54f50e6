"""The parity checks, run against the small committed fixtures (``benchmarks/parity.py`` runs them against the full ones)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"


@pytest.fixture(scope="session")
def parity() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of this folder by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], dict[str, np.ndarray]]:
    """Read a small fixture."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return read
