"""Batches, fetched ahead in a thread, with an eye on a loader that is stuck."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

from proxydet.errors import DataError, TrainingError

_AHEAD = 2


class BatchFeed:
    """An endless source of batches that are ready before they are asked for.

    Args:
        batches: The loader. It is iterated in a thread, beginning when the first batch is asked for.
        timeout: Seconds to wait for a batch; None waits for ever.
    """

    def __init__(self, batches: Iterable[Any], timeout: float | None) -> None:
        self._batches = batches
        self._timeout = timeout
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batch-feed", daemon=True)
        self.waited = 0.0
        """Seconds spent waiting for batches so far."""

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            TrainingError: None came within the timeout, or a loader process died.
            DataError: The loader came to an end, or what it met in the data.
        """
        if not self._thread.is_alive() and self._queue.empty():
            self._thread.start()
        start = time.perf_counter()
        try:
            item = self._queue.get(timeout=self._timeout)
        except queue.Empty as error:
            raise TrainingError(
                f"The data loader gave no batch for {self._timeout:.0f} seconds.",
                hint="Look at the file system that holds the images; "
                "data.worker_timeout_s sets how long to wait.",
            ) from error
        finally:
            self.waited += time.perf_counter() - start
        if isinstance(item, _Failure):
            raise _translate(item.error)
        return item

    def _fill(self) -> None:
        item: Any
        iterator = iter(self._batches)
        while not self._closed.is_set():
            try:
                item = next(iterator)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asks for the batch
                item = _Failure(error)
            self._put(item)
            if isinstance(item, _Failure):
                return

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, StopIteration):
        return DataError(
            "The data loader came to its end in the middle of training.",
            hint="this is a bug in proxydet: please report it",
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        failure = TrainingError(
            f"A process of the data loader died: {error}",
            hint="Most often the machine ran out of memory: use fewer loader workers.",
        )
        failure.__cause__ = error
        return failure
    return error
