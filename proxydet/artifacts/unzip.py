"""Unpacking zip archives: many small files at the speed of the disk, in several threads."""

from __future__ import annotations

import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from proxydet.artifacts.member_names import checked_name
from proxydet.artifacts.patience import Stopped
from proxydet.artifacts.staging import Staging
from proxydet.artifacts.workers import run_workers
from proxydet.errors import ArchiveError
from proxydet.reporting import Task

_CHUNK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_BATCH = 32
_MOST_MEMBERS = 3_000_000


def zip_members(path: Path, tops: Collection[str]) -> dict[str, zipfile.ZipInfo]:
    """Return the files in a zip archive by their checked path, in the order in which they lie there.

    Args:
        path: The archive.
        tops: First path parts below which members may lie.

    Raises:
        ArchiveError: It is damaged, encrypted, compressed in an unusual way, or tries to write where it should not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise ArchiveError(
            f"{path.name} is not a zip archive, or damaged: {str(error).rstrip('.')}.", path=path
        ) from error
    if len(entries) > _MOST_MEMBERS:
        raise ArchiveError(f"{path.name} holds {len(entries)} files; that is refused.", path=path)
    found: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = checked_name(entry.orig_filename, tops, path.name)
        _check_kind(entry, path.name)
        if entry.header_offset < end:
            raise ArchiveError(f"{path.name} holds files that overlap; that is refused.", path=path)
        end = entry.header_offset + _LOCAL_HEADER.size + entry.compress_size
        if name and not entry.orig_filename.endswith("/"):
            if name in found:
                raise ArchiveError(f"{path.name} holds {name!r} twice.", path=path)
            found[name] = entry
    return found


def unzip(
    path: Path, members: dict[str, zipfile.ZipInfo], staging: Staging, task: Task, threads: int = 4
) -> None:
    """Write the members of a zip archive that are not there yet.

    Args:
        path: The archive.
        members: What `zip_members` returned.
        staging: Where they go.
        task: Counts bytes as they would be unpacked.
        threads: How many to use.

    Raises:
        ArchiveError: A member is damaged.
        DiskFullError: There is no room.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    work = _Work(descriptor, iter(members.items()), staging, task)
    try:
        run_workers([work.run] * max(1, min(threads, len(members))), work.stop)
    finally:
        os.close(descriptor)


class _Work:
    """Members that are still to be unpacked, handed out in small batches."""

    def __init__(
        self,
        descriptor: int,
        members: Iterator[tuple[str, zipfile.ZipInfo]],
        staging: Staging,
        task: Task,
    ) -> None:
        self._descriptor = descriptor
        self._members = members
        self._staging = staging
        self._task = task
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def run(self) -> None:
        """Unpack until nothing is left."""
        try:
            while batch := self._batch():
                count = 0
                for name, entry in batch:
                    count += self._one(name, entry)
                self._task.advance(count)
        except BaseException:
            self.stop.set()
            raise

    def _batch(self) -> list[tuple[str, zipfile.ZipInfo]]:
        with self._lock:
            if self.stop.is_set():
                return []
            return [member for _, member in zip(range(_BATCH), self._members, strict=False)]

    def _one(self, name: str, entry: zipfile.ZipInfo) -> int:
        if not self._staging.has(name, entry.file_size):
            unpacked = self._staging.write(name, entry.file_size, self._data(name, entry))
            if unpacked.crc != entry.CRC:
                raise ArchiveError(f"{name} in the archive is damaged: its check sum is wrong.")
            self._staging.note(name, unpacked)
        return entry.file_size

    def _data(self, name: str, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        offset = self._data_offset(name, entry)
        inflate = zlib.decompressobj(-15) if entry.compress_type == zipfile.ZIP_DEFLATED else None
        left = entry.compress_size
        while left:
            raw = os.pread(self._descriptor, min(left, _CHUNK), offset)
            if not raw:
                raise ArchiveError("The archive ends in the middle.")
            if self.stop.is_set():
                raise Stopped
            left, offset = left - len(raw), offset + len(raw)
            if inflate is None:
                yield raw
            else:
                yield from _inflated(inflate, raw, name)

    def _data_offset(self, name: str, entry: zipfile.ZipInfo) -> int:
        head = os.pread(self._descriptor, _LOCAL_HEADER.size, entry.header_offset)
        if len(head) < _LOCAL_HEADER.size:
            raise ArchiveError("The archive ends in the middle.")
        fields = _LOCAL_HEADER.unpack(head)
        if fields[0] != b"PK\3\4" or fields[3] != entry.compress_type:
            raise ArchiveError(f"{name}: the archive contradicts its own table of contents.")
        return entry.header_offset + _LOCAL_HEADER.size + int(fields[9]) + int(fields[10])


def _inflated(inflate: zlib._Decompress, raw: bytes, name: str) -> Iterator[bytes]:
    try:
        while not inflate.eof:
            data = inflate.decompress(raw, _CHUNK)
            raw = inflate.unconsumed_tail
            yield data
            if not raw and len(data) < _CHUNK:
                return
    except zlib.error as error:
        raise ArchiveError(f"{name} in the archive is damaged: {error}.") from error


def _check_kind(entry: zipfile.ZipInfo, archive: str) -> None:
    mode = entry.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveError(
            f"{archive} holds a link or a device, {entry.orig_filename[:200]!r}; that is refused.",
            hint="The archive is damaged or hostile: do not use it.",
        )
    if entry.flag_bits & 0x1:
        raise ArchiveError(f"{archive} is encrypted.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(
            f"{archive} uses a compression that is not supported ({entry.compress_type})."
        )
