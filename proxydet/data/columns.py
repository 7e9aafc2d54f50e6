"""A file of named numpy columns that is opened by memory map, in a millisecond, whatever its size.

Layout: magic, the columns one after another (each aligned to 64 bytes), a JSON footer that says where each one is,
the footer's length and check sum, magic again. The footer comes last so that a column can be written while it is being made.
All processes that open a file share its pages.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.errors import DataError
from proxydet.files import staged

Column = npt.NDArray[Any]
Meta = TypeVar("Meta")

_MAGIC = b"PDCOLS01"
_ALIGNMENT = 64
_TAIL = struct.Struct("<II8s")  # length and CRC-32 of the footer (0: none was noted), magic
_CHECKSUM_BLOCK = 1 << 24


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    offset: int
    crc32: int


class _Footer(msgspec.Struct, frozen=True):
    kind: str
    version: int
    columns: dict[str, _Entry]
    meta: msgspec.Raw


class ColumnWriter:
    """Writes a column file under a temporary name and moves it into place when it is whole.

    Use as a context manager; leaving it without `finish`, or by an exception, leaves no file. One column at a time may
    be written in parts (`append`); whole columns are added by `add`. What a killed process left unfinished is removed.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(staged(path))
        self._file = self._stack.enter_context(self._temporary.open("wb", buffering=1 << 20))
        self._finished = False
        self._file.write(_MAGIC)
        self._entries: dict[str, _Entry] = {}
        self._open_column = ""

    def append(self, name: str, part: Column) -> None:
        """Append a one-dimensional part to the column ``name``, which must be the one written last."""
        data = _contiguous(part)
        if name != self._open_column:
            if name in self._entries:
                raise ValueError(f"column {name} is already closed")
            self._entries[name] = _Entry(data.dtype.str, [0], self._align(), 0)
            self._open_column = name
        entry = self._entries[name]
        if data.dtype.str != entry.dtype or data.ndim != 1:
            raise ValueError(f"column {name} is one-dimensional of {entry.dtype}")
        self._entries[name] = _Entry(
            entry.dtype,
            [entry.shape[0] + len(data)],
            entry.offset,
            zlib.crc32(data.data, entry.crc32),
        )
        self._file.write(data.data)

    def add(self, name: str, column: Column) -> None:
        """Add a whole column of any number of dimensions."""
        if name in self._entries:
            raise ValueError(f"column {name} is there already")
        data = _contiguous(column)
        raw = data.reshape(-1).view(np.uint8)
        self._entries[name] = _Entry(
            data.dtype.str, list(data.shape), self._align(), zlib.crc32(raw.data)
        )
        self._open_column = ""
        self._file.write(raw.data)

    def finish(self, *, kind: str, version: int, meta: Any) -> None:
        """Write the footer; the file gets its name when the ``with`` statement ends.

        Args:
            kind: What the file holds; checked on opening.
            version: Version of the layout of this kind; checked on opening.
            meta: Anything that msgspec can write as JSON.
        """
        footer = msgspec.json.encode(
            _Footer(kind, version, self._entries, msgspec.Raw(msgspec.json.encode(meta)))
        )
        self._file.write(footer)
        self._file.write(_TAIL.pack(len(footer), zlib.crc32(footer), _MAGIC))
        self._finished = True

    def _align(self) -> int:
        position = self._file.tell()
        padding = -position % _ALIGNMENT
        self._file.write(b"\0" * padding)
        return position + padding

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self._temporary.unlink(missing_ok=True)
        self._stack.__exit__(kind, error, trace)


class ColumnFile:
    """An opened column file; its arrays are read-only views of the file.

    Args:
        path: The file.
        kind: What it must hold.
        version: Version that it must have.

    Raises:
        DataError: the file is absent, cut short, or of another kind or version.
    """

    def __init__(self, path: Path, *, kind: str, version: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        self._footer = self._read_footer()
        self._arrays: dict[str, Column] = {}
        if (self._footer.kind, self._footer.version) != (kind, version):
            raise _damaged(
                path,
                f"it holds {self._footer.kind} version {self._footer.version}, not {kind} version {version}",
            )

    def meta(self, kind: type[Meta]) -> Meta:
        """Return what was given to `ColumnWriter.finish` as ``meta``.

        Args:
            kind: Its type.

        Raises:
            DataError: it is of another one.
        """
        try:
            return msgspec.json.decode(self._footer.meta, type=kind)
        except msgspec.MsgspecError as error:
            raise _damaged(self.path, f"its footer is damaged ({error})") from error

    def __getitem__(self, name: str) -> Column:
        # Kept: training asks several times for each object of an image.
        if name not in self._arrays:
            entry = self._footer.columns.get(name)
            if entry is None:
                raise _damaged(self.path, f"it has no column {name}")
            count = int(np.prod(entry.shape, dtype=np.int64))
            flat: Column = np.frombuffer(
                self._map, dtype=entry.dtype, count=count, offset=entry.offset
            )
            self._arrays[name] = flat.reshape(entry.shape)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._footer.columns

    def damaged_columns(self) -> list[str]:
        """Read everything and return the names of the columns whose checksum does not fit."""
        damaged = []
        for name, entry in self._footer.columns.items():
            raw = self[name].reshape(-1).view(np.uint8)
            checksum = 0
            for start in range(0, len(raw), _CHECKSUM_BLOCK):
                checksum = zlib.crc32(raw[start : start + _CHECKSUM_BLOCK].data, checksum)
            if checksum != entry.crc32:
                damaged.append(name)
        return damaged

    def _read_footer(self) -> _Footer:
        size = len(self._map)
        if size < len(_MAGIC) + _TAIL.size or self._map[: len(_MAGIC)] != _MAGIC:
            raise _damaged(self.path, "it is not a column file")
        length, checksum, magic = _TAIL.unpack(self._map[size - _TAIL.size :])
        start = size - _TAIL.size - length
        if magic != _MAGIC or start < len(_MAGIC):
            raise _damaged(self.path, "its end is missing")
        raw = self._map[start : start + length]
        if checksum not in (0, zlib.crc32(raw)):
            raise _damaged(self.path, "its footer is damaged (its check sum is wrong)")
        try:
            footer = msgspec.json.decode(raw, type=_Footer)
            ends = [
                entry.offset
                + int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(entry.dtype).itemsize
                for entry in footer.columns.values()
            ]
        except (msgspec.MsgspecError, TypeError) as error:
            raise _damaged(self.path, f"its footer is damaged ({error})") from error
        if any(end > start for end in ends):
            raise _damaged(self.path, "a column reaches beyond its end")
        return footer


def _contiguous(column: Column) -> Column:
    return np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"cannot use {path}: {why}",
        hint="delete the file; it is made again from its source",
        path=path,
    )
