"""Weight files: one reader of what others wrote, one writer of ours.

Reads what ``torch.save`` writes (zip archives, and the format before them), pickles of numpy arrays (``.pkl``), TorchScript
archives, safetensors and ``.npz`` tables. No pickle is run: its instructions, as the standard library's `pickletools` lists
them, build plain values, and descriptions of tensors whose bytes are then read as numbers of a known type. What else a file
names (an optimizer's class, say) is passed over; what no weight file needs is refused. Sizes and counts are bounded by the
size of the file, and CRC-32 sums are compared. See docs/decisions/0009-weight-files.md.

What proxydet writes carries a SHA-256, which is computed again from what was read:

- training states and ``model_final.pth``: of their content, under the key ``sha256``;
- ``model_final.safetensors``: of metadata and tensors, in the metadata;
- exports (`seal`): of the whole file before the digest, at its end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import pickletools
import re
import shlex
import sys
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import CheckpointError, InputError, RuntimeEnvironmentError
from proxydet.files import (
    PLACEHOLDER_BYTES,
    BoundedReader,
    PlaceholderError,
    open_zip,
    refuse_placeholder,
    require_room,
    staged,
    unwritable,
    write_errors,
)
from proxydet.paths import list_checkpoints, models_folder

if TYPE_CHECKING:  # torch takes seconds to import; tables and the shapes in a download need none
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of training states and ``model_final.pth``. Version 0.1 wrote 1: without a digest, and counting iterations only."""
SAFETENSORS_FORMAT = 1
"""Of the metadata in ``model_final.safetensors``."""

_HINT = (
    "give a checkpoint of proxydet train or a published one; copy or download a damaged one again"
)
_NOT_READ = "it is not what torch.save, pickle or safetensors write"
_TOO_MANY = "its values are too many or too large for a weight file"
_NOT_DESCRIBED = "its tensors are not described as in a weight file"
_STRUCTURED = "its arrays are of a type with a structure of its own, which is refused"
_NOT_WRITTEN = "its content does not match its SHA-256: it changed after it was written"
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_HEX = 64  # characters of a SHA-256
# Room for what else a run writes between two checkpoints.
_DISK_MARGIN = 64 << 20
_CHUNK = 4 << 20
# Of a pickle in a zip archive, or in front of the numbers of torch's older format.
_LARGEST_PICKLE = 64 << 20
# What may be held in memory beyond a multiple of the file's size.
_SPARE = 64 << 20
_MOST_VALUES = 1_000_000
_VALUE = 64  # bytes that a copied reference and its key take at least
_MOST_DIMENSIONS = 32
_LONGEST_NAME = 1000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What a file may name without being refused; only the few names in `_call` mean anything.
_PACKAGES = frozenset(
    ["torch", "__torch__", "numpy", "collections", "_codecs", "builtins", "__builtin__", "copyreg", "copy_reg", "argparse",
     "fvcore", "detectron2", "omegaconf", "yacs"]
)  # fmt: skip
_BUILTINS = frozenset(
    ["set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "slice", "bytearray", "bytes", "object"]
)  # fmt: skip
# Number formats by the name of torch's storage class: torch's name of the type, bytes.
_STORAGES = {
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "ComplexFloatStorage": ("complex64", 8), "ComplexDoubleStorage": ("complex128", 16),
}  # fmt: skip
# Only these reach numpy: a dtype with fields or flags of its own could make it follow pointers from the file.
_NUMPY_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c8|c16)")
_KEYS = (str, int, bytes, bool, type(None))


@dataclass(frozen=True)
class _Storage:
    """The bytes of one or more tensors, somewhere in the file."""

    key: str
    dtype: str
    item: int
    """Bytes of a number."""
    count: int


