"""Fetching one file: from the first address that serves the right bytes, over one connection or several, resumed.

The bytes go to a hidden file next to the final one. Only when their digest, or where none is published what they hold,
has been checked does that file get its final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

import msgspec

from proxydet.artifacts.addresses import host_of, shown
from proxydet.artifacts.catalogue import Artifact
from proxydet.artifacts.content import check_content, sees_every_byte
from proxydet.artifacts.http import (
    Client,
    NotFoundError,
    Pace,
    RangeError,
    Response,
    RetryableError,
    StoppedError,
)
from proxydet.errors import ArtifactError, DigestError, ProxydetError, TransferError
from proxydet.files import (
    PlaceholderError,
    read_text,
    refuse_placeholder,
    require_room,
    write_bytes,
    write_errors,
)
from proxydet.wording import size_text

_logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_DRIVE_HOSTS = frozenset({"drive.google.com", "drive.usercontent.google.com", "docs.google.com"})
_ENDLESS = 1 << 60
_LARGEST_PAGE = 1 << 20
_FOLLOW_SECONDS = 0.05
_SAVE_SECONDS = 1.0
_REPLACED = "The source replaced its file, or a proxy changed it. Try another source: proxydet download --mirror."

Count = Annotated[int, msgspec.Meta(ge=0)]
ByteRange = tuple[Count, Count]
"""Offsets of the first byte and of that behind the last."""


class Seen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file as it arrived, or was found.

    Attributes:
        sha256: Digest in lower-case hexadecimal.
        size: Size in bytes.
        address: Where it came from, as messages may show it; None for a file that was already there.
        etag: The server's name for that version, where it gave one.
        holds: What the check of its content found.
        when: Date of first use, ISO 8601, UTC.
    """

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Count
    address: str | None = None
    etag: str | None = None
    holds: str | None = None
    when: str = ""


# ---- the unfinished file -----------------------------------------------------------------------------------------------


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes of which version of which file an unfinished download holds.

    Attributes:
        address: Where they came from.
        total: Size of the whole file, where known.
        validator: The server's name for the version.
        etag: The ETag as sent.
        ranges: What is there, in order and not touching.
    """

    address: str = ""
    total: Count | None = None
    validator: str | None = None
    etag: str | None = None
    ranges: tuple[ByteRange, ...] = msgspec.field(default=(), name="stretches")

    @property
    def frontier(self) -> int:
        """Offset before which every byte is there."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    @property
    def stored(self) -> int:
        """How many bytes are there."""
        return sum(end - start for start, end in self.ranges)

    def gaps(self, claimed: Iterable[ByteRange] = ()) -> Iterator[ByteRange]:
        """Yield what is neither there nor claimed; the last one ends at the end of the file, where that is known."""
        at = 0
        for start, end in _joined([*self.ranges, *claimed]):
            if at < start:
                yield at, start
            at = end
        if self.total is None or at < self.total:
            yield at, _ENDLESS if self.total is None else self.total


