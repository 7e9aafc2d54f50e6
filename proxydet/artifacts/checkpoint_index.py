"""The tensors that a PyTorch checkpoint names, with their shapes, read without torch and without running the file.

A checkpoint is a pickle. Here every class or function that it names is replaced by one that does nothing, so reading
one has no effect whatever it holds; and one that names anything outside of the packages that checkpoints are made of
is refused. The numbers themselves are not read, except to check their check sums.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from proxydet.errors import CheckpointError

_LARGEST_INDEX = 64 << 20
_PACKAGES = frozenset(
    {
        "torch",
        "numpy",
        "collections",
        "_codecs",
        "builtins",
        "copyreg",
        "fvcore",
        "detectron2",
        "omegaconf",
        "yacs",
    }
)
_BUILTINS = frozenset(
    {"set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "slice", "bytearray"}
)
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
_MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class _Storage:
    key: str
    item_bytes: int
    count: int

    @property
    def size(self) -> int:
        return self.item_bytes * self.count


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]


def read_tensor_index(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that a checkpoint holds, by name.

    Args:
        path: The checkpoint, as ``torch.save`` writes it, in either of its formats.

    Raises:
        CheckpointError: It is damaged, cut off, no checkpoint, or names code that checkpoints do not need.
    """
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path.name} is damaged or no checkpoint: {error}.", path=path
        ) from error
    tensors = _model_tensors(content)
    if not tensors:
        raise CheckpointError(f"{path.name} holds no tensors.", path=path)
    return tensors


_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, ImportError, OverflowError, MemoryError, RecursionError, NotImplementedError,
    zlib.error,
)  # fmt: skip


def _read_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        index = next(
            (name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1), None
        )
        if index is None or sizes[index] > _LARGEST_INDEX:
            raise CheckpointError(f"{path.name} is a zip archive, but no checkpoint.", path=path)
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path.name} is damaged: the check sum of {damaged} is wrong.", path=path
            )
        reader = _Reader(io.BytesIO(archive.read(index)))
        content = reader.load()
    folder = index.partition("/")[0]
    for storage in reader.storages.values():
        if sizes.get(f"{folder}/data/{storage.key}") != storage.size:
            raise CheckpointError(
                f"{path.name} is damaged: tensor data {storage.key} is missing.", path=path
            )
    return content


def _read_legacy(path: Path) -> object:
    """Read the older format: pickles one after another, then the numbers."""
    with path.open("rb") as file:
        bounded = _Bounded(file)
        if _Reader(bounded).load() != _LEGACY_MAGIC:
            raise CheckpointError(f"{path.name} is no PyTorch checkpoint.", path=path)
        _Reader(bounded).load()
        _Reader(bounded).load()
        reader = _Reader(bounded)
        content = reader.load()
        keys = _Reader(bounded).load()
        if not isinstance(keys, list):
            raise CheckpointError(
                f"{path.name} is damaged: it has no list of tensor data.", path=path
            )
        expected = file.tell() + sum(8 + reader.storages[str(key)].size for key in keys)
    if path.stat().st_size != expected:
        raise CheckpointError(f"{path.name} is cut off or has something appended.", path=path)
    return content


class _Bounded(io.RawIOBase):
    """A file of which only so much may be read as an index can be long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = _LARGEST_INDEX

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes."""
        self._left -= size
        if size < 0 or self._left < 0:
            raise ValueError("its index is too long")
        return self._file.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line of at most 1,000 bytes."""
        del size
        line = self._file.readline(1000)
        self._left -= len(line)
        return line


class _Reader(pickle.Unpickler):
    """Reads a pickle in which nothing means anything, except tensors and ordinary containers."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return something harmless in place of what the file names."""
        package = module.partition(".")[0]
        if package == "__builtin__":
            package = "builtins"
        if package not in _PACKAGES or (package == "builtins" and name not in _BUILTINS):
            raise CheckpointError(
                f"The checkpoint asks to run {module}.{name}, which no checkpoint needs.",
                hint="Do not use this file: it may be an attack.",
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuilt
        if name == "_rebuild_parameter":
            return _first
        if module == "torch" and name in _ITEM_BYTES:
            return name
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        """Return the description of a tensor's data."""
        kind, storage_type, key, _, count, *_ = pid
        if kind != "storage" or type(count) is not int or count < 0:
            raise ValueError("its tensor data is not described as in a checkpoint")
        storage = _Storage(str(key), _ITEM_BYTES.get(storage_type, 1), count)
        self.storages[storage.key] = storage
        return storage


class _Inert:
    """Stands for an object of any class; takes everything and does nothing."""

    def __init__(self, *args: object) -> None:
        """Take any arguments."""

    def __call__(self, *_: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None:
        """Take any state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Take any item."""

    def append(self, item: object) -> None:
        """Take any item."""

    def extend(self, items: object) -> None:
        """Take any items."""


def _rebuilt(storage: Any, offset: Any, size: Any, *rest: object) -> _Tensor:
    del offset, rest
    shape = tuple(size)
    if not isinstance(storage, _Storage) or not all(
        type(length) is int and length >= 0 for length in shape
    ):
        raise ValueError("its tensors are not described as in a checkpoint")
    return _Tensor(shape)


def _first(data: object, *rest: object) -> object:
    del rest
    return data


def _model_tensors(content: object) -> dict[str, tuple[int, ...]]:
    """Find the state dict: the whole content, or what lies under one of the usual keys."""
    if not isinstance(content, Mapping):
        return {}
    inner = (content[key] for key in _MODEL_KEYS if isinstance(content.get(key), Mapping))
    state = next(inner, content)
    return {str(name): value.shape for name, value in state.items() if isinstance(value, _Tensor)}
