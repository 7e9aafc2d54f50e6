"""An index on disk: boxes, proposal scores and region embeddings of many images, in parts that are opened by memory map.

An index is a folder::

    index.json                  what made it, and its parts with sizes and SHA-256; replaced whole at each commit
    vocabulary.npz              the classes of the detector's training
    text_encoder.json           its text encoder, where that is not CLIP
    parts/SHA256.safetensors    regions of some images; never changed once written
    adding/                     the job that embeds images (`proxydet.index.build`), until its parts are those of the index

What index.json names is in the index; a part that was written and not named yet, as before a power cut, is removed by the
next writer. *Exact* indexes hold float32 embeddings of all steps and branches and of all regions: what is found in them is
what the detector finds. *Compact* ones hold the best few regions by their proposal scores, the mean of the steps as int8 with an offset and a scale
for each dimension of a part, and boxes to 1/65535 of the image. Nothing here loads torch.

Dimensions: B images of a part, N their regions, D embedding.
"""

from __future__ import annotations

import copy
import ctypes
import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet._version import __version__
from proxydet.config import from_mapping
from proxydet.errors import (
    ConfigError,
    DataError,
    InputError,
    MissingDependencyError,
    RuntimeEnvironmentError,
)
from proxydet.files import Lock, read_json, sha256, staged, sweep, write_errors, write_json
from proxydet.inference.sources import SourceImage, file_state
from proxydet.modeling.config import InferenceConfig
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.inference.sharded import Job

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]
Integers = npt.NDArray[np.int64]

COMPACT_REGIONS = 30
"""Regions that a compact index keeps of an image, where nothing else is asked for."""
ADDING = "adding"
"""Folder of the job that adds images."""

