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

import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from proxydet.artifacts.archives import Listing, read_listing
from proxydet.artifacts.catalogue import Artifact, Provided, Unpack
from proxydet.artifacts.http import Client
from proxydet.artifacts.transfer import Seen, kept_bytes
from proxydet.errors import ArtifactError, DiskFullError
from proxydet.files import Lock, read_json, write_json
from proxydet.paths import datasets_folder, models_folder
from proxydet.wording import size_text

LOCK_FILE = "artifacts.lock.json"
_HIDDEN_FOLDER = ".proxydet"


class Records:
    """Both records of one folder of downloads.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock_file = folder / LOCK_FILE
        self._ledger = folder / _HIDDEN_FOLDER / "ledger.json"
        self._cache: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}

    def first_seen(self, name: str) -> Seen | None:
        """Return what was recorded for an unpinned artifact, if anything.

        Raises:
            ArtifactError: The lock file is damaged.
        """
        entry = self._read(self.lock_file).get(name)
        try:
            return None if entry is None else msgspec.convert(entry, Seen)
        except msgspec.ValidationError as error:
            raise ArtifactError(
                f"The entry of {name} in {self.lock_file} is damaged: {error}.",
                hint="Remove that entry; the digest is then recorded again.",
                path=self.lock_file,
            ) from error

    def record_first(self, name: str, seen: Seen | None) -> None:
        """Record an unpinned artifact on first use, unless there is an entry; None removes its entry."""
        today = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = None if seen is None else msgspec.structs.replace(seen, when=today)
        self._update(self.lock_file, name, msgspec.to_builtins(entry), keep=seen is not None)

    def file(self, path: Path) -> dict[str, Any]:
        """Return what is known of a file that was checked and has not changed since.

        Returns:
            ``sha256``; ``fetched``: whether it was fetched here, and not put there by somebody; ``passing``: whether it
            is an archive that was to be removed as soon as it is unpacked. Empty where nothing is known.
        """
        entry = self._read(self._ledger).get(path.relative_to(self.folder).as_posix())
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        same = isinstance(entry, dict) and (
            (entry.get("size"), entry.get("time")) == (status.st_size, status.st_mtime_ns)
        )
        return entry if same else {}  # type: ignore[return-value]

    def record_file(
        self, path: Path, sha256: str, *, fetched: bool = False, passing: bool = False
    ) -> None:
        """Remember a file as it is now; see `file`."""
        status = path.stat()
        entry = {
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "sha256": sha256,
            "fetched": fetched,
            "passing": passing,
        }
        self._update(self._ledger, path.relative_to(self.folder).as_posix(), entry)

    def is_damaged(self, name: str) -> bool:
        """Return whether verification found an artifact damaged and it has not been fetched since."""
        return self._read(self._ledger).get(f"damaged: {name}") is True

    def record_damage(self, name: str, *, damaged: bool) -> None:
        """Remember that an artifact is damaged, or no longer so."""
        if damaged != self.is_damaged(name):
            self._update(self._ledger, f"damaged: {name}", damaged)

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a record, unless it is as it was read last."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._cache.get(path)
        if known is None or known[0] != version:
            known = self._cache[path] = (version, self._load(path))
        return known[1]

    def _load(self, path: Path) -> dict[str, Any]:
        hint = "Repair it, or move it away."
        return read_json(path, what="record", hint=hint, error=ArtifactError, default={})

    def _update(self, path: Path, key: str, entry: object, *, keep: bool = False) -> None:
        with Lock(self.folder / _HIDDEN_FOLDER / f"{path.name}.lock"):
            entries = self._load(path)
            if entry is None:
                entries.pop(key, None)
            elif not keep or key not in entries:
                entries[key] = entry
            write_json(path, entries, sort_keys=True)


class Root:
    """Where files of the catalogue lie on this machine.

    Args:
        folder: What catalogue paths (``models/...``, ``datasets/...``) are relative to; None for the folders that
            `proxydet.paths` names.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._records: dict[Path, Records] = {}

    def base(self, target: str) -> Path:
        """Return the folder that the first part of a catalogue path stands for; records lie there."""
        first = PurePosixPath(target).parts[0]
        if self._folder is not None:
            return self._folder / first
        known = {"models": models_folder, "datasets": datasets_folder}
        return known[first]() if first in known else Path(first)

    def path(self, target: str) -> Path:
        """Return where a catalogue path lies."""
        return self.base(target).joinpath(*PurePosixPath(target).parts[1:])

    def useful_path(self, artifact: Artifact) -> Path:
        """Return the path that an artifact is used by: the file, or what its archive unpacks to."""
        if artifact.unpack is None:
            return self.path(artifact.target)
        folder = self.path(artifact.unpack.folder)
        first = PurePosixPath(artifact.unpack.provides[0].path)
        return folder / (first if len(artifact.unpack.provides) == 1 else first.parent)

    def records(self, target: str) -> Records:
        """Return what is remembered about the files under the first part of a catalogue path."""
        base = self.base(target)
        return self._records.setdefault(base, Records(base))

    def first_seen(self, artifact: Artifact) -> Seen | None:
        """Return what was recorded of an unpinned artifact on first use, if anything; None for pinned ones."""
        return None if artifact.pinned else self.records(artifact.target).first_seen(artifact.name)

    def expected_digest(self, artifact: Artifact) -> str | None:
        """Return the digest that the file must have: the published one, or else that of first use."""
        seen = self.first_seen(artifact)
        return artifact.sha256 if seen is None else seen.sha256

    def listing(self, artifact: Artifact) -> Path:
        """Return where the list of the files that an archive unpacked to is kept."""
        name = artifact.name.replace("/", "__")
        return self.base(artifact.target) / _HIDDEN_FOLDER / "unpacked" / f"{name}.tsv"


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


