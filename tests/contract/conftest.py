"""The packages' sources, parsed once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trees(repository) -> dict[Path, ast.Module]:
    """Every module of ``proxydet`` and ``proxydet_cli``, by its path below the repository."""
    return {
        path.relative_to(repository): ast.parse(path.read_text(encoding="utf-8"))
        for package in ("proxydet", "proxydet_cli")
        for path in sorted((repository / package).rglob("*.py"))
    }
