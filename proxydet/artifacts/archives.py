"""Zip and tar archives: read in order with bounds, and unpacked whole or not at all.

The standard library reads them. Here stands what it leaves to its callers: a bound on the number of members, on how much
they unpack to, on what is held in memory; one rule for names; and nothing but plain files and folders.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import logging
import re
import shutil
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from proxydet import files as bounds
from proxydet.artifacts.catalogue import Unpack
from proxydet.artifacts.http import StoppedError
from proxydet.errors import ArchiveError, ArtifactError
from proxydet.files import (
    PlaceholderError,
    read_text,
    require_room,
    write_errors,
    write_text,
)
from proxydet.reporting import Progress, Task
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

_MOST_TIMES = 200  # an archive may unpack to so many times its size, and SPARE_BYTES more
_CHUNK = 1 << 20
_DEEPEST = 32
_LARGEST_DIRECTORY = 256 << 20
_LOCAL_HEADER = 30  # bytes in front of the name and data of a zip's member
_LONGEST_PART = 240
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, ValueError,
           OverflowError, IndexError, KeyError, RecursionError, NotImplementedError, RuntimeError, OSError)  # fmt: skip


@contextlib.contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise about a damaged archive into `ArchiveError`."""
    try:
        yield
    except PlaceholderError as error:
        raise ArchiveError(
            f"{path.name} is not an archive: {error.what}.", hint=error.remedy, path=path
        ) from error
    except _DAMAGE as error:
        raise ArchiveError(
            f"{path.name} is damaged or not an archive of its kind: {str(error).rstrip('.')}.",
            hint="Download it again.",
            path=path,
        ) from error


def _refused(path: Path, what: str) -> ArchiveError:
    return ArchiveError(
        f"{path.name} holds {what}; that is refused.", hint=bounds.HOSTILE, path=path
    )


def _checked_name(name: str, tops: Collection[str], archive: Path) -> str:
    """Return the path of a member relative to the folder unpacked into, or refuse it.

    Args:
        name: The name as the archive gives it; a leading ``./`` and a trailing ``/`` mean nothing.
        tops: First path parts below which members may lie.
        archive: The archive, for messages.

    Returns:
        The path with forward slashes; empty for the folder itself.

    Raises:
        ArchiveError: The name is absolute, leads upwards, or is not plain; or it lies elsewhere than it should.
    """
    plain = re.sub(r"^(\./)+", "", name).removesuffix("/")
    if plain in ("", "."):
        return ""
    parts = plain.split("/")
    leaves = len(parts) > _DEEPEST or re.match(r"[A-Za-z]:", plain) or "\\" in plain
    if leaves or not all(
        part.isprintable()
        and part not in ("", ".", "..")
        and len(part.encode("utf-8", errors="replace")) <= _LONGEST_PART
        for part in parts
    ):
        raise _refused(archive, f"{name[:200]!r}, which could be written outside its folder")
    if parts[0] not in tops:
        raise ArchiveError(
            f"{archive.name} holds {name[:200]!r}, but only {', '.join(sorted(tops))} may come from it.",
            hint="It is not the archive that the catalogue describes.",
        )
    return plain


# ---- reading -----------------------------------------------------------------------------------------------------------


def tar_files(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes], int]]:
    """Yield the files of a tar archive, compressed with gzip or not, from start to end.

    Args:
        path: The archive.

    Yields:
        A file's header; the uncompressed archive, which stands at its first byte; and how many bytes of ``path`` were read.

    Raises:
        ArchiveError: It is damaged or cut; holds anything else, too many members, or far more than its own size.
    """
    with archive_errors(path), path.open("rb") as raw:
        size = path.stat().st_size
        most = size * _MOST_TIMES + bounds.SPARE_BYTES
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[assignment]
        for count, member in enumerate(bounds.tar_members(file, None if compressed else size)):
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise _refused(path, f"a link, a device or a sparse file, {member.name[:200]!r}")
            if count == bounds.MOST_MEMBERS:
                raise bounds.too_large(path)
            if file.tell() + member.size > most:
                raise bounds.too_large(path, times=_MOST_TIMES)
            if member.isreg():
                yield member, file, raw.tell()
        while compressed and file.read(
            _CHUNK
        ):  # so that the check sum of the compression is checked
            if file.tell() > most:
                raise bounds.too_large(path, times=_MOST_TIMES)


