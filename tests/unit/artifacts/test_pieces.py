"""Several connections for one file: the same bytes as over one, whatever the server makes of it."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest

from proxydet.artifacts.digest import DigestFollower
from proxydet.artifacts.http import Client
from proxydet.artifacts.partfile import PartFile
from proxydet.artifacts.patience import Stopped
from proxydet.errors import TransferError


@pytest.fixture
def body() -> bytes:
    return random.Random(3).randbytes(1_000_003)


@pytest.fixture(autouse=True)
def several(fetch):
    fetch.settings = dataclasses.replace(
        fetch.settings, connections=4, piece_bytes=64_000, parallel_from=200_000
    )
    return fetch


def done(fetch, body):
    assert fetch.target.read_bytes() == body
    assert fetch.leftovers() == []
    assert fetch.task.count == len(body)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"drop_after": 30_000},
        {"stall_after": 40_000, "stalls": 2},
        {"most_at_once": 1, "pause": 0.001},
        {"ranges": False},
        {"forbidden_ranges": True},
        {"range_shift": 3},
        {"later": {4: {"range_shift": 3}, 5: {"range_shift": 0}}},
        {"answers": [(503, {})] * 3},
        {"chunked": True},
    ],
    ids=str,
)
def test_the_right_file(fetch, server, body, behaviour, pinned) -> None:
    behaviour = {
        name: list(value) if isinstance(value, list) else value for name, value in behaviour.items()
    }
    server.add("/f", body, **behaviour)
    fetch("/f", pinned=body if pinned else None)
    done(fetch, body)


def test_pieces_come_over_several_connections(fetch, server, body) -> None:
    served = server.add("/f", body, pause=0.005)
    fetch("/f")
    done(fetch, body)
    assert len(served.requests) == 16
    assert served.sent == len(body)
    assert all(request["If-Range"] == '"v1"' for request in served.requests[1:])


def test_a_server_that_refuses_more_than_one_connection(fetch, server, body) -> None:
    """Those that it refuses give up long before the one that it serves is done."""
    fetch.settings = dataclasses.replace(fetch.settings, retries=2, longest_delay=0.001)
    server.add("/f", body, most_at_once=1, pause=0.02)
    fetch("/f")
    done(fetch, body)


def test_a_small_file_takes_one_request(fetch, server, body) -> None:
    served = server.add("/f", body[:50_000])
    fetch("/f")
    done(fetch, body[:50_000])
    assert len(served.requests) == 1


def test_a_file_of_known_small_size_is_asked_for_plainly(fetch, server, body) -> None:
    served = server.add("/f", body[:100_000])
    fetch("/f", pinned=body[:100_000])
    done(fetch, body[:100_000])
    assert "Range" not in served.requests[0]


def test_a_file_that_changes_in_the_middle_is_never_mixed(fetch, server, body) -> None:
    new = body[::-1]
    server.add("/f", body, later={6: {"body": new, "etag": '"v2"'}})
    fetch("/f")
    done(fetch, new)


@pytest.mark.parametrize("etag", ['"v2"', '"v1"'])
def test_another_version_is_noticed_by_its_name_or_size(fetch, server, body, etag) -> None:
    """The server does not heed If-Range: only the head of its reply tells."""
    other = bytes(len(body) + (etag == '"v1"'))
    versions = [(body, '"v1"')] * 3 + [(other, etag)] * 40
    server.add("/f", body, heed_if_range=False, versions=versions)
    fetch("/f")
    assert fetch.target.read_bytes() == other


def test_a_server_that_sends_more_than_asked_for_is_not_listened_to(fetch, server, body) -> None:
    served = server.add("/f", body, later={2: {"open_ended": True}})
    fetch("/f")
    done(fetch, body)
    assert served.sent < 4 * len(body)


def test_pieces_that_end_early_are_asked_for_again(fetch, server, body) -> None:
    server.add("/f", body, chunked=True, later={3: {"cut": 100}, 7: {"cut": 0}})
    fetch("/f")
    done(fetch, body)


def test_without_a_version_one_connection_is_used(fetch, server, body) -> None:
    served = server.add("/f", body, etag=None)
    fetch("/f")
    done(fetch, body)
    assert len(served.requests) == 2


def test_a_server_that_dies_in_the_middle(fetch, server, body) -> None:
    server.add("/f", body, later={6: {"answers": [(500, {})] * 1000}})
    with pytest.raises(TransferError, match="500"):
        fetch("/f")
    assert not fetch.target.exists()
    assert any(name.endswith(".part") for name in fetch.leftovers())
    server.add("/f", body)
    fetch.task.count = 0
    fetch("/f")
    done(fetch, body)
    assert server.files["/f"].sent < len(body)


def test_what_pieces_left_is_continued_over_one_connection(fetch, server, body) -> None:
    server.add("/f", body, later={8: {"answers": [(500, {})] * 1000}})
    with pytest.raises(TransferError):
        fetch("/f")
    fetch.settings = dataclasses.replace(fetch.settings, connections=1)
    served = server.add("/f", body)
    fetch.task.count = 0
    fetch("/f")
    done(fetch, body)
    assert served.requests[0]["Range"] != "bytes=0-"


def test_an_error_in_a_thread_reaches_the_caller(fetch, server, body, monkeypatch) -> None:
    def broken(self, index) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(PartFile, "finish_piece", broken)
    server.add("/f", body)
    with pytest.raises(ZeroDivisionError):
        fetch("/f")


def test_the_stop_sign_ends_all_connections(fetch, server, body, monkeypatch) -> None:
    served = server.add("/f", body, pause=0.01)
    made: list[Client] = []
    original = Client.__enter__
    monkeypatch.setattr(Client, "__enter__", lambda self: (made.append(self), original(self))[1])
    timer = threading.Timer(0.15, lambda: made[0].stop.set())
    timer.start()
    with pytest.raises(Stopped):
        fetch("/f")
    timer.join()
    assert 0 < served.sent < len(body)
    assert not fetch.target.exists()


def test_the_digest_is_of_what_lies_on_the_disk(tmp_path) -> None:
    """Bytes that are written over after they were read into the digest are read again."""
    path = tmp_path / "f"
    path.write_bytes(b"a" * 3_000_000)
    with path.open("r+b") as file:
        follower = DigestFollower(file.fileno())
        follower.reached(3_000_000)
        follower.result()
        file.seek(1_000_000)
        file.write(b"b" * 1000)
        file.flush()
        follower.reached(1_000_000)
        follower.reached(3_000_000)
        import hashlib

        assert follower.result() == hashlib.sha256(path.read_bytes()).hexdigest()
        follower.close()
