"""``proxydet.download``: a name in, a path out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from proxydet.artifacts.catalogue import Catalogue
from proxydet.artifacts.downloader import Downloader, DownloadOptions
from proxydet.artifacts.look import State
from proxydet.artifacts.plan import Plan
from proxydet.errors import ArtifactError
from proxydet.reporting import SILENT, Progress


def download(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    catalogue: Catalogue | None = None,
    options: DownloadOptions | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Make a file or data set ready on this machine and return where it is.

    What is there and right is used as it is; what is missing is fetched, checked and unpacked. Nothing is asked.

    Args:
        name: A name of the catalogue: ``"boxsup-r50"``, ``"lvis"``, ``"clip-vit-b32"``, a group, or a file name.
        root: Folder with ``models`` and ``datasets`` in it; None for those that `proxydet.paths` names.
        catalogue: Where to look the name up; None for the built-in catalogue and those of ``PROXYDET_CATALOGUE``.
        options: Connections, speed limit, mirror and more; its root, if any, comes before ``root``.
        progress: Where to show how far it is.

    Returns:
        The file; for an archive, what it was unpacked to; for several, the folder that holds them all.

    Raises:
        ConfigError: There is no such name.
        ArtifactError: It could not be had; the leaf says why.
        DiskFullError: There is no room.
    """
    options = options or DownloadOptions(root=None if root is None else Path(root))
    with Downloader(catalogue or Catalogue.load(), options, progress) as downloader:
        plan = downloader.plan([name])
        _require_credentials(name, plan)
        downloader.fetch(plan).raise_for_failures()
    return _common([item.path for item in plan.items])


def locate(
    name: str, *, root: str | os.PathLike[str] | None = None, catalogue: Catalogue | None = None
) -> Path:
    """Return where a file or data set is, without fetching anything.

    Args:
        name: As for `download`.
        root: As for `download`.
        catalogue: As for `download`.

    Raises:
        ConfigError: There is no such name.
        ArtifactError: It is not there; the hint names the command that fetches it.
    """
    options = DownloadOptions(root=None if root is None else Path(root))
    with Downloader(catalogue or Catalogue.load(), options) as downloader:
        plan = downloader.plan([name])
    for item in plan.items:
        if item.state not in (State.READY, State.UNCHECKED):
            where = "" if root is None else f" --root {root}"
            raise ArtifactError(
                f"{item.artifact.title} is not there ({item.path}).",
                hint=f"Run: proxydet download {name}{where}",
                path=item.path,
            )
    return _common([item.path for item in plan.items])


def _require_credentials(name: str, plan: Plan) -> None:
    locked = [item for item in plan.items if item.state is State.NEEDS_ACCOUNT]
    if locked:
        raise ArtifactError(
            f"{len(locked)} of {len(plan.items)} files of {name} need an account.",
            hint=locked[0].why,
        )


def _common(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([path.absolute() for path in paths]))
