"""Atomic writes, locks, digests, JSON lines, and zip and tar archives with bounds: the only place that does these.

- A file is written under a hidden name next to its own, flushed to the disk and moved into place (`staged`), so that its
  name never stands for half of it. What a killed process left is removed by the next one that writes in the folder.
- A `Lock` is a marker file that its owner touches every few seconds, so that it works on every file system that can make
  a file exclusively, and between machines; see docs/decisions/0006-locks.md.
- `JsonLines` grow by whole lines that survive a power cut; what damaged them is passed over, counted and reported.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import socket
import stat
import struct
import sys
import tarfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec
from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from proxydet.errors import (
    ArchiveError,
    DiskFullError,
    InputError,
    LockedError,
    ProxydetError,
    RuntimeEnvironmentError,
)
from proxydet.wording import counted, json_text, size_text

logger = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK})
_BLOCK = 1 << 20
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_errors(target: Path, *, hint: str | None = None) -> Iterator[None]:
    """Turn the operating system's errors, which often do not name the file, into ours.

    Args:
        target: The file that is written inside the ``with`` statement.
        hint: What the user can do when the disk is full or the place is not writable; None gives the usual advice.

    Raises:
        DiskFullError: There is no room: the disk, the quota or the largest file size is exhausted.
        RuntimeEnvironmentError: It cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(target, error.errno, error.strerror or str(error), hint=hint) from error


def unwritable(
    target: Path, number: int | None, reason: str, *, hint: str | None = None
) -> RuntimeEnvironmentError:
    """Return the error of a file that cannot be written.

    Args:
        target: The file.
        number: The operating system's number of the error (``errno``); None where it has none.
        reason: Its text.
        hint: What the user can do; None gives the usual advice.
    """
    if number in _FULL:
        return DiskFullError(
            f"there is no room left on the disk to write {target} ({reason})",
            hint=hint
            or "free some space, or choose another folder, and run the same command again",
            path=target,
        )
    return RuntimeEnvironmentError(
        f"{target} cannot be written: {reason}",
        hint=hint or "check that you may write to its folder, or choose another one",
        path=target,
    )


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that ``path`` is or will be on."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_room(target: Path, needed: int, *, hint: str | None = None) -> None:
    """Check that ``needed`` more bytes fit where ``target`` is.

    Raises:
        DiskFullError: They do not.
    """
    free = free_bytes(target.parent)
    if needed > free:
        reason = f"it needs {size_text(needed)} more, {size_text(free)} are free"
        raise unwritable(target, errno.ENOSPC, reason, hint=hint)


@contextlib.contextmanager
def staged(target: Path, *, durable: bool = True, follow_links: bool = True) -> Iterator[Path]:
    """Give a hidden file next to ``target`` to write to, which takes its place when all went well.

    It is there, empty, from the beginning, so that a place that cannot be written to is found before the work. It is
    removed after an error; `discard` inside the ``with`` statement leaves ``target`` as it was without one. What is there
    but not a regular file (``/dev/stdout``) is given itself.

    Args:
        target: The file; its folder is made, an existing file is replaced at the end.
        durable: Whether to wait until the disk has it, so that it survives a power cut.
        follow_links: Whether a link stays, and the file that it names is replaced; otherwise the link is replaced.

    Raises:
        DiskFullError: There is no room for it; an existing file stays.
        RuntimeEnvironmentError: The file cannot be made, or not take its place, or another program removed it.
    """
    with write_errors(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        special = target.exists() and not target.is_file()
        if special:  # opened at once, where nobody reads a named pipe
            descriptor = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if special:
        try:
            yield target
        finally:
            os.close(descriptor)
        return
    with write_errors(target):
        target = Path(os.path.realpath(target)) if follow_links else target
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        temporary = target.with_name(
            f".{target.name[:40]}.{_process_tag()}{uuid.uuid4().hex[:8]}.tmp"
        )
        temporary.touch(exist_ok=False)
    _being_written.add(temporary)
    try:
        yield temporary
        if temporary in _being_written:
            with write_errors(target):
                if not temporary.exists():
                    raise FileNotFoundError(errno.ENOENT, f"another program removed {temporary}")
                if durable:
                    _flush(temporary)
                temporary.replace(target)
                if durable:
                    _flush(target.parent)
    finally:
        discard(temporary)


_being_written: set[Path] = set()


def discard(temporary: Path) -> None:
    """Remove a file that `staged` gave, inside its ``with`` statement, so that the target stays as it was.

    Args:
        temporary: The file. Any other one is left alone: what is finished or discarded already, or not a regular file.
    """
    if temporary in _being_written:
        _being_written.remove(temporary)
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes, *, durable: bool = True) -> Path:
    """Write a file whole or not at all, and return it; arguments and errors as of `staged`."""
    with staged(target, durable=durable) as temporary, write_errors(target):
        temporary.write_bytes(data)
    return target


