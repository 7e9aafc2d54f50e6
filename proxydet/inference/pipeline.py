"""Keeps a network busy: threads read ahead of it and write behind it. Evaluation, prediction and videos share it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from proxydet.errors import DataError, ProxydetError

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Image = TypeVar("Image")
Found = TypeVar("Found")

READERS = 4
"""Threads that read images ahead; an object store, which is slow to answer and not to read, takes more."""
ENDING_S = 5.0
"""Seconds that the end waits for threads that still read."""
_PREPARERS = 2
_WINDOW = 8


def run_images(
    items: Iterable[Item],
    read: Callable[[Item], Image],
    detect: Callable[[list[Image]], Sequence[Found]],
    *,
    batch_size: int,
    shape: Callable[[Image], Hashable] | None = None,
    readers: int = READERS,
) -> Generator[tuple[Item, tuple[Image, Found] | DataError], None, None]:
    """Detect objects in images, a batch at a time, while threads read the next ones; close it when it is not run to its end.

    Args:
        items: What names the images.
        read: Returns the image of one, or raises DataError; threads call it.
        detect: Returns what is found in each image of a batch.
        batch_size: Images in a batch, those that cannot be read among them.
        shape: Images for which it returns the same share a batch, out of a window of eight times as many: none is padded to
            the size of another. Batches depend on the items alone. None: batches are taken as the items come.
        readers: Threads that read.

    Yields:
        In the order of the items, each with its image and what was found in it, or with the error of reading it.
    """
    window = batch_size if shape is None else _WINDOW * batch_size
    waiting: deque[tuple[Item, Future[Image | DataError]]] = deque()
    upcoming = iter(items)
    given: SimpleQueue[tuple[Item, Future[Image | DataError]] | None] = SimpleQueue()

    def work() -> None:
        while (task := given.get()) is not None:
            item, future = task
            try:
                future.set_result(read(item))
            except DataError as error:
                future.set_result(error)
            except BaseException as error:  # noqa: BLE001 raised where it is waited for
                future.set_exception(error)
            del task, item, future  # the image is not kept until the next one comes

    # Daemons, unlike those of an executor: one that waits for a store keeps no process from ending.
    threads = [threading.Thread(target=work, name="read", daemon=True) for _ in range(readers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            for item in islice(upcoming, window + batch_size + readers - len(waiting)):
                waiting.append((item, Future()))
                given.put(waiting[-1])
            if not waiting:
                return
            taken = [waiting.popleft() for _ in range(min(window, len(waiting)))]
            pairs = [(item, future.result()) for item, future in taken]
            groups: dict[Hashable, list[tuple[int, Image]]] = {}
            for index, (_, image) in enumerate(pairs):
                if not isinstance(image, DataError):
                    key = None if shape is None else shape(image)
                    groups.setdefault(key, []).append((index, image))
            found: dict[int, Found] = {}
            for group in groups.values():
                for start in range(0, len(group), batch_size):
                    batch = group[start : start + batch_size]
                    results = detect([image for _, image in batch])
                    found.update(
                        (index, one) for (index, _), one in zip(batch, results, strict=True)
                    )
            for index, (item, image) in enumerate(pairs):
                yield item, image if isinstance(image, DataError) else (image, found[index])
    finally:
        with contextlib.suppress(Empty):
            while True:
                given.get_nowait()
        for _ in threads:
            given.put(None)
        end = time.monotonic() + ENDING_S
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))


class Writer(ABC):
    """Writes results, one after the other."""

    def prepare(self, result: Any) -> Any:
        """Do the work that needs no order (drawing, encoding); threads call this at once."""
        return result

    @abstractmethod
    def add(self, result: Any, prepared: Any) -> None:
        """Write, or keep, a result; called in the results' order."""

    @abstractmethod
    def finish(self) -> list[Path]:
        """Write what is written at the end, and return the files and folders that were made."""

    def abandon(self) -> None:  # noqa: B027 most writers leave nothing incomplete
        """Remove what is not complete; nothing where it is."""


class WriteBehind:
    """Hands results to writers in threads of its own, so that writing runs behind the network.

    Use it in a ``with`` statement: at its end threads are stopped, and what is not finished is removed. Nothing is written
    after a failure: a file that it cut short stays one whose last line is cut.

    Args:
        writers: What is saved.
        most: Results that may wait to be written; they stay in memory.
    """

    def __init__(self, writers: Sequence[Writer], most: int) -> None:
        self._writers = writers
        self._most = most + _PREPARERS
        self._preparers = ThreadPoolExecutor(_PREPARERS, "prepare")
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()
        self._failure: tuple[str, Exception] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._preparers.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)
        for writer in self._writers:
            writer.abandon()
        name, cause = self._failure or ("", None)
        # An error of ours that ends the work names the file itself.
        if cause is not None and not (cause is error and isinstance(cause, ProxydetError)):
            _logger.error("the result of %s was not saved: %s", name, cause or repr(cause))

    def add(self, result: Any, name: str) -> None:
        """Take a result; waits where writing is far behind, and raises what failed there.

        Args:
            result: What is to be written.
            name: What the log calls it where it cannot be saved.
        """
        prepared = [self._preparers.submit(writer.prepare, result) for writer in self._writers]

        def write() -> None:
            if self._failure is not None:
                return
            try:
                for writer, future in zip(self._writers, prepared, strict=True):
                    writer.add(result, future.result())
            except Exception as error:
                self._failure = (name, error)
                raise

        self._waiting.append(self._thread.submit(write))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure[1]

    def finish(self) -> tuple[Path, ...]:
        """Wait for what is not written yet, complete the files, and return what was made; raises what failed."""
        while self._waiting:
            self._waiting.popleft().result()
        self._raise_failure()
        return tuple(path for writer in self._writers for path in writer.finish())
