"""The application: a few fixed routes around a detector."""

from __future__ import annotations

import asyncio
import difflib
import io
import ipaddress
import logging
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.datastructures import FormData, Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxydet._version import __version__
from proxydet.data.images import read_image
from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    ProxydetError,
    VocabularyError,
)
from proxydet.inference.predict_files import ImageResult
from proxydet.modeling.config import InferenceConfig
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.names import split_names
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import json_text


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Limits of a server. All are above 0."""

    max_upload_bytes: int = 20 * 1024 * 1024
    """Largest picture file, in bytes."""
    max_pixels: int = 50_000_000
    """Largest picture, in pixels (width x height), told from its header before anything is decoded."""
    max_words: int = 300
    """Most class names in one request."""
    max_word_length: int = 200
    """Longest class name, in characters."""
    max_detections: int = 1000
    """Most detections that a request may ask for."""
    queue_places: int = 32
    """Requests that may wait behind the one that is being looked at; more are refused."""
    wait_seconds: float = 60.0
    """Longest time from a complete upload to its answer, in seconds."""
    upload_seconds: float = 30.0
    """Longest time for an upload to arrive, and for a part of an answer to be taken, in seconds."""
    header_seconds: float = 10.0
    """Longest time for the head of a request to arrive, in seconds."""
    stop_seconds: float = 30.0
    """Longest time that open requests are given when the server is stopped, in seconds."""
    held_bytes: int = 512 * 1024 * 1024
    """Most bytes of uploads held in memory at once, over all requests."""
    connections: int = 256
    """Most connections open at once."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, besides localhost, under which the server may be addressed."""
    loopback_only: bool = True
    """The server listens on a loopback address: requests addressed to other addresses are refused."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{field.name} is {value}; it must be above 0")


_KINDS: tuple[tuple[type[ProxydetError], int, str], ...] = (
    (VocabularyError, 400, "words"),
    (DataError, 400, "picture"),
    (ConfigError, 400, "parameter"),
    (EnvironmentProblem, 500, "environment"),
    (ProxydetError, 500, "model"),
)


class Refusal(ProxydetError):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        kind: One word for programs, see ``docs/reference/server.md``.
        message: What happened and why.
        hint: What the client can do next.
        retry_after: Seconds after which it is worth to ask again; None where that would not help.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        hint: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.kind = kind
        self.retry_after = retry_after


def as_refusal(error: ProxydetError) -> Refusal:
    """Give an error of the core its status and kind."""
    if isinstance(error, Refusal):
        return error
    status, kind = next(
        (status, kind) for family, status, kind in _KINDS if isinstance(error, family)
    )
    return Refusal(status, kind, error.message, hint=error.hint)


def error_response(error: ProxydetError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Render an error as ``{"error": {"kind", "message", "hint"}}``."""
    refusal = as_refusal(error)
    content: dict[str, Any] = {
        "error": {"kind": refusal.kind, "message": refusal.message, "hint": refusal.hint}
    }
    extra = dict(headers or {})
    if refusal.retry_after is not None:
        extra["Retry-After"] = str(refusal.retry_after)
    return JSONResponse(content, refusal.status, extra)


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to look for, and what to keep; the defaults are those of ``proxydet predict``."""

    words: tuple[str, ...] | None = None
    """Class names; None: the server's default words."""
    score_threshold: float = 0.3
    """Only what scores above this, 0 to 1."""
    top: int = 300
    """At most this many detections, the best."""
    masks: bool | None = None
    """Masks too, or boxes only; None: masks where the detector has a mask head."""
    one_label: bool = False
    """Only the best class of each box."""


