"""Reads weight files that others made, without running code that they may hold."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proxydet.errors import CheckpointError

# What a plain pickle of numpy arrays needs, under the module names of numpy 1 and 2; everything else is refused.
_CORE = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{package}.multiarray", name): getattr(_CORE, name)
        for package in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
}
_TORCH_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_CORE.scalar, "numpy.core.multiarray.scalar"),
    (_CORE.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]
# What unpickling arbitrary bytes can raise.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the parameters in a checkpoint: torch's format, or a plain pickle of numpy arrays (``.pkl``).

    Args:
        path: The file. What it holds under ``model`` or ``state_dict`` counts, or all of it.

    Raises:
        CheckpointError: The file is absent, damaged, would run code, or holds no parameters.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no weight file {path}",
            hint="check its path; a run's are in RUN/checkpoints, published ones come with proxydet download",
            path=path,
        )
    content = _read_pickle(path) if path.suffix == ".pkl" else _read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name.removeprefix("module.")] = value
    if not tensors:
        raise CheckpointError(
            f"{path} holds no parameters",
            hint="give a checkpoint of proxydet train or a published one",
            path=path,
        )
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_TORCH_GLOBALS), warnings.catch_warnings():
            # Of pickles that torch did not write; what it then thinks of the content is an error below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            # torch's own text advises to load the file unsafely.
            raise _damaged(path, "it is no file that torch.save writes") from error
        raise CheckpointError(
            f"{path} holds more than parameters, and loading it could run code",
            hint="take the file from its publisher, or save its state dict alone with torch.save",
            path=path,
        ) from error
    except (*_DAMAGE, RuntimeError, zipfile.BadZipFile) as error:
        raise _damaged(path, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, LookupError | TypeError | AttributeError | pickle.UnpicklingError):
        # An unpickler's words would be the value of a byte.
        return "its content makes no sense"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or no weight file: {reason}",
        hint="give a checkpoint of proxydet train or a published one; fetch or copy a damaged one again",
        path=path,
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds containers and numpy arrays, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function by its name."""
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        if str(error).startswith("refused"):
            raise CheckpointError(
                f"{path} holds more than arrays, and loading it could run code ({error})",
                hint="take the file from its publisher",
                path=path,
            ) from error
        raise _damaged(path, _first_line(error)) from error
    except _DAMAGE as error:
        raise _damaged(path, _first_line(error)) from error
