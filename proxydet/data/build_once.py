"""Letting one process of many make a file, on one machine or on many that share a file system.

The right to build is a lock file made with ``O_EXCL``, which is atomic on NFS too (``flock`` is not to be trusted
there). Its owner touches it every few seconds; who waits and sees it untouched for long takes it over. Clocks are
not compared between machines: a waiter only looks whether the lock's time changes while its own clock runs.
Should two processes build after all, both write a temporary file of their own and the last to finish wins with the
same content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)

_POLL_S = 0.1
_TOUCH_S = 5.0
STALE_AFTER_S = 60.0


def build_once(
    path: Path, build: Callable[[Path], None], *, stale_after_s: float = STALE_AFTER_S
) -> None:
    """Return when ``path`` exists: made by ``build`` here, or by another process that was first.

    Args:
        path: The file wanted. Its folder is made.
        build: Makes it; must move it into place whole.
        stale_after_s: A lock that its owner left untouched for this many seconds is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    while not path.exists():
        if _take(lock):
            with _held(lock):
                # Another process may have finished between the look above and the lock.
                if not path.exists():
                    build(path)
            return
        _wait(path, lock, stale_after_s)


def _take(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
    return True


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    done = threading.Event()

    def touch() -> None:
        while not done.wait(_TOUCH_S):
            # Gone when another process judged this one dead; it then builds too, which harms nothing.
            with contextlib.suppress(FileNotFoundError):
                os.utime(lock)

    thread = threading.Thread(target=touch, name="build-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        lock.unlink(missing_ok=True)


def _wait(path: Path, lock: Path, stale_after_s: float) -> None:
    """Return when the file is there, or the lock is gone or was taken from a dead owner."""
    seen: int | None = None
    since = time.monotonic()
    _logger.info("waiting for another process that makes %s", path.name)
    while not path.exists():
        try:
            touched = lock.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if touched != seen:
            seen, since = touched, time.monotonic()
        elif time.monotonic() - since > stale_after_s:
            _logger.warning("the process that was making %s seems dead; taking over", path.name)
            _discard(lock)
            return
        time.sleep(_POLL_S)


def _discard(lock: Path) -> None:
    # By renaming, so that of several waiters one succeeds. A waiter that is late may take away the lock of the
    # next owner; then two build, which harms nothing.
    grave = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(grave)
        grave.unlink(missing_ok=True)
