"""A digest that follows its writer: whatever is thrown away meanwhile never counts."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxydet.artifacts import digest as digest_module
from proxydet.artifacts.digest import DigestFollower

OLD, NEW = b"a" * (2 << 20), b"b" * ((2 << 20) + 7)


class Reader:
    """Holds up the first read of a follower, before it or after it, until it is let go on."""

    def __init__(self, *, before: bool) -> None:
        self.reading, self.go_on, self.read = (threading.Event() for _ in range(3))
        self._before = before
        self._pread: Callable[[int, int, int], bytes] = os.pread

    def __call__(self, descriptor: int, count: int, offset: int) -> bytes:
        first = not self.reading.is_set()
        data = b"" if first and self._before else self._pread(descriptor, count, offset)
        if first:
            self.reading.set()
            assert self.go_on.wait(10)
            data = self._pread(descriptor, count, offset) if self._before else data
            self.read.set()
        return data


@pytest.fixture(params=[True, False], ids=["before it read", "after it read"])
def reader(request, monkeypatch) -> Iterator[Reader]:
    made = Reader(before=request.param)
    monkeypatch.setattr(digest_module.os, "pread", made)
    yield made
    made.go_on.set()


def test_what_was_being_read_as_the_file_was_emptied_does_not_count(
    tmp_path: Path, reader: Reader
) -> None:
    path = tmp_path / "f"
    path.write_bytes(OLD)
    with path.open("r+b", buffering=0) as file:
        follower = DigestFollower(file.fileno())
        follower.reached(len(OLD))
        assert reader.reading.wait(10)
        follower.restart()
        file.truncate(0)
        reader.go_on.set()
        assert reader.read.wait(10)
        assert follower.result() == hashlib.sha256().hexdigest()
        file.write(NEW)
        follower.reached(len(NEW))
        assert follower.result() == hashlib.sha256(NEW).hexdigest()
        follower.close()
