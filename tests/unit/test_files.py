"""Files appear whole or not at all, locks die with their owners, logs survive what crashes do to them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxydet.errors import (
    DataError,
    DiskFullError,
    InputError,
    LockedError,
    RuntimeEnvironmentError,
)
from proxydet.files import (
    JsonLines,
    Lock,
    build_once,
    discard,
    read_json,
    remembered_sha256,
    require_room,
    sha256,
    staged,
    sweep,
    write_bytes,
    write_errors,
    write_json,
    write_text,
)


class TestWriting:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_a_full_disk_is_reported_with_the_file(self, tmp_path, number):
        with (
            pytest.raises(DiskFullError, match=r"a\.txt") as caught,
            write_errors(tmp_path / "a.txt"),
        ):
            raise OSError(number, "full")
        assert caught.value.path == tmp_path / "a.txt"
        assert caught.value.hint

    def test_other_errors_are_reported_with_the_file(self, tmp_path):
        with (
            pytest.raises(RuntimeEnvironmentError, match=r"a\.txt") as caught,
            write_errors(tmp_path / "a.txt", hint="do this"),
        ):
            raise PermissionError(errno.EACCES, "not allowed")
        assert not isinstance(caught.value, DiskFullError)
        assert caught.value.hint == "do this"

    def test_a_file_that_cannot_be_written_leaves_the_old_one(self, tmp_path, monkeypatch):
        target = write_bytes(tmp_path / "new" / "a.bin", b"old")

        def broken(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(Path, "replace", broken)
        with pytest.raises(DiskFullError):
            write_bytes(target, b"new")
        assert target.read_bytes() == b"old"
        assert list(target.parent.iterdir()) == [target]

    def test_a_staged_file_takes_its_place_at_the_end(self, tmp_path):
        target = tmp_path / "new" / "model.onnx"
        with staged(target) as temporary:
            temporary.write_bytes(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"
        with pytest.raises(RuntimeError), staged(target) as temporary:
            raise RuntimeError
        with staged(target) as temporary:
            discard(temporary)
        discard(target)  # not one of its files
        assert target.read_bytes() == b"whole"
        assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("durable", [True, False])
    def test_a_file_that_another_program_removed_before_it_was_in_place_is_an_error(
        self, tmp_path, durable
    ):
        with (
            pytest.raises(RuntimeEnvironmentError, match=r"a\.txt"),
            staged(tmp_path / "a.txt", durable=durable) as temporary,
        ):
            temporary.unlink()
        assert not list(tmp_path.iterdir())

    SWEEPS = """
import sys
from pathlib import Path
from proxydet.files import sweep
sweep(Path(sys.argv[1]), sole_writer=True)
"""

    def test_who_holds_a_folder_leaves_what_another_process_writes_in_it(self, tmp_path):
        with staged(tmp_path / "model.onnx") as temporary:
            temporary.write_bytes(b"whole")
            subprocess.run([sys.executable, "-c", self.SWEEPS, str(tmp_path)], check=True)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    def test_a_link_is_followed_a_folder_refused_and_a_pipe_written_to(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
        write_text(tmp_path / "link", "text")
        assert (tmp_path / "real" / "file").read_text() == "text"
        assert (tmp_path / "link").is_symlink()
        with pytest.raises(RuntimeEnvironmentError, match="real"):
            write_bytes(tmp_path / "real", b"")
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                "from proxydet.files import *; write_text(Path('/dev/stdout'), 'a')",
            ],
            capture_output=True,
            check=True,
        )
        assert ended.stdout == b"a"

    def test_a_long_name_can_be_written(self, tmp_path):
        assert write_text(tmp_path / ("n" * 250), "text").read_text() == "text"

    KILLED = """
