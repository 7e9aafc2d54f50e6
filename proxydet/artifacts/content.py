"""What a file without a published digest must hold, so that at least its kind is known to be right.

A checkpoint is inspected without torch and without running it. It is a pickle; here every class or function that it
names is replaced by one that does nothing, so reading one has no effect whatever it holds, and one that names anything
outside of the packages that checkpoints are made of is refused. Its numbers are not read, except for their check sums.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from proxydet.artifacts.archives import Tar, archive_errors, open_zip
from proxydet.artifacts.catalogue import Artifact, Content
from proxydet.errors import ArchiveError, CheckpointError, ProxydetError

_MAY_BE_MISSING = (
    ".freq_weight",
    ".zs_weight",
    ".num_batches_tracked",
    ".relative_position_index",
    ".base.fc.weight",
    ".base.fc.bias",
)  # made again from the vocabulary or the sizes, or not used
_IMAGES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ContentCheck:
    """Inspects what a file holds."""

    run: Callable[[Path], str]
    """Raises `ProxydetError` if a file is not what it should be; returns what it holds, in a few words."""
    sees_all: bool
    """Whether any changed byte would be noticed, because the format carries check sums."""


def content_check(artifact: Artifact) -> ContentCheck | None:
    """Return the check for an artifact without a published digest; None where nothing is known to check."""
    content = artifact.content
    if content is not None and content.kind != "image-tar":
        return ContentCheck(lambda path: _check_checkpoint(path, content), sees_all=True)
    if content is not None:
        return ContentCheck(lambda path: _check_tar(path, images=True), sees_all=False)
    if artifact.unpack is None or artifact.file_name.endswith(".zip"):
        return None
    compressed = artifact.file_name.endswith(("gz", "tgz"))
    return ContentCheck(lambda path: _check_tar(path, images=False), sees_all=compressed)


def _check_tar(path: Path, *, images: bool) -> str:
    with Tar(path) as archive:
        names = [member.name for member in archive if not member.isdir()]
    if images and not all(name.lower().endswith(_IMAGES) for name in names):
        raise ArchiveError(f"{path.name} should hold images and nothing else.", path=path)
    if not names:
        raise ArchiveError(f"{path.name} holds no {'images' if images else 'files'}.", path=path)
    return f"{len(names)} {'images' if images else 'files'}"


def _check_checkpoint(path: Path, content: Content) -> str:
    found = read_tensor_index(path)
    if content.layout is None:
        return f"{len(found)} tensors" if len(found) > 1 else "1 tensor"
    model = _published_tensors(content.layout, mixup_branch=content.mixup_branch)
    hint = "It is a checkpoint of another model."
    missing = [name for name in model if name not in found and not name.endswith(_MAY_BE_MISSING)]
    if missing:
        message = f"{path.name} lacks {len(missing)} of the {len(model)} tensors of the model, such as {missing[0]}."
        raise CheckpointError(message, hint=hint, path=path)
    other = [
        name
        for name, shape in model.items()
        if found.get(name, shape) != shape and name.rpartition(".")[2] not in content.any_shape
    ]
    if other:
        raise CheckpointError(
            f"{path.name} has {len(other)} tensors of other shapes than the model: {other[0]} is "
            f"{found[other[0]]}, not {model[other[0]]}.",
            hint=hint,
            path=path,
        )
    extra = len(found) - sum(name in found for name in model)
    return f"{len(found)} tensors" + (f", {extra} of them beyond the model's" if extra else "")


def _published_tensors(layout: str, *, mixup_branch: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of a published model, with or without the mixup branch."""
    text = (
        resources.files("proxydet.artifacts.layouts").joinpath(f"{layout}.txt").read_text("ascii")
    )
    found = {}
    for line in text.splitlines():
        name, shape, *marks = line.split()
        if mixup_branch or not marks:
            found[name] = tuple(int(length) for length in shape.split("x")) if shape != "-" else ()
    return found


# ---- the tensors that a checkpoint names -------------------------------------------------------------------------------

