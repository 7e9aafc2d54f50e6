"""Reading a tar archive once from start to end, refusing everything that is not a plain file or folder.

The standard library's reader is not used: it trusts the sizes of extended headers, which a hostile archive can set to
any value, and a backward step of it in a compressed stream starts the decompression anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from proxydet.errors import ArchiveError

_BLOCK = 512
_CHUNK = 1 << 20
_LONGEST_EXTENSION = 1 << 20
_FILES = (b"0", b"\0", b"7")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class TarMember:
    """A file or folder in a tar archive."""

    name: str
    """Its name as given."""
    size: int
    """Its size in bytes."""
    folder: bool
    """Whether it is a folder."""


class TarReader:
    """The members of a tar archive in order.

    Iterate over it; between two steps, `data` gives the bytes of the member just named.

    Args:
        file: The archive, not compressed.
        name: What messages call it.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[TarMember]:
        extended: dict[str, str] = {}
        while (header := self._header()) is not None:
            kind, size = header[156:157], self._number(header[124:136])
            if kind in (b"L", b"x", b"g"):
                text = self._extension(size)
                extended.update(self._longer(kind, text))
                continue
            size = self._extended_size(extended, size)
            member = self._member(header, kind, size, extended)
            extended = {}
            self._left, self._padding = (0, 0) if member.folder else (size, -size % _BLOCK)
            yield member
            self._skip()

    def data(self) -> Iterator[bytes]:
        """Yield the bytes of the member that iteration stands at.

        Raises:
            ArchiveError: The archive ends before.
        """
        while self._left:
            chunk = self._read(min(self._left, _CHUNK))
            self._left -= len(chunk)
            yield chunk

    def drain(self) -> None:
        """Read what follows the last member, up to the end of the file."""
        while self._file.read(_CHUNK):
            pass

    def _header(self) -> bytes | None:
        block = self._read(_BLOCK)
        if block.count(0) == _BLOCK:
            return None
        stored = self._number(block[148:156])
        if stored != sum(block) - sum(block[148:156]) + 8 * 32:
            raise ArchiveError(f"{self._name} is not a tar archive, or damaged.")
        return block

    def _member(self, header: bytes, kind: bytes, size: int, extended: dict[str, str]) -> TarMember:
        name = extended.get("path") or self._name_in(header)
        if kind in _REFUSED or any(key.startswith("GNU.sparse") for key in extended):
            raise ArchiveError(
                f"{self._name} holds {_REFUSED.get(kind, 'a sparse file')}, {name[:200]!r}; that is refused.",
                hint="The archive is damaged or hostile: do not use it.",
            )
        if kind not in (*_FILES, b"5"):
            raise ArchiveError(f"{self._name} holds something of an unknown kind, {name[:200]!r}.")
        return TarMember(name, size, folder=kind == b"5" or name.endswith("/"))

    def _name_in(self, header: bytes) -> str:
        name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
        if prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        return self._text(name)

    def _longer(self, kind: bytes, text: bytes) -> dict[str, str]:
        """Return what an extended header says of the next member; a global one says nothing that is used."""
        if kind == b"L":
            return {"path": self._text(text.split(b"\0")[0])}
        found = {}
        while text and kind == b"x":
            digits, _, _ = text.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            key, equals, value = text[len(digits) + 1 : length - 1].partition(b"=")
            if not 0 < length <= len(text) or not equals:
                raise ArchiveError(f"{self._name} has a damaged extended header.")
            if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
                found[self._text(key)] = self._text(value)
            text = text[length:]
        return found

    def _extended_size(self, extended: dict[str, str], size: int) -> int:
        text = extended.get("size")
        if text is None:
            return size
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ArchiveError(f"{self._name} has a damaged extended header.")
        return int(text)

    def _extension(self, size: int) -> bytes:
        if size > _LONGEST_EXTENSION:
            raise ArchiveError(
                f"{self._name} has an extended header of {size} bytes; that is refused."
            )
        text = self._read(size)
        self._read(-size % _BLOCK)
        return text

    def _number(self, field: bytes) -> int:
        """Return a number written in octal, or in binary where the first bit is set."""
        if field[0] == 0x80:
            number = int.from_bytes(field[1:], "big")
        else:
            text = field.strip(b"\0 ")
            if not all(48 <= digit < 56 for digit in text):
                raise ArchiveError(f"{self._name} is not a tar archive, or damaged.")
            number = int(text, 8) if text else 0
        if number >= 1 << 60:
            raise ArchiveError(f"{self._name} announces a file of {number} bytes; that is refused.")
        return number

    def _skip(self) -> None:
        """Go to the end of the current member, whether its bytes were read or not."""
        rest = self._left + self._padding
        self._left = self._padding = 0
        while rest:
            rest -= len(self._read(min(rest, _CHUNK)))

    def _read(self, count: int) -> bytes:
        data = self._file.read(count) if count else b""
        if len(data) < count:
            raise ArchiveError(
                f"{self._name} ends in the middle.", hint="It is damaged: download it again."
            )
        return data

    def _text(self, raw: bytes) -> str:
        return raw.decode("utf-8", errors="surrogateescape")
