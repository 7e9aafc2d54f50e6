"""Every way in which a server can misbehave ends in the right file or in a clear error, never in a wrong file."""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import random
import socket
import time
from email.utils import formatdate

import pytest
import torch

from proxydet.artifacts import Content
from proxydet.errors import DigestError, DiskFullError, TransferError


def done(fetch, body) -> None:
    assert fetch.target.read_bytes() == body
    assert fetch.leftovers() == []
    assert fetch.counted() == len(body)


def failed(fetch) -> None:
    assert not fetch.target.exists()


def copied(behaviour: dict) -> dict:
    """Return a copy that the server may use up."""
    return {
        key: type(value)(value) if isinstance(value, (list, dict)) else value
        for key, value in behaviour.items()
    }


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"drop_after": 50_000},
        {"drop_after": 50_000, "etag": None, "last_modified": formatdate(1e9, usegmt=True)},
        {"stall_after": 100_000, "stalls": 1},
        {"chunked": True},
        {"chunked": True, "drop_after": 50_000},
        {"answers": [(429, {"Retry-After": "0"}), (500, {}), (503, {})]},
        {"answers": [(429, {"Retry-After": formatdate(1e9, usegmt=True)})]},
        {"drop_after": 100_000, "ranges": False, "later": {3: {"drop_after": None}}},
        {"etag": 'W/"weak"'},
    ],
    ids=str,
)
def test_a_right_file_in_the_end(fetch, server, body, behaviour, pinned):
    server.add("/f", body, **copied(behaviour))
    outcome = fetch("/f", pinned=body if pinned else None)
    done(fetch, body)
    assert outcome.bytes_fetched == len(body)
    assert outcome.sha256 == hashlib.sha256(body).hexdigest()


def test_resumes_where_it_broke_off(fetch, server, body):
    served = server.add("/f", body, drop_after=100_000)
    fetch("/f")
    done(fetch, body)
    assert served.headers("Range") == [None, "bytes=100000-", "bytes=200000-"]
    assert served.headers("If-Range") == [None, '"v1"', '"v1"']
    assert served.headers("Accept-Encoding") == ["identity"] * 3
    assert served.sent == len(body)


@pytest.mark.parametrize("heed", [True, False], ids=["heeds If-Range", "ignores If-Range"])
def test_a_changed_file_is_taken_from_its_start(fetch, server, body, heed):
    new = body[::-1]
    later = {2: {"body": new, "etag": '"v2"'}, 3: {"drop_after": None}}
    server.add("/f", body, heed_if_range=heed, drop_after=100_000, later=later)
    fetch("/f")
    done(fetch, new)


def test_a_file_that_changes_at_every_request_is_given_up(fetch, server, body):
    versions = [(body, f'"v{n}"') for n in range(50)]
    server.add("/f", body, drop_after=100_000, versions=versions)
    with pytest.raises(TransferError):
        fetch("/f")
    failed(fetch)


class TestWithoutAVersion:
    def test_two_responses_are_never_joined(self, fetch, server, body):
        served = server.add("/f", body, etag=None, drop_after=100_000)
        with pytest.raises(TransferError):
            fetch("/f")
        failed(fetch)
        assert len(served.requests) == fetch.settings.attempts
        assert served.headers("Range") == [None] * len(served.requests)

    def test_unless_a_digest_decides_in_the_end(self, fetch, server, body):
        served = server.add("/f", body, etag=None, drop_after=100_000)
        fetch("/f", pinned=body)
        done(fetch, body)
        assert served.sent == len(body)

    def test_or_a_check_that_sees_every_byte(self, fetch, server, body):
        stream = io.BytesIO()
        torch.save({"w": torch.ones(40_000)}, stream)
        body = stream.getvalue()
        served = server.add("/f", body, etag=None, drop_after=100_000)
        assert "1 tensor" in fetch("/f", content=Content(kind="tensors")).note
        done(fetch, body)
        assert served.sent == len(body)

    def test_and_they_are_fetched_again_if_they_do_not_fit(self, fetch, server, body):
        served = server.add(
            "/f",
            etag=None,
            drop_after=100_000,
            versions=[(body[::-1], None), (body, None), (body, None)],
            later={2: {"drop_after": None}},
        )
        fetch("/f", pinned=body)
        done(fetch, body)
        assert [header is not None for header in served.headers("Range")] == [False, True, False]


