"""Annotations in columns: read from a path of any format once, then opened by memory map in a millisecond.

Everything that asks about annotations (check, stats, preview, training, evaluation) asks a store, so that all get one
answer. All ranks and loader workers of a machine share the pages of the one file; nothing is parsed again.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import logging
import mmap
import posixpath
import struct
import tempfile
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from proxydet.data import masks
from proxydet.data.formats import coco, cvat, label_studio, labelme, via, voc, yolo
from proxydet.data.formats.coco import no_garbage_collection
from proxydet.data.images import files_below, named_images_below, readable_suffixes
from proxydet.data.records import (
    DAMAGED_MASK,
    LABEL_LISTS,
    MOST_CATEGORIES,
    AnnotationEntry,
    AnnotationSource,
    BoxConvention,
    CategoryEntry,
    Document,
    Format,
    Identifier,
    ImageEntry,
    StoreReport,
    Unusable,
    image_name,
    line_of,
    other_spelling,
    refused,
)
from proxydet.errors import ConfigError, DataError, RuntimeEnvironmentError
from proxydet.extensions import extension_errors, load_extension, require_signature, source_digests
from proxydet.files import (
    build_once,
    discard,
    open_regular,
    read_errors,
    remembered_sha256,
    sha256,
    staged,
    write_bytes,
)
from proxydet.paths import CACHE_HINT, cache_folder
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted, first_of

_HEAD = 1 << 16
_END = 1 << 12
_REMEMBERED = 1 << 20
"""Bytes of a file from which its digest is remembered: labelme's hold the images too."""
SNIFFED = 20
"""Files of a folder that are opened to see their format."""
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


class ColumnWriter(ExitStack):
    """Writes a column file under a temporary name and moves it into place when it is whole.

    Use as a context manager; leaving it without `finish`, or by an exception, leaves no file. What a killed process left
    unfinished is removed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._entries: dict[str, _Entry] = {}
        self._finished = False
        temporary = self.enter_context(staged(path))
        self.push(lambda *_: None if self._finished else discard(temporary))
        self._file = self.enter_context(temporary.open("wb", buffering=1 << 20))
        self._file.write(_MAGIC)

    def add(self, name: str, part: Column) -> None:
        """Add a column of any number of dimensions, or a part to the column added last, along its first axis.

        Raises:
            ValueError: another column was added after this one, or the part has another type or shape.
        """
        data = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
        entry = self._entries.get(name)
        if entry is None:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            entry = _Entry(data.dtype.str, [0, *data.shape[1:]], self._file.tell(), 0)
        elif name != [*self._entries][-1]:
            raise ValueError(f"column {name} is already closed")
        if (data.dtype.str, [*data.shape[1:]]) != (entry.dtype, entry.shape[1:]):
            raise ValueError(f"column {name} is of {entry.dtype}, rows of shape {entry.shape[1:]}")
        raw = data.reshape(-1).view(np.uint8).data
        shape = [entry.shape[0] + len(data), *entry.shape[1:]]
        self._entries[name] = _Entry(entry.dtype, shape, entry.offset, zlib.crc32(raw, entry.crc32))
        self._file.write(raw)

    def finish(self, *, kind: str, version: int, meta: Any) -> None:
        """Write the footer; the file gets its name when the ``with`` statement ends.

        Args:
            kind: What the file holds; checked on opening.
            version: Version of the layout of this kind; checked on opening.
            meta: Anything that msgspec can write as JSON.
        """
        encoded = msgspec.Raw(msgspec.json.encode(meta))
        footer = msgspec.json.encode(_Footer(kind, version, self._entries, encoded))
        self._file.write(footer)
        self._file.write(_TAIL.pack(len(footer), zlib.crc32(footer), _MAGIC))
        self._finished = True


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
        self._arrays: dict[str, Column] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._unusable(str(error)) from error
        end = len(self._map) - _TAIL.size
        if end < len(_MAGIC) or self._map[: len(_MAGIC)] != _MAGIC:
            raise self._unusable("it is not a column file")
        length, checksum, magic = _TAIL.unpack(self._map[end:])
        start = end - length
        if magic != _MAGIC or start < len(_MAGIC):
            raise self._unusable("its end is missing")
        raw = self._map[start:end]
        if checksum not in (0, zlib.crc32(raw)):
            raise self._unusable("its footer is damaged (its check sum is wrong)")
        try:
            self._footer = msgspec.json.decode(raw, type=_Footer)
            for entry in self._footer.columns.values():
                count = int(np.prod(entry.shape, dtype=np.int64))
                if entry.offset + count * np.dtype(entry.dtype).itemsize > start:
                    raise self._unusable("a column reaches beyond its end")
        except (msgspec.MsgspecError, TypeError) as error:
            raise self._unusable(f"its footer is damaged ({error})") from error
        if (self._footer.kind, self._footer.version) != (kind, version):
            raise self._unusable(
                f"it holds {self._footer.kind} version {self._footer.version}, not {kind} version {version}"
            )

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"cannot use {self.path}: {why}",
            hint="delete the file; it is made again from its source",
            path=self.path,
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
            raise self._unusable(f"its footer is damaged ({error})") from error

    def __getitem__(self, name: str) -> Column:
        # Kept: training asks several times for each object of an image.
        if name not in self._arrays:
            entry = self._footer.columns.get(name)
            if entry is None:
                raise self._unusable(f"it has no column {name}")
            count = int(np.prod(entry.shape, dtype=np.int64))
            flat: Column = np.frombuffer(self._map, entry.dtype, count, entry.offset)
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


# --- What a path means -----------------------------------------------------------------------------------------------------


_READERS: dict[Format | None, Callable[[AnnotationSource, StoreReport], Document]] = {
    "COCO JSON": lambda s, report: coco.read(s.annotations, str(s.annotations), report),
    "Pascal VOC": voc.read,
    "YOLO": yolo.read,
    "labelme": labelme.read,
    "VGG VIA": via.read,
    "CVAT XML": cvat.read,
    "Label Studio JSON": label_studio.read,
}
_WITHOUT_SIZES = ("labelme", "VGG VIA", "Label Studio JSON")
"""Formats without a rule for the folders of images that may not hold their sizes."""


def head_of(path: Path) -> bytes:
    """Return the first 64 KB of a file, unpacked where it is gzipped; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as packed:
                head = packed.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return b""
    return head


