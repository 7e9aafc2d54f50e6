"""A small random detector behind HTTP: as an application for a test client, and as a server on a free port."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from proxydet.detector import Detector
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import get_recipe
from proxydet.serving.app import ServingApp, build_app
from proxydet.serving.server import Server, bind
from proxydet.serving.settings import ServingSettings
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

WORDS = ["red", "blue", "green", "circle", "square", "star"]
CLASSES = ["red circle", "blue square", "green star", "blue circle"]
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


StartServer = Callable[[ServingApp], AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def detector() -> Detector:
    encoder = CompositionalEncoder.create(WORDS, dim=64, noise=0.1, seed=1)
    torch.manual_seed(5)
    vocabulary = Vocabulary.from_arrays(CLASSES, encoder.encode(CLASSES), [1, 1, 1, 0])
    network = ProxyDetNetwork(get_recipe("tiny").model, vocabulary)
    # Fresh heads score everything alike; larger weights make scores that differ.
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("roi_heads.") and parameter.ndim > 1:
                parameter.mul_(6)
    return Detector(network, shortest=64, longest=100, encoder=encoder)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture(scope="session")
def png(pixels: np.ndarray) -> bytes:
    return as_file(pixels, "PNG")


@pytest.fixture(scope="session")
def client(detector: Detector) -> Iterator[TestClient]:
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


def as_file(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def answer_of(connection: socket.socket) -> bytes:
    """All that a server sends until it closes."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received
