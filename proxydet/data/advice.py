"""Saying how to get a file that is not there."""

from __future__ import annotations

from pathlib import Path

from proxydet.artifacts import Catalogue


def how_to_get(path: Path | None) -> str | None:
    """Return the command that fetches a file of the published layout; None for any other file.

    Args:
        path: Where it should be; None where that is not known.

    Raises:
        ConfigError: A catalogue file that the environment names cannot be read.
    """
    name = None if path is None else Catalogue.load().name_of_source(path)
    return None if name is None else f"get it with: proxydet download {name}"


def inner_root(folder: Path) -> str | None:
    """Return what to do where a folder is not the data root but holds it; None where it does not.

    ``proxydet download --root FOLDER`` puts data sets into ``FOLDER/datasets``, which is the data root.
    """
    inner = folder / "datasets"
    return f"the data root is the folder inside it: name {inner}" if inner.is_dir() else None