def recognise(head: bytes) -> Format | None:
    """Return the format of a file that begins so, in JSON, CSV or XML; None where its first 64 KB do not say."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    first = start[1:].lstrip()  # of an object its first key
    if start[:1] == b"{":
        keys = (b'"imageData"', b'"imagePath"', b'"imageHeight"', b'"shapes"', b'"lineColor"')
        if first.startswith(keys) or (
            first.startswith((b'"version"', b'"flags"')) and b'"shapes"' in head
        ):
            return "labelme"
        if first.startswith(b'"_via_') or all(
            key in head for key in (b'"filename"', b'"regions"', b'"size"')
        ):
            return "VGG VIA"
        coco_first = (b'"annotations"', b'"categories"', b'"info"', b'"licenses"')
        if b'"images"' in head or first.startswith(coco_first[: 4 if len(head) == _HEAD else 1]):
            return "COCO JSON"
    elif start[:1] == b"[":
        in_task = (b'"annotations"', b'"completions"', b'"predictions"')
        in_min = (b'"annotator"', b'"annotation_id"', b'"original_width"', b'"lead_time"')
        if b'"data"' in head and any(key in head for key in in_task):
            return "Label Studio JSON"
        if b'"image_id"' not in head and any(key in head for key in in_min):
            return "Label Studio JSON"
    elif start.lstrip(b"#").startswith(b"filename"):
        return "VGG VIA" if b"region_shape_attributes" in start[:1024] else None
    elif b"<annotation>" in head:
        return "Pascal VOC"
    elif b"<annotations" in head:
        return "CVAT XML"
    return None


def format_of(path: Path) -> Format | None:
    """Return the format of annotations, from names and first bytes; None for a folder that holds none."""
    suffix = path.suffix.lower()
    if suffix in yolo.YAML:
        return "YOLO"
    if path.is_dir():
        if (path / "Annotations").is_dir() or any(path.glob("*.xml")):
            return "Pascal VOC"
        if yolo.is_folder(path):
            return "YOLO"
        files = labelme.files(path)[:SNIFFED] if any(path.rglob("*.json")) else []
        return "labelme" if "labelme" in (recognise(head_of(file)) for file in files) else None
    if suffix == ".txt":
        return "YOLO" if yolo.is_list(path) else "Pascal VOC"
    if suffix == ".gz":
        return "COCO JSON"
    found = recognise(head_of(path))
    if suffix == ".xml":
        return "CVAT XML" if found == "CVAT XML" else "Pascal VOC"
    return "COCO JSON" if found in (None, "Pascal VOC", "CVAT XML") else found


def _resolved(source: AnnotationSource | Path | str) -> AnnotationSource:
    """Return a source with its format, and with the folders of its images where the format has no rule for them."""
    meant = (
        source
        if isinstance(source, AnnotationSource)
        else AnnotationSource(annotations=Path(source), images=())
    )
    if meant.reader or meant.format:
        return meant
    found = format_of(meant.annotations) or "Pascal VOC"  # whose reader reports what is not there
    images = meant.roots
    if not images and found in _WITHOUT_SIZES:
        images = near(meant.annotations)
    return replace(meant, format=found, images=images)


def near(path: Path) -> tuple[Path, ...]:
    """Return the folders next to annotations in which their images may lie."""
    own = path if path.is_dir() else path.parent
    return tuple(folder for folder in (own, own / "images") if folder.is_dir())


def _files(source: AnnotationSource) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Return the files that a source is read from, and the images whose sizes it takes, with their names."""
    path = source.annotations
    if source.format == "YOLO":
        return yolo.files(source)
    if source.format == "Pascal VOC":
        return voc.files(path), []
    files = labelme.files(path) if source.format == "labelme" else [path]
    if source.reader and path.is_dir():
        ends = tuple(readable_suffixes())
        there = files_below(path, ("",))
        files = [file for file in there if not file.name.lower().endswith(ends) and file.is_file()]
    measured = source.reader or source.format in _WITHOUT_SIZES
    return files, named_images_below(source.roots) if measured else []


def _digest(source: AnnotationSource, memory: Path) -> str:
    """Return a digest of what `_read` reads of a source (of `_resolved`), or raise DataError; ``memory`` holds known ones."""
    if source.reader is not None:
        _own_reader(source.reader)
    path = source.annotations
    files, images = _files(source)
    if len(files) == 1 and not images:
        whole = remembered_sha256(files[0], memory, hint="check the path", error=DataError)
    else:
        digests = []
        for file in files:
            with read_errors(file, error=DataError):
                small = file.stat().st_size < _REMEMBERED
                own = sha256(file) if small else remembered_sha256(file, memory, error=DataError)
            inside = file != path and file.is_relative_to(path)
            digests.append(f"{file.relative_to(path).as_posix() if inside else file.name} {own}")
        digests += ["images " + _stamp(images, memory)] if images else []
        whole = hashlib.sha256("\n".join(digests).encode("utf-8", "surrogateescape")).hexdigest()
    meant = []
    if source.reader is not None:  # another version of it may read something else
        meant.append(f"{source.reader} {source_digests([source.reader])}")
    # Of a folder the files that are read decide where corners count from; of a list, others do too.
    of_list = source.format == "Pascal VOC" and not path.is_dir()
    meant += ["from 0"] if of_list and voc.first_pixel(path) == 0 else []
    usual = source.format in (None, format_of(path) or "Pascal VOC")
    meant += [] if usual else [f"as {source.format}"]
    if source.part is not None or source.share is not None:
        meant.append(f"{source.part} {source.share} {source.seed}")
    for what in meant:
        whole = hashlib.sha256(f"{whole} {what}".encode()).hexdigest()
    return whole