_LARGEST_INDEX = 16 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_PACKAGES = frozenset(
    [
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
    ]
)
_BUILTINS = frozenset(
    ["set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "slice", "bytearray"]
)
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip


def read_tensor_index(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that a checkpoint holds, by name.

    Args:
        path: The checkpoint, as ``torch.save`` writes it, in either of its formats.

    Raises:
        CheckpointError: It is damaged, cut off, not a checkpoint, or names code that checkpoints do not need.
    """
    try:
        with archive_errors(path):
            content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except CheckpointError:
        raise
    except (
        ProxydetError, pickle.UnpicklingError, TypeError, AttributeError, ImportError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path.name} is damaged or not a checkpoint: {error}.", path=path
        ) from error
    # The state dict is the whole content, or what lies under one of the usual keys.
    content = content if isinstance(content, Mapping) else {}
    inner = (content[key] for key in _MODEL_KEYS if isinstance(content.get(key), Mapping))
    state = next(inner, content)
    found = {str(name): value.shape for name, value in state.items() if isinstance(value, _Tensor)}
    if not found:
        raise CheckpointError(f"{path.name} holds no tensors.", path=path)
    return found


def _read_zip(path: Path) -> object:
    with open_zip(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        indexes = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
        if not indexes or sizes[indexes[0]] > _LARGEST_INDEX:
            raise CheckpointError(f"{path.name} is a zip archive, but not a checkpoint.", path=path)
        if (damaged := archive.testzip()) is not None:
            raise CheckpointError(
                f"{path.name} is damaged: the check sum of {damaged} is wrong.", path=path
            )
        reader = _Reader(io.BytesIO(archive.read(indexes[0])))
        content = reader.load()
    folder = indexes[0].partition("/")[0]
    for storage in reader.storages.values():
        if sizes.get(f"{folder}/data/{storage.key}") != storage.size:
            raise CheckpointError(
                f"{path.name} is damaged: tensor data {storage.key} is missing.", path=path
            )
    return content


def _read_legacy(path: Path) -> object:
    """Read the older format: pickles one after another, then the numbers."""
    with path.open("rb") as raw:
        file = io.BytesIO(raw.read(_LARGEST_INDEX))
    if _Reader(file).load() != _LEGACY_MAGIC:
        raise CheckpointError(f"{path.name} is not a PyTorch checkpoint.", path=path)
    _Reader(file).load()
    _Reader(file).load()
    reader = _Reader(file)
    content, keys = reader.load(), _Reader(file).load()
    if not isinstance(keys, list):
        raise CheckpointError(f"{path.name} is damaged: it has no list of tensor data.", path=path)
    expected = file.tell() + sum(8 + reader.storages[str(key)].size for key in keys)
    if path.stat().st_size != expected:
        raise CheckpointError(f"{path.name} is cut off or has something appended.", path=path)
    return content


@dataclass(frozen=True)
class _Storage:
    key: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]


# Python's own unpickler, not the one in C, whose memory a few bytes can make grow without bound.
class _Reader(pickle._Unpickler):
    """Reads a pickle in which nothing means anything, except tensors and ordinary containers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self._inert = type("Inert", (_Inert,), {})  # of this reader alone: a pickle can change it

    def find_class(self, module: str, name: str) -> Any:
        """Return something harmless in place of what the file names."""
        package = module.partition(".")[0].replace("__builtin__", "builtins")
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
            return lambda data, *_: data
        return name if module == "torch" and name in _ITEM_BYTES else self._inert

    def persistent_load(self, pid: Any) -> Any:
        """Return the description of a tensor's data."""
        kind, storage_type, key, _, count, *_ = pid
        if kind != "storage" or type(count) is not int or count < 0:
            raise ValueError("its tensor data is not described as in a checkpoint")
        storage = _Storage(str(key), _ITEM_BYTES.get(storage_type, 1) * count)
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


def _rebuilt(storage: Any, _offset: Any, size: Any, *_rest: object) -> _Tensor:
    shape = tuple(size)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its tensors are not described as in a checkpoint")
    return _Tensor(shape)
