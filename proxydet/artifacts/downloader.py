"""Everything a caller does with downloads, in one object: plan, fetch, verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from proxydet.artifacts.catalogue import Catalogue
from proxydet.artifacts.fetch import Report, fetch_all
from proxydet.artifacts.http import Client
from proxydet.artifacts.obtain import Job
from proxydet.artifacts.patience import RateLimit
from proxydet.artifacts.plan import Plan, make_plan, refuse_unpinned, with_announced_sizes
from proxydet.artifacts.root import Root
from proxydet.artifacts.settings import TransferSettings
from proxydet.artifacts.verify import Finding, verify_all
from proxydet.artifacts.wanted import Line
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