def test_416_with_the_whole_file_at_hand_is_completion(fetch, server, body):
    """The server announced too much; the next request finds that nothing more is to come."""
    served = server.add("/f", body, announced=400_000, later={2: {"announced": None}})
    fetch("/f")
    done(fetch, body)
    assert served.headers("Range") == [None, "bytes=300000-"]
    assert served.sent == len(body)


def test_a_server_that_refuses_even_the_whole_file_is_not_asked_a_third_time(fetch, server, body):
    served = server.add("/f", body, answers=[(416, {})] * 5)
    with pytest.raises(TransferError):
        fetch("/f")
    assert len(served.requests) == 2


@pytest.mark.parametrize(
    "behaviour",
    [
        {"forbidden_ranges": True},
        {"range_shift": 10},
        {"content_range": lambda a, b, n: "bytes nonsense"},
        {"content_range": lambda a, b, n: f"bytes {a}-{b + 5}/{n}"},
        {"content_range": lambda a, b, n: f"bytes {a}-{b}/{n + 7}"},
        {"content_range": lambda a, b, n: f"bytes {a}-{b}/{b}"},
        {"content_range": lambda a, b, n: f"bytes {b}-{a}/{n}"},
        {"content_range": lambda a, b, n: f"bytes 0-{b - a}/{n}"},
        {"content_range": lambda a, b, n: f"bytes {'9' * 5000}-{b}/{n}"},
    ],
    ids=["416", "shifted", "nonsense", "longer", "other total", "beyond", "backwards", "from zero", "huge"],
)  # fmt: skip
def test_a_server_whose_ranges_are_wrong_is_asked_without(fetch, server, body, behaviour):
    served = server.add(
        "/f", body, drop_after=100_000, later={3: {"drop_after": None}}, **behaviour
    )
    fetch("/f")
    done(fetch, body)
    assert [header is not None for header in served.headers("Range")] == [False, True, False]


class TestLengths:
    def test_less_than_announced_is_not_the_file(self, fetch, server, body):
        server.add("/f", body, announced=len(body) + 1000, ranges=False)
        with pytest.raises(TransferError):
            fetch("/f")
        failed(fetch)

    def test_another_size_than_published_is_refused_at_once(self, fetch, server, body):
        served = server.add("/f", body[:-1])
        with pytest.raises(DigestError, match="299999"):
            fetch("/f", pinned=body)
        failed(fetch)
        assert len(served.requests) == 1

    def test_an_announced_length_that_is_too_short_is_noticed(self, fetch, server, body):
        server.add("/f", body, announced=1000)
        with pytest.raises(DigestError, match="1000 bytes"):
            fetch("/f", pinned=body)
        failed(fetch)

    def test_more_than_the_published_size_is_refused(self, fetch, server, body):
        server.add("/f", body + b"more", chunked=True)
        with pytest.raises(TransferError):
            fetch("/f", pinned=body)
        failed(fetch)

    def test_without_any_length_only_a_digest_makes_it_good(self, fetch, server, body):
        server.add("/f", body, no_length=True)
        with pytest.raises(TransferError):
            fetch("/f")
        failed(fetch)
        fetch("/f", pinned=body)
        assert fetch.target.read_bytes() == body

    def test_then_a_break_is_noticed_by_the_published_size(self, fetch, server, body):
        served = server.add("/f", body, no_length=True, drop_after=100_000)
        fetch("/f", pinned=body)
        done(fetch, body)
        assert served.sent == len(body)

    def test_an_empty_file_must_be_what_was_published(self, fetch, server):
        server.add("/f", b"")
        with pytest.raises(DigestError, match="empty"):
            fetch("/f")
        failed(fetch)
        assert fetch("/f", sha256=hashlib.sha256(b"").hexdigest()).bytes_fetched == 0
        assert fetch.target.read_bytes() == b""

    def test_room_is_checked_as_soon_as_a_response_announces_the_size(self, fetch, server, body):
        """No size was published, so the plan could not know."""
        served = server.add("/f", body, announced=1 << 49)
        with pytest.raises(DiskFullError):
            fetch("/f")
        failed(fetch)
        assert fetch.leftovers() == []
        assert len(served.requests) == 1