def _stamp(named: Iterable[tuple[str, Path]], memory: Path) -> str:
    """Return a digest of images whose sizes are read: of their names and lengths, and of their first and last 4 KB.

    There formats say how large an image is and which way it is turned. It is the same wherever the images lie, and
    remembered in ``memory`` for as long as their names, lengths and times are the same.
    """
    there: list[tuple[str, Path]] = []
    listed = hashlib.sha256()
    for name, path in named:
        with suppress(OSError):
            status = path.stat()
            called = f"{name} {status.st_size}"
            there.append((called, path))
            listed.update(f"{called} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    note = memory / f"{listed.hexdigest()[:32]}.images"
    with suppress(OSError), open_regular(note) as file:
        if len(known := file.read(65)) == 64:
            return known.decode("ascii", "replace")

    def ends(path: Path) -> bytes:
        with suppress(OSError), open_regular(path) as file:
            start = file.read(_END)
            file.seek(max(file.seek(0, 2) - _END, 0))
            return start + file.read(_END)
        return b""

    found = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(there), 1024):
            some = there[start : start + 1024]
            for (called, _), data in zip(some, pool.map(ends, [p for _, p in some]), strict=True):
                found.update(f"{called}\n".encode("utf-8", "surrogateescape") + data)
    with suppress(RuntimeEnvironmentError):  # a shortcut, not needed
        write_bytes(note, found.hexdigest().encode(), durable=False)
    return found.hexdigest()


def _own_reader(path: str) -> Callable[..., Any]:
    function: Callable[..., Any] = load_extension(path, "reader")
    require_signature(function, "reader", path, positional=2)
    return function


def _read(source: AnnotationSource, report: StoreReport) -> Document:
    """Read annotations (of `_resolved`), counting deviations of the file in a report; the readers say what they raise."""
    if source.reader is None:
        document = _READERS[source.format](source, report)
    else:
        doing = f"reader is {source.reader}: reading {source.annotations}"
        with extension_errors(doing):
            document = _own_reader(source.reader)(source.annotations, source.roots)
        if not isinstance(document, Document):
            raise ConfigError(
                f"reader is {source.reader}, which must return a Document; it returned a {type(document).__name__}.",
                hint="collect objects with proxydet.data.formats.collected.Objects, and return its document(...)",
            )
        chunks = document.annotations

        def reported() -> Iterator[list[AnnotationEntry | Unusable]]:
            with extension_errors(doing):
                yield from chunks

        document = replace(document, annotations=reported())
    return document if source.share is None else _share_of(document, source.share, source.seed)


def share_positions(names: list[str], seed: int) -> dict[str, float]:
    """Return where each name stands in the order that ``share`` cuts: fractions between 0 and 1.

    The order is that of a hash of seed and name, so it is the same on every machine and for any order of the file.
    """
    ordered = sorted(
        dict.fromkeys(names),
        key=lambda name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest(),
    )
    return {name: (place + 0.5) / len(ordered) for place, name in enumerate(ordered)}


def _share_of(document: Document, share: tuple[float, float], seed: int) -> Document:
    """Return a document of a share of the images, and of their annotations."""

    def key(image: ImageEntry) -> str:
        return image_name(image) or str(image.id)

    low, high = share
    images = [image for image in document.images if isinstance(image, ImageEntry)]
    place = share_positions([key(image) for image in images], seed)
    kept = [image for image in images if low <= place[key(image)] < high]
    # What belongs to no image is counted once.
    strays = [record for record in document.images if isinstance(record, Unusable) and low == 0]
    inside = {image.id for image in kept}
    outside = {image.id for image in images} - inside

    def belongs(entry: AnnotationEntry | Unusable) -> bool:
        if low > 0:
            return isinstance(entry, AnnotationEntry) and entry.image_id in inside
        return isinstance(entry, Unusable) or entry.image_id not in outside

    chunks = ([entry for entry in chunk if belongs(entry)] for chunk in document.annotations)
    return replace(document, images=[*kept, *strays], annotations=chunks)


# --- The store -----------------------------------------------------------------------------------------------------------

_logger = logging.getLogger(__name__)