def read_question(pairs: Iterable[tuple[str, str]], settings: ServingSettings) -> Question:
    """Read the parameters of a request.

    Args:
        pairs: Names and values, of the address and of the form; ``words`` may be there several times.
        settings: Limits.

    Raises:
        Refusal: 400, a parameter is unknown, there twice, or has a value that it cannot have.
        VocabularyError: The words cannot be split.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    for key, value in pairs:
        if key == "words":
            words += split_names(value) if value.strip() else []
        elif key in given:
            raise _wrong(f"the parameter {key!r} is there twice", "give it once")
        elif key in _READERS:
            given[key] = value
        else:
            known = ("words", *_READERS)
            near = difflib.get_close_matches(key[:80], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise _wrong(f"there is no parameter {key[:80]!r}", hint)
    question = Question(
        words=tuple(_checked(words, settings)) if words else None,
        **{key: _READERS[key](key, value) for key, value in given.items()},  # type: ignore[arg-type]
    )
    if question.top > settings.max_detections:
        raise _wrong(
            f"top is {question.top}; at most {settings.max_detections} are given", "ask for fewer"
        )
    return question


def _checked(words: list[str], settings: ServingSettings) -> list[str]:
    if len(words) > settings.max_words:
        raise Refusal(
            400,
            "words",
            f"there are {len(words)} words; at most {settings.max_words} are accepted",
            hint="ask for fewer at a time, or use proxydet predict --vocabulary",
        )
    for word in words:
        if len(word) > settings.max_word_length:
            raise Refusal(
                400,
                "words",
                f"the word {word[:40] + '...'!r} has {len(word)} characters; at most "
                f"{settings.max_word_length} are accepted",
                hint="separate words by commas",
            )
    return words


def _share(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise _wrong(f"{key} is {text[:40]!r}; it must be a number from 0 to 1", "such as 0.3")
    return value


def _count(key: str, text: str) -> int:
    # At most nine digits: longer ones are refused here and not by Python's own limit.
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise _wrong(f"{key} is {text[:40]!r}; it must be a whole number from 1", "such as 100")
    return value


def _truth(key: str, text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise _wrong(
            f"{key} is {text[:40]!r}; it must be true or false", "leave it out for the default"
        )
    return text.lower() in _TRUE


_READERS = {"score_threshold": _share, "top": _count, "masks": _truth, "one_label": _truth}


def _wrong(message: str, hint: str) -> Refusal:
    return Refusal(400, "parameter", message, hint=hint)


Pixels = npt.NDArray[np.uint8]

_WANTED = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow raises for a header that is damaged, as `proxydet.data.images` catches it too.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@cache
def accepted_formats() -> tuple[str, ...]:
    """The kinds of pictures that are accepted, by Pillow's names, as far as this Pillow has them.

    Its other readers are kept away from what strangers send: that of PostScript starts another program.
    """
    Image.init()
    return tuple(kind for kind in _WANTED if kind in Image.OPEN)


def check_header(data: bytes, max_pixels: int) -> None:
    """Refuse what is no picture, or too large a one, without decoding it.

    Args:
        data: The file.
        max_pixels: Most pixels.

    Raises:
        Refusal: 415 for no picture, 413 for too many pixels.
    """
    with _opened(data, max_pixels):
        pass


def decode(data: bytes, name: str, max_pixels: int) -> Pixels:
    """Decode a picture as `proxydet.data.images.read_image` does.

    Args:
        data: The file.
        name: What to call it in errors.
        max_pixels: Most pixels.

    Returns:
        uint8 (H, W, 3), RGB, turned as its EXIF orientation says.

    Raises:
        Refusal: As for `check_header`.
        DataError: The picture is cut short or damaged.
    """
    with _opened(data, max_pixels) as image:
        return read_image(image, name=name)


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    try:
        image = Image.open(io.BytesIO(data), formats=accepted_formats())
    except _TOO_LARGE as error:
        raise _too_many_pixels(max_pixels) from error
    except _DAMAGE as error:
        raise Refusal(
            415,
            "picture-type",
            "the upload is no picture of a known kind",
            hint=f"send one of {', '.join(accepted_formats())}",
        ) from error
    with image:
        if image.width * image.height > max_pixels:
            raise _too_many_pixels(max_pixels, image.size)
        yield image


def _too_many_pixels(max_pixels: int, size: tuple[int, int] | None = None) -> Refusal:
    what = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return Refusal(
        413,
        "picture-size",
        f"the picture has {what}, more than the {max_pixels / 1e6:g} million that are accepted",
        hint="send a smaller copy: the detector scales pictures down anyway",
    )


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


T = TypeVar("T")

logger = logging.getLogger(__name__)

_LONGEST_RETRY = 60
# How fast the remembered time of a job follows the last ones.
_FOLLOW = 0.2


class _Job(Generic[T]):
    """A piece of work, and who waits for it."""

    def __init__(self, work: Callable[[], T], answer: asyncio.Future[T]) -> None:
        self.work = work
        self.answer = answer


class WorkQueue:
    """Runs jobs in the order in which they come. Used from one event loop.

    A job that nobody waits for any more (timeout, client gone) leaves the queue with all that it holds; one that is
    already running is finished and its result dropped.

    Args:
        places: Jobs that may wait, besides the one that runs.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: deque[_Job[object]] = deque()
        self._busy = False
        self._stopped = False
        self._seconds = 1.0
        self._thread = ThreadPoolExecutor(1, "look")

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._busy

    @property
    def stopped(self) -> bool:
        """Whether nothing more is accepted."""
        return self._stopped

    async def run(self, work: Callable[[], T], *, patience: float) -> T:
        """Run a job when its turn comes.

        Args:
            work: Called in the thread.
            patience: Longest time until the result, in seconds.

        Raises:
            Refusal: 503 where all places are taken, the turn did not come in time or the server stops; 504 where the
                job itself took too long.
        """
        self.admit()
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if not self._busy:
            self._start_next()
        try:
            return await asyncio.wait_for(job.answer, patience)
        except asyncio.TimeoutError:
            raise self._too_late(patience, started=job not in self._waiting) from None
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    def admit(self) -> None:
        """Refuse at once what could not wait.

        Raises:
            Refusal: 503.
        """
        if self._stopped:
            raise _stopping()
        if len(self._waiting) >= self._places:
            raise Refusal(
                503,
                "busy",
                f"{self._places} requests are waiting already",
                hint="ask again later",
                retry_after=self._retry_after(),
            )

    def stop(self) -> None:
        """Accept nothing more and refuse what waits; what runs goes on."""
        self._stopped = True
        for job in self._waiting:
            if not job.answer.done():
                job.answer.set_exception(_stopping())
        self._waiting.clear()

    async def close(self) -> None:
        """Stop, and wait for the job that runs."""
        self.stop()
        await asyncio.to_thread(self._thread.shutdown)

    def _start_next(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            if job.answer.done():
                continue
            self._busy = True
            running = asyncio.get_running_loop().run_in_executor(self._thread, job.work)
            running.add_done_callback(partial(self._finish, job, time.perf_counter()))
            return
        self._busy = False

    def _finish(self, job: _Job[object], began: float, done: asyncio.Future[object]) -> None:
        self._seconds += _FOLLOW * (time.perf_counter() - began - self._seconds)
        error = done.exception()
        if job.answer.done():
            if error is not None:
                logger.warning("a request that was given up failed: %s", error)
        elif error is not None:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(done.result())
        self._start_next()

    def _retry_after(self) -> int:
        return min(max(round(self._seconds * (len(self._waiting) + 1)), 1), _LONGEST_RETRY)

    def _too_late(self, patience: float, *, started: bool) -> Refusal:
        if started:
            return Refusal(
                504,
                "timeout",
                f"the answer took longer than {patience:g} seconds",
                hint="send a smaller picture or fewer words, or start the server with a longer --timeout",
            )
        return Refusal(
            503,
            "busy",
            f"the request waited longer than {patience:g} seconds for its turn",
            hint="ask again later",
            retry_after=self._retry_after(),
        )


def _stopping() -> Refusal:
    return Refusal(503, "stopping", "the server is being stopped", hint="start it again")


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A detector, and the words that it looks for when a request names none."""

    detector: Detector
    vocabulary: Vocabulary
    name: str
    """What the model is called on the page."""
    base_above: float = 0.9
    """Words of a request count as base above this cosine with a base class of the training."""

    def look(self, upload: Upload, question: Question, max_pixels: int) -> bytes:
        """Look at a picture; called in the one thread that computes.

        Pictures are looked at one by one: several at once are padded to one size, and would differ in the last bits
        from what `Detector.predict` finds.

        Returns:
            JSON: ``file``, ``width``, ``height`` and ``detections``, as ``proxydet predict --json`` gives them.

        Raises:
            ProxydetError: The picture or the words cannot be used, or there is not enough memory.
        """
        vocabulary = self._vocabulary_of(question)
        settings = self.settings_of(question)
        try:
            pixels_HW3 = decode(upload.data, upload.name, max_pixels)
            (prediction,) = self.detector.predict_images([pixels_HW3], vocabulary, settings)
            found = Detections(prediction, vocabulary.names)
            result = ImageResult(file=Path(upload.name), found=found).to_dict()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise EnvironmentProblem(
                "There is not enough memory for this picture and these words.",
                hint="send a smaller picture or fewer words",
            ) from error
        return json_text(result, allow_nan=False).encode()

    def settings_of(self, question: Question) -> InferenceConfig:
        """Return the settings that a request asks for.

        Raises:
            ConfigError: It asks for masks, and the detector has no mask head.
        """
        return self.detector.settings(
            score_threshold=question.score_threshold,
            max_detections=question.top,
            masks=question.masks,
            one_class_per_proposal=question.one_label,
        )

    def _vocabulary_of(self, question: Question) -> Vocabulary:
        if question.words is None:
            return self.vocabulary
        return self.detector.with_base(self.detector.resolve(question.words), self.base_above)

    def describe(self, settings: ServingSettings) -> dict[str, Any]:
        """What ``GET /api/info`` tells: model, words and limits."""
        free, why_not, known = self._free_words()
        limits = ("max_upload_bytes", "max_pixels", "max_words", "max_word_length")
        waiting = ("max_detections", "queue_places", "wait_seconds", "upload_seconds")
        return {
            "version": __version__,
            "model": {
                "name": self.name,
                "device": str(self.detector.network.device),
                "training_classes": len(self.detector.vocabulary),
                "masks": self.detector.inference.masks,
            },
            "words": {
                "default": list(self.vocabulary.names),
                "free": free,
                "why_not": why_not,
                "known": known,
            },
            "limits": {name: getattr(settings, name) for name in (*limits, *waiting)},
            "formats": list(accepted_formats()),
        }

    def _free_words(self) -> tuple[bool, str | None, list[str] | None]:
        """Whether own words can be asked for, why not, and the encoder's words where those are few."""
        try:
            encoder = self.detector.encoder
        except VocabularyError as error:
            return False, f"{error.message}; {error.hint}" if error.hint else error.message, None
        known = list(encoder.words) if isinstance(encoder, CompositionalEncoder) else None
        return True, None, known


access = logging.getLogger("proxydet.serving.access")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_NO_ANSWER = 499


class Gate:
    """Checks the host and the origin of requests, adds headers to answers, logs both.

    A page from elsewhere that is open in the same browser can send requests to this machine: under a name that it made
    point here (DNS rebinding), or straight across. The first is seen by ``Host``, the second by ``Origin``.

    Args:
        app: What is behind the gate.
        settings: Allowed hosts, and the time for a client to take an answer.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), _NO_ANSWER

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await asyncio.wait_for(send(message), self._settings.upload_seconds)

        try:
            refusal = self._refusal(Headers(scope=scope))
            app = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, answer)
        finally:
            client = (scope.get("client") or ("-",))[0]
            # The path is a client's text, quoted so that it stays on its line; the words asked for are left out.
            shown = f"{scope['method']} {quote(scope['path'])[:80]}"
            seconds = time.perf_counter() - began
            access.info("%s %s %s %.3f s", client, shown, status, seconds)

    def _refusal(self, headers: Headers) -> Refusal | None:
        host = headers.get("host", "")
        if not is_own_host(
            host, self._settings.allowed_hosts, loopback=self._settings.loopback_only
        ):
            return Refusal(
                403,
                "host",
                f"this server is not addressed as {host[:80]!r}",
                hint="start it with --allow-host NAME to be reached under another name",
            )
        origin = headers.get("origin")
        if origin is not None and _authority(origin) != host.lower():
            return Refusal(
                403,
                "origin",
                f"requests of pages from {origin[:80]!r} are not answered",
                hint="only the server's own page may ask from within a browser",
            )
        return None


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


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


logger = logging.getLogger(__name__)

_ASSETS = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
    "/colours.js": ("colours.js", "text/javascript"),
}
_CLIENT_GONE = 499


class ServingApp:
    """An ASGI application; `build_app` makes it.

    Attributes:
        queue: The requests that wait.
        budget: The bytes that they hold.
    """

    def __init__(self, answerer: Answerer, settings: ServingSettings) -> None:
        self.settings = settings
        self.queue = WorkQueue(settings.queue_places)
        self.budget = UploadBudget(settings.held_bytes)
        self._answerer = answerer
        self._info = answerer.describe(settings)
        routes = [
            Route("/api/health", self._health),
            Route("/api/info", self._tell),
            Route("/api/predict", self._predict, methods=["POST"]),
            *(Route(path, _asset(*entry)) for path, entry in _ASSETS.items()),
        ]
        handlers: dict[Any, Any] = {
            ProxydetError: _on_error,
            HTTPException: _on_http,
            ClientDisconnect: _on_gone,
            Exception: _on_bug,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)
        inner.router.redirect_slashes = False
        self._gate = Gate(inner, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await self._gate(scope, receive, send)

    @asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await self.queue.close()

    async def _health(self, _request: Request) -> Response:
        return JSONResponse(
            {"status": "ok", "waiting": self.queue.waiting, "busy": self.queue.busy}
        )

    async def _tell(self, _request: Request) -> Response:
        return JSONResponse(self._info)

    async def _predict(self, request: Request) -> Response:
        self.queue.admit()
        # Mistakes in the address are told before the picture is sent.
        asked = request.query_params.multi_items()
        self._answerer.settings_of(read_question(asked, self.settings))
        with self.budget.share() as share:
            upload = await read_upload(request, self.settings, share)
            question = read_question([*asked, *upload.fields], self.settings)
            await asyncio.to_thread(check_header, upload.data, self.settings.max_pixels)
            look = partial(self._answerer.look, upload, question, self.settings.max_pixels)
            waiting = asyncio.ensure_future(
                self.queue.run(look, patience=self.settings.wait_seconds)
            )
            content = await _unless_gone(waiting, request)
        return Response(content, media_type="application/json")


def build_app(
    detector: Detector,
    settings: ServingSettings | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    base_above: float = 0.9,
    name: str = "detector",
) -> ServingApp:
    """Put a detector behind HTTP.

    Args:
        detector: The detector.
        settings: Limits; the default ones where None.
        vocabulary: What is looked for when a request names no words; None: the classes of the training.
        base_above: Words of requests count as base above this cosine with a base class of the training.
        name: What the model is called on the page.

    Returns:
        An ASGI application, for `proxydet.serving.server.serve` or any ASGI server (one process of it).
    """
    answerer = Answerer(
        detector=detector,
        vocabulary=vocabulary or detector.vocabulary,
        base_above=base_above,
        name=name,
    )
    return ServingApp(answerer, settings or ServingSettings())


async def _unless_gone(waiting: asyncio.Future[bytes], request: Request) -> bytes:
    """Wait for the answer, or give it up when the client goes away."""
    gone = asyncio.ensure_future(request.receive())
    both: list[asyncio.Future[Any]] = [waiting, gone]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        gone.cancel()
        waiting.cancel()


def _asset(file: str, kind: str) -> Any:
    content = files("proxydet.serving.assets").joinpath(file).read_bytes()

    async def send(_request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ProxydetError)
    return error_response(error)


async def _on_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        told = Refusal(
            405, "method", f"{request.method[:20]} cannot be used here", hint=f"use {allowed}"
        )
        return error_response(told, error.headers)
    told = Refusal(
        error.status_code,
        "not-found" if error.status_code == 404 else "malformed",
        "there is no such page" if error.status_code == 404 else error.detail,
        hint="there are /, /api/health, /api/info and /api/predict",
    )
    return error_response(told, error.headers)


async def _on_bug(_request: Request, error: Exception) -> Response:
    return error_response(
        Refusal(
            500,
            "bug",
            f"this is a bug in proxydet: {type(error).__name__}: {error}",
            hint="report it with what the server wrote",
        )
    )