@dataclass(frozen=True, kw_only=True)
class Item:
    """What was found for one artifact."""

    artifact: Artifact
    """The artifact."""
    state: State
    """What is there of it."""
    path: Path
    """The file, or the folder that its archive is unpacked to."""
    kept: int = 0
    """Bytes that an earlier run has fetched already."""
    announced: int | None = None
    """Size that the server gave when asked, where none is published."""
    why: str = ""
    """What is wrong or special, in a few words."""

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


def inspect(artifact: Artifact, root: Root, client: Client) -> Item:
    """Find out what is there of an artifact; nothing is changed.

    Args:
        artifact: The artifact.
        root: Where files lie.
        client: Knows which credentials are at hand.

    Raises:
        ArtifactError: A record under the root is damaged.
    """
    path, why = root.useful_path(artifact), ""
    if path.exists() and root.records(artifact.target).is_damaged(artifact.name):
        return Item(
            artifact=artifact, state=State.DIFFERENT, path=path, why="--verify found it damaged"
        )
    if artifact.unpack is not None:
        state, why = _inspect_unpacked(artifact, artifact.unpack, root)
        if state is not None:
            return Item(artifact=artifact, state=state, path=path, why=why)
    state, wrong = _inspect_file(artifact, root)
    if state is not None:
        if artifact.unpack is not None and state in (State.READY, State.UNCHECKED):
            state, wrong = State.PACKED, "not unpacked yet"
        return Item(artifact=artifact, state=state, path=path, why=wrong)
    kept = kept_bytes(root.path(artifact.target))
    state = State.PARTIAL if kept else State.ABSENT
    if artifact.login is not None and not any(map(client.has_credentials, artifact.addresses)):
        state, why = State.NEEDS_ACCOUNT, artifact.login.how
    return Item(artifact=artifact, state=state, path=path, kept=kept, why=why)


def _inspect_file(artifact: Artifact, root: Root) -> tuple[State | None, str]:
    path = root.path(artifact.target)
    if not path.exists():
        return None, ""
    if not path.is_file():
        return State.DIFFERENT, "it is not a file"
    seen = root.first_seen(artifact)
    size = artifact.size if seen is None else seen.size
    if size not in (None, path.stat().st_size):
        return State.DIFFERENT, f"it has {path.stat().st_size} bytes instead of {size}"
    known = root.records(artifact.target).file(path).get("sha256")
    expected = artifact.sha256 if seen is None else seen.sha256
    if known is None or expected is None:
        return State.UNCHECKED, ""
    return (State.READY, "") if known == expected else (State.DIFFERENT, "its digest is another")


def _inspect_unpacked(artifact: Artifact, rule: Unpack, root: Root) -> tuple[State | None, str]:
    """Return how the unpacked files stand; None where they are not there or not complete."""
    folder = root.path(rule.folder)
    listed = read_listing(root.listing(artifact))
    if listed is not None:
        missing = _missing(folder, listed)
        return (None, f"{missing} is missing") if missing else (State.READY, f"{len(listed)} files")
    state = State.READY
    for provided in rule.provides:
        path = folder / provided.path
        if (flaw := _flaw(provided, path)) is not None:
            return None, flaw
        if provided.sha256 not in (None, root.records(rule.folder).file(path).get("sha256")):
            state = State.UNCHECKED
    return state, "placed by hand"


def _flaw(provided: Provided, path: Path) -> str | None:
    """Return what a glance shows to be wrong with an unpacked file or folder; None where it is as it should be."""
    if not path.exists():
        return ""
    if path.is_dir():
        count, right = sum(len(names) for _, _, names in os.walk(path)), provided.files
        if provided.size is None and (count == right if right else count > 0):
            return None
        what = f"{path.name} holds {count} files"
    else:
        size, right = path.stat().st_size, provided.size
        if provided.files is None and right in (None, size):
            return None
        what = f"{path.name} has {size} bytes"
    return what + ("" if right is None else f" instead of {right}")


def _missing(folder: Path, names: Listing) -> str | None:
    """Return a file of a listing that is not there, if any, reading each folder once."""
    listed: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition("/")
        listed[parent].add(last)
    for parent, lasts in listed.items():
        place = folder / parent
        there = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
        if lasts - there:
            return f"{parent}/{min(lasts - there)}".lstrip("/")
    return None


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
        done = (State.READY, State.NEEDS_ACCOUNT)
        return tuple(item for item in self.items if item.state not in done)

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
