"""What is there, what is missing, and whether it fits: decided before anything is done.

Two records lie in each folder of downloads:

``artifacts.lock.json``
    For each artifact without a published digest: digest, size and source of the file that was seen first. Every later
    file of that name must be the same. It may be shared with others, who then get the same guarantee.
``.proxydet/ledger.json``
    For each file that was checked: its size, time stamp and digest, so that it is not read through again, and
    whether it was fetched here; and which artifacts verification found damaged.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from proxydet.artifacts.catalogue import Artifact
from proxydet.artifacts.transfer import Seen
from proxydet.errors import ArtifactError, DiskFullError
from proxydet.files import Lock, read_json, write_json
from proxydet.paths import datasets_folder, models_folder
from proxydet.wording import size_text

LOCK_FILE = "artifacts.lock.json"
_HIDDEN_FOLDER = ".proxydet"


class Place:
    """Where one artifact lies on this machine, and what is recorded of it.

    Args:
        artifact: The artifact.
        root: What catalogue paths (``models/...``, ``datasets/...``) are relative to; None for the folders that
            `proxydet.paths` names.

    Attributes:
        base: The folder that the first part of its catalogue path stands for; the records lie there.
        target: The file.
        folder: The folder that it is unpacked into; that of the file where it is not unpacked.
        path: What it is used by: the file, or what its archive unpacks to.
        listing: The list of the files that it unpacked to.
        lock_file: The record of first uses.
    """

    def __init__(self, artifact: Artifact, root: Path | None = None) -> None:
        def locate(path: str) -> Path:
            first, *rest = PurePosixPath(path).parts
            known = {"models": models_folder, "datasets": datasets_folder}
            base = known[first]() if first in known and root is None else (root or Path()) / first
            return base.joinpath(*rest)

        self.artifact, self.target = artifact, locate(artifact.target)
        self.base = locate(artifact.target.partition("/")[0])
        self.folder, self.path = self.target.parent, self.target
        if artifact.unpack is not None:
            self.folder, provides = locate(artifact.unpack.folder), artifact.unpack.provides
            first = PurePosixPath(provides[0].path)
            self.path = self.folder / (first if len(provides) == 1 else first.parent)
        hidden = self.base / _HIDDEN_FOLDER
        self.listing = hidden / "unpacked" / f"{artifact.name.replace('/', '__')}.tsv"
        self.lock_file, self._ledger = self.base / LOCK_FILE, hidden / "ledger.json"

    def first_seen(self) -> Seen | None:
        """Return what was recorded on first use, where no digest is published.

        Raises:
            ArtifactError: The record is damaged.
        """
        name, entry = self.artifact.name, None
        if not self.artifact.pinned:
            entry = _read_record(self.lock_file).get(name)
        try:
            return None if entry is None else msgspec.convert(entry, Seen)
        except msgspec.ValidationError as error:
            raise ArtifactError(
                f"The entry of {name} in {self.lock_file} is damaged: {error}.",
                hint="Remove that entry; the digest is then recorded again.",
                path=self.lock_file,
            ) from error

    def record_first(self, seen: Seen | None) -> None:
        """Record the first use, unless there is an entry; None removes the entry."""
        today = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = None if seen is None else msgspec.structs.replace(seen, when=today)
        self._update(self.lock_file, self.artifact.name, msgspec.to_builtins(entry), keep=True)

    def checked(self, path: Path | None = None) -> dict[str, Any]:
        """Return what is known of a file that was checked and has not changed since.

        Args:
            path: A file that was unpacked; None for `target`.

        Returns:
            ``sha256``; ``fetched``: whether it was fetched here, and not put there by somebody; ``passing``: whether it
            is an archive that was to be removed as soon as it is unpacked. Empty where nothing is known.
        """
        path = path or self.target
        entry = _read_record(self._ledger).get(self._key(path))
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        there = (status.st_size, status.st_mtime_ns)
        same = isinstance(entry, dict) and (entry.get("size"), entry.get("time")) == there
        return entry if same else {}  # type: ignore[return-value]

    def record_checked(
        self, sha256: str, path: Path | None = None, *, fetched: bool = False, passing: bool = False
    ) -> None:
        """Remember a file as it is now; see `checked`."""
        path = path or self.target
        status = path.stat()
        entry = {"size": status.st_size, "time": status.st_mtime_ns, "sha256": sha256}
        entry |= {"fetched": fetched, "passing": passing}
        self._update(self._ledger, self._key(path), entry)

    @property
    def damaged(self) -> bool:
        """Whether verification found what lies here damaged; another file in its place is not."""
        mark = _read_record(self._ledger).get(f"damaged: {self.artifact.name}")
        # Earlier versions wrote True, for whatever lies here.
        return mark is True or (bool(mark) and mark == self._mark())

    @damaged.setter
    def damaged(self, damaged: bool) -> None:
        if damaged != self.damaged:
            mark = self._mark() if damaged else None
            self._update(self._ledger, f"damaged: {self.artifact.name}", mark)

    def _mark(self) -> list[int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return [status.st_ino, status.st_size, status.st_mtime_ns]

    def _key(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.base)).as_posix()

    def _update(self, path: Path, key: str, entry: object, *, keep: bool = False) -> None:
        with Lock(self.base / _HIDDEN_FOLDER / f"{path.name}.lock"):
            entries = _load(path)
            if entry is None:
                entries.pop(key, None)
            elif not keep or key not in entries:
                entries[key] = entry
            write_json(path, entries, sort_keys=True)


def _read_record(path: Path) -> dict[str, Any]:
    """Read a record, unless it is as it was read last."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    return _load_version(path, status.st_ino, status.st_size, status.st_mtime_ns)


