"""A real server on a free port: many clients, slow ones, rude ones, and stopping."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from proxydet.errors import ConfigError, JobInterruptedError, RuntimeEnvironmentError
from proxydet.serve.app import Served, ServingSettings, build_app
from proxydet.serve.server import address_of, bind, is_loopback, serve

RAW = {"content-type": "image/png"}
ASK = "/api/predict?score_threshold=0.02"


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connect(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=30)


def all_of(connection: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def reply(connection: socket.socket) -> bytes:
    """One answer of JSON; its head and its body may come apart."""
    received = b""
    while not received.endswith(b"}"):
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def head(length: int | None, *, more: str = "") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {ASK} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{size}\r\n{more}\r\n"
    ).encode()


def in_background(pool: ThreadPoolExecutor, running: Any, png: bytes) -> Any:
    return pool.submit(httpx.post, running.url + ASK, content=png, headers=RAW, timeout=60)


def test_many_clients_get_what_the_detector_finds(detector, start_server, png, pixels):
    names = [None, ["red star"], ["blue circle", "green square"], ["red square", "red circle"]]
    wanted = [
        json.loads(json.dumps(detector.predict(pixels, words, score_threshold=0.02).to_dict()))
        for words in names
    ]
    with start_server(build_app(detector)) as running, running.client() as client:

        def ask(number: int) -> bool:
            words = names[number % 4]
            query = "" if words is None else "&words=" + ",".join(words)
            answer = client.post(ASK + query, content=png, headers=RAW)
            assert answer.status_code == 200, answer.text
            return bool({**answer.json(), "file": None} == {**wanted[number % 4], "file": None})

        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(ask, range(32)))
        assert running.app.budget.held == 0


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(held, start_server, png):
    settings = ServingSettings(queue_places=2)
    with start_server(build_app(held, settings)) as running, ThreadPoolExecutor(3) as pool:
        answers = [in_background(pool, running, png)]
        assert held.entered.wait(30)
        answers += [in_background(pool, running, png) for _ in range(2)]
        eventually(lambda: running.app.queue.waiting == 2)
        with running.client() as client:
            refused = client.post(ASK, content=png, headers=RAW)
            assert client.get("/api/health").json() == {"status": "ok", "waiting": 2, "busy": True}
        assert refused.status_code == 503
        assert refused.json()["error"]["kind"] == "busy"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        held.release.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3


def test_waiting_has_an_end(held, start_server, png):
    settings = ServingSettings(wait_seconds=0.3)
    with start_server(build_app(held, settings)) as running, ThreadPoolExecutor(2) as pool:
        first = in_background(pool, running, png)
        assert held.entered.wait(30)
        second = in_background(pool, running, png).result()
        assert first.result().status_code == 504
        assert first.result().json()["error"]["kind"] == "timeout"
        assert (second.status_code, second.json()["error"]["kind"]) == (503, "busy")
        assert int(second.headers["retry-after"]) >= 1
        held.release.set()
        eventually(lambda: not running.app.queue.busy)
        assert (held.runs, running.app.budget.held) == (1, 0)


def test_who_goes_away_leaves_the_queue(held, start_server, png):
    with start_server(build_app(held)) as running, ThreadPoolExecutor(1) as pool:
        first = in_background(pool, running, png)
        assert held.entered.wait(30)
        with connect(running) as connection:
            connection.sendall(head(len(png)) + png)
            eventually(lambda: running.app.queue.waiting == 1)
        eventually(lambda: running.app.queue.waiting == 0)
        held.release.set()
        assert first.result().status_code == 200
        assert held.runs == 1
        eventually(lambda: running.app.budget.held == 0)


def test_who_goes_away_in_mid_upload_leaves_nothing(detector, start_server, png):
    with start_server(build_app(detector)) as running:
        for start in (head(len(png)), head(None) + b"7d0\r\n"):
            with connect(running) as connection:
                connection.sendall(start + png[:2000])
                eventually(lambda: running.app.budget.held == 2000)
            eventually(lambda: running.app.budget.held == 0)
        with running.client() as client:
            assert client.post(ASK, content=png, headers=RAW).status_code == 200


def test_slow_uploads_are_ended(detector, start_server, png):
    settings = ServingSettings(upload_seconds=0.4)
    with start_server(build_app(detector, settings)) as running, connect(running) as connection:
        connection.sendall(head(len(png)) + png[:100])
        answer = reply(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"slow-upload"' in answer
        assert running.app.budget.held == 0


def test_what_trickles_in_after_a_refusal_is_ended(detector, start_server):
    settings = ServingSettings(max_upload_bytes=1000, header_seconds=0.4)
    with start_server(build_app(detector, settings)) as running, connect(running) as connection:
        connection.sendall(head(100_000))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")

        def drip() -> bool:
            try:
                connection.sendall(b"x")
            except OSError:
                return True
            return False

        eventually(drip, 4)


@pytest.mark.parametrize("start", [b"", b"POST /api/pre", head(5)[:-2]])
def test_slow_heads_are_ended(detector, start_server, start):
    settings = ServingSettings(header_seconds=0.4)
    with start_server(build_app(detector, settings)) as running, connect(running) as connection:
        connection.sendall(start)
        assert all_of(connection) == b""


def test_a_slow_second_head_is_ended_too(detector, start_server):
    settings = ServingSettings(header_seconds=0.4)
    with start_server(build_app(detector, settings)) as running, connect(running) as connection:
        connection.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply(connection)
        time.sleep(0.1)
        connection.sendall(b"GET /api/hea")
        began = time.monotonic()
        all_of(connection)
        assert time.monotonic() - began < 4, "that was the time of idle connections"


def test_work_may_take_longer_than_a_head(held, start_server, png):
    settings = ServingSettings(header_seconds=0.3)
    with start_server(build_app(held, settings)) as running, ThreadPoolExecutor(1) as pool:
        answer = in_background(pool, running, png)
        assert held.entered.wait(30)
        time.sleep(0.6)
        held.release.set()
        assert answer.result().status_code == 200


def test_too_large_is_said_before_the_upload(detector, start_server):
    settings = ServingSettings(max_upload_bytes=1000)
    with start_server(build_app(detector, settings)) as running:
        with connect(running) as connection:
            connection.sendall(head(10**12, more="Connection: close\r\n"))
            assert all_of(connection).startswith(b"HTTP/1.1 413 ")
        with connect(running) as connection:
            connection.sendall(head(None) + b"800\r\n" + bytes(2048) + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "request_text",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        head(5, more="Content-Length: 6\r\n") + b"12345",
        head(-5) + b"12345",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_broken_requests_are_refused(detector, start_server, request_text):
    settings = ServingSettings(header_seconds=1)
    with start_server(build_app(detector, settings)) as running:
        with connect(running) as connection:
            connection.sendall(request_text)
            answer = connection.recv(65536)
            assert answer == b"" or answer.split()[1] in (b"400", b"403", b"404"), answer[:200]
        with running.client() as client:
            assert client.get("/api/health").status_code == 200


def test_many_connections_are_refused(detector, start_server):
    settings = ServingSettings(connections=5)
    with start_server(build_app(detector, settings)) as running:
        idle = [connect(running) for _ in range(5)]
        eventually(lambda: len(running.server.server_state.connections) == 5)
        with running.client() as client:
            assert client.get("/api/health").status_code == 503
        for connection in idle:
            connection.close()
        eventually(lambda: not running.server.server_state.connections)
        with running.client() as client:
            assert client.get("/api/health").status_code == 200


def test_stopping_finishes_what_runs_and_refuses_what_waits(held, start_server, png):
    with start_server(build_app(held)) as running, ThreadPoolExecutor(2) as pool:
        first = in_background(pool, running, png)
        assert held.entered.wait(30)
        second = in_background(pool, running, png)
        eventually(lambda: running.app.queue.waiting == 1)
        running.server.should_exit = True
        assert second.result().status_code == 503
        assert second.result().json()["error"]["kind"] == "stopping"
        held.release.set()
        assert first.result().status_code == 200
        eventually(lambda: not running.server.server_state.connections)
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url, timeout=10)


def test_a_signal_ends_it_and_a_second_one_ends_it_at_once(detector):
    def interrupt(port: int, open_request: bool) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            if open_request:
                connection.sendall(head(9) + b"1")
                eventually(lambda: app.budget.held == 1)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT if open_request else signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for open_request in (False, True):
        app = build_app(detector)
        with bind("127.0.0.1", 0) as listening, ThreadPoolExecutor(1) as pool:
            start = partial(pool.submit, interrupt, listening.getsockname()[1], open_request)
            if open_request:
                with pytest.raises(JobInterruptedError) as stopped:
                    serve(app, listening, on_started=start)
                assert stopped.value.exit_code == 130
            else:
                serve(app, listening, on_started=start)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_job_that_is_given_up_and_fails_is_logged(held, start_server, png, caplog):
    settings = ServingSettings(wait_seconds=5)
    with start_server(build_app(held, settings)) as running, running.client() as client:
        with caplog.at_level(logging.WARNING, "proxydet"):
            with connect(running) as connection:
                connection.sendall(head(len(png)) + png)
                assert held.entered.wait(30)
            eventually(lambda: running.app.budget.held == 0)
            held.failure = RuntimeError("lost")
            held.release.set()
            eventually(lambda: not running.app.queue.busy)
            assert "failed: lost" in caplog.text
        held.failure = None
        assert client.post(ASK, content=png, headers=RAW).status_code == 200


def test_the_log_tells_who_and_what_and_no_words(detector, start_server, png, caplog):
    logger = logging.getLogger("proxydet.serve.access")
    with (
        start_server(build_app(detector)) as running,
        running.client() as client,
        caplog.at_level(logging.INFO, logger.name),
    ):
        client.post(ASK + "&words=red+star", content=png, headers=RAW)
        client.get("/a%0d%0aforged%20line")
        eventually(lambda: len(caplog.messages) == 2)
    assert caplog.messages[0].startswith("127.0.0.1 POST /api/predict 200 ")
    assert "GET /a%0D%0Aforged%20line 404 " in caplog.messages[1]
    assert "star" not in caplog.text


def test_threads_share_the_budget(detector, start_server, png):
    settings = dataclasses.replace(ServingSettings(), held_bytes=len(png) + 10)
    with start_server(build_app(detector, settings)) as running, connect(running) as connection:
        connection.sendall(head(len(png)) + png[:1000])
        eventually(lambda: running.app.budget.held == 1000)
        with running.client() as client:
            assert client.post(ASK, content=png, headers=RAW).status_code == 503
            connection.close()
            eventually(lambda: running.app.budget.held == 0)
            assert client.post(ASK, content=png, headers=RAW).status_code == 200


def test_addresses():
    with bind("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert address_of(one) == f"http://127.0.0.1:{port}/"
        assert is_loopback(one)
        one.listen()
        with pytest.raises(RuntimeEnvironmentError, match=f"port {port} .* is in use") as raised:
            bind("127.0.0.1", port)
        assert "--port" in str(raised.value.hint)
    with bind("0.0.0.0", 0) as everywhere:
        assert address_of(everywhere).startswith("http://127.0.0.1:")
        assert not is_loopback(everywhere)
    with pytest.raises(ConfigError, match="cannot be found"):
        bind("no-such-host.invalid", 0)
    with pytest.raises(RuntimeEnvironmentError, match="cannot listen on"):
        bind("203.0.113.1", 0)


def test_the_page_is_there_while_the_model_loads(detector, start_server, png):
    release = threading.Event()

    def opened() -> Served:
        assert release.wait(60)
        return Served(detector=detector)

    app = build_app(opened, name="tiny")
    with start_server(app) as running, running.client() as client, ThreadPoolExecutor() as pool:
        health = client.get("/api/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert int(health.headers["retry-after"]) > 0
        assert client.get("/").status_code == 200
        info = pool.submit(client.get, "/api/info")
        found = pool.submit(client.post, ASK, content=png, headers=RAW)
        wrong = client.post(ASK + "&top=no", content=png, headers=RAW)
        assert wrong.status_code == 400
        eventually(lambda: app.queue.waiting == 1)
        assert not info.done()
        release.set()
        assert info.result().json()["model"]["name"] == "tiny"
        assert found.result().status_code == 200
        assert client.get("/api/health").json()["status"] == "ok"


def test_requests_do_not_wait_for_a_model_for_ever(detector, start_server, png):
    release = threading.Event()

    def opened() -> Served:
        assert release.wait(60)
        return Served(detector=detector)

    settings = ServingSettings(wait_seconds=0.1)
    with start_server(build_app(opened, settings)) as running, running.client() as client:
        for refused in (client.get("/api/info"), client.post(ASK, content=png, headers=RAW)):
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
        assert client.get("/api/info").json()["error"]["kind"] == "loading"
        release.set()


def test_a_model_that_cannot_be_opened_ends_serving():
    def opened() -> Served:
        raise ConfigError("the weights are damaged")

    with bind("127.0.0.1", 0) as listening, pytest.raises(ConfigError, match="weights"):
        serve(build_app(opened), listening)


def test_a_model_that_cannot_be_opened_is_reported_by_any_server(png):
    def opened() -> Served:
        raise ConfigError("the weights are damaged", hint="download them again")

    with TestClient(build_app(opened), base_url="http://127.0.0.1") as client:
        info = client.get("/api/info")
        for refused in (info, client.post(ASK, content=png, headers=RAW)):
            error = refused.json()["error"]
            assert (refused.status_code, error["kind"]) == (503, "failed")
            assert "the weights are damaged" in error["message"]
            assert error["hint"] == "download them again"
        health = client.get("/api/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert health.json()["reason"] == "the weights are damaged"


LOADING = """
import os, signal, sys, threading, time
from proxydet.errors import JobInterruptedError
from proxydet.serve.app import build_app
from proxydet.serve.server import bind, serve

signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

with bind("127.0.0.1", 0) as listening:
    try:
        serve(build_app(lambda: time.sleep(60)), listening, on_started=threading.Thread(target=interrupt).start)
    except JobInterruptedError as error:
        sys.exit(error.exit_code)
"""


def test_a_second_sigint_does_not_wait_for_a_model():
    ended = subprocess.run([sys.executable, "-c", LOADING], timeout=30, capture_output=True)
    assert (ended.returncode, ended.stderr) == (130, b"")
