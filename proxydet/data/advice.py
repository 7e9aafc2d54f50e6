"""Saying how to get a file that is not there."""

from __future__ import annotations

from pathlib import Path

from proxydet.artifacts.catalogue import Catalogue


def how_to_get(path: Path | None) -> str | None:
    """Return the command that fetches a file of the published layout; None for any other file.

    Args:
        path: Where it should be; None where that is not known.

    Raises:
        ConfigError: A catalogue file that the environment names cannot be read.
    """
    name = None if path is None else Catalogue.load().name_of_source(path)
    return None if name is None else f"get it with: proxydet download {name}"
