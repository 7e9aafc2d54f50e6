"""``proxydet.download``: a name in, a path out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from proxydet.artifacts.catalogue import Catalogue
from proxydet.artifacts.fetch import fetch_all
from proxydet.artifacts.http import Client
from proxydet.artifacts.look import State, look, useful_path
from proxydet.artifacts.obtain import Job
from proxydet.artifacts.patience import RateLimit
from proxydet.artifacts.plan import Plan, make_plan
from proxydet.artifacts.root import Root
from proxydet.artifacts.settings import TransferSettings
from proxydet.artifacts.wanted import Line
from proxydet.errors import ArtifactError
from proxydet.reporting import SILENT, Progress


def download(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    catalogue: Catalogue | None = None,
    settings: TransferSettings | None = None,
    strict: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Make a file or data set ready on this machine and return where it is.

    What is there and right is used as it is; what is missing is fetched, checked and unpacked. Nothing is asked.

    Args:
        name: A name of the catalogue: ``"boxsup-r50"``, ``"lvis"``, ``"clip-vit-b32"``, a group, or a file name.
        root: Folder with ``models`` and ``datasets`` in it; None for those that `proxydet.paths` names.
        catalogue: Where to look the name up; None for the built-in catalogue and those of ``PROXYDET_CATALOGUE``.
        settings: Connections, speed limit, mirror.
        strict: Refuse files for which no digest is published or recorded.
        progress: Where to show how far it is.

    Returns:
        The file; for an archive, what it was unpacked to; for several, the folder that holds them all.

    Raises:
        ConfigError: There is no such name.
        ArtifactError: It could not be had; the leaf says why.
        DiskFullError: There is no room.
    """
    artifacts = (catalogue or Catalogue.load()).resolve([name])
    place = Root(None if root is None else Path(root))
    with Client(settings or TransferSettings()) as client:
        plan = make_plan(artifacts, place, client)
        plan.require_room()
        _require_credentials(name, plan)
        line = Line(client=client, rate=RateLimit(client.settings.limit_rate))
        report = fetch_all(plan.items, Job(root=place, line=line, progress=progress, strict=strict))
    report.raise_for_failures()
    return _common([useful_path(artifact, place) for artifact in artifacts])


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
    artifacts = (catalogue or Catalogue.load()).resolve([name])
    place = Root(None if root is None else Path(root))
    with Client(TransferSettings()) as client:
        items = [look(artifact, place, client) for artifact in artifacts]
    for artifact, item in zip(artifacts, items, strict=True):
        if item.state not in (State.READY, State.UNCHECKED):
            where = "" if root is None else f" --root {root}"
            raise ArtifactError(
                f"{artifact.title} is not there ({item.path}).",
                hint=f"Run: proxydet download {name}{where}",
                path=item.path,
            )
    return _common([useful_path(artifact, place) for artifact in artifacts])


def _require_credentials(name: str, plan: Plan) -> None:
    locked = [item for item in plan.items if item.state is State.NEEDS_ACCOUNT]
    if locked:
        raise ArtifactError(
            f"{len(locked)} of {len(plan.items)} files of {name} need an account.",
            hint=locked[0].why,
        )


def _common(paths: Sequence[Path]) -> Path:
    return (
        paths[0]
        if len(paths) == 1
        else Path(os.path.commonpath([path.absolute() for path in paths]))
    )
