"""SHA-256 of files: of a finished one, and of one that is still being written."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from proxydet.artifacts.patience import Stopped
from proxydet.errors import ArtifactError
from proxydet.reporting import SILENT, Progress

_BLOCK = 1 << 20
_WRITE_OUT = 8 << 20


def file_digest(
    path: Path, progress: Progress = SILENT, stop: threading.Event | None = None
) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: The file.
        progress: Where to show how far it is.
        stop: Ends the reading when set.

    Raises:
        ArtifactError: It cannot be read.
        Stopped: The stop sign was given.
    """
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    view = memoryview(block)
    try:
        with (
            path.open("rb", buffering=0) as file,
            progress.task(f"checking {path.name}", total=path.stat().st_size, unit="B") as task,
        ):
            while count := file.readinto(block):
                digest.update(view[:count])
                task.advance(count)
                if stop is not None and stop.is_set():
                    raise Stopped
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}.", path=path
        ) from error
    return digest.hexdigest()


class DigestFollower:
    """Computes the digest of a file behind its writer, in a thread of its own.

    Reading back what was just written costs little (it is still in memory), and needs no queue between the two, so
    that memory does not grow when one is faster. What was read is sent on to the disk, so that little is left to wait
    for when the file is complete.

    Args:
        descriptor: The open file, readable.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._end = 0
        self._round = 0
        self._closed = False
        self._position = 0
        self._written_out = 0
        self._waited_for = False
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def reached(self, end: int) -> None:
        """Say that all bytes before ``end`` are written, and that those behind it may yet be written over."""
        with self._changed:
            if end < self._position:
                self._begin()
            self._end = end
            if self._worth_a_step():
                self._changed.notify_all()

    def restart(self) -> None:
        """Say that the file is written anew from its start."""
        with self._changed:
            self._begin()
            self._end = 0

    def result(self) -> str:
        """Return the digest of all bytes that were said to be written; waits for it.

        Raises:
            ArtifactError: The file could not be read back.
        """
        with self._changed:
            self._waited_for = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._position >= self._end)
            self._waited_for = False
            if self._error is not None:
                raise ArtifactError(
                    f"What was just written cannot be read back: {self._error}.",
                    hint="The disk may be failing; try another place with --root.",
                ) from self._error
            return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread; the file may be closed afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _begin(self) -> None:
        self._round += 1
        self._position = self._written_out = 0
        self._digest = hashlib.sha256()

    def _worth_a_step(self) -> bool:
        """Tell whether a whole block is there, or somebody waits for the rest: small steps wake two threads for little."""
        return self._end - self._position >= (1 if self._waited_for else _BLOCK)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._worth_a_step())
                if self._closed:
                    return
                this_round, digest, position = self._round, self._digest, self._position
                wanted = min(_BLOCK, self._end - position)
            if not self._step(wanted, position, digest, this_round):
                return

    def _step(self, wanted: int, position: int, digest: hashlib._Hash, this_round: int) -> bool:
        """Take one block into the digest; return whether to go on."""
        try:
            block = os.pread(self._descriptor, wanted, position)
            if not block:
                raise OSError("the file is shorter than what was written to it")
        except OSError as error:
            with self._changed:
                if this_round != self._round:
                    return True  # it was emptied meanwhile, to begin anew
                self._error = error
                self._changed.notify_all()
            return False
        digest.update(block)
        with self._changed:
            if this_round == self._round:
                self._position = position + len(block)
                self._write_out()
                if self._waited_for:
                    self._changed.notify_all()
        return True

    def _write_out(self) -> None:
        """Have the system begin to write what was read: the call returns at once, and errors show at the final sync."""
        length = self._position - self._written_out
        if length >= _WRITE_OUT and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, self._written_out, length, os.POSIX_FADV_DONTNEED)
            self._written_out = self._position
