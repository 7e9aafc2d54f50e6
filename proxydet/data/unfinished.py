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


def hold(file: BinaryIO) -> None:
    """Lock a file for as long as it is open, where the file system can."""
    if (fcntl := _locking()) is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(path: Path, own: Path) -> None:
    """Remove what killed processes left in a folder; what cannot be locked is somebody's, and stays.

    Args:
        path: The final path of the file that is being written; no other process may be at work on it.
        own: Its hidden name, just made: its time is what the age of others is counted from, whatever the clock here says.
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
