"""A web server on this machine that misbehaves as told, and what tests of downloads share."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import http.server
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxydet.artifacts import (
    Artifact,
    Catalogue,
    CatalogueFile,
    Downloader,
    DownloadOptions,
    Outcome,
    Plan,
    Report,
    TransferSettings,
)
from proxydet.reporting import Progress, Task

Raw = Callable[[Callable[[bytes], object], threading.Event], object]
"""Given what writes, and what is set in the end."""


@dataclass
class Served:
    """One file on the server, and how it is served."""

    body: bytes = b""
    etag: str | None = '"v1"'
    last_modified: str | None = None
    content_type: str = "application/octet-stream"
    ranges: bool = True
    heed_if_range: bool = True
    drop_after: int | None = None  # close the connection after so many bytes of each reply
    stall_after: int | None = None  # go silent after so many bytes, holding the connection
    stalls: int = 10**6  # how often
    announced: int | None = None  # a Content-Length other than the true one
    chunked: bool = False
    no_length: bool = False
    encoding: str | None = None
    redirect: str | None = None
    content_range: Callable[[int, int, int], str] | None = None
    open_ended: bool = False  # serve ranges up to the end of the file, whatever was asked for
    cut: int = 0  # leave out so many bytes at the end of each reply, and end it properly
    range_shift: int = 0  # serve other bytes than those asked for, saying so
    pause: float = 0.0  # seconds before each block
    together: int = 1  # send nothing before so many have asked
    # Given first, one a request.
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    # Body and ETag of the next requests.
    versions: list[tuple[bytes, str | None]] = field(default_factory=list)
    most_at_once: int | None = None  # answer 503 beyond so many connections
    cookie: str | None = None  # answer with a page unless the request has it
    page: bytes = b""
    forbidden_ranges: bool = False  # answer 416 to every range
    raw: Callable[[Callable[[bytes], object], threading.Event], object] | None = (
        None  # given what writes
    )
    more_headers: dict[str, str] = field(default_factory=dict)
    # From the n-th request on, behave so.
    later: dict[int, dict[str, object]] = field(default_factory=dict)
    requests: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    sent: int = 0
    active: int = 0
    most_active: int = 0

    def headers(self, name: str) -> list[str | None]:
        """Return one header of each request."""
        return [request.get(name) for request in self.requests]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        # Or the system takes megabytes that the client has not asked for into its buffers, and `sent` says little.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        super().setup()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        served = self.server.files.get(self.path)
        if served is not None and served.raw is not None:
            served.requests.append(dict(self.headers.items()))
            self.do_raw(served.raw)
            return
        self.send_response(404 if served is None else 302 if served.redirect else 200)
        for name, value in {
            "Location": served and served.redirect,
            "Content-Type": served and served.content_type,
        }.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(served.body)) if served else "0")
        self.end_headers()

    def do_GET(self) -> None:
        served = self.server.files.get(self.path)
        if served is None:
            return self._answer(404, {})
        with self.server.lock:
            served.requests.append(dict(self.headers.items()))
            served.times.append(time.monotonic())
            served.active += 1
            served.most_active = max(served.most_active, served.active)
            for name, value in served.later.get(len(served.requests), {}).items():
                setattr(served, name, value)
            if served.versions:
                served.body, served.etag = served.versions.pop(0)
            answer = served.answers.pop(0) if served.answers else None
            crowded = served.most_at_once is not None and served.active > served.most_at_once
        try:
            if crowded:
                return self._answer(503, {})
            if served.raw is not None:
                return self.do_raw(served.raw)
            if answer is not None:
                return self._answer(*answer)
            if served.redirect is not None:
                return self._answer(302, {"Location": served.redirect})
            if served.cookie is not None and served.cookie not in self.headers.get("Cookie", ""):
                return self._answer(
                    200, {"Content-Type": "text/html", "Set-Cookie": served.cookie}, served.page
                )
            return self._serve(served)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                served.active -= 1

    def do_raw(self, raw: Raw) -> None:
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw(self.wfile.write, self.server.closing)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, served: Served) -> None:
        total = len(served.body)
        first, last, partial = 0, total - 1, False
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and served.forbidden_ranges:
            self._answer(416, {})
            return
        if match and served.ranges:
            validator = self.headers.get("If-Range")
            stale = validator is not None and validator not in (served.etag, served.last_modified)
            if not (stale and served.heed_if_range):
                first, last = int(match[1]), min(int(match[2] or total - 1), total - 1)
                partial = True
                if first >= total:
                    self._answer(416, {"Content-Range": f"bytes */{total}"})
                    return
                last = total - 1 if served.open_ended else last
                first, last = first + served.range_shift, min(last + served.range_shift, total - 1)
        body = served.body[first : last + 1 - served.cut]
        self.send_response(206 if partial else 200)
        if partial:
            text = served.content_range or (lambda a, b, n: f"bytes {a}-{b}/{n}")
            self.send_header("Content-Range", text(first, last, total))
        for name, value in (
            ("ETag", served.etag),
            ("Last-Modified", served.last_modified),
            ("Content-Type", served.content_type),
            ("Content-Encoding", served.encoding),
            ("Accept-Ranges", "bytes" if served.ranges else None),
            *served.more_headers.items(),
        ):
            if value is not None:
                self.send_header(name, value)
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not served.no_length:
            self.send_header(
                "Content-Length", str(len(body) if served.announced is None else served.announced)
            )
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._send(served, body)

    def _send(self, served: Served, body: bytes) -> None:
        sent = 0
        if served.announced is not None:
            self.close_connection = True
        while len(served.requests) < served.together and not self.server.closing.wait(0.01):
            pass
        while sent < len(body):
            block = body[sent : sent + 16384]
            for limit in (served.drop_after, served.stall_after if served.stalls > 0 else None):
                if limit is not None:
                    block = block[: max(limit - sent, 0)]
            if not block:
                if served.stall_after is not None and sent >= served.stall_after:
                    served.stalls -= 1
                    self.server.closing.wait(5)
                self.close_connection = True
                return
            time.sleep(served.pause)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if served.chunked else block)
            sent += len(block)
            with self.server.lock:
                served.sent += len(block)
        if served.chunked:
            self.wfile.write(b"0\r\n\r\n")


class Server(http.server.ThreadingHTTPServer):
    """Files by path, each with its own behaviour."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: connections that break are what this server is for."""

    def add(self, path: str, body: bytes = b"", **behaviour: object) -> Served:
        self.files[path] = Served(body=body, **behaviour)  # type: ignore[arg-type]
        return self.files[path]

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """Collect what a test leaves behind: a socket or file that was not closed is reported here, and fails that test."""
    gc.freeze()  # what was there before is not searched
    gc.disable()  # one collection at the end, in the order of creation: others may hide it
    yield
    gc.enable()
    gc.collect()
    gc.unfreeze()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=lambda: running.serve_forever(0.02), daemon=True)
        thread.start()
        yield running
        running.closing.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def body() -> bytes:
    return random.Random(7).randbytes(300_000)


