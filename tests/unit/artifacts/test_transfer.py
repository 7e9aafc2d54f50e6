"""Every way in which a server can misbehave ends in the right file or in a clear error, never in a wrong file."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from email.utils import formatdate

import pytest

from proxydet.artifacts.http import Client
from proxydet.artifacts.partfile import PartFile, PartRecord
from proxydet.artifacts.replies import NotThere
from proxydet.errors import ArchiveError, DigestError, DiskFullError, TransferError


def done(fetch, body):
    assert fetch.target.read_bytes() == body
    assert fetch.leftovers() == []
    assert fetch.task.count == len(body)


def failed(fetch):
    assert not fetch.target.exists()


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
def test_a_right_file_in_the_end(fetch, server, body, behaviour, pinned) -> None:
    server.add(
        "/f",
        body,
        **{
            **behaviour,
            "later": dict(behaviour.get("later", {})),
            "answers": list(behaviour.get("answers", [])),
        },
    )
    received = fetch("/f", pinned=body if pinned else None)
    done(fetch, body)
    assert received.size == len(body)


def test_resumes_where_it_broke_off(fetch, server, body) -> None:
    served = server.add("/f", body, drop_after=100_000)
    fetch("/f")
    done(fetch, body)
    ranges = [request.get("Range") for request in served.requests]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert [request.get("If-Range") for request in served.requests] == [None, '"v1"', '"v1"']
    assert served.sent == len(body)


def test_a_drop_at_every_few_bytes_still_ends(fetch, server, body) -> None:
    server.add("/f", body[:40_000], drop_after=1_000)
    fetch("/f")
    done(fetch, body[:40_000])


def test_a_changed_file_is_taken_from_its_start(fetch, server, body) -> None:
    new = body[::-1]
    served = server.add("/f", body, drop_after=100_000, versions=[(body, '"v1"'), (new, '"v2"')])
    served.etag = '"v2"'
    fetch("/f")
    done(fetch, new)


def test_a_changed_file_behind_a_server_that_ignores_if_range(fetch, server, body) -> None:
    new = body[::-1]
    server.add(
        "/f",
        body,
        heed_if_range=False,
        drop_after=100_000,
        later={2: {"body": new, "etag": '"v2"'}, 3: {"drop_after": None}},
    )
    fetch("/f")
    done(fetch, new)


def test_without_a_name_of_the_version_two_replies_are_never_joined(fetch, server, body) -> None:
    served = server.add("/f", body, etag=None, drop_after=100_000)
    with pytest.raises(TransferError, match="in a row"):
        fetch("/f")
    failed(fetch)
    assert all("Range" not in request for request in served.requests)


def test_a_pinned_file_is_resumed_even_then(fetch, server, body) -> None:
    served = server.add("/f", body, etag=None, drop_after=100_000)
    fetch("/f", pinned=body)
    done(fetch, body)
    assert served.sent == len(body)


def test_a_check_that_sees_every_byte_allows_joining_too(fetch, server, body) -> None:
    served = server.add("/f", body, etag=None, drop_after=100_000)

    def check(path) -> str:
        if path.read_bytes() != body:
            raise ArchiveError("damaged")
        return "all there"

    assert fetch("/f", check=check, check_sees_all=True).holds == "all there"
    done(fetch, body)
    assert served.sent == len(body)


def test_a_check_that_finds_no_room_does_not_condemn_the_file(fetch, server, body) -> None:
    server.add("/f", body)

    def check(_) -> str:
        raise DiskFullError("no room")

    with pytest.raises(DiskFullError, match="no room"):
        fetch("/f", check=check)
    failed(fetch)
    assert len(fetch.leftovers()) == 2, "the bytes are kept for the next time"


def test_a_file_that_changes_at_every_request_is_given_up(fetch, server, body) -> None:
    versions = [(body, f'"v{n}"') for n in range(50)]
    server.add("/f", body, drop_after=100_000, versions=versions)
    with pytest.raises(TransferError):
        fetch("/f")
    failed(fetch)


def test_416_with_the_whole_file_at_hand_is_completion(fetch, server, body) -> None:
    """The server announced too much; the next request finds that nothing more is to come."""
    served = server.add("/f", body, announced=400_000, later={2: {"announced": None}})
    fetch("/f")
    done(fetch, body)
    assert served.requests[1]["Range"] == "bytes=300000-"


def test_416_for_everything_leads_to_a_request_without_range(fetch, server, body) -> None:
    served = server.add(
        "/f", body, forbidden_ranges=True, drop_after=100_000, later={2: {"drop_after": None}}
    )
    fetch("/f")
    done(fetch, body)
    assert ["Range" in request for request in served.requests] == [False, True, False]


@pytest.mark.parametrize(
    "behaviour",
    [
        {"range_shift": 10},
        {"content_range": lambda a, b, n: "bytes nonsense"},
        {"content_range": lambda a, b, n: f"bytes {a}-{b + 5}/{n}"},
        {"content_range": lambda a, b, n: f"bytes {a}-{b}/{n + 7}"},
        {"content_range": lambda a, b, n: f"bytes 0-{b - a}/{n}"},
    ],
    ids=["shifted", "nonsense", "longer", "other total", "from zero"],
)
def test_a_server_whose_ranges_lie_is_asked_without(fetch, server, body, behaviour) -> None:
    served = server.add(
        "/f", body, drop_after=100_000, later={3: {"drop_after": None}}, **behaviour
    )
    fetch("/f")
    done(fetch, body)
    assert ["Range" in request for request in served.requests] == [False, True, False]


def test_less_than_announced_is_not_the_file(fetch, server, body) -> None:
    server.add("/f", body, announced=len(body) + 1000, ranges=False)
    with pytest.raises(TransferError, match=r"broke off|ended before"):
        fetch("/f")
    failed(fetch)


def test_another_size_than_published_is_refused_at_once(fetch, server, body) -> None:
    served = server.add("/f", body[:-1])
    with pytest.raises(DigestError, match="299999 bytes"):
        fetch("/f", pinned=body)
    failed(fetch)
    assert len(served.requests) == 1


def test_an_announced_length_that_is_too_short_is_noticed(fetch, server, body) -> None:
    server.add("/f", body, announced=1000)
    with pytest.raises(DigestError, match="1000 bytes"):
        fetch("/f", pinned=body)
    failed(fetch)


def test_more_than_the_published_size_is_refused(fetch, server, body) -> None:
    server.add("/f", body + b"more", chunked=True)
    with pytest.raises(TransferError, match="more bytes"):
        fetch("/f", pinned=body)
    failed(fetch)


def test_a_reply_without_any_length_is_only_good_with_a_digest(fetch, server, body) -> None:
    server.add("/f", body, no_length=True)
    with pytest.raises(TransferError, match="does not say how long"):
        fetch("/f")
    failed(fetch)
    fetch("/f", pinned=body)
    assert fetch.target.read_bytes() == body


def test_a_break_is_told_by_the_published_size_where_no_length_is_given(
    fetch, server, body
) -> None:
    served = server.add("/f", body, no_length=True, drop_after=100_000)
    fetch("/f", pinned=body)
    done(fetch, body)
    assert served.sent == len(body)


def test_wrong_bytes_never_get_the_name(fetch, server, body) -> None:
    served = server.add("/f", body[::-1])
    with pytest.raises(DigestError) as caught:
        fetch("/f", pinned=body)
    failed(fetch)
    assert fetch.leftovers() == []
    assert "expected sha256" in caught.value.message
    assert caught.value.hint
    assert len(served.requests) == 1


def test_wrong_bytes_are_fetched_again_only_if_old_ones_were_among_them(
    fetch, server, body
) -> None:
    """Old bytes that could not be used are no reason to doubt the new ones."""
    served = server.add("/f", body[::-1])
    for total, requests in ((len(body), 2), (len(body) + 1, 1)):
        part = PartFile(fetch.target, take_over=True)
        part.restart(PartRecord(address=server.address("/f"), total=total, validator='"v1"'))
        part.append(body[:1000])
        part.close()
        served.requests.clear()
        with pytest.raises(DigestError):
            fetch("/f", pinned=body)
        assert len(served.requests) == requests


def test_the_next_address_is_tried(fetch, server, body) -> None:
    server.add("/wrong", body[::-1])
    server.add("/gone", answers=[(410, {})])
    server.add("/right", body)
    assert fetch("/missing", "/gone", "/wrong", "/right", pinned=body).address.endswith("/right")
    done(fetch, body)


def test_bytes_of_one_address_are_continued_at_the_next_only_with_a_digest(
    fetch, server, body
) -> None:
    for pinned in (True, False):
        fetch.task.count = 0
        server.add("/first", body, drop_after=100_000, ranges=False)
        second = server.add("/second", body, etag='"another"')
        fetch("/first", "/second", pinned=body if pinned else None)
        done(fetch, body)
        assert second.sent == (200_000 if pinned else 300_000)
        fetch.target.unlink()


def test_all_reasons_are_told(fetch, server) -> None:
    server.add("/login", answers=[(403, {})] * 9)
    with pytest.raises(TransferError) as caught:
        fetch("/missing", "/login", page="https://example.org/page")
    assert "404" in caught.value.message
    assert "403" in caught.value.message
    assert "https://example.org/page" in (caught.value.hint or "")


def test_not_there_is_an_error_of_its_own(fetch) -> None:
    with pytest.raises(NotThere):
        fetch("/a", "/b")


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_page_in_place_of_the_file(fetch, server, content_type) -> None:
    server.add("/f", b"\n <!DOCTYPE html><html>please sign in</html>", content_type=content_type)
    with pytest.raises(TransferError, match="web page"):
        fetch("/f")
    failed(fetch)


def test_a_stalling_server_is_left_and_found_again(fetch, server, body) -> None:
    served = server.add("/f", body, stall_after=100_000)
    started = time.monotonic()
    fetch("/f")
    done(fetch, body)
    assert served.sent == len(body)
    assert time.monotonic() - started < 5


def test_a_dripping_server_is_given_up(fetch, server, body) -> None:
    fetch.settings = dataclasses.replace(fetch.settings, slow_seconds=0.2, retries=2)
    server.add("/f", body[:40_000], pause=0.15, ranges=False)
    with pytest.raises(TransferError, match=r"only \d+ bytes"):
        fetch("/f")
    failed(fetch)


def test_retry_after_is_honoured(fetch, server, body) -> None:
    server.add("/f", body, answers=[(429, {"Retry-After": "1"})])
    started = time.monotonic()
    fetch("/f")
    assert time.monotonic() - started >= 1
    done(fetch, body)


def test_a_retry_after_of_hours_is_told_and_not_waited_for(fetch, server, body) -> None:
    server.add("/f", body, answers=[(429, {"Retry-After": "7200"})])
    with pytest.raises(TransferError, match="120 minutes") as caught:
        fetch("/f")
    assert "kept" in (caught.value.hint or "")


def test_compression_that_nobody_asked_for(fetch, server, body) -> None:
    server.add("/f", body, encoding="gzip")
    with pytest.raises(TransferError, match="compressed"):
        fetch("/f")
    fetch("/f", pinned=body)
    assert fetch.target.read_bytes() == body


def test_redirects_keep_the_range(fetch, server, body) -> None:
    server.add("/f", redirect="/elsewhere?token=secret")
    served = server.add("/elsewhere?token=secret", body, drop_after=200_000)
    fetch("/f")
    done(fetch, body)
    assert [request.get("Range") for request in served.requests] == [None, "bytes=200000-"]


def test_endless_redirects(fetch, server) -> None:
    server.add("/f", redirect="/f")
    with pytest.raises(TransferError, match="without end"):
        fetch("/f")


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("ftp://127.0.0.1/x", "not an https or http"),
        ("file:///etc/passwd", "not an https or http"),
        ("http://user:pw@127.0.0.1/x", "carries a user name"),
    ],
)
def test_redirects_to_what_is_no_plain_web_address(fetch, server, goal, message) -> None:
    server.add("/f", redirect=goal)
    with pytest.raises(TransferError, match=f"redirect from .*{message}"):
        fetch("/f")
    failed(fetch)


def test_an_empty_file_must_be_what_was_published(fetch, server) -> None:
    server.add("/f", b"")
    with pytest.raises(DigestError, match="served an empty file"):
        fetch("/f")
    assert not fetch.target.exists()
    assert fetch("/f", sha256=hashlib.sha256(b"").hexdigest()).size == 0
    assert fetch.target.read_bytes() == b""


def test_an_unreachable_server_is_told_soon(fetch) -> None:
    with pytest.raises(TransferError, match="could not be reached"):
        fetch("http://127.0.0.1:9/f")


def test_a_host_that_did_not_answer_is_tried_once_for_the_next_address(fetch, monkeypatch) -> None:
    asked: list[str] = []
    send = Client.open
    monkeypatch.setattr(
        Client,
        "open",
        lambda self, request: (asked.append(request.address), send(self, request))[1],
    )
    with pytest.raises(TransferError):
        fetch("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    assert [address[-1] for address in asked] == ["a"] * fetch.settings.retries + ["b"]


def test_the_speed_limit_holds(fetch, server, body) -> None:
    fetch.settings = dataclasses.replace(fetch.settings, limit_rate=400_000)
    server.add("/f", body)
    started = time.monotonic()
    fetch("/f")
    assert 0.6 < time.monotonic() - started < 3
