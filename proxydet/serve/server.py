"""Runs the application under uvicorn: address, timeouts of slow clients, stopping."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from PIL.Image import DecompressionBombWarning
from uvicorn.protocols.http.h11_impl import H11Protocol

from proxydet.data.images import quiet_worker
from proxydet.errors import ConfigError, JobInterruptedError, RuntimeEnvironmentError

if TYPE_CHECKING:
    from proxydet.serve.app import ServingApp

_LONGEST_HEAD = 64 * 1024
_KEEP_ALIVE_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; nothing is accepted on it yet.

    Args:
        host: Name or address of this machine.
        port: 0 takes any free one.

    Raises:
        ConfigError: There is no such host.
        RuntimeEnvironmentError: The port is in use or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"the host {host!r} cannot be found: {error}", hint="leave --host out for this machine"
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        message = f"cannot listen on {host} port {port}: {error.strerror or error}"
        hint = "give an address of this machine with --host"
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use by another program"
            hint = "give another with --port; --port 0 takes any free one"
        elif error.errno == errno.EACCES:
            message = f"port {port} of {host} may not be used by this user"
            hint = "give a port above 1023 with --port"
        raise RuntimeEnvironmentError(message, hint=hint) from error
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only programs on this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].split("%")[0]).is_loopback


def address_of(listening: socket.socket) -> str:
    """The page's address for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        host = "127.0.0.1" if listening.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(
    app: ServingApp, listening: socket.socket, *, on_started: Callable[[], None] = lambda: None
) -> None:
    """Serve requests until SIGINT or SIGTERM; the request that is being processed then is finished.

    Args:
        app: The application.
        listening: A socket of `bind`.
        on_started: Called when requests are accepted.

    Raises:
        JobInterruptedError: A second SIGINT came: nothing more was waited for.
        Exception: What the application's detector could not be opened for.
    """
    # Images from strangers: damaged EXIF blocks do not touch the pixels, and sizes are checked by the application.
    quiet_worker()
    warnings.simplefilter("ignore", DecompressionBombWarning)
    server = Server(app, on_started)
    server.run(sockets=[listening])
    if server.force_exit:
        raise JobInterruptedError("the server was stopped before it had finished", signal_number=2)
    if app.failure is not None:
        raise app.failure


class Server(uvicorn.Server):
    """Stops the queue when it stops, and ends without raising the signal again: stopping is how a server ends."""

    def __init__(self, app: ServingApp, on_started: Callable[[], None]) -> None:
        settings = app.settings

        class Protocol(TimedProtocol):
            header_seconds = settings.header_seconds

        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(round(settings.stop_seconds), 1),
            h11_max_incomplete_event_size=_LONGEST_HEAD,
        )
        super().__init__(config)
        self._serving_app = app
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept requests."""
        await super().startup(sockets)
        self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Stop where the detector could not be opened, too."""
        return await super().on_tick(counter) or self._serving_app.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, finish what runs."""
        self._serving_app.queue.stop()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Note a signal; a second SIGINT waits for nothing."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = self._serving_app.queue.abandoned = True
        self.should_exit = True


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which the head of a request does not arrive in time."""

    header_seconds: float = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of an unfinished head set the deadline, unless it is set."""
        super().data_received(data)
        if self._in_request():
            self._clear_deadline()
        elif self._deadline is None:
            self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._clear_deadline()
        super().connection_lost(exc)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self._time_out)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _time_out(self) -> None:
        self._deadline = None
        if not self._in_request():
            self.transport.close()
