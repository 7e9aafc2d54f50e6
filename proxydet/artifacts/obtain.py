"""Making one artifact ready: look, then fetch, check, unpack, record, whatever is needed, under its lock."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from proxydet.artifacts.addresses import mirror_address
from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.content import content_check
from proxydet.artifacts.digest import file_digest
from proxydet.artifacts.files import FileLock, absent_folders, remove_empty
from proxydet.artifacts.look import Item, State, expected_digest, look
from proxydet.artifacts.meter import Meter
from proxydet.artifacts.patience import Stopped
from proxydet.artifacts.records import LOCK_FILE, FirstSeen
from proxydet.artifacts.replies import NotThere
from proxydet.artifacts.root import Root
from proxydet.artifacts.transfer import fetch_file
from proxydet.artifacts.unpacking import unpack
from proxydet.artifacts.wanted import Line, Received, Wanted
from proxydet.errors import ArchiveError, DigestError, ProxydetError
from proxydet.reporting import SILENT, Progress, Task
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

Status = Literal["ready", "checked", "fetched", "unpacked", "missing", "needs account"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one artifact."""

    name: str
    """The artifact."""
    status: Status
    """``ready``: nothing to do; ``checked``: was there, and its bytes are right; ``fetched``; ``unpacked``;
    ``missing``: its source does not have it, which was to be expected of some; ``needs account``."""
    path: Path
    """The file, or the folder that its archive was unpacked to."""
    bytes_fetched: int = 0
    """Bytes of the file that was fetched."""
    sha256: str | None = None
    """Digest of the file, where it was computed now."""
    address: str | None = None
    """Where it came from, where it was fetched now."""
    seconds: float = 0.0
    """How long it took."""
    note: str = ""
    """Anything special."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all artifacts of one call share."""

    root: Root
    """Where files lie."""
    line: Line
    """What transfers share."""
    progress: Progress = SILENT
    """Where to show how far it is."""
    total: Task | None = None
    """Counts the bytes of all files."""
    keep_archives: bool = False
    """Keep archives after unpacking them."""
    force: bool = False
    """Replace files that are there and wrong."""
    unpacking: threading.Lock = field(default_factory=threading.Lock)
    """Held while unpacking: two archives at once would only fight over the disk."""


def obtain(artifact: Artifact, job: Job, *, announced: int | None = None) -> Outcome:
    """Make an artifact ready.

    Args:
        artifact: The artifact.
        job: What it shares with others.
        announced: Size that its server gave when asked, to show how far it is.

    Raises:
        ArtifactError: It could not be had; the leaf says why.
        DiskFullError: There is no room.
    """
    started = time.monotonic()
    target = job.root.path(artifact.target)
    item = look(artifact, job.root, job.line.client)
    if item.state in (State.READY, State.NEEDS_ACCOUNT) and not _left_archive(item, job):
        return _done(item)
    folders = [target.parent]
    if artifact.unpack is not None:
        folders.append(job.root.path(artifact.unpack.folder))
    made = absent_folders(*folders)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    stop = job.line.client.stop
    lock.acquire(
        stop, lambda: _logger.warning("another process is at work on %s: waiting", artifact.name)
    )
    try:
        if stop.is_set():
            raise Stopped
        item = look(artifact, job.root, job.line.client)
        outcome = _act(replace(item, announced=announced), job, take_over=lock.held)
    finally:
        lock.release()
        remove_empty(made)
    return Outcome(**{**vars(outcome), "seconds": time.monotonic() - started})


def _act(item: Item, job: Job, *, take_over: bool) -> Outcome:
    artifact = item.artifact
    if item.state in (State.READY, State.NEEDS_ACCOUNT):
        if _left_archive(item, job):
            job.root.path(artifact.target).unlink(missing_ok=True)
            _logger.info("%s: removed its archive, which an interrupted run left", artifact.name)
        return _done(item)
    if item.state is State.DIFFERENT and not job.force:
        raise DigestError(
            f"{item.path} is there, but is not {artifact.name}: {item.why}.",
            hint="Move it away, or give --force to replace it.",
            path=item.path,
        )
    if item.state in (State.UNCHECKED, State.PACKED):
        try:
            return _check_there(item, job)
        except (DigestError, ArchiveError) as error:
            if not job.force:
                raise
            _logger.warning("%s Replacing it.", error.message)
    try:
        return _fetch(item, job, take_over=take_over)
    except NotThere as error:
        if not artifact.may_be_missing:
            raise
        return Outcome(name=artifact.name, status="missing", path=item.path, note=error.message)


def _left_archive(item: Item, job: Job) -> bool:
    """Tell whether a run that unpacked an archive was killed before it could remove it, as it was to."""
    artifact = item.artifact
    if artifact.unpack is None or item.state is not State.READY or job.keep_archives:
        return False
    return job.root.records(artifact).is_passing(job.root.path(artifact.target))


def _done(item: Item) -> Outcome:
    status: Status = "ready" if item.state is State.READY else "needs account"
    return Outcome(name=item.artifact.name, status=status, path=item.path, note=item.why)


