"""Making artifacts ready: inspected, fetched, checked, recorded, unpacked, whatever is needed, each under its lock."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from proxydet.artifacts.addresses import host_of
from proxydet.artifacts.archives import Listing, read_listing, unpack
from proxydet.artifacts.catalogue import Artifact, Catalogue, Unpack
from proxydet.artifacts.content import check_content
from proxydet.artifacts.http import Client, NotFoundError, StoppedError, TransferSettings
from proxydet.artifacts.plan import DONE, Item, Need, Place, Plan, State
from proxydet.artifacts.transfer import Seen, Transfer, kept_bytes
from proxydet.errors import (
    ArchiveError,
    ArtifactError,
    DigestError,
    DiskFullError,
    ProxydetError,
    TransferError,
)
from proxydet.files import Lock, free_bytes, open_regular, sha256
from proxydet.reporting import SILENT, Progress, Task
from proxydet.wording import counted

_logger = logging.getLogger(__name__)

_FAILURES_OF_A_HOST = 3
_MOST_ASKED = 60

_VERDICTS = {State.READY: "sound", State.DIFFERENT: "damaged", State.ABSENT: "absent",
             State.UNCHECKED: "unproven"}  # fmt: skip


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
    """Connections, attempts, speed limit, mirror."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result for one artifact."""

    name: str
    """The artifact."""
    status: str
    """After fetching, ``ready``: nothing to do; ``checked``: was there, and its bytes are right; ``fetched``; ``unpacked``;
    ``missing``: its source does not have it, which was to be expected of some; ``needs account``. After verification,
    ``sound``: every byte is right; ``damaged``; ``absent``; ``unproven``: nothing is known to check its bytes against."""
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
    """Anything special: what it holds, what was checked, or what is wrong."""


