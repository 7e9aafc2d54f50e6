"""What all tests share: no network, no use of the developer's cache, markers that skip with their reason."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

# Shared machines stall for seconds; a deadline would only report that.
hypothesis.settings.register_profile("proxydet", deadline=None)
hypothesis.settings.load_profile("proxydet")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))
    if not SHARED.is_dir():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason="../shared is not present"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


class Ended(NamedTuple):
    """What a command left: its exit code, its output, and what it wrote to stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The output of a command with ``--json``."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys) -> Callable[..., Ended]:
    """Run a command line in this process: ``cli("vocab", "show", path)``."""
    from proxydet_cli.main import main

    def run(*words: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def unplotted() -> Iterator[None]:
    """Leave figures empty: drawing them takes most of the time of a short command."""

    def savefig(_figure: object, target: Any, **_: object) -> None:
        target.write("<svg/>") if hasattr(target, "write") else Path(target).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path_factory.getbasetemp() / "proxydet-cache"))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undo what a command line that ran in this process did to the core's loggers."""
    loggers = [logging.getLogger(name) for name in ("proxydet", "proxydet.serve.access")]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    connect = socket.socket.connect

    def connect_at_home(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if isinstance(host, str) and host not in {"127.0.0.1", "localhost", "::1", "0.0.0.0"}:
            pytest.fail(f"a test tried to reach {host}")
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_at_home)
        yield
