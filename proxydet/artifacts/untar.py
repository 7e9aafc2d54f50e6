"""Unpacking tar and tar.gz archives."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from proxydet.artifacts.member_names import checked_name
from proxydet.artifacts.staging import Staging
from proxydet.artifacts.tar_reader import TarReader
from proxydet.errors import ArchiveError
from proxydet.reporting import Task

_MOST_TIMES = 200
_SPARE_BYTES = 64 << 20


def untar(path: Path, tops: Collection[str], staging: Staging, task: Task) -> list[str]:
    """Write the members of a tar archive, compressed or not, that are not there yet.

    Args:
        path: The archive.
        tops: First path parts below which members may lie.
        staging: Where they go.
        task: Counts bytes of the archive.

    Returns:
        The paths of all its files.

    Raises:
        ArchiveError: It is damaged, or tries to write where it should not.
        DiskFullError: There is no room.
    """
    limit = path.stat().st_size * _MOST_TIMES + _SPARE_BYTES
    names: dict[str, None] = {}
    with open_tar(path) as file:
        reader = TarReader(file, path.name)
        raw = getattr(file, "fileobj", None) or file
        at = 0
        for member in reader:
            name = checked_name(member.name, tops, path.name)
            if member.folder or not name:
                staging.make_folder(name)
                continue
            if name in names:
                raise ArchiveError(f"{path.name} holds {name!r} twice.", path=path)
            limit -= member.size
            if limit < 0:
                raise ArchiveError(
                    f"{path.name} unpacks to {_MOST_TIMES} times its size; that is refused."
                )
            names[name] = None
            if not staging.has(name, member.size):
                staging.note(name, staging.write(name, member.size, reader.data()))
            task.advance(raw.tell() - at)
            at = raw.tell()
        reader.drain()  # so that the check sum of the compression is looked at
        task.advance(path.stat().st_size - at)
    return list(names)


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[BinaryIO]:
    """Open a tar archive, compressed with gzip or not.

    Raises:
        ArchiveError: Raised within the context when the compression turns out to be damaged.
    """
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb")) if compressed else raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            message = f"{path.name} is damaged: {error}."
            raise ArchiveError(message, hint="Download it again.", path=path) from error
