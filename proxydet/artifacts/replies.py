"""What the head of an HTTP reply says: which bytes follow, of which version, or why there are none."""

from __future__ import annotations

import re
from dataclasses import dataclass

import requests

from proxydet.artifacts.patience import Transient, retry_after
from proxydet.errors import TransferError

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})")


class NotThere(TransferError):
    """The server says that there is no such file."""


class RangeRefused(TransferError):
    """The server does not serve the stretch asked for: it says so (416), or its answer contradicts itself.

    Args:
        message: What happened.
        total: Size of its file, where it says so.
    """

    def __init__(self, message: str, total: int | None) -> None:
        super().__init__(message)
        self.total = total


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The head of a reply that brings bytes."""

    address: str
    """Where it came from in the end, after redirects."""
    partial: bool
    """Whether it brings a stretch (206) and not the whole file (200)."""
    first: int
    """Offset of its first byte."""
    length: int | None
    """Bytes that follow; None where the server does not say."""
    total: int | None
    """Size of the whole file; None where the server does not say."""
    chunked: bool
    """Whether an end before the end of the file can be told without a length."""
    validator: str | None
    """The server's name for this version, usable with If-Range: a strong ETag, or else Last-Modified."""
    etag: str | None
    """The ETag as sent."""
    ranges: bool
    """Whether the server says that it serves ranges."""
    web_page: bool
    """Whether the body is said to be HTML."""
    encoded: bool
    """Whether the body was compressed on the way although that was not asked for."""


def check_status(response: requests.Response, where: str) -> Reply:
    """Read the head of a reply.

    Args:
        response: The reply.
        where: The address asked, as messages may show it.

    Raises:
        Transient: The server cannot answer now (429, 5xx, ...).
        RangeRefused: The file has no such bytes.
        NotThere: The server has no such file.
        TransferError: It refuses, or its reply makes no sense.
    """
    status = response.status_code
    if status == 416:
        match = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", "").strip())
        raise RangeRefused(f"{where} has no such bytes.", int(match[1]) if match else None)
    if status in _PASSING:
        raise Transient(f"{where} answered {status}.", retry_after=retry_after(response.headers))
    if status in (404, 410):
        raise NotThere(f"{where} is not there (answer {status}).")
    if status in (401, 403, 407):
        raise TransferError(
            f"{where} refuses access (answer {status}).",
            hint="The source may want an account: see PROXYDET_COOKIES and ~/.netrc in docs/how-to/download.md.",
        )
    if status not in (200, 206):
        raise TransferError(f"{where} answered {status}, which is of no use.")
    return _head(response, where)


def _head(response: requests.Response, where: str) -> Reply:
    headers = response.headers
    partial = response.status_code == 206
    length = _number(headers.get("Content-Length"))
    chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
    first, total = 0, length
    if chunked:
        length = total = None
    if partial:
        first, length, total = _stretch(headers.get("Content-Range", ""), length, where)
    etag = headers.get("ETag")
    return Reply(
        address=response.url,
        partial=partial,
        first=first,
        length=length,
        total=total,
        chunked=chunked,
        validator=etag if etag and etag.startswith('"') else headers.get("Last-Modified"),
        etag=etag,
        ranges=partial or headers.get("Accept-Ranges", "").strip().lower() == "bytes",
        web_page=headers.get("Content-Type", "")
        .lower()
        .startswith(("text/html", "application/xhtml")),
        encoded=headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"),
    )


def _stretch(text: str, length: int | None, where: str) -> tuple[int, int, int | None]:
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        raise RangeRefused(f"{where} sends a part of the file without saying which.", None)
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    wrong_length = length is not None and length != last - first + 1
    if last < first or wrong_length or (total is not None and last >= total):
        raise RangeRefused(f"{where} sends a part of the file with contradictory lengths.", None)
    return first, last - first + 1, total


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text[:18]) if text.isascii() and text.isdigit() else None
