"""Reading image-label data straight from tars, one tar a class, through an index that is made once.

The index is a column file in the cache, named by the names, sizes and times of the tars: when one changes, it is made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.columns import ColumnFile, ColumnWriter
from proxydet.data.images import quiet_worker
from proxydet.data.tar_scan import TarScan, member_bytes, scan_tar
from proxydet.errors import DataError
from proxydet.files import build_once
from proxydet.paths import cache_folder
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

_KIND, _VERSION = "tar-index", 1
_OPEN_TARS = 64
_MOST_PROCESSES = 16


class TarReport(msgspec.Struct, frozen=True, kw_only=True):
    """What indexing found that a user should know.

    Attributes:
        images: Images in the index.
        gzipped: How many of them are gzip-compressed inside the tar.
        unreadable: ``tar/member: reason`` of members that are no readable image; they are left out.
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
        folder: Where the tars are.
        tars: Their file names.
        report: What indexing found.
        tar_I: int32 (I,), which tar each image is in.
        shapes_I2: int32 (I, 2), height and width of each image.
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
        self._offsets = self._columns["offset"]
        self._sizes = self._columns["size"]
        self._names = self._columns["names"]
        self._name_offsets = self._columns["name_offsets"]
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
        """Open the index of some tars of a folder, after making it where there is none.

        Args:
            folder: Where the tars are.
            tars: Their file names.
            cache: Folder of indexes; None means the user's cache folder.
            processes: How many look through tars side by side; None means one for each processor, at most 16.
            progress: Where to show the indexing.
            warn: Log what indexing finds; False where the caller shows the report itself.

        Raises:
            DataError: a tar is not there.
        """
        folder = folder.resolve()
        ordered = sorted(tars)
        target = cls.path_for(folder, ordered, cache=cache)
        made_here = False

        def build(path: Path) -> None:
            nonlocal made_here
            made_here = True
            _build(path, folder, ordered, processes, progress)

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
        key = _fingerprint(folder.resolve(), sorted(tars))
        stores = cache_folder("stores") if cache is None else cache
        return stores / f"{key[:32]}-tars-v{_VERSION}.columns"

    def __len__(self) -> int:
        return len(self.tar_I)

    def __reduce__(self) -> tuple[Any, ...]:
        return TarIndex, (self.path,)

    def name(self, row: int) -> str:
        """Return ``tar/member`` of an image."""
        start, end = self._name_offsets[row : row + 2]
        member = bytes(self._names[start:end]).decode("utf-8", "surrogateescape")
        return f"{self.tars[self.tar_I[row]]}/{member}"

    def read(self, row: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            DataError: the tar is gone, changed or damaged.
        """
        try:
            return member_bytes(
                self._descriptor(int(self.tar_I[row])),
                int(self._offsets[row]),
                int(self._sizes[row]),
            )
        except OSError as error:
            raise DataError(
                f"cannot read {self.name(row)}: {error}",
                hint="fetch the tar again, or remove it",
                path=self.folder,
            ) from error
        except DataError as error:
            raise DataError(
                f"cannot read {self.name(row)}: {error.message}",
                hint="fetch the tar again, or remove it",
                path=self.folder,
            ) from error

    def _descriptor(self, tar: int) -> int:
        """Return an open file of a tar; the least used one is closed when there are many.

        A process that inherits them by fork may use and close its own: they are read at offsets, without a position.
        """
        if tar in self._open:
            self._open.move_to_end(tar)
            return self._open[tar]
        if len(self._open) >= _OPEN_TARS:
            os.close(self._open.popitem(last=False)[1])
        self._open[tar] = os.open(self.folder / self.tars[tar], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[tar]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _fingerprint(folder: Path, tars: Sequence[str]) -> str:
    digest = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape"))
    for name in tars:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise DataError(
                f"cannot read {folder / name}: {error}",
                hint="fetch the tar again, or remove it",
                path=folder / name,
            ) from error
        digest.update(
            f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def _build(
    target: Path, folder: Path, tars: Sequence[str], processes: int | None, progress: Progress
) -> None:
    paths = [folder / name for name in tars]
    count = min(processes or min(os.cpu_count() or 1, _MOST_PROCESSES), len(paths))
    scans: list[TarScan] = []
    images = 0
    with progress.task("indexing tars", total=len(paths), unit="tars") as task:
        if count <= 1:
            for path in paths:
                scans.append(scan_tar(path))
                images += len(scans[-1].names)
                task.advance(images=images)
        else:
            with ProcessPoolExecutor(count, initializer=quiet_worker) as pool:
                for scan in pool.map(scan_tar, paths):
                    scans.append(scan)
                    images += len(scan.names)
                    task.advance(images=images)
    _write(target, folder, tars, scans)


def _write(target: Path, folder: Path, tars: Sequence[str], scans: Sequence[TarScan]) -> None:
    report = TarReport(
        images=sum(len(scan.names) for scan in scans),
        gzipped=sum(len(scan.gzipped) for scan in scans),
        unreadable=[
            f"{tar}/{member}: {why}"
            for tar, scan in zip(tars, scans, strict=True)
            for member, why in scan.unreadable
        ],
        damaged=[f"{tar}: {s.damage}" for tar, s in zip(tars, scans, strict=True) if s.damage],
        empty=[tar for tar, scan in zip(tars, scans, strict=True) if not scan.names],
    )
    names = [name.encode("utf-8", "surrogateescape") for scan in scans for name in scan.names]
    shapes = [shape for scan in scans for shape in scan.shapes]
    with ColumnWriter(target) as writer:
        writer.add(
            "tar", np.repeat(np.arange(len(scans), dtype=np.int32), [len(s.names) for s in scans])
        )
        writer.add("offset", np.array([o for scan in scans for o in scan.offsets], dtype=np.int64))
        writer.add(
            "size", np.array([size for scan in scans for size in scan.sizes], dtype=np.int64)
        )
        writer.add("shape", np.array(shapes, dtype=np.int32).reshape(-1, 2))
        writer.add("names", np.frombuffer(b"".join(names), dtype=np.uint8))
        writer.add("name_offsets", np.cumsum([0, *map(len, names)], dtype=np.int64))
        writer.finish(kind=_KIND, version=_VERSION, meta=_Meta(str(folder), list(tars), report))
