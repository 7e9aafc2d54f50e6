"""What a transfer is asked for, what it gives back, and what all transfers of a job share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from proxydet.artifacts import google_drive
from proxydet.artifacts.http import Client
from proxydet.artifacts.patience import RateLimit


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The file to fetch."""

    name: str
    """What messages call it."""
    target: Path
    """Its final path."""
    addresses: tuple[str, ...]
    """Where it is served, in the order to try."""
    size: int | None = None
    """Its size in bytes, where known."""
    sha256: str | None = None
    """Its digest, where known."""
    check: Callable[[Path], str | None] | None = None
    """Looks at what the finished file holds, raises `ProxydetError` if it is wrong, and says what it found."""
    check_sees_all: bool = False
    """Whether that check would notice any changed byte, because the format carries check sums."""
    page: str | None = None
    """A page from which a person can fetch it."""

    @property
    def pinned(self) -> bool:
        """Whether a digest decides in the end which bytes are right."""
        return self.sha256 is not None

    @property
    def may_be_html(self) -> bool:
        """Whether the file is itself a web page."""
        return self.target.suffix.lower() in (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class Received:
    """A file that has arrived."""

    sha256: str
    """Its digest."""
    size: int
    """Its size in bytes."""
    address: str
    """Where it came from, as messages may show it."""
    etag: str | None
    """The server's name for that version."""
    holds: str | None
    """What the check of its content found."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What all transfers of a job share."""

    client: Client
    """Makes the requests."""
    rate: RateLimit
    """The speed limit over all of them."""
    drive_hosts: Collection[str] = field(default=google_drive.HOSTS)
    """Hosts treated as Google Drive."""

    def is_drive(self, address: str) -> bool:
        """Tell whether an address belongs to Google Drive."""
        return google_drive.is_drive(address, self.drive_hosts)
