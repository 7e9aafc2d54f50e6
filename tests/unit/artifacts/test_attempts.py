"""One address, tried until it serves the file: the turns that a well-behaved server never leads to."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest

from proxydet.artifacts import files, patience
from proxydet.artifacts.patience import Backoff, SpeedWatch, Transient
from proxydet.artifacts.settings import TransferSettings
from proxydet.errors import DiskFullError, TransferError


def test_a_server_that_refuses_even_the_whole_file_is_asked_no_third_time(
    fetch, server, body
) -> None:
    served = server.add("/f", body, answers=[(416, {})] * 5)
    with pytest.raises(TransferError, match="has no such bytes"):
        fetch("/f")
    assert len(served.requests) == 2


def test_416_with_all_bytes_there_asks_for_nothing_more(fetch, server, body) -> None:
    served = server.add("/f", body, announced=400_000, later={2: {"announced": None}})
    fetch("/f")
    assert fetch.target.read_bytes() == body
    assert served.sent == len(body)
    assert len(served.requests) == 2


def test_two_replies_joined_without_a_version_are_fetched_anew_if_they_do_not_fit(
    fetch, server, body
) -> None:
    served = server.add(
        "/f",
        etag=None,
        drop_after=100_000,
        versions=[(body[::-1], None), (body, None), (body, None)],
        later={2: {"drop_after": None}},
    )
    fetch("/f", pinned=body)
    assert fetch.target.read_bytes() == body
    assert ["Range" in request for request in served.requests] == [False, True, False]


def test_room_is_asked_for_as_soon_as_a_reply_tells_the_size(
    fetch, server, body, monkeypatch
) -> None:
    """No size was published, so the plan could not know."""
    server.add("/f", body)
    monkeypatch.setattr(files, "free_bytes", lambda _: len(body) - 1)
    with pytest.raises(DiskFullError, match="more in"):
        fetch("/f")
    assert not fetch.target.exists()
    monkeypatch.setattr(files, "free_bytes", lambda _: len(body))
    fetch("/f")
    assert fetch.target.read_bytes() == body


def test_a_host_that_answers_again_has_the_usual_patience_for_its_next_address(
    fetch, server, body
) -> None:
    server.add("/wrong", body[::-1], answers=[(503, {})])
    right = server.add("/right", body, answers=[(503, {})])
    fetch("/wrong", "/right", pinned=body)
    assert fetch.target.read_bytes() == body
    assert len(right.requests) == 2


def test_compression_is_not_asked_for(fetch, server, body) -> None:
    served = server.add("/f", body)
    fetch("/f")
    assert served.requests[0]["Accept-Encoding"] == "identity"


class TestSeveralConnections:
    @pytest.fixture
    def body(self) -> bytes:
        return random.Random(3).randbytes(1_000_003)

    def test_a_piece_that_drips_is_asked_for_anew(self, fetch, server, body) -> None:
        fetch.settings = dataclasses.replace(
            fetch.settings,
            connections=4,
            piece_bytes=64_000,
            parallel_from=200_000,
            slow_seconds=0.2,
        )
        served = server.add("/f", body, later={2: {"pause": 0.15}, 6: {"pause": 0.0}})
        fetch("/f")
        assert fetch.target.read_bytes() == body
        assert len(served.requests) > 16, "each piece took one request: no stall was seen"

    def test_an_error_of_one_ends_the_others_within_their_piece(self, fetch, server, body) -> None:
        """Else each would first fetch its whole piece, megabytes of it, for nothing."""
        fetch.settings = dataclasses.replace(
            fetch.settings, connections=4, piece_bytes=250_000, parallel_from=200_000
        )
        served = server.add("/f", body, later={2: {"pause": 0.1}, 3: {"answers": [(403, {})]}})
        with pytest.raises(TransferError, match="403"):
            fetch("/f")
        assert served.sent < 700_000


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(patience, "pause", lambda seconds, stop: made.append(seconds))
    return made


SLOW = TransferSettings(retries=7, first_delay=1.0, longest_delay=5.0)


@pytest.mark.parametrize(("draw", "share"), [(max, 1.0), (min, 0.5)])
def test_pauses_double_up_to_the_longest_and_half_of_each_is_drawn(
    monkeypatch, pauses, draw, share
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: draw(low, high))
    backoff = Backoff(SLOW, threading.Event())
    for _ in range(6):
        backoff.failed(Transient("It broke off."), progress=False)
    assert pauses == [share * seconds for seconds in (1, 2, 4, 5, 5, 5)]
    with pytest.raises(TransferError, match="7 times in a row"):
        backoff.failed(Transient("It broke off."), progress=False)


def test_progress_begins_the_pauses_anew(monkeypatch, pauses) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff(SLOW, threading.Event())
    for progress in (False, False, True, False):
        backoff.failed(Transient("It broke off."), progress=progress)
    assert pauses == [1, 2, 1, 2]


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_under_our_own_limit_slowness_is_no_stall(monkeypatch, rate) -> None:
    clock = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: clock[0])
    watch = SpeedWatch(TransferSettings(limit_rate=rate))
    watch.saw(30_000)
    clock[0] = 61.0
    if rate is not None:
        watch.saw(29_000)
    else:
        with pytest.raises(Transient, match="only 59000 bytes in 60 seconds"):
            watch.saw(29_000)
