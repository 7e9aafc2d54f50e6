"""Reads the text tower's weights out of a CLIP checkpoint without running anything that the file says.

Three kinds of files are read: the TorchScript archives that OpenAI published, state dicts of
``torch.save`` (through ``weights_only=True``), and safetensors. Of an archive only the text tower's
tensors are read.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from proxydet.errors import CheckpointError

_TOP_LEVEL = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
    "cls_emb",
)
_STORAGES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


def read_text_tower(path: Path) -> dict[str, torch.Tensor]:
    """Read the text tower of a CLIP checkpoint.

    Args:
        path: A TorchScript archive, a ``torch.save`` state dict (also under the key ``state_dict``), or a
            safetensors file.

    Returns:
        Tensors by the names that open_clip's ``TextTransformer`` gives them, float32 where they are numbers.

    Raises:
        CheckpointError: The file cannot be read, or holds no text tower.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there are no CLIP weights at {path}",
            hint="run: proxydet download clip-vit-b32",
            path=path,
        )
    try:
        tensors = _read(path)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise _unreadable(path, error) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error
    tower = _text_part(tensors)
    if "token_embedding.weight" not in tower:
        raise CheckpointError(
            f"{path} holds no CLIP text tower",
            hint="fetch OpenAI's weights: proxydet download clip-vit-b32",
            path=path,
        )
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tower.items()
    }


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read CLIP weights from {path}: {error}",
        hint="give a CLIP checkpoint of OpenAI or open_clip: .pt, .bin or .safetensors",
        path=path,
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(archive)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    return {
        str(name).removeprefix("module."): tensor
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _text_part(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text tower's own tensors: below ``text.`` in newer checkpoints, at the top in CLIP's."""
    nested = {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}
    chosen = nested or tensors
    # The causal mask is computed, not learnt.
    return {n: t for n, t in chosen.items() if n.startswith(_TOP_LEVEL)}


class _Module:
    """Stands in for every TorchScript class: keeps its attributes and nothing else."""


class _TorchScriptReader(pickle.Unpickler):
    """Unpickles a TorchScript module tree into `_Module` objects and tensors; refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{prefix}/data.pkl")))
        self._archive = archive
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch.jit._pickle", "build_intlist"):
            return list
        raise pickle.UnpicklingError(
            f"the archive names {module}.{name}, which weights do not need"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r} in the archive")
        return _Storage(self._archive, f"{self._prefix}/data/{key}", dtype, int(count))


class _Storage:
    """Numbers of an archive that are read when a tensor of the text tower needs them."""

    def __init__(
        self, archive: zipfile.ZipFile, member: str, dtype: torch.dtype, count: int
    ) -> None:
        self._archive = archive
        self._member = member
        self._dtype = dtype
        self._count = count

    def tensor(self) -> torch.Tensor:
        data = bytearray(self._archive.read(self._member))
        return torch.frombuffer(data, dtype=self._dtype, count=self._count)


class _Tensor:
    """A tensor of an archive that is not read yet."""

    def __init__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self._storage = storage
        self._layout = (size, stride, offset)

    def read(self) -> torch.Tensor:
        return self._storage.tensor().as_strided(*self._layout).clone()


def _rebuild(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = _TorchScriptReader(archive, member.removesuffix("/data.pkl")).load()
    found: dict[str, _Tensor] = {}
    _collect(root, "", found)
    wanted = {n: t for n, t in found.items() if n.startswith((*_TOP_LEVEL, "text."))}
    return {name: tensor.read() for name, tensor in wanted.items()}


def _collect(module: object, prefix: str, found: dict[str, _Tensor]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, _Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", found)
