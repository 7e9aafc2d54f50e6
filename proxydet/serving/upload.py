"""Reads what a request uploads, within limits, into memory: nothing is written to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from proxydet.serving.refusals import Refusal
from proxydet.serving.settings import ServingSettings

FIELD = "picture"
"""The form field that holds the picture."""
UNNAMED = "picture"
"""What a picture without a file name is called."""

_FORM = "multipart/form-data"
_ROOM_FOR_FIELDS = 256 * 1024
_LONGEST_FIELD = 128 * 1024
_MOST_FIELDS = 16


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A picture file and the form fields that came with it."""

    data: bytes
    name: str
    """The client's file name: shown, never used as a path."""
    fields: tuple[tuple[str, str], ...]


class UploadBudget:
    """Bounds the bytes that all requests hold together.

    Args:
        limit: Most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A request's share; it is given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held

    def take(self, count: int) -> None:
        """Count bytes.

        Raises:
            Refusal: 503, there is no room for them.
        """
        if self.held + count > self._limit:
            raise Refusal(
                503,
                "busy",
                "too many pictures are being uploaded at once",
                hint="ask again later",
                retry_after=1,
            )
        self.held += count


class Share:
    """The bytes that one request holds."""

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self.held = 0

    def take(self, count: int) -> None:
        """Count bytes; raises Refusal (503) where there is no room."""
        self._budget.take(count)
        self.held += count


async def read_upload(request: Request, settings: ServingSettings, share: Share) -> Upload:
    """Read a picture: the body itself, or the field ``picture`` of a form.

    Args:
        request: The request; its body has not been read.
        settings: Limits.
        share: Where the bytes are counted.

    Raises:
        Refusal: 400 malformed, 408 too slow, 413 too large, 415 of another type, 503 no memory left.
        ClientDisconnect: The client went away.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    form = kind == _FORM
    if not form and not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refusal(
            415,
            "picture-type",
            f"the content type is {kind[:80] or 'not said'}; a picture or a form with a picture is wanted",
            hint="curl: -F picture=@photo.jpg, or --data-binary @photo.jpg -H 'Content-Type: image/jpeg'",
        )
    room = settings.max_upload_bytes + (_ROOM_FOR_FIELDS if form else 0)
    body = _limited(request, room, settings.max_upload_bytes, share)
    reading = _read_form(request, body, settings) if form else _read_body(body)
    try:
        upload = await asyncio.wait_for(reading, settings.upload_seconds)
    except asyncio.TimeoutError:
        raise Refusal(
            408,
            "slow-upload",
            f"the upload took longer than {settings.upload_seconds:g} seconds",
            hint="send a smaller copy of the picture",
        ) from None
    if len(upload.data) > settings.max_upload_bytes:
        raise _too_large(settings.max_upload_bytes)
    return upload


async def _limited(
    request: Request, room: int, allowed: int, share: Share
) -> AsyncGenerator[bytes, None]:
    """The body's pieces; counted as they come, since a stated length may be missing or a lie."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > room:
        raise _too_large(allowed)
    total = 0
    async for piece in request.stream():
        total += len(piece)
        if total > room:
            raise _too_large(allowed)
        share.take(len(piece))
        yield piece


async def _read_body(body: AsyncGenerator[bytes, None]) -> Upload:
    data = b"".join([piece async for piece in body])
    if not data:
        raise _no_picture()
    return Upload(data=data, name=UNNAMED, fields=())


async def _read_form(
    request: Request, body: AsyncGenerator[bytes, None], settings: ServingSettings
) -> Upload:
    parser = MultiPartParser(
        request.headers,
        body,
        max_files=1,
        max_fields=_MOST_FIELDS,
        max_part_size=_LONGEST_FIELD,
    )
    # The parser moves files beyond this size to the disk; none can be larger than the body.
    parser.spool_max_size = settings.max_upload_bytes + _ROOM_FOR_FIELDS + 1
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise Refusal(
            400,
            "malformed",
            f"the form cannot be read: {error}",
            hint="send one file as the field 'picture'",
        ) from error
    try:
        return await _picked(form)
    finally:
        await form.close()


async def _picked(form: FormData) -> Upload:
    """The picture and the text fields of a form."""
    items = form.multi_items()
    files = [(key, value) for key, value in items if isinstance(value, UploadFile)]
    if not files or files[0][0] != FIELD:
        raise _no_picture()
    file = files[0][1]
    data = await file.read()
    if not data:
        raise _no_picture()
    fields = tuple((key, value) for key, value in items if isinstance(value, str))
    return Upload(data=data, name=file.filename or UNNAMED, fields=fields)


def _no_picture() -> Refusal:
    return Refusal(
        400,
        "malformed",
        "the request holds no picture",
        hint=f"send it as the request's body, or as the form's field {FIELD!r}",
    )


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        "upload-size",
        f"the picture is larger than the {limit / 2**20:g} MiB that are accepted",
        hint="send a smaller copy: the detector scales pictures down anyway",
    )
