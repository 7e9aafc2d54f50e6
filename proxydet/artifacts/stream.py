"""Taking in the body of a reply: every byte is counted, limited in speed, and written where it belongs."""

from __future__ import annotations

import threading

from proxydet.artifacts.addresses import shown
from proxydet.artifacts.http import OpenReply
from proxydet.artifacts.partfile import PartFile, PartRecord
from proxydet.artifacts.patience import RateLimit, SpeedWatch, Transient
from proxydet.errors import TransferError
from proxydet.reporting import Task


class Sink:
    """Where the bytes of one file go.

    Args:
        part: The unfinished download.
        rate: The speed limit that it shares with others.
        task: Where its bytes are counted; those that an earlier run left are counted at once.
        stop: Ends a wait for the speed limit when set.
    """

    def __init__(self, part: PartFile, rate: RateLimit, task: Task, stop: threading.Event) -> None:
        self.part = part
        self.ended = False
        """Whether a reply with the whole file came to its proper end."""
        self._rate = rate
        self._task = task
        self._stop = stop
        self._lock = threading.Lock()
        self._counted = 0
        self._recount()

    def restart(self, record: PartRecord) -> None:
        """Throw away what is there and begin with another version."""
        self.ended = False
        self.part.restart(record)
        self._recount()

    def begin_pieces(self, piece_bytes: int) -> list[int]:
        """Go over to writing pieces side by side; return the numbers of those that are missing."""
        missing = self.part.begin_pieces(piece_bytes)
        self._recount()
        return missing

    def append(self, data: bytes) -> None:
        """Write bytes behind those that are there."""
        if self.part.record.piece_bytes:
            self.part.end_pieces()
            self._recount()
        self.part.append(data)
        self._count(len(data))

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes of a piece. May be called from several threads."""
        self.part.write(offset, data)
        self._count(len(data))

    def _count(self, count: int) -> None:
        with self._lock:
            self._counted += count
        self._task.advance(count)
        self._rate.took(count, self._stop)

    def _recount(self) -> None:
        """Count exactly what would not have to be fetched again."""
        with self._lock:
            change, self._counted = self.part.stored - self._counted, self.part.stored
        if change:
            self._task.advance(change)


def read_body(
    answer: OpenReply, sink: Sink, limit: int | None, *, may_be_html: bool = False
) -> None:
    """Append the body of a reply to a file.

    Args:
        answer: The reply.
        sink: Where its bytes go.
        limit: Offset at which it must end; None where no length is known.
        may_be_html: Whether the file is itself a web page.

    Raises:
        Transient: It broke off, or was too slow.
        TransferError: It is longer than announced, or a web page.
    """
    settings = answer.client.settings
    watch = SpeedWatch(settings)
    part = sink.part
    while data := answer.read(settings.chunk_bytes):
        if part.frontier == 0 and not may_be_html and looks_like_page(data):
            raise TransferError(
                f"{shown(answer.reply.address)} sent a web page in place of the file."
            )
        if limit is not None and part.frontier + len(data) > limit:
            raise TransferError(f"{shown(answer.reply.address)} sent more bytes than it announced.")
        sink.append(data)
        watch.saw(len(data))
    if limit is not None and part.frontier < limit:
        raise Transient(f"{shown(answer.reply.address)} ended before the announced length.")
    sink.ended = not answer.reply.partial


def looks_like_page(data: bytes) -> bool:
    """Tell whether bytes are the beginning of an HTML page."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<script"))
