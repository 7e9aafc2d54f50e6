"""Stop signals: noted when they come, obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGUSR1 is what `#SBATCH --signal=USR1@120` sends before SLURM takes the machine away.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopNow(BaseException):
    """A stop signal came while nothing had to be finished first."""


class StopSignals:
    """Context in which SIGINT, SIGTERM and SIGUSR1 are noted instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once, for a user who does not want to wait. Outside the main thread,
    where Python cannot take signals, nothing is changed.
    """

    received = 0
    """Number of the first signal that came, 0 when none did."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._immediate = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within this context a signal raises `StopNow` as it comes: for long work that may be cut short."""
        self._immediate = True
        try:
            if self.received:
                raise StopNow
            yield
        finally:
            self._immediate = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._immediate:
            raise StopNow