class TestWrongBytes:
    def test_they_never_get_the_name(self, fetch, server, body):
        served = server.add("/f", body[::-1])
        with pytest.raises(DigestError, match="SHA-256") as caught:
            fetch("/f", pinned=body)
        failed(fetch)
        assert fetch.leftovers() == []
        assert caught.value.hint
        assert len(served.requests) == 1

    @pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/x-tar"])
    def test_a_page_in_place_of_the_file(self, fetch, server, content_type):
        page = b"\n <!DOCTYPE html><html>please sign in</html>"
        server.add("/f", page, content_type=content_type)
        with pytest.raises(TransferError, match="web page"):
            fetch("/f")
        failed(fetch)

    def test_compression_that_was_not_asked_for(self, fetch, server, body):
        server.add("/f", body, encoding="gzip")
        with pytest.raises(TransferError, match="compressed"):
            fetch("/f")
        fetch("/f", pinned=body)
        assert fetch.target.read_bytes() == body

    @pytest.mark.parametrize(
        ("rest", "requests"), [(b"", 2), (b"x", 1)], ids=["same size", "other"]
    )
    def test_fetched_again_only_if_old_bytes_were_among_them(
        self, fetch, server, body, rest, requests
    ):
        """Old bytes that could not be used are no reason to doubt the new ones."""
        old = body + rest
        server.add("/f", old, drop_after=100_000, later={2: {"answers": [(403, {})]}})
        with pytest.raises(TransferError):
            fetch("/f", pinned=old)
        assert fetch.leftovers()
        served = server.add("/f", body[::-1])
        with pytest.raises(DigestError):
            fetch("/f", pinned=body)
        assert len(served.requests) == requests


class TestSeveralAddresses:
    def test_the_next_is_tried(self, fetch, server, body):
        server.add("/wrong", body[::-1])
        server.add("/gone", answers=[(410, {})])
        server.add("/right", body)
        outcome = fetch("/missing", "/gone", "/wrong", "/right", pinned=body)
        assert outcome.address.endswith("/right")
        done(fetch, body)

    @pytest.mark.parametrize("pinned", [True, False])
    def test_bytes_of_one_are_continued_at_the_next_only_with_a_digest(
        self, fetch, server, body, pinned
    ):
        server.add("/first", body, drop_after=100_000, ranges=False)
        second = server.add("/second", body, etag='"another"')
        fetch("/first", "/second", pinned=body if pinned else None)
        done(fetch, body)
        assert second.sent == (200_000 if pinned else 300_000)

    def test_all_reasons_are_given(self, fetch, server):
        server.add("/login", answers=[(403, {})] * 9)
        with pytest.raises(TransferError, match=r"404[\s\S]*403") as caught:
            fetch("/missing", "/login", page="https://example.org/page")
        assert "https://example.org/page" in (caught.value.hint or "")

    def test_a_host_that_could_not_be_reached_is_tried_once_for_the_next(self, fetch, caplog):
        fetch.set(attempts=4, first_delay=0.01, longest_delay=0.01)
        with (
            caplog.at_level(logging.DEBUG, "urllib3"),
            pytest.raises(TransferError, match=r"127\.0\.0\.1"),
        ):
            fetch("http://127.0.0.1:9/a", "http://127.0.0.1:9/b", "http://127.0.0.1:9/c")
        assert caplog.text.count("Starting new HTTP connection") == 4 + 1 + 1

    def test_a_host_that_answers_again_is_tried_as_often_as_any(self, fetch, server, body):
        server.add("/wrong", body[::-1], answers=[(503, {})])
        right = server.add("/right", body, answers=[(503, {})])
        fetch("/wrong", "/right", pinned=body)
        done(fetch, body)
        assert len(right.requests) == 2


