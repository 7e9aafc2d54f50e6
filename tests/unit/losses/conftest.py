"""Gives the tests the small detector of ``tests/fixtures/tiny_detector.py``."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny(repository) -> ModuleType:
    """The module ``tiny_detector``."""
    path = repository / "tests" / "fixtures" / "tiny_detector.py"
    spec = importlib.util.spec_from_file_location("tiny_detector", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