@dataclass(frozen=True)
class _Described:
    """A tensor whose bytes are not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """What the file names; never looked up."""

    module: str
    name: str


@dataclass
class _Dtype:
    text: str


@dataclass
class _Array:
    """A numpy array; pickles state its values after they have named it."""

    values: npt.NDArray[Any] | None = None


class _Module(dict[str, Any]):
    """The attributes of a TorchScript module."""


class _Ignored:
    """An object of a class that weights do not need; takes any state."""


class _NotAllowedError(Exception):
    """The file names what no weight file needs."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_content(path: Path, *, tensors: bool = True, hint: str = _HINT) -> Any:
    """Return what a file holds as dicts, lists, tuples, plain values and tensors; other objects become None.

    Args:
        path: What ``torch.save`` or ``torch.jit.save`` wrote, or a pickle.
        tensors: False leaves the numbers of the tensors in the file, and puts None in place of the tensors.
        hint: What the user can do where it cannot be read.

    Raises:
        CheckpointError: It is absent, damaged, not such a file, names code, or is not what proxydet wrote.
        RuntimeEnvironmentError: The machine cannot read it: no permission, a disk that fails, too little memory.
    """
    with _errors(path, hint), _opened(path) as source:
        return source.content() if tensors else _map(source.described, lambda _: None)


def check_weight_file(path: Path) -> None:
    """Refuse what cannot be a weight file, by its beginning and its index, before torch is loaded to read it.

    Raises:
        CheckpointError: As `read_content`.
        RuntimeEnvironmentError: As `read_content`.
    """
    with _errors(path, _HINT):
        if not _is_safetensors(path):
            with _opened(path):
                pass


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model in a file, by name; the bytes are compared with their check sums.

    Raises:
        CheckpointError: As `read_content`; or there are no tensors.
    """
    with _errors(path, _HINT), _opened(path) as source:
        source.verify()
        return {name: tuple(found.shape) for name, found in _parameters(source.described, path)}


def read_state_dict(
    path: Path, *, parts: tuple[str, ...] = ("",), hint: str = _HINT
) -> dict[str, Tensor]:
    """Return the parameters in a weight file of any kind, by name.

    Args:
        path: ``.safetensors``, or what `read_content` reads; the kind is seen from the content. Containers (``model``,
            ``state_dict``, ``ema``, ...) and what wrappers put in front of the names (``module.``, ``model.``,
            ``_orig_mod.``) are taken off, however they are nested.
        parts: Starts of the names to read.
        hint: As of `read_content`.

    Raises:
        CheckpointError: As `read_content`; or there are no parameters.
    """
    with _errors(path, hint):
        if _is_safetensors(path):
            return dict(_parameters(read_safetensors(path, hint=hint)[0], path, parts))
        with _opened(path) as source:
            if _is_ours(source.described):
                return dict(_parameters(source.content(), path, parts))
            found = _parameters(source.described, path, parts)
            return {name: source.tensor(described) for name, described in found}


def read_safetensors(path: Path, *, hint: str = _HINT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file, and the metadata that `write_safetensors` stored with them (else empty).

    Args:
        path: The file.
        hint: As of `read_content`.

    Raises:
        CheckpointError: It is absent, damaged, or not what proxydet wrote.
    """
    from safetensors import safe_open

    with _errors(path, hint), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        text = file.metadata() or {}
        if not text.keys() & {"proxydet", "sha256"}:
            return tensors, {}
        # Damage to either name must not pass for a file that was never sealed.
        if text.get("sha256") != content_digest([text.get("proxydet"), tensors]):
            raise ValueError(_NOT_WRITTEN)
        metadata = json.loads(text["proxydet"])
        return tensors, metadata if isinstance(metadata, dict) else {}


