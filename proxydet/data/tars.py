"""Image-label data straight from tars, one tar a class, through an index that is made once.

Nothing is unpacked: indexing reads headers and notes where each image starts, how long it is and how large its picture
is. The index is a column file in the cache, named by the names, sizes and times of the tars, so that a change of one makes
it again. Members that are not images, and tars that are cut short, are reported by name.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.images import image_size, quiet_worker
from proxydet.data.store import ColumnFile, ColumnWriter
from proxydet.errors import DataError
from proxydet.files import build_once
from proxydet.paths import cache_folder
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

LARGEST_MEMBER = 1 << 28
"""Bytes; a compressed member that grows beyond this is refused (a decompression bomb, not a photograph)."""

_KIND, _VERSION = "tar-index", 1
_OPEN_TARS = 64
_MOST_PROCESSES = 16
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 1 << 15
_FETCH_AGAIN = "fetch the tar again, or remove it"


class TarReport(msgspec.Struct, frozen=True, kw_only=True):
    """What indexing found that a user should know.

    Attributes:
        images: Images in the index.
        gzipped: How many of them are gzip-compressed inside the tar.
        unreadable: ``tar/member: reason`` of members that are not readable images; they are left out.
        damaged: ``tar: reason`` of tars that end too early; the images before the end are in the index.
        empty: Tars without a readable image.
    """

    images: int
    gzipped: int
    unreadable: list[str]
    damaged: list[str]
    empty: list[str]

    def lines(self) -> list[str]:
        """Return one line of text for each kind of problem."""
        groups = (
            (("unreadable member", "unreadable members"), self.unreadable),
            (("damaged tar", "damaged tars"), self.damaged),
            (("tar without images", "tars without images"), self.empty),
        )
        return [
            f"{counted(len(items), *title)}: {'; '.join(items[:3])}{'; ...' if len(items) > 3 else ''}"
            for title, items in groups
            if items
        ]


class _Meta(msgspec.Struct, frozen=True):
    folder: str
    tars: list[str]
    report: TarReport


class TarIndex:
    """The images of several tars, numbered through. Make one with `open`; it can be pickled.

    Attributes:
        path: The index's file.
        folder: Where the tars are.
        tars: Their file names.
        report: What indexing found.
        tar_I: int32 (I,), which tar each image is in.
        shapes_I2: int32 (I, 2), height and width of each image in pixels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = ColumnFile(path, kind=_KIND, version=_VERSION)
        meta = self._columns.meta(_Meta)
        self.folder = Path(meta.folder)
        self.tars = tuple(meta.tars)
        self.report = meta.report
        self.tar_I: npt.NDArray[np.int32] = self._columns["tar"]
        self.shapes_I2: npt.NDArray[np.int32] = self._columns["shape"]
        self._open: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(
        cls,
        folder: Path,
        tars: Sequence[str],
        *,
        cache: Path | None = None,
        processes: int | None = None,
        progress: Progress = SILENT,
        warn: bool = True,
    ) -> TarIndex:
        """Open the index of some tars of a folder, after making it if it does not exist.

        Args:
            folder: Where the tars are.
            tars: Their file names.
            cache: Folder of indexes; None means the user's cache folder.
            processes: How many processes read tars at once; None means one for each processor, at most 16.
            progress: Where to show the indexing.
            warn: Log what indexing finds; False where the caller shows the report itself.

        Raises:
            DataError: a tar is not there.
        """
        folder, tars = folder.resolve(), sorted(tars)
        target = cls.path_for(folder, tars, cache=cache)
        made_here = False

        def build(path: Path) -> None:
            nonlocal made_here
            made_here = True
            _build(path, folder, tars, processes, progress)

        build_once(target, build)
        index = cls(target)
        if made_here and warn:
            for line in index.report.lines():
                _logger.warning("%s: %s", folder, line)
        return index

    @staticmethod
    def path_for(folder: Path, tars: Sequence[str], *, cache: Path | None = None) -> Path:
        """Return where the index of some tars is, or would be made.

        Raises:
            DataError: a tar is not there.
        """
        folder = folder.resolve()
        digest = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape"))
        for name in sorted(tars):
            try:
                stat = (folder / name).stat()
            except OSError as error:
                message = f"cannot read {folder / name}: {error}"
                raise DataError(message, hint=_FETCH_AGAIN, path=folder / name) from error
            key = f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(key.encode("utf-8", "surrogateescape"))
        stores = cache_folder("stores") if cache is None else cache
        return stores / f"{digest.hexdigest()[:32]}-tars-v{_VERSION}.columns"

    def __len__(self) -> int:
        return len(self.tar_I)

    def __reduce__(self) -> tuple[Any, ...]:
        return TarIndex, (self.path,)

    def name(self, row: int) -> str:
        """Return ``tar/member`` of an image."""
        start, end = self._columns["name_offsets"][row : row + 2]
        member = bytes(self._columns["names"][start:end]).decode("utf-8", "surrogateescape")
        return f"{self.tars[self.tar_I[row]]}/{member}"

    def read(self, row: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            DataError: the tar is gone, changed or damaged.
        """
        tar = int(self.tar_I[row])
        try:
            # A process that inherits them by fork may use and close its own: they are read at offsets, without a position.
            if tar in self._open:
                self._open.move_to_end(tar)
            else:
                if len(self._open) >= _OPEN_TARS:
                    os.close(self._open.popitem(last=False)[1])
                self._open[tar] = os.open(self.folder / self.tars[tar], os.O_RDONLY | os.O_CLOEXEC)
            offset, size = int(self._columns["offset"][row]), int(self._columns["size"][row])
            return _member(self._open[tar], offset, size)
        except (OSError, DataError) as error:
            raise DataError(
                f"cannot read {self.name(row)}: {error}",
                hint=error.hint if isinstance(error, DataError) else _FETCH_AGAIN,
                path=self.folder,
            ) from error

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class _Image(NamedTuple):
    name: str
    offset: int
    size: int
    shape: tuple[int, int]
    gzipped: bool


@dataclass
class _Scan:
    images: list[_Image] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


def _build(
    target: Path, folder: Path, tars: Sequence[str], processes: int | None, progress: Progress
) -> None:
    paths = [folder / name for name in tars]
    count = min(processes or min(os.cpu_count() or 1, _MOST_PROCESSES), len(paths))
    scans: list[_Scan] = []
    with ExitStack() as stack:
        task = stack.enter_context(progress.task("indexing tars", total=len(paths), unit="tars"))
        scanned: Iterator[_Scan] = map(_scan, paths)
        if count > 1:
            pool = stack.enter_context(ProcessPoolExecutor(count, initializer=quiet_worker))
            scanned = pool.map(_scan, paths)
        found = 0
        for scan in scanned:
            scans.append(scan)
            found += len(scan.images)
            task.advance(images=found)
    images = [image for scan in scans for image in scan.images]
    by_tar = list(zip(tars, scans, strict=True))
    report = TarReport(
        images=len(images),
        gzipped=sum(image.gzipped for image in images),
        unreadable=[
            f"{tar}/{name}: {why}" for tar, scan in by_tar for name, why in scan.unreadable
        ],
        damaged=[f"{tar}: {scan.damage}" for tar, scan in by_tar if scan.damage],
        empty=[tar for tar, scan in by_tar if not scan.images],
    )
    names = [image.name.encode("utf-8", "surrogateescape") for image in images]
    tar_I = np.repeat(np.arange(len(scans), dtype=np.int32), [len(s.images) for s in scans])
    with ColumnWriter(target) as writer:
        writer.add("tar", tar_I)
        writer.add("offset", np.array([image.offset for image in images], dtype=np.int64))
        writer.add("size", np.array([image.size for image in images], dtype=np.int64))
        shapes = np.array([image.shape for image in images], dtype=np.int32)
        writer.add("shape", shapes.reshape(-1, 2))
        writer.add("names", np.frombuffer(b"".join(names), dtype=np.uint8))
        writer.add("name_offsets", np.cumsum([0, *map(len, names)], dtype=np.int64))
        writer.finish(kind=_KIND, version=_VERSION, meta=_Meta(str(folder), list(tars), report))


def _scan(path: Path) -> _Scan:
    """List the images of a tar; one that is cut short gives those before the cut, and why in ``damage``."""
    scan = _Scan()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            descriptor = file.fileno()
            length = os.fstat(descriptor).st_size
            for member in tar:
                if member.isdir():
                    continue
                if member.size < 0:  # the next header would lie before this one, without end
                    scan.damage = f"the size of {member.name} is negative"
                    break
                if not member.isreg() or member.sparse is not None:
                    scan.unreadable.append((member.name, "it is a link or a special file"))
                    continue
                if member.offset_data + member.size > length:
                    scan.damage = f"it ends in the middle of {member.name}"
                    break
                try:
                    scan.images.append(_image(descriptor, member))
                except DataError as error:
                    scan.unreadable.append((member.name, error.message))
            if not scan.damage:
                # tarfile takes any rubbish after the last member for the end.
                tail = os.pread(descriptor, tarfile.BLOCKSIZE, tar.offset)
                if len(tail) < tarfile.BLOCKSIZE:
                    scan.damage = "it has no end mark, so it may be cut short"
                elif any(tail):
                    scan.damage = "a header in its middle is damaged"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        scan.damage = str(error)
    return scan


def _image(descriptor: int, member: tarfile.TarInfo) -> _Image:
    offset, size, name = member.offset_data, member.size, member.name
    head = os.pread(descriptor, min(size, _HEAD_BYTES), offset)
    gzipped = head.startswith(_GZIP_MAGIC)
    if gzipped:
        head = _member(descriptor, offset, size)
    try:
        shape = image_size(head, name=name)
    except DataError:
        if gzipped or size <= _HEAD_BYTES:
            raise
        # Some cameras put more than the head's length before the size of the image.
        shape = image_size(_member(descriptor, offset, size), name=name)
    return _Image(name, offset, size, shape, gzipped)


def _member(descriptor: int, offset: int, size: int) -> bytes:
    """Read an image out of an open tar, unpacked where it is gzip-compressed."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise DataError(
            "the tar ends in the middle of the image; it changed since it was indexed",
            hint="run the same command again: the tar is indexed again",
        )
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(LARGEST_MEMBER + 1)
    except (OSError, EOFError, zlib.error) as error:
        message = f"gzip-compressed and damaged: {error}"
        raise DataError(message, hint=_FETCH_AGAIN) from error
    if len(unpacked) > LARGEST_MEMBER:
        raise DataError(
            f"gzip-compressed and larger than {LARGEST_MEMBER} bytes",
            hint="unpack it before it is put into the tar",
        )
    return unpacked