def write_text(target: Path, text: str, *, durable: bool = True) -> Path:
    """Write a text file (UTF-8, ends of lines as they are) whole or not at all; see `staged`."""
    return write_bytes(target, text.encode("utf-8", "surrogateescape"), durable=durable)


def write_json(target: Path, value: Any, *, durable: bool = True, sort_keys: bool = False) -> Path:
    """Write a JSON file whole or not at all; see `staged`."""
    text = json_text(value, indent=2, sort_keys=sort_keys)
    return write_text(target, text + "\n", durable=durable)


# The machine, and the number and start of the process that writes.
_HIDDEN = re.compile(r"\..+\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{8})[0-9a-f]{8}\.tmp")
_ABANDONED_S = 86_400.0
_swept: set[tuple[int, str]] = set()


def sweep(folder: Path, *, sole_writer: bool = False) -> None:
    """Remove the hidden files of processes that were killed while they wrote in a folder.

    Their names say which process wrote them: one of this machine that has ended is recognised at once. Those of another machine
    count as abandoned a day after they were last written to. Without ``sole_writer`` a process sweeps each folder once.

    Args:
        folder: The folder; may be absent.
        sole_writer: Whether this process holds the folder, so that other machines are not waited for.
    """
    key = (os.getpid(), str(folder))
    if key in _swept and not sole_writer:
        return
    _swept.add(key)
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            hidden = _HIDDEN.fullmatch(entry.name)
            if hidden is None or not entry.is_file(follow_symlinks=False):
                continue
            machine, pid, start = hidden.groups()
            here = machine == _process_tag()[:8]
            with contextlib.suppress(OSError):
                if here and int(start, 16):
                    abandoned = _start_tag(int(pid, 16)) != start
                else:
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    abandoned = (sole_writer and not here) or age > _ABANDONED_S
                if abandoned:
                    Path(entry.path).unlink()


def _process_tag() -> str:
    machine = hashlib.sha256(_machine().encode()).hexdigest()[:8]
    return f"{machine}{os.getpid():08x}{_start_tag(os.getpid())}"


def _start_tag(pid: int) -> str:
    return f"{int(_start_of(pid) or 0) % (1 << 32):08x}"


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            raise  # else a file system that cannot be asked
    finally:
        os.close(descriptor)


# ---- folders ---------------------------------------------------------------------------------------------------------


