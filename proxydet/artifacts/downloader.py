"""Everything a caller does with downloads: plan, fetch, verify; and ``proxydet.download``, a name in and a path out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from proxydet.artifacts.catalogue import Catalogue
from proxydet.artifacts.fetch import Report, fetch_all
from proxydet.artifacts.http import Client
from proxydet.artifacts.look import State
from proxydet.artifacts.obtain import Job
from proxydet.artifacts.patience import RateLimit
from proxydet.artifacts.plan import Plan, make_plan, refuse_unpinned, with_announced_sizes
from proxydet.artifacts.root import Root
from proxydet.artifacts.settings import TransferSettings
from proxydet.artifacts.verify import Finding, verify_all
from proxydet.artifacts.wanted import Line
from proxydet.errors import ArtifactError
from proxydet.reporting import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """How downloads are done."""

    root: Path | None = None
    """Folder with ``models`` and ``datasets`` in it; None for those that `proxydet.paths` names."""
    strict: bool = False
    """Refuse files for which no digest is published or recorded."""
    force: bool = False
    """Replace files that are there and wrong."""
    keep_archives: bool = False
    """Keep archives after unpacking them."""
    settings: TransferSettings = field(default_factory=TransferSettings)
    """Connections, patience, speed limit, mirror."""


class Downloader:
    """Plans, fetches and verifies files of a catalogue; a context manager that closes its connections.

    Args:
        catalogue: What can be downloaded.
        options: How.
        progress: Where to show how far it is.

    Raises:
        ConfigError: The cookie file that ``PROXYDET_COOKIES`` names cannot be read.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        options: DownloadOptions | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.catalogue = catalogue
        self.options = options or DownloadOptions()
        self._progress = progress
        self._root = Root(self.options.root)
        self._client = Client(self.options.settings)

    def __enter__(self) -> Downloader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.__exit__(kind, error, trace)

    def plan(self, names: Sequence[str]) -> Plan:
        """Look at what is there for names of the catalogue, and what has to be fetched.

        Raises:
            ConfigError: A name is not in the catalogue.
            ArtifactError: A record under the root is damaged, or a file is refused as `DownloadOptions.strict` says.
        """
        artifacts = self.catalogue.resolve(names)
        plan = make_plan(
            artifacts, self._root, self._client, keep_archives=self.options.keep_archives
        )
        if self.options.strict:
            refuse_unpinned(plan, self._root)
        return plan

    def ask_sizes(self, plan: Plan) -> Plan:
        """Complete a plan by asking servers for the sizes that are not published.

        Raises:
            TransferError: An address redirects to where it must not.
        """
        return with_announced_sizes(plan, self._root, self._client)

    def fetch(self, plan: Plan) -> Report:
        """Make everything in a plan ready, as far as possible; the report holds the failures.

        Raises:
            DiskFullError: It would not fit.
            KeyboardInterrupt: Ctrl-C; what was fetched is kept.
        """
        plan.require_room()
        job = Job(
            root=self._root,
            line=Line(client=self._client, rate=RateLimit(self.options.settings.limit_rate)),
            progress=self._progress,
            keep_archives=self.options.keep_archives,
            force=self.options.force,
        )
        return fetch_all(plan.items, job)

    def verify(self, names: Sequence[str]) -> list[Finding]:
        """Read files through again.

        Args:
            names: Which; none for all that are there.

        Raises:
            ConfigError: A name is not in the catalogue.
        """
        artifacts = self.catalogue.resolve(names) if names else tuple(self.catalogue.every())
        findings = verify_all(artifacts, self._root, self._progress, self._client.stop)
        return [finding for finding in findings if names or finding.verdict != "absent"]


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
