"""The Starlette application: a few fixed routes around a detector.

From top to bottom: limits, errors, parameters, images, uploads, the queue of jobs, the middleware, the routes. Nothing here loads
torch: the detector may be opened by a job of the queue, while the page is there already.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import logging
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib.resources import files
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxydet._version import __version__
from proxydet.data.images import DAMAGE, Pixels, image_size, open_image, read_image
from proxydet.detections import Detections
from proxydet.errors import (
    ConfigError,
    DataError,
    ProxydetError,
    RuntimeEnvironmentError,
    VocabularyError,
)
from proxydet.serve.examples import Example
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.names import split_names
from proxydet.wording import json_text, nearest

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.index.search import RegionIndex
    from proxydet.inference.sources import SourceImage
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.exemplars import RegionStatistics
    from proxydet.vocabulary.sources import TrainedClasses
    from proxydet.vocabulary.vocabulary import Vocabulary

T = TypeVar("T")

logger = logging.getLogger(__name__)
access = logging.getLogger("proxydet.serve.access")


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Limits of a server. All are above 0."""

    max_upload_bytes: int = 20 * 1024 * 1024
    """Largest image file, in bytes."""
    max_pixels: int = 50_000_000
    """Largest image, in pixels (width x height), read from its header before anything is decoded."""
    max_words: int = 300
    """Most class names in one request."""
    max_word_length: int = 200
    """Longest class name, in characters."""
    max_detections: int = 1000
    """Most detections that a request may ask for."""
    queue_places: int = 32
    """Requests that may wait behind the one that is being processed; more are refused."""
    wait_seconds: float = 60.0
    """Longest time from a complete upload to its response, in seconds."""
    upload_seconds: float = 30.0
    """Longest time for an upload to arrive, and for a client to take a part of a response, in seconds."""
    header_seconds: float = 10.0
    """Longest time for the head of a request to arrive, in seconds."""
    stop_seconds: float = 30.0
    """Longest time that open requests are given when the server is stopped, in seconds."""
    held_bytes: int = 512 * 1024 * 1024
    """Most bytes of uploads held in memory at once, over all requests."""
    connections: int = 256
    """Most connections open at once."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names, besides localhost, that requests may be addressed to."""
    loopback_only: bool = True
    """The server listens on a loopback address: requests addressed to other addresses are refused."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{entry.name} is {value}; it must be above 0")


# --- Errors ------------------------------------------------------------------------------------------------------------


_KINDS = {
    400: ("parameter", "words", "image", "malformed"),
    403: ("host", "origin"),
    404: ("not-found", "region"),
    405: ("method",),
    408: ("slow-upload",),
    413: ("upload-size", "image-size"),
    415: ("image-type",),
    500: ("environment", "model", "index", "bug"),
    503: ("busy", "loading", "failed", "stopping"),
    504: ("timeout",),
}
"""By HTTP status, the kinds of errors that have it."""

_KINDS_OF_THE_CORE: tuple[tuple[type[ProxydetError], str], ...] = (
    (VocabularyError, "words"),
    (DataError, "image"),
    (ConfigError, "parameter"),
    (RuntimeEnvironmentError, "environment"),
    (ProxydetError, "model"),
)


class RequestError(ProxydetError):
    """A request that cannot be served.

    Args:
        kind: One word for programs, of `_KINDS`.
        message: What happened and why.
        hint: What the client can do next.
        retry_after: Seconds after which a retry is worthwhile; None where it would not help.
    """

    def __init__(
        self, kind: str, message: str, hint: str | None = None, *, retry_after: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.retry_after = retry_after


def _busy(message: str, retry_after: int, kind: str = "busy") -> RequestError:
    return RequestError(kind, message, "try again later", retry_after=retry_after)


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Render an error as ``{"error": {"kind", "message", "hint"}}``; what is not ours is a bug."""
    extra = dict(headers or {})
    if not isinstance(error, ProxydetError):
        text = f"internal error, a bug in proxydet: {type(error).__name__}: {error}"
        error = RequestError("bug", text, "report it with the server's log")
    if isinstance(error, RequestError):
        kind = error.kind
        if error.retry_after is not None:
            extra["Retry-After"] = str(error.retry_after)
    else:
        kind = next(kind for family, kind in _KINDS_OF_THE_CORE if isinstance(error, family))
    content = {"error": {"kind": kind, "message": error.message, "hint": error.hint}}
    return JSONResponse(content, next(s for s, kinds in _KINDS.items() if kind in kinds), extra)


# --- Parameters --------------------------------------------------------------------------------------------------------


class ShownClass(msgspec.Struct, frozen=True):
    """A class that regions of images show."""

    name: str
    regions: Annotated[tuple[bytes, ...], msgspec.Meta(min_length=1)]
    """Embeddings, as ``/api/embed`` gave them: float32, little-endian."""


