"""Files shared by several processes: locks, whole-file replacement, and errors of the disk in plain words."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from proxydet.errors import ArtifactError, DiskFullError, NotWritableError
from proxydet.wording import size_text

_logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLL_SECONDS = 0.2


def _locking() -> ModuleType | None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    return fcntl


class FileLock:
    """An advisory lock that dies with its process.

    Where the file system has no locks, the lock is never *held* (`held` is False): callers then rely on names that
    are unique to each process.

    Args:
        path: The lock file; made when needed, and removed on release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = False
        self._descriptor: int | None = None

    def acquire(
        self, stop: threading.Event | None = None, waiting: Callable[[], None] | None = None
    ) -> None:
        """Take the lock, waiting for whoever has it.

        Args:
            stop: Gives up waiting, without the lock, once set.
            waiting: Called once before the first wait.

        Raises:
            DiskFullError: There is no room for the lock file.
            ArtifactError: The folder cannot be written to.
        """
        told = False
        while not self._try():
            if waiting is not None and not told:
                waiting()
                told = True
            if stop is not None and stop.wait(_POLL_SECONDS):
                return
            if stop is None:
                time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is not None:
            if self.held:
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
        self._descriptor, self.held = None, False

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _try(self) -> bool:
        """Return whether waiting is over: the lock is held, or cannot be had on this file system."""
        fcntl = _locking()
        with disk_errors(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                if self.path.is_symlink():
                    raise
                return False  # its last holder has just removed the folder, which was empty again
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:  # a file system without locks
            _logger.debug("no locks at %s: %s", self.path, error)
            fcntl = None
        if fcntl is not None and not _same_file(descriptor, self.path):
            os.close(descriptor)  # its last holder removed it between our open and our lock
            return False
        self._descriptor, self.held = descriptor, fcntl is not None
        return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing at ``path`` into `DiskFullError` or `NotWritableError`.

    Raises:
        DiskFullError: The disk, the quota or the largest file size is exhausted.
        NotWritableError: The place cannot be written to for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"There is no room left to write {path.name} in {path.parent} ({error.strerror}).",
                hint="Free some space, or choose another place with --root; then run the same command again.",
                path=path,
            ) from error
        raise NotWritableError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Check the folder's owner and permissions, or choose another place with --root.",
            path=path,
        ) from error


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Replace a JSON file by a new one, whole or not at all.

    Args:
        path: The file.
        content: What it shall hold.
        durable: Whether to wait until it is on the disk, so that it survives a loss of power.

    Raises:
        DiskFullError: There is no room for it.
        ArtifactError: It cannot be written.
    """
    write_text(
        path,
        json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
        durable=durable,
    )


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a text file by a new one, whole or not at all.

    Args:
        path: The file.
        text: What it shall hold.
        durable: Whether to wait until it is on the disk, so that it survives a loss of power.

    Raises:
        DiskFullError: There is no room for it.
        ArtifactError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; an absent file is an empty object.

    Raises:
        ArtifactError: It is there but not readable, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.", hint="Repair it, or move it away.", path=path
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.", hint="Move it away.", path=path)
    return content


def absent_folders(*folders: Path) -> list[Path]:
    """Return those of some folders, and of the folders around them, that are not there; the innermost first."""
    every = {place for folder in folders for place in (folder, *folder.parents)}
    absent = [place for place in every if not place.exists()]
    return sorted(absent, key=lambda folder: len(folder.parts), reverse=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of some folders that are empty, in their order."""
    for folder in folders:
        with contextlib.suppress(OSError):  # absent, or not empty
            folder.rmdir()


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that ``path`` is or will be on."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_room(path: Path, needed: int) -> None:
    """Check that a file of ``needed`` more bytes fits where ``path`` is.

    Raises:
        DiskFullError: It does not.
    """
    free = free_bytes(path.parent)
    if needed > free:
        raise DiskFullError(
            f"{path.name} needs {size_text(needed)} more in {path.parent}, where {size_text(free)} are free.",
            hint="Free some space, or choose another place with --root.",
            path=path,
        )