@dataclass
class Report:
    """The results for all artifacts of a job."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Those that ended without an error, in the order in which they ended."""
    failures: dict[str, ProxydetError] = field(default_factory=dict)
    """Why the others failed, by their names."""

    def raise_for_failures(self) -> None:
        """Raise what went wrong, if anything did: the one error, or one that sums them up.

        Raises:
            DiskFullError: The disk is full.
            ArtifactError: Anything else.
        """
        if not self.failures:
            return
        errors = list(self.failures.values())
        full = next((error for error in errors if isinstance(error, DiskFullError)), None)
        if full is not None or len(errors) == 1:
            raise full or errors[0]
        lines = [f"  {name}: {error.message}" for name, error in self.failures.items()][:10]
        if len(errors) > 10:
            lines.append(f"  and {len(errors) - 10} more")
        head = f"{len(errors)} of {len(self.outcomes) + len(errors)} files failed to download:"
        raise ArtifactError(
            "\n".join([head, *lines]),
            hint=errors[0].hint or "Run the same command again: what was fetched is kept.",
        )


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
        self._client = Client(self.options.settings)
        self._unpacking = threading.Lock()  # two archives at once would only fight over the disk

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.__exit__(*error)

    def plan(self, names: Sequence[str]) -> Plan:
        """Inspect what is there for names of the catalogue, and what has to be fetched.

        Raises:
            ConfigError: A name is not in the catalogue.
            ArtifactError: A record under the root is damaged, or a file is refused as `DownloadOptions.strict` says.
        """
        items = [self._inspect(artifact) for artifact in self.catalogue.resolve(names)]
        plan = self._plan(items)
        if self.options.strict:
            todo = [self._place(item.artifact) for item in plan.todo]
            loose = [p.artifact for p in todo if not p.artifact.pinned and p.first_seen() is None]
            if loose:
                listed = ", ".join(artifact.name for artifact in loose[:5])
                listed += " ..." if len(loose) > 5 else ""
                raise ArtifactError(
                    f"No digest is published for {counted(len(loose), 'file')} ({listed}), and none is recorded here; "
                    f"--strict refuses {'it' if len(loose) == 1 else 'them'}.",
                    hint="Without --strict digests are recorded on first use and checked ever after.",
                )
        return plan

    def ask_sizes(self, plan: Plan) -> Plan:
        """Complete a plan by asking servers for the sizes that are not published, 60 at most."""
        sizes: dict[str, int | None] = {}

        def ask(artifact: Artifact) -> None:
            address = artifact.addresses[0]
            sizes[artifact.name] = self._client.announced_size(address, pinned=artifact.pinned)

        unknown = [item.artifact for item in plan.items if item.to_fetch is None][:_MOST_ASKED]
        self._client.run_in_threads([partial(ask, artifact) for artifact in unknown], at_once=8)
        return self._plan([replace(i, announced=sizes.get(i.artifact.name)) for i in plan.items])

    def _plan(self, items: list[Item]) -> Plan:
        """Add up the room that items take.

        An archive and its files lie side by side until it is unpacked. Where archives are removed afterwards, no more
        than one a job is there at any time, plus one whose unpacking waits for its turn.
        """
        lasting: dict[int, int] = defaultdict(int)
        passing: dict[int, list[int]] = defaultdict(list)
        bases: dict[int, dict[Path, int]] = defaultdict(lambda: defaultdict(int))
        for item in items:
            base, fetched = self._place(item.artifact).base, item.to_fetch or 0
            place = base.absolute()
            while not place.exists() and place != place.parent:
                place = place.parent
            device = place.stat().st_dev
            bases[device][base] += fetched
            if item.artifact.unpack is None:
                lasting[device] += fetched
            elif item.must_fetch or item.state is State.PACKED:
                # The published sizes; but photographs do not shrink in archives.
                unpacked = sum(provided.size or 0 for provided in item.artifact.unpack.provides)
                lasting[device] += max(item.artifact.size or 0, unpacked)
                passing[device].append(fetched)
        at_once = None if self.options.keep_archives else self.options.settings.jobs
        needs = []
        for device, folders in bases.items():
            most = max(folders, key=lambda folder: folders[folder])
            needed = lasting[device] + sum(sorted(passing[device], reverse=True)[:at_once])
            needs.append(Need(folder=most, needed=needed, free=free_bytes(most)))
        return Plan(tuple(items), tuple(needs))

    def fetch(self, plan: Plan) -> Report:
        """Make everything in a plan ready, as far as possible, several at a time; the report holds the failures.

        A failure of one does not stop the others, except for a full disk. A host that refuses or fails several files in
        a row is not asked for more.

        Raises:
            DiskFullError: It would not fit.
            KeyboardInterrupt: Ctrl-C; what was fetched is kept.
        """
        plan.require_room()
        report, lock, full = Report(), threading.Lock(), threading.Event()
        failed: Counter[str] = Counter()  # in a row, by host

        def work(item: Item, total: Task | None) -> None:
            name, host = item.artifact.name, host_of(item.artifact.addresses[0])
            if full.is_set():
                return
            try:
                if failed[host] >= _FAILURES_OF_A_HOST:
                    raise ArtifactError(f"not tried: {host} failed several times in a row.")
                outcome = self._ensure(item, total)
            except StoppedError:
                return
            except ProxydetError as error:
                _logger.info("%s: %s", name, error.message)
                with lock:
                    report.failures[name] = error
                    failed[host] += isinstance(error, TransferError)
                if isinstance(error, DiskFullError):
                    full.set()
            else:
                with lock:
                    report.outcomes.append(outcome)
                    failed[host] = 0

        # What an earlier run fetched is counted as soon as it is taken up.
        sizes = [item.size if item.must_fetch else 0 for item in plan.items]
        known = None if None in sizes else sum(size or 0 for size in sizes)
        try:
            with contextlib.ExitStack() as stack:
                total = None
                if len(plan.items) > 1:
                    shown = self._progress.task("all files", total=known, unit="B")
                    total = stack.enter_context(shown)
                jobs = [partial(work, item, total) for item in plan.items]
                self._client.run_in_threads(jobs, at_once=self.options.settings.jobs)
        except BaseException:
            self._client.stop.set()
            raise
        return report

    def _ensure(self, item: Item, total: Task | None) -> Outcome:
        """Make one artifact ready, under its lock.

        Raises:
            ArtifactError: It failed to download; the leaf says why.
            DiskFullError: There is no room.
        """
        started, artifact, stop = time.monotonic(), item.artifact, self._client.stop
        place, now = self._place(artifact), self._inspect(artifact)
        target = place.target
        if now.state in DONE and not self._left_archive(now):
            return self._outcome(now, now.state.value)
        folders = (target.parent, place.folder)
        absent = {p for folder in folders for p in (folder, *folder.parents) if not p.exists()}
        lock = Lock(target.with_name(f".{target.name}.lock"), subject=artifact.name)
        lock.acquire(until=stop.is_set)
        try:
            if stop.is_set():
                raise StoppedError
            now = self._inspect(artifact)
            outcome = self._act(replace(now, announced=item.announced), total, lock)
        finally:
            lock.release()
            for folder in sorted(absent, key=lambda folder: len(folder.parts), reverse=True):
                with contextlib.suppress(OSError):  # not made, or not empty
                    folder.rmdir()
        return replace(outcome, seconds=time.monotonic() - started)

    def _act(self, item: Item, total: Task | None, lock: Lock) -> Outcome:
        artifact, force, place = item.artifact, self.options.force, self._place(item.artifact)
        if item.state in DONE:
            if self._left_archive(item):
                place.target.unlink(missing_ok=True)
                _logger.info("%s: removed its archive, left by an interrupted run", artifact.name)
            return self._outcome(item, item.state.value)
        there = item.state in (State.UNCHECKED, State.PACKED)
        found = self._check(place, read="unknown") if there else item
        if found.state is State.DIFFERENT:
            error = DigestError(
                f"{found.path} is there, but is not {artifact.name}: {found.why.rstrip('.')}.",
                hint="Move it away, or give --force to replace it.",
                path=found.path,
            )
            if not force:
                raise error
            _logger.warning("%s Replacing it.", error.message)
        elif there:
            note = found.why if found.state is State.UNCHECKED or found.sha256 is None else ""
            outcome = self._outcome(item, "checked", sha256=found.sha256, note=note)
            if found.sha256 is None:  # placed unpacked
                return outcome
            fetched = place.checked().get("fetched") is True
            size = place.target.stat().st_size
            self._record(place, Seen(sha256=found.sha256, size=size, holds=note or None), fetched)
            try:
                return self._unpack(outcome, place, keep=self.options.keep_archives or not fetched)
            except ArchiveError as error:
                if not force:
                    raise
                _logger.warning("%s Replacing it.", error.message)
        try:
            return self._fetch(item, total, lock)
        except NotFoundError as error:
            if not artifact.may_be_missing:
                raise
            return self._outcome(item, "missing", note=error.message)

    def _outcome(self, item: Item, status: str, **fields: Any) -> Outcome:
        told = {"note": item.why, **fields} if item.state in DONE else fields
        return Outcome(name=item.artifact.name, status=status, path=item.path, **told)

    def _left_archive(self, item: Item) -> bool:
        """Return whether a run that unpacked an archive was killed before it could remove it, as it was to."""
        packed = item.artifact.unpack is not None and item.state is State.READY
        if not packed or self.options.keep_archives:
            return False
        return self._place(item.artifact).checked().get("passing") is True

    def _fetch(self, item: Item, total: Task | None, lock: Lock) -> Outcome:
        artifact, place = item.artifact, self._place(item.artifact)
        first = place.first_seen()
        size = item.size if first is None else first.size
        with self._progress.task(artifact.file_name, total=size, unit="B") as task:

            def count(change: int) -> None:
                if lock.lost:  # this process was suspended for long
                    message = f"Another process has taken over {artifact.name}."
                    raise ArtifactError(message, hint="Run the same command again.")
                task.advance(change)
                if total is not None:
                    total.advance(change)

            transfer = Transfer(artifact, place.target, first, self._client, count)
            try:
                seen = transfer.run(take_over=lock.held)
            except DigestError as error:
                if first is None:
                    raise
                hint = f"{place.lock_file} holds the digest of its first use. If its source replaced the file and you trust the new one, remove the entry of {artifact.name} there."
                raise DigestError(error.message, hint=hint, path=error.path) from error
        self._record(place, seen, fetched=True)
        came = {"bytes_fetched": seen.size, "sha256": seen.sha256, "address": seen.address}
        outcome = self._outcome(item, "fetched", note=seen.holds or "", **came)
        try:
            return self._unpack(outcome, place, keep=self.options.keep_archives)
        except ArchiveError as error:
            if artifact.pinned or first is not None:
                raise
            # Only what unpacks is a first use; else the wrong file would be held to ever after.
            place.record_first(None)
            place.target.unlink(missing_ok=True)
            raise DigestError(
                f"What {seen.address} served is not {artifact.name}: {error.message} It was deleted.",
                hint="Try again later, or another source: proxydet download --mirror.",
                path=place.target,
            ) from error

    def _record(self, place: Place, seen: Seen, fetched: bool) -> None:
        artifact = place.artifact
        if not artifact.pinned:
            place.record_first(seen)
        passing = fetched and artifact.unpack is not None and not self.options.keep_archives
        place.record_checked(seen.sha256, fetched=fetched, passing=passing)
        place.damaged = False

    def _unpack(self, outcome: Outcome, place: Place, *, keep: bool) -> Outcome:
        rule, target, digest = place.artifact.unpack, place.target, outcome.sha256
        if rule is None or digest is None:
            return outcome
        try:
            with self._unpacking:
                count = unpack(
                    target, rule, folder=place.folder, listing=place.listing, digest=digest,
                    progress=self._progress, stop=self._client.stop,
                )  # fmt: skip
        except ArchiveError as error:
            advice = f"Remove {target}, or give --force to fetch it again."
            hint = f"{error.hint} {advice}" if error.hint else advice
            raise ArchiveError(error.message, hint=hint, path=error.path) from error
        if not keep:
            target.unlink(missing_ok=True)
        return replace(outcome, status="unpacked", note=counted(count, "file"))

    # ---- is what lies here right? --------------------------------------------------------------------------------------

    def verify(self, names: Sequence[str]) -> list[Outcome]:
        """Read files through again: is every byte still what it was?

        Damage is remembered: a damaged artifact no longer counts as ready.

        Args:
            names: Which; none for all that are there.

        Raises:
            ConfigError: A name is not in the catalogue.
        """
        outcomes = []
        for artifact in self.catalogue.resolve(names) if names else self.catalogue.every():
            place = self._place(artifact)
            try:
                found = self._check(place, read="all")
            except StoppedError:
                raise
            except ProxydetError as error:
                found = Item(artifact, State.DIFFERENT, place.path, error.message)
            place.damaged = found.state is State.DIFFERENT
            status, note = _VERDICTS[found.state], found.why
            if status == "unproven" and found.sha256 is not None:
                note = "; ".join(filter(None, [note, "no digest is published or recorded"]))
            if names or status != "absent":
                outcome = Outcome(name=artifact.name, status=status, path=found.path, note=note)
                outcomes.append(outcome)
        return outcomes

    def _inspect(self, artifact: Artifact) -> Item:
        """Find out what is there of an artifact, at a glance; nothing is changed.

        Raises:
            ArtifactError: A record under the root is damaged.
        """
        place = self._place(artifact)
        if place.path.exists() and place.damaged:
            return Item(artifact, State.DIFFERENT, place.path, "--verify found it damaged")
        found = replace(self._check(place, read="nothing"), path=place.path)
        if found.state is not State.ABSENT:
            return found
        login = artifact.login
        if login is not None and not any(map(self._client.has_credentials, artifact.addresses)):
            return replace(found, state=State.NEEDS_ACCOUNT, why=login.how)
        kept = kept_bytes(place.target)
        return replace(found, state=State.PARTIAL if kept else State.ABSENT, kept=kept)

    def _place(self, artifact: Artifact) -> Place:
        return Place(artifact, self.options.root)

    def _check(self, place: Place, *, read: Literal["nothing", "unknown", "all"]) -> Item:
        """Check what lies there.

        Args:
            place: Where.
            read: Which files to read through: none, so that their digests are those of earlier checks; those that were not
                checked yet; or all.

        Raises:
            ArtifactError: A record is damaged, or a file cannot be read.
            StoppedError: The job was stopped.
        """
        artifact, target, why = place.artifact, place.target, ""
        if artifact.unpack is not None:
            listed = read_listing(place.listing)
            if listed is None:
                found = self._check_placed(place, artifact.unpack, read)
            else:
                found = self._check_listed(place, listed, read)
            if found.state is not State.ABSENT:
                return found
            why = found.why
        if not target.exists():
            return Item(artifact, State.ABSENT, place.path, why)
        if not target.is_file():
            return Item(artifact, State.DIFFERENT, target, "it is not a file")
        seen, there = place.first_seen(), target.stat().st_size
        size = artifact.size if seen is None else seen.size
        if size not in (None, there):
            why = f"it has {there} bytes instead of {size}"
            return Item(artifact, State.DIFFERENT, target, why)
        digest = None if read == "all" else place.checked().get("sha256")
        if digest is None and read != "nothing":
            digest = self._sha256(target)
        expected = artifact.sha256 if seen is None else seen.sha256
        if digest is not None and expected not in (None, digest):
            why = f"expected sha256 {expected}, got {digest}"
            return Item(artifact, State.DIFFERENT, target, why)
        if read == "nothing" and artifact.unpack is not None:
            return Item(artifact, State.PACKED, target, "not unpacked yet")
        if digest is not None and expected is not None:
            if read == "all":
                place.record_checked(digest)
            why = "published digest" if artifact.pinned else "digest of first use"
            return Item(artifact, State.READY, target, "" if read == "nothing" else why, digest)
        try:
            holds = "" if read == "nothing" else check_content(artifact, target)
        except ProxydetError as error:
            return Item(artifact, State.DIFFERENT, target, error.message)
        return Item(artifact, State.UNCHECKED, target, holds, digest)

    def _check_listed(self, place: Place, listed: Listing, read: str) -> Item:
        """Check files that were unpacked here."""
        artifact, path, folder = place.artifact, place.path, place.folder
        if read != "all":
            names: dict[str, set[str]] = defaultdict(set)  # each folder is read once
            for parent, _, last in (name.rpartition("/") for name in listed):
                names[parent].add(last)
            for parent, lasts in names.items():
                inner = folder / parent
                there = {entry.name for entry in os.scandir(inner)} if inner.is_dir() else set()
                if missing := lasts - there:
                    why = f"{parent}/{min(missing)} is missing".lstrip("/")
                    return Item(artifact, State.ABSENT, path, why)
            return Item(artifact, State.READY, path, f"{len(listed)} files")
        wrong: list[str] = []
        total = sum(size for size, _ in listed.values())
        with self._progress.task(f"checking {place.artifact.name}", total=total, unit="B") as task:
            for name, expected in listed.items():
                crc = size = 0
                try:
                    with open_regular(folder / name) as file:
                        while block := file.read(1 << 20):
                            crc, size = zlib.crc32(block, crc), size + len(block)
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    size = -1
                except OSError as error:
                    raise _unreadable(folder / name, error) from error
                if (size, crc) != expected:
                    wrong.append(name)
                self._count(task, expected[0])
        if wrong:
            what = f"{len(wrong)} of {len(listed)} files are missing or changed"
            return Item(artifact, State.DIFFERENT, path, f"{what}, such as {wrong[0]}")
        return Item(artifact, State.READY, path, f"check sums of {len(listed)} files")

    def _check_placed(self, place: Place, rule: Unpack, read: str) -> Item:
        """Check unpacked files that somebody placed by hand, if anybody did."""
        artifact, proven = place.artifact, True
        for provided in rule.provides:
            path = place.folder / provided.path
            if not path.exists():
                return Item(artifact, State.ABSENT, place.path)
            if path.is_dir():
                count, right = sum(len(names) for _, _, names in os.walk(path)), provided.files
                fits = provided.size is None and (count == right if right else count > 0)
                what = f"{path.name} holds {count} files"
            else:
                count, right = path.stat().st_size, provided.size
                fits = provided.files is None and right in (None, count)
                what = f"{path.name} has {count} bytes"
            if not fits:
                what += "" if right is None else f" instead of {right}"
                return Item(artifact, State.ABSENT, place.path, what)
            digest = None if read == "all" else place.checked(path).get("sha256")
            if provided.sha256 is None or not path.is_file():
                proven = proven and read == "nothing"  # no more is known than a glance shows
            elif digest == provided.sha256:
                continue
            elif read == "nothing":
                proven = False
            elif (digest := self._sha256(path)) != provided.sha256:
                why = f"expected sha256 {provided.sha256}, got {digest}"
                return Item(artifact, State.DIFFERENT, path, why)
            else:
                place.record_checked(digest, path)
        if proven and read != "nothing":
            return Item(artifact, State.READY, place.path, "published digests")
        why = "placed by hand" + ("; no check sums are known" if read != "nothing" else "")
        return Item(artifact, State.READY if proven else State.UNCHECKED, place.path, why)

    def _sha256(self, path: Path) -> str:
        """Return the digest of a file; errors of reading it are `ArtifactError`, a stopped job raises `StoppedError`."""
        try:
            title, size = f"checking {path.name}", path.stat().st_size
            with self._progress.task(title, total=size, unit="B") as task:
                return sha256(path, partial(self._count, task))
        except OSError as error:
            raise _unreadable(path, error) from error

    def _count(self, task: Task, read: int) -> None:
        if self._client.stop.is_set():
            raise StoppedError
        task.advance(read)


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {error.strerror or error}.", path=path)


# ---- proxydet.download: a name in and a path out -----------------------------------------------------------------------


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
        ArtifactError: It failed to download; the leaf says why.
        DiskFullError: There is no room.
    """
    options = options or DownloadOptions(root=None if root is None else Path(root))
    with Downloader(catalogue or Catalogue.load(), options, progress) as downloader:
        plan = downloader.plan([name])
        locked = [item for item in plan.items if item.state is State.NEEDS_ACCOUNT]
        if locked:
            raise ArtifactError(
                f"{len(locked)} of {len(plan.items)} files of {name} need an account.",
                hint=locked[0].why,
            )
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


def _common(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([path.absolute() for path in paths]))
