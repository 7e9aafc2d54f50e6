"""Where detectron2 is installed, found without importing it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from proxydet.errors import MissingDependencyError

SETUP_HINT = "run: proxydet setup"


def locate_detectron2() -> Path:
    """Find detectron2's package folder.

    Returns:
        The folder that holds its ``__init__.py``.

    Raises:
        MissingDependencyError: It is not installed, or another folder of that name hides it.
    """
    spec = find_spec("detectron2")
    if spec is None:
        raise MissingDependencyError("detectron2 is not installed.", hint=SETUP_HINT)
    if spec.origin is None or spec.loader is None:
        # Python takes any folder of that name for a package: the root of a source checkout, most often.
        folders = ", ".join(spec.submodule_search_locations or [])
        raise MissingDependencyError(
            f"detectron2 is not installed; a folder of that name is no package: {folders}",
            hint=SETUP_HINT,
        )
    return Path(spec.origin).parent