@dataclass(frozen=True, kw_only=True)
class PredictParams:
    """What to detect, and what to keep; the defaults are those of ``proxydet predict``."""

    words: tuple[str, ...] | None = None
    """Class names; None: the server's default classes."""
    background: tuple[str, ...] | str = ()
    """Names of classes that absorb false hits and are not reported; `TRAINING_CLASSES`: all of the training that are not asked
    for; empty: the server's."""
    bias: Mapping[str, float] = field(default_factory=dict)
    """Added to the logits of classes."""
    threshold: Mapping[str, float] = field(default_factory=dict)
    """What detections of classes must score above, instead of ``score_threshold``."""
    score_threshold: float = 0.3
    """Only what scores above this, 0 to 1."""
    top: int = 300
    """At most this many detections, the best."""
    exemplars: tuple[ShownClass, ...] = ()
    """Classes that regions of images show, besides those that are named; alone where none is named."""
    masks: bool | None = None
    """Masks too, or boxes only; None: masks where the detector has a mask head."""
    one_label: bool = True
    """One label a box: of overlapping detections of any classes only the best."""
    limit: int = 100
    """Of a search: at most this many images, the best."""
    like: int | None = None
    """Of a search: the id of an image, to look for what is in ``box`` of it instead of class names."""
    box: tuple[float, float, float, float] | None = None
    """xyxy in pixels of that image."""


def read_params(
    pairs: Iterable[tuple[str, str]],
    settings: ServingSettings,
    parsers: Mapping[str, Callable[[str, str], Any]] | None = None,
) -> PredictParams:
    """Read the parameters of a request.

    Args:
        pairs: Names and values, of the query and of the form; ``words`` may be repeated.
        settings: Limits.
        parsers: Reads each parameter but ``words``; None: those of a prediction.

    Raises:
        RequestError: 400, a parameter is unknown, repeated, or out of range.
        VocabularyError: The words cannot be split.
    """
    from proxydet.vocabulary.sources import TRAINING_CLASSES

    parsers = _PARSERS if parsers is None else parsers
    words: list[str] = []
    background: list[str] = []
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in ("words", "background"):
            names = split_names(value) if value.strip() else []
            (words if key == "words" else background).extend(names)
        elif key in given:
            raise _bad_parameter(f"duplicate parameter {key!r}", "give it once")
        elif key in parsers:
            given[key] = parsers[key](key, value)
        else:
            known = ("words", "background", *parsers)
            hint = nearest(key, known).strip() or f"known: {', '.join(known)}"
            raise _bad_parameter(f"unknown parameter {key[:80]!r}", hint)
    classes: list[ClassParams] = given.pop("classes", [])
    if classes and (words or background):
        raise _bad_parameter(
            "classes cannot be combined with words or background", 'mark them: {"background": true}'
        )
    training = background == [TRAINING_CLASSES]
    words += [entry.name for entry in classes if not entry.background]
    background += [entry.name for entry in classes if entry.background]
    asked = [*words, *background, *(shown.name for shown in given.get("exemplars", ()))]
    if classes and not words:
        raise RequestError("words", "all classes are background", "name one to detect")
    if len(asked) > settings.max_words:
        many = f"{len(asked)} class names; the limit is {settings.max_words}"
        hint = "ask for fewer at a time, or use proxydet predict --vocabulary"
        raise RequestError("words", many, hint)
    for word in asked:
        if len(word) > settings.max_word_length:
            limit = f"has {len(word)} characters; the limit is {settings.max_word_length}"
            long = f"the class name {word[:40] + '...'!r} {limit}"
            raise RequestError("words", long, "separate class names by commas")
    params = PredictParams(
        words=tuple(words) or None,
        background=TRAINING_CLASSES if training else tuple(background),
        bias={entry.name.strip(): entry.bias for entry in classes if entry.bias is not None},
        threshold={e.name.strip(): e.threshold for e in classes if e.threshold is not None},
        **given,
    )
    if params.top > settings.max_detections:
        raise _bad_parameter(
            f"top is {params.top}; the limit is {settings.max_detections}", "ask for fewer"
        )
    return params


class ClassParams(msgspec.Struct, forbid_unknown_fields=True):
    """A class of the parameter ``classes``."""

    name: str
    bias: Annotated[float, msgspec.Meta(ge=-50, le=50)] | None = None
    """Added to its logits; null: of background the margin, of classes of the served vocabulary their own, else 0."""
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """What its detections must score above; null: of classes of the served vocabulary their own, else ``score_threshold``."""
    background: bool = False
    """Whether it only takes regions from others."""