def walk(
    folder: Path, unopened: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield a folder and those below it, each with the names of its folders and files, sorted and without hidden ones.

    Links are followed, and no folder is entered twice, however links lead to it.

    Args:
        folder: Where to begin.
        unopened: Called with the error of each folder that cannot be opened; such folders are passed over.

    Yields:
        The names of folders may be taken out of their list, so that these are passed over.
    """
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=unopened, followlinks=True):
        status = os.stat(place)  # noqa: PTH116
        key = (status.st_dev, status.st_ino)
        folders[:] = [] if key in visited else sorted(n for n in folders if not n.startswith("."))
        if key not in visited:
            visited.add(key)
            yield Path(place), folders, sorted(n for n in names if not n.startswith("."))


# ---- reading ---------------------------------------------------------------------------------------------------------


class PlaceholderError(ValueError):
    """A file holds a note in place of what was meant to be in it.

    Attributes:
        what: What it is: "it is ...".
        remedy: What the user can do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what
        self.remedy = remedy


PLACEHOLDER_BYTES = 512
"""How many bytes at the start of a file `refuse_placeholder` needs."""


def refuse_placeholder(head: bytes) -> None:
    """Check that the first bytes of a file are not those of a Git LFS pointer, or of a web page saved under its name.

    Raises:
        PlaceholderError: They are.
    """
    text = head[:PLACEHOLDER_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise PlaceholderError(
            "it is a Git LFS pointer, not the file itself", "fetch the file with: git lfs pull"
        )
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        raise PlaceholderError(
            "it is a web page (HTML), not the file itself",
            "download it again; the page, opened in a browser, may say why (an account, a moved file)",
        )


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a named pipe or a device is refused at once, not waited for.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")
        return open(descriptor, "rb")  # noqa: PTH123 - a descriptor
    except BaseException:
        os.close(descriptor)
        raise


@contextlib.contextmanager
def read_errors(
    path: Path,
    *,
    hint: str = "check that it is a file that you may read",
    error: type[ProxydetError] = InputError,
) -> Iterator[None]:
    """Turn what reading a file raises, which often does not name the file, into an error of ours.

    Args:
        path: The file that is read inside the ``with`` statement, by `open_regular` or `read_text`.
        hint: What the user can do; of a placeholder its remedy goes before.
        error: The class of that error.

    Raises:
        ProxydetError: Of the class ``error``: it cannot be opened or read, is a placeholder, or not what it should be
            (a ValueError).
    """
    try:
        yield
    except PlaceholderError as problem:
        message = f"cannot read {path}: {problem.what}"
        raise error(message, hint=problem.remedy, path=path) from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"cannot read {path}: {reason}", hint=hint, path=path) from problem


def read_text(path: Path, *, limit: int, pipe: bool = False) -> str:
    """Read a text file that somebody else wrote: UTF-8, or UTF-16 with a byte order mark as PowerShell writes.

    Args:
        path: The file.
        limit: Largest size in bytes.
        pipe: Whether it may be a pipe, which is waited for.

    Returns:
        The text without its byte order mark, line ends as they are in the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than ``limit``, not text, or a placeholder (`refuse_placeholder`); the message says which,
            without the file's name.
    """
    data = _read(path, limit, pipe=pipe)
    refuse_placeholder(data)
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 text") from error
    if "\0" in text:
        raise ValueError(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1} is not text")
    return text


def read_json(
    path: Path,
    *,
    what: str = "file",
    hint: str = "move it away, or put back what was there",
    error: type[ProxydetError] = InputError,
    default: dict[str, Any] | None = None,
    limit: int = 1 << 28,
) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: The file.
        what: What it is, for messages.
        hint: What the user can do when it is damaged.
        error: The class of error.
        default: Returned where the file is absent; None makes that an error.
        limit: Largest size in bytes.

    Raises:
        ProxydetError: Of the class ``error``: it is absent, unreadable, too large, not JSON or not an object.
    """
    try:
        value = json.loads(read_text(path, limit=limit))
        if not isinstance(value, dict):
            raise ValueError("it does not hold a JSON object")
    except FileNotFoundError as problem:
        if default is not None:
            return default
        raise error(f"there is no {what} {path}", hint=hint, path=path) from problem
    except (OSError, ValueError, RecursionError) as problem:
        message = f"the {what} {path} cannot be read: {problem}"
        raise error(message, hint=hint, path=path) from problem
    return value


def _read(path: Path, limit: int, *, pipe: bool = False) -> bytes:
    with path.open("rb") if pipe else open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {size_text(limit)}")
    return data


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.
        progress: Called with the number of bytes of each block that was read; may raise to stop.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def remembered_sha256(
    path: Path,
    memory: Path,
    *,
    hint: str = "check the path",
    error: type[ProxydetError] = InputError,
) -> str:
    """Return the SHA-256 of a file, remembered for as long as its size, times and inode are the same.

    Args:
        path: The file.
        memory: Folder for what is remembered, where it can be written; made where it is absent.
        hint: What the user can do when the file cannot be read.
        error: The class of that error.

    Raises:
        ProxydetError: Of the class ``error``: the file cannot be read.
    """
    try:
        resolved = path.resolve(strict=True)
        now = resolved.stat()
        seen = [now.st_size, now.st_mtime_ns, now.st_ino, now.st_ctime_ns]
        key = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        note = memory / f"{key}.digest"
        with contextlib.suppress(OSError, ValueError):
            known = msgspec.json.decode(_read(note, _BLOCK), type=tuple[list[int], str])
            if known[0] == seen:
                return known[1]
        digest = sha256(resolved)
    except FileNotFoundError as problem:
        raise error(f"there is no file {path}", hint=hint, path=path) from problem
    except (OSError, RuntimeError) as problem:  # RuntimeError: links in a circle
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}", hint=hint, path=path) from problem
    with contextlib.suppress(RuntimeEnvironmentError):  # a shortcut, not needed
        write_bytes(note, msgspec.json.encode((seen, digest)), durable=False)
    return digest


# ---- JSON lines ------------------------------------------------------------------------------------------------------


# What was reported as damaged, by file: several readers of one process report it once.
_reported_damage: dict[Path, tuple[int, int]] = {}


class JsonLines:
    """A file of one JSON object a line that grows while a job runs; a crash may have cut or damaged it."""

    _LONGEST = 1 << 24

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def read(self, *, then: str = "") -> Iterator[dict[str, Any]]:
        """Yield the records.

        Passed over, and reported once, are a last line that a crash cut short, and lines that are not JSON objects (zeros,
        after a power cut), which are counted.

        Args:
            then: What follows for the job, where something was passed over; ends the report.

        Raises:
            InputError: The file is there but cannot be read.
        """
        damaged = cut = 0
        try:
            if not self.path.exists():
                return
            if not self.path.is_file():
                raise OSError(errno.EINVAL, "it is not a regular file")
            with self.path.open("rb") as file:
                inside = False
                while piece := file.readline(self._LONGEST):
                    begins, inside = not inside, not piece.endswith(b"\n")
                    cut = inside * (len(piece) if begins else cut + len(piece))
                    if inside:
                        continue
                    record = None  # of a line that is too long
                    with contextlib.suppress(ValueError, RecursionError):
                        record = json.loads(piece) if begins else None
                    if isinstance(record, dict):
                        yield record
                    else:
                        damaged += 1
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be read: {error.strerror or error}",
                hint="move it away; it is written again",
                path=self.path,
            ) from error
        report_damage(self.path, damaged, cut, then=then)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and wait until the disk has it.

        Raises:
            DiskFullError: There is no room; what was written of it is removed.
            RuntimeEnvironmentError: The file cannot be written.
        """
        line = json.dumps(record).encode() + b"\n"
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._whole:
                remove_cut_line(self.path)
                self._whole = True
            with self.path.open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                    if start == 0:
                        _flush(self.path.parent)  # the name of a new file, too
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(start)
                    raise

    def keep(
        self, kept: Callable[[dict[str, Any]], bool], *, then: str = ""
    ) -> list[dict[str, Any]]:
        """Remove the records that are not kept, damaged lines too, and return the removed ones; ``then`` as of `read`."""
        if not self.path.exists():
            return []
        lines: list[dict[str, Any]] = []
        removed: list[dict[str, Any]] = []
        for record in self.read(then=then):
            (lines if kept(record) else removed).append(record)
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in lines))
        _reported_damage.pop(self.path, None)
        return removed


