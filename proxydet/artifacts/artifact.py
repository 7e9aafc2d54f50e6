"""What the catalogue says of one file: its addresses, digest, licence, place, and what it unpacks to.

These classes are read from TOML by `proxydet.config.from_mapping`, so a wrong key or value in a catalogue file is an
error that names its place. Everything here is treated as hostile: names cannot leave the data root.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from proxydet.artifacts.addresses import check_address
from proxydet.errors import ConfigError, TransferError

_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._+-]{0,99})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_PART = 180
_LARGEST = 1 << 50


@dataclass(frozen=True, kw_only=True)
class Login:
    """A source that serves only those who have an account there."""

    site: str
    """Address of the page where one registers."""
    how: str
    """What to do, in one or two sentences."""


@dataclass(frozen=True, kw_only=True)
class Provided:
    """A file or folder that an archive unpacks to."""

    path: str
    """Relative to the folder that the archive is unpacked into."""
    files: int | None = None
    """Number of files in it, where it is a folder and the number is published."""
    size: int | None = None
    """Size in bytes, where it is a file and the size is published."""
    sha256: str | None = None
    """Digest, where it is a file and the digest is published."""

    def __post_init__(self) -> None:
        """Check the path and the numbers."""
        check_relative(self.path, "path")
        _check_count(self.files, "files")
        _check_count(self.size, "size")
        _check_sha256(self.sha256)


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """How an archive is unpacked."""

    folder: str
    """Folder, relative to the data root, that its members are written into."""
    provides: tuple[Provided, ...]
    """What must be there afterwards. Members outside of these first folders or files are refused."""

    def __post_init__(self) -> None:
        """Check the folder, and that something is provided."""
        check_relative(self.folder, "folder")
        if not self.provides:
            raise ConfigError("provides must name at least one file or folder.")

    @property
    def tops(self) -> frozenset[str]:
        """First path parts under which members may lie."""
        return frozenset(PurePosixPath(provided.path).parts[0] for provided in self.provides)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a file without a published digest must hold."""

    kind: Literal["checkpoint", "tensors", "image-tar"]
    """``checkpoint``: tensors of a published model; ``tensors``: any readable checkpoint; ``image-tar``: a tar of
    image files."""
    layout: Literal["r50", "swinb"] | None = None
    """The published model whose tensor names and shapes a checkpoint must have."""
    mixup_branch: bool = False
    """Whether the checkpoint holds the mixup branch too (ProxyDet), or not (BoxSup, Detic)."""
    any_shape: tuple[str, ...] = ()
    """Last name parts of tensors whose shape depends on the vocabulary trained on, which is another one here."""

    def __post_init__(self) -> None:
        """A checkpoint is checked against some layout."""
        if (self.kind == "checkpoint") != (self.layout is not None):
            raise ConfigError("layout belongs to kind = 'checkpoint', and is needed there.")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One file that can be downloaded."""

    name: str
    """Short name by which users ask for it."""
    title: str
    """What it is, in a few words."""
    addresses: tuple[str, ...]
    """Where it is served, in the order to try."""
    target: str
    """Path of the file under the data root, with forward slashes."""
    licence: str
    """Licence or terms."""
    size: int | None = None
    """Size in bytes; None where none is published."""
    sha256: str | None = None
    """Digest in lower-case hexadecimal; None where none is published (the artifact is unpinned)."""
    login: Login | None = None
    """The account that the source asks for."""
    page: str | None = None
    """A page from which a person can fetch it in a browser when everything else fails."""
    may_be_missing: bool = False
    """Whether the source may lack it: reported then, but no failure."""
    unpack: Unpack | None = None
    """How it is unpacked; None for a file that is used as it is."""
    content: Content | None = None
    """What it must hold, checked where there is no digest."""

    def __post_init__(self) -> None:
        """Check every field against what a hostile catalogue could try."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r} may hold only lower-case letters, digits and . _ + - ."
            )
        check_relative(self.target, "target")
        _check_count(self.size, "size")
        _check_sha256(self.sha256)
        if not self.addresses:
            raise ConfigError("addresses must name at least one address.")
        for address in self.addresses:
            try:
                check_address(address, pinned=self.pinned)
            except TransferError as error:
                raise ConfigError(f"addresses: {error.message}", hint=error.hint) from error

    @property
    def pinned(self) -> bool:
        """Whether its digest is published."""
        return self.sha256 is not None

    @property
    def file_name(self) -> str:
        """Last part of its path."""
        return PurePosixPath(self.target).name


def check_relative(path: str, what: str) -> None:
    """Check that a path stays inside the folder that it is relative to.

    Args:
        path: The path, with forward slashes.
        what: The catalogue key, for the message.

    Raises:
        ConfigError: It is absolute, leads upwards, or has parts that are hidden, too long or not printable.
    """
    for part in path.split("/"):
        bad = not part or part.startswith(".") or "\\" in part or not part.isprintable()
        if bad or len(part.encode()) > _LONGEST_PART:
            raise ConfigError(
                f"{what} {path!r} is not a plain relative path.",
                hint="Give a path inside the data root with forward slashes, without '..' or hidden parts.",
            )
    if re.match(r"[A-Za-z]:", path) or len(path) > 1000:
        raise ConfigError(f"{what} {path!r} is not a plain relative path.")


def _check_count(value: int | None, what: str) -> None:
    if value is not None and not 0 <= value <= _LARGEST:
        raise ConfigError(f"{what} must be between 0 and {_LARGEST}; it is {value}.")


def _check_sha256(value: str | None) -> None:
    if value is not None and not _SHA256.fullmatch(value):
        raise ConfigError("sha256 must be 64 lower-case hexadecimal digits.")
