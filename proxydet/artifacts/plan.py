"""Deciding what to do before anything is done: what is there, what must be fetched, and whether it fits."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.files import free_bytes
from proxydet.artifacts.http import Client
from proxydet.artifacts.look import Item, State, expected_digest, look
from proxydet.artifacts.root import Root
from proxydet.artifacts.workers import run_workers
from proxydet.errors import ArtifactError, DiskFullError
from proxydet.wording import counted, size_text

_MOST_ASKED = 60
_MOST_NAMED = 5
_ASKING_THREADS = 8


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
    archives_at_once: int
    """How many archives lie beside what they were unpacked to at any time; 0 for all of them."""

    @property
    def todo(self) -> tuple[Item, ...]:
        """What is not ready and can be worked on."""
        return tuple(
            item for item in self.items if item.state not in (State.READY, State.NEEDS_ACCOUNT)
        )

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes to come over the network, as far as sizes are published."""
        return sum(item.to_fetch or 0 for item in self.items)

    @property
    def unknown_sizes(self) -> int:
        """How many of the files to fetch have no published size."""
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


def make_plan(
    artifacts: Iterable[Artifact], root: Root, client: Client, *, keep_archives: bool = False
) -> Plan:
    """Look at what is there for each artifact and add up what is missing.

    Args:
        artifacts: What is wanted.
        root: Where files lie.
        client: Knows which credentials are at hand, and how many files are fetched at a time.
        keep_archives: Whether archives stay after unpacking.

    Raises:
        ArtifactError: A record under the root is damaged.
    """
    items = tuple(look(artifact, root, client) for artifact in artifacts)
    at_once = 0 if keep_archives else client.settings.jobs
    return Plan(items, _needs(items, root, at_once), at_once)


def refuse_unpinned(plan: Plan, root: Root) -> None:
    """Check that everything still to be done has a published or recorded digest, before anything is fetched.

    Args:
        plan: A plan.
        root: Where files lie.

    Raises:
        ArtifactError: Something has none, or a record under the root is damaged.
    """
    names = [
        item.artifact.name for item in plan.todo if expected_digest(item.artifact, root) is None
    ]
    if names:
        listed = ", ".join(names[:_MOST_NAMED]) + (" ..." if len(names) > _MOST_NAMED else "")
        raise ArtifactError(
            f"No digest is published for {counted(len(names), 'file')} ({listed}), and none is recorded here; "
            f"--strict refuses {'it' if len(names) == 1 else 'them'}.",
            hint="Without --strict digests are recorded on first use and checked ever after.",
        )


def with_announced_sizes(plan: Plan, root: Root, client: Client) -> Plan:
    """Ask servers for the sizes that are not published; what they do not tell stays unknown.

    Args:
        plan: A plan.
        root: Where files lie.
        client: Makes the requests, a few at a time, and no more than 60 in all.

    Raises:
        TransferError: An address redirects to where it must not.
    """
    waiting = deque([item for item in plan.items if item.to_fetch is None][:_MOST_ASKED])
    answers: dict[str, int | None] = {}

    def ask() -> None:
        while waiting:
            try:
                artifact = waiting.popleft().artifact
            except IndexError:  # another thread took the last one
                return
            size = client.announced_size(artifact.addresses[0], pinned=artifact.pinned)
            answers[artifact.name] = size

    run_workers([ask] * min(_ASKING_THREADS, len(waiting)), client.stop)
    items = tuple(replace(item, announced=answers.get(item.artifact.name)) for item in plan.items)
    return Plan(items, _needs(items, root, plan.archives_at_once), plan.archives_at_once)


def _needs(items: Iterable[Item], root: Root, jobs: int) -> tuple[Need, ...]:
    """Add up the room per file system.

    An archive and its files lie side by side until it is unpacked. Where archives are removed afterwards, no more
    than one a job is there at any time, plus one whose unpacking waits for its turn.
    """
    lasting: dict[int, int] = defaultdict(int)
    passing: dict[int, list[int]] = defaultdict(list)
    bases: dict[int, dict[Path, int]] = defaultdict(lambda: defaultdict(int))
    for item in items:
        base = root.base(item.artifact.target)
        device = _device(base)
        bases[device][base] += item.to_fetch or 0
        if item.must_fetch or item.state is State.PACKED:
            fetched = item.to_fetch or 0
            if item.artifact.unpack is None:
                lasting[device] += fetched
            else:
                lasting[device] += _unpacked_bytes(item.artifact)
                passing[device].append(fetched)
    return tuple(
        Need(
            folder=max(fetched_to, key=lambda folder: fetched_to[folder]),
            needed=lasting[device] + sum(sorted(passing[device], reverse=True)[: jobs or None]),
            free=free_bytes(next(iter(fetched_to))),
        )
        for device, fetched_to in bases.items()
    )


def _unpacked_bytes(artifact: Artifact) -> int:
    """Estimate what an archive unpacks to: the published sizes, but photographs do not shrink in archives."""
    provides = artifact.unpack.provides if artifact.unpack is not None else ()
    return max(artifact.size or 0, sum(provided.size or 0 for provided in provides))


def _device(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.stat().st_dev
