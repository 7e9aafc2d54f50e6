"""Killed processes, several at once, full disks, Ctrl-C: nothing is lost, and nothing wrong gets the name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxydet.errors import DigestError, DiskFullError, RuntimeEnvironmentError, TransferError

CATALOGUE = """
[[artifacts]]
name = "thing"
title = "t"
licence = "l"
addresses = ["{address}"]
target = "models/thing.bin"
{digest}
"""

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background hands it down ignored
from pathlib import Path
from proxydet.artifacts import Catalogue, Downloader, DownloadOptions, TransferSettings
root, connections = Path(sys.argv[1]), int(sys.argv[2])
settings = TransferSettings(
    connections=connections, piece_bytes=200_000, parallel_from=500_000, chunk_bytes=20_000, first_delay=0.01
)
with Downloader(Catalogue.load([root / "c.toml"]), DownloadOptions(root=root, settings=settings)) as downloader:
    report = downloader.fetch(downloader.plan(["thing"]))
report.raise_for_failures()
print(report.outcomes[0].status)
"""


@pytest.fixture
def body() -> bytes:
    return random.Random(1).randbytes(2_000_000)


@pytest.fixture
def start(server, tmp_path, body) -> Callable[..., subprocess.Popen[str]]:
    def begin(
        connections: int = 1,
        *,
        pinned: bool = True,
        before: str = "",
        expected: bytes = body,
        **behaviour: object,
    ) -> subprocess.Popen[str]:
        if "/thing" not in server.files:
            server.add("/thing", body, **behaviour)
        digest = (
            f'sha256 = "{hashlib.sha256(expected).hexdigest()}"\nsize = {len(expected)}'
            if pinned
            else ""
        )
        text = CATALOGUE.format(address=server.address("/thing"), digest=digest)
        (tmp_path / "c.toml").write_text(text)
        return subprocess.Popen(
            [sys.executable, "-c", before + SCRIPT, str(tmp_path), str(connections)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


FIFTY_TIMES = [
    pytest.param(50, connections, pinned, marks=pytest.mark.slow)
    for connections in (1, 4)
    for pinned in (True, False)
]


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def hidden(folder: Path) -> list[str]:
    return [path.name for path in (folder / "models").glob(".*") if path.is_file()]


def kill_at_random(
    start, server, tmp_path: Path, body: bytes, times: int, connections: int, *, pinned: bool
) -> None:
    """Kill a download at random points until it has been killed so often or is done, and let it end."""
    target = tmp_path / "models/thing.bin"
    chance = random.Random(times)
    kills = 0
    for _ in range(times):
        process = start(connections, pinned=pinned, pause=0.01 * connections)
        sent = server.files["/thing"].sent
        goal = sent + chance.randrange(1, max(len(body) // (times // 2 + 1), 2))
        while process.poll() is None and server.files["/thing"].sent < goal:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if target.exists():
            assert target.read_bytes() == body
            break
    assert finish(start(connections, pinned=pinned)) in ("fetched", "ready", "checked")
    assert target.read_bytes() == body
    assert hidden(tmp_path) == []
    assert kills > 0
    # What a killed process had is used again: about a second's worth, or a piece a connection, is lost each time.
    assert server.files["/thing"].sent < len(body) + kills * max(2_000_000, connections * 450_000)


@pytest.mark.parametrize(
    ("times", "connections", "pinned"), [(2, 1, True), (2, 3, False), *FIFTY_TIMES]
)
def test_killed_and_resumed(start, server, tmp_path, body, times, connections, pinned):
    kill_at_random(start, server, tmp_path, body, times, connections, pinned=pinned)


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_several_processes_fetch_one_file_once(start, server, tmp_path, body, count):
    processes = [start(pause=0.002) for _ in range(count)]
    assert sorted(finish(process) for process in processes) == ["fetched", *["ready"] * (count - 1)]
    assert (tmp_path / "models/thing.bin").read_bytes() == body
    assert len(server.files["/thing"].requests) == 1
    assert hidden(tmp_path) == []


def test_a_second_thread_waits_and_fetches_nothing(downloads, server, body):
    served = server.add("/thing", body[:500_000], pause=0.01)
    thing = downloads.artifact(body=body[:500_000])
    statuses: list[str] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(downloads.fetch(thing).outcomes[0].status))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == ["fetched", "ready", "ready"]
    assert len(served.requests) == 1


def test_one_continues_where_the_other_was_killed(start, server, tmp_path, body):
    """The second waits for the first; nobody waits for the dead."""
    first = start(pause=0.03)
    while server.files["/thing"].sent < 500_000:
        time.sleep(0.005)
    second = start()
    time.sleep(0.5)
    first.kill()
    first.communicate()
    started = time.monotonic()
    assert finish(second) == "fetched"
    assert time.monotonic() - started < 20
    assert (tmp_path / "models/thing.bin").read_bytes() == body
    assert server.files["/thing"].sent < 2 * len(body)


def test_without_locks_each_process_has_its_own_file(start, server, tmp_path, body):
    """On a file system that has no locks two processes both fetch, and both end well."""
    no_locks = (
        "import errno, filelock\n"
        "def acquire(self, **options): raise OSError(errno.ENOLCK, 'no locks')\n"
        "filelock.SoftFileLease.acquire = acquire\n"
    )
    processes = [start(before=no_locks, together=2) for _ in range(2)]
    assert [finish(process) for process in processes] == ["fetched", "fetched"]
    assert len(server.files["/thing"].requests) == 2
    assert (tmp_path / "models/thing.bin").read_bytes() == body


def test_ctrl_c_keeps_what_was_fetched(start, server, tmp_path, body):
    process = start(pause=0.01)
    while server.files["/thing"].sent < 1_000_000:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - started < 3
    assert process.returncode != 0
    assert not (tmp_path / "models/thing.bin").exists()
    assert finish(start()) == "fetched"
    assert server.files["/thing"].sent < len(body) + 500_000


class TestDisk:
    def test_a_full_disk(self, server, fetch, body):
        """The largest allowed file size stands for the end of the disk: writing fails in the middle."""
        server.add("/f", body)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(DiskFullError) as caught:
                fetch("/f", pinned=body)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert caught.value.hint
        assert not fetch.target.exists()
        fetch("/f", pinned=body)
        assert fetch.target.read_bytes() == body
        assert server.files["/f"].headers("Range") == [None, "bytes=1000000-"]

    @pytest.mark.slow
    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
    def test_a_file_system_that_fills_up(self, server, fetch, body, tmp_path):
        small = tmp_path / "small"
        small.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("mounting is not allowed here")
        try:
            fetch.downloads.root = small
            server.add("/f", body, chunked=True)
            with pytest.raises(DiskFullError):
                fetch("/f")
            assert not fetch.target.exists()
        finally:
            subprocess.run(["umount", str(small)], check=True)

    def test_a_folder_that_is_a_file(self, fetch, server, body, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        fetch.downloads.root = tmp_path / "file" / "below"
        server.add("/f", body)
        with pytest.raises(RuntimeEnvironmentError) as caught:
            fetch("/f")
        assert str(tmp_path / "file") in str(caught.value.path)

    def test_writes_that_the_system_takes_in_parts(self, fetch, server, body, monkeypatch):
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:5000], at))
        server.add("/f", body[:100_000])
        fetch("/f")
        assert fetch.target.read_bytes() == body[:100_000]

    def test_every_byte_is_on_the_disk_before_the_file_has_its_name(
        self, fetch, server, body, monkeypatch
    ):
        seen: list[bool] = []
        sync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(fetch.target.exists()), sync(fd)))
        server.add("/f", body)
        fetch("/f")
        assert seen[0] is False


