"""Waiting: pauses between attempts, speed limits, and the sign to stop."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from proxydet.artifacts.settings import TransferSettings
from proxydet.errors import TransferError

_logger = logging.getLogger(__name__)


class Stopped(TransferError):
    """The transfer was asked to stop; what it had is kept."""

    def __init__(self) -> None:
        super().__init__("The download was stopped; what it had is kept and is used next time.")


class Transient(TransferError):
    """A failure that may pass: the same address is worth another attempt.

    Args:
        message: What happened.
        retry_after: Seconds that the server asked to wait, if it did.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Backoff:
    """Counts failures of one address and waits between them, longer each time, with jitter.

    Args:
        settings: How often and how long.
        stop: Ends a wait when set.
        attempts: Attempts without progress to allow; None for those of the settings.
    """

    def __init__(
        self, settings: TransferSettings, stop: threading.Event, attempts: int | None = None
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._attempts = attempts or settings.retries
        self._failures = 0
        self._told = False

    def failed(self, error: Transient, *, progress: bool) -> None:
        """Wait before the next attempt.

        Args:
            error: Why the attempt failed.
            progress: Whether it brought bytes that no attempt before it had.

        Raises:
            TransferError: This was one failure too many, or the server asks to wait too long.
            Stopped: The stop sign was given meanwhile.
        """
        self._failures = 1 if progress else self._failures + 1
        if self._failures >= self._attempts:
            times = f", {self._failures} times in a row" if self._failures > 1 else ""
            raise TransferError(f"{error.message.rstrip('.')}{times}.") from error
        delay = self._delay(error)
        if not progress and not self._told:
            self._told = True
            _logger.warning("%s Trying again.", error.message)
        pause(delay, self._stop)

    def _delay(self, error: Transient) -> float:
        settings = self._settings
        if error.retry_after is not None:
            if error.retry_after > settings.longest_retry_after:
                minutes = error.retry_after / 60
                raise TransferError(
                    f"{error.message} The server asks to come back in {minutes:.0f} minutes.",
                    hint="Run the same command again then: what was fetched is kept.",
                )
            return error.retry_after
        delay = min(settings.first_delay * 2.0 ** (self._failures - 1), settings.longest_delay)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, guards nothing


class RateLimit:
    """Keeps the sum of all transfers under a rate.

    Args:
        bytes_per_second: The rate; None for no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def took(self, count: int, stop: threading.Event) -> None:
        """Account for ``count`` bytes that were just read, and wait until the next may be read.

        Raises:
            Stopped: The stop sign was given meanwhile.
        """
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self._rate
            wait = self._free_at - now
        pause(wait, stop)


class SpeedWatch:
    """Notices a connection that gives so little that it counts as dead.

    Args:
        settings: What counts as too slow.
    """

    def __init__(self, settings: TransferSettings) -> None:
        # Under a speed limit of our own, slowness is no sign of a dead connection.
        limited = settings.limit_rate is not None
        self._enough = 1 if limited else settings.slow_bytes
        self._seconds = settings.slow_seconds
        self._since = time.monotonic()
        self._count = 0

    def saw(self, count: int) -> None:
        """Account for ``count`` bytes that were just read.

        Raises:
            Transient: Too few came in the last ``slow_seconds``.
        """
        self._count += count
        now = time.monotonic()
        if now - self._since >= self._seconds:
            if self._count < self._enough:
                raise Transient(
                    f"The server sent only {self._count} bytes in {self._seconds:.0f} seconds."
                )
            self._since, self._count = now, 0


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait, unless stopped.

    Raises:
        Stopped: The stop sign was given meanwhile.
    """
    if stop.wait(max(seconds, 0.0)):
        raise Stopped


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a reply asks to wait: Retry-After in seconds or as a date; None if it does not."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max((when - datetime.now(timezone.utc)).total_seconds(), 0.0)
