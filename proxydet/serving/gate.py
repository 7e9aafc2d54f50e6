"""What stands in front of every route: who may ask, what every answer carries, the access log."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Collection
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxydet.serving.refusals import Refusal, error_response
from proxydet.serving.settings import ServingSettings

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