def read_arrays(
    path: Path, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of numbers or text in an ``.npz`` file, once their sizes are known to be what it holds.

    Args:
        path: The file.
        names: What it must hold.
        optional: What is returned where it holds it.

    Raises:
        CheckpointError: As `read_content`; or an array is absent, or of Python objects.
    """
    hint = "write it again with numpy.savez"
    with _errors(path, hint, "an .npz archive"), _open_zip(path) as archive:
        there = set(archive.namelist())
        wanted = [*names, *(name for name in optional if f"{name}.npy" in there)]
        return {name: _read_array(archive.open(_entry(archive, f"{name}.npy"))) for name in wanted}


def _read_array(file: Any) -> npt.NDArray[Any]:
    data = file.read()
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("it is not an array of numbers or text")
    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, fortran, dtype = read_header(stream)
    if dtype.kind not in "biufcU" or dtype.hasobject or dtype.fields is not None:
        raise ValueError(f"it holds {dtype.name}, not numbers or text")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError("its size is not that of its content")
    array: npt.NDArray[Any] = np.frombuffer(data, dtype, offset=stream.tell())
    if dtype.kind == "U":  # numpy makes a SystemError of what is not a character
        points = array.view(np.dtype("u4").newbyteorder(dtype.byteorder))
        if (points > sys.maxunicode).any():
            raise ValueError("its text contains an invalid character")
    return np.asarray(array.reshape(shape, order="F" if fortran else "C"))


@contextlib.contextmanager
def _errors(path: Path, hint: str, kind: str = "a weight file") -> Iterator[None]:
    """Turn what damage makes readers raise into CheckpointError, and what the machine raises into RuntimeEnvironmentError."""
    try:
        if not path.is_file():
            name = None
            with contextlib.suppress(InputError):  # of a damaged catalogue
                # It reads YAML, which running an ONNX file does without.
                from proxydet.artifacts import Catalogue

                name = None if path.exists() else Catalogue.load().name_of_source(path)
            fetched = path.absolute().is_relative_to(models_folder().absolute())
            where = "check its path; a run's are in RUN/checkpoints, published ones come with proxydet download"
            raise CheckpointError(
                f"the weight file {path} {'is not a file' if path.exists() else 'does not exist'}",
                hint=f"get it with: proxydet download {name}" if name else where,
                path=path,
                needs=(name,) if name and fetched else (),
            )
        with path.open("rb") as file:
            refuse_placeholder(file.read(PLACEHOLDER_BYTES))
        yield
    except (CheckpointError, RuntimeEnvironmentError):
        raise
    except PlaceholderError as error:
        message = f"{path} is not {kind}: {error.what}"
        raise CheckpointError(message, hint=error.remedy, path=path) from error
    except _NotAllowedError as error:
        raise CheckpointError(
            f"{path} holds more than weights, and loading it could run code ({error})",
            hint="take the file from its publisher, or save its state dict alone with torch.save",
            path=path,
        ) from error
    # Damage makes zipfile, pickletools, torch and safetensors raise of every kind.
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")[:300]
        senseless = (LookupError, TypeError, AttributeError, RecursionError)
        if isinstance(error, OSError) and error.errno in _UNREADABLE:
            raise RuntimeEnvironmentError(
                f"{path} cannot be read: {error.strerror}",
                hint="check that you may read it, and the disk that it lies on",
                path=path,
            ) from error
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # of torch
            raise RuntimeEnvironmentError(
                f"there is not enough memory to read {path}",
                hint="end other programs, or use a machine with more memory",
                path=path,
            ) from error
        if isinstance(error, senseless) or not reason:
            reason = "its content makes no sense"
        message = f"{path} is damaged, or not {kind}: {reason}"
        raise CheckpointError(message, hint=_remedy(path, hint), path=path) from error


def _remedy(path: Path, hint: str) -> str:
    """Name the weights to use instead, where the file lies in a run folder that has others which can be read."""
    if hint != _HINT or not path.name.startswith(("model_final.", "model_best.")):
        return hint
    checkpoints = [other for _, other in list_checkpoints(path.parent / "checkpoints")]
    for other in (*path.parent.glob("model_final.*"), *reversed(checkpoints)):
        if other != path:
            with contextlib.suppress(CheckpointError, RuntimeEnvironmentError):
                read_state_dict(other, hint="")
                return f"copy it again from where it is whole, or use other weights of the run: --weights {shlex.quote(str(other))}"
    return hint


def _open_zip(path: Path) -> contextlib.AbstractContextManager[zipfile.ZipFile]:
    return open_zip(path, largest=_LARGEST_PICKLE, times=4)


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    found = archive.NameToInfo.get(name)
    if found is None or len(archive.NameToInfo) != len(archive.filelist):
        raise ValueError(f"it does not hold {name}" if found is None else "it holds a file twice")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        with _open_zip(path) as archive:
            yield _ZipSource(archive)
    else:
        with BoundedReader(path) as stream:
            yield _StreamSource(stream)


class _Source(ABC):
    """An open file of described tensors."""

    described: Any
    """What the file holds as plain values, with `_Described` and numpy arrays in place of tensors."""

    def __init__(self, size: int) -> None:
        self.storages: dict[str, _Storage] = {}
        self._size = size
        self._room = 4 * size + _SPARE  # a file can have many tensors of the same bytes
        self._read: dict[str, Tensor] = {}

    @abstractmethod
    def opened(self, storage: _Storage) -> IO[bytes]:
        """Return a file that stands at the bytes of a storage, once its size there is known to be right."""

    def verify(self) -> None:
        """Compare all bytes with their check sums, where the format has any, and all sizes."""
        for storage in self.storages.values():
            self.opened(storage)

    def persistent(self, reference: Any) -> _Storage:
        """Return the storage that a pickle refers to."""
        kind, dtype, key, _, count, view = (*reference, None) if len(reference) == 5 else reference
        if kind != "storage" or not isinstance(dtype, _Global) or dtype.name not in _STORAGES:
            raise ValueError("its tensors have numbers of an unknown type")
        key = str(key) if isinstance(key, int) else key
        named = type(key) is str and len(key) <= _LONGEST_NAME
        if not named or not _is_count(count) or view is not None:
            raise ValueError(_NOT_DESCRIBED)
        storage = _Storage(key, *_STORAGES[dtype.name], count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("its tensors contradict each other")
        return storage

    def content(self) -> Any:
        """Return ``described`` with its tensors, compared with the SHA-256 where proxydet wrote it."""
        content = _map(self.described, self.tensor)
        if _is_ours(content) and content.pop("sha256", None) != content_digest(content):
            raise ValueError(_NOT_WRITTEN)
        return content

    def tensor(self, value: _Described | npt.NDArray[Any]) -> Tensor:
        """Return a tensor; those that share a storage in the file share it here."""
        import torch

        if isinstance(value, np.ndarray):
            return torch.from_numpy(value)
        storage = value.storage
        self._room -= math.prod(value.shape) * storage.item
        if self._room < 0 or storage.count * storage.item > self._size:
            raise ValueError("its tensors are larger than the file")
        if storage.key not in self._read:
            data = torch.empty(storage.count * storage.item, dtype=torch.uint8)
            view, done, file = memoryview(data.numpy().data), 0, self.opened(storage)
            while done < len(view):
                count = file.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
                if not count:
                    raise ValueError("it is truncated")
                done += count
            if isinstance(file, zipfile.ZipExtFile):
                file.read(1)  # CRC-32 is compared at the end
                file.close()
            self._read[storage.key] = data.view(getattr(torch, storage.dtype))
        return torch.as_strided(self._read[storage.key], value.shape, value.stride, value.offset)


def _is_ours(content: Any) -> bool:
    """Whether `write_state` wrote it: two of three signs will do, so that damage to one does not end the comparison."""
    if not isinstance(content, dict):
        return False
    of_format: bool = content.get("format") == FORMAT
    return of_format + ("sha256" in content) + ("iteration" in content) >= 2


class _ZipSource(_Source):
    """What torch.save and torch.jit.save write."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        super().__init__(sum(entry.compress_size for entry in archive.infolist()))
        self._archive = archive
        indexes = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(indexes) != 1:
            raise ValueError("it is a zip archive without the index of a checkpoint")
        self._folder = indexes[0].partition("/")[0]
        order = f"{self._folder}/byteorder"
        if order in archive.namelist() and archive.read(_entry(archive, order)) != b"little":
            raise ValueError("its numbers are big-endian")
        entry = _entry(archive, indexes[0])
        if entry.file_size > _LARGEST_PICKLE:
            raise ValueError("its index is too large for a checkpoint")
        index = io.BytesIO(archive.read(entry))
        self.described = _unpickle(index, entry.file_size, self.persistent)

    def opened(self, storage: _Storage) -> IO[bytes]:
        entry = _entry(self._archive, f"{self._folder}/data/{storage.key}")
        plain = not entry.compress_type and not entry.flag_bits & 1
        size = storage.count * storage.item
        if not plain or not entry.file_size == entry.compress_size == size:
            raise ValueError(f"the tensor data {storage.key} have another size than in the index")
        return self._archive.open(entry)

    def verify(self) -> None:
        for storage in self.storages.values():
            self.opened(storage).close()
        damaged = self._archive.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of {damaged} is wrong")


_OPENS_LINE = (b"c", b"i", b"g", b"p", b"I", b"L", b"F", b"S", b"V", b"P")
"""Instructions of pickles whose argument is a line of text."""


class _StreamSource(_Source):
    """A pickle, or several and then the numbers: torch's format before 1.6."""

    def __init__(self, file: BoundedReader) -> None:
        super().__init__(file.size)
        self._file = file
        self._places: dict[str, int] = {}
        head = file.read(min(2 * _LONGEST_NAME, file.size))
        file.seek(0)
        if not head:
            raise ValueError("it is empty")
        if head[8:9] == b"{":
            raise ValueError("it is a safetensors file, which holds weights alone")
        if head[:1] in _OPENS_LINE and b"\n" not in head:  # all of it would be read for one line
            raise ValueError(_NOT_READ)
        if _LEGACY_MAGIC.to_bytes(10, "little") not in head[:32]:
            self.described = _unpickle(file, file.size, self.persistent)
            return
        file.largest = room = min(file.size, _LARGEST_PICKLE)
        for _ in range(3):  # the magic number, the version, the sizes of numbers
            _unpickle(file, room, self.persistent)
        self.described = _unpickle(file, room, self.persistent)
        keys = _unpickle(file, room, self.persistent)
        place = file.tell()
        if not isinstance(keys, list) or {str(key) for key in keys} != self.storages.keys():
            raise ValueError("its list of tensor data is not that of its tensors")
        for key in keys:
            self._places[str(key)] = place
            place += 8 + self.storages[str(key)].count * self.storages[str(key)].item
        if place != file.size:
            raise ValueError("it is truncated, or has something appended")

    def opened(self, storage: _Storage) -> IO[bytes]:
        self._file.seek(self._places[storage.key])
        if int.from_bytes(self._file.read(8), "little") != storage.count:
            raise ValueError(f"the tensor data {storage.key} have another size than in the index")
        return self._file


# ---- pickles ---------------------------------------------------------------------------------------------------------

_PUSH = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
     "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
     "BINBYTES8", "BYTEARRAY8"]
)  # fmt: skip
_NEW: dict[str, Any] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": _Ignored,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _unpickle(file: IO[bytes], size: int, persistent: Callable[[Any], _Storage]) -> Any:
    """Build what a pickle of at most ``size`` bytes describes, without calling or importing anything that it names."""
    try:
        most = min(_MOST_VALUES, 10_000 + 4 * size)
        return _map(_build(file, size, persistent), lambda leaf: leaf, most)
    except _NotAllowedError:
        raise
    except Exception as error:  # pickletools raises of every kind
        text = str(error) if type(error) is ValueError and str(error).startswith("its ") else ""
        raise ValueError(text or _NOT_READ) from error


