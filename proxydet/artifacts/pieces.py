"""Fetching one large file over several connections, each asking for the next missing piece."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace

from proxydet.artifacts.addresses import shown
from proxydet.artifacts.http import Client, Request
from proxydet.artifacts.patience import Backoff, SpeedWatch, Stopped, Transient
from proxydet.artifacts.replies import RangeRefused
from proxydet.artifacts.stream import Sink
from proxydet.artifacts.workers import run_workers
from proxydet.errors import ProxydetError, TransferError

_logger = logging.getLogger(__name__)


def fetch_pieces(client: Client, sink: Sink, request: Request) -> None:
    """Fetch all missing pieces of a file whose size and version are known.

    Args:
        client: Makes the requests.
        sink: Where the bytes go; its record holds the size and the version.
        request: A request for the file; its stretch is replaced.

    Raises:
        RangeRefused: The server does not serve the stretches asked for, or now has another version.
        TransferError: It stopped serving.
        DiskFullError: There is no room.
    """
    round_ = _Round(client, sink, request)
    _logger.debug("%d pieces over %d connections", len(round_.missing), round_.connections)
    run_workers([round_.work] * round_.connections, client.stop)
    if round_.errors:
        raise round_.errors[0]
    if client.stop.is_set():
        raise Stopped


class _Round:
    """The state that the connections share."""

    def __init__(self, client: Client, sink: Sink, request: Request) -> None:
        self._client = client
        self._sink = sink
        self._request = request
        self._total = sink.part.record.total or 0
        self._piece = client.settings.piece_bytes
        self.missing = deque(sink.begin_pieces(self._piece))
        self.connections = min(client.settings.connections, len(self.missing))
        self.errors: list[ProxydetError] = []
        self._begun: dict[int, int] = {}
        self._lock = threading.Lock()
        self._received = 0

    def work(self) -> None:
        """Fetch missing pieces until none is left or an error ends the round.

        A connection that gets nothing for long is given up as long as another is at work: some servers refuse more than
        a few at a time.
        """
        backoff = Backoff(self._client.settings, self._client.stop)
        seen = 0
        while (index := self._next()) is not None:
            try:
                self._fetch(index)
            except Transient as error:
                self._put_back(index)
                progress, seen = self._received > seen, self._received
                try:
                    backoff.failed(error, progress=progress)
                except TransferError as final:
                    if not self._leave():
                        self._fail(final)
                    return
            except ProxydetError as error:
                self._fail(error)
        self._leave()

    def _leave(self) -> bool:
        """End one connection; tell whether another goes on."""
        with self._lock:
            self.connections -= 1
            return self.connections > 0

    def _next(self) -> int | None:
        with self._lock:
            if self.errors or self._client.stop.is_set() or not self.missing:
                return None
            return self.missing.popleft()

    def _put_back(self, index: int) -> None:
        with self._lock:
            self.missing.appendleft(index)

    def _fail(self, error: ProxydetError) -> None:
        with self._lock:
            self.errors.append(error)

    def _fetch(self, index: int) -> None:
        """Fetch one piece, or the rest of it where an attempt before broke off."""
        end = min((index + 1) * self._piece, self._total)
        offset = index * self._piece + self._begun.get(index, 0)
        request = replace(self._request, first=offset, last=end - 1)
        with self._client.open(request) as answer:
            reply = answer.reply
            record = self._sink.part.record
            same = reply.validator == record.validator and reply.total in (None, self._total)
            if not reply.partial or reply.first != offset or reply.web_page or not same:
                raise RangeRefused(
                    f"{shown(reply.address)} did not serve the part asked for.", None
                )
            watch = SpeedWatch(self._client.settings)
            while data := answer.read(self._client.settings.chunk_bytes):
                if offset + len(data) > end:
                    raise RangeRefused(f"{shown(reply.address)} sent more than asked for.", None)
                self._take(index, offset, data)
                offset += len(data)
                watch.saw(len(data))
        if offset < end:
            raise Transient(f"{shown(self._request.address)} ended before the announced length.")
        self._sink.part.finish_piece(index)

    def _take(self, index: int, offset: int, data: bytes) -> None:
        self._sink.write(offset, data)
        with self._lock:
            if self.errors:
                raise Stopped
            self._begun[index] = offset + len(data) - index * self._piece
            self._received += len(data)
