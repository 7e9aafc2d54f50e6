"""Unfinished downloads: a hidden file beside the final one, and a record of which version its bytes belong to."""

from __future__ import annotations

import os
import re
import threading
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from proxydet.artifacts.digest import DigestFollower
from proxydet.artifacts.files import disk_errors, read_json, write_json
from proxydet.artifacts.patience import Stopped
from proxydet.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Which version of which file the bytes of an unfinished download belong to."""

    address: str = ""
    """Where they came from."""
    total: int | None = None
    """Size of the whole file, where known."""
    validator: str | None = None
    """The server's name for the version."""
    etag: str | None = None
    """The ETag as sent."""
    piece_bytes: int = 0
    """Size of the pieces fetched side by side; 0 when bytes were only ever appended."""
    done: tuple[int, ...] = ()
    """Numbers of the pieces that are complete."""

    @classmethod
    def read(cls, path: Path) -> PartRecord | None:
        """Return the record in a file; None if it is absent or not one that this version wrote."""
        try:
            content = read_json(path)
            record = cls(**{**content, "done": tuple(content.get("done", ()))})
        except (ArtifactError, TypeError):
            return None
        return record if content and _sound(record) else None


class PartFile:
    """One unfinished download, owned by this process.

    Bytes are written at offsets; `frontier` is the offset before which everything is there, and a digest follows it.
    The name is unique to the process that made the file, so two processes never write into one. A file that an
    earlier process left is taken over where a lock proves that its owner is gone.

    Args:
        target: The final path.
        take_over: Whether the lock of the target is held, so that what lies there belongs to nobody.

    Raises:
        DiskFullError: There is no room.
        ArtifactError: The folder cannot be written to.
    """

    def __init__(self, target: Path, *, take_over: bool) -> None:
        self.target = target
        self.record = PartRecord()
        self.path = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if take_over:
                self._take_over()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.frontier = _frontier(self.record, os.fstat(self._descriptor).st_size)
        self.inherited = self.frontier
        self._lock = threading.Lock()
        self._digest = DigestFollower(self._descriptor)
        self._digest.reached(self.frontier)
        self._open = True

    @property
    def stored(self) -> int:
        """Bytes that would not have to be fetched again after this process ended."""
        record = self.record
        pieces = sum(
            _piece_length(record, index)
            for index in record.done
            if index * record.piece_bytes >= self.frontier
        )
        return self.frontier + pieces

    def restart(self, record: PartRecord) -> None:
        """Throw away all bytes and begin with another version."""
        self._digest.restart()  # before the file is emptied, so that its reader knows
        with disk_errors(self.target):
            os.ftruncate(self._descriptor, 0)
        self.frontier = self.inherited = 0
        self._note(record)

    def describe(self, record: PartRecord) -> None:
        """Note more about the version that the bytes belong to; they stay."""
        self._note(record)

    def begin_pieces(self, piece_bytes: int) -> list[int]:
        """Go over to writing pieces side by side; return the numbers of those that are missing.

        A total size must be known. What was fetched in pieces of another size before keeps only what lies before the
        frontier.
        """
        total = self.record.total or 0
        count = -(-total // piece_bytes)
        kept = self.record.done if self.record.piece_bytes == piece_bytes else ()
        done = set(kept) | set(range(self.frontier // piece_bytes))
        if self.frontier >= total:
            done = set(range(count))
        self._note(replace(self.record, piece_bytes=piece_bytes, done=tuple(sorted(done))))
        self.frontier = _frontier(self.record, total)
        self._digest.reached(self.frontier)
        return [index for index in range(count) if index not in done]

    def finish_piece(self, index: int) -> None:
        """Record that a piece is complete. May be called from several threads."""
        with self._lock:
            done = tuple(sorted({*self.record.done, index}))
            self._note(replace(self.record, done=done))
            self.frontier = _frontier(self.record, self.record.total or 0)
            self._digest.reached(self.frontier)

    def append(self, data: bytes) -> None:
        """Write bytes at the frontier and move it behind them; no pieces may be under way.

        Raises:
            DiskFullError: There is no room.
            ArtifactError: Writing failed otherwise.
        """
        self.write(self.frontier, data)
        self.frontier += len(data)
        self._digest.reached(self.frontier)

    def end_pieces(self) -> None:
        """Go back to appending: bytes beyond the frontier are given up."""
        with disk_errors(self.target):
            os.ftruncate(self._descriptor, self.frontier)
        self._note(replace(self.record, piece_bytes=0, done=()))

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at an offset. May be called from several threads.

        Raises:
            Stopped: The file is no longer this object's: a thread was left behind after Ctrl-C.
            DiskFullError: There is no room.
            ArtifactError: Writing failed otherwise.
        """
        if not self._open:
            raise Stopped
        view = memoryview(data)
        with disk_errors(self.target):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def digest(self) -> str:
        """Return the SHA-256 of everything before the frontier."""
        return self._digest.result()

    def move_to_target(self) -> None:
        """Give the file its final name, with all its bytes on the disk first.

        Raises:
            DiskFullError: There is no room.
            ArtifactError: It cannot be moved.
        """
        with disk_errors(self.target):
            os.fsync(self._descriptor)
            self.path.replace(self.target)
        self._end()
        _sidecar(self.path).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file."""
        self._end()
        _remove(self.path)

    def close(self) -> None:
        """Let go of the file; it stays for the next time, unless nothing is in it."""
        if not self._open:
            return
        if self.stored == 0:
            self.discard()
        else:
            self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._digest.close()
            os.close(self._descriptor)

    def _note(self, record: PartRecord) -> None:
        self.record = record
        write_json(
            _sidecar(self.path), {**asdict(record), "done": list(record.done)}, durable=False
        )

    def _take_over(self) -> None:
        best = 0
        for path, record, have in _leftovers(self.target):
            if record is None or have <= best:
                _remove(path)
                continue
            if best:
                _remove(self.path)
            self.path, self.record, best = path, record, have
        for orphan in _orphans(self.target):
            orphan.unlink(missing_ok=True)


def kept_bytes(target: Path) -> int:
    """Return how many bytes of an unfinished download of ``target`` need not be fetched again."""
    return max((have for _, _, have in _leftovers(target)), default=0)


def _leftovers(target: Path) -> list[tuple[Path, PartRecord | None, int]]:
    """Return the unfinished downloads beside a final path: file, record where usable, and bytes that can be used."""
    found: list[tuple[Path, PartRecord | None, int]] = []
    for path in _beside(target, r"\.{name}\.\d+-[0-9a-f]{{8}}\.part"):
        record = PartRecord.read(_sidecar(path))
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # another process has just finished it
            continue
        if record is not None:
            record = _within(record, size)
        found.append((path, record, 0 if record is None else _stored(record, size)))
    return found


def _orphans(target: Path) -> list[Path]:
    """Return records whose unfinished download is gone, and records that a killed process was writing."""
    record = r"\.?(?:\.{name}\.\d+-[0-9a-f]{{8}}\.part)\.json(?:\.[0-9a-f]+\.tmp)?"
    paths = _beside(target, record)
    return [p for p in paths if p.suffix == ".tmp" or not p.with_suffix("").exists()]


def _beside(target: Path, pattern: str) -> list[Path]:
    """Return the files beside a final path whose whole name fits a pattern: those of ``a.json.zip`` are not ``a.json``'s."""
    if not target.parent.is_dir():
        return []
    fits = re.compile(pattern.format(name=re.escape(target.name)))
    return [target.parent / e.name for e in os.scandir(target.parent) if fits.fullmatch(e.name)]


def _within(record: PartRecord, size: int) -> PartRecord:
    """Leave out pieces beyond the end of the file: it was cut and killed before that was noted."""
    width = record.piece_bytes
    there = (i for i in record.done if i * width + _piece_length(record, i) <= size)
    return replace(record, done=tuple(there))


def _stored(record: PartRecord, size: int) -> int:
    if not record.piece_bytes:
        return size
    return sum(_piece_length(record, index) for index in record.done)


def _frontier(record: PartRecord, size: int) -> int:
    """Return the offset before which every byte is there."""
    if not record.piece_bytes:
        return size
    count = next((i for i, index in enumerate(record.done) if i != index), len(record.done))
    return min(count * record.piece_bytes, record.total or 0)


def _piece_length(record: PartRecord, index: int) -> int:
    return max(min(record.piece_bytes, (record.total or 0) - index * record.piece_bytes), 0)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def _sound(record: PartRecord) -> bool:
    numbers: list[Any] = [record.piece_bytes, *record.done, record.total or 0]
    texts: list[Any] = [record.address, record.validator or "", record.etag or ""]
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return whole and all(isinstance(text, str) for text in texts)