def _map(value: Any, leaf: Callable[[Any], Any], left: int = _MOST_VALUES) -> Any:
    """Return nested plain values, with what ``leaf`` gives for each tensor or array, and None for other objects.

    A pickle can refer to the same list, or text, again and again; ``left`` is how many values there may be.
    """
    room = 4 * _LARGEST_PICKLE

    def walk(item: Any) -> Any:
        nonlocal left, room
        left -= 1
        room -= len(item) if isinstance(item, str | bytes) else 0
        if left < 0 or room < 0:
            raise ValueError(_TOO_MANY)
        if isinstance(item, dict):
            return {key: walk(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(walk(inner) for inner in item)
        if isinstance(item, _Array):
            item = item.values
        if isinstance(item, _Described | np.ndarray):
            return leaf(item)
        return item if isinstance(item, str | int | float | bytes) else None

    return walk(value)


def _build(file: IO[bytes], size: int, persistent: Callable[[Any], _Storage]) -> Any:
    """Follow the instructions of a pickle.

    Each may name the same large value again in a few bytes: none may cost more than the bytes that it takes in the file,
    or than what `_Calls` has room for.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lies under each mark
    memo: dict[Any, Any] = {}
    calls = _Calls(4 * size + _SPARE)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > _MOST_VALUES or (isinstance(argument, int) and abs(argument) >> 128):
            raise ValueError(_TOO_MANY)
        if name in _PUSH:
            stack.append(argument)
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items, stack = stack, below.pop()
            made: Any = {} if name == "DICT" else tuple(items) if name == "TUPLE" else items
            if name == "DICT":
                _set_items(made, items)
            stack.append(_Ignored() if name == "FROZENSET" else made)
        elif name in ("APPEND", "SETITEM", "APPENDS", "SETITEMS", "ADDITEMS"):
            if name.endswith("S"):
                items, stack = stack, below.pop()
            else:
                items = [stack.pop() for _ in range(2 if name == "SETITEM" else 1)][::-1]
            if name.startswith("SET"):
                _set_items(stack[-1], items)
            elif isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ", 1) if argument else [stack.pop(), stack.pop()][::-1]
            stack.append(_allowed(*words))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()
            arguments = stack.pop()
            if type(arguments) is not tuple:
                raise ValueError("it is not a pickle of weights")
            stack.append(calls.call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            calls.set_state(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            stack = below.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle holds {name}")
    raise ValueError("it is truncated")


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Keys of other kinds name no weights; the hash of a nested tuple, say, recurses without a bound.
            if type(key) in _KEYS and not (isinstance(key, int) and abs(key) >> 60):
                target[key] = value


def _allowed(module: Any, name: Any) -> _Global:
    if not all(isinstance(word, str) and len(word) <= _LONGEST_NAME for word in (module, name)):
        raise ValueError("a name in it is too long")
    package = module.partition(".")[0]
    if package not in _PACKAGES or ("builtin" in package and name not in _BUILTINS):
        raise _NotAllowedError(ascii(f"{module}.{name}"[:100])[1:-1])
    return _Global(module, name)


class _Calls:
    """Does itself what little a pickle of weights needs done.

    Args:
        room: Bytes and values that all calls may copy.
    """

    def __init__(self, room: int) -> None:
        self._room = room

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for the result of a function, or an object of a class, that the pickle names."""
        known = function if isinstance(function, _Global) else _Global("", "")
        where, name = known.module, known.name
        package = where.partition(".")[0]
        if (where, name) == ("collections", "OrderedDict"):
            made: dict[Any, Any] = {}
            for key, value in arguments[0] if arguments else ():
                self._spend(_VALUE)
                _set_items(made, [key, value])
            return made
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _describe(*arguments[:4])
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return arguments[0]
        if (where, name) == ("torch", "Size") or where == "torch.jit._pickle":
            return arguments[0]
        if package == "__torch__":
            return _Module()
        if (where, name) == ("numpy", "dtype"):
            text = arguments[0]
            if isinstance(text, str) and text.lstrip("<>=|").startswith("V"):
                raise ValueError(f"{_STRUCTURED} (numpy's dtype {text[:20]!a})")
            return (
                _Dtype(text)
                if isinstance(text, str) and _NUMPY_DTYPE.fullmatch(text)
                else _Ignored()
            )
        if package == "numpy" and name == "_reconstruct":
            return _Array()
        if package == "numpy" and name == "_frombuffer":
            data, dtype, shape, order = arguments
            return _Array(self._array(dtype, shape, order == "F", data))
        if package == "numpy" and name == "scalar" and isinstance(arguments[0], _Dtype):
            values = self._array(arguments[0], (), False, arguments[1])
            return None if values is None else values.item()
        if (where, name) == ("_codecs", "encode"):
            text, encoding = arguments
            self._spend(len(text))
            return text.encode("latin1") if encoding == "latin1" else _Ignored()
        # Pickles of protocol 2 and before write empty bytes as a call.
        return b"" if name == "bytes" and not arguments else _Ignored()

    def set_state(self, target: Any, state: Any) -> None:
        """Give the state that the pickle states to what `call` returned."""
        if isinstance(target, _Module) and isinstance(state, dict):
            self._spend(_VALUE * len(state))
            target.update(state)
        elif isinstance(target, _Array):
            _, shape, dtype, fortran, data = state
            target.values = self._array(dtype, shape, bool(fortran), data)
        elif isinstance(target, _Dtype):
            if state[1] not in ("<", ">", "=", "|") or any(p is not None for p in state[2:5]):
                raise ValueError(_STRUCTURED)
            target.text = state[1] + target.text.lstrip("<>=|")

    def _array(self, dtype: Any, shape: Any, fortran: bool, data: Any) -> npt.NDArray[Any] | None:
        if not isinstance(dtype, _Dtype):
            return None
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin1")
        self._spend(2 * len(data))
        kind = np.dtype(dtype.text)
        if len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
            raise ValueError("its arrays are not described as in a weight file")
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError("the size of its arrays does not match their data")
        values = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
        return np.array(values, dtype=kind.newbyteorder("="), order="C")

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise ValueError(_TOO_MANY)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _describe(storage: Any, offset: Any, shape: Any, stride: Any) -> _Described:
    fits = isinstance(storage, _Storage) and len(shape) == len(stride) <= _MOST_DIMENSIONS
    if not fits or not all(map(_is_count, (offset, *shape, *stride))):
        raise ValueError(_NOT_DESCRIBED)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.count:
        raise ValueError("its tensors reach beyond their data")
    return _Described(storage, offset, tuple(shape), tuple(stride))


# ---- names -----------------------------------------------------------------------------------------------------------

CONTAINERS = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "state_dict_ema", "module")  # fmt: skip
"""Keys under which a file may hold its parameters."""
WRAPPERS = ("module.", "model.", "ema.", "network.")
"""What may stand in front of the names of the parameters; `_orig_mod.` may stand anywhere in them."""


def _has_tensors(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else ()
    return any(hasattr(item, "shape") or _has_tensors(item) for item in inner)


def _parameters(content: Any, path: Path, parts: tuple[str, ...] = ("",)) -> list[tuple[str, Any]]:
    """Return names and tensors of the model that a file holds.

    Raises:
        CheckpointError: There are none.
    """
    for _ in range(10):
        there = content if isinstance(content, dict) else {}
        if not (inner := [key for key in CONTAINERS if _has_tensors(there.get(key))]):
            break
        if len(inner) > 1:
            both = " and ".join(inner)
            logger.warning("%s holds the weights %s; those under %r are used", path, both, inner[0])
        content = content[inner[0]]
    found: dict[str, Any] = {}
    left = _SPARE

    def flatten(value: Any, prefix: str) -> None:
        nonlocal left
        for key, item in value.items() if isinstance(value, dict) else ():
            length = len(prefix) + (len(key) if isinstance(key, str | bytes) else 0)
            left -= length
            if length > _LONGEST_NAME or left < 0:
                raise ValueError("its names are too long for a weight file")
            if isinstance(item, dict):
                flatten(item, f"{prefix}{key}.")
            elif isinstance(key, str) and hasattr(item, "shape"):
                found[prefix + key] = item

    flatten(content, "")
    found = {name.replace("_orig_mod.", ""): item for name, item in found.items()}
    found.pop("n_averaged", None)  # torch's AveragedModel counts in it
    while most := [w for w in WRAPPERS if 2 * sum(n.startswith(w) for n in found) > len(found)]:
        found = {name.removeprefix(most[0]): item for name, item in found.items()}
    if not found:
        keys = [repr(key)[:40] for key in content][:5] if isinstance(content, dict) else []
        raise CheckpointError(
            f"{path} holds no parameters" + (f"; it holds {', '.join(keys)}" if keys else ""),
            hint=f"give a file of parameters by name, or one that holds them under {', '.join(CONTAINERS)}",
            path=path,
        )
    return [(name, item) for name, item in found.items() if name.startswith(parts)]


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_state(
    state: Mapping[str, Any],
    path: Path,
    *,
    hint: str | None = None,
    given_up: threading.Event | None = None,
) -> None:
    """Write a state as torch.save does, with its digest, so that ``path`` either holds all of it or is as it was.

    Args:
        state: Nested plain values and tensors.
        path: The file.
        hint: What the user can do where there is no room.
        given_up: When another thread sets it, no more is written: ``path`` stays as it was.

    Raises:
        DiskFullError: There is no room.
        RuntimeEnvironmentError: It cannot be written, or was given up.
    """
    import torch

    class Output(io.FileIO):
        def write(self, data: Any) -> int:
            if given_up is not None and given_up.is_set():
                raise OSError(errno.ECANCELED, "it was interrupted")
            return super().write(data)

    content = {"format": FORMAT, **state}
    content["sha256"] = content_digest(content)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    require_room(path, _size(content) + _DISK_MARGIN, hint=hint)
    with staged(path) as temporary:
        try:
            with write_errors(path, hint=hint), io.BufferedWriter(Output(temporary, "wb")) as file:
                torch.save(content, file)
        except RuntimeError as error:
            # torch may wrap the system's error.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            number = cause.errno or errno.EIO
            raise unwritable(path, number, cause.strerror or str(cause), hint=hint) from error


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors, with metadata and their digest; whole or not at all; the same content as the same bytes.

    Args:
        path: The file.
        tensors: By name; those that share memory are written each.
        metadata: Plain values, stored as JSON under the key ``proxydet``.

    Raises:
        DiskFullError: There is no room.
        RuntimeEnvironmentError: It cannot be written.
    """
    from safetensors.torch import save

    own = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    text = json.dumps({"format": SAFETENSORS_FORMAT, **metadata})
    notes = {"format": "pt", "proxydet": text, "sha256": content_digest([text, own])}
    content = memoryview(save(own, metadata=notes))
    # The library writes the metadata in a random order.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with staged(path) as temporary, write_errors(path), temporary.open("wb") as file:
        file.writelines((len(encoded).to_bytes(8, "little"), encoded, content[start:]))


def seal(path: Path, mark: bytes) -> None:
    """Append a mark, and the SHA-256 (hexadecimal) of everything before the digest, to a file that has been written.

    Args:
        path: The file; its format must allow what is appended.
        mark: What `check_seal` recognises.
    """
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(mark)
        size = file.tell()
        file.seek(0)
        digest = _digest_of(file, size)
        file.seek(size)
        file.write(digest.encode())


def check_seal(path: Path, mark: bytes, *, hint: str) -> bool:
    """Compare a file with the digest that `seal` appended.

    Returns:
        Whether there is one.

    Raises:
        CheckpointError: The file is absent, or changed since it was written.
    """
    with _errors(path, hint, "an exported detector"), path.open("rb") as file:
        size = file.seek(0, 2) - _HEX
        file.seek(max(size - len(mark), 0))
        if file.read(len(mark)) != mark:
            return False
        digest = file.read()
        file.seek(0)
        if _digest_of(file, size) != digest.decode("ascii", "replace"):
            raise ValueError(_NOT_WRITTEN)
        return True


def _digest_of(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _CHUNK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def content_digest(value: Any) -> str:
    """Return the SHA-256 of nested values: names, values, shapes, number formats and tensors' bytes."""
    import torch

    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            plain = item.detach().cpu().contiguous()
            digest.update(f"tensor {plain.dtype} {tuple(plain.shape)}\0".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(item, Mapping):
            digest.update(f"mapping {len(item)}\0".encode())
            for key, inner in item.items():
                add(key)
                add(inner)
        elif isinstance(item, (list, tuple)):
            digest.update(f"{'list' if isinstance(item, list) else 'tuple'} {len(item)}\0".encode())
            for inner in item:
                add(inner)
        else:
            digest.update(f"{type(item).__name__} {item!r}\0".encode())

    add(value)
    return digest.hexdigest()


def _size(value: Any) -> int:
    """Bytes of all tensors in nested values."""
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    if isinstance(value, Mapping):
        return sum(_size(item) for item in value.values())
    return sum(_size(item) for item in value) if isinstance(value, (list, tuple)) else 0
