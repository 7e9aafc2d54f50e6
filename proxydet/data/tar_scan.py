"""Looking through one tar of images: where each starts, how long it is, and how large its picture is.

Only headers are read; nothing is unpacked. Members that are no images are reported by name.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from proxydet.data.images import image_size
from proxydet.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 1 << 15
_BLOCK = tarfile.BLOCKSIZE
LARGEST_MEMBER = 1 << 28
"""Bytes; a compressed member that grows beyond this is refused (a decompression bomb, not a photograph)."""


@dataclass
class TarScan:
    """What one tar holds.

    Attributes:
        names: Name of each image in the tar.
        offsets: Byte where each image starts.
        sizes: Length of each image in bytes.
        shapes: Height and width of each picture.
        gzipped: Names of images that are stored gzip-compressed.
        unreadable: Name of each member that is no image that can be read, with the reason.
        damage: Why the tar could not be read to its end; empty where it could.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    gzipped: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


def scan_tar(path: Path) -> TarScan:
    """List the images of a tar.

    A tar that is cut short gives the images before the cut, and says so in ``damage``.
    """
    scan = TarScan()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            length = os.fstat(file.fileno()).st_size
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    scan.unreadable.append((member.name, "it is a link or a special file"))
                elif member.offset_data + member.size > length:
                    scan.damage = f"it ends in the middle of {member.name}"
                    break
                else:
                    _add(scan, file.fileno(), member)
            if not scan.damage:
                scan.damage = _tail_damage(os.pread(file.fileno(), _BLOCK, tar.offset))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        scan.damage = str(error)
    return scan


def member_bytes(descriptor: int, offset: int, size: int) -> bytes:
    """Read an image out of an open tar, unpacked where it is gzip-compressed.

    Raises:
        DataError: the tar ends before the image does, or the compressed data is damaged.
    """
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise DataError(
            "the tar ends in the middle of the image; it changed since it was indexed",
            hint="run the same command again: the tar is indexed anew",
        )
    return gunzip(data) if data.startswith(_GZIP_MAGIC) else data


def gunzip(data: bytes) -> bytes:
    """Unpack gzip-compressed bytes of at most `LARGEST_MEMBER` bytes.

    Raises:
        DataError: they are damaged or too many.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(LARGEST_MEMBER + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"gzip-compressed and damaged: {error}", hint="fetch the tar again, or remove it"
        ) from error
    if len(unpacked) > LARGEST_MEMBER:
        raise DataError(
            f"gzip-compressed and larger than {LARGEST_MEMBER} bytes",
            hint="unpack it before it is put into the tar",
        )
    return unpacked


def _tail_damage(block: bytes) -> str:
    """Say what is wrong with the block after the last member; tarfile takes any rubbish there for the end."""
    if len(block) == _BLOCK:
        return "a header in its middle is damaged" if any(block) else ""
    return "it has no end mark, so it may be cut short"


def _add(scan: TarScan, descriptor: int, member: tarfile.TarInfo) -> None:
    gzipped = False
    try:
        head = os.pread(descriptor, min(member.size, _HEAD_BYTES), member.offset_data)
        if head.startswith(_GZIP_MAGIC):
            head = member_bytes(descriptor, member.offset_data, member.size)
            gzipped = True
        shape = _shape(head, descriptor, member)
    except DataError as error:
        scan.unreadable.append((member.name, error.message))
        return
    if gzipped:
        scan.gzipped.append(member.name)
    scan.names.append(member.name)
    scan.offsets.append(member.offset_data)
    scan.sizes.append(member.size)
    scan.shapes.append(shape)


def _shape(head: bytes, descriptor: int, member: tarfile.TarInfo) -> tuple[int, int]:
    try:
        return image_size(head, name=member.name)
    except DataError:
        if member.size <= _HEAD_BYTES or head.startswith(_GZIP_MAGIC):
            raise
        # Some cameras put more than the head's length in front of the picture's size.
        return image_size(
            member_bytes(descriptor, member.offset_data, member.size), name=member.name
        )
