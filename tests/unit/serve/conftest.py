"""A small random detector behind HTTP: as an application for a test client, and as a server on a free port."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from proxydet.detector import Detector
from proxydet.modeling.postprocess import Prediction
from proxydet.serve.app import ServingApp, ServingSettings, build_app
from proxydet.serve.server import Server, bind

SETTINGS = ServingSettings(max_upload_bytes=200_000, max_pixels=100_000, max_words=20)


@dataclass(frozen=True)
class Running:
    """A server that accepts requests."""

    url: str
    port: int
    app: ServingApp
    server: Server

    def client(self, seconds: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=seconds, trust_env=False)


class HeldDetector(Detector):
    """Waits in the middle of its work until it is released."""

    def __init__(self, like: Detector) -> None:
        super().__init__(like.network, shortest=64, longest=100, encoder=like.encoder)
        self.entered = threading.Event()
        self.release = threading.Event()
        self.runs = 0
        self.failure: Exception | None = None

    def predict_images(self, *arguments: Any, **named: Any) -> list[Prediction]:
        self.runs += 1
        self.entered.set()
        assert self.release.wait(60)
        if self.failure is not None:
            raise self.failure
        return super().predict_images(*arguments, **named)


StartServer = Callable[[ServingApp], AbstractContextManager[Running]]


@pytest.fixture
def held(detector) -> Iterator[HeldDetector]:
    made = HeldDetector(detector)
    yield made
    made.release.set()


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture(scope="session")
def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def client(detector) -> Iterator[TestClient]:
    app = build_app(detector, SETTINGS, name="tiny")
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture(scope="session")
def start_server() -> StartServer:
    return running


@contextmanager
def running(app: ServingApp) -> Iterator[Running]:
    """Run a server in a thread, and stop it at the end."""
    started = threading.Event()
    with bind("127.0.0.1", 0) as listening:
        server = Server(app, started.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert started.wait(30)
            port = listening.getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", port, app, server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