def test_ctrl_c_while_the_digest_is_computed_gives_the_lock_back(start, server, tmp_path, body):
    """Of a large file, most of which an earlier run fetched, it takes minutes."""
    slow = """
import time, types
import proxydet.artifacts.transfer
class Slow:
    def update(self, block):
        print("hashing", flush=True)
        time.sleep(1.5)
    def hexdigest(self):
        return "0" * 64
proxydet.artifacts.transfer.hashlib = types.SimpleNamespace(sha256=Slow)
"""
    part = tmp_path / f"models/.thing.bin.{os.getpid()}-00000000.part"
    part.parent.mkdir()
    with part.open("wb") as file:
        file.truncate(20 << 20)
    record = {"total": 20 << 20, "stretches": [[0, 20 << 20]]}
    part.with_name(f"{part.name}.json").write_text(json.dumps(record))
    process = start(before=slow, expected=b"\0" * (20 << 20))
    assert process.stdout.readline().strip() == "hashing"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not list((tmp_path / "models").glob("*.lock"))


class TestLeftovers:
    """What killed processes leave is used if it can be, and swept up in any case."""

    @pytest.fixture
    def left(self, fetch, server, body) -> Callable[..., Path]:
        """Leave a download that broke off after so many bytes, as if by another process."""

        def leave(count: int, body: bytes = body) -> Path:
            before = set(fetch.leftovers())
            kept = {path: path.read_bytes() for path in before}
            for path in before:
                path.unlink()
            server.add("/f", body, drop_after=count, later={2: {"answers": [(403, {})]}})
            with pytest.raises(TransferError):
                fetch("/f", pinned=body)
            for path, data in kept.items():
                path.write_bytes(data)
            (part,) = (p for p in fetch.leftovers() if p not in before and p.suffix == ".part")
            return part

        return leave

    def fetched_from(self, fetch, server, body) -> str | None:
        served = server.add("/f", body)
        fetch("/f", pinned=body)
        assert fetch.target.read_bytes() == body
        assert fetch.leftovers() == []
        (header,) = served.headers("Range")
        return header

    def test_the_largest_is_taken_over_and_the_others_removed(self, fetch, server, body, left):
        for count in (100_000, 400_000, 200_000):
            left(count)
        assert len([p for p in fetch.leftovers() if p.suffix == ".part"]) == 3
        plan = fetch.downloads.plan(fetch.downloads.artifact("file", body))
        assert plan.bytes_to_fetch == len(body) - 400_000
        assert self.fetched_from(fetch, server, body) == "bytes=400000-"

    @pytest.mark.parametrize(
        "record", ["", "{", '{"total": "x"}', '{"unknown": 1}', "null", "[" * 100_000]
    )  # fmt: skip
    def test_damaged_records_are_not_believed(self, fetch, server, body, left, record):
        part = left(100_000)
        part.with_name(part.name + ".json").write_text(record)
        assert self.fetched_from(fetch, server, body) is None

    def test_a_record_of_more_than_the_file_holds(self, fetch, server, body, left):
        """It was cut, and its process was killed before that was noted."""
        part = left(100_000)
        os.truncate(part, 60_000)
        assert self.fetched_from(fetch, server, body) == "bytes=60000-"

    def test_wrong_bytes_in_it_are_fetched_again(self, fetch, server, body, left):
        part = left(100_000)
        part.write_bytes(bytes(100_000))
        served = server.add("/f", body)
        fetch("/f", pinned=body)
        assert fetch.target.read_bytes() == body
        assert served.headers("Range") == ["bytes=100000-", None]

    def test_wrong_bytes_of_another_file_are_never_added_to_it(self, fetch, server, body, left):
        left(100_000, body[::-1])
        served = server.add("/f", body[::-1], etag='"v2"')
        with pytest.raises(DigestError):
            fetch("/f", pinned=body)
        assert fetch.leftovers() == []
        assert len(served.requests) == 1

    def test_what_a_kill_between_two_steps_leaves_is_swept_up(self, fetch, server, body, left):
        part = left(100_000)
        folder = part.parent
        (folder / f".{fetch.target.name}.1-00000000.part.json").write_text("{}")
        assert self.fetched_from(fetch, server, body) == "bytes=100000-"

    def test_those_of_a_file_whose_name_begins_alike_stay(self, fetch, server, body, left):
        part = left(100_000)
        names = [p.name.replace("file.bin", "file.bin.zip") for p in fetch.leftovers()]
        for path, name in zip(fetch.leftovers(), names, strict=True):
            shutil.copy(path, path.with_name(name))
        served = server.add("/f", body)
        fetch("/f", pinned=body)
        assert served.headers("Range") == ["bytes=100000-"]
        assert sorted(p.name for p in part.parent.glob(".file.bin*")) == sorted(names)

    def test_one_that_its_address_no_longer_confirms_is_not_used(self, fetch, server, body, left):
        """Without a digest only the same version at the same address can continue it."""
        part = left(100_000)
        record = part.with_name(part.name + ".json")
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "validator": None}))
        served = server.add("/f", body)
        fetch("/f")
        assert fetch.target.read_bytes() == body
        assert served.headers("Range") == [None]
