"""The application: a few fixed routes around a detector."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from proxydet.detector import Detector
from proxydet.errors import ProxydetError
from proxydet.serving.answer import Answerer
from proxydet.serving.gate import Gate
from proxydet.serving.pictures import check_header
from proxydet.serving.question import read_question
from proxydet.serving.refusals import Refusal, error_response
from proxydet.serving.settings import ServingSettings
from proxydet.serving.turns import WorkQueue
from proxydet.serving.upload import UploadBudget, read_upload
from proxydet.vocabulary.vocabulary import Vocabulary

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
