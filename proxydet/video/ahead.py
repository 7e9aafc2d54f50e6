"""Runs an iterator in a thread of its own, a bounded number of items ahead of whoever consumes it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# A camera may block in its driver: the thread is a daemon, and is not waited for longer than this.
_PATIENCE_S = 5.0


def read_ahead(
    items: Iterable[Item], size: int, *, newest: bool = False
) -> Generator[Item, None, None]:
    """Yield the items of an iterable that a thread runs through.

    An error of the iterable is raised here, after the items before it. Closing the generator stops the thread.

    Args:
        items: What to run through.
        size: Most items that wait; at least 1.
        newest: Where the consumer is slower, drop the oldest waiting item instead of making the thread wait.
    """
    queue = _Queue[Item](size, newest=newest)
    thread = threading.Thread(target=queue.fill, args=(items,), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield from queue
    finally:
        queue.stop()
        thread.join(_PATIENCE_S)


class _Queue(Generic[Item]):
    def __init__(self, size: int, *, newest: bool) -> None:
        self._size = size
        self._newest = newest
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def fill(self, items: Iterable[Item]) -> None:
        """Run through the items: the thread's work."""
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 raised again where the items are consumed
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def stop(self) -> None:
        """Make the thread end at its next item."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def _put(self, item: Item) -> bool:
        with self._changed:
            if self._newest and len(self._waiting) >= self._size:
                self._waiting.popleft()
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._size)
            if self._stopped:
                return False
            self._waiting.append(item)
            self._changed.notify_all()
            return True