class TestTime:
    def test_a_stalling_server_is_left_and_found_again(self, fetch, server, body):
        served = server.add("/f", body, stall_after=100_000)
        started = time.monotonic()
        fetch("/f")
        done(fetch, body)
        assert served.sent == len(body)
        assert time.monotonic() - started < 5

    def test_under_our_own_limit_slowness_is_not_a_stall(self, fetch, server, body):
        fetch.set(slow_seconds=0.2, attempts=2, limit_rate=50_000)
        served = server.add("/f", body[:40_000], ranges=False)
        fetch("/f")
        assert len(served.requests) == 1

    def test_the_limit_holds(self, fetch, server, body):
        fetch.set(limit_rate=400_000)
        server.add("/f", body)
        started = time.monotonic()
        fetch("/f")
        assert 0.6 < time.monotonic() - started < 4

    def test_pauses_double_up_to_the_longest_and_up_to_half_is_random(self, fetch, server, body):
        fetch.set(attempts=6, first_delay=0.1, longest_delay=0.3)
        served = server.add("/f", body, answers=[(500, {})] * 5)
        fetch("/f")
        pauses = [b - a for a, b in zip(served.times, served.times[1:], strict=False)]
        for pause, longest in zip(pauses, (0.1, 0.2, 0.3, 0.3, 0.3), strict=True):
            assert longest / 2 <= pause < longest + 0.25

    def test_retry_after_is_honoured(self, fetch, server, body):
        served = server.add("/f", body, answers=[(429, {"Retry-After": "1"})])
        fetch("/f")
        assert served.times[1] - served.times[0] >= 1
        done(fetch, body)

    def test_a_retry_after_of_hours_is_reported_and_not_waited_for(self, fetch, server, body):
        server.add("/f", body, answers=[(429, {"Retry-After": "7200"})])
        with pytest.raises(TransferError, match="120 minutes"):
            fetch("/f")

    @pytest.mark.parametrize("text", ["", "soon", "-3", "²", "Wed, 21 Oct 2015 07:28:00 GMT"])
    def test_a_retry_after_that_says_nothing_means_the_usual_pause(self, fetch, server, body, text):
        """A longer one would be an error, as it is more than the settings allow."""
        fetch.set(first_delay=0.2, longest_delay=0.2, longest_retry_after=0.2)
        served = server.add("/f", body, answers=[(503, {"Retry-After": text})])
        fetch("/f")
        done(fetch, body)
        assert served.times[1] - served.times[0] >= 0.1


