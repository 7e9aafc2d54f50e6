"""Writing files that a user asked for: whole or not at all, with errors that name them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from proxydet.errors import DiskFullError, EnvironmentProblem

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn the operating system's errors, which often do not say of which file they are, into ours.

    Args:
        target: The file that is written inside the ``with`` statement.

    Raises:
        DiskFullError: There is no room for it.
        EnvironmentProblem: It cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(target, error.errno, error.strerror or str(error)) from error


def unwritable(target: Path, number: int | None, reason: str) -> EnvironmentProblem:
    """Make the error of a file that cannot be written.

    Args:
        target: The file.
        number: The operating system's number of the error (``errno``); None where it has none.
        reason: Its text.
    """
    if number in _NO_ROOM:
        return DiskFullError(
            f"there is no room left on the disk to write {target} ({reason})",
            hint="free some space, or choose another folder, and run the same command again",
            path=target,
        )
    return EnvironmentProblem(
        f"{target} cannot be written: {reason}",
        hint="check that you may write to its folder, or choose another one",
        path=target,
    )


def write_whole(data: bytes, target: Path) -> Path:
    """Write a file in one step, making its folder.

    Args:
        data: What it shall hold.
        target: The file; an existing one is replaced.

    Returns:
        ``target``.

    Raises:
        EnvironmentProblem: It cannot be written, for example because the disk is full; an existing one stays.
    """
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a hidden file beside ``target`` to write to, which takes its place when all went well.

    It is there, empty, from the beginning, so that a place that cannot be written to is found out before the work. It
    is removed after an error; what a process that was killed left is removed by the next one that writes ``target``.

    Args:
        target: The file; an existing one is replaced at the end.

    Raises:
        EnvironmentProblem: The file cannot be made, or not take its place.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}.{target.name}")
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target)
        stream = temporary.open("xb")
    try:
        with stream:
            _lock(stream.fileno())
            yield temporary
        with saving(target):
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_orphans(target: Path) -> None:
    """Remove hidden files that nobody writes any more."""
    hidden = re.compile(r"\.[0-9a-f]{32}\." + re.escape(target.name))
    for path in list(target.parent.iterdir()):
        if hidden.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                if _lock(stream.fileno()):
                    path.unlink()


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed or its process ends; False where another holds it, or there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
