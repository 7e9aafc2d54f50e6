"""How long jobs in the core report their progress without printing.

The core never prints. A function that takes long accepts a ``progress`` argument; the command line passes one
that draws bars on a terminal and writes plain lines elsewhere, a library user passes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Count ``amount`` more units as done; ``fields`` are shown next to the bar (loss, speed)."""

    def describe(self, description: str) -> None:
        """Change the text in front of the bar."""


class Progress(Protocol):
    """Where tasks are shown."""

    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> AbstractContextManager[Task]:
        """Start a task; use as ``with progress.task(...) as task``.

        Args:
            description: What is being done, a few words.
            total: Units in all; None when unknown.
            unit: What is counted: ``"images"``, ``"B"`` for bytes, ``"it"``.
            done: Units done before (a resumed job).
        """


class _SilentTask:
    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Count nothing."""

    def describe(self, description: str) -> None:
        """Show nothing."""


class SilentProgress:
    """Progress that nobody watches: the default of every ``progress`` argument."""

    @contextmanager
    def task(  # the protocol's arguments are accepted and not shown
        self,
        description: str,  # noqa: ARG002
        *,
        total: float | None = None,  # noqa: ARG002
        unit: str = "",  # noqa: ARG002
        done: float = 0,  # noqa: ARG002
    ) -> Iterator[Task]:
        """Run a task without showing it."""
        yield _SilentTask()


SILENT = SilentProgress()
