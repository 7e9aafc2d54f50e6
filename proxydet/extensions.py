"""Own code in a configuration: Python paths such as ``mypackage.losses:Mine``, found, called and checked in one place.

A path names a module and what is in it. The module is found as ``import`` finds it, the working folder last; so the processes
that a launcher starts, on other nodes too, find it where they are started in that folder or the package is installed. What a
path is expected to be is checked when a run starts. See ``docs/how-to/change-the-method.md``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proxydet.errors import ConfigError, ProxydetError
from proxydet.wording import nearest

logger = logging.getLogger(__name__)

Options = dict[str, bool | int | float | str]
"""Keyword arguments for what a Python path names, as a configuration can hold them."""

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_EXAMPLE = "mypackage.module:Name"


def is_python_path(text: str) -> bool:
    """Whether a text has the form of a Python path, ``package.module:name``."""
    return _PATH.fullmatch(text) is not None


def require_python_path(text: str, key: str) -> None:
    """Raise a `ConfigError` unless a text has the form of a Python path; nothing is imported."""
    if not is_python_path(text):
        raise ConfigError(
            f"{key} must be a Python path; it is {text[:80]!r}.",
            hint=f"write module and name with a colon between them, such as {_EXAMPLE}",
        )


def python_path(thing: object, argument: str) -> str:
    """Return the Python path of a class or function that was given in place of one.

    Args:
        thing: A class or function of a module, or a Python path.
        argument: The argument that it was given as, for messages.

    Raises:
        ConfigError: It has no path by which a later run could find it.
    """
    if isinstance(thing, str):
        return thing
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    path = f"{module}:{name}"
    if not is_python_path(path):
        raise ConfigError(
            f"{argument} must be a class or a function of a module; it is {path if name else repr(thing)[:80]}.",
            hint="define it at the top of a module, so that its path can be recorded, and give the class, not an object of it",
        )
    return path


def require_module(path: str, key: str) -> None:
    """Raise a `ConfigError` where there is no such package or module as a Python path begins with; nothing is imported."""
    require_python_path(path, key)
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    top = path.partition(":")[0].partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise _no_module(path, key, top)


def _no_module(path: str, key: str, absent: str) -> ConfigError:
    return ConfigError(
        f"{key} is {path}: there is no module {absent}.",
        hint=f"correct the path, install the package, or start in the folder that holds {absent.partition('.')[0]} "
        "(or name that folder in PYTHONPATH)",
    )


def load_extension(path: str, key: str) -> Any:
    """Import what a Python path names.

    Args:
        path: Module and name, with a colon between them.
        key: The configuration key that holds it, for messages.

    Raises:
        ConfigError: It has another form, does not import, or is not there.
    """
    require_module(path, key)
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        absent = error.name or module_name
        if module_name == absent or module_name.startswith(f"{absent}."):
            raise _no_module(path, key, absent) from error
        raise ConfigError(
            f"{key} is {path}: {module_name} needs the module {absent}, which is not installed.",
            hint=f"install {absent}",
        ) from error
    except Exception as error:
        raise _raised(f"{key} is {path}: importing {module_name}", error) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if not known.startswith("_")]
            raise ConfigError(
                f"{key} is {path}: {module_name} has no {part}.{nearest(part, public)}",
                hint="correct the name, or define it in that module",
                path=Path(source) if (source := getattr(found, "__file__", None)) else None,
            )
        found = getattr(found, part)
    return found


def build_extension(path: str, key: str, options: Mapping[str, Any], **arguments: Any) -> Any:
    """Import what a Python path names and call it.

    Args:
        path: A class or function.
        key: The configuration key that holds it.
        options: What the configuration gives it.
        arguments: What it is always given, by name.

    Raises:
        ConfigError: As `load_extension`; or it cannot be called so, or raises.
    """
    made = load_extension(path, key)
    require_signature(made, key, path, *arguments, *options)
    with extension_errors(f"{key} is {path}: making it"):
        return made(**arguments, **options)


def require_signature(function: Any, key: str, path: str, *names: str, positional: int = 0) -> None:
    """Check that a function can be called with certain arguments.

    Args:
        function: A function, a class, or an object that is called.
        key: The configuration key that holds its path.
        path: The path.
        names: Arguments that it is given by name.
        positional: How many others it is given before them.

    Raises:
        ConfigError: It cannot be called, or not so.
    """
    if not callable(function):
        raise ConfigError(
            f"{key} is {path}, which is a {type(function).__name__}, not a class or function.",
            hint=f"name a class or function: {_EXAMPLE}",
        )
    try:
        inspect.signature(function).bind(*[None] * positional, **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        given = ", ".join([*["..."] * positional, *(f"{name}=..." for name in names)])
        raise ConfigError(
            f"{key} is {path}, which cannot be called as {path.rpartition(':')[2]}({given}): {error}.",
            hint='give it these parameters; the how-to page "Change the method" has an example of each kind',
        ) from error


@contextmanager
def extension_errors(doing: str) -> Iterator[None]:
    """Turn what own code raises into a `ConfigError` that says where; our errors and a lack of memory stay what they are.

    Args:
        doing: What is being done, with key and path, as the beginning of a message: ``"KEY is PATH: making it"``.
    """
    try:
        yield
    except (ProxydetError, MemoryError, OSError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "CUDA error" in str(error):
            raise
        raise _raised(doing, error) from error


def _raised(doing: str, error: Exception) -> ConfigError:
    logger.debug("%s failed", doing, exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    where = Path(frames[-1].filename) if frames else None
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    else:
        place = f"{where}, line {frames[-1].lineno}" if frames else "an unknown place"
    reason = " ".join(str(error).split())[:300]
    return ConfigError(
        f"{doing} raised {type(error).__name__}: {reason} ({place}).",
        hint="correct it there; PROXYDET_DEBUG=1 in the environment prints the whole traceback",
        path=where,
    )


def source_digests(paths: Iterable[str | None]) -> dict[str, str]:
    """Return the SHA-256 of the source file of each Python path that has been imported, for a run's records."""
    found = {}
    for path in paths:
        if path is not None and is_python_path(path):
            module: Any = sys.modules.get(path.partition(":")[0])
            source = getattr(module, "__file__", None)
            if source and Path(source).is_file():
                found[f"code {path}"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return found
