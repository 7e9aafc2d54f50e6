"""Files on their way from an archive into a folder.

They are written into a hidden folder beside their final place, with a journal of those that are complete, and moved
when all are there. So a folder such as ``train2017`` is either absent or whole, and unpacking that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from proxydet.artifacts.files import disk_errors
from proxydet.errors import ArchiveError, ArtifactError

_FLUSH_EVERY = 256


@dataclass(frozen=True)
class Unpacked:
    """A file that came out of an archive."""

    size: int
    """Bytes."""
    crc: int
    """CRC-32 of its bytes."""


class Staging:
    """The hidden folder of one archive that is being unpacked.

    Args:
        folder: The folder that the members are meant for.
        archive: File name of the archive.
        digest: Digest of the archive: what another one left is thrown away.
    """

    def __init__(self, folder: Path, archive: str, digest: str) -> None:
        self.folder = folder
        self.path = folder / f".{archive}.unpacking"
        self._journal_path = self.path / ".journal"
        self._lock = threading.Lock()
        self._pending: list[str] = []
        self._folders: set[Path] = set()
        with disk_errors(self.path):
            self.done = dict(_read_listing(self._journal_path, digest))
            if not self.done and self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = not self._journal_path.exists()
            self._journal = self._journal_path.open("a", encoding="utf-8", newline="\n")
            if fresh:
                self._journal.write(_heading(digest))

    def has(self, name: str, size: int) -> bool:
        """Tell whether a member is complete from an earlier run."""
        if name not in self.done:
            return False
        return any(_size(place / name) == size for place in (self.path, self.folder))

    def make_folder(self, name: str) -> None:
        """Make a folder that the archive holds."""
        with disk_errors(self.path / name):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, size: int, chunks: Iterable[bytes]) -> Unpacked:
        """Write one member. May be called from several threads.

        Args:
            name: Its checked path.
            size: Its announced size.
            chunks: Its bytes.

        Raises:
            ArchiveError: It is longer or shorter than announced.
            DiskFullError: There is no room.
        """
        path = self.path / name
        crc = count = 0
        with self._opened(path) as descriptor:
            for chunk in chunks:
                count += len(chunk)
                if count > size:
                    break
                crc = zlib.crc32(chunk, crc)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(descriptor, view) :]
        if count != size:
            raise ArchiveError(
                f"{name} in the archive has {count} bytes or more, not the {size} announced."
            )
        return Unpacked(size, crc)

    def note(self, name: str, unpacked: Unpacked) -> None:
        """Note that a member is complete. May be called from several threads."""
        with self._lock:
            self.done[name] = unpacked
            self._pending.append(_line(name, unpacked))
            if len(self._pending) >= _FLUSH_EVERY:
                self._flush()

    def close(self) -> None:
        """Save the journal."""
        with self._lock:
            if not self._journal.closed:
                self._flush()
                self._journal.close()

    def discard(self) -> None:
        """Throw away what was unpacked."""
        self.close()
        with disk_errors(self.path):
            shutil.rmtree(self.path)

    def publish(self, names: Iterable[str]) -> None:
        """Move everything to its final place, and remove the hidden folder.

        Args:
            names: Paths of all files that the archive holds.

        Raises:
            ArtifactError: Something of the same name and another kind is in the way.
        """
        self.close()
        with disk_errors(self.folder):
            for top in sorted(
                entry.name for entry in os.scandir(self.path) if entry.name != ".journal"
            ):
                if not (self.folder / top).exists():
                    (self.path / top).rename(self.folder / top)
            for name in names:
                staged = self.path / name
                if staged.exists():
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    staged.replace(self.folder / name)
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        with disk_errors(path):
            if path.parent not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(path.parent)
            flags = (
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
            )
            descriptor = os.open(path, flags, 0o644)
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _flush(self) -> None:
        with disk_errors(self._journal_path):
            self._journal.write("".join(self._pending))
            self._journal.flush()
        self._pending.clear()


def listing(digest: str, files: dict[str, Unpacked]) -> str:
    """Return the text of a listing of unpacked files, as `read_listing` reads it.

    Args:
        digest: Digest of the archive that they came from.
        files: Size and CRC of each.
    """
    return _heading(digest) + "".join(_line(name, files[name]) for name in sorted(files))


def read_listing(path: Path) -> tuple[str, dict[str, Unpacked]] | None:
    """Return the digest of the archive and the files of a listing; None if there is none.

    Raises:
        ArtifactError: It is there but damaged.
    """
    try:
        with path.open(encoding="utf-8") as file:
            digest = json.loads(file.readline())["archive"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged.", hint="Remove it and run the same command again."
        ) from error
    return str(digest), dict(_read_listing(path, digest))


def _read_listing(path: Path, digest: str) -> Iterator[tuple[str, Unpacked]]:
    """Yield the complete lines of a listing or journal, if it belongs to the archive with that digest."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    if lines[0] + "\n" != _heading(digest):
        return
    for line in lines[1:-1]:  # what follows the last line end was cut off
        size, _, rest = line.partition("\t")
        crc, _, name = rest.partition("\t")
        if size.isdigit() and name and len(crc) == 8:
            yield name, Unpacked(int(size), int(crc, 16))


def _heading(digest: str) -> str:
    return json.dumps({"archive": digest, "columns": ["size", "crc32", "name"]}) + "\n"


def _line(name: str, unpacked: Unpacked) -> str:
    return f"{unpacked.size}\t{unpacked.crc:08x}\t{name}\n"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