def _check_there(item: Item, job: Job) -> Outcome:
    """Check a file that is there already: its digest, or what it holds where none is known."""
    artifact, target = item.artifact, job.root.path(item.artifact.target)
    if artifact.unpack is not None and item.state is State.UNCHECKED:
        return _check_unpacked(item, job)
    expected = expected_digest(artifact, job.root)
    records = job.root.records(artifact)
    digest = records.known_digest(target) or file_digest(target, job.progress, job.line.client.stop)
    if expected is not None and digest != expected:
        raise DigestError(
            f"{target} is there, but is not {artifact.name}: expected sha256 {expected}, got {digest}.",
            hint="Move it away, or give --force to replace it.",
            path=target,
        )
    holds = None
    if expected is None:
        check = content_check(artifact)
        try:
            holds = check.run(target) if check is not None else None
        except ProxydetError as error:
            raise DigestError(
                f"{target} is there, but is not {artifact.name}: {error.message}",
                hint="Move it away, or give --force to replace it.",
                path=target,
            ) from error
    ours = records.was_fetched(target)
    seen = FirstSeen(sha256=digest, size=target.stat().st_size, holds=holds)
    _record(artifact, job, seen, fetched=ours)
    outcome = Outcome(
        name=artifact.name, status="checked", path=item.path, sha256=digest, note=holds or ""
    )
    if artifact.unpack is None:
        return outcome
    return _unpacked(outcome, item, job, digest, keep=job.keep_archives or not ours)


def _check_unpacked(item: Item, job: Job) -> Outcome:
    """Check unpacked files that somebody placed by hand, where their digests are published."""
    rule = item.artifact.unpack
    for provided in rule.provides if rule is not None else ():
        if rule is None or provided.sha256 is None:
            continue
        path = job.root.path(rule.folder) / provided.path
        digest = file_digest(path, job.progress, job.line.client.stop)
        if digest != provided.sha256:
            raise DigestError(
                f"{path} is there, but is not the published file: expected sha256 {provided.sha256}, got {digest}.",
                hint="Move it away, or give --force to replace it.",
                path=path,
            )
        job.root.records_at(rule.folder).record_digest(path, digest)
    return Outcome(name=item.artifact.name, status="checked", path=item.path, note=item.why)


def _fetch(item: Item, job: Job, *, take_over: bool) -> Outcome:
    artifact = item.artifact
    wanted = _wanted(artifact, job)
    size = wanted.size if wanted.size is not None else item.announced
    with job.progress.task(artifact.file_name, total=size, unit="B") as task:
        meter = Meter(task, job.total)
        try:
            received = fetch_file(wanted, job.line, meter, take_over=take_over)
        except DigestError as error:
            if artifact.pinned or wanted.sha256 is None:
                raise
            raise _not_as_first(artifact, job.root, error) from error
        meter.finish()
    seen = FirstSeen(
        sha256=received.sha256,
        size=received.size,
        address=received.address,
        etag=received.etag,
        holds=received.holds,
    )
    _record(artifact, job, seen, fetched=True)
    outcome = _fetched(item, received)
    if artifact.unpack is None:
        return outcome
    try:
        return _unpacked(outcome, item, job, received.sha256, keep=job.keep_archives)
    except ArchiveError as error:
        if wanted.sha256 is not None:
            raise
        raise _taken_back(artifact, job.root, received, error) from error


def _not_as_first(artifact: Artifact, root: Root, error: DigestError) -> DigestError:
    record = root.records(artifact).root / LOCK_FILE
    return DigestError(
        error.message,
        hint=f"{record} holds the digest of its first use. If its source replaced the file and you trust the new "
        f"one, remove the entry of {artifact.name} there.",
        path=error.path,
    )


def _taken_back(
    artifact: Artifact, root: Root, received: Received, error: ArchiveError
) -> DigestError:
    """Forget an unpinned archive that was fetched and turned out not to be what the catalogue says.

    Only what passes the check of its content is a first use; else the wrong file would be held to ever after.
    """
    root.records(artifact).forget_first(artifact.name)
    root.path(artifact.target).unlink(missing_ok=True)
    return DigestError(
        f"What {received.address} served is not {artifact.name}: {error.message} It was thrown away.",
        hint="Try again later, or another source with --mirror.",
        path=root.path(artifact.target),
    )


def _wanted(artifact: Artifact, job: Job) -> Wanted:
    seen = None if artifact.pinned else job.root.records(artifact).first_seen(artifact.name)
    check = content_check(artifact) if seen is None and not artifact.pinned else None
    mirror = job.line.client.settings.mirror
    addresses = artifact.addresses
    if mirror is not None:
        addresses = (mirror_address(mirror, artifact.target), *addresses)
    return Wanted(
        name=artifact.name,
        target=job.root.path(artifact.target),
        addresses=addresses,
        size=artifact.size if seen is None else seen.size,
        sha256=artifact.sha256 if seen is None else seen.sha256,
        check=None if check is None else check.run,
        check_sees_all=check is not None and check.sees_all,
        page=artifact.page,
    )


def _fetched(item: Item, received: Received) -> Outcome:
    return Outcome(
        name=item.artifact.name,
        status="fetched",
        path=item.path,
        bytes_fetched=received.size,
        sha256=received.sha256,
        address=received.address,
        note=received.holds or "",
    )


def _record(artifact: Artifact, job: Job, seen: FirstSeen, *, fetched: bool) -> None:
    records, target = job.root.records(artifact), job.root.path(artifact.target)
    passing = fetched and artifact.unpack is not None and not job.keep_archives
    if not artifact.pinned:
        records.record_first(artifact.name, seen)
    records.record_digest(target, seen.sha256, fetched=fetched, passing=passing)
    records.record_damage(artifact.name, damaged=False)


def _unpacked(outcome: Outcome, item: Item, job: Job, digest: str, *, keep: bool) -> Outcome:
    try:
        with job.unpacking:
            count = unpack(item.artifact, digest, job.root, job.progress)
    except ArchiveError as error:
        advice = f"Remove {job.root.path(item.artifact.target)}, or give --force to fetch it again."
        hint = f"{error.hint} {advice}" if error.hint else advice
        raise ArchiveError(error.message, hint=hint, path=error.path) from error
    if not keep:
        job.root.path(item.artifact.target).unlink(missing_ok=True)
    return Outcome(**{**vars(outcome), "status": "unpacked", "note": counted(count, "file")})
