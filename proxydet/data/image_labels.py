"""Images of which only the classes are known: in tars, one a class, or in folders with a list. No torch here.

No tar is unpacked: indexing reads headers and notes where each image starts, how long it is and how large its image
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache as cached
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.artifacts import how_to_get
from proxydet.data.images import (
    FolderImages,
    LabelledImages,
    image_size,
    quiet_worker,
    require_distinct_files,
)
from proxydet.data.store import AnnotationStore, ColumnFile, ColumnWriter
from proxydet.errors import DataError
from proxydet.files import build_once, tar_members
from proxydet.paths import CACHE_HINT, cache_folder
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted, first_of, nearest

if TYPE_CHECKING:
    from proxydet.data.dataset import ImageLabelSpec
    from proxydet.data.records import CategoryEntry
    from proxydet.vocabulary.vocabulary import Vocabulary

_logger = logging.getLogger(__name__)

LARGEST_MEMBER = 1 << 28
"""Bytes; a compressed member that grows beyond this is refused (a decompression bomb, not a photograph)."""

_KIND, _VERSION = "tar-index", 1
_OPEN_TARS = 64
_MOST_PROCESSES = 16
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 1 << 15
_FETCH_AGAIN = "fetch the tar again, or remove it"


@dataclass(frozen=True, kw_only=True)
class TarClasses:
    """Which tar belongs to which class.

    Attributes:
        class_of_tar: Row of the vocabulary for each tar file name that belongs to a class.
        without_class: Tars that belong to no class of the vocabulary; they are not used.
        missing: Keys of ``map`` without a tar, and WordNet ids of ImageNet-LVIS whose class has no tar at all.
    """

    class_of_tar: dict[str, int]
    without_class: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


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


class _Meta(msgspec.Struct, frozen=True):
    folder: str
    tars: list[str]
    report: TarReport


class TarImages(LabelledImages):
    """Images in tars, one tar a class, numbered through. Make one with `open`; it can be pickled.

    Attributes:
        path: The index's file.
        matched: The classes of the tars.
        folder: Where the tars are.
        tars: Their file names.
        report: What indexing found.
        tar_I: int32 (I,), which tar each image is in.
        shapes_I2: int32 (I, 2), height and width of each image in pixels.
        indexed: Whether the index was made by this `open`.
    """

    def __init__(self, path: Path, matched: TarClasses, *, indexed: bool = False) -> None:
        self.path = path
        self.matched = matched
        self.indexed = indexed
        self._columns = ColumnFile(path, kind=_KIND, version=_VERSION)
        meta = self._columns.meta(_Meta)
        folder, tars = Path(meta.folder), tuple(meta.tars)
        self.folder, self.tars, self.report = folder, tars, meta.report
        self.tar_I: npt.NDArray[np.int32] = self._columns["tar"]
        self.shapes_I2 = self._columns["shape"]
        self._file = lru_cache(_OPEN_TARS)(lambda tar: _TarFile(folder / tars[tar]))

    @classmethod
    def open(
        cls,
        folder: Path,
        matched: TarClasses,
        *,
        cache: Path | None = None,
        progress: Progress = SILENT,
    ) -> TarImages:
        """Open the index of the tars of a folder that belong to a class, after making it if it does not exist.

        Args:
            folder: Where the tars are.
            matched: Which of them belong to which class.
            cache: Folder of indexes; None means the user's cache folder.
            progress: Where to show the indexing.

        Raises:
            DataError: a tar is not there.
        """
        folder, tars = folder.resolve(), sorted(matched.class_of_tar)
        digest = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape"))
        for name in tars:
            try:
                stat = (folder / name).stat()
            except OSError as error:
                message = f"cannot read {folder / name}: {error}"
                raise DataError(message, hint=_FETCH_AGAIN, path=folder / name) from error
            key = f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(key.encode("utf-8", "surrogateescape"))
        stores = cache_folder("stores") if cache is None else cache
        target = stores / f"{digest.hexdigest()[:32]}-tars-v{_VERSION}.columns"
        hint = CACHE_HINT if cache is None else None
        indexed = build_once(target, lambda path: _build(path, folder, tars, progress), hint=hint)
        return cls(target, matched, indexed=indexed)

    def notes(self) -> list[tuple[int, str, str]]:
        """Return what a user should know of tars and members: the level of logging, the text, and what to do.

        What indexing found is a warning when it is found, later information; so is that tars are not used.
        """
        warning, info = logging.WARNING, logging.INFO
        found, again = warning if self.indexed else info, "fetch what is named again"
        unused = (
            "tar belongs to no class and is not used",
            "tars belong to no class and are not used",
        )
        absent, named = (
            "get them, or train without these classes",
            "name their classes by 'map' if they have one",
        )
        groups: tuple[tuple[int, Sequence[str], tuple[str, ...], str], ...] = (
            (found, self.report.unreadable, ("unreadable member",), again),
            (found, self.report.damaged, ("damaged tar",), again),
            (found, self.report.empty, ("tar without images", "tars without images"), again),
            (warning, self.matched.missing, ("tar is missing", "tars are missing"), absent),
            (info, self.matched.without_class, unused, named),
        )
        return [
            (level, f"{counted(len(items), *what)}: {first_of(items, 3)}", advice)
            for level, items, what, advice in groups
            if items
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return TarImages, (self.path, self.matched)

    def name(self, row: int) -> str:
        """Return ``tar/member`` of an image."""
        start, end = self._columns["name_offsets"][row : row + 2]
        member = bytes(self._columns["names"][start:end]).decode("utf-8", "surrogateescape")
        return f"{self.tars[self.tar_I[row]]}/{member}"

    def encoded(self, row: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            DataError: the tar is gone, changed or damaged.
        """
        try:
            file = self._file(int(self.tar_I[row]))
            return _member(file, int(self._columns["offset"][row]), int(self._columns["size"][row]))
        except (OSError, DataError) as error:
            raise DataError(
                f"cannot read {self.name(row)}: {error}",
                hint=error.hint if isinstance(error, DataError) else _FETCH_AGAIN,
                path=self.folder,
            ) from error

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the class of the image's tar: int64 (1,)."""
        tar = self.tars[self.tar_I[row]]
        return np.array([self.matched.class_of_tar[tar]], dtype=np.int64)