def _joined(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    found: list[ByteRange] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


class PartFile:
    """One unfinished download, owned by this process.

    Bytes are written at offsets, from several threads; a thread of its own follows with the digest of what lies before
    the frontier and saves the record, once the disk has what it names. The name is unique to the process that made the
    file, so two processes never write into one. What an earlier process left is taken over where a lock proves that its
    owner is gone.

    Args:
        target: The final path.
        stop: Ends the computing of the digest, which takes minutes for a large file.
        take_over: Whether the lock of the target is held, so that what lies there belongs to nobody.

    Raises:
        DiskFullError: There is no room; here and in all methods.
        RuntimeEnvironmentError: The file or its folder cannot be written to or read; likewise.
    """

    def __init__(self, target: Path, stop: threading.Event, *, take_over: bool) -> None:
        self.target, self._stop = target, stop
        self.record = self._saved = PartRecord()
        self.path = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if take_over:
                found = sorted(_leftovers(target).items(), key=lambda item: item[1].stored)
                if found and found[-1][1].stored:
                    self.path, self.record = found.pop()
                for path, _ in found:
                    path.unlink(missing_ok=True)
                for record in _files_next_to(target, ".json"):
                    if not record.with_suffix("").exists():
                        record.unlink(missing_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._sidecar = self.path.with_name(f"{self.path.name}.json")
        self.inherited = self.record.stored
        self._digest, self._digested = hashlib.sha256(), 0
        self._lock, self._following = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="digest", daemon=True)
        self._follower.start()

    def restart(self, record: PartRecord) -> None:
        """Throw away all bytes and begin with another version."""
        with self._following, self._lock, write_errors(self.target):
            self._sidecar.unlink(missing_ok=True)  # before the bytes that it names
            os.ftruncate(self._descriptor, 0)
            self.record, self._saved, self.inherited = record, PartRecord(), 0
            self._digest, self._digested = hashlib.sha256(), 0

    def describe(self, **changes: Any) -> None:
        """Note more about the version that the bytes belong to; they stay."""
        with self._lock:
            self.record = msgspec.structs.replace(self.record, **changes)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at an offset. May be called from several threads."""
        end, view = offset, memoryview(data)
        try:
            with write_errors(self.target):
                while view:
                    count = os.pwrite(self._descriptor, view, end)
                    view, end = view[count:], end + count
        finally:
            with self._lock:
                ranges = _joined([*self.record.ranges, (offset, end)])
                self.record = msgspec.structs.replace(self.record, ranges=ranges)

    def digest(self) -> str:
        """Return the SHA-256 of everything before the frontier.

        Raises:
            StoppedError: The job was stopped meanwhile.
        """
        with write_errors(self.target):
            self._catch_up()
        return self._digest.hexdigest()

    def move_to_target(self) -> None:
        """Give the file its final name, with all its bytes on the disk first."""
        with write_errors(self.target):
            os.fsync(self._descriptor)
            self.path.replace(self.target)
        self.record = PartRecord()

    def close(self) -> None:
        """Let go of the file; it stays for the next time, unless nothing is in it, or it was moved."""
        self._closed.set()
        self._follower.join()
        if self.record.stored:
            with contextlib.suppress(ProxydetError, OSError):  # the record of a moment ago is there
                self._save()
        else:
            self._sidecar.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _follow(self) -> None:
        saved = time.monotonic()
        while not self._closed.wait(_FOLLOW_SECONDS):
            # What fails here fails again at the next write, or in the end.
            with contextlib.suppress(ProxydetError, OSError):
                self._catch_up()
                if time.monotonic() - saved >= _SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()

    def _catch_up(self) -> None:
        with self._following:
            # What comes meanwhile is for the next time: the record is due.
            goal = self.record.frontier
            while count := min(goal - self._digested, _BLOCK):
                if self._stop.is_set() or self._closed.is_set():
                    raise StoppedError
                block = os.pread(self._descriptor, count, self._digested)
                if not block:
                    raise OSError("what was just written cannot be read back")
                self._digest.update(block)
                self._digested += len(block)

    def _save(self) -> None:
        """Save the record, after the bytes that it names are on the disk: then no loss of power makes it wrong."""
        with self._following:
            record = self.record
            if record != self._saved:
                getattr(os, "fdatasync", os.fsync)(self._descriptor)
                write_bytes(self._sidecar, msgspec.json.encode(record), durable=False)
                self._saved = record


def kept_bytes(target: Path) -> int:
    """Return how many bytes of an unfinished download of ``target`` need not be fetched again."""
    return max((record.stored for record in _leftovers(target).values()), default=0)


def _leftovers(target: Path) -> dict[Path, PartRecord]:
    """Return the unfinished downloads next to a final path, with the usable part of their records."""
    found: dict[Path, PartRecord] = {}
    for path in _files_next_to(target):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished it
            size, found[path] = path.stat().st_size, PartRecord()
            with contextlib.suppress(OSError, ValueError, RecursionError):
                text = read_text(path.with_name(f"{path.name}.json"), limit=1 << 20)
                record = msgspec.json.decode(text, type=PartRecord)
                there = _joined((a, min(b, size)) for a, b in record.ranges if a < min(b, size))
                found[path] = msgspec.structs.replace(record, ranges=there)
    return found


def _files_next_to(target: Path, suffix: str = "") -> list[Path]:
    """Return unfinished downloads, or their records; those of ``a.json.zip`` are not those of ``a.json``."""
    if not target.parent.is_dir():
        return []
    fits = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.part{re.escape(suffix)}")
    return [target.parent / e.name for e in os.scandir(target.parent) if fits.fullmatch(e.name)]


# ---- fetching ----------------------------------------------------------------------------------------------------------


class Transfer:
    """Fetches one file, checks it and gives it its final name.

    Args:
        artifact: The file. Its size and digest are those that are published.
        target: Its final path.
        expected: Size and digest that were recorded on first use, where none are published.
        client: Makes the requests.
        counted: Called with the bytes that need no longer be fetched; negative for those that are discarded.
    """

    def __init__(
        self, artifact: Artifact, target: Path, expected: Seen | None, client: Client,
        counted: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._name, self._page, self._target = artifact.name, artifact.page, target
        self._size = artifact.size if expected is None else expected.size
        self._sha256 = artifact.sha256 if expected is None else expected.sha256
        self._artifact, self._sees_all = artifact, sees_every_byte(artifact)
        self._addresses = artifact.addresses
        if client.settings.mirror is not None:
            # Files lie under a mirror as under the data root.
            mirrored = f"{client.settings.mirror.rstrip('/')}/{quote(artifact.target)}"
            self._addresses = (mirrored, *artifact.addresses)
        self._html = target.suffix.lower() in (".html", ".htm")
        self._client, self._settings = client, client.settings
        self._report, self._counted = counted, 0
        self._lock = threading.Lock()

    def run(self, *, take_over: bool) -> Seen:
        """Fetch from the first address that serves the right bytes.

        Args:
            take_over: Whether the lock of the target is held, so that leftovers of earlier runs may be used.

        Raises:
            NotFoundError: No address has the file.
            DigestError: Bytes came, but not the right ones.
            TransferError: No address served it; the message says why for each.
            DiskFullError: There is no room.
            StoppedError: The job was stopped.
        """
        self._part = PartFile(self._target, self._client.stop, take_over=take_over)
        failures: list[ArtifactError] = []
        try:
            for address in self._addresses:
                try:
                    seen = self._from(address)
                except StoppedError:
                    raise
                except (TransferError, DigestError) as error:
                    _logger.info("%s: %s", self._name, error.message)
                    failures.append(error)
                else:
                    self._part.move_to_target()
                    return seen
        finally:
            self._part.close()
        not_found = all(isinstance(error, NotFoundError) for error in failures)
        hint = next((error.hint for error in failures if error.hint), None)
        if self._page is not None:
            hint = f"Open {self._page} in a browser and save the file as {self._target}."
        elif hint is None and not_found:
            hint = f"Its source moved it. Name another with proxydet download --mirror, or put the file there yourself: {self._target}"
        elif hint is None:
            hint = "Check the network (HTTPS_PROXY behind a proxy) or wait, then run the same command again: what was fetched is kept. proxydet download --mirror names another source."
        wrong = any(isinstance(error, DigestError) for error in failures)
        kind = NotFoundError if not_found else DigestError if wrong else TransferError
        raise kind(" ".join(error.message for error in failures), hint=hint, path=self._target)

    def _from(self, address: str) -> Seen:
        """Fetch from one address until the file is complete and right."""
        self._address, self._pace = address, Pace(self._settings)
        self._whole_only = False  # the server serves ranges wrongly
        self._ranges_seen = False  # the server has served a range rightly
        self._joined_unnamed = False  # bytes of two responses without a name of the version
        record = self._part.record
        # What an earlier run or address left is kept only if it can be continued from this address.
        fits = self._size is None or record.total in (None, self._size)
        same = record.address == address and (record.validator is not None or self._sees_all)
        if not record.stored or not fits or not (self._sha256 or same):
            self._restart()
        self._count(0)
        self._fetch()
        doubtful = self._joined_unnamed or self._part.inherited > 0
        try:
            return self._checked()
        except DigestError as error:
            if not doubtful:
                raise
            _logger.info("%s: %s Fetching it again.", self._name, error.message)
            self._fetch()
            return self._checked()

    def _fetch(self) -> None:
        """Repeat attempts, with longer pauses each time, until all bytes are there."""
        host, settings, unreachable = (
            host_of(self._address),
            self._settings,
            self._client.unreachable,
        )
        most = 1 if host in unreachable else settings.attempts
        best, failures, announced = self._part.record.stored, 0, False
        while next(self._part.record.gaps(), None) is not None:
            try:
                self._attempt()
                unreachable.discard(host)
                continue
            except RangeError as problem:
                record = self._part.record
                if problem.total is not None and record.ranges == ((0, problem.total),):
                    self._part.describe(total=problem.total)  # all are there
                elif self._whole_only:
                    raise TransferError(problem.message, hint=problem.hint) from problem
                else:  # the file changed, or the server serves ranges wrongly
                    self._whole_only = True
                    self._restart()
                continue
            except RetryableError as problem:
                error = problem
            stored = self._part.record.stored
            if stored == 0:
                unreachable.add(host)
            progress = stored > best and not error.slow
            best, failures = max(best, stored), 1 if progress else failures + 1
            if failures >= most:
                times = f", {failures} times in a row" if failures > 1 else ""
                raise TransferError(f"{error.message.rstrip('.')}{times}.") from error
            delay = min(settings.first_delay * 2.0 ** (failures - 1), settings.longest_delay)
            delay *= random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, guards nothing
            asked = error.retry_after or 0.0
            if asked > settings.longest_retry_after:
                raise TransferError(
                    f"{error.message} The server asks to come back in {asked / 60:.0f} minutes.",
                    hint="Run the same command again then: what was fetched is kept.",
                )
            delay = max(delay, asked)
            if not progress and not announced:
                announced = True
                _logger.warning("%s Trying again.", error.message)
            self._pace.pause(delay)
            if self._client.stop.wait(delay):
                raise StoppedError

    def _attempt(self) -> None:
        """Make one request, or several at once, and take in what comes."""
        record, settings = self._part.record, self._settings
        size = record.total or self._size
        several = (
            settings.connections > 1
            and (size is None or size >= settings.parallel_from)
            and not self._whole_only
            and host_of(self._address) not in _DRIVE_HOSTS
        )
        if several and self._ranges_seen and record.total is not None and record.validator:
            self._fetch_pieces()
            return
        first, end = next(record.gaps())
        if self._whole_only or not (record.validator or self._sha256 or self._sees_all):
            first, end = 0, _ENDLESS
        if several and not self._ranges_seen:  # ask for one piece only, to try ranges
            end = first + settings.piece_bytes
        with self._open(first, end) as response:
            self._accept(response, first)
            self._take_in(response)

    def _fetch_pieces(self) -> None:
        """Fetch all that is missing over several connections.

        One that fails leaves the rest to the others, since some servers refuse more than a few at a time; the failure of
        the last one counts.
        """
        piece, claimed, errors = self._settings.piece_bytes, set[ByteRange](), list[ProxydetError]()
        missing = sum(-(-(end - start) // piece) for start, end in self._part.record.gaps())
        running = min(self._settings.connections, missing)
        _logger.debug("%d pieces over %d connections", missing, running)

        def work() -> None:
            nonlocal running
            while True:
                with self._lock:
                    gap = next(self._part.record.gaps(claimed), None)
                    if gap is None or errors:
                        running -= 1
                        return
                    mine = (gap[0], min(gap[1], gap[0] + piece))
                    claimed.add(mine)
                failure = None
                try:
                    with self._open(*mine) as response:
                        self._accept(response, *mine)
                        self._take_in(response, errors)
                except ProxydetError as error:
                    failure = error
                with self._lock:
                    claimed.discard(mine)
                    if failure is not None:
                        running -= 1
                        if running == 0 or not isinstance(failure, RetryableError):
                            errors.append(failure)
                        return

        self._client.run_in_threads([work] * running, at_once=running)
        if errors:
            raise errors[0]

    def _open(self, first: int, end: int) -> Response:
        """Send a request; submit the form of a Google Drive confirmation page."""
        record, pinned = self._part.record, self._sha256 is not None
        last = None if end >= (record.total or _ENDLESS) else end - 1
        validator = record.validator if record.address == self._address else None

        def ask(address: str) -> Response:
            return self._client.open(
                address, pinned=pinned, pace=self._pace, first=first, last=last, validator=validator
            )

        response = ask(self._address)
        if not response.web_page or self._html:
            return response
        page, where = _read_page(response), response.address
        if host_of(where) not in _DRIVE_HOSTS:
            raise TransferError(
                f"{shown(where)} sent a web page instead of the file.",
                hint="A proxy or a sign-in page may stand in between: open the address in a browser.",
            )
        response = ask(_drive_address(page, where))
        if response.web_page:
            raise _drive_error(_read_page(response))
        return response

    def _accept(self, response: Response, first: int, piece_end: int | None = None) -> None:
        """Check that a response continues what is there; begin again if it brings the whole file.

        With ``piece_end``, it must bring that piece, of the version that is there.
        """
        part, record, size = self._part, self._part.record, self._size
        where = shown(response.address)
        self._ranges_seen = self._ranges_seen or response.partial
        if size is not None and response.total not in (None, size) and not response.encoded:
            message = f"{where} serves {response.total} bytes, but {self._name} has {size}."
            raise DigestError(message, hint=_REPLACED)
        if self._sha256 is None and response.encoded:
            raise TransferError(f"{where} compressed the file, which was not requested.")
        if self._sha256 is None and response.length is None and not response.chunked:
            message = "does not send the file's size: an incomplete transfer could not be detected"
            raise TransferError(f"{where} {message}.")
        elsewhere = RangeError(f"{where} sent other bytes than were requested.")
        if piece_end is not None:
            same = response.validator == record.validator and response.total in (None, record.total)
            fits = response.first == first and first + (response.length or 0) <= piece_end
            if not response.partial or response.web_page or not same or not fits:
                raise elsewhere
            return
        require_room(part.target, (response.total or 0) - record.stored)
        described = {"address": self._address, "total": response.total,
                     "validator": response.validator, "etag": response.etag}  # fmt: skip
        if not response.partial or (record.stored == 0 and first == response.first == 0):
            self._restart(**described)
            return
        known = record.address == self._address
        sizes, names = {response.total, record.total}, {response.validator, record.validator}
        other = len(sizes - {None}) > 1 or (known and len(names - {None}) > 1)
        if response.first != first or other:
            raise elsewhere
        self._joined_unnamed = self._joined_unnamed or response.validator is None
        if record.total is None or not known:
            part.describe(**described)

    def _take_in(self, response: Response, errors: Collection[object] = ()) -> None:
        """Write the body of a response where it belongs; end with it where another connection had an error."""
        offset, where, settings = response.first, shown(response.address), self._settings
        end = self._size if response.length is None else offset + response.length
        bound = settings.largest_unannounced if end is None else end
        announced = end is not None
        if self._size is not None:  # what is compressed on the way announces another size
            bound = min(bound, self._size)
        elif response.total is None:  # pieces with a length, but no end of them
            announced = announced and bound <= settings.largest_unannounced
            bound = min(bound, settings.largest_unannounced)
        # Pauses for the speed limit are short.
        chunk = int(max(min(settings.chunk_bytes, settings.limit_rate or _ENDLESS), 1))
        while data := response.read(chunk):
            if errors:
                raise StoppedError
            if offset == 0 and not self._html:
                try:
                    refuse_placeholder(data)
                except PlaceholderError as error:
                    message = f"What {where} sent is not {self._name}: {error.what}."
                    raise TransferError(message) from error
            if offset + len(data) > bound:
                if bound == self._size:
                    raise TransferError(
                        f"{where} sent more than the {bound} bytes of {self._name}."
                    )
                if announced:
                    raise TransferError(f"{where} sent more bytes than it announced.")
                raise TransferError(
                    f"{where} sent more than {size_text(bound)} without saying how much will come.",
                    hint="If that is right, add the file's size to its catalogue entry.",
                )
            self._part.write(offset, data)
            offset += len(data)
            self._count(len(data))
        if end is not None and offset < end:
            raise RetryableError(f"{where} ended before the announced length.")
        if not response.partial:
            self._part.describe(total=offset)

    def _restart(self, **described: Any) -> None:
        self._joined_unnamed = False
        self._part.restart(PartRecord(**{"address": self._address, **described}))
        self._count(0)

    def _count(self, received: int) -> None:
        """Count exactly what would not have to be fetched again."""
        with self._lock:
            stored = self._part.record.stored
            change, self._counted = stored - self._counted, stored
        self._report(change)
        self._client.took(received)

    def _checked(self) -> Seen:
        part, name, source = self._part, self._name, shown(self._address)
        record, digest, holds = part.record, part.digest(), None
        try:
            if record.stored == 0 and self._sha256 is None:
                raise DigestError(f"{source} sent an empty file instead of {name}.")
            if self._sha256 not in (None, digest):
                raise DigestError(
                    f"{source} sent a file that is not {name}: expected SHA-256 {self._sha256}, got {digest} "
                    f"({record.stored} bytes). It was deleted."
                )
            if self._sha256 is None:
                holds = check_content(self._artifact, part.path) or None
        except ProxydetError as error:
            self._restart()
            message = error.message
            if not isinstance(error, DigestError):
                reason = message.replace(part.path.name, self._target.name)
                message = f"What {source} served is not {name}: {reason}"
            raise DigestError(message, hint=error.hint or _REPLACED) from error
        return Seen(
            sha256=digest, size=record.stored, address=source, etag=record.etag, holds=holds
        )


def _read_page(response: Response) -> str:
    data = b""
    with response:
        while len(data) < _LARGEST_PAGE and (more := response.read(_LARGEST_PAGE - len(data))):
            data += more
    return data.decode("utf-8", errors="replace")


# ---- Google Drive's page in place of a file: a form that asks to continue without a virus scan, or an error ----------


def _drive_address(page: str, address: str) -> str:
    """Return the address that the form on a confirmation page leads to.

    Raises:
        TransferError: The page offers no download; see `_drive_error`.
    """
    from html.parser import HTMLParser  # few downloads need it

    forms: list[tuple[str, dict[str, str]]] = []

    class Forms(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = {name: value or "" for name, value in attrs}
            if tag == "form":
                forms.append((given.get("action", ""), {}))
            elif tag == "input" and forms and given.get("name"):
                forms[-1][1][given["name"]] = given.get("value", "")

    Forms().feed(page)
    for action, fields in forms:
        try:
            target = urljoin(address, action)
        except ValueError:
            continue
        if "confirm" in fields and "id" in fields and host_of(target) in _DRIVE_HOSTS:
            return f"{target}{'&' if urlsplit(target).query else '?'}{urlencode(fields)}"
    raise _drive_error(page)


def _drive_error(page: str) -> TransferError:
    """Return the error that a page without such a form means: the daily quota is used up, or the file is not public."""
    if re.search(r"quota exceeded|too many users|download quota", page, re.IGNORECASE):
        return TransferError(
            "Google Drive does not serve this file right now: its daily quota is used up.",
            hint="Try again in a day, or fetch it in a browser while signed in to a Google account.",
        )
    if re.search(r"sign in|you need access|request access", page, re.IGNORECASE):
        return TransferError(
            "Google Drive asks to sign in for this file.",
            hint="Fetch it in a browser, or name a cookies.txt file of your browser in PROXYDET_COOKIES.",
        )
    return TransferError(
        "Google Drive sent a web page instead of the file.",
        hint="Fetch the file in a browser and put it in its place by hand.",
    )