def _json(kind: Any, hint: str, key: str, text: str) -> Any:
    """Read a parameter that is JSON of a given type."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _bad_parameter(f"{key} cannot be read: {str(error)[:200]}", hint) from error


def _fraction(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise _bad_parameter(f"{key} is {text[:40]!r}; it must be a number from 0 to 1", "e.g. 0.3")
    return value


def _integer(key: str, text: str, least: int = 1) -> int:
    # At most nine digits: longer ones are refused here and not by Python's own limit.
    value = int(text) if text.isdecimal() and len(text) < 10 else -1
    if value < least:
        kind = "a positive integer" if least else "the id of an image"
        raise _bad_parameter(f"{key} is {text[:40]!r}; it must be {kind}", "e.g. 100")
    return value


def _boolean(key: str, text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "on": True}
    values |= {"false": False, "0": False, "no": False, "off": False}
    if text.lower() not in values:
        raise _bad_parameter(
            f"{key} is {text[:40]!r}; it must be true or false", "leave it out for the default"
        )
    return values[text.lower()]


def _exemplars(key: str, text: str) -> tuple[ShownClass, ...]:
    hint = 'e.g. [{"name": "my mug", "regions": ["..."]}], with regions of POST /api/embed'
    classes = _json(list[ShownClass], hint, key, text)
    if not all(shown.name.strip() for shown in classes):
        raise _bad_parameter(f"{key}: each class needs a name", hint)
    return tuple(ShownClass(shown.name.strip(), shown.regions) for shown in classes)


Box = tuple[float, float, float, float]
"""xyxy in pixels of an image."""
_Boxes = Annotated[list[Box], msgspec.Meta(min_length=1, max_length=100)]


def read_boxes(pairs: Iterable[tuple[str, str]]) -> list[Box]:
    """Read the parameter ``boxes`` of a request, 1 to 100 boxes.

    Raises:
        RequestError: 400, it is absent, repeated or not a list of boxes, or there is another parameter.
    """
    given = list(pairs)
    hint = "e.g. boxes=[[10, 20, 110, 90]]: left, top, right, bottom, in pixels of the image"
    if [key for key, _ in given] != ["boxes"]:
        named = ", ".join(key[:40] for key, _ in given) or "none"
        raise _bad_parameter(f"the parameters are {named}, not boxes", hint)
    boxes: list[Box] = _json(_Boxes, hint, *given[0])
    return boxes


_Parsers = Mapping[str, Callable[[str, str], Any]]
_ANY_PARSERS: _Parsers = {
    "score_threshold": _fraction,
    "top": _integer,
    "one_label": _boolean,
    "classes": partial(
        _json,
        list[ClassParams],
        '[{"name": "mug", "threshold": 0.4}, {"name": "wall", "background": true}]',
    ),
}
_PARSERS: _Parsers = {**_ANY_PARSERS, "masks": _boolean, "exemplars": _exemplars}
_SEARCH_PARSERS: _Parsers = {
    **_ANY_PARSERS,
    "limit": _integer,
    "like": partial(_integer, least=0),
    "box": partial(_json, Box, "e.g. box=[10, 20, 110, 90]"),
}


def _bad_parameter(message: str, hint: str) -> RequestError:
    return RequestError("parameter", message, hint)


# --- Images ------------------------------------------------------------------------------------------------------------

_SMALLER = "send a smaller copy: the detector scales images down anyway"
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@cache
def accepted_formats() -> tuple[str, ...]:
    """The image formats that are accepted, by Pillow's names, as far as this Pillow has them.

    Its other readers are kept away from what strangers send: that of PostScript starts another program.
    """
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


@contextmanager
def opened_image(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image by its header, without decoding it.

    Args:
        data: The file.
        max_pixels: Most pixels.

    Raises:
        RequestError: 415 for another format, 413 for too many pixels.
    """
    limit = f"the limit is {max_pixels / 1e6:g} million"
    try:
        image = Image.open(io.BytesIO(data), formats=accepted_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(
            "image-size", f"the image has far too many pixels; {limit}", _SMALLER
        ) from error
    except DAMAGE as error:
        hint = f"send one of {', '.join(accepted_formats())}"
        raise RequestError("image-type", "unsupported image format", hint) from error
    with image:
        if image.width * image.height > max_pixels:
            size = f"the image has {image.width} x {image.height} pixels"
            raise RequestError("image-size", f"{size}; {limit}", _SMALLER)
        yield image


# --- Uploads -----------------------------------------------------------------------------------------------------------

FIELD = "picture"
"""The form field that holds the image."""
UNNAMED = "picture"
"""What an image without a file name is called."""

_ROOM_FOR_FIELDS = 256 * 1024
_LONGEST_FIELD = 128 * 1024
_MOST_FIELDS = 16


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An image file and the form fields that came with it."""

    data: bytes
    name: str
    """The client's file name: shown, never used as a path."""
    fields: tuple[tuple[str, str], ...]


class UploadBudget:
    """Bounds the bytes that all requests hold together.

    Args:
        limit: Most bytes.

    Attributes:
        held: Bytes held now.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Give a function that counts the bytes of one request, which are released at the end.

        It raises RequestError (503) where there is no room for more.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self.held + count > self._limit:
                raise _busy("too many uploads in progress", 1)
            self.held += count
            taken += count

        try:
            yield take
        finally:
            self.held -= taken


async def read_upload(
    request: Request, settings: ServingSettings, take: Callable[[int], None]
) -> Upload:
    """Read an image: the body itself, or the field ``picture`` of a form.

    Args:
        request: The request; its body has not been read.
        settings: Limits.
        take: Counts the bytes; see `UploadBudget.share`.

    Raises:
        RequestError: 400 malformed, 408 too slow, 413 too large, 415 of another type, 503 no memory left.
        ClientDisconnect: The client went away.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    is_form = media_type == "multipart/form-data"
    is_image = media_type.startswith("image/") or media_type == "application/octet-stream"
    if not is_form and not is_image:
        raise RequestError(
            "image-type",
            f"unsupported content type {media_type[:80] or '(none)'!r}: expected an image or a form with an image",
            "curl: -F picture=@photo.jpg, or --data-binary @photo.jpg -H 'Content-Type: image/jpeg'",
        )
    limit = settings.max_upload_bytes + (_ROOM_FOR_FIELDS if is_form else 0)
    most = f"{settings.max_upload_bytes / 2**20:g} MiB"
    too_large = RequestError("upload-size", f"the image file is larger than {most}", _SMALLER)

    async def pieces() -> AsyncIterator[bytes]:
        # Counted as they come, since a stated length may be missing or a lie.
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > limit:
            raise too_large
        total = 0
        async for piece in request.stream():
            total += len(piece)
            if total > limit:
                raise too_large
            take(len(piece))
            yield piece

    async def read() -> Upload:
        if not is_form:
            data = b"".join([piece async for piece in pieces()])
            return Upload(data=data, name=UNNAMED, fields=())
        parser = MultiPartParser(
            request.headers,
            pieces(),  # type: ignore[arg-type]
            max_files=1,
            max_fields=_MOST_FIELDS,
            max_part_size=_LONGEST_FIELD,
        )
        # The parser moves files beyond this size to the disk; none can be larger than the body.
        parser.spool_max_size = limit + 1
        try:
            form = await parser.parse()
        except (MultiPartException, FormParserError) as error:
            hint = f"send one file as the field {FIELD!r}"
            raise RequestError("malformed", f"the form cannot be read: {error}", hint) from error
        try:
            file = form.get(FIELD)
            if not isinstance(file, UploadFile):
                return Upload(data=b"", name=UNNAMED, fields=())
            texts = [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
            return Upload(
                data=await file.read(), name=file.filename or UNNAMED, fields=tuple(texts)
            )
        finally:
            await form.close()

    try:
        upload = await asyncio.wait_for(read(), settings.upload_seconds)
    except asyncio.TimeoutError:
        slow = f"the upload took longer than {settings.upload_seconds:g} seconds"
        raise RequestError("slow-upload", slow, "send a smaller copy of the image") from None
    if not upload.data:
        hint = f"send it as the request's body, or as the form's field {FIELD!r}"
        raise RequestError("malformed", "the request contains no image", hint)
    if len(upload.data) > settings.max_upload_bytes:
        raise too_large
    return upload


# --- The queue of jobs -------------------------------------------------------------------------------------------------

_LONGEST_RETRY = 60
# How fast the average time of a job follows the last ones.
_FOLLOW = 0.2


class WorkQueue:
    """Runs jobs in the order in which they come, in one daemon thread. Used from one event loop.

    A job that nobody waits for any more (timeout, client gone) leaves the queue with all that it holds; one that is
    already running is finished and its result dropped.

    Args:
        size: Jobs that may wait, besides the one that runs.

    Attributes:
        busy: Whether a job runs.
        stopped: Whether nothing more is accepted.
        abandoned: Whether `close` does not wait for the job that runs.
    """

    def __init__(self, size: int) -> None:
        self.busy = False
        self.stopped = False
        self.abandoned = False
        self._size = size
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._seconds = 1.0
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._compute, name="detect", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    async def run(self, work: Callable[[], T], *, timeout: float | None) -> T:
        """Run a job after those before it.

        Args:
            work: Called in the thread.
            timeout: Longest time until the result, in seconds; None: any time.

        Raises:
            RequestError: 503 where the queue is full, the job did not start in time or the server stops; 504 where the
                job itself took too long.
        """
        self.admit()
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        job = (work, result)
        self._waiting.append(job)
        if not self.busy:
            self._start_next()
        try:
            await asyncio.wait([result], timeout=timeout)
            if result.done():
                return result.result()
            if job in self._waiting:
                waited = f"the request waited in the queue for more than {timeout:g} seconds"
                raise _busy(waited, self._retry_after())
            raise RequestError(
                "timeout",
                f"the request took longer than {timeout:g} seconds",
                "send a smaller image or fewer class names, or start the server with a longer --timeout",
            )
        finally:
            result.cancel()
            if job in self._waiting:
                self._waiting.remove(job)

    def admit(self) -> None:
        """Refuse at once what could not wait.

        Raises:
            RequestError: 503.
        """
        if self.stopped:
            raise _stopping()
        if len(self._waiting) >= self._size:
            full = f"the queue is full: {self._size} requests are waiting"
            raise _busy(full, self._retry_after())

    def stop(self) -> None:
        """Accept nothing more and refuse what waits; what runs is finished."""
        self.stopped = True
        for _, result in self._waiting:
            result.set_exception(_stopping())
        self._waiting.clear()

    async def close(self) -> None:
        """Stop, and wait for the job that runs, unless it is abandoned."""
        self.stop()
        self._calls.put(None)
        while self.busy and not self.abandoned:
            await asyncio.sleep(0.05)

    def _compute(self) -> None:
        for call in iter(self._calls.get, None):
            call()

    def _start_next(self) -> None:
        self.busy = bool(self._waiting)
        if not self._waiting:
            return
        work, result = self._waiting.popleft()
        began = time.perf_counter()
        loop = asyncio.get_running_loop()

        def call() -> None:
            value, error = None, None
            try:
                value = work()
            except BaseException as raised:  # noqa: BLE001 - raised where the result is awaited
                error = raised
            with suppress(RuntimeError):  # an abandoned job: its loop is closed
                loop.call_soon_threadsafe(finish, value, error)

        def finish(value: Any, error: BaseException | None) -> None:
            self._seconds += _FOLLOW * (time.perf_counter() - began - self._seconds)
            if result.done():
                if error is not None:
                    logger.warning("the request of a disconnected client failed: %s", error)
            elif error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)
            self._start_next()

        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(call)

    def _retry_after(self) -> int:
        return min(max(round(self._seconds * (len(self._waiting) + 1)), 1), _LONGEST_RETRY)


def _stopping() -> RequestError:
    return RequestError("stopping", "the server is shutting down", "start it again")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


# --- The middleware ----------------------------------------------------------------------------------------------------

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Images that a search returns at most, and the longest side of one that is shown, in pixels.
_MOST_IMAGES = 1000
_LARGEST_SHOWN = 1600
# The status of a client that went away before its response.
_CLIENT_GONE = 499


class SecurityMiddleware:
    """Checks the host and the origin of requests, adds headers to responses, logs both.

    A page from elsewhere that is open in the same browser can send requests to this machine: under a name that it made
    point here (DNS rebinding), or straight across. The first is seen by ``Host``, the second by ``Origin``.

    Args:
        app: The application.
        settings: Allowed hosts, and the time for a client to take a response.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), _CLIENT_GONE

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await asyncio.wait_for(send(message), self._settings.upload_seconds)

        try:
            error = self._check(Headers(scope=scope))
            app = self._app if error is None else error_response(error)
            await app(scope, receive, respond)
        finally:
            client = (scope.get("client") or ("-",))[0]
            # The path is a client's text, quoted so that it stays on its line; the class names are left out.
            shown = f"{scope['method']} {quote(scope['path'])[:80]}"
            seconds = time.perf_counter() - began
            access.info("%s %s %s %.3f s", client, shown, status, seconds)

    def _check(self, headers: Headers) -> RequestError | None:
        host, settings = headers.get("host", ""), self._settings
        if not is_own_host(host, settings.allowed_hosts, loopback=settings.loopback_only):
            hint = "start the server with --allow-host NAME to serve another host name"
            return RequestError("host", f"unknown host {host[:80]!r}", hint)
        origin = headers.get("origin")
        if origin is None:
            return None
        try:
            authority = urlsplit(origin).netloc.lower()
        except ValueError:
            authority = ""
        if authority == host.lower():
            return None
        hint = "only the server's own page may send requests from a browser"
        return RequestError("origin", f"cross-origin request from {origin[:80]!r}", hint)


def is_own_host(header: str, names: Collection[str], *, loopback: bool) -> bool:
    """Whether a ``Host`` header is one of this server's.

    An address of numbers cannot be made to point here by a stranger, a name can.

    Args:
        header: Name or address, and perhaps a port.
        names: Names besides localhost, in small letters.
        loopback: Only loopback addresses count.
    """
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if host == "localhost" or host in names:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or not loopback


# --- The application ---------------------------------------------------------------------------------------------------

_COMMON = ("style.css", "colours.js", "common.js")
_ASSETS = ("index.html", "app.js", "drawing.js", *_COMMON)
_SEARCH_ASSETS = ("search.html", "search.js", *_COMMON)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served: a detector, or an index that is searched."""

    detector: Detector | None = None
    """The detector; None: an index."""
    index: RegionIndex | None = None
    """The index; None: a detector."""
    vocabulary: Vocabulary | None = None
    """What it detects where a request names no classes, and what is known of classes that requests name; None: the classes of its
    training."""
    background: Vocabulary | None = None
    """Background of requests that name classes and no background; classes like those asked for are left out."""
    examples: tuple[Example, ...] = ()
    """Images for the page."""

    @property
    def classes(self) -> TrainedClasses:
        """What class names are resolved by."""
        classes = self.detector if self.index is None else self.index
        assert classes is not None
        return classes


class ServingApp:
    """An ASGI application; `build_app` makes it.

    Attributes:
        settings: Limits.
        queue: The requests that wait.
        budget: The bytes that they hold.
        failure: Why the detector could not be opened; None while that is not known.
    """

    def __init__(
        self,
        served: Served | Callable[[], Served],
        settings: ServingSettings,
        base_above: float,
        name: str,
        search: bool,
    ) -> None:
        self.settings = settings
        self.queue = WorkQueue(settings.queue_places)
        self.budget = UploadBudget(settings.held_bytes)
        self.failure: Exception | None = None
        self._base_above = base_above
        self._name = name
        self._source = served
        self._served = served if isinstance(served, Served) else None
        self._loading: asyncio.Future[None] | None = None
        self._statistics: RegionStatistics | None = None
        self._info = {} if self._served is None else self._describe(self._served)
        routes = [
            Route("/api/health", self._health),
            Route("/api/info", self._get_info),
            *map(_asset, _SEARCH_ASSETS if search else _ASSETS),
        ]
        if search:
            routes += [
                Route("/api/search", self._search),
                Route("/images/{number:int}.jpg", self._get_image),
            ]
        else:
            routes += [
                Route("/api/predict", self._predict, methods=["POST"]),
                Route("/api/embed", self._embed, methods=["POST"]),
                Route("/examples/{index:int}.jpg", self._get_example),
            ]
        handlers: dict[Any, Any] = {
            ProxydetError: _on_error,
            HTTPException: _on_http,
            ClientDisconnect: _on_disconnect,
            Exception: _on_error,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        inner.router.redirect_slashes = False
        self._app = SecurityMiddleware(inner, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await self._app(scope, receive, send)

    @property
    def detector(self) -> Detector:
        """The detector, when it is loaded."""
        detector = self._loaded.detector
        assert detector is not None
        return detector

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes where a request names none."""
        return self._loaded.vocabulary or self._loaded.classes.vocabulary

    @property
    def _loaded(self) -> Served:
        if self.failure is not None:
            hint = getattr(self.failure, "hint", None)
            message = f"the model could not be loaded: {_reason(self.failure)}"
            raise RequestError("failed", message, hint)
        if self._served is None:
            raise _stopping()
        return self._served

    def load(self) -> None:
        """Open the detector, unless it is; called in the one thread that computes."""
        if not isinstance(self._source, Served):
            try:
                served = self._source()
                self._info = self._describe(served)
                self._served = served
            except Exception as error:
                self.failure = error
                raise

    def vocabulary_of(self, params: PredictParams, pixels_HW3: Pixels | None = None) -> Vocabulary:
        """Return the classes that a request asks for.

        Those of the served vocabulary are taken from it, with their thresholds and biases, next to its background.

        Args:
            params: The request.
            pixels_HW3: Its image; exemplars need one.

        Raises:
            VocabularyError: They cannot be embedded.
        """
        from proxydet.vocabulary.sources import ALIKE_ABOVE
        from proxydet.vocabulary.vocabulary import check_names

        default, classes = self.vocabulary, self._loaded.classes
        if params.words is None and not params.background and not params.exemplars:
            return default
        own = set() if self._loaded.vocabulary is None else set(default.reported)
        further: list[str] = []
        if params.words is None:
            found = default.subset(default.reported)
        else:
            words = check_names(params.words)
            known = [word for word in words if word in own]
            further = [word for word in words if word not in own]
            found = default.subset(known) if known else classes.resolve(further)
            if known and further:
                found = found.joined(classes.resolve(further)).subset(words)
        if params.exemplars:
            shown = self._shown_by(params.exemplars, pixels_HW3)
            found = shown if params.words is None else found.joined(shown)
        if params.background:
            found = classes.with_background(found, params.background)
        else:
            alike_above = ALIKE_ABOVE if further or params.exemplars else None
            if hidden := default.names[len(default.reported) :]:
                plain = default.with_scorers(background=None).subset(hidden)
                found = found.with_background(plain, alike_above=alike_above)
            if self._loaded.background is not None:
                served = classes.background_of(self._loaded.background)
                found = found.with_background(served, alike_above=ALIKE_ABOVE)
        found = classes.with_base(found, self._base_above)
        if params.bias or params.threshold:
            found = found.with_scorers(
                bias=list(map(params.bias.get, found.names, found.bias)),
                threshold=list(map(params.threshold.get, found.names, found.threshold)),
            )
        return found

    def _shown_by(self, exemplars: tuple[ShownClass, ...], pixels_HW3: Pixels | None) -> Vocabulary:
        """Return the classes that regions show; RequestError where these are not of this model.

        How the model sees its training classes is measured once, where there are images of them; else it is assumed from the
        image of the request alone.
        """
        from proxydet.inference.exemplars import given_exemplars, region_statistics
        from proxydet.vocabulary.exemplars import classes_of_exemplars

        size = 4 * self.detector.vocabulary.dimension
        if any(len(region) != size for shown in exemplars for region in shown.regions):
            raise _bad_parameter(
                "exemplars: a region is not of this model", "embed it again: POST /api/embed"
            )
        statistics, seconds = self._statistics, self.settings.wait_seconds / 4
        if statistics is None:
            try:
                statistics = self._statistics = region_statistics(self.detector, seconds=seconds)
            except VocabularyError:
                assert pixels_HW3 is not None
                whole = [[0, 0, pixels_HW3.shape[1], pixels_HW3.shape[0]]]
                seen = given_exemplars([pixels_HW3], [whole], [["image"]])
                statistics = region_statistics(self.detector, otherwise=seen, seconds=seconds)
        regions = [
            np.stack([np.frombuffer(r, "<f4") for r in shown.regions]) for shown in exemplars
        ]
        names = [shown.name for shown in exemplars]
        return classes_of_exemplars(names, regions, statistics).vocabulary

    def settings_of(self, params: PredictParams) -> InferenceConfig:
        """Return the settings that a request asks for.

        Raises:
            ConfigError: It asks for masks, and the detector has no mask head.
        """
        return self.detector.settings(
            score_threshold=params.score_threshold,
            max_detections=params.top,
            masks=params.masks,
            agnostic_nms=params.one_label,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        # The first job of the queue: requests that come meanwhile wait behind it.
        if self._served is None:
            self._loading = asyncio.ensure_future(self.queue.run(self.load, timeout=None))
            self._loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        if self._loading is not None:
            self._loading.cancel()
        await self.queue.close()

    async def _health(self, _request: Request) -> Response:
        state = {"waiting": self.queue.waiting, "busy": self.queue.busy}
        if self.failure is not None:
            failed = {"status": "failed", "reason": _reason(self.failure), **state}
            return JSONResponse(failed, 503)
        if self._served is None:
            return JSONResponse({"status": "loading", **state}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ok", **state})

    async def _get_info(self, _request: Request) -> Response:
        """Describe the model; waits until it is loaded."""
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=self.settings.wait_seconds)
        if self._served is None and self.failure is None and not self.queue.stopped:
            raise _busy("the model is being loaded", 1, "loading")
        _ = self._loaded
        return JSONResponse(self._info)

    async def _get_example(self, request: Request) -> Response:
        examples = self._loaded.examples if self._served is not None else ()
        index = request.path_params["index"]
        if index >= len(examples):
            raise HTTPException(404)
        return Response(examples[index].data, media_type="image/jpeg")

    async def _predict(self, request: Request) -> Response:
        self.queue.admit()
        # Mistakes in the query are reported before the image is sent.
        query = request.query_params.multi_items()
        params = read_params(query, self.settings)
        if self._served is not None:
            self.settings_of(params)
        return await self._answer(
            request,
            lambda upload: partial(
                self._detect, upload, read_params([*query, *upload.fields], self.settings)
            ),
        )

    async def _embed(self, request: Request) -> Response:
        self.queue.admit()
        query = request.query_params.multi_items()
        return await self._answer(
            request,
            lambda upload: partial(self._embed_boxes, upload, read_boxes([*query, *upload.fields])),
        )

    async def _answer(
        self, request: Request, job: Callable[[Upload], Callable[[], bytes]]
    ) -> Response:
        """Read an image, and respond with the JSON that the job made of it returns, in its turn."""
        with self.budget.share() as take:
            upload = await read_upload(request, self.settings, take)
            work = job(upload)
            await asyncio.to_thread(_check_header, upload.data, self.settings.max_pixels)
            return await self._computed(request, work)

    async def _computed(
        self, request: Request, work: Callable[[], bytes], media_type: str = "application/json"
    ) -> Response:
        """Wait for a job that returns the content of a response, unless the client goes away before."""
        content = asyncio.ensure_future(self.queue.run(work, timeout=self.settings.wait_seconds))
        gone = asyncio.ensure_future(request.receive())
        either: list[asyncio.Future[Any]] = [content, gone]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not content.done():
                raise ClientDisconnect
            return Response(content.result(), media_type=media_type)
        finally:
            gone.cancel()
            content.cancel()

    def _detect(self, upload: Upload, params: PredictParams) -> bytes:
        """Detect objects in an image; called in the one thread that computes.

        Images are run one by one: several at once are padded to one size, and would differ in the last bits from what
        `Detector.predict` finds.

        Returns:
            JSON: ``file``, ``width``, ``height`` and ``detections``, as ``proxydet predict --json`` gives them; and ``thresholds``
            by class, where classes have their own.

        Raises:
            ProxydetError: The image or the class names cannot be used, or there is not enough memory.
        """
        import torch

        settings = self.settings_of(params)
        try:
            with opened_image(upload.data, self.settings.max_pixels) as image:
                pixels_HW3 = read_image(image, name=upload.name)
            vocabulary = self.vocabulary_of(params, pixels_HW3)
            (prediction,) = self.detector.predict_images([pixels_HW3], vocabulary, settings)
            found = Detections(prediction, vocabulary.reported)
            result = {"file": upload.name, **found.to_dict()}
            limits = zip(vocabulary.reported, vocabulary.threshold.tolist(), strict=False)
            if own := {name: limit for name, limit in limits if limit == limit}:
                result["thresholds"] = own
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise RuntimeEnvironmentError(
                "not enough memory for this image and these class names",
                hint="send a smaller image or fewer class names",
            ) from error
        return json_text(result, allow_nan=False).encode()

    async def _search(self, request: Request) -> Response:
        self.queue.admit()
        params = read_params(request.query_params.multi_items(), self.settings, _SEARCH_PARSERS)
        if params.limit > _MOST_IMAGES:
            raise _bad_parameter(
                f"limit is {params.limit}; at most {_MOST_IMAGES}", "ask for fewer"
            )
        if (params.like is None) != (params.box is None):
            raise _bad_parameter("like and box go together", "e.g. like=3&box=[10,20,110,90]")
        if params.like is not None and (params.words or params.background):
            raise _bad_parameter(
                "like cannot be combined with words, background or classes", "leave one out"
            )
        async for _ in request.stream():  # what a search has no use for
            pass
        return await self._computed(request, partial(self._find, params))

    def _find(self, params: PredictParams) -> bytes:
        """Search the index; called in the one thread that computes.

        Returns:
            JSON: ``images`` (each with its ``id`` for ``/images/ID.jpg``, else as ``proxydet search --json`` gives them),
            ``searched`` and ``seconds``; with ``like``, the region that was looked for.

        Raises:
            ProxydetError: The class names cannot be used, or the index is damaged.
        """
        index = self._loaded.index
        assert index is not None
        like = None
        if params.like is not None and params.box is not None:
            try:
                like = index.like(params.like, params.box)
            except DataError as error:
                # Of a damaged part the file is named.
                kind = "region" if error.path is None else "index"
                raise RequestError(kind, error.message, error.hint) from error
        vocabulary = self.vocabulary_of(params) if like is None else like.vocabulary
        settings = index.settings(
            score_threshold=params.score_threshold,
            max_detections=params.top,
            agnostic_nms=params.one_label,
        )
        began = time.perf_counter()
        try:
            hits = index.search_classes(vocabulary, settings, top=params.limit)
        except DataError as error:
            raise RequestError("index", error.message, error.hint) from error
        result = {
            **({} if like is None else {"like": {"id": params.like, **like.to_dict()}}),
            "images": [{"id": hit.number, **hit.to_dict()} for hit in hits],
            "searched": {"images": len(index), "regions": index.stored.regions},
            "seconds": round(time.perf_counter() - began, 6),
        }
        return json_text(result, allow_nan=False).encode()

    async def _get_image(self, request: Request) -> Response:
        """Send an image of the index, scaled down to ``size`` pixels."""
        self.queue.admit()
        index = self._loaded.index
        assert index is not None
        size = _integer("size", request.query_params.get("size", "360"))
        source = index.source_at(request.path_params["number"])
        if source is None:
            raise HTTPException(404)
        # An index of someone else must not make the server fetch what it names.
        if "://" in (source.tar or source.name):
            stored = "the image is in an object store, which the server does not read"
            raise RequestError("not-found", stored)
        async for _ in request.stream():
            pass
        return await self._computed(request, partial(self._scaled, source, size), "image/jpeg")

    def _scaled(self, source: SourceImage, size: int) -> bytes:
        """Read and scale down an image; called in the one thread that computes, so one is in memory at a time.

        Returns:
            A JPEG file.

        Raises:
            RequestError: The image cannot be read (404), or has too many pixels (413).
        """
        try:
            encoded = source.encoded()
            height, width = image_size(encoded, name=source.name)
            if height * width > self.settings.max_pixels:
                limit = f"the limit is {self.settings.max_pixels / 1e6:g} million"
                large = f"the image has {width} x {height} pixels; {limit}"
                hint = "start the server with a larger --max-megapixels"
                raise RequestError("image-size", large, hint)
            image = open_image(encoded, name=source.name)
        except DataError as error:
            raise RequestError("not-found", error.message, error.hint) from error
        except MemoryError as error:
            raise RuntimeEnvironmentError(
                "not enough memory for this image",
                hint="start the server with a smaller --max-megapixels",
            ) from error
        image.thumbnail((min(size, _LARGEST_SHOWN),) * 2)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def _embed_boxes(self, upload: Upload, boxes: list[Box]) -> bytes:
        """Embed regions of an image; called in the one thread that computes.

        Returns:
            JSON: ``file``, ``width``, ``height``, and ``regions``: what `_exemplars` takes, one for each box.

        Raises:
            ProxydetError: The image or a box cannot be used.
        """
        with opened_image(upload.data, self.settings.max_pixels) as image:
            pixels_HW3 = read_image(image, name=upload.name)
        (found_NSD,) = self.detector.embed_boxes([pixels_HW3], [boxes])
        result = {
            "file": upload.name,
            "width": pixels_HW3.shape[1],
            "height": pixels_HW3.shape[0],
            "regions": [
                base64.b64encode(row_D.astype("<f4").tobytes()).decode()
                for row_D in found_NSD.mean(axis=1)
            ],
        }
        return json_text(result).encode()

    def _describe(self, served: Served) -> dict[str, Any]:
        """What ``GET /api/info`` gives: model, classes and limits."""
        classes = served.classes
        default = served.vocabulary or classes.vocabulary
        free, why_not, known = True, None, None
        try:
            encoder = classes.encoder
        except VocabularyError as error:
            free = False
            why_not = f"{error.message}; {error.hint}" if error.hint else error.message
        else:
            known = list(encoder.words) if isinstance(encoder, CompositionalEncoder) else None
        limits = (
            *("max_upload_bytes", "max_pixels", "max_words", "max_word_length", "max_detections"),
            *("queue_places", "wait_seconds", "upload_seconds"),
        )
        subject: dict[str, Any] = {}
        if served.index is not None:
            compact = served.index.stored.detector.most_regions is not None
            subject["index"] = {
                "images": len(served.index),
                "regions": served.index.stored.regions,
                "mode": "compact" if compact else "exact",
            }
        if served.detector is not None:
            subject["model"] = {
                "name": self._name,
                "device": str(served.detector.network.device),
                "training_classes": len(classes.vocabulary),
                "masks": served.detector.inference.masks,
            }
        return {
            "version": __version__,
            **subject,
            "words": {
                "default": list(default.reported),
                "background": list(default.names[len(default.reported) :]),
                "free": free,
                "why_not": why_not,
                "known": known,
            },
            "limits": {name: getattr(self.settings, name) for name in limits},
            "formats": list(accepted_formats()),
            "examples": [
                {"address": f"examples/{index}.jpg", "name": example.name, "words": example.words}
                for index, example in enumerate(served.examples)
            ],
        }


def build_app(
    served: Detector | Served | Callable[[], Served],
    settings: ServingSettings | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    base_above: float = 0.9,
    name: str = "detector",
    search: bool = False,
) -> ServingApp:
    """Put a detector, or an index that is searched, behind HTTP.

    Args:
        served: The detector, alone or with classes and examples; or a function that opens them, which is called in the background
            when the application starts. Requests wait for it.
        settings: Limits; the default ones where None.
        vocabulary: What a detector given alone detects when a request names no classes; None: the classes of the training.
        base_above: Class names of requests count as base above this cosine with a base class of the training.
        name: What the model is called on the page.
        search: Whether a function in place of ``served`` opens an index.

    Returns:
        An ASGI application, for `proxydet.serve.server.serve` or any ASGI server (one process of it).
    """
    if not isinstance(served, Served) and not callable(served):
        served = Served(detector=served, vocabulary=vocabulary)
    search |= isinstance(served, Served) and served.index is not None
    return ServingApp(served, settings or ServingSettings(), base_above, name, search)


def _check_header(data: bytes, max_pixels: int) -> None:
    with opened_image(data, max_pixels):
        pass


def _asset(file: str) -> Route:
    """Return the route of a file of the page; the page itself is at ``/``."""
    content = files("proxydet.serve.assets").joinpath(file).read_bytes()
    kind = file.rpartition(".")[2]

    async def send(_request: Request) -> Response:
        return Response(content, media_type=f"text/{'javascript' if kind == 'js' else kind}")

    return Route("/" if kind == "html" else f"/{file}", send)


async def _on_error(_request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"method {request.method[:20]} is not allowed here"
        found = RequestError("method", message, f"use {allowed}")
    else:
        routes = (route.path for route in request.app.routes)
        shown = ", ".join(path for path in routes if path == "/" or path.startswith("/api/"))
        found = RequestError("not-found", "no such route", f"routes: {shown}")
    return error_response(found, error.headers)
