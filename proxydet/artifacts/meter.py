"""Progress of transfers: bytes of each file and of all, and the speed, without slowing the transfer down."""

from __future__ import annotations

import threading
import time

from proxydet.reporting import Task

_EVERY_SECONDS = 0.2
_SPEED_SECONDS = 5.0
_LARGEST_STEP = 4 << 20


class Meter:
    """Counts bytes for one file and for the whole job, and passes them on a few times a second.

    May be used from several threads.

    Args:
        file: Shows one file.
        job: Shows all files together; None where there is only one.
    """

    def __init__(self, file: Task, job: Task | None = None) -> None:
        self._file = file
        self._job = job
        self._lock = threading.Lock()
        self._pending = 0.0
        self._last = time.monotonic()
        self._began = self._last
        self._marks = [(self._last, 0.0)]
        self._count = 0.0

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Count bytes; a negative amount takes back those of a transfer that begins anew."""
        with self._lock:
            self._pending += amount
            if 0 < amount <= _LARGEST_STEP:  # a larger step is what an earlier run had fetched
                self._count += amount
            now = time.monotonic()
            if now - self._last < _EVERY_SECONDS and not fields:
                return
            self._send(now, fields)

    def describe(self, description: str) -> None:
        """Change the text in front of the file's bar."""
        self._file.describe(description)

    def finish(self) -> None:
        """Pass on what is left, and the speed over all."""
        with self._lock:
            now = time.monotonic()
            overall = _rate_text(self._count, now - self._began)
            self._send(now, {"speed": overall} if overall else {})

    def _send(self, now: float, fields: dict[str, str | float]) -> None:
        speed = self._speed(now)
        if speed:
            fields = {"speed": speed, **fields}
        self._file.advance(self._pending, **fields)
        if self._job is not None:
            self._job.advance(self._pending)
        self._pending, self._last = 0.0, now

    def _speed(self, now: float) -> str:
        self._marks.append((now, self._count))
        while len(self._marks) > 2 and now - self._marks[1][0] > _SPEED_SECONDS:
            self._marks.pop(0)
        since, had = self._marks[0]
        return _rate_text(self._count - had, now - since)


def _rate_text(count: float, seconds: float) -> str:
    if seconds <= 0 or count <= 0:
        return ""
    rate = count / seconds
    return f"{rate / 1e6:.1f} MB/s" if rate >= 1e5 else f"{rate / 1e3:.1f} kB/s"
