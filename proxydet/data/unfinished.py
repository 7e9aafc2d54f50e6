"""Files that a killed process was still writing: removed by the next one that writes beside them.

A file that is being written has a hidden name of its own and is locked by its writer; the lock goes when the process
does. Not every network file system keeps locks between machines, so files of another final name, which nothing but
the lock says to be abandoned, are removed only a day after they were last written to.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

_HIDDEN = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")
_ABANDONED_S = 86_400.0


def hidden_beside(path: Path) -> Path:
    """Return a new hidden name beside a final path, to write to until the file is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def begin(path: Path) -> tuple[Path, BinaryIO]:
    """Make the hidden file that is to become ``path``, after which what killed processes left of such is removed.

    Returns:
        Its name and the open file, locked for as long as it is open where the file system can.
    """
    while True:
        own = hidden_beside(path)
        file = own.open("xb", buffering=1 << 20)
        _hold(file)
        if own.exists():  # else another process took it for abandoned before it was locked
            _sweep(path, own)
            return own, file
        file.close()


def _hold(file: BinaryIO) -> None:
    if (fcntl := _locking()) is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(path: Path, own: Path) -> None:
    """Remove what killed processes left beside ``path``; what cannot be locked is somebody's, and stays.

    The age of others is counted from the time of ``own``, just made on the same file system, whatever the clock here says.
    """
    fcntl = _locking()
    if fcntl is None:
        return
    now = own.stat().st_mtime
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            match = _HIDDEN.fullmatch(entry.name)
            if match is None or entry.name == own.name or Path(match["name"]).suffix != path.suffix:
                continue
            if match["name"] == path.name or now - entry.stat().st_mtime > _ABANDONED_S:
                _remove_unlocked(Path(entry.path), fcntl)


def _remove_unlocked(path: Path, fcntl: ModuleType) -> None:
    with contextlib.suppress(OSError), path.open("r+b") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _locking() -> ModuleType | None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    return fcntl