def report_damage(path: Path, damaged: int, cut: int = 0, *, then: str = "") -> None:
    """Warn of lines that were passed over, once for a file, and again where there are more.

    Args:
        path: The file.
        damaged: How many lines.
        cut: Bytes of a last line that was cut short.
        then: What follows for the job; ends the report.
    """
    known = _reported_damage.get(path, (0, 0))
    found = []
    if damaged > known[0]:
        found.append(f"skipped {counted(damaged, 'damaged line')}")
    if cut not in (0, known[1]):
        found.append(f"left out {cut} bytes of a last line that was cut short")
    if found:
        logger.warning("%s: %s", path, "; ".join(filter(None, [*found, then])))
        _reported_damage[path] = max(damaged, known[0]), cut


def remove_cut_line(path: Path) -> None:
    """Remove the last line of a file, which may be absent, where a crash cut it short."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        whole = -1
        while end > 0 and whole < 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            whole = file.read(end - start).rfind(b"\n")
            end = start + whole + 1
        if end < size:
            file.truncate(end)


# ---- locks -----------------------------------------------------------------------------------------------------------

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0
_POLL_S = 0.1
# Folders whose file system was reported to have no locks: once, however many locks are taken in them.
_without_locks: set[Path] = set()


class LockOwner(msgspec.Struct, frozen=True):
    """Who holds a lock.

    Attributes:
        host: Name of its machine.
        pid: Number of its process there.
        since: UTC time, ISO 8601; empty where it is not known.
        command: Its command line; empty where it is not known.
        machine: Identifies machines of one name, and containers.
        start: When the process began, in the kernel's terms; empty where it is not known.
    """

    host: str
    pid: int
    since: str = ""
    command: str = ""
    machine: str = ""
    start: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, or container, so that its end can be seen from here."""
        return self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether it is here, and has ended."""
        return self.is_here and self.start not in ("", _start_of(self.pid))

    def __str__(self) -> str:
        since = f" since {self.since}" if self.since else ""
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}{since}{command}"


class Lock:
    """Holds a place for one process, on one machine or on many that share a file system.

    The owner touches the lock every few seconds. An owner on this machine that has ended is recognised at once. One on
    another machine counts as dead when it did not touch the lock for ``stale_after_s``; clocks of machines are not compared.

    Args:
        path: The lock file. ``PATH.owner`` next to it says who holds it. Both are removed on release.
        subject: What is held, for messages; None takes the file that the lock is named after.
        hint: What the user can do while another process holds it.
        stale_after_s: Seconds; the same in all processes.

    Attributes:
        held: Whether this process holds it; stays False where the file system has no locks.
        lost: Whether it expired, as while this process was suspended, so that another one may have taken it over.
    """

    def __init__(
        self,
        path: Path,
        *,
        subject: str | None = None,
        hint: str = "wait for it to end, or stop it",
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        self.path = path
        self.held = False
        self.lost = False
        self._subject = subject or str(path.with_suffix(""))
        self._hint = hint
        self._record = path.with_name(f"{path.name}.owner")
        self._stale_after_s = stale_after_s
        self._lease: SoftFileLease | None = None
        self._owner: LockOwner | None = None

    def acquire(self, *, wait: bool = True, until: Callable[[], bool] | None = None) -> None:
        """Take the lock.

        Args:
            wait: Whether to wait for an owner who is alive. Without it, one on another machine is only watched until it
                touches the lock, or counts as dead.
            until: Ends the waiting, without the lock, once it returns true.

        Raises:
            LockedError: Another process holds it, and ``wait`` is false.
            RuntimeEnvironmentError: The folder cannot be written to.
        """
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        lease = SoftFileLease(
            self.path,
            lease_duration=self._stale_after_s,
            heartbeat_interval=min(HEARTBEAT_S, self._stale_after_s / 4),
            on_compromise=self._compromised,
            thread_local=False,
        )
        first: tuple[int, int] | None = None
        seen: tuple[int, int] | None = None
        since, tries = time.monotonic(), 0
        while not self._try(lease):
            if until is not None and until():
                return
            if (touched := self._touched()) is None:
                continue  # just released
            if touched != seen:
                seen, since, tries = touched, time.monotonic(), 0
            tries += 1
            owner = self.owner() or LockOwner("an unknown host", 0)
            here, dead = owner.is_here, owner.has_ended
            if not wait and ((here and not dead) or (first is not None and touched != first)):
                raise self._in_use(owner)
            if first is None and not dead:
                most = "" if here else f", at most {self._stale_after_s:.0f} s if it is dead"
                logger.warning("%s is in use by %s; waiting for it%s", self._subject, owner, most)
            first = first or touched
            # The library takes over by exchanging two names, which network file systems refuse: there the marker is removed.
            stale = dead and tries > 2
            if stale or time.monotonic() - since > self._stale_after_s * 1.1:
                logger.warning("%s: %s ended without releasing it; taking over", self.path, owner)
                with contextlib.suppress(OSError):
                    if self._touched() == seen:
                        lease.force_break()
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Give the lock back."""
        lease, self._lease = self._lease, None
        if lease is not None:
            if not self.lost or self._recorded() == self._owner:
                with contextlib.suppress(OSError):
                    self._record.unlink()
            lease.release()
        self.held, self._owner = False, None

    def check(self, owner: LockOwner | None = None) -> None:
        """Make sure that the lock is still held, before something is written.

        Args:
            owner: The process that holds it for this one, as `owner` returned it; None is this process. Where neither held it,
                as on a file system without locks, nothing is checked.

        Raises:
            LockedError: It expired, and perhaps another process has taken it over, and released it, since.
        """
        mine = owner is None
        owner = self._owner if mine else owner
        for pause in (0.5, 0.0):
            now = self.owner()
            # A record that cannot be read just now leaves the number of the process.
            same = owner is None or now == owner or (now and not now.since and now.pid == owner.pid)
            if same and not (mine and self.lost):
                return
            time.sleep(pause)
        taken = now is not None and now != owner
        by = f" was taken over by {now}" if taken else " is not held any more"
        raise LockedError(
            f"{self._subject}{by}: its lock expired, as this process was suspended for long, or the lock was removed",
            hint="leave it to the other process, or start the same command again when that has ended",
            path=self.path,
        )

    def require_free(self) -> None:
        """Make sure that no living process holds the lock, without taking it.

        One on another machine is watched for as long as it needs to touch the lock twice.

        Raises:
            LockedError: One does.
        """
        owner = self.owner()
        if owner is None or owner.has_ended:
            return
        deadline, alive, first = time.monotonic() + 2 * HEARTBEAT_S, owner.is_here, self._touched()
        while not alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            now = self._touched()
            if now is None:
                return
            alive = now != first
        if alive:
            raise self._in_use(owner)

    def _in_use(self, owner: LockOwner) -> LockedError:
        message = f"{self._subject} is in use by {owner}"
        return LockedError(message, hint=self._hint, path=self.path)

    def _touched(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            marker = self.path.lstat()
            return marker.st_mtime_ns, marker.st_ino
        return None

    def _recorded(self) -> LockOwner | None:
        with contextlib.suppress(OSError, ValueError):
            return msgspec.json.decode(_read(self._record, _BLOCK), type=LockOwner)
        return None

    def owner(self) -> LockOwner | None:
        """Return who holds the lock now; None where nobody does, or its files cannot be read."""
        marker = SoftFileLease(self.path, lease_duration=self._stale_after_s).owner
        record = self._recorded()
        if record is not None and (marker is None or marker.pid == record.pid):
            return record
        return None if marker is None else LockOwner(marker.hostname.partition("?")[0], marker.pid)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _try(self, lease: SoftFileLease) -> bool:
        """Return whether waiting is over: the lock is held, or cannot be had on this file system."""
        with write_errors(self.path):
            try:
                lease.acquire(blocking=False)
            except (Timeout, LeaseSettingsMismatch, FileNotFoundError):
                # Its last holder may have removed the folder.
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                if self.path.parent not in _without_locks:
                    _without_locks.add(self.path.parent)
                    logger.warning(
                        "%s: this file system has no locks (%s); nothing keeps a second process away",
                        self.path.parent,
                        error.strerror,
                    )
                return True
        self._lease, self.held, self.lost = lease, True, False
        record = LockOwner(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
            machine=_machine(),
            start=_start_of(os.getpid()),
        )
        try:
            write_bytes(self._record, msgspec.json.encode(record), durable=False)
            self._owner = record
        except BaseException:
            self.release()
            raise
        return True

    def _compromised(self, loss: LeaseCompromise) -> None:
        self.lost = self.lost or loss.reason != "refresh-failed"  # which may succeed the next time
        logger.warning("%s: the lock was not renewed (%s)", self.path, loss.reason)


@functools.cache
def _machine() -> str:
    """Return what distinguishes the machines, and the containers on one, whose process numbers can be compared."""
    with contextlib.suppress(OSError):
        booted = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{booted} {Path('/proc/self/ns/pid').stat().st_ino}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _start_of(pid: int) -> str:
    """Return when a living process began, in the kernel's terms; empty where it has ended or that is not known."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def build_once(
    path: Path,
    build: Callable[[Path], None],
    *,
    hint: str | None = None,
    stale_after_s: float = STALE_AFTER_S,
) -> bool:
    """Return when ``path`` exists, and whether ``build`` made it here: another process may have been first.

    Args:
        path: The file. Its folder is made.
        build: Makes it; must move it into place whole.
        hint: What the user can do where the folder cannot be written to.
        stale_after_s: See `Lock`.

    Raises:
        RuntimeEnvironmentError: The folder cannot be written to.
    """
    lock = Lock(path.with_name(f"{path.name}.lock"), stale_after_s=stale_after_s)
    if path.exists():
        owner = lock.owner()
        if owner is not None and owner.has_ended:  # killed between the two
            with contextlib.suppress(ProxydetError):
                lock.acquire(wait=False)
            lock.release()
        return False
    try:
        lock.acquire(until=path.exists)
    except RuntimeEnvironmentError as error:
        error.hint = hint or error.hint
        raise
    try:
        if path.exists():
            return False
        build(path)
        return True
    finally:
        lock.release()


# ---- archives of others: zips and tars, read with bounds on what they announce and unpack to -------------------------

MOST_MEMBERS = 2_000_000
"""More members than any archive of a data set or of weights has."""
SPARE_BYTES = 64 << 20
"""Bytes that an archive may unpack to beyond a multiple of its size."""
HOSTILE = "The archive is damaged or hostile: do not use it."
"""Hint about an archive that no tool makes."""
_LONGEST_LINE = 256 << 20
_LARGEST_HEADERS = 1 << 20
_MEMBER = b"PK\x01\x02"  # in front of each member in the table of contents


class BoundedReader(io.BufferedReader):
    """A file of which no more is read at once than ``largest`` bytes: what it announces of its parts may be wrong.

    Args:
        path: The file.
        largest: Bytes; None for its size.
    """

    def __init__(self, path: Path, largest: int | None = None) -> None:
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size
        self.largest = self.size if largest is None else largest

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does; raises ValueError beyond the bound."""
        if size is not None and size > self.largest:
            raise ValueError("its parts are larger than the file, or than they may be")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line, or as much of it as the bound, and that of a line, allow."""
        return super().readline(
            min(self.largest, _LONGEST_LINE) if size is None or size < 0 else size
        )


class _Zip(BoundedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        """Count the members in a table of contents before zipfile makes an object of each."""
        data = super().read(size)
        if data.count(_MEMBER) > MOST_MEMBERS:
            raise too_large(Path(self.name))
        return data


@contextlib.contextmanager
def open_zip(path: Path, *, largest: int, times: int) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading.

    Args:
        path: The archive.
        largest: Bytes that its table of contents may take.
        times: How many times its size it may unpack to, `SPARE_BYTES` apart.

    Raises:
        ArchiveError: It holds more than `MOST_MEMBERS` members, or unpacks to more than it may.
        Exception: Whatever zipfile raises about a damaged one.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_Zip(path, largest))
        refuse_placeholder(file.peek(PLACEHOLDER_BYTES))
        archive = stack.enter_context(zipfile.ZipFile(file))
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size * times + SPARE_BYTES:
            raise too_large(path, times=times)
        yield archive


def too_large(path: Path, *, times: int | None = None) -> ArchiveError:
    """Return the error about an archive that unpacks to more than so many times its size; None: with too many members."""
    what = f"holds more than {MOST_MEMBERS} files"
    if times is not None:
        what = f"unpacks to more than {times} times its size"
    return ArchiveError(f"{path.name} {what}; that is refused.", hint=HOSTILE, path=path)


class _TarHeaders:
    """What tarfile asks of a file: headers, and to skip the rest. It would hold whatever headers announce in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.tell = file, file.tell
        self.taken, self.last = 0, b""

    def read(self, size: int) -> bytes:
        self.taken += size
        if size < 0 or self.taken > _LARGEST_HEADERS:
            raise ValueError(f"it has headers of more than {_LARGEST_HEADERS} bytes for one file")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int) -> None:
        if offset < self.tell():
            raise ValueError("its headers contradict each other")
        self._file.seek(offset)


