"""Keeps a network busy: threads read ahead of it and write behind it. Evaluation, prediction and videos share it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from proxydet.errors import DataError, ProxydetError

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Image = TypeVar("Image")
Found = TypeVar("Found")

_READERS = 4
_PREPARERS = 2


def run_images(
    items: Iterable[Item],
    read: Callable[[Item], Image],
    detect: Callable[[list[Image]], Sequence[Found]],
    *,
    batch_size: int,
) -> Generator[tuple[Item, tuple[Image, Found] | DataError], None, None]:
    """Detect objects in images, a batch at a time, while threads read the next ones; close it when it is not run to its end.

    Args:
        items: What names the images.
        read: Returns the image of one, or raises DataError; threads call it.
        detect: Returns what is found in each image of a batch.
        batch_size: Images in a batch, those that cannot be read among them.

    Yields:
        In the order of the items, each with its image and what was found in it, or with the error of reading it.
    """

    def attempt(item: Item) -> Image | DataError:
        try:
            return read(item)
        except DataError as error:
            return error

    waiting: deque[tuple[Item, Future[Image | DataError]]] = deque()
    upcoming = iter(items)
    readers = ThreadPoolExecutor(_READERS, "read")
    try:
        while True:
            for item in islice(upcoming, 2 * batch_size + _READERS - len(waiting)):
                waiting.append((item, readers.submit(attempt, item)))
            if not waiting:
                return
            taken = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            batch = [(item, future.result()) for item, future in taken]
            readable = [image for _, image in batch if not isinstance(image, DataError)]
            found = iter(detect(readable) if readable else ())
            for item, image in batch:
                if isinstance(image, DataError):
                    yield item, image
                else:
                    yield item, (image, next(found))
    finally:
        readers.shutdown(cancel_futures=True)


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
