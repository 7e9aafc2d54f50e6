"""Replacing an installed source file: at once, with its permissions, and without leaving its compiled form behind."""

from __future__ import annotations

import importlib.util
import os
import stat
import tempfile
from pathlib import Path

_UNCHECKED_HASH = 0b01
"""Flags of a compiled file that names a hash of its source and asks Python not to compare it (PEP 552)."""


def obstacle(file: Path) -> str:
    """Why this user may not replace a file as `replace_file` does, and delete its compiled forms; empty where they may."""
    if not (os.access(file, os.W_OK) and _may_change(file.parent)):
        return "the file or its folder is read-only"
    if hasattr(os, "geteuid") and not _may_give_away(file.stat()):
        return "it belongs to another user or group, which the new file could not be given to"
    fixed = [path for path in bytecode_files(file) if not _may_change(path.parent)]
    return f"its compiled file may not be deleted: {fixed[0]}" if fixed else ""


def _may_change(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _may_give_away(owner: os.stat_result) -> bool:
    """Whether a new file of this user can be given the owner and the group of another."""
    if os.geteuid() == 0:
        return True
    return owner.st_uid == os.geteuid() and owner.st_gid in {os.getegid(), *os.getgroups()}


def replace_file(file: Path, content: bytes, *, like: Path) -> None:
    """Put new content in a file's place in one step; a reader sees the old file or the new one.

    Args:
        file: The file to create or replace. Hard links to the old file keep the old content.
        content: What it shall hold.
        like: The file whose permissions and owner it gets.

    Raises:
        OSError: The folder may not be written, the owner cannot be kept, or the disk is full.
    """
    info = like.stat()
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if hasattr(os, "chown") and (info.st_uid, info.st_gid) != _owner(temporary):
            os.chown(temporary, info.st_uid, info.st_gid)
        temporary.chmod(stat.S_IMODE(info.st_mode))
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _owner(file: Path) -> tuple[int, int]:
    info = file.stat()
    return info.st_uid, info.st_gid


def bytecode_files(file: Path) -> tuple[Path, ...]:
    """Compiled forms of a source file: of every Python and optimisation level, and under PYTHONPYCACHEPREFIX."""
    found = sorted((file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"))
    mine = Path(importlib.util.cache_from_source(str(file)))
    if mine not in found and mine.is_file():
        found.append(mine)
    return tuple(found)


def unchecked_bytecode(file: Path) -> tuple[Path, ...]:
    """Compiled forms that Python runs without looking at the source, and that were made from another source.

    Python compares time and size for ordinary ones; some packagers write the unchecked kind.
    """
    source_hash = importlib.util.source_hash(file.read_bytes())
    stale = []
    for compiled in bytecode_files(file):
        header = compiled.read_bytes()[:16]
        flags = int.from_bytes(header[4:8], "little")
        if flags == _UNCHECKED_HASH and header[8:16] != source_hash:
            stale.append(compiled)
    return tuple(stale)


def remove_bytecode(file: Path) -> tuple[Path, ...]:
    """Delete the compiled forms of a source file.

    Args:
        file: The source file.

    Returns:
        The files that were deleted.

    Raises:
        OSError: One of them may not be deleted.
    """
    compiled_files = bytecode_files(file)
    for compiled in compiled_files:
        compiled.unlink(missing_ok=True)
    return compiled_files
