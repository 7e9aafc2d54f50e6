"""Zip archives of others: opened with bounds on their table of contents, and on what they unpack to."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from proxydet.errors import ArchiveError
from proxydet.files import PLACEHOLDER_BYTES, refuse_placeholder

MOST_MEMBERS = 2_000_000
"""More members than any archive of a data set or of weights has."""
SPARE_BYTES = 64 << 20
"""Bytes that an archive may unpack to beyond a multiple of its size."""
HOSTILE = "The archive is damaged or hostile: do not use it."
"""Hint about an archive that no tool makes."""
_LONGEST_LINE = 256 << 20
_MEMBER = b"PK\x01\x02"  # in front of each member in the table of contents


class BoundedReader(io.BufferedReader):
    """A file of which no more is read at once than ``largest`` bytes: what it announces of its parts may be wrong.

    Args:
        path: The file.
        largest: Bytes; None for its size.
    """

    def __init__(self, path: Path, largest: int | None = None) -> None:
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size
        self.largest = self.size if largest is None else largest

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does; raises ValueError beyond the bound."""
        if size is not None and size > self.largest:
            raise ValueError("its parts are larger than the file, or than they may be")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line, or as much of it as the bound, and that of a line, allow."""
        return super().readline(
            min(self.largest, _LONGEST_LINE) if size is None or size < 0 else size
        )


class _Zip(BoundedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        """Count the members in a table of contents before zipfile makes an object of each."""
        data = super().read(size)
        if data.count(_MEMBER) > MOST_MEMBERS:
            raise too_large(Path(self.name))
        return data


@contextlib.contextmanager
def open_zip(path: Path, *, largest: int, times: int) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading.

    Args:
        path: The archive.
        largest: Bytes that its table of contents may take.
        times: How many times its size it may unpack to, `SPARE_BYTES` apart.

    Raises:
        ArchiveError: It holds more than `MOST_MEMBERS` members, or unpacks to more than it may.
        Exception: Whatever zipfile raises about a damaged one.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_Zip(path, largest))
        refuse_placeholder(file.peek(PLACEHOLDER_BYTES))
        archive = stack.enter_context(zipfile.ZipFile(file))
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size * times + SPARE_BYTES:
            raise too_large(path, times=times)
        yield archive


def too_large(path: Path, *, times: int | None = None) -> ArchiveError:
    """Return the error about an archive that unpacks to more than so many times its size; None: with too many members."""
    what = f"holds more than {MOST_MEMBERS} files"
    if times is not None:
        what = f"unpacks to more than {times} times its size"
    return ArchiveError(f"{path.name} {what}; that is refused.", hint=HOSTILE, path=path)