def open_label_images(
    spec: ImageLabelSpec,
    vocabulary: Vocabulary,
    categories: Sequence[CategoryEntry],
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
    warn: bool = True,
) -> TarImages | FolderImages:
    """Open the image-label data of a dataset config, after indexing it where that was not done before.

    Args:
        spec: The table ``[image_labels]``.
        vocabulary: The classes.
        categories: Categories of the training annotations.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show the indexing.
        warn: Log what is missing, damaged or not used; False where the caller shows it itself.

    Raises:
        DataError: it is not there, none of it belongs to a class of the vocabulary, or two entries are one file.
    """
    if spec.annotations is not None:
        store = AnnotationStore.open(spec.annotations, cache=cache, progress=progress, warn=warn)
        require_distinct_files(store, spec.roots)
        return FolderImages(store, spec.roots, store.class_rows(vocabulary.names))
    matched = match_tars(spec, vocabulary, categories)
    images = TarImages.open(spec.tars or Path(), matched, cache=cache, progress=progress)
    for level, text, _ in images.notes() if warn else ():
        _logger.log(level, "%s: %s", images.folder, text)
    return images


def match_tars(
    spec: ImageLabelSpec, vocabulary: Vocabulary, categories: Sequence[CategoryEntry]
) -> TarClasses:
    """Find the class of each tar by its name.

    ``<key>.tar`` belongs to the class that ``map`` gives for the key; else to the category whose ``wnid``, ``synset`` or
    ``name`` is the key; else, where the key is a WordNet id of ImageNet-LVIS, to the category with its synset.

    Args:
        spec: The table ``[image_labels]``.
        vocabulary: The classes.
        categories: Categories of the training annotations.

    Raises:
        DataError: the folder is not there or holds no tar of any class, or ``map`` names an unknown class.
    """
    if spec.tars is None or not spec.tars.is_dir():
        raise DataError(
            f"there is no folder of tars {spec.tars}",
            hint="check 'tars' under [image_labels] in the dataset config; it is relative to its folder",
            path=spec.tars,
        )
    row_of_name = {name: row for row, name in enumerate(vocabulary.names)}
    known = [c for c in categories if c.name.strip() in row_of_name]
    row_of_synset = {c.synset: row_of_name[c.name.strip()] for c in known if c.synset}
    # What is put in first gives way to what comes later.
    wnids = synset_of_wnid()
    row_of_key = {w: row_of_synset[s] for w, s in wnids.items() if s in row_of_synset}
    row_of_key |= row_of_name | row_of_synset
    row_of_key |= {c.wnid: row_of_name[c.name.strip()] for c in known if c.wnid}
    for key, name in spec.map.items():
        if name.strip() not in row_of_name:
            raise DataError(
                f"[image_labels] map: {key!r} is given the class {name!r}, which is not in the vocabulary."
                + nearest(name, list(row_of_name)),
                hint="spell the class as the vocabulary does",
            )
        row_of_key[key] = row_of_name[name.strip()]
    keys = {path.name: path.stem for path in sorted(spec.tars.glob("*.tar"))}
    found = {tar: row_of_key[key] for tar, key in keys.items() if key in row_of_key}
    if not keys:
        raise DataError(
            f"there are no tars in {spec.tars}",
            hint=how_to_get(spec.tars / "n02691156.tar")
            or "put one tar for each class there, named by its class",
            path=spec.tars,
        )
    if not found:
        raise DataError(
            f"none of the {counted(len(keys), 'tar')} in {spec.tars} belongs to a class of the vocabulary",
            hint="say which by [image_labels] map = { key = 'class name' }; the key is the tar's name without .tar",
            path=spec.tars,
        )
    missing = set(spec.map) - set(keys.values())
    if any(keys[tar] in wnids for tar in found):
        missing |= {w for w in wnids if w in row_of_key and row_of_key[w] not in found.values()}
    return TarClasses(
        class_of_tar=found,
        without_class=tuple(tar for tar in keys if tar not in found),
        missing=tuple(sorted(missing)),
    )


