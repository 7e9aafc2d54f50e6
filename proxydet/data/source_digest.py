"""The SHA-256 of a large file, remembered beside the cache as long as the file looks unchanged."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import msgspec

from proxydet.errors import DataError

_BLOCK = 1 << 22


class _Memory(msgspec.Struct, frozen=True):
    size: int
    mtime_ns: int
    inode: int
    sha256: str


def source_digest(source: Path, memory: Path) -> str:
    """Return the SHA-256 of a file.

    A gigabyte takes seconds to digest, so the result is kept in ``memory`` and used again while the file's size, time
    of change and inode are the same.

    Args:
        source: The file.
        memory: Folder for what is remembered; made where it is absent.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        resolved = source.resolve(strict=True)
        stat = resolved.stat()
        key = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        note = memory / f"{key}.digest"
        known = _recall(note)
        if known and (known.size, known.mtime_ns, known.inode) == (
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ino,
        ):
            return known.sha256
        digest = _digest(resolved)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no file {source}",
            hint="check the paths in the data description; they are relative to its folder",
            path=source,
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {source}: {error.strerror or error}",
            hint="check that it is a file that you may read",
            path=source,
        ) from error
    memory.mkdir(parents=True, exist_ok=True)
    temporary = memory / f".{note.name}.{uuid.uuid4().hex}"
    temporary.write_bytes(
        msgspec.json.encode(_Memory(stat.st_size, stat.st_mtime_ns, stat.st_ino, digest))
    )
    temporary.replace(note)
    return digest


def _recall(note: Path) -> _Memory | None:
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Memory)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