STORE_KIND = "annotations"
STORE_VERSION = 5
_FREQUENCY_LIMITS = (10, 100)
"""LVIS: rare categories (r) are in at most 10 training images, common ones (c) in at most 100, other ones are f."""
_CLIP_COUNTED_FROM = 1.0
_MOST_CROWDS = 0.1
_NO_ID = -(2**63)
_ROW = np.dtype(
    [
        ("annotation_id", np.int64),
        ("image", np.int32),
        ("category", np.int32),
        ("xywh", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
        ("ignore", np.bool_),
        ("polygon_start", np.int64),
        ("polygon_count", np.int32),
        ("rle_start", np.int64),
        ("rle_length", np.int32),
        ("box", np.float32, 4),
        ("label", np.object_),
    ]
)
"""The columns over annotations, and what to call each annotation in messages."""


class _Meta(msgspec.Struct, frozen=True):
    format: str
    categories: list[CategoryEntry]
    root_category: CategoryEntry | None
    label_lists: dict[str, int]
    report: StoreReport
    source: str
    dropped_images: list[Identifier] = []
    dropped_names: list[str] = []


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image and its annotations. Arrays are read-only views of the store.

    Attributes:
        index: Row of the image in the store.
        image_id: Its id in the annotation file.
        file_name: Path below an image root, as the file has it; empty where it names none.
        height: Pixels.
        width: Pixels.
        boxes_A4: float32 (A, 4), xyxy in pixels, clipped to the image; without extent where nothing of it is inside.
        categories_A: int32 (A,), rows of the store's categories.
        crowd_A: bool (A,), whether the annotation stands for a group.
        first_annotation: Row of the first of the annotations in the store.
    """

    index: int
    image_id: Identifier
    file_name: str
    height: int
    width: int
    boxes_A4: npt.NDArray[np.float32]
    categories_A: npt.NDArray[np.int32]
    crowd_A: npt.NDArray[np.bool_]
    first_annotation: int

    def __len__(self) -> int:
        return len(self.boxes_A4)


class AnnotationStore:
    """The columns of one annotation file.

    Make one with `open`. It can be pickled: what travels is its path.

    Attributes:
        path: The store's file.
        format: Name of the annotations' format.
        categories: The categories, in ascending order of their id; annotations refer to their position.
        root_category: A category that was left out because it is not a class (Roboflow's root); None without.
        label_lists: How many images have each of the lists ``neg_category_ids``, ...
        report: What was dropped, mended and noted when the store was made.
        dropped_images: Ids of images that were left out, in both spellings where the id is a number.
        dropped_names: File names of those that have one.
        source_name: Path of the annotation file, as it was given; for messages.
        sizes_I2: int32 (I, 2), height and width in pixels.
    """

    def __init__(self, path: Path, source_name: str | None = None) -> None:
        self.path = path
        self._columns = ColumnFile(path, kind=STORE_KIND, version=STORE_VERSION)
        meta = self._columns.meta(_Meta)
        self.format = meta.format
        self.categories: tuple[CategoryEntry, ...] = tuple(meta.categories)
        self.root_category = meta.root_category
        self.label_lists = meta.label_lists
        self.report = meta.report
        self.dropped_images = frozenset(meta.dropped_images)
        self.dropped_names = tuple(meta.dropped_names)
        # Files of equal content share a store: it cannot say which of them was opened.
        self.source_name = source_name or meta.source
        self.sizes_I2: npt.NDArray[np.int32] = self._columns["size"]

    @classmethod
    def open(
        cls,
        source: AnnotationSource | Path | str,
        *,
        cache: Path | None = None,
        progress: Progress = SILENT,
        warn: bool = True,
    ) -> AnnotationStore:
        """Open the store of annotations, after making it where there is none.

        Args:
            source: A file or folder of a format of ``docs/reference/annotation-files.md``, or what of it is meant.
            cache: Folder of the stores; None means the user's cache folder.
            progress: Where to show the conversion.
            warn: Log what was dropped, mended and noted, in one line where the store was there; False where the caller
                shows the report itself.

        Raises:
            DataError: the file cannot be read, or is refused: see `proxydet.data.records`.
        """
        meant = _resolved(source)
        path = cls.path_for(meant, cache=cache)

        def build(target: Path) -> None:
            build_store(meant, target, progress=progress)
            if cls.path_for(meant, cache=cache) != target:
                target.unlink()
                raise DataError(
                    f"{meant.annotations} changed while it was read",
                    hint="run the same command again when nothing writes to it",
                    path=meant.annotations,
                )

        made_here = build_once(path, build, hint=CACHE_HINT if cache is None else None)
        store = cls(path, str(meant.annotations))
        # Whoever made the store: what a command leaves out, it says.
        lines = store.report.lines() if made_here else store.report.summary(meant.annotations)
        for line in lines if warn else ():
            _logger.warning("%s: %s", meant.annotations.name, line)
        return store

    @classmethod
    def from_bytes(cls, text: bytes, name: str) -> AnnotationStore:
        """Return a store of annotations in memory (COCO or LVIS JSON); errors as of `open`.

        Args:
            text: The JSON.
            name: What to call it in messages.
        """
        with tempfile.TemporaryDirectory(prefix="proxydet-store-") as folder:
            path = Path(folder) / "annotations.columns"
            build_store(text, path, name=name)
            return cls(path)  # stays mapped when its file is gone

    @staticmethod
    def path_for(source: AnnotationSource | Path | str, *, cache: Path | None = None) -> Path:
        """Return where the store of annotations is, or would be made.

        Raises:
            DataError: a file cannot be read.
        """
        folder = cache_folder("stores") if cache is None else cache
        return folder / f"{_digest(_resolved(source), folder)[:32]}-v{STORE_VERSION}.columns"

    def __len__(self) -> int:
        return len(self.sizes_I2)

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationStore, (self.path, self.source_name)

    def require_objects(self, *, groups: bool = False) -> None:
        """Check that there is something to train on or to score.

        Args:
            groups: Whether crowds count, as OpenImages' groups do when it scores.

        Raises:
            DataError: there is no image, no annotation, or only crowds.
        """
        key = ""
        if not self.report.images_kept or not self.categories:
            key = "file.images"
        elif not self.report.annotations_kept:
            key = "file.empty"
        elif not groups and self.report.crowds == self.report.annotations_kept:
            key = "file.crowds"
        if key:
            error = refused(key, None, self.source_name, record=self.report.record)
            lost = [line for line in self.report.lines() if " dropped: " in line][:3]
            raise DataError("; ".join([error.message, *lost]), hint=error.hint)

    @property
    def has_masks(self) -> bool:
        """Whether any annotation has a mask."""
        return self.report.without_mask < self.report.annotations_kept

    @cached_property
    def masked_A(self) -> npt.NDArray[np.bool_]:
        """Whether each annotation has a mask: bool over all annotations."""
        masked: npt.NDArray[np.bool_] = (self.column("polygon_count") > 0) | (
            self.column("rle_length") > 0
        )
        return masked

    @cached_property
    def image_ids(self) -> tuple[Identifier, ...]:
        """The id of each image: whole numbers, or texts."""
        if "image_id" in self._columns:
            return tuple(self._columns["image_id"].tolist())
        return tuple(self._text("id_names", row) for row in range(len(self)))

    def class_rows(
        self, names: Sequence[str], background: Container[str] = ()
    ) -> npt.NDArray[np.int64]:
        """Return the place of each category among class names, found by name: int64 (K,).

        Args:
            names: Of a vocabulary, row by row.
            background: Names that are in the vocabulary as background.

        Raises:
            DataError: a category is not among the names.
        """
        row_of = {name: row for row, name in enumerate(names)}
        missing = [c.name for c in self.categories if c.name.strip() not in row_of]
        hidden = [name for name in missing if name.strip() in background]
        if hidden:
            raise DataError(
                f"{self.source_name}: {counted(len(hidden), 'annotated category is', 'annotated categories are')} background in the vocabulary, which is not detected: {first_of([repr(name) for name in hidden])}",
                hint="evaluate with a vocabulary that has them as classes, or on annotations without them",
            )
        if missing:
            raise DataError(
                f"{self.source_name}: {counted(len(missing), 'category is', 'categories are')} not in the vocabulary: {first_of([repr(name) for name in missing])}",
                hint="name the class of each row of the embeddings by 'names' in the dataset config",
            )
        return np.array([row_of[c.name.strip()] for c in self.categories], dtype=np.int64)

    def trainable(self, base_K: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which annotations may be trained on: no crowds, of a base class, something of the box in the image.

        Args:
            base_K: bool, whether each category may be trained on.

        Returns:
            bool over all annotations.
        """
        box_A4 = self.column("box")
        usable: npt.NDArray[np.bool_] = base_K[self.column("category")] & ~self.column("crowd")
        return usable & (box_A4[:, 2:] > box_A4[:, :2]).all(axis=1)

    def require_trainable(self, base_K: npt.NDArray[np.bool_] | None = None) -> None:
        """Check that there is something to train on.

        Args:
            base_K: As of `trainable`; None: all categories.

        Raises:
            DataError: of no annotation, `trainable` is true.
        """
        base_K = np.ones(len(self.categories), dtype=np.bool_) if base_K is None else base_K
        if not self.trainable(base_K).any():
            novel = "" if base_K.all() else "novel classes, "
            fewer = ", or name fewer novel classes" if novel else ""
            raise DataError(
                f"{self.source_name} has no object to train on among its {self.report.annotations_kept} annotations: "
                f"{novel}crowds, and boxes without extent or outside their image, are left out",
                hint=f"correct the boxes{fewer}; count what is there with: proxydet data stats",
            )

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column over all annotations.

        ``image``, ``category``: rows; ``xywh``: float64 as the file says; ``box``: float32 xyxy clipped to the image;
        ``area``, ``crowd``, ``ignore``, ``annotation_id``, ``polygon_count``, ``rle_length``.
        """
        return self._columns[name]

    def file_name(self, index: int) -> str:
        """Return the path of an image below its root; empty where the file names none."""
        return self._text("names", index)

    def _text(self, column: str, index: int) -> str:
        start, end = self._columns[f"{column}_offsets"][index : index + 2]
        return bytes(self._columns[column][start:end]).decode("utf-8", "surrogatepass")

    def record(self, index: int) -> ImageRecord:
        """Return image ``index`` with its annotations."""
        start, end = (
            int(offset) for offset in self._columns["annotation_offsets"][index : index + 2]
        )
        height, width = (int(side) for side in self.sizes_I2[index])
        return ImageRecord(
            index=index,
            image_id=self.image_ids[index],
            file_name=self.file_name(index),
            height=height,
            width=width,
            boxes_A4=self._columns["box"][start:end],
            categories_A=self._columns["category"][start:end],
            crowd_A=self._columns["crowd"][start:end],
            first_annotation=start,
        )

    def labels(self, index: int, field: str) -> npt.NDArray[np.int32]:
        """Return the category rows of an image's list ``field``.

        Args:
            index: Row of the image.
            field: ``neg_category_ids``, ``not_exhaustive_category_ids`` or ``pos_category_ids``.
        """
        start, end = self._columns[f"{field}_offsets"][index : index + 2]
        labels: npt.NDArray[np.int32] = self._columns[field][start:end]
        return labels

    def label_pairs(self, field: str) -> npt.NDArray[np.int64]:
        """Return the (image row, category row) pairs of a list of all images: int64 (N, 2)."""
        images = np.repeat(np.arange(len(self)), np.diff(self._columns[f"{field}_offsets"]))
        return np.column_stack([images, self._columns[field]]).astype(np.int64)

    def without_list(self, field: str) -> list[Identifier]:
        """Return the ids of images that lack a list ``field`` (an empty list is one)."""
        lacking = np.flatnonzero(~self._columns[f"{field}_given"])
        return [self.image_ids[row] for row in lacking.tolist()]

    def polygons(self, annotation: int) -> list[npt.NDArray[np.float64]]:
        """Return the polygons of annotation row ``annotation``, each float64 (2n,) as x, y, x, y, ... in pixels."""
        first = int(self._columns["polygon_start"][annotation])
        count = int(self._columns["polygon_count"][annotation])
        ends = self._columns["point_offsets"][first : first + count + 1].tolist()
        return [self._columns["coordinates"][start:end] for start, end in itertools.pairwise(ends)]

    def rle(self, annotation: int) -> bytes:
        """Return the RLE counts of annotation row ``annotation`` (of its image's size); empty where it has none."""
        start = int(self._columns["rle_start"][annotation])
        return bytes(
            self._columns["rle"][start : start + int(self._columns["rle_length"][annotation])]
        )

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return how many images and how many annotations each category has, crowds included: int64 (C,) each."""
        classes = len(self.categories)
        category = self.column("category").astype(np.int64)
        pairs = np.unique(self.column("image").astype(np.int64) * classes + category)
        images = np.bincount(pairs % classes if classes else pairs, minlength=classes)
        return images, np.bincount(category, minlength=classes)

    def digest(self) -> str:
        """Return a digest of the annotation file's content, as in the store's name."""
        return hashlib.sha256(self.path.stem.encode()).hexdigest()

    def damaged_columns(self) -> list[str]:
        """Read the whole file and return the names of columns that changed since they were written."""
        return self._columns.damaged_columns()


def build_store(
    source: AnnotationSource | bytes, target: Path, *, name: str = "", progress: Progress = SILENT
) -> None:
    """Convert annotations.

    Args:
        source: The annotations, with their format, or the bytes of JSON.
        target: The store to write; moved into place when whole.
        name: What to call the annotations in messages; the file's name by default.
        progress: Where to show how far it is.

    Raises:
        DataError: the annotations cannot be read, or are refused.
    """
    path = None if isinstance(source, bytes) else source.annotations
    name = name or (str(path) if path is not None else "annotations")
    with no_garbage_collection(), ColumnWriter(target) as writer:
        report = StoreReport()
        if isinstance(source, bytes):
            document = coco.read(source, name, report)
        else:
            document = _read(source, report)
        builder = _Builder(document, report, writer, path, name)
        title = f"reading {PurePosixPath(name).name}"
        with progress.task(title, unit="annotations") as task:
            for chunk in document.annotations:
                builder.add(chunk, report.annotations_in)
                report.annotations_in += len(chunk)
                task.advance(len(chunk))
        builder.finish()


class _Builder:
    """Turns records into columns by the rules of `proxydet.data.records`.

    Annotations come chunk by chunk; polygon coordinates go to the file at once, the rest at the end.
    """

    def __init__(
        self,
        document: Document,
        report: StoreReport,
        writer: ColumnWriter,
        path: Path | None,
        name: str,
    ) -> None:
        self._format = document.format
        self._report = report
        report.record = document.record
        self._called = document.called
        self._writer = writer
        self._path = path
        self._name = name
        self._categories = self._read_categories(document.categories)
        self._row_of_category = {entry.id: row for row, entry in enumerate(self._categories)}
        self._dropped_images: set[Identifier | None] = set()
        self._dropped_names: list[str] = []
        self._images = self._read_images(document.images)
        self._row_of_image = {entry.id: row for row, entry in enumerate(self._images)}
        self._sizes = [(entry.height, entry.width) for entry in self._images]
        self._sizes_I2: npt.NDArray[np.int32] = np.array(self._sizes, np.int32).reshape(-1, 2)
        self._chunks: list[Column] = [np.empty(0, dtype=_ROW)]
        self._point_offsets = array("q", [0])
        self._rles = bytearray()
        self._masks_given = 0
        self._convention = BoxConvention(exact=True)
        writer.add("coordinates", np.empty(0, dtype=np.float64))

    def _refuse(self, key: str, examples: Sequence[object]) -> DataError:
        return refused(key, self._path, self._name, examples, self._report.record)

    # Categories and images.

    def _read_categories(self, entries: Sequence[CategoryEntry]) -> list[CategoryEntry]:
        """Check categories and return them in ascending order of their id, with LVIS's frequencies where some have them."""
        if len(entries) > MOST_CATEGORIES:
            raise self._refuse("file.categories", [])
        ids = Counter(entry.id for entry in entries)
        names = Counter(entry.name.strip() for entry in entries)
        faults: dict[str, list[Any]] = {
            "category.id.mixed": list(ids) if len({type(value) for value in ids}) > 1 else [],
            "category.id.repeated": [value for value, n in ids.items() if n > 1],
            "category.name.empty": [e.id for e in entries if not e.name.strip()],
            "category.name.repeated": [name for name, n in names.items() if n > 1],
        }
        for key, wrong in faults.items():
            if wrong:
                raise self._refuse(key, wrong)
        ordered = sorted(entries, key=lambda entry: entry.id)
        if any(entry.frequency is not None for entry in ordered):
            for row, entry in enumerate(ordered):
                if entry.frequency is None and entry.image_count is not None:
                    group = "rcf"[bisect_left(_FREQUENCY_LIMITS, entry.image_count)]
                    ordered[row] = msgspec.structs.replace(entry, frequency=group)
                    self._report.count("category.frequency", [entry.name])
        return ordered

    def _read_images(self, records: Sequence[ImageEntry | Unusable]) -> list[ImageEntry]:
        report = self._report
        kept: dict[Identifier, ImageEntry] = {}
        for entry in records:
            if isinstance(entry, Unusable):
                report.count(entry.deviation, [entry.which])
                self._dropped_images.update([entry.which, other_spelling(entry.which)])
                self._dropped_names += [entry.file_name] if entry.file_name else []
                continue
            if min(entry.width, entry.height) <= 0 or (
                entry.width * entry.height > masks.LARGEST_IMAGE
            ):
                report.count("image.size", [entry.id])
                self._dropped_images.add(entry.id)
                self._dropped_names += [name] if (name := image_name(entry)) else []
                continue
            before = kept.get(entry.id)
            if before is None:
                kept[entry.id] = entry
            elif (before.width, before.height, image_name(before)) == (
                entry.width, entry.height, image_name(entry)
            ):  # fmt: skip
                report.count("image.id.again", [entry.id])
            else:
                raise self._refuse("image.id.repeated", [entry.id])
        if len(by_kind := {type(value): value for value in kept}) > 1:
            raise self._refuse("image.id.mixed", [repr(value) for value in by_kind.values()])
        named: dict[str, ImageEntry] = {}
        for entry in kept.values():
            if not (file_name := image_name(entry)):
                report.count("image.name", [entry.id])
                continue
            place = posixpath.normpath(file_name.replace("\\", "/"))
            if (other := named.setdefault(place, entry)) is not entry:
                both = " and ".join(f"{e.id} ({image_name(e)!r})" for e in (other, entry))
                raise self._refuse("image.name.repeated", [both])
        report.images_in = len(records)
        report.images_kept = len(kept)
        return list(kept.values())

    def _write_images(self) -> dict[str, int]:
        """Write the columns of images; return how many images have each list of categories."""
        writer, entries = self._writer, self._images
        writer.add("size", self._sizes_I2)
        self._write_texts("names", [image_name(entry) for entry in entries])
        if entries and isinstance(entries[0].id, str):
            self._write_texts("id_names", [str(entry.id) for entry in entries])
        else:
            writer.add("image_id", np.array([entry.id for entry in entries], dtype=np.int64))
        given = {}
        for field in LABEL_LISTS:
            rows, lengths, unknown = [], [], []
            has_list = np.array([getattr(e, field) is not None for e in entries], dtype=np.bool_)
            for entry in entries:
                listed = getattr(entry, field) or ()
                known = [self._row_of_category[c] for c in listed if c in self._row_of_category]
                if len(known) < len(listed):
                    unknown.append(entry.id)
                rows.extend(known)
                lengths.append(len(known))
            writer.add(f"{field}_given", has_list)
            writer.add(f"{field}_offsets", _offsets(lengths))
            writer.add(field, np.array(rows, dtype=np.int32))
            self._report.count("image.list", unknown)
            given[field] = int(has_list.sum())
        return given

    def _write_texts(self, column: str, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._writer.add(f"{column}_offsets", _offsets([len(text) for text in encoded]))
        self._writer.add(column, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    # Annotations.

    def add(self, records: Sequence[AnnotationEntry | Unusable], start: int) -> None:
        """Check and collect a chunk of annotations; mend boxes and areas, and clip the boxes.

        Args:
            records: As a reader gave them.
            start: Position of the first of them in the file.
        """
        report = self._report
        coordinates = array("d")
        base, first_polygon = self._point_offsets[-1], len(self._point_offsets) - 1
        rows: list[tuple[Any, ...]] = []
        runs: list[tuple[int, dict[str, Any]]] = []
        with_mask: list[int] = []  # sound or damaged
        for position, entry in enumerate(records, start):
            if isinstance(entry, Unusable):
                report.count(entry.deviation, [entry.which])
                continue
            label = entry.id if entry.id is not None else f"position {position}"
            if self._called is not None and entry.id is not None:
                label = self._called(entry.id)
            image = self._row_of_image.get(entry.image_id)
            category = self._row_of_category.get(entry.category_id)
            if image is None and entry.image_id in self._dropped_images:
                report.count("annotation.image_id.dropped", [label])
                continue
            if image is None or category is None:
                field, known = "category_id", self._row_of_category
                if image is None:
                    field, known = "image_id", self._row_of_image
                value = getattr(entry, field)
                if other_spelling(value) in known:
                    raise self._refuse(
                        f"annotation.{field}.type", [f"{field} {value!r} of {label}"]
                    )
                report.count(f"annotation.{field}.unknown", [label])
                continue
            polygon = len(self._point_offsets) - 1
            if entry.segmentation:
                mask = masks.read(entry.segmentation, self._sizes[image])
                for key in mask.deviations:
                    report.count(key, [label])
                damaged = any(key in DAMAGED_MASK for key in mask.deviations)
                if mask.polygons or mask.counts or damaged:
                    with_mask.append(len(rows))
                if mask.counts:
                    runs.append((len(rows), {"size": self._sizes[image], "counts": mask.counts}))
                for outline in mask.polygons:
                    coordinates.extend(outline)
                    self._point_offsets.append(base + len(coordinates))
            if entry.iscrowd not in (0, 1):
                report.count("annotation.iscrowd", [label])
            own_id = entry.id
            rows.append(
                (
                    own_id if isinstance(own_id, int) and -(2**63) < own_id < 2**63 else _NO_ID,
                    image,
                    category,
                    entry.bbox or (np.nan, np.nan, np.nan, np.nan),
                    np.nan if entry.area is None else entry.area,
                    entry.iscrowd != 0,
                    entry.ignore != 0,
                    polygon,
                    len(self._point_offsets) - 1 - polygon,
                    0,
                    0,
                    (0, 0, 0, 0),
                    label,
                )
            )
        self._writer.add("coordinates", np.frombuffer(coordinates, dtype=np.float64))
        if not rows:
            return
        chunk = np.array(rows, dtype=_ROW)
        labels = chunk["label"]
        xywh = np.where(np.abs(chunk["xywh"]) < masks.LARGEST_NUMBER, chunk["xywh"], np.nan)
        finite = np.all(np.isfinite(xywh), axis=1) & np.all(xywh[:, 2:] >= 0, axis=1)
        extended = finite & np.all(xywh[:, 2:] > 0, axis=1)
        extent = np.full_like(xywh, np.nan)  # of the masks, where it is needed
        for (row, rle), sound in zip(runs, masks.measure([r for _, r in runs])[1], strict=True):
            if not sound:
                report.count("annotation.rle.counts", [labels[row]])
                continue
            chunk["rle_start"][row], chunk["rle_length"][row] = len(self._rles), len(rle["counts"])
            self._rles += rle["counts"]
            if not extended[row] or row < self._convention.compares:
                extent[row] = coco_mask.toBbox(rle)
        outlined = np.flatnonzero(chunk["polygon_count"])
        if len(outlined) and (self._convention.compares or not extended.all()):
            offsets = np.array(self._point_offsets[first_polygon:]) - base
            starts = offsets[chunk["polygon_start"][outlined] - first_polygon] // 2
            points_P2 = np.frombuffer(coordinates, dtype=np.float64).reshape(-1, 2)
            low = np.minimum.reduceat(points_P2, starts, axis=0)
            high = np.maximum.reduceat(points_P2, starts, axis=0)
            extent[outlined] = np.concatenate([low, high - low], axis=1)
        has_extent = np.all(extent[:, 2:] > 0, axis=1)
        self._convention.add(xywh, self._sizes_I2[chunk["image"]])
        compared = np.flatnonzero(has_extent & extended)[: self._convention.compares]
        self._convention.compare(xywh[compared], extent[compared])

        mended = has_extent & ~extended
        shown = np.where(mended[:, None], extent, xywh)
        xywh = np.where((mended & ~finite)[:, None], extent, xywh)
        kept = finite | mended
        shown[~kept] = 0
        corners = np.concatenate([shown[:, :2], shown[:, :2] + shown[:, 2:]], axis=1)
        size_wh = self._sizes_I2[chunk["image"]][:, ::-1]
        clipped = np.clip(corners, 0, np.tile(size_wh, 2)).astype(np.float32)
        inside: npt.NDArray[np.bool_] = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        clipped[~inside] = 0
        moved = (np.abs(clipped - corners) >= _CLIP_COUNTED_FROM).any(axis=1)
        has_extent = np.all(shown[:, 2:] > 0, axis=1)
        area = chunk["area"]
        no_area = ~((area >= 0) & (area < masks.LARGEST_NUMBER**2))
        area = np.where(no_area, xywh[:, 2:].prod(axis=1), area)
        for key, found in {
            "annotation.bbox": ~kept,
            "annotation.bbox.mask": mended,
            "annotation.bbox.extent": kept & ~has_extent,
            "annotation.bbox.outside": kept & has_extent & ~inside,
            "annotation.bbox.clipped": inside & moved,
            "annotation.area": kept & no_area,
            "annotation.area.large": inside & (area > 1.02 * shown[:, 2:].prod(axis=1) + 4),
        }.items():
            report.count(key, labels[found])
        chunk["xywh"], chunk["area"], chunk["box"] = xywh, area, clipped
        self._chunks.append(chunk[kept])
        self._masks_given += int(np.count_nonzero(kept[with_mask]))

    def finish(self) -> None:
        """Write all columns but ``coordinates``, and the footer; annotations sorted by image (in the file's order within one)."""
        columns = np.concatenate(self._chunks)
        labels = columns["label"]
        if deviation := self._convention.deviation():
            raise self._refuse(deviation[0], [deviation[1], *labels[:3]])
        root = self._take_root(columns)
        ids = columns["annotation_id"]
        again = np.ones(len(ids), dtype=np.bool_)
        again[np.unique(ids, return_index=True)[1]] = False
        again |= ids == _NO_ID
        if again.any():
            self._report.count("annotation.id", labels[again])
            free = np.setdiff1d(np.arange(1, 2 * len(ids) + 1), ids[~again])
            ids[again] = free[: np.count_nonzero(again)]
        order = np.argsort(columns["image"], kind="stable")
        for name in _ROW.names[:-1]:  # type: ignore[index]
            self._writer.add(name, columns[name][order])
        counts = np.bincount(columns["image"], minlength=len(self._images))
        self._writer.add("annotation_offsets", _offsets(counts))
        self._writer.add("point_offsets", np.frombuffer(self._point_offsets, dtype=np.int64))
        self._writer.add("rle", np.frombuffer(self._rles, dtype=np.uint8))
        report = self._report
        masked = (columns["polygon_count"] > 0) | (columns["rle_length"] > 0)
        report.annotations_kept = len(order)
        report.without_mask = int(np.count_nonzero(~masked))
        report.crowds = int(np.count_nonzero(columns["crowd"]))
        if 2 * self._masks_given > len(order) and not masked.any():
            damaged = [key for key in report.counts if key in DAMAGED_MASK]
            examples = [
                line_of(key, report.counts[key], report.examples[key], report.record)
                for key in damaged
            ]
            raise self._refuse("file.masks", examples)
        if _MOST_CROWDS * len(order) < report.crowds < len(order):
            report.count("annotation.crowds", labels[columns["crowd"]])
        lists = self._write_images()
        source = self._name if self._path is None else self._path.name
        gone = [i for i in self._dropped_images - self._row_of_image.keys() if i is not None]
        meta = _Meta(
            self._format, self._categories, root, lists, report, source, gone, self._dropped_names
        )
        self._writer.finish(kind=STORE_KIND, version=STORE_VERSION, meta=meta)

    def _take_root(self, columns: Column) -> CategoryEntry | None:
        """Take out a category without objects that is the supercategory of all others, which Roboflow writes."""
        others = len(self._categories) - 1
        used = np.bincount(columns["category"], minlength=others + 1)
        above = Counter((entry.supercategory or "").strip() for entry in self._categories)
        for row, entry in enumerate(self._categories):
            no_class = entry.supercategory in (None, "", "none", "None") and not used[row]
            if no_class and others and above[entry.name.strip()] == others:
                columns["category"] -= (columns["category"] > row).astype(np.int32)
                del self._categories[row]
                self._row_of_category = {c.id: r for r, c in enumerate(self._categories)}
                self._report.count("category.root", [entry.name])
                return entry
        return None


def _offsets(lengths: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
