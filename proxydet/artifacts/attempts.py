"""All attempts to have a file from one address: what to ask for, what to accept, when to begin anew, when to give up."""

from __future__ import annotations

import logging
from dataclasses import replace

from proxydet.artifacts import google_drive
from proxydet.artifacts.addresses import host_of, shown
from proxydet.artifacts.files import require_room
from proxydet.artifacts.http import OpenReply, Request
from proxydet.artifacts.partfile import PartRecord
from proxydet.artifacts.patience import Backoff, Transient
from proxydet.artifacts.pieces import fetch_pieces
from proxydet.artifacts.replies import RangeRefused, Reply
from proxydet.artifacts.stream import Sink, read_body
from proxydet.artifacts.wanted import Line, Received, Wanted
from proxydet.errors import DigestError, DiskFullError, ProxydetError, TransferError

_logger = logging.getLogger(__name__)

_LARGEST_PAGE = 1 << 20


class Attempts:
    """All attempts to have a file from one address.

    Args:
        wanted: The file.
        line: What it shares with other transfers.
        sink: Where its bytes go.
        address: The address.
    """

    def __init__(self, wanted: Wanted, line: Line, sink: Sink, address: str) -> None:
        self._wanted = wanted
        self._line = line
        self._sink = sink
        self._part = sink.part
        self._address = address
        self._settings = line.client.settings
        self._whole_only = False  # the server serves stretches wrongly
        self._ranges_seen = False  # the server has served a stretch rightly
        self._joined_blindly = (
            False  # bytes of two replies were joined without a name of the version
        )

    def run(self) -> Received:
        """Fetch until the file is complete and right.

        Raises:
            NotThere: The address has no such file.
            DigestError: It serves another file.
            TransferError: It does not serve it.
            DiskFullError: There is no room.
        """
        self._settle_start()
        self._fetch()
        doubtful = self._part.inherited > 0 or self._joined_blindly
        try:
            return self._checked()
        except DigestError as error:
            if not doubtful:
                raise
            _logger.info("%s: %s Fetching it anew.", self._wanted.name, error.message)
            self._fetch()
            return self._checked()

    def _settle_start(self) -> None:
        """Keep what an earlier run or address left only if it can be continued from this address."""
        record, wanted = self._part.record, self._wanted
        fits = wanted.size is None or record.total in (None, wanted.size)
        same = record.address == self._address and (
            record.validator is not None or wanted.check_sees_all
        )
        if not self._part.stored or not fits or not (wanted.pinned or same):
            self._begin_anew()

    def _fetch(self) -> None:
        host, unreachable = host_of(self._address), self._line.client.unreachable
        backoff = Backoff(
            self._settings, self._line.client.stop, 1 if host in unreachable else None
        )
        best = self._part.stored
        while not self._complete():
            try:
                self._attempt()
                unreachable.discard(host)
            except RangeRefused as error:
                self._without_ranges(error)
            except Transient as error:
                stored = self._part.stored
                if stored == 0:
                    unreachable.add(host)
                backoff.failed(error, progress=stored > best)
                best = max(best, stored)

    def _complete(self) -> bool:
        part = self._part
        return self._sink.ended or (
            part.record.total is not None and part.frontier >= part.record.total
        )

    def _attempt(self) -> None:
        """Make one request, or a round of parallel ones, and take in what comes."""
        record = self._part.record
        in_pieces = self._ranges_seen or record.piece_bytes > 0
        if in_pieces and self._parallel() and record.total is not None and record.validator:
            fetch_pieces(self._line.client, self._sink, self._request())
            return
        with self._open(self._request()) as answer:
            self._accept(answer.reply)
            limit = self._limit(answer.reply)
            read_body(answer, self._sink, limit, may_be_html=self._wanted.may_be_html)

    def _request(self) -> Request:
        """Ask for the rest; for one piece only, to try ranges, where the file may be large enough for them."""
        record = self._part.record
        joinable = (
            record.validator is not None or self._wanted.pinned or self._wanted.check_sees_all
        )
        first = self._part.frontier if joinable and not self._whole_only else 0
        probe = self._parallel() and not self._ranges_seen
        return Request(
            address=self._address,
            pinned=self._wanted.pinned,
            first=first,
            last=first + self._settings.piece_bytes - 1 if probe else None,
            validator=record.validator if record.address == self._address else None,
        )

    def _parallel(self) -> bool:
        size = self._part.record.total or self._wanted.size
        large = size is None or size >= self._settings.parallel_from
        whole = self._whole_only or self._line.is_drive(self._address)
        return self._settings.connections > 1 and large and not whole

    def _open(self, request: Request) -> OpenReply:
        """Send a request; where Google Drive asks back, press its button."""
        answer = self._line.client.open(request)
        if not answer.reply.web_page or self._wanted.may_be_html:
            return answer
        page = _read_page(answer)
        if not self._line.is_drive(answer.reply.address):
            raise TransferError(
                f"{shown(answer.reply.address)} sent a web page in place of the file.",
                hint="A proxy or a sign-in page may stand in between: open the address in a browser.",
            )
        goal = google_drive.address_behind_page(page, answer.reply.address, self._line.drive_hosts)
        answer = self._line.client.open(replace(request, address=goal))
        if answer.reply.web_page:
            google_drive.address_behind_page(_read_page(answer), goal, hosts=())
        return answer

    def _accept(self, reply: Reply) -> None:
        """Check that a reply continues what is there; begin anew if it brings the whole file."""
        self._refuse_unusable(reply)
        part, record = self._part, self._part.record
        require_room(part.target, (reply.total or 0) - part.stored)
        described = PartRecord(
            address=self._address, total=reply.total, validator=reply.validator, etag=reply.etag
        )
        if not reply.partial or part.frontier == 0 == reply.first:
            self._sink.restart(described)
            return
        if reply.first != part.frontier or self._changed(reply):
            raise RangeRefused(
                f"{shown(reply.address)} sent another part than was asked for.", None
            )
        self._joined_blindly = self._joined_blindly or reply.validator is None
        if record.total is None or record.address != self._address:
            part.describe(described)

    def _changed(self, reply: Reply) -> bool:
        """Tell whether a reply comes from another version than the bytes that are there."""
        record = self._part.record
        if None not in (reply.total, record.total) and reply.total != record.total:
            return True
        known = record.address == self._address and None not in (record.validator, reply.validator)
        return known and record.validator != reply.validator

    def _refuse_unusable(self, reply: Reply) -> None:
        wanted, where = self._wanted, shown(reply.address)
        if reply.partial:
            self._ranges_seen = True
        if wanted.size is not None and reply.total not in (None, wanted.size) and not reply.encoded:
            raise DigestError(
                f"{where} serves {reply.total} bytes, but {wanted.name} has {wanted.size}.",
                hint="Its file was replaced, or something stands in between. Try another source with --mirror.",
            )
        if reply.encoded and not wanted.pinned:
            raise TransferError(
                f"{where} compressed the file on the way although that was not asked for."
            )
        if reply.length is None and not reply.chunked and not wanted.pinned:
            raise TransferError(
                f"{where} does not say how long the file is: a broken transfer would go unseen."
            )

    def _limit(self, reply: Reply) -> int | None:
        return self._wanted.size if reply.length is None else reply.first + reply.length

    def _without_ranges(self, error: RangeRefused) -> None:
        """React to a server that has no such bytes: all are there, the file changed, or it serves ranges wrongly."""
        part = self._part
        if error.total is not None and error.total == part.frontier and not part.record.piece_bytes:
            part.describe(replace(part.record, total=error.total))
            return
        if self._whole_only:
            raise TransferError(error.message, hint=error.hint) from error
        self._whole_only = True
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._joined_blindly = False
        self._sink.restart(PartRecord(address=self._address))

    def _checked(self) -> Received:
        part, wanted = self._part, self._wanted
        size, digest, etag = part.frontier, part.digest(), part.record.etag
        source = shown(self._address)
        if size == 0 and wanted.sha256 is None:
            self._begin_anew()
            raise DigestError(
                f"{source} served an empty file in place of {wanted.name}.",
                hint="Something stands in between, or its source is broken. Try another source with --mirror.",
            )
        if wanted.sha256 is not None and digest != wanted.sha256:
            self._begin_anew()
            raise DigestError(
                f"{source} served other bytes than {wanted.name} should be: expected sha256 {wanted.sha256}, "
                f"got {digest} ({size} bytes). They were thrown away.",
                hint="The file was replaced or damaged on the way. Try again, or another source with --mirror.",
            )
        try:
            holds = wanted.check(part.path) if wanted.check is not None else None
        except DiskFullError:
            raise
        except ProxydetError as error:
            self._begin_anew()
            reason = error.message.replace(part.path.name, wanted.target.name)
            message = f"What {source} served is not {wanted.name}: {reason}"
            hint = (
                error.hint
                or "Its file was replaced, or something stands in between. Try another source with --mirror."
            )
            raise DigestError(message, hint=hint) from error
        return Received(sha256=digest, size=size, address=source, etag=etag, holds=holds)


def _read_page(answer: OpenReply) -> str:
    data = b""
    with answer:
        while len(data) < _LARGEST_PAGE and (more := answer.read(_LARGEST_PAGE - len(data))):
            data += more
    return data.decode("utf-8", errors="replace")
