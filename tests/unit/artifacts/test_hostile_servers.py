"""Servers without end, and heads that make no sense: an error that says why, in bounded time, and Ctrl-C at any moment."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time

import pytest

from proxydet.errors import DiskFullError, TransferError

HEAD = b'HTTP/1.1 200 OK\r\nETag: "v"\r\n'


def drip(text: bytes, pause: float = 0.03):
    """Send a text byte by byte, again and again."""

    def raw(write, closing) -> None:
        while not closing.is_set():
            for value in text:
                write(bytes([value]))
                if closing.wait(pause):
                    return

    return raw


def after(head: bytes, then):
    def raw(write, closing) -> None:
        write(head)
        then(write, closing)

    return raw


def flood(block: bytes):
    def raw(write, closing) -> None:
        while not closing.is_set():
            write(block)

    return raw


def silence(write, closing) -> None:
    closing.wait()


ENDLESS = {
    "a body that drips": after(HEAD + b"Content-Length: 1000000\r\n\r\n", drip(b"x")),
    "a body that falls silent": after(HEAD + b"Content-Length: 1000000\r\n\r\nx", silence),
    "no response": silence,
    "a status line that drips": drip(b"H"),
    "header lines that drip": after(HEAD, drip(b"X-A: b\r\n")),
    "100 Continue": flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "a redirect with a body": after(
        b"HTTP/1.1 302 Found\r\nLocation: /f\r\nContent-Length: 99999999999\r\n\r\n",
        flood(b"x" * 65536),
    ),
    "a chunk's size": after(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;x=", drip(b"a")),
    "trailers": after(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", flood(b"X-A: b\r\n" * 1000)
    ),
    "a page": after(HEAD + b"Content-Type: text/html\r\n\r\n", drip(b"<html>")),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_it_is_given_up_with_a_reason(fetch, server, kind):
    fetch.set(
        head_seconds=0.2,
        slow_seconds=0.2,
        grace_seconds=1.5,
        attempts=2,
        read_timeout=0.4,
        slow_bytes=10_000,
    )
    served = server.add("/f", raw=ENDLESS[kind])
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        fetch("/f")
    assert time.monotonic() - started < 6
    assert any(word in caught.value.message for word in ("slow", "in time", "redirects", "page"))
    assert caught.value.hint
    assert not fetch.target.exists()
    assert 1 <= len(served.requests) <= 2 * 21  # twice, each with as many redirects as are followed


def test_bytes_now_and_then_do_not_keep_it_alive(fetch, server):
    """Each attempt brings something new, so that it may be tried again, and all of them bring too little."""
    fetch.set(slow_seconds=0.3, grace_seconds=0.4, attempts=1000, longest_delay=0.001)
    body = bytes(200_000)
    served = server.add("/f", body, drop_after=20)
    started = time.monotonic()
    with pytest.raises(TransferError, match="slow"):
        fetch("/f", pinned=body)
    assert time.monotonic() - started < 5
    assert len(served.requests) > 5


def test_a_slow_file_has_the_time_that_its_size_allows(fetch, server, body):
    fetch.set(grace_seconds=0.4, least_speed=100_000)
    server.add("/f", body, pause=0.05)  # 300 kB/s
    fetch("/f")
    assert fetch.target.read_bytes() == body
    fetch.target.unlink()
    fetch.set(least_speed=1_000_000)
    with pytest.raises(TransferError, match="1000000 bytes a second"):
        fetch("/f")


@pytest.mark.parametrize("pinned", [False, True])
def test_a_stream_without_end_stops_at_a_bound(fetch, server, body, pinned):
    """The published size, or what a file may have at most whose size nobody says."""
    fetch.set(largest_unannounced=1_000_000)
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    server.add("/f", raw=after(head, flood(chunk)))
    with pytest.raises(TransferError) as caught:
        fetch("/f", pinned=body if pinned else None)
    assert pinned or "1.0 MB" in caught.value.message
    assert sum(path.stat().st_size for path in fetch.leftovers()) < 1_100_000


def test_a_length_announced_for_compressed_bytes_is_no_bound(fetch, server, body):
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 50000000\r\n\r\n"
    server.add("/f", raw=after(head, flood(b"x" * 65536)))
    with pytest.raises(TransferError, match=f"{len(body)} bytes"):
        fetch("/f", pinned=body)
    assert sum(path.stat().st_size for path in fetch.leftovers()) < len(body) + 100_000


def test_pieces_without_end_stop_at_the_same_bound(fetch, server):
    """Each has a length of its own, and none says how long the file is."""
    fetch.set(largest_unannounced=300_000)
    at = 0

    def piece(write, closing) -> None:
        nonlocal at
        head = f'HTTP/1.1 206 Partial\r\nETag: "v"\r\nContent-Range: bytes {at}-{at + 99_999}/*\r\n'
        write(f"{head}Content-Length: 100000\r\n\r\n".encode() + b"x" * 100_000)
        at += 100_000
        if at > 2_000_000:
            raise BrokenPipeError

    served = server.add("/f", raw=piece)
    with pytest.raises(TransferError, match="300"):
        fetch("/f")
    assert len(served.requests) <= 5


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "Mon, 01 Jan 99999 00:00:00 GMT"},
        {"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359"},
        {"Retry-After": "9" * 5000},
        {"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"},
    ],
    ids=str,
)
def test_retry_after_that_makes_no_sense(fetch, server, body, headers):
    """A date that no calendar holds means the usual pause; one beyond what is ever waited is reported."""
    served = server.add("/f", body, answers=[(503, headers)])
    with contextlib.suppress(TransferError):
        fetch("/f")
        assert fetch.target.read_bytes() == body
    assert len(served.requests) <= 2


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": "\x01\x02"},
        {"ETag": "no quotes"},
        {"ETag": '"' + "x" * 5000 + '"'},
        {"ETag": '"\xe4\xf6"'},
        {"ETag": '"a" "b"'},
        {"ETag": "", "Last-Modified": "\xff\xff"},
        {"Last-Modified": "yesterday"},
        {"Content-Type": "text/\x00html"},
        {"Content-Encoding": " Identity "},
        {"Set-Cookie": "=;=;\x01" * 100},
        {"Accept-Ranges": "\x00"},
    ],
    ids=lambda headers: ascii(headers)[:60],
)
def test_headers_that_make_no_sense(fetch, server, body, headers):
    """They are passed over."""
    rest = {name: text for name, text in headers.items() if name not in ("ETag", "Last-Modified")}
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    behaviour = {"etag": etag, "last_modified": modified, "more_headers": rest}
    served = server.add("/f", body, drop_after=100_000, **behaviour)
    fetch("/f", pinned=body)
    assert fetch.target.read_bytes() == body
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    "length", [b"-1", b"1e3", b"5, 6", b"abc", b"", b"9" * 40, b"9" * 5000, b"0x10", "³".encode()]
)
def test_a_content_length_that_makes_no_sense(fetch, server, length):
    head = HEAD + b"Content-Length: " + length + b"\r\nConnection: close\r\n\r\nhello"
    server.add("/f", raw=lambda write, closing: write(head))
    with pytest.raises((TransferError, DiskFullError)):
        fetch("/f")
    assert not fetch.target.exists()


@pytest.mark.parametrize(
    "head",
    [b"\x00\xff\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n", b"HTTP/1.1 99999 x\r\n\r\n", b"SSH-2.0-OpenSSH_9.0\r\n",
     HEAD + b"X: y\r\n" * 500 + b"\r\n", HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
     HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nx"],
    ids=lambda head: ascii(head)[-40:],
)  # fmt: skip
def test_what_is_not_http(fetch, server, head):
    server.add("/f", raw=lambda write, closing: write(head))
    with pytest.raises(TransferError, match=r"127\.0\.0\.1"):
        fetch("/f")


@pytest.mark.parametrize("goal", ["http://[::1/x", "//[", "http://\u00e9\u00e9/x", "http://" + "a" * 300 + "/x", "?\r\n x"])  # fmt: skip
def test_a_redirect_to_what_makes_no_sense(fetch, server, goal):
    raw = b"HTTP/1.1 302 Found\r\nLocation: " + goal.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    server.add("/f", raw=lambda write, closing: write(raw))
    with pytest.raises(TransferError):
        fetch("/f")


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from proxydet_cli.main import main
sys.exit(main(["download", "one", "two", "--yes", "--catalogue", sys.argv[1], "--root", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    "kinds",
    [
        ["100 Continue"],
        # Redirects end by themselves, after the twentieth.
        pytest.param([kind for kind in ENDLESS if "redirect" not in kind], marks=pytest.mark.slow),
    ],
    ids=["one", "all"],
)
def test_ctrl_c_within_three_seconds_in_each_of_them(server, tmp_path, kinds):
    """One after another, so that the seconds are those of a process that has the machine; --log-cli-level=info
    shows them."""
    seconds = {}
    for number, kind in enumerate(kinds):
        served = server.add("/f", raw=ENDLESS[kind])
        catalogue = tmp_path / f"{number}.toml"
        catalogue.write_text(
            "".join(
                f'[[artifacts]]\nname = "{name}"\ntitle = "t"\nlicence = "l"\ntarget = "models/{name}"\n'
                f'addresses = ["{server.address("/f")}"]\n{"size = 1000000" * (number % 2)}\n'
                for name in ("one", "two")
            )
        )
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(catalogue), str(tmp_path / str(number))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 60
        while not served.requests and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        seconds[kind] = round(time.monotonic() - started, 2)
        assert process.returncode == 130, f"{kind}: {err}"
        assert "Traceback" not in err
    logging.getLogger(__name__).info("seconds to the end: %s", seconds)
    assert max(seconds.values()) < 3, seconds