QUICK = TransferSettings(
    connections=1,
    first_delay=0.001,
    longest_delay=0.01,
    read_timeout=5,
    connect_timeout=2,
    slow_seconds=1,
    chunk_bytes=8192,
    attempts=4,
    longest_retry_after=2,
)


class Counts:
    """Progress that adds up what is reported, by the description of its task."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.totals: dict[str, float | None] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> Iterator[Task]:
        counts, lock = self.counts, self._lock

        class Counting:
            def advance(self, amount: float = 1, **fields: str | float) -> None:
                with lock:
                    counts[description] += amount

            def describe(self, description: str) -> None:
                pass

        self.totals[description] = total
        self.counts[description] = done
        yield Counting()


@dataclass
class Downloads:
    """A data root, and downloads into it as Python users call them; a second call is what a second run is."""

    server: Server
    root: Path
    settings: TransferSettings = QUICK
    progress: Counts = field(default_factory=Counts)

    def artifact(
        self, name: str = "thing", body: bytes | None = None, **fields: object
    ) -> Artifact:
        """Describe a file on the server; with its body it is pinned."""
        given: dict[str, object] = {
            "name": name,
            "title": "a thing",
            "addresses": (self.server.address(f"/{name}"),),
            "target": f"models/{name}.bin",
            "licence": "none",
        }
        if body is not None:
            given |= {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
        return Artifact(**{**given, **fields})  # type: ignore[arg-type]

    def open(
        self, *artifacts: Artifact, progress: Progress | None = None, **options: object
    ) -> Downloader:
        self.progress = Counts()
        catalogue = Catalogue([("test", CatalogueFile(artifacts=artifacts))])
        chosen = DownloadOptions(root=self.root, **{"settings": self.settings, **options})  # type: ignore[arg-type]
        return Downloader(catalogue, chosen, progress or self.progress)

    def plan(self, *artifacts: Artifact, **options: object) -> Plan:
        with self.open(*artifacts, **options) as downloader:
            return downloader.plan([artifact.name for artifact in artifacts])

    def fetch(self, *artifacts: Artifact, **options: object) -> Report:
        with self.open(*artifacts, **options) as downloader:
            return downloader.fetch(downloader.plan([artifact.name for artifact in artifacts]))

    def states(self, *artifacts: Artifact, **options: object) -> list[str]:
        return [item.state.value for item in self.plan(*artifacts, **options).items]

    def verify(self, *artifacts: Artifact) -> dict[str, Outcome]:
        with self.open(*artifacts) as downloader:
            found = downloader.verify([artifact.name for artifact in artifacts])
        return {finding.name: finding for finding in found}


@pytest.fixture
def downloads(server, tmp_path) -> Downloads:
    return Downloads(server, tmp_path / "root")


@dataclass
class Fetch:
    """Fetches one file from the server, or raises what went wrong."""

    downloads: Downloads

    @property
    def target(self) -> Path:
        return self.downloads.root / "models/file.bin"

    @property
    def settings(self) -> TransferSettings:
        return self.downloads.settings

    def set(self, **settings: object) -> None:
        self.downloads.settings = dataclasses.replace(self.settings, **settings)  # type: ignore[arg-type]

    def leftovers(self) -> list[Path]:
        return sorted(self.target.parent.glob(f".{self.target.name}*"))

    def counted(self) -> float:
        return self.downloads.progress.counts[self.target.name]

    def __call__(self, *paths: str, pinned: bytes | None = None, **fields: object) -> Outcome:
        server = self.downloads.server
        addresses = tuple(path if "://" in path else server.address(path) for path in paths)
        asked = self.downloads.artifact("file", pinned, addresses=addresses, **fields)
        stalling = any(served.stall_after is not None for served in server.files.values())
        settings = (
            dataclasses.replace(self.settings, read_timeout=0.3) if stalling else self.settings
        )
        report = self.downloads.fetch(asked, settings=settings)
        report.raise_for_failures()
        return report.outcomes[0]


@pytest.fixture
def fetch(downloads) -> Fetch:
    return Fetch(downloads)
