"""Makes detectron2 importable: import this module before the first import of detectron2.

::

    import proxydet.runtime.d2  # noqa: F401
    from detectron2.structures import Instances

Importing it checks that detectron2 is there (:class:`~proxydet.errors.MissingDependencyError` with the hint
``run: proxydet setup`` otherwise) and puts the repairs of :mod:`proxydet.runtime.detectron2` in place, once. Ruff's
import order keeps the line above third-party imports (section ``detectron2`` in ``pyproject.toml``).
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

from proxydet.errors import EnvironmentProblem, MissingDependencyError
from proxydet.runtime.detectron2 import (
    COMPILED_MODULE,
    REPAIRS,
    SETUP_HINT,
    MissingOperators,
    RepairFinder,
    locate_detectron2,
)

_logger = logging.getLogger(__name__)

OLDEST_VERSION = (0, 6)


@dataclass(frozen=True, kw_only=True)
class Detectron2:
    """The detectron2 in use."""

    version: str
    """Its own version number; its main branch says 0.6 too."""

    folder: Path
    """The folder of its package."""

    operators: Literal["compiled", "absent", "broken"]
    """Its compiled part: working, not built (nothing here needs it), or built but not loadable."""


def activate() -> Detectron2:
    """Import detectron2 with the repairs in place; later calls change nothing.

    Returns:
        What was found.

    Raises:
        MissingDependencyError: It is missing, older than 0.6, or needs a package that is missing.
        EnvironmentProblem: Python runs without docstrings.
    """
    folder = locate_detectron2()
    if sys.flags.optimize > 1:
        raise EnvironmentProblem(
            "Python runs with -OO (PYTHONOPTIMIZE=2), which removes docstrings; detectron2 reads its own.",
            hint="run it without -OO, or with -O",
        )
    if not any(isinstance(finder, RepairFinder) for finder in sys.meta_path):
        RepairFinder(REPAIRS).install()
    try:
        operators = _provide_compiled_module(folder)
        with _without_broken_opencv():
            package = importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"detectron2 needs the package {error.name}, which is not installed.",
            hint="reinstall proxydet in this environment; its dependencies include that package",
        ) from error
    version = _checked_version(package, folder)
    return Detectron2(version=version, folder=folder, operators=operators)


def _checked_version(package: ModuleType, folder: Path) -> str:
    version = str(getattr(package, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_VERSION:
        raise MissingDependencyError(
            f"detectron2 {version} is too old; 0.6 or its main branch is needed.",
            hint=f"uninstall it, then {SETUP_HINT}",
            path=folder,
        )
    return version


def _provide_compiled_module(folder: Path) -> Literal["compiled", "absent", "broken"]:
    loaded = sys.modules.get(COMPILED_MODULE)
    if loaded is None:
        spec = PathFinder.find_spec(COMPILED_MODULE, [str(folder)])
        failure = None if spec is None else _load_failure(spec)
        if spec is not None and failure is None:
            return "compiled"
        loaded = sys.modules[COMPILED_MODULE] = MissingOperators(failure)
    if not isinstance(loaded, MissingOperators):
        return "compiled"
    return "absent" if loaded.load_failure is None else "broken"


def _load_failure(spec: ModuleSpec) -> str | None:
    """Load the compiled module; say why it cannot be loaded, or None where it is."""
    importlib.import_module("torch")  # whose libraries the compiled file is linked against
    try:
        with _without_broken_opencv():
            importlib.import_module(spec.name)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        _logger.warning(
            "detectron2's compiled operators do not load; going on without them, nothing here needs them: %s",
            error,
        )
        return f"the compiled file does not load ({error})"
    return None


@contextmanager
def _without_broken_opencv() -> Iterator[None]:
    """Keep an OpenCV that cannot load (no libGL on a server) from taking detectron2 down with it."""
    if "cv2" in sys.modules or find_spec("cv2") is None:
        yield
        return
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        _logger.info("OpenCV does not load (%s); detectron2 works without it", error)
    else:
        yield
        return
    before = os.environ.get("DETECTRON2_DISABLE_CV2")
    os.environ["DETECTRON2_DISABLE_CV2"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DETECTRON2_DISABLE_CV2"]
        else:
            os.environ["DETECTRON2_DISABLE_CV2"] = before


INSTALLED = activate()
