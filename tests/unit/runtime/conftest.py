"""Throw-away copies of detectron2's file and package: no test touches the developer's own installation."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest


def installed() -> Path:
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture
def roi_align_file(tmp_path) -> Path:
    """A copy of the installed ``layers/roi_align.py``, alone in its package."""
    folder = tmp_path / "site-packages" / "detectron2" / "layers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    return Path(shutil.copy(installed() / "layers" / "roi_align.py", folder))


@pytest.fixture
def detectron2_copy(tmp_path) -> Path:
    """A copy of the whole installed package."""
    target = tmp_path / "copy" / "detectron2"
    shutil.copytree(installed(), target, ignore=shutil.ignore_patterns("__pycache__"))
    return target
