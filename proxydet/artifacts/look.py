"""Looking at what is there: for each file, whether it is ready, and if not, what is missing. Nothing is changed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath

from proxydet.artifacts.artifact import Artifact, Provided, Unpack
from proxydet.artifacts.http import Client
from proxydet.artifacts.partfile import kept_bytes
from proxydet.artifacts.root import Root
from proxydet.artifacts.staging import read_listing


class State(Enum):
    """How an artifact stands."""

    READY = "ready"
    """It is there and was checked, or as much of it as can be checked at a glance is right."""
    UNCHECKED = "unchecked"
    """It is there, but nobody has looked at its bytes yet."""
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
    """How it stands."""
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
    def to_fetch(self) -> int | None:
        """Bytes that have to come over the network; None where the size is not known."""
        if not self.must_fetch:
            return 0
        size = self.artifact.size if self.artifact.size is not None else self.announced
        return None if size is None else max(size - self.kept, 0)


def look(artifact: Artifact, root: Root, client: Client) -> Item:
    """Look at what is there for an artifact.

    Args:
        artifact: The artifact.
        root: Where files lie.
        client: Knows which credentials are at hand.

    Raises:
        ArtifactError: A record under the root is damaged.
    """
    path = useful_path(artifact, root)
    if path.exists() and root.records(artifact).is_damaged(artifact.name):
        why = "--verify found it damaged"
        return Item(artifact=artifact, state=State.DIFFERENT, path=path, why=why)
    lacking = ""
    if artifact.unpack is not None:
        state, why = _look_unpacked(artifact, artifact.unpack, root)
        if state is not None:
            return Item(artifact=artifact, state=state, path=path, why=why)
        lacking = why
    state, why = _look_file(artifact, root)
    if artifact.unpack is not None and state in (State.READY, State.UNCHECKED):
        state, why = State.PACKED, "not unpacked yet"
    if state is not None:
        return Item(artifact=artifact, state=state, path=path, why=why)
    return _absent(artifact, path, root, client, lacking)


def expected_digest(artifact: Artifact, root: Root) -> str | None:
    """Return the digest that the file must have: the published one, or else the one recorded on first use.

    Raises:
        ArtifactError: The record is damaged.
    """
    if artifact.sha256 is not None:
        return artifact.sha256
    seen = root.records(artifact).first_seen(artifact.name)
    return None if seen is None else seen.sha256


def useful_path(artifact: Artifact, root: Root) -> Path:
    """Return the path that an artifact is used by: the file, or what its archive unpacks to."""
    if artifact.unpack is None:
        return root.path(artifact.target)
    folder = root.path(artifact.unpack.folder)
    provides = artifact.unpack.provides
    return (
        folder / provides[0].path
        if len(provides) == 1
        else folder / PurePosixPath(provides[0].path).parent
    )


def _absent(artifact: Artifact, path: Path, root: Root, client: Client, why: str) -> Item:
    kept = kept_bytes(root.path(artifact.target))
    state = State.PARTIAL if kept else State.ABSENT
    if artifact.login is not None and not any(map(client.has_credentials, artifact.addresses)):
        state, why = State.NEEDS_ACCOUNT, artifact.login.how
    return Item(artifact=artifact, state=state, path=path, kept=kept, why=why)


def _look_file(artifact: Artifact, root: Root) -> tuple[State | None, str]:
    path = root.path(artifact.target)
    if not path.exists():
        return None, ""
    if not path.is_file():
        return State.DIFFERENT, "a folder is in its place"
    seen = None if artifact.pinned else root.records(artifact).first_seen(artifact.name)
    size = seen.size if seen is not None else artifact.size
    if size is not None and path.stat().st_size != size:
        return State.DIFFERENT, f"it has {path.stat().st_size} bytes instead of {size}"
    known = root.records(artifact).known_digest(path)
    expected = seen.sha256 if seen is not None else artifact.sha256
    if known is None or expected is None:
        return State.UNCHECKED, ""
    return (
        (State.READY, "") if known == expected else (State.DIFFERENT, "its digest is another one")
    )


def _look_unpacked(artifact: Artifact, unpack: Unpack, root: Root) -> tuple[State | None, str]:
    """Return how the unpacked files stand; None where they are not there or not complete."""
    folder = root.path(unpack.folder)
    there = read_listing(root.listing(artifact))
    if there is not None:
        _, files = there
        lacking = missing_names(folder, files)
        return (
            (State.READY, f"{len(files)} files")
            if not lacking
            else (None, f"{lacking[0]} is missing")
        )
    records = root.records_at(unpack.folder)
    states: list[State] = []
    for provided in unpack.provides:
        path = folder / provided.path
        flaw = _lacking(provided, path)
        if flaw is not None:
            return None, flaw
        known = provided.sha256 is None or records.known_digest(path) == provided.sha256
        states.append(State.READY if known else State.UNCHECKED)
    state = State.UNCHECKED if State.UNCHECKED in states else State.READY
    return state, "placed by hand"


def _lacking(provided: Provided, path: Path) -> str | None:
    """Say what a glance tells to be wrong with an unpacked file or folder; None where it is as it should be."""
    if not path.exists():
        return ""
    if path.is_dir():
        count = _count_files(path)
        right = provided.size is None and (count == provided.files if provided.files else count > 0)
        return None if right else f"{path.name} holds {count} files" + _of(provided.files)
    size = path.stat().st_size
    right = provided.files is None and provided.size in (None, size)
    return None if right else f"{path.name} has {size} bytes" + _of(provided.size)


def _of(number: int | None) -> str:
    return "" if number is None else f" instead of {number}"


def _count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def missing_names(folder: Path, names: Iterable[str]) -> list[str]:
    """Return which files of a listing are not there, reading each folder once.

    Args:
        folder: What the names are relative to.
        names: Relative paths with forward slashes.
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition("/")
        wanted[parent].add(last)
    lacking: list[str] = []
    for parent, lasts in wanted.items():
        place = folder / parent
        there = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
        lacking.extend(f"{parent}/{last}".lstrip("/") for last in sorted(lasts - there))
    return lacking
