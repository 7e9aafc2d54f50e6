"""Killed processes, several processes at once, full disks, Ctrl-C: nothing is lost, nothing wrong gets the name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxydet.artifacts.files import FileLock, disk_errors
from proxydet.artifacts.partfile import PartFile, PartRecord, kept_bytes
from proxydet.artifacts.patience import Stopped
from proxydet.errors import ArtifactError, DiskFullError

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
from proxydet.artifacts.catalogue import Catalogue
from proxydet.artifacts.downloader import Downloader, DownloadOptions
from proxydet.artifacts.settings import TransferSettings
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
    return random.Random(1).randbytes(3_000_000)


@pytest.fixture
def start(server, tmp_path: Path, body: bytes) -> Callable[..., subprocess.Popen[str]]:
    def begin(
        connections: int = 1, *, pinned: bool = True, **behaviour: object
    ) -> subprocess.Popen[str]:
        if "/thing" not in server.files:
            server.add("/thing", body, **behaviour)
        digest = (
            f'sha256 = "{hashlib.sha256(body).hexdigest()}"\nsize = {len(body)}' if pinned else ""
        )
        text = CATALOGUE.format(address=server.address("/thing"), digest=digest)
        (tmp_path / "c.toml").write_text(text)
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(connections)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def hidden(folder: Path) -> list[str]:
    return [
        path.name
        for path in (folder / "models").iterdir()
        if path.name.startswith(".") and path.is_file()
    ]


def kill_at_random(
    start, server, tmp_path: Path, body: bytes, times: int, connections: int, *, pinned: bool
) -> None:
    """Kill a download at random points until it has been killed so often or is done, and let it end."""
    target = tmp_path / "models/thing.bin"
    chance = random.Random(times)
    kills = 0
    for _ in range(times):
        process = start(connections, pinned=pinned, pause=0.004)
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
    # What a killed process had is used again: at most one piece or chunk a connection is lost each time.
    assert server.files["/thing"].sent < len(body) + kills * connections * 450_000


@pytest.mark.parametrize("connections", [1, 3])
def test_killed_and_resumed(start, server, tmp_path, body, connections) -> None:
    kill_at_random(start, server, tmp_path, body, 3, connections, pinned=connections == 1)


@pytest.mark.slow
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("pinned", [True, False])
def test_killed_fifty_times_and_resumed(start, server, tmp_path, body, connections, pinned) -> None:
    kill_at_random(start, server, tmp_path, body, 50, connections, pinned=pinned)


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_several_processes_fetch_one_file_once(start, server, tmp_path, body, count) -> None:
    processes = [start(pause=0.002) for _ in range(count)]
    assert sorted(finish(process) for process in processes) == ["fetched", *["ready"] * (count - 1)]
    assert (tmp_path / "models/thing.bin").read_bytes() == body
    assert len(server.files["/thing"].requests) == 1
    assert hidden(tmp_path) == []


def test_one_goes_on_where_the_other_was_killed(start, server, tmp_path, body) -> None:
    first = start(pause=0.004)
    while server.files["/thing"].sent < 1_000_000:
        time.sleep(0.005)
    second = start()
    time.sleep(0.5)
    first.kill()
    first.communicate()
    assert finish(second) == "fetched"
    assert (tmp_path / "models/thing.bin").read_bytes() == body
    assert server.files["/thing"].sent < 1.7 * len(body)


def test_without_locks_each_process_has_its_own_file(
    start, server, tmp_path, body, monkeypatch
) -> None:
    """On a file system that has no locks two processes both fetch, and both end well."""
    no_locks = (
        "import fcntl, errno\n"
        "def flock(*a): raise OSError(errno.ENOLCK, 'no locks')\n"
        "fcntl.flock = flock\n"
    )  # fmt: skip
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", no_locks + SCRIPT)
    processes = [start(together=2) for _ in range(2)]
    assert [finish(process) for process in processes] == ["fetched", "fetched"]
    assert len(server.files["/thing"].requests) == 2
    assert (tmp_path / "models/thing.bin").read_bytes() == body


def test_ctrl_c_keeps_what_was_fetched(start, server, tmp_path, body) -> None:
    process = start(pause=0.004)
    while server.files["/thing"].sent < 1_000_000:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not (tmp_path / "models/thing.bin").exists()
    assert kept_bytes(tmp_path / "models/thing.bin") > 800_000
    assert finish(start()) == "fetched"
    assert server.files["/thing"].sent < len(body) + 500_000


def test_a_full_disk(server, fetch, body) -> None:
    """The largest allowed file size stands for the end of the disk: writing fails in the middle."""
    server.add("/f", body)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskFullError, match="no room left") as caught:
            fetch("/f", pinned=body)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.hint
    assert not fetch.target.exists()
    assert kept_bytes(fetch.target) == 1_000_000
    fetch.task.count = 0
    fetch("/f", pinned=body)
    assert fetch.target.read_bytes() == body
    assert server.files["/f"].sent < len(body) + 1_500_000


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_file_system_that_fills_up(server, fetch, body, tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        fetch.folder = small
        server.add("/f", body, chunked=True)
        with pytest.raises(DiskFullError):
            fetch("/f")
        assert not fetch.target.exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EACCES, ArtifactError)],
)
def test_errors_of_the_disk_in_plain_words(tmp_path, code, kind) -> None:
    with pytest.raises(kind) as caught, disk_errors(tmp_path / "f"):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint
    assert caught.value.path == tmp_path / "f"


def test_a_folder_that_is_a_file(fetch, server, body, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    fetch.folder = tmp_path / "file" / "below"
    server.add("/f", body)
    with pytest.raises(ArtifactError, match="cannot be written"):
        fetch("/f")


class TestLock:
    def test_the_file_goes_away_and_a_killed_holder_does_not_matter(self, tmp_path) -> None:
        path = tmp_path / "l"
        with FileLock(path) as lock:
            assert lock.held
            code = (
                "import sys; from pathlib import Path; from proxydet.artifacts.files import FileLock\n"
                "l = FileLock(Path(sys.argv[1])); l.acquire(); print('held', l.held); sys.stdout.flush(); input()"
            )
            other = subprocess.Popen(
                [sys.executable, "-c", code, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            time.sleep(0.3)
            assert other.poll() is None
        assert other.stdout is not None
        assert other.stdout.readline() == "held True\n"
        other.kill()
        other.communicate()
        with FileLock(path) as lock:
            assert lock.held
        assert not path.exists()

    def test_many_take_turns(self, tmp_path) -> None:
        code = (
            "import sys, os; from pathlib import Path; from proxydet.artifacts.files import FileLock\n"
            "for _ in range(20):\n"
            "    with FileLock(Path(sys.argv[1])):\n"
            "        p = Path(sys.argv[2]); n = int(p.read_text()); p.write_text(str(n + 1))\n"
        )
        counter = tmp_path / "n"
        counter.write_text("0")
        run = [sys.executable, "-c", code, str(tmp_path / "l"), str(counter)]
        processes = [subprocess.Popen(run) for _ in range(3)]
        assert [process.wait(60) for process in processes] == [0, 0, 0]
        assert counter.read_text() == "60"


class TestLeftovers:
    def part(self, tmp_path: Path, count: int) -> PartFile:
        part = PartFile(tmp_path / "f", take_over=False)
        part.restart(PartRecord(address="a", total=100, validator='"v"'))
        part.append(b"x" * count)
        return part

    def test_the_largest_is_taken_over_and_the_others_removed(self, tmp_path) -> None:
        for count in (10, 40, 20):
            self.part(tmp_path, count).close()
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert (part.frontier, part.record.validator) == (40, '"v"')
        assert len(list(tmp_path.iterdir())) == 2

    def in_pieces(self, tmp_path: Path) -> PartFile:
        """Pieces 0 and 2 of ten."""
        part = PartFile(tmp_path / "f", take_over=True)
        part.restart(PartRecord(address="a", total=100, validator='"v"'))
        assert part.begin_pieces(10) == list(range(10))
        for index in (0, 2):
            part.write(index * 10, b"y" * 10)
            part.finish_piece(index)
        return part

    def test_pieces_of_another_size_count_up_to_the_first_gap(self, tmp_path) -> None:
        self.in_pieces(tmp_path).close()
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert (part.stored, part.frontier) == (20, 10)
            assert part.begin_pieces(5) == list(range(2, 20))

    def test_without_pieces_nothing_behind_the_first_gap_counts(self, tmp_path) -> None:
        with contextlib.closing(self.in_pieces(tmp_path)) as part:
            part.end_pieces()
        assert kept_bytes(tmp_path / "f") == 10
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert (part.stored, part.frontier) == (10, 10)

    @pytest.mark.parametrize("moment", ["restart", "end_pieces"])
    def test_killed_between_cutting_the_file_and_noting_it(
        self, tmp_path, monkeypatch, moment
    ) -> None:
        """Pieces that the record names and the file no longer holds do not count: they would be read as zeros."""
        part = self.in_pieces(tmp_path)
        monkeypatch.setattr(part, "_note", lambda record: None)
        part.restart(PartRecord()) if moment == "restart" else part.end_pieces()
        part._end()
        there = 0 if moment == "restart" else 10
        assert kept_bytes(tmp_path / "f") == there
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert (part.stored, part.frontier) == (there, there)

    def test_a_file_whose_name_begins_like_another_is_not_taken_for_its_leftover(
        self, tmp_path
    ) -> None:
        with contextlib.closing(PartFile(tmp_path / "f.zip", take_over=True)) as other:
            other.restart(PartRecord(address="a", total=100, validator='"v"'))
            other.append(b"x" * 40)
            assert kept_bytes(tmp_path / "f") == 0
            with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
                assert part.path != other.path
            assert other.path.exists()
            assert kept_bytes(tmp_path / "f.zip") == 40

    def test_what_a_kill_between_two_steps_leaves_is_swept_up(self, tmp_path) -> None:
        self.part(tmp_path, 10).close()
        (record,) = tmp_path.glob(".f.*.json")
        for litter in (
            f".{record.name}.0123456789ab.tmp",  # the record was being replaced
            ".f.1-00000000.part.json",  # the file had got its final name, the record was still there
        ):
            (tmp_path / litter).write_text("{}")
        (tmp_path / ".f.zip.1-00000000.part.json").write_text("{}")
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert part.frontier == 10
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {record.name, part.path.name, ".f.zip.1-00000000.part.json"}

    def test_a_thread_that_was_left_behind_cannot_write_any_more(self, tmp_path) -> None:
        """The descriptor's number may belong to another file by then."""
        part = self.part(tmp_path, 10)
        part.close()
        with pytest.raises(Stopped):
            part.write(10, b"late")

    def test_writes_that_the_system_takes_in_parts(self, tmp_path, monkeypatch) -> None:
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:3], at))
        part = PartFile(tmp_path / "f", take_over=False)
        part.restart(PartRecord(address="a", total=8))
        part.append(b"abcdefgh")
        part.move_to_target()
        assert (tmp_path / "f").read_bytes() == b"abcdefgh"

    def test_every_byte_is_on_the_disk_before_the_file_has_its_name(
        self, tmp_path, monkeypatch
    ) -> None:
        seen: list[bool] = []
        sync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (seen.append((tmp_path / "f").exists()), sync(fd))
        )
        part = self.part(tmp_path, 100)
        part.move_to_target()
        assert seen == [False]
        assert (tmp_path / "f").read_bytes() == b"x" * 100

    def test_without_the_lock_nothing_is_touched(self, tmp_path) -> None:
        self.part(tmp_path, 10).close()
        with contextlib.closing(PartFile(tmp_path / "f", take_over=False)) as part:
            assert part.frontier == 0
        assert kept_bytes(tmp_path / "f") == 10

    @pytest.mark.parametrize(
        "record",
        [
            "",
            "{",
            "[]",
            '{"total": "x"}',
            '{"done": 3}',
            '{"unknown": 1}',
            '{"done": [-1]}',
            '{"done": ["a"], "total": 3}',
        ],
    )
    def test_damaged_records_are_not_believed(self, tmp_path, record) -> None:
        self.part(tmp_path, 10).close()
        next(tmp_path.glob("*.json")).write_text(record)
        assert kept_bytes(tmp_path / "f") == 0
        with contextlib.closing(PartFile(tmp_path / "f", take_over=True)) as part:
            assert part.frontier == 0
        assert list(tmp_path.iterdir()) == []