class TestSeveralConnections:
    @pytest.fixture
    def body(self) -> bytes:
        return random.Random(3).randbytes(1_000_003)

    @pytest.fixture(autouse=True)
    def _several(self, fetch) -> None:
        fetch.set(connections=4, piece_bytes=64_000, parallel_from=200_000)

    @pytest.mark.parametrize("pinned", [True, False])
    @pytest.mark.parametrize(
        "behaviour",
        [
            {"drop_after": 30_000},
            {"stall_after": 40_000, "stalls": 2},
            {"most_at_once": 1, "pause": 0.001},
            {"ranges": False},
            {"forbidden_ranges": True},
            {"range_shift": 3},
            {"later": {4: {"range_shift": 3}, 5: {"range_shift": 0}}},
            {"answers": [(503, {})] * 3},
            {"chunked": True},
            {"chunked": True, "later": {3: {"cut": 100}, 7: {"cut": 0}}},
        ],
        ids=str,
    )
    def test_the_right_file(self, fetch, server, body, behaviour, pinned):
        server.add("/f", body, **copied(behaviour))
        fetch("/f", pinned=body if pinned else None)
        done(fetch, body)

    def test_each_byte_comes_once(self, fetch, server, body):
        served = server.add("/f", body, pause=0.005)
        fetch("/f")
        done(fetch, body)
        assert served.sent == len(body)
        assert served.most_active > 1
        assert set(served.headers("If-Range")[1:]) == {'"v1"'}

    def test_a_server_that_refuses_more_than_one(self, fetch, server, body):
        """Those that it refuses give up long before the one that it serves is done."""
        fetch.set(attempts=2, longest_delay=0.001)
        server.add("/f", body, most_at_once=1, pause=0.02)
        fetch("/f")
        done(fetch, body)

    def test_a_small_file_takes_one_request(self, fetch, server, body):
        served = server.add("/f", body[:50_000])
        fetch("/f")
        done(fetch, body[:50_000])
        assert len(served.requests) == 1

    def test_a_file_of_known_small_size_is_asked_for_plainly(self, fetch, server, body):
        served = server.add("/f", body[:100_000])
        fetch("/f", pinned=body[:100_000])
        assert served.headers("Range") == [None]

    def test_a_file_that_changes_in_the_middle_is_never_mixed(self, fetch, server, body):
        new = body[::-1]
        server.add("/f", body, later={6: {"body": new, "etag": '"v2"'}})
        fetch("/f")
        done(fetch, new)

    @pytest.mark.parametrize("etag", ['"v2"', '"v1"'])
    def test_another_version_is_noticed_by_its_name_or_size(self, fetch, server, body, etag):
        """The server ignores If-Range: only the head of its response shows the change."""
        other = bytes(len(body) + (etag == '"v1"'))
        versions = [(body, '"v1"')] * 3 + [(other, etag)] * 40
        server.add("/f", body, heed_if_range=False, versions=versions)
        fetch("/f")
        assert fetch.target.read_bytes() == other

    def test_a_server_that_sends_more_than_asked_for(self, fetch, server, body):
        served = server.add("/f", body, later={2: {"open_ended": True}})
        fetch("/f")
        done(fetch, body)
        assert served.sent < 4 * len(body)

    def test_a_piece_that_drips_is_asked_for_again(self, fetch, server, body):
        fetch.set(slow_seconds=0.2)
        served = server.add("/f", body, later={2: {"pause": 0.15}, 6: {"pause": 0.0}})
        fetch("/f")
        done(fetch, body)
        assert len(served.requests) > 16, "each piece took one request: no stall was seen"

    def test_an_error_of_one_ends_the_others_within_their_piece(self, fetch, server, body):
        """Else each would first fetch its whole piece, megabytes of it, for nothing."""
        fetch.set(piece_bytes=250_000)
        served = server.add("/f", body, later={2: {"pause": 0.1}, 3: {"answers": [(403, {})]}})
        with pytest.raises(TransferError, match="403"):
            fetch("/f")
        assert served.sent < 700_000

    def test_without_a_version_one_is_used(self, fetch, server, body):
        served = server.add("/f", body, etag=None)
        fetch("/f")
        done(fetch, body)
        assert len(served.requests) == 2

    def test_connections_end_with_the_file(self, fetch, downloads, server, body):
        """Not with the job: a job may have thousands of files."""
        paths = [f"/f{n}" for n in range(5)]
        things = [downloads.artifact(path[1:], server.add(path, body).body) for path in paths]

        def opened() -> int:
            sockets = [item for item in gc.get_objects() if type(item) is socket.socket]
            return sum(item.fileno() != -1 for item in sockets)

        with downloads.open(*things, settings=fetch.settings) as downloader:
            report = downloader.fetch(downloader.plan([thing.name for thing in things]))
            report.raise_for_failures()
            end = time.monotonic() + 5  # the server's side closes a moment later
            while opened() > 8 and time.monotonic() < end:
                time.sleep(0.01)
            assert opened() <= 8
        assert max(server.files[path].most_active for path in paths) > 1

    @pytest.mark.parametrize("connections", [4, 1])
    def test_what_a_server_that_died_left_is_used(self, fetch, server, body, connections):
        server.add("/f", body, later={6: {"answers": [(500, {})] * 1000}})
        with pytest.raises(TransferError, match="500"):
            fetch("/f")
        failed(fetch)
        assert fetch.leftovers()
        fetch.set(connections=connections)
        served = server.add("/f", body)
        fetch("/f")
        done(fetch, body)
        assert served.headers("Range")[0] not in (None, "bytes=0-")
        assert served.sent < len(body)
