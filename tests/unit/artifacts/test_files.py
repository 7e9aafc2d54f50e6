"""Locks, unfinished downloads, records and replies by themselves, in the cases that whole downloads seldom meet."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import requests

from proxydet.artifacts.files import FileLock, read_json, write_json
from proxydet.artifacts.http import Client, Request
from proxydet.artifacts.partfile import PartFile, PartRecord
from proxydet.artifacts.records import HIDDEN_FOLDER, LOCK_FILE, FirstSeen, Records
from proxydet.artifacts.replies import RangeRefused, check_status


def test_a_lock_file_that_its_last_holder_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch
) -> None:
    """Else the next to come would make a new file, lock that, and two would hold the lock."""
    fcntl = pytest.importorskip("fcntl")
    path, flock = tmp_path / "lock", fcntl.flock
    removed: list[Path] = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with FileLock(path) as lock:
        assert lock.held
        assert path.exists()
        assert not FileLock(path)._try()


@pytest.mark.parametrize("durable", [True, False])
def test_records_are_on_the_disk_before_they_replace_the_old(
    tmp_path: Path, monkeypatch, durable
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_json(tmp_path / "f.json", {"a": 1}, durable=durable)
    assert len(synced) == durable


def test_nothing_of_an_abandoned_version_is_left_behind_a_shorter_one(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "f", take_over=True)
    part.append(b"a long version")
    part.restart(PartRecord(address="elsewhere"))
    part.append(b"short")
    part.move_to_target()
    assert (tmp_path / "f").read_bytes() == b"short"


def test_the_first_use_stays_recorded(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for number in (1, 2):
        records.record_first("thing", FirstSeen(sha256=f"{number}" * 64, size=number))
    seen = Records(tmp_path).first_seen("thing")
    assert seen is not None
    assert seen.size == 1


def test_a_record_is_changed_by_one_process_at_a_time(tmp_path: Path) -> None:
    records = Records(tmp_path)
    seen = FirstSeen(sha256="0" * 64, size=1)
    with FileLock(tmp_path / HIDDEN_FOLDER / f"{LOCK_FILE}.lock"):
        thread = threading.Thread(target=records.record_first, args=("mine", seen))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        write_json(tmp_path / LOCK_FILE, {"theirs": {}})
    thread.join(10)
    assert set(read_json(tmp_path / LOCK_FILE)) == {"mine", "theirs"}


def reply(status: int, **headers: str) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response.headers.update({name.replace("_", "-"): text for name, text in headers.items()})
    return response


def test_a_length_beside_chunks_means_nothing() -> None:
    """RFC 9112, 6.3: Transfer-Encoding overrides Content-Length."""
    head = check_status(reply(200, Content_Length="10", Transfer_Encoding="chunked"), "it")
    assert (head.length, head.total, head.chunked) == (None, None, True)


def test_a_stretch_beyond_the_end_of_the_file_contradicts_itself() -> None:
    with pytest.raises(RangeRefused, match="contradictory"):
        check_status(reply(206, Content_Range="bytes 5-9/8", Content_Length="5"), "it")


def test_connections_are_closed_in_the_end(server, quick, monkeypatch) -> None:
    closed: list[requests.Session] = []
    close = requests.Session.close
    monkeypatch.setattr(requests.Session, "close", lambda s: (closed.append(s), close(s))[1])
    server.add("/f", b"x")
    with (
        Client(quick) as client,
        client.open(Request(address=server.address("/f"), pinned=True)) as answer,
    ):
        assert answer.read(10) == b"x"
        assert not closed
    assert len(closed) == 1