def _zip_members(archive: zipfile.ZipFile, path: Path, tops: Collection[str]) -> dict[str, zipfile.ZipInfo]:  # fmt: skip
    """Return the files in a zip archive by their checked path, in the order in which they lie there."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    found: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in entries:
        name = _checked_name(entry.orig_filename, tops, path)
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(path, f"a link or a device, {entry.orig_filename[:200]!r}")
        if entry.flag_bits & 0x1:
            raise ArchiveError(f"{path.name} is encrypted.")
        if entry.header_offset < end:
            raise _refused(path, "files that overlap")
        end = entry.header_offset + _LOCAL_HEADER + entry.compress_size
        if name and not entry.orig_filename.endswith("/"):
            if name in found:
                raise ArchiveError(f"{path.name} holds {name!r} twice.", path=path)
            found[name] = entry
    return found


# ---- unpacking ---------------------------------------------------------------------------------------------------------

Listing = dict[str, tuple[int, int]]
"""Size and CRC-32 of unpacked files, by path with forward slashes."""


def unpack(
    path: Path, rule: Unpack, *, folder: Path, listing: Path, digest: str, progress: Progress,
    stop: threading.Event,
) -> int:  # fmt: skip
    """Unpack an archive whose digest has been checked; continue where an earlier run stopped.

    The members are written to a hidden folder, and moved when all are there and listed. So a folder such as
    ``train2017`` is either absent or whole.

    Args:
        path: The archive.
        rule: What it unpacks to.
        folder: Where its members go.
        listing: File to write size and CRC-32 of each member to, for later checks.
        digest: Digest of the archive.
        progress: Where to show how far it is.
        stop: Ends the work when set.

    Returns:
        How many files the archive holds.

    Raises:
        ArchiveError: It is damaged, hostile, or does not hold what the catalogue says.
        DiskFullError: There is no room.
        StoppedError: The job was stopped.
    """
    version = "[0-9a-f]" * 16
    staging = folder / f".{path.name}.{digest[:16]}.unpacking"
    complete = listing.with_name(f"{listing.name}.{digest[:16]}")
    with write_errors(staging):
        listing.parent.mkdir(parents=True, exist_ok=True)
        for left in listing.parent.glob(f"{glob.escape(listing.name)}.{version}"):
            if left != complete:  # of another version
                left.unlink()
        for pattern in ("unpacking", f"{version}.unpacking"):
            for left in folder.glob(f".{glob.escape(path.name)}.{pattern}"):
                if left != staging:
                    shutil.rmtree(left)
        staging.mkdir(parents=True, exist_ok=True)
    files = read_listing(complete)
    if files is None or not all(
        (staging / name).exists() or (folder / name).exists() for name in files
    ):
        try:
            with archive_errors(path):
                read = _from_zip if path.suffix == ".zip" else _from_tar
                files = read(path, rule.tops, _Staging(staging, stop), progress)
            for provided in rule.provides:
                inside = sum(name.startswith(f"{provided.path}/") for name in files)
                size = files[provided.path][0] if provided.path in files else None
                if not inside and size is None:
                    raise ArchiveError(f"{path.name} does not hold {provided.path}.")
                if provided.files not in (None, inside):
                    what = f"{counted(inside, 'file')} in {provided.path}, not {provided.files}"
                    raise ArchiveError(f"{path.name} holds {what}.")
                if provided.size not in (None, size):
                    raise ArchiveError(f"{path.name} holds {provided.path} of another size.")
        except ArchiveError:
            shutil.rmtree(staging, ignore_errors=True)  # this cannot be continued from
            raise
        head = json.dumps({"archive": digest, "columns": ["size", "crc32", "name"]})
        lines = (f"{files[name][0]}\t{files[name][1]:08x}\t{name}\n" for name in sorted(files))
        write_text(complete, f"{head}\n{''.join(lines)}")
    with write_errors(folder):
        for top in rule.tops:
            if (staging / top).exists() and not (folder / top).exists():
                (staging / top).rename(folder / top)
        for name in files:
            if (staging / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(folder / name)
        shutil.rmtree(staging)
        # At last: then it counts as unpacked, and nobody comes here again.
        complete.replace(listing)
    _logger.info("%s: %d files in %s", path.name, len(files), folder)
    return len(files)


class _Staging:
    """The hidden folder that members are written to; may be used from several threads."""

    def __init__(self, folder: Path, stop: threading.Event) -> None:
        self.folder = folder
        self._stop = stop
        self._folders: set[str] = set()  # that were made

    def has(self, name: str, size: int) -> bool:
        """Return whether an earlier run wrote a member; it gets its full size with its last byte."""
        try:
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def write(self, name: str, size: int, chunks: Iterable[bytes]) -> int:
        """Write a member unless it is there, and return its CRC-32."""
        path, there, crc, count = self.folder / name, self.has(name, size), 0, 0
        self.make_folder(name.rpartition("/")[0])
        with self._errors(name), path.open("ab" if there else "wb", buffering=0) as file:
            for chunk in chunks:
                if self._stop.is_set():
                    raise StoppedError
                crc, count = zlib.crc32(chunk, crc), count + len(chunk)
                view = memoryview(b"" if there else chunk)
                while view:
                    view = view[file.write(view) :]
        if count != size:
            raise ArchiveError(
                f"{name} in the archive has {count} bytes, not the {size} announced."
            )
        return crc

    def make_folder(self, name: str) -> None:
        """Make a folder, with those above it."""
        if name not in self._folders:
            with self._errors(name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._folders.add(name)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        with write_errors(self.folder / name):
            try:
                yield
            except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
                message = f"The archive holds {name!r} both as a file and as a folder."
                raise ArchiveError(message, hint=bounds.HOSTILE) from error


def _from_zip(path: Path, tops: Collection[str], staging: _Staging, progress: Progress) -> Listing:
    """Write the members that are not there yet, several at a time."""
    failed, title = threading.Event(), f"unpacking {path.name}"
    with bounds.open_zip(path, largest=_LARGEST_DIRECTORY, times=_MOST_TIMES) as archive:
        members = _zip_members(archive, path, tops)
        total = sum(entry.file_size for entry in members.values())
        there = sum(e.file_size for name, e in members.items() if staging.has(name, e.file_size))
        require_room(staging.folder / "files", total - there)
        waiting = iter(members.items())

        def data(entry: zipfile.ZipInfo) -> Iterator[bytes]:
            with archive_errors(path), archive.open(entry) as source:
                while chunk := source.read(_CHUNK):
                    yield chunk

        def work(task: Task) -> None:
            try:
                while not failed.is_set() and (found := next(waiting, None)) is not None:
                    name, entry = found
                    if not staging.has(name, entry.file_size):
                        staging.write(name, entry.file_size, data(entry))
                    task.advance(entry.file_size)
            except BaseException:
                failed.set()
                raise

        with progress.task(title, total=total, unit="B") as task, ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(work, task) for _ in range(4)]:
                future.result()
    return {name: (entry.file_size, entry.CRC) for name, entry in members.items()}


def _from_tar(path: Path, tops: Collection[str], staging: _Staging, progress: Progress) -> Listing:
    """Write the members that are not there yet, one after another."""
    files, at, size = Listing(), 0, path.stat().st_size

    def data(file: IO[bytes], left: int) -> Iterator[bytes]:
        with archive_errors(path):
            while chunk := file.read(min(left, _CHUNK)):
                left -= len(chunk)
                yield chunk

    with progress.task(f"unpacking {path.name}", total=size, unit="B") as task:
        for member, file, read in tar_files(path):
            name = _checked_name(member.name, tops, path)
            if name in files:
                raise ArchiveError(f"{path.name} holds {name!r} twice.", path=path)
            task.advance(read - at)
            files[name] = (member.size, staging.write(name, member.size, data(file, member.size)))
            at = read
        task.advance(size - at)
    return files


def read_listing(path: Path) -> Listing | None:
    """Return the files of a listing; None if there is none.

    Raises:
        ArtifactError: It is there but damaged.
    """
    found: Listing = {}
    try:
        head, *lines = read_text(path, limit=1 << 30).splitlines()
        if not isinstance(json.loads(head), dict):
            raise ValueError("no heading")
        for line in lines:
            size, crc, name = line.split("\t", 2)
            found[name] = (int(size), int(crc, 16))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged.", hint="Remove it and run the same command again.", path=path
        ) from error
    return found