_FORMAT = "proxydet region index 1"
_NAME = "index.json"
_OF_INDEX = frozenset({"vocabulary.npz", "text_encoder.json", "parts", ADDING})
_COPIES_AT_ONCE = 50_000
_DTYPES = {
    "F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8,
    "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
_DAMAGED = "put the file back; or drop what is damaged with: proxydet index remove INDEX --damaged, and index its images again"


# --- What is kept ------------------------------------------------------------------------------------------------------


class IndexedDetector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The detector that an index was made with: what a search needs of it.

    Two indexes can be merged, and images added to one, where all of this is equal.
    """

    weights: str
    """SHA-256 of its weights."""
    vocabulary: str
    """SHA-256 of the classes of its training."""
    dimension: int
    """D."""
    classifiers: tuple[tuple[float, float], ...]
    """Temperature and bias of each stored embedding's classifier."""
    mixup: bool
    """Whether the last one is that of the mixup branch."""
    sides: tuple[int, int]
    """The shortest and the longest side, in pixels, that images were scaled to."""
    most_regions: int | None
    """Regions kept of an image of a compact index; None: an exact index."""
    settings: dict[str, Any]
    """Fusion weights, NMS and number format: its `InferenceConfig`."""

    @property
    def inference(self) -> InferenceConfig:
        """Thresholds, fusion weights and limits of the detector."""
        return from_mapping(InferenceConfig, self.settings, "inference")

    def require_equal(self, other: IndexedDetector, path: Path) -> None:
        """Refuse what another detector made.

        Args:
            other: Of what is to be added.
            path: The index, for the message.

        Raises:
            DataError: They differ.
        """
        # Settings that came after an index count as their defaults.
        mine, theirs = (
            {**msgspec.to_builtins(detector), "settings": detector.inference}
            for detector in (self, other)
        )
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            names = {"most_regions": "--compact or --regions", "settings": "inference settings"}
            shown = ", ".join(names.get(key, key) for key in differing)
            raise DataError(
                f"{path} was made with other {shown}",
                hint="use the detector and the mode that made it (proxydet index info), or write another index with -o",
                path=path,
            )


# --- Parts -------------------------------------------------------------------------------------------------------------


class PartRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What index.json says of a part."""

    sha256: str
    bytes: int
    images: int
    """B, those that were dropped among them."""
    regions: int
    """N, likewise."""
    dropped: tuple[int, ...] = ()
    """Images that are not in the index any more: removed, or replaced by what another part holds of them."""


class Part:
    """A part of an index, opened by memory map when it is first read.

    Args:
        path: The file.
        record: What index.json says of it.
        detector: Whose regions these are.
    """

    def __init__(self, path: Path, record: PartRecord, detector: IndexedDetector) -> None:
        self.path = path
        self.record = record
        self.detector = detector

    @cached_property
    def arrays(self) -> Arrays:
        """Its arrays by name; values lie in the file until they are read.

        Raises:
            DataError: The file is absent, or changed since it was written.
            RuntimeEnvironmentError: It cannot be opened or read now, which says nothing about what is in it.
        """
        from safetensors import SafetensorError, safe_open

        images, regions = self.record.images, self.record.regions
        expected: dict[str, tuple[tuple[int, ...], Any]] = {
            "ends": ((images,), np.int64),
            "path_ends": ((images,), np.int64),
            "files": ((images, 2), np.int64),
            "digests": ((images, 32), np.uint8),
            "sizes": ((images, 4), np.int32),
            "boxes": ((regions, 4), None),
            "proposals": ((regions,), None),
        }
        for number in range(len(self.detector.classifiers)):
            expected[f"embeddings_{number}"] = (regions, self.detector.dimension), None
        later = {"tars": ((images, 2), np.int64), "keys": ((images,), np.int64)}
        try:
            size = self.path.stat().st_size
            if size != self.record.bytes:
                raise ValueError(f"it has {size} bytes, not {self.record.bytes}")
            with safe_open(self.path, framework="numpy"):  # checks the header: all lies in the file
                pass
            data = _mapped(self.path, size)
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            arrays: Arrays = {}
            for name, entry in json.loads(data[8:start].tobytes()).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    values = data[start + first : start + last].view(_DTYPES[entry["dtype"]])
                    arrays[name] = values.reshape(entry["shape"])
            expected |= {name: later[name] for name in later.keys() & arrays.keys()}
            for name, (shape, dtype) in expected.items():
                if arrays[name].shape != shape or dtype not in (None, arrays[name].dtype):
                    raise ValueError(f"its {name} are {arrays[name].dtype} {arrays[name].shape}")
            for ends, last in (
                (arrays["ends"], regions),
                (arrays["path_ends"], len(arrays["paths"])),
            ):
                if images and (int(ends[-1]) != last or (np.diff(ends) < 0).any() or ends[0] < 0):
                    raise ValueError("its images overlap")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOENT:
                raise _unreadable(self.path, error) from error
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{self.path} is not the part that the index lists: {reason}",
                hint=_DAMAGED,
                path=self.path,
            ) from error
        return arrays

    @cached_property
    def starts_B(self) -> Integers:
        """The first region of each image, and behind the last image the number of regions: int64 (B + 1,)."""
        return np.concatenate([[0], self.arrays["ends"]]).astype(np.int64)

    @cached_property
    def kept_B(self) -> npt.NDArray[np.bool_]:
        """Whether each image is in the index."""
        kept_B = np.ones(self.record.images, dtype=np.bool_)
        kept_B[list(self.record.dropped)] = False
        return kept_B

    @property
    def keys(self) -> Integers:
        """Keys of the paths of all images: int64 (B,)."""
        if "keys" in self.arrays:
            return self.arrays["keys"]
        return paths_of([self._encoded_path(row) for row in range(self.record.images)])["keys"]

    def path_of(self, row: int) -> str:
        """Return the path of an image."""
        return self._encoded_path(row).decode("utf-8", "surrogateescape")

    def _encoded_path(self, row: int) -> bytes:
        ends_B = self.arrays["path_ends"]
        start = int(ends_B[row - 1]) if row else 0
        return self.arrays["paths"][start : int(ends_B[row])].tobytes()

    def state_of(self, row: int) -> tuple[int, int]:
        """Return bytes and time of change of an image's file when it was indexed; `proxydet.index.build.ImageRegions.file`."""
        size, changed = self.arrays["files"][row].tolist()
        return size, changed

    def digest_of(self, row: int) -> bytes:
        """Return the SHA-256 of an image's file."""
        return bytes(self.arrays["digests"][row])

    def source_of(self, row: int) -> SourceImage:
        """Return an image as what can be read: a file, an object of a store, or a member of a tar in either."""
        length, offset = self.arrays["tars"][row].tolist() if "tars" in self.arrays else (0, 0)
        if length <= 0:
            return SourceImage(self.path_of(row))
        size, changed = self.state_of(row)
        tar = self._encoded_path(row)[:length].decode("utf-8", "surrogateescape")
        stamp = str(changed) if changed > 0 else ""
        return SourceImage(self.path_of(row), max(size, 0), stamp, tar, offset)

    def subset(self, rows: Integers) -> Arrays:
        """Return the arrays of a part that holds some of the images, in that order, values as they are."""
        starts, lengths = self.starts_B[rows], self.starts_B[rows + 1] - self.starts_B[rows]
        first = np.cumsum(lengths) - lengths
        regions = np.repeat(starts - first, lengths) + np.arange(lengths.sum())
        chosen: Arrays = {"ends": np.cumsum(lengths)}
        for name, values in self.arrays.items():
            if name in ("files", "digests", "sizes", "tars"):
                chosen[name] = values[rows]
            elif name in ("boxes", "proposals") or name.startswith("embeddings_"):
                chosen[name] = values[regions]
            elif name.startswith(("scale_", "offset_")):
                chosen[name] = values
        return chosen | paths_of([self._encoded_path(row) for row in rows.tolist()])


def _mapped(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Map a file into memory; what is written to the array stays out of the file.

    `mmap.mmap` keeps a file descriptor of each map (before Python 3.13), and a process may have 1,024 or even 256 of them: fewer
    than a large index has parts. So it is the C library's own that maps, where there is one.
    """
    if sys.platform == "win32":
        return np.asarray(np.memmap(path, np.uint8, "c"))
    library = ctypes.CDLL(None, use_errno=True)
    pointer, length, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = (pointer, length, number, number, number, ctypes.c_long)
    library.mmap.restype = pointer
    library.munmap.argtypes = (pointer, length)
    with path.open("rb") as file:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = library.mmap(None, size, access, mmap.MAP_PRIVATE, file.fileno(), 0)
    if address in (None, pointer(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    held = (ctypes.c_uint8 * size).from_address(address)
    # At the end of the process the system unmaps, when no thread reads it any more.
    weakref.finalize(held, library.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(held), np.uint8)


def _unreadable(path: Path, error: OSError) -> RuntimeEnvironmentError:
    # safetensors calls all that cannot be opened absent.
    reason = error.strerror or "it cannot be opened now"
    return RuntimeEnvironmentError(
        f"{path} cannot be read: {reason}",
        hint="check that you may read it, and how many files may be open (ulimit -n); a file that no disk gives back: "
        "delete it, and run: proxydet index remove INDEX --damaged",
        path=path,
    )


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _key(path: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(path, digest_size=7).digest(), "little")


def paths_of(paths: Iterable[str | bytes]) -> Arrays:
    """Return the arrays of a part that name its images."""
    encoded = [_encoded(path) if isinstance(path, str) else path for path in paths]
    return {
        "paths": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "path_ends": np.cumsum([len(path) for path in encoded], dtype=np.int64),
        "keys": np.array([_key(path) for path in encoded], dtype=np.int64),
    }


def packed_part(arrays: Mapping[str, npt.NDArray[Any]], **notes: str) -> bytes:
    """Return the file of a part: arrays, and texts next to them."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    return save(contiguous, metadata=notes or None)


def write_part(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> PartRecord:
    """Write a part under the name of its SHA-256, whole or not at all; `IndexWriter.commit` puts it into the index.

    Args:
        folder: The index.
        arrays: As `proxydet.index.build.part_of` returns them.

    Raises:
        DiskFullError: There is no room.
        RuntimeEnvironmentError: It cannot be written.
    """
    content = packed_part(arrays)
    digest = hashlib.sha256(content).hexdigest()
    target = folder / "parts" / f"{digest}.safetensors"
    with staged(target) as temporary, write_errors(target):
        temporary.write_bytes(content)
    return PartRecord(
        sha256=digest,
        bytes=len(content),
        images=len(arrays["sizes"]),
        regions=len(arrays["proposals"]),
    )


# --- The whole ---------------------------------------------------------------------------------------------------------


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    version: str
    detector: IndexedDetector
    parts: tuple[PartRecord, ...]
    request: str = ""
    sha256: str = ""

    def digest(self) -> str:
        content = {**msgspec.to_builtins(self), "sha256": ""}
        if not self.request:
            del content["request"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class StoredIndex:
    """An index on disk, as it was when it was opened.

    Attributes:
        path: Its folder.
        detector: What made it.
        request: What named the detector and its settings when the index was made; empty: not known.
        parts: Its parts.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an index; parts are opened when they are read.

        Raises:
            DataError: There is none, or it is damaged or of another version.
        """
        self.path = Path(path)
        file = self.path / _NAME
        if not file.is_file():
            raise DataError(
                f"{self.path} is not an index: there is no {file}"
                if self.path.exists()
                else f"there is no index {self.path}",
                hint="make one with: proxydet index FOLDER -o photos.index",
                path=self.path,
            )
        hint = "put the file back, or index the images again with another -o"
        content = read_json(file, what="index", hint=hint, error=DataError)
        if content.get("format") != _FORMAT:
            raise DataError(
                f"{file} is of the format {str(content.get('format'))[:80]!r}, not {_FORMAT!r}",
                hint="read it with the version of proxydet that wrote it, or index the images again",
                path=file,
            )
        try:
            manifest = msgspec.convert(content, _Manifest)
            # What was not changed by anybody is equal to what is read of it.
            if manifest.digest() != manifest.sha256:
                raise ValueError("SHA-256 mismatch: it changed after it was written")
            _ = manifest.detector.inference
        except (msgspec.ValidationError, ValueError, ConfigError) as error:
            raise DataError(f"{file} is damaged: {error}", hint=hint, path=file) from error
        self.detector = manifest.detector
        self.request = manifest.request
        self.parts: list[Part] = self.of_parts(manifest.parts).parts

    def of_parts(self, records: Iterable[PartRecord]) -> StoredIndex:
        """Return the index as it would be with other parts."""
        other = copy.copy(self)
        for name in ("firsts", "_keys", "_sizes"):
            other.__dict__.pop(name, None)
        other.parts = [
            Part(self.path / "parts" / f"{record.sha256}.safetensors", record, self.detector)
            for record in records
        ]
        return other

    @property
    def images(self) -> int:
        """Images in the index."""
        return sum(part.record.images - len(part.record.dropped) for part in self.parts)

    @property
    def regions(self) -> int:
        """Regions in the parts, those of dropped images among them."""
        return sum(part.record.regions for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.record.bytes for part in self.parts)

    @property
    def tree(self) -> str:
        """What the file for approximate search of these parts is called; its own SHA-256 comes behind."""
        parts = "".join(part.record.sha256 for part in self.parts)
        return f"approximate-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"

    def require_tree(self) -> Path:
        """Return the file for approximate search.

        Raises:
            DataError: There is none of these parts.
        """
        file = next(self.path.glob(f"{self.tree}-*.faiss"), None)
        if file is None:
            raise DataError(
                f"{self.path} has no approximate search, or had it before images were added or removed",
                hint=f"build it with: proxydet index approximate {self.path}; or leave --approximate out",
                path=self.path,
            )
        return file

    def rows(self) -> Iterator[tuple[Part, int]]:
        """Yield the part and the row of each image."""
        for part in self.parts:
            for row in np.flatnonzero(part.kept_B).tolist():
                yield part, row

    def find(self, path: str) -> tuple[Part, int] | None:
        """Return the part and the row of an image, by the path that it was indexed under; None: it is not in the index."""
        for place in self._found(self._keys, _key(_encoded(path))):
            part, row = self.at(place)
            if part.path_of(row) == path:
                return part, row
        return None

    def find_copy(self, path: str, size: int) -> int | None:
        """Return the place of an image whose file has the content of another; None: there is none."""
        digest: bytes | None = None
        for place in self._found(self._sizes, size):
            if digest is None:
                try:
                    digest = bytes.fromhex(sha256(Path(path)))
                except OSError:
                    return None
            part, row = self.at(place)
            if part.digest_of(row) == digest:
                return place
        return None

    def _found(self, table: tuple[Integers, Integers], value: int) -> Iterator[int]:
        """Yield the place of each image in the index that has a value in a table."""
        values, places = table
        for place in places[slice(*np.searchsorted(values, [value, value + 1]))].tolist():
            part, row = self.at(place)
            if part.kept_B[row]:
                yield place

    def at(self, place: int) -> tuple[Part, int]:
        """Return the part and the row of a place, which counts the images of all parts."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        return self.parts[number], place - int(self.firsts[number])

    @cached_property
    def firsts(self) -> Integers:
        """The place of the first image of each part, and behind the last the number of places."""
        return np.cumsum([0, *(part.record.images for part in self.parts)], dtype=np.int64)

    @cached_property
    def _keys(self) -> tuple[Integers, Integers]:
        return _sorted([part.keys for part in self.parts])

    @cached_property
    def _sizes(self) -> tuple[Integers, Integers]:
        return _sorted([part.arrays["files"][:, 0] for part in self.parts])

    def replaced(self) -> Iterator[tuple[Part, int]]:
        """Yield images of which a later part holds another state, under the same path."""
        keys, places = self._keys
        kept = np.concatenate([part.kept_B for part in self.parts])[places]
        keys, places = keys[kept], places[kept]
        for first in np.flatnonzero(keys[1:] == keys[:-1]).tolist():
            (part, row), later = map(self.at, places[first : first + 2].tolist())
            if part.path_of(row) == later[0].path_of(later[1]):
                yield part, row

    def damaged(
        self, *, whole: bool = False, progress: Callable[[int], object] | None = None
    ) -> dict[Part, str]:
        """Return the parts that changed after they were written, and what is wrong with each.

        Args:
            whole: Compare their digests and read all values; else their sizes.
            progress: Called with the bytes read.

        Raises:
            RuntimeEnvironmentError: A part cannot be opened or read now; that is not damage.
        """
        sizes: dict[str, int] = {}
        try:
            with os.scandir(self.path / "parts") as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries}
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unreadable(self.path / "parts", error) from error
        wrong = {}
        for part in self.parts:
            size = sizes.get(part.path.name)
            if size is None:
                wrong[part] = f"there is no part {part.path}"
            elif size != part.record.bytes:
                wrong[part] = f"{part.path} has {size} bytes, not {part.record.bytes}"
            elif whole:
                try:
                    if sha256(part.path, progress) != part.record.sha256:
                        wrong[part] = (
                            f"{part.path}: SHA-256 mismatch: it changed after it was written"
                        )
                    elif not all(np.isfinite(values).all() for values in part.arrays.values()):
                        wrong[part] = f"{part.path} holds values that are not finite"
                except FileNotFoundError:
                    wrong[part] = f"there is no part {part.path}"
                except OSError as error:
                    raise _unreadable(part.path, error) from error
                except DataError as error:
                    wrong[part] = error.message
        return wrong

    def require_whole(self) -> None:
        """Compare the sizes of all parts.

        Raises:
            DataError: One is absent or has another size.
        """
        if wrong := self.damaged():
            first, more = next(iter(wrong.values())), f" (and {len(wrong) - 1} more)"
            raise DataError(
                first + more * (len(wrong) > 1),
                hint=_DAMAGED.replace("INDEX", str(self.path)),
                path=self.path,
            )

    def verify(
        self, *, images: bool = False, progress: Callable[[int], object] | None = None
    ) -> list[str]:
        """Read everything, and return what is wrong, in sentences.

        Args:
            images: Whether the image files are compared too: whether they are there, and as large and as old as when they
                were indexed.
            progress: Called with the bytes read of parts.
        """
        wrong = []
        try:
            vocabulary, _ = read_words(self.path)
            if vocabulary.digest != self.detector.vocabulary:
                wrong.append(
                    f"{self.path / 'vocabulary.npz'}: SHA-256 mismatch: it changed after it was written"
                )
        except InputError as error:
            wrong.append(error.message)
        damaged = self.damaged(whole=True, progress=progress)
        wrong += damaged.values()
        for part, row in self.rows() if images else ():
            if part in damaged:
                continue
            path = part.path_of(row)
            state = file_state(path)
            if is_gone(path):
                wrong.append(f"{path}: there is no such file any more")
            elif state and state != part.state_of(row):
                wrong.append(f"{path}: changed since it was indexed")
        wrong += [
            f"{tree}: SHA-256 mismatch: it changed after it was written; build it again with: proxydet index approximate"
            for tree in self.path.glob("approximate-*.faiss")
            if not tree.stem.endswith(sha256(tree)[:16])
        ]
        named = {part.path.name for part in self.parts}
        strays = [file for file in (self.path / "parts").glob("*") if file.name not in named]
        wrong += [
            f"{file}: not in the index; the next proxydet index removes it" for file in strays
        ]
        return wrong


def _sorted(columns: Sequence[npt.NDArray[Any]]) -> tuple[Integers, Integers]:
    """Return the values of all images in order, and the place of each."""
    values = np.concatenate([np.zeros(0, np.int64), *columns])
    order = np.argsort(values, kind="stable")
    return values[order], order


def is_gone(path: str) -> bool:
    """Whether an image of an index is not there any more; of what is in a store that is not known, of a tar's member the tar counts."""
    places = () if "://" in path else (Path(path), *Path(path).parents)
    return bool(places) and not places[0].exists() and not any(place.is_file() for place in places)


def read_words(path: Path) -> tuple[Vocabulary, CompositionalEncoder | None]:
    """Return the classes of the training that an index keeps, and its text encoder; None: CLIP.

    Raises:
        VocabularyError: A file is absent or damaged.
    """
    encoder = path / "text_encoder.json"
    own = CompositionalEncoder.load(encoder) if encoder.is_file() else None
    return Vocabulary.load(path / "vocabulary.npz"), own


def require_faiss() -> ModuleType:
    """Import FAISS.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"approximate search needs the package faiss-cpu, which cannot be imported: {error}",
            hint="run: pip install 'proxydet[index]' (or: pip install faiss-cpu)",
        ) from error
    module: ModuleType = faiss
    return module


def check_place(path: Path) -> bool:
    """Return whether there is an index in a folder.

    Raises:
        DataError: There is something else.
    """
    if (path / _NAME).is_file():
        return True
    there = {file.name for file in path.iterdir()} if path.is_dir() else set()
    # A writer that was killed at its beginning leaves some of these.
    strange = {name for name in there - _OF_INDEX if not name.startswith((".", "writer.lock"))}
    if strange or path.is_file():
        what = f"is a folder with other files ({min(strange)})" if strange else "is a file"
        raise DataError(
            f"{path} {what}, not an index", hint="give another folder with -o", path=path
        )
    return False


class IndexWriter:
    """Adds parts to an index and removes images; one at a time. Use it in a ``with`` statement.

    What was added and removed is in the index after `commit`, which comes by itself at the end, after an error or Ctrl-C too.

    Args:
        path: The folder of the index; made where it is not there.
        detector: What makes the regions; None: that of the index, which must be there.
        words: The classes of the training and the text encoder of a new index.
        request: What named the detector of a new index.
        wait: Wait where another process writes.

    Raises:
        DataError: The index is of another detector or damaged, or the folder holds something else.
        LockedError: Another process writes to it.
    """

    def __init__(
        self,
        path: Path,
        detector: IndexedDetector | None = None,
        words: tuple[Vocabulary, CompositionalEncoder | None] | None = None,
        *,
        request: str = "",
        wait: bool = False,
    ) -> None:
        self.path = path
        self._dropped: dict[str, set[int]] = {}
        self._lock = Lock(path / "writer.lock", subject=f"the index {path}")
        if not check_place(path) and (detector is None or words is None):
            StoredIndex(path)  # raises
        self._lock.acquire(wait=wait)
        try:
            if detector is not None and words is not None and not (path / _NAME).is_file():
                vocabulary, encoder = words
                vocabulary.save(path / "vocabulary.npz")
                if encoder is not None:
                    encoder.save(path / "text_encoder.json")
                self._write(detector, request, ())
            self.index = StoredIndex(path)
            if detector is not None:
                self.index.detector.require_equal(detector, path)
            sweep(path, sole_writer=True)
            sweep(path / "parts", sole_writer=True)
            self._remove_strays()
        except BaseException:
            self._lock.release()
            raise

    @property
    def images(self) -> int:
        """Images in the index when it is committed."""
        return self.index.images - sum(map(len, self._dropped.values()))

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or self._dropped:
                self.commit()
            if error is None:
                self._compact()
        finally:
            self._lock.release()

    def drop(self, part: Part, row: int) -> bool:
        """Remove an image, and return whether it was there."""
        gone = self._dropped.setdefault(part.record.sha256, set())
        there = bool(part.kept_B[row]) and row not in gone
        if there:
            gone.add(row)
        return there

    def remove(self, paths: Iterable[str]) -> int:
        """Remove images, and return how many were there."""
        found = (self.index.find(path) for path in paths)
        return sum(self.drop(*place) for place in found if place is not None)

    def remove_damaged(self) -> int:
        """Remove the images of damaged parts, and return how many there were."""
        damaged = self.index.damaged(whole=True)
        self._write(
            self.index.detector,
            self.index.request,
            [part.record for part in self.index.parts if part not in damaged],
        )
        self.index = StoredIndex(self.path)
        self._remove_strays()
        return sum(part.record.images - len(part.record.dropped) for part in damaged)

    def copy(self, copies: Iterable[tuple[Part, int, str, tuple[int, int]]]) -> None:
        """Add images whose content is in the index under another path; where nothing is there any more, they were moved.

        Args:
            copies: The part and row of what is there; and the path, bytes and time of change of the copy.
        """
        upcoming = iter(copies)
        while some := list(islice(upcoming, _COPIES_AT_ONCE)):
            by_part: dict[Part, list[tuple[int, str, tuple[int, int]]]] = {}
            for part, row, path, file in some:
                by_part.setdefault(part, []).append((row, path, file))
            written = []
            for part, own in by_part.items():
                rows, paths, files = zip(*own, strict=True)
                arrays = part.subset(np.array(rows)) | paths_of(paths)
                arrays["files"] = np.array(files, dtype=np.int64)
                arrays.pop("tars", None)
                written.append(write_part(self.path, arrays))
                self.remove(old for old in map(part.path_of, sorted(set(rows))) if is_gone(old))
            self.commit(written)

    def take(self, job: Job) -> None:
        """Put into the index what a job of `proxydet.index.build` has finished; its files stay where they are, too.

        Raises:
            DataError: A part of the index is damaged.
            DiskFullError: There is no room, where the file system has no hard links.
            RuntimeEnvironmentError: A file cannot be read or written.
        """
        from safetensors import SafetensorError, safe_open

        known = {part.record.sha256 for part in self.index.parts}
        written = []
        for number, record in sorted(job.finished().items()):
            if record.sha256 in known or not record.objects:
                continue
            file, target = job.file(number), self.path / "parts" / f"{record.sha256}.safetensors"
            try:
                with safe_open(file, framework="numpy") as opened:
                    images, regions = (
                        opened.get_slice(name).get_shape()[0] for name in ("sizes", "proposals")
                    )
            except SafetensorError:
                logger.warning("%s is damaged: its images are not added", file)
                continue
            except OSError as error:
                raise _unreadable(file, error) from error
            with write_errors(target):
                target.parent.mkdir(exist_ok=True)
                target.unlink(missing_ok=True)
                try:
                    os.link(file, target)
                except OSError:
                    with staged(target) as temporary:
                        shutil.copyfile(file, temporary)
            written.append(
                PartRecord(sha256=record.sha256, bytes=record.bytes, images=images, regions=regions)
            )
        self.commit(written)

    def merge(self, other: StoredIndex) -> tuple[int, int]:
        """Add the images of another index; of an image in both the one that was changed last is kept.

        Where that is not known, as of what is in a store, the other index's is kept.

        Returns:
            How many were added, and how many were there already.

        Raises:
            DataError: Another detector made it, or it is damaged.
        """
        self.index.detector.require_equal(other.detector, self.path)
        written, added, there = [], 0, 0
        mine = np.concatenate([np.zeros(0, np.int64), *(part.keys for part in self.index.parts)])
        for part in other.parts:
            kept_B = part.kept_B.copy()
            for row in np.flatnonzero(kept_B & np.isin(part.keys, mine)).tolist():
                found = self.index.find(part.path_of(row))
                if found is None:
                    continue
                changed, before = part.state_of(row)[1], found[0].state_of(found[1])[1]
                if (
                    changed <= before
                    if min(changed, before) > 0
                    else (part.digest_of(row) == found[0].digest_of(found[1]))
                ):
                    kept_B[row] = False
                    there += 1
            if kept_B.any():
                added += int(kept_B.sum())
                written.append(write_part(self.path, part.subset(np.flatnonzero(kept_B))))
        self.commit(written)
        return added, there

    def commit(self, parts: Sequence[PartRecord] = ()) -> None:
        """Put parts into the index, together with what was removed; of an image in several the last part's is kept.

        Args:
            parts: Parts whose files are there.

        Raises:
            DiskFullError: There is no room; what was committed before stays good.
        """
        if not parts and not any(self._dropped.values()):
            return
        fresh = {record.sha256: record for record in parts}
        records = {
            part.record.sha256: part.record
            for part in self.index.parts
            if part.record.sha256 not in fresh
        } | fresh
        dropped = {
            name: {*record.dropped, *(() if name in fresh else self._dropped.get(name, ()))}
            for name, record in records.items()
        }

        def named() -> list[PartRecord]:
            return [
                msgspec.structs.replace(record, dropped=tuple(sorted(dropped[name])))
                for name, record in records.items()
            ]

        if fresh and len(records) > 1:
            for part, row in self.index.of_parts(named()).replaced():
                dropped[part.record.sha256].add(row)
        self._write(self.index.detector, self.index.request, named())
        self._dropped.clear()
        self.index = StoredIndex(self.path)

    def _write(self, detector: IndexedDetector, request: str, parts: Iterable[PartRecord]) -> None:
        manifest = _Manifest(
            format=_FORMAT,
            version=__version__,
            detector=detector,
            request=request,
            parts=tuple(parts),
        )
        manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
        self._lock.check()
        write_json(self.path / _NAME, msgspec.to_builtins(manifest))

    def _compact(self) -> None:
        """Write parts that hold dropped images again without them."""
        if not any(part.record.dropped for part in self.index.parts):
            return
        records = []
        for part in self.index.parts:
            if not part.record.dropped:
                records.append(part.record)
            elif part.kept_B.any():
                records.append(write_part(self.path, part.subset(np.flatnonzero(part.kept_B))))
        self._write(self.index.detector, self.index.request, records)
        self.index = StoredIndex(self.path)
        self._remove_strays()

    def _remove_strays(self) -> None:
        self._lock.check()
        named = {part.path.name for part in self.index.parts}
        for file in (self.path / "parts").glob("*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)
