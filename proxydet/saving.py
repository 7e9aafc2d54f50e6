"""Writing files that a user asked for: whole or not at all, with errors that name them."""

from __future__ import annotations

import contextlib
import errno
import os
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