@cached
def synset_of_wnid() -> Mapping[str, str]:
    """Return the synset (``aerosol.n.02``, as LVIS categories have it) of each of ImageNet-LVIS's 997 WordNet ids.

    The table is in the package: no WordNet is needed at run time.
    """
    text = (files("proxydet.data") / "imagenet_lvis.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return MappingProxyType(dict(lines))


class _TarFile(io.FileIO):
    """A tar that is closed with its last reference. It is read at offsets: processes may share it by fork, and threads."""

    def __del__(self) -> None:
        self.close()


class _Image(NamedTuple):
    name: str
    offset: int
    size: int
    shape: tuple[int, int]
    gzipped: bool


def _build(target: Path, folder: Path, tars: Sequence[str], progress: Progress) -> None:
    paths = [folder / name for name in tars]
    processes = min(os.cpu_count() or 1, _MOST_PROCESSES, len(paths))
    images: list[_Image] = []
    of_tar: list[int] = []  # how many are in each
    unreadable: list[str] = []
    damaged: list[str] = []
    with ExitStack() as stack:
        task = stack.enter_context(progress.task("indexing tars", total=len(paths), unit="tars"))
        scanned: Iterator[tuple[list[_Image], list[str], str]] = map(_scan, paths)
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, initializer=quiet_worker))
            scanned = pool.map(_scan, paths)
        for tar, (found, lines, damage) in zip(tars, scanned, strict=True):
            images += found
            of_tar.append(len(found))
            unreadable += [f"{tar}/{line}" for line in lines]
            damaged += [f"{tar}: {damage}"] if damage else []
            task.advance(images=len(images))
    report = TarReport(
        images=len(images),
        gzipped=sum(image.gzipped for image in images),
        unreadable=unreadable,
        damaged=damaged,
        empty=[tar for tar, count in zip(tars, of_tar, strict=True) if not count],
    )
    names = [image.name.encode("utf-8", "surrogateescape") for image in images]
    tar_I = np.repeat(np.arange(len(tars), dtype=np.int32), of_tar)
    with ColumnWriter(target) as writer:
        writer.add("tar", tar_I)
        writer.add("offset", np.array([image.offset for image in images], dtype=np.int64))
        writer.add("size", np.array([image.size for image in images], dtype=np.int64))
        shapes = np.array([image.shape for image in images], dtype=np.int32)
        writer.add("shape", shapes.reshape(-1, 2))
        writer.add("names", np.frombuffer(b"".join(names), dtype=np.uint8))
        writer.add("name_offsets", np.cumsum([0, *map(len, names)], dtype=np.int64))
        writer.finish(kind=_KIND, version=_VERSION, meta=_Meta(str(folder), list(tars), report))


def _scan(path: Path) -> tuple[list[_Image], list[str], str]:
    """Return the images of a tar, members that cannot be read, and why it is cut short: it gives what is before the cut."""
    images: list[_Image] = []
    unreadable: list[str] = []
    damage = ""
    try:
        with _TarFile(path) as file:
            for member in tar_members(file, os.fstat(file.fileno()).st_size):
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    unreadable.append(f"{member.name}: it is a link or a special file")
                    continue
                try:
                    images.append(_image(file, member))
                except DataError as error:
                    unreadable.append(f"{member.name}: {error.message}")
    except (OSError, ValueError) as error:
        damage = str(error)
    return images, unreadable, damage


def _image(file: _TarFile, member: tarfile.TarInfo) -> _Image:
    offset, size, name = member.offset_data, member.size, member.name
    head = os.pread(file.fileno(), min(size, _HEAD_BYTES), offset)
    gzipped = head.startswith(_GZIP_MAGIC)
    if gzipped:
        head = _member(file, offset, size)
    try:
        shape = image_size(head, name=name)
    except DataError:
        if gzipped or size <= _HEAD_BYTES:
            raise
        # Some cameras put more than the head's length before the size of the image.
        shape = image_size(_member(file, offset, size), name=name)
    return _Image(name, offset, size, shape, gzipped)


def _member(file: _TarFile, offset: int, size: int) -> bytes:
    """Read an image out of an open tar, unpacked where it is gzip-compressed."""
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            "the tar is truncated here; it changed since it was indexed",
            hint="run the same command again: the tar is indexed again",
        )
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            unpacked = stream.read(LARGEST_MEMBER + 1)
    except (OSError, EOFError, zlib.error) as error:
        message = f"gzip-compressed and damaged: {error}"
        raise DataError(message, hint=_FETCH_AGAIN) from error
    if len(unpacked) > LARGEST_MEMBER:
        raise DataError(
            f"gzip-compressed and larger than {LARGEST_MEMBER} bytes",
            hint="unpack it before it is put into the tar",
        )
    return unpacked