def tar_members(file: IO[bytes], length: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, from start to end; none is kept in memory, and of headers no more than a mebibyte.

    Args:
        file: The tar, uncompressed, at its beginning. Where a member is yielded, it stands at the member's first byte, and
            may be read to its last.
        length: Its size in bytes, with which the members' are compared; None where that is not known.

    Raises:
        PlaceholderError: It is none, but what stands for a file that was not downloaded.
        ValueError: It is damaged or cut short, after the members before.
        OSError: The file cannot be read.
    """
    refuse_placeholder(file.read(PLACEHOLDER_BYTES))
    file.seek(0)
    asked = _TarHeaders(file)
    archive: tarfile.TarFile | None = None
    while True:
        asked.taken = 0
        try:
            archive = archive or tarfile.TarFile(fileobj=asked, encoding="utf-8")  # type: ignore[arg-type]
            member = archive.next()
        except (tarfile.TarError, EOFError, LookupError, OverflowError, RecursionError, struct.error) as error:  # fmt: skip
            raise ValueError(str(error)) from error
        archive.members.clear()  # type: ignore[attr-defined] # where it collects them
        if member is None:
            break
        if member.size < 0:  # the next header would lie before this one
            raise ValueError(f"the size of {member.name} is negative")
        plain = member.isreg() and not member.issparse()
        if length is not None and plain and member.offset_data + member.size > length:
            raise ValueError(f"it is truncated in {member.name}")
        yield member
    # tarfile takes any rubbish after the last member for the end.
    if len(asked.last) < tarfile.BLOCKSIZE:
        raise ValueError("it has no end mark, so it may be cut short")
    if any(asked.last):
        raise ValueError("a header in its middle is damaged")