def _load(path: Path, *_: int) -> dict[str, Any]:
    hint = "Repair it, or move it away."
    return read_json(path, what="record", hint=hint, error=ArtifactError, default={})


_load_version = functools.lru_cache(maxsize=8)(_load)


class State(Enum):
    """What is there of an artifact."""

    READY = "ready"
    """It is there and was checked, or as much of it as can be checked at a glance is right."""
    UNCHECKED = "unchecked"
    """It is there, but its bytes have not been checked yet."""
    PACKED = "packed"
    """Its archive is there, not unpacked."""
    PARTIAL = "partial"
    """A part of it has been fetched."""
    ABSENT = "absent"
    """It is not there."""
    DIFFERENT = "different"
    """Something else is there in its place."""
    NEEDS_ACCOUNT = "needs account"
    """It is not there, and its source wants an account for which no credentials are at hand."""


DONE = (State.READY, State.NEEDS_ACCOUNT)
"""The states of what is ready, or cannot be worked on."""


@dataclass(frozen=True)
class Item:
    """What was found for one artifact, at a glance or read through."""

    artifact: Artifact
    """The artifact."""
    state: State
    """What is there of it; read through, ``UNCHECKED`` means that nothing is known to check its bytes against."""
    path: Path
    """The file, or the folder that its archive is unpacked to."""
    why: str = ""
    """What was checked, or is wrong or special, in a few words."""
    sha256: str | None = None
    """Digest of the file where it is known; of an archive, where that is not unpacked."""
    kept: int = 0
    """Bytes that an earlier run has fetched already."""
    announced: int | None = None
    """Size that the server gave when asked, where none is published."""

    @property
    def must_fetch(self) -> bool:
        """Whether bytes have to come over the network."""
        return self.state in (State.PARTIAL, State.ABSENT)

    @property
    def size(self) -> int | None:
        """Size of the file, published or announced."""
        return self.artifact.size if self.artifact.size is not None else self.announced

    @property
    def to_fetch(self) -> int | None:
        """Bytes that have to come over the network; None where the size is not known."""
        if not self.must_fetch:
            return 0
        return None if self.size is None else max(self.size - self.kept, 0)


@dataclass(frozen=True, kw_only=True)
class Need:
    """The room that a plan takes on one file system."""

    folder: Path
    """A folder on it: the one into which most is fetched."""
    needed: int
    """Bytes, at the most crowded moment; files of unknown size are not counted."""
    free: int
    """Bytes that are free now."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    items: tuple[Item, ...]
    """What was found for each artifact."""
    needs: tuple[Need, ...]
    """The room it takes, per file system."""

    @property
    def todo(self) -> tuple[Item, ...]:
        """What is not ready and can be worked on."""
        return tuple(item for item in self.items if item.state not in DONE)

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes to come over the network, as far as sizes are known."""
        return sum(item.to_fetch or 0 for item in self.items)

    @property
    def unknown_sizes(self) -> int:
        """How many of the files to fetch have no known size."""
        return sum(item.to_fetch is None for item in self.items)

    def require_room(self) -> None:
        """Check that it fits.

        Raises:
            DiskFullError: It does not.
        """
        for need in self.needs:
            if need.needed > need.free:
                raise DiskFullError(
                    f"This needs {size_text(need.needed)} in {need.folder}, where {size_text(need.free)} are free.",
                    hint="Free some space, choose another place with --root, or ask for less at a time.",
                    path=need.folder,
                )