import os, signal, sys
from pathlib import Path
from proxydet.files import staged
with staged(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

    def test_what_a_killed_process_left_is_removed_by_the_next_writer_and_what_is_written_is_not(
        self, tmp_path
    ):
        ended = subprocess.run(
            [sys.executable, "-c", self.KILLED, str(tmp_path / "other.onnx")], check=False
        )
        assert ended.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        target = tmp_path / "model.onnx"
        with staged(target) as first:
            assert not left.exists()
            sweep(tmp_path, sole_writer=False)
            with staged(target) as second:
                assert first.exists()
                second.write_bytes(b"second")
            assert target.read_bytes() == b"second"
        assert list(tmp_path.iterdir()) == [target]

    def test_what_another_machine_left_is_removed_after_a_day_and_what_others_hide_is_not(
        self, tmp_path
    ):
        ours = f".a.{'0' * 32}.tmp"
        theirs = {".notes.2024.tmp", f".backup.{'0' * 32}", f".{'0' * 32}.tar"}
        names = [ours, *theirs]
        for age in (80_000, 90_000):
            for name in names:
                path = tmp_path / str(age) / name
                path.parent.mkdir(exist_ok=True)
                path.touch()
                os.utime(path, (time.time() - age,) * 2)
            write_text(tmp_path / str(age) / "b", "")
        assert {p.name for p in (tmp_path / "80000").iterdir()} == {*names, "b"}
        assert {p.name for p in (tmp_path / "90000").iterdir()} == {*theirs, "b"}
        sweep(tmp_path / "80000", sole_writer=True)
        assert {p.name for p in (tmp_path / "80000").iterdir()} == {*theirs, "b"}

    def test_room_is_asked_for_before(self, tmp_path):
        require_room(tmp_path / "not" / "there", 1)
        with pytest.raises(DiskFullError, match="there"):
            require_room(tmp_path / "not" / "there", 1 << 60)


class TestReading:
    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[1]", b"\xff{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
    )
    def test_damage_names_file_and_remedy(self, tmp_path, content):
        (tmp_path / "m.json").write_bytes(content)
        with pytest.raises(DataError, match=r"manifest .*m\.json") as caught:
            read_json(tmp_path / "m.json", what="manifest", hint="do this", error=DataError)
        assert (caught.value.path, caught.value.hint) == (tmp_path / "m.json", "do this")

    def test_what_is_not_a_file_and_what_is_too_large_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(InputError):
                read_json(path)
        write_json(tmp_path / "large", {"a": "b" * 100})
        with pytest.raises(InputError, match="larger"):
            read_json(tmp_path / "large", limit=50)
        assert read_json(tmp_path / "large") == {"a": "b" * 100}
        assert read_json(tmp_path / "absent", default={}) == {}
        with pytest.raises(InputError, match="absent"):
            read_json(tmp_path / "absent")

    def test_a_pipe_that_nobody_reads_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(RuntimeEnvironmentError, match="pipe"):
            write_text(tmp_path / "pipe", "text")
        reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
        for _ in range(500):
            try:
                write_text(tmp_path / "pipe", "text")
                break
            except RuntimeEnvironmentError:
                time.sleep(0.01)
        assert reader.communicate(timeout=10)[0] == b"text"

    def test_the_digest_is_remembered_while_the_file_looks_unchanged(self, tmp_path):
        source, memory = tmp_path / "s", tmp_path / "m"
        source.write_bytes(b"one")
        (tmp_path / "link").symlink_to(source)
        true = hashlib.sha256(b"one").hexdigest()
        seen: list[int] = []
        assert sha256(source, seen.append) == remembered_sha256(source, memory) == true
        assert seen == [3]
        (note,) = memory.iterdir()
        note.write_bytes(note.read_bytes().replace(true.encode(), b"0" * 64))
        assert remembered_sha256(tmp_path / "link", memory) == "0" * 64
        note.write_bytes(b"{")
        assert remembered_sha256(source, memory) == true

    @pytest.mark.parametrize("change", ["size", "time", "inode", "status"])
    def test_size_times_and_inode_each_betray_a_change(self, tmp_path, change):
        source, memory = tmp_path / "s", tmp_path / "m"
        source.write_bytes(b"one")
        os.utime(source, ns=(10**18, 10**18))
        remembered_sha256(source, memory)
        target = tmp_path / "new" if change == "inode" else source
        target.write_bytes(b"longer" if change == "size" else b"two")
        if change != "time":
            os.utime(target, ns=(10**18, 10**18))
        target.replace(source)
        assert remembered_sha256(source, memory) == hashlib.sha256(source.read_bytes()).hexdigest()

    def test_a_digest_of_what_cannot_be_read_is_an_error(self, tmp_path):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(DataError) as caught:
                remembered_sha256(path, tmp_path / "m", error=DataError)
            assert caught.value.path == path


class TestJsonLines:
    RECORDS = ({"iteration": 1, "a": 0.5}, {"iteration": 2, "a": 0.25})

    @pytest.fixture
    def lines(self, tmp_path) -> JsonLines:
        lines = JsonLines(tmp_path / "metrics.jsonl")
        for record in self.RECORDS:
            lines.append(record)
        return lines

    @pytest.mark.parametrize("cut", ["", "{", '{"iteration": 3, "losses": {"a": 1}'])
    def test_a_cut_line_is_passed_over_and_removed_before_the_next(self, lines, cut):
        with lines.path.open("a") as file:
            file.write(cut)
        assert tuple(lines.read()) == self.RECORDS
        lines = JsonLines(lines.path)
        lines.append({"iteration": 3})
        assert tuple(lines.read()) == (*self.RECORDS, {"iteration": 3})
        assert b"\n".join(lines.path.read_bytes().splitlines()) + b"\n" == lines.path.read_bytes()

    def test_the_name_of_a_new_file_survives_a_power_cut_too(self, tmp_path, monkeypatch):
        flushed: list[str] = []
        monkeypatch.setattr(
            os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        )
        lines = JsonLines(tmp_path / "new" / "log.jsonl")
        lines.append({"iteration": 1})
        lines.append({"iteration": 2})
        assert flushed == [str(lines.path), str(lines.path.parent), str(lines.path)]

    def test_damaged_lines_are_passed_over_counted_and_reported_once(self, lines, caplog):
        with lines.path.open("ab") as file:
            file.write(b"\0" * 5000 + b"\n" + b"[1]\n\xff\n" + b"x" * JsonLines._LONGEST + b"yz\n")
        lines.append({"iteration": 3})
        for _ in range(2):
            assert tuple(lines.read()) == (*self.RECORDS, {"iteration": 3})
        assert list(JsonLines(lines.path).read())  # another reader of the same process
        assert [r.getMessage().partition(":")[0] for r in caplog.records] == [str(lines.path)]
        assert "4 damaged lines" in caplog.text
        assert lines.keep(lambda record: record["iteration"] != 2) == [self.RECORDS[1]]
        assert [r["iteration"] for r in JsonLines(lines.path).read()] == [1, 3]

    def test_a_file_that_is_not_there_has_no_records(self, tmp_path):
        lines = JsonLines(tmp_path / "metrics.jsonl")
        assert list(lines.read()) == lines.keep(bool) == []
        assert not lines.path.exists()

    def test_one_that_cannot_be_read_is_an_error(self, tmp_path):
        with pytest.raises(InputError, match=str(tmp_path)):
            list(JsonLines(tmp_path).read())


HOLDS = """
import sys, time
from pathlib import Path
from proxydet.files import Lock
lock = Lock(Path(sys.argv[1]), stale_after_s=float(sys.argv[2]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


class Holder:
    """Another process that holds a lock."""

    def __init__(self, path: Path, stale_after_s: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(path), str(stale_after_s)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def elsewhere(path: Path) -> None:
    """Make the owner of a lock look as one on another machine."""
    path.write_text(path.read_text().replace("host=", "host=far-"))
    record = path.with_name(f"{path.name}.owner")
    owner = json.loads(record.read_text())
    write_json(record, {**owner, "host": "far", "machine": "far"})


class TestLocks:
    def test_a_second_process_learns_at_once_who_holds_it(self, tmp_path):
        path = tmp_path / "run.lock"
        with Holder(path) as holder:
            start = time.monotonic()
            with pytest.raises(LockedError) as caught:
                Lock(path, subject="the run", hint="go away").acquire(wait=False)
            assert time.monotonic() - start < 1
            message = caught.value.message
            assert message.startswith("the run is in use")
            assert f"process {holder.process.pid} on {os.uname().nodename} since 20" in message
            assert caught.value.hint == "go away"
            assert (owner := Lock(path).owner()) is not None
            assert owner.pid == holder.process.pid
            assert Lock(path).held is False

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
    def test_what_is_in_its_place_is_an_error_that_names_it(self, tmp_path, make):
        make(tmp_path / "run.lock.owner")
        with pytest.raises(RuntimeEnvironmentError, match=r"run\.lock\.owner"):
            Lock(tmp_path / "run.lock").acquire(wait=False)
        assert not (tmp_path / "run.lock").exists()

    def test_an_owner_here_that_was_killed_is_recognised_at_once(self, tmp_path):
        path = tmp_path / "run.lock"
        with Holder(path) as holder:
            holder.process.kill()
            # Ended but not yet asked for, as a container without an init process leaves it.
            os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)
            start = time.monotonic()
            lock = Lock(path)
            lock.acquire(wait=False)
            assert lock.held
            assert time.monotonic() - start < 2
        lock.release()
        assert not list(tmp_path.iterdir())

    def test_where_names_cannot_be_exchanged_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)  # as on NFS
        path = tmp_path / "run.lock"
        with Holder(path) as holder:
            holder.process.kill()
            holder.process.wait()
            start = time.monotonic()
            lock = Lock(path)
            lock.acquire(wait=False)
            assert lock.held
            assert time.monotonic() - start < 2
            lock.release()
        with Holder(path, 1.0) as holder:
            holder.process.kill()
            holder.process.wait()
            elsewhere(path)
            lock = Lock(path, stale_after_s=1.0)
            lock.acquire(wait=False)
            assert lock.held
            lock.release()

    def test_an_owner_elsewhere_is_waited_for_until_it_shows_life(self, tmp_path, caplog):
        path = tmp_path / "run.lock"
        with Holder(path, 2.0):
            elsewhere(path)
            with pytest.raises(LockedError, match="on far"):
                Lock(path, stale_after_s=2.0).acquire(wait=False)
        assert "at most 2 s" in caplog.text

    def test_an_owner_elsewhere_that_died_is_taken_over_after_the_stated_time(
        self, tmp_path, caplog
    ):
        path = tmp_path / "run.lock"
        with Holder(path, 1.0) as holder:
            holder.process.kill()
            holder.process.wait()
            elsewhere(path)
            start = time.monotonic()
            lock = Lock(path, stale_after_s=1.0)
            lock.acquire(wait=False)
            assert 1.0 <= time.monotonic() - start < 5.0
            assert lock.held
            lock.release()
        assert "at most 1 s" in caplog.text

    @pytest.mark.parametrize("taken", [True, False], ids=["by another", "and released since"])
    def test_one_who_was_suspended_learns_that_it_lost_the_lock(self, tmp_path, taken):
        lock = Lock(tmp_path / "run.lock", stale_after_s=0.4)
        lock.acquire()
        if taken:
            write_bytes(lock.path, b"another's")
            (tmp_path / "run.lock.owner").write_text('{"host": "far", "pid": 1}')
        else:
            lock.path.unlink()
        deadline = time.monotonic() + 60
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LockedError):
            lock.check()
        lock.release()
        assert len(list(tmp_path.iterdir())) == 2 * taken, "the other one's, and nothing else"

    def test_a_child_that_ends_leaves_the_lock(self, tmp_path):
        with Lock(tmp_path / "run.lock") as lock:
            process = multiprocessing.get_context("fork").Process(target=str)
            process.start()
            process.join()
            assert lock.path.exists()
            assert lock.owner() is not None
        assert not list(tmp_path.iterdir())

    def test_waiting_ends_when_told_so(self, tmp_path):
        with Lock(tmp_path / "a.lock"):
            other = Lock(tmp_path / "a.lock")
            other.acquire(until=lambda: True)
            assert not other.held
            other.release()

    def test_a_file_system_without_locks_is_reported_and_gone_on_with(
        self, tmp_path, monkeypatch, caplog
    ):
        def none(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSYS, "not implemented")

        monkeypatch.setattr("filelock.SoftFileLease._acquire", none)
        for name in ("a.lock", "a.lock", "b.lock"):
            with Lock(tmp_path / name) as lock:
                assert not lock.held
        assert caplog.text.count("no locks") == 1

    def test_a_place_that_cannot_be_written_to_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RuntimeEnvironmentError, match="file"):
            Lock(tmp_path / "file" / "a.lock").acquire()


def _build(folder: Path) -> None:
    def build(path: Path) -> None:
        with (folder / "log").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        write_text(path, "whole")

    build_once(folder / "target", build)
    assert (folder / "target").read_text() == "whole"


class TestBuildOnce:
    def test_one_of_many_processes_builds_and_all_see_the_whole(self, tmp_path):
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_build, args=(tmp_path,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert (tmp_path / "log").read_text() == "x"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "target"]

    def test_an_existing_file_is_not_built(self, tmp_path):
        (tmp_path / "t").write_text("there")
        build_once(tmp_path / "t", lambda _: pytest.fail("built"))

    def test_the_lock_of_one_that_was_killed_when_it_was_done_is_removed(self, tmp_path):
        with Holder(tmp_path / "t.lock") as holder:
            (tmp_path / "t").write_text("there")
            build_once(tmp_path / "t", lambda _: pytest.fail("built"))
            assert (tmp_path / "t.lock").exists(), "its owner lives"
            holder.process.kill()
            holder.process.wait()
        build_once(tmp_path / "t", lambda _: pytest.fail("built"))
        assert [path.name for path in tmp_path.iterdir()] == ["t"]

    def test_a_failed_build_frees_the_lock(self, tmp_path):
        def fail(_: Path) -> None:
            raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            build_once(tmp_path / "t", fail)
        build_once(tmp_path / "t", lambda path: path.write_text("x") and None)
        assert [p.name for p in tmp_path.iterdir()] == ["t"]

    def test_nobody_waits_for_the_dead(self, tmp_path, caplog):
        with Holder(tmp_path / "t.lock") as holder:
            holder.process.kill()
            holder.process.wait()
            start = time.monotonic()
            build_once(tmp_path / "t", lambda path: path.write_text("x") and None)
            assert time.monotonic() - start < 2
        # As version 0.1 wrote it.
        (tmp_path / "u.lock").write_text("dead 1\n")
        build_once(tmp_path / "u", lambda path: path.write_text("x") and None)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "u"]

    def test_a_file_that_came_while_waiting_is_not_built_again(self, tmp_path, caplog):
        with Lock(tmp_path / "t.lock"):
            looks = iter([False, False, True])
            path = tmp_path / "t"

            class Appears(type(path)):  # type: ignore[misc]
                def exists(self, **_: object) -> bool:
                    return next(looks, True)

            build_once(Appears(path), lambda _: pytest.fail("built"))
        assert caplog.records[0].levelno == logging.WARNING
