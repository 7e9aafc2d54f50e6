"""HTTP requests for files and byte ranges of them, each checked and bounded in time: the bytes asked for, or an error.

The transport is `requests`: proxies, ``REQUESTS_CA_BUNDLE`` and ``~/.netrc`` work as its users know them, and
certificates are always verified. What it lacks is added here. A watching thread cuts the connections of a request that
takes too long, whatever it is stuck in (a connection, a head that drips, a body without end), and all of them at once
when the job is stopped; and the body of a redirect is never read.
"""

from __future__ import annotations

import contextlib
import http.client
import http.cookiejar
import logging
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter

from proxydet._version import __version__
from proxydet.artifacts.addresses import check_address, host_of, shown
from proxydet.errors import ConfigError, TransferError

COOKIES_VARIABLE = "PROXYDET_COOKIES"
"""Environment variable that names a cookies.txt file (Netscape format) for sources that ask for an account."""

_logger = logging.getLogger(__name__)

_HEAD_SECONDS_FOR_SIZE = 5.0
_LARGEST_FILE = 1 << 50
_MOST_REDIRECTS = 20
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Settings of downloads; the defaults suit object stores and home connections alike."""

    connections: int = 4
    """Connections for one large file, where its server serves ranges."""
    jobs: int = 2
    """Files fetched at the same time."""
    limit_rate: float | None = None
    """Bytes a second over all files together; None for no limit."""
    mirror: str | None = None
    """Base address tried before all others; it holds files under the layout of the data root."""
    connect_timeout: float = 10.0
    """Seconds to wait for a connection."""
    read_timeout: float = 30.0
    """Seconds without a single byte after which a connection counts as dead."""
    head_seconds: float = 60.0
    """Seconds within which the head of a response must be complete, redirects included."""
    slow_seconds: float = 60.0
    """A connection that stays below ``slow_bytes`` for so many seconds counts as dead."""
    slow_bytes: int = 60_000
    """See ``slow_seconds``."""
    least_speed: float = 10_000.0
    """Bytes a second that a file must come at on average from an address, or else that address is given up."""
    grace_seconds: float = 600.0
    """Seconds that a file may take beyond its bytes at ``least_speed``."""
    largest_unannounced: int = 16 << 30
    """Bytes after which a file is given up whose size neither the catalogue nor its server says."""
    attempts: int = 6
    """Attempts in a row without any progress before an address is given up."""
    first_delay: float = 0.5
    """Seconds before the first repetition; doubled each time, with up to half of it drawn at random."""
    longest_delay: float = 30.0
    """Longest pause in seconds that doubling leads to."""
    longest_retry_after: float = 600.0
    """Longest pause in seconds that a server may ask for (Retry-After); beyond it the address is given up."""
    chunk_bytes: int = 1 << 18
    """Bytes read from a connection at once."""
    piece_bytes: int = 16 << 20
    """Bytes asked for at once on each of several connections."""
    parallel_from: int = 64 << 20
    """Size in bytes from which a file is fetched over several connections."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("connections", "jobs", "attempts", "slow_bytes", "chunk_bytes", "piece_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        for name in ("connect_timeout", "read_timeout", "head_seconds", "slow_seconds", "least_speed",
                     "longest_delay", "limit_rate"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0; it is {value}.")
        if self.connections > 64 or self.jobs > 64:
            raise ConfigError("connections and jobs may be at most 64.")
        if self.mirror is not None:
            try:
                check_address(self.mirror, pinned=True)
            except TransferError as error:
                raise ConfigError(
                    f"mirror: {error.message}",
                    hint=error.hint or "Write it as https://mirror.example.org/proxydet",
                ) from error


def bytes_per_second(text: str) -> float:
    """Read a rate as people write it: ``800k``, ``20M``, ``1.5G``, or bytes.

    Raises:
        ConfigError: It is not a rate.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([kMG]?)(?:B|B/s)?", text.strip(), re.ASCII)
    rate = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0.0
    if rate <= 0:
        raise ConfigError(
            f"{text!r} is not a rate.", hint="Write bytes a second, such as 800k or 20M."
        )
    return rate


class StoppedError(TransferError):
    """The download was asked to stop; what it fetched is kept."""

    def __init__(self) -> None:
        super().__init__("The download was stopped; what it fetched is kept and is used next time.")


class NotFoundError(TransferError):
    """The server says that there is no such file."""


class RangeError(TransferError):
    """The server does not serve the byte range asked for: it says so (416), or its response contradicts itself."""

    total: int | None = None
    """Size of its file, where it says so."""


class RetryableError(TransferError):
    """A failure that may pass: the same address is worth another attempt."""

    retry_after: float | None = None
    """Seconds that the server asked to wait, if it did."""
    slow = False
    """Whether it was too slow, so that what it brought is not progress."""


class Pace:
    """The time that a file may take from one address: a grace, and its bytes at the least speed, or at a limit of our own.

    The connections that bring one file share it: it may be used from several threads.
    """

    def __init__(self, settings: TransferSettings) -> None:
        limit = float("inf") if settings.limit_rate is None else settings.limit_rate
        self._speed = min(settings.least_speed, limit / settings.jobs / 4)
        self._started = time.monotonic()
        self._grace = settings.grace_seconds
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Account for bytes that came."""
        with self._lock:
            self._bytes += count

    def pause(self, seconds: float) -> None:
        """Account for a pause that is not the server's fault, or that it asked for."""
        with self._lock:
            self._grace += seconds

    @property
    def end(self) -> float:
        """When the time is over, as `time.monotonic` counts, if nothing more comes."""
        return self._started + self._grace + self._bytes / self._speed

    def check(self, where: str) -> None:
        """Raise `TransferError` if the time is over."""
        if (now := time.monotonic()) > self.end:
            raise TransferError(
                f"{where} is too slow: {self._bytes} bytes came in {now - self._started:.0f} seconds, but a file must "
                f"come at {self._speed:.0f} bytes a second, apart from {self._grace:.0f} seconds of grace."
            )


class Client:
    """Makes requests; one for all transfers of a job, as a context manager that closes its connections.

    Raises:
        ConfigError: The cookie file that the environment names cannot be read.
        StoppedError: By each method, once `stop` is set.
    """

    def __init__(self, settings: TransferSettings) -> None:
        self.settings = settings
        self.stop = threading.Event()
        """When set, all connections are cut, and whatever uses them ends with `StoppedError`."""
        self.unreachable: set[str] = set()
        """Hosts that did not answer: their other addresses are tried once."""
        self._cookies = http.cookiejar.MozillaCookieJar()
        if named := os.environ.get(COOKIES_VARIABLE):
            try:
                self._cookies.load(named, ignore_discard=True)
            except (OSError, ValueError, http.cookiejar.LoadError) as error:
                raise ConfigError(
                    f"The cookie file that {COOKIES_VARIABLE} names cannot be read.",
                    hint="It must be a cookies.txt file in Netscape format, as browser extensions export it.",
                    path=Path(named),
                ) from error
        self._local = threading.local()
        self._sessions: list[_Session] = []
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the speed limit lets the next bytes be read

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for session in self._sessions.copy():
            session.close()

    def open(
        self, address: str, *, pinned: bool, pace: Pace, first: int = 0, last: int | None = None,
        validator: str | None = None,
    ) -> Response:  # fmt: skip
        """Ask for a file or a byte range of it; the body of the response is still to be read, and to be closed.

        Args:
            address: Where.
            pinned: Whether the digest of the whole file is known: plain HTTP is accepted only then.
            pace: The time that the file may take.
            first: Offset of the first byte wanted.
            last: Offset of the last byte wanted; None for the rest of the file.
            validator: The server's name for the version that earlier bytes came from: another version is sent whole.

        Raises:
            RetryableError: A failure that may pass.
            RangeError: The file has no such bytes.
            NotFoundError: The server has no such file.
            TransferError: Any other failure; the message shows no query and no credentials.
        """
        pace.check(shown(address))
        headers = {}
        if first > 0 or last is not None:
            headers["Range"] = f"bytes={first}-{'' if last is None else last}"
            if validator is not None:
                headers["If-Range"] = validator
        end = min(time.monotonic() + self.settings.head_seconds, pace.end)
        session = self._session()
        response = self._send(session, "GET", address, headers, pinned=pinned, end=end)
        try:
            return Response(response, session, self, pace)
        except TransferError:
            response.close()
            session.cut()
            raise

    def announced_size(self, address: str, *, pinned: bool) -> int | None:
        """Ask a server how long a file is, without fetching it; None where it does not say."""
        session, end = self._session(), time.monotonic() + _HEAD_SECONDS_FOR_SIZE
        try:
            with self._send(session, "HEAD", address, {}, pinned=pinned, end=end) as response:
                usable = response.status_code == 200 and not _is_page(response.headers)
                return _length(response.headers) if usable else None
        except StoppedError:
            raise
        except TransferError as error:
            _logger.debug("%s did not say its size: %s", shown(address), error.message)
            return None

    def took(self, count: int) -> None:
        """Account for bytes that were just read; under a speed limit, wait until the next may be read."""
        if self.settings.limit_rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.settings.limit_rate
            wait = self._free_at - now
        if self.stop.wait(wait):
            raise StoppedError

    def has_credentials(self, address: str) -> bool:
        """Return whether a cookie or a netrc entry is at hand for the host of an address."""
        host = host_of(address)
        domains = {cookie.domain.lstrip(".").lower() for cookie in self._cookies}
        known = any(host == domain or host.endswith(f".{domain}") for domain in domains)
        return known or requests.utils.get_netrc_auth(address) is not None

    def _send(
        self, session: _Session, method: str, address: str, headers: dict[str, str], *, pinned: bool, end: float
    ) -> requests.Response:  # fmt: skip
        """Send a request and follow redirects, each checked, until ``end``; their bodies are not read."""
        where, came_from = shown(address), None
        # Bytes are kept as they are stored: compression on the way would change offsets and lengths.
        headers = {**headers, "Accept-Encoding": "identity", "Accept": "*/*"}
        timeout = (self.settings.connect_timeout, self.settings.read_timeout)
        slow = f"{where} is too slow: the head of its response did not come in time."
        session.end = end
        for _ in range(_MOST_REDIRECTS):
            check_address(address, pinned=pinned, came_from=came_from)
            try:
                response = session.request(
                    method, address, headers=headers, stream=True, timeout=timeout, allow_redirects=False
                )  # fmt: skip
            except _BROKEN as error:
                self.check(end, slow)
                raise _explained(error, where) from error
            try:
                self.check(end, slow)  # what was cut looks like a head without more lines
            except TransferError:
                response.close()
                raise
            _logger.debug("%s %s", response.status_code, shown(address))
            location = response.headers.get("Location")
            if location is None or response.status_code not in (301, 302, 303, 307, 308):
                return response
            response.close()
            session.cut()
            came_from = address
            with contextlib.suppress(UnicodeError):
                location = location.encode("latin-1").decode("utf-8")
            try:
                address = requests.utils.requote_uri(urljoin(address, location))
            except ValueError as error:
                raise TransferError(f"{where} redirects to an invalid URL.") from error
        raise TransferError(f"{where}: too many redirects.")

    def check(self, end: float, message: str) -> None:
        """Raise `StoppedError` where the job was stopped, and `RetryableError` after ``end``."""
        if self.stop.is_set() or self._closed.is_set():
            raise StoppedError
        if time.monotonic() > end:
            late = RetryableError(message)
            late.slow = True
            raise late

    def run_in_threads(self, jobs: Sequence[Callable[[], object]], at_once: int) -> None:
        """Run jobs in threads, each of which closes its connections at its end, and wait for all.

        When the wait is interrupted (Ctrl-C), `stop` is set, the threads get a moment to notice, and the interruption is
        passed on. A thread that is stuck in name resolution by then is left behind: it only ever writes to a hidden file.
        (The threads of concurrent.futures would keep the interpreter from ending.) The first exception of a job is raised
        after all threads have ended.
        """
        waiting = iter(jobs)
        ended = queue.SimpleQueue[BaseException | None]()

        def work() -> None:
            raised: BaseException | None = None
            try:
                try:
                    while not self.stop.is_set() and (job := next(waiting, None)) is not None:
                        job()
                finally:
                    session: _Session | None = self._local.__dict__.pop("session", None)
                    if session is not None:
                        with self._lock:
                            self._sessions.remove(session)
                        session.close()
            except BaseException as error:  # noqa: BLE001 - handed to the caller below
                raised = error
            ended.put(raised)

        threads = min(at_once, len(jobs))
        for _ in range(threads):
            threading.Thread(target=work, daemon=True).start()
        results: list[BaseException | None] = []
        try:
            while len(results) < threads:
                results.append(ended.get())
        except BaseException:
            self.stop.set()
            end = time.monotonic() + 2.0
            with contextlib.suppress(queue.Empty):
                for _ in range(threads - len(results)):
                    ended.get(timeout=max(end - time.monotonic(), 0.0))
            raise
        for raised in filter(None, results):
            raise raised

    def _session(self) -> _Session:
        session: _Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = _Session()
            session.cookies.update(self._cookies)
            with self._lock:
                self._sessions.append(session)
                if self._watcher is None:
                    self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
                    self._watcher.start()
        return session

    def _watch(self) -> None:
        """Cut the connections of every session whose time is over."""
        while not self._closed.wait(0.1):
            now = time.monotonic()
            for session in self._sessions.copy():
                if self.stop.is_set() or now > session.end:
                    session.cut()


class Response:
    """A response that brings bytes of a file; its head has been checked.

    Attributes:
        address: Where it came from in the end, after redirects.
        partial: Whether it brings a byte range (206) and not the whole file (200).
        first: Offset of its first byte.
        length: Bytes that follow; None where the server does not say.
        total: Size of the whole file; None where the server does not say.
        chunked: Whether an end before the end of the file can be recognised without a length.
        validator: The server's name for this version, usable with If-Range: a strong ETag, or else Last-Modified.
        etag: The ETag as sent.
        web_page: Whether the body is said to be HTML.
        encoded: Whether the body was compressed on the way although that was not asked for.
    """

    def __init__(self, response: requests.Response, session: _Session, client: Client, pace: Pace) -> None:  # fmt: skip
        self._response, self._session, self._client, self._pace = response, session, client, pace
        self.address, headers, status = response.url, response.headers, response.status_code
        self._where = where = shown(self.address)
        range_text = headers.get("Content-Range", "").strip()
        if status == 416:
            refusal = RangeError(f"{where} does not have the requested bytes.")
            match = re.fullmatch(r"bytes \*/(\d{1,18})", range_text)
            refusal.total = int(match[1]) if match else None
            raise refusal
        if status in _PASSING:
            passing = RetryableError(f"{where} returned status {status}.")
            passing.retry_after = _retry_after(headers)
            raise passing
        if status in (404, 410):
            raise NotFoundError(f"{where} does not exist (status {status}).")
        if status in (401, 403, 407):
            raise TransferError(
                f"{where}: access denied (status {status}).",
                hint="The source may want an account: name a cookies.txt file in PROXYDET_COOKIES, or add the host to ~/.netrc.",
            )
        if status not in (200, 206):
            raise TransferError(f"{where} returned status {status} instead of the file.")
        self.partial = status == 206
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self.first, self.length = 0, None if self.chunked else _length(headers)
        self.total = self.length
        if self.partial:
            match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", range_text)
            if match is None:
                raise RangeError(f"{where} sends a partial response without Content-Range.")
            self.first, last = int(match[1]), int(match[2])
            self.total = None if match[3] == "*" else int(match[3])
            announced, self.length = self.length, last - self.first + 1
            beyond = self.total is not None and last >= self.total
            if self.length < 1 or announced not in (None, self.length) or beyond:
                raise RangeError(f"{where} sends a partial response of contradicting lengths.")
        if (self.total or 0) > _LARGEST_FILE:
            raise TransferError(f"{where} announces an invalid size: {self.total} bytes.")
        etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        self.etag = etag if re.fullmatch(r'(W/)?"[\x21\x23-\x7e\x80-\xff]{0,500}"', etag) else None
        dated = modified if re.fullmatch(r"[\x20-\x7e]{1,100}", modified) else None
        self.validator = dated if self.etag is None or self.etag.startswith("W/") else self.etag
        self.web_page = _is_page(headers)
        encoding = headers.get("Content-Encoding", "").strip().lower()
        self.encoded = encoding not in ("", "identity")
        # Under a limit of our own, slowness is not a sign of a dead connection.
        limited = client.settings.limit_rate is not None
        self._enough = 1 if limited else client.settings.slow_bytes
        self._begin_window()

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes as soon as some are there; none at the end.

        Raises:
            RetryableError: The connection broke, went silent, was too slow, or ended before the announced length.
            TransferError: The file takes more time than it may.
            StoppedError: The job was stopped.
        """
        try:
            data = self._response.raw.read1(count, decode_content=False) or b""
        except _BROKEN as error:
            self._check_time()
            message = f"The connection to {self._where} broke off ({_reason(error)})."
            raise RetryableError(message) from error
        self._check_time()  # what was cut looks like an end
        self._pace.add(len(data))
        self._came += len(data)
        if self._came >= self._enough:
            self._begin_window()
        self._session.end = min(self._end, self._pace.end)
        return data

    def _begin_window(self) -> None:
        self._came = 0
        self._end = time.monotonic() + self._client.settings.slow_seconds
        self._session.end = min(self._end, self._pace.end)

    def _check_time(self) -> None:
        self._pace.check(self._where)
        seconds = self._client.settings.slow_seconds
        what = f"only {self._came} bytes came in {seconds:.0f} seconds"
        self._client.check(self._end, f"{self._where} is too slow: {what}.")

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *error: object) -> None:
        clean = self._response.raw.closed or self._response.raw.length_remaining == 0
        self._session.end = float("inf")
        self._response.close()
        if not clean:
            self._session.cut()


class _Session(requests.Session):
    """The connections of one thread; another thread can cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.end = float("inf")
        """When the request that is under way has taken too long, as `time.monotonic` counts."""
        self._sockets: list[socket.socket] = []  # second handles on those of the library
        self._closed = False
        self._lock = threading.Lock()
        self.headers["User-Agent"] = f"proxydet/{__version__}"
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._opened))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Follow no redirect: the library would read its whole body first, however long."""

    def cut(self) -> None:
        """End all connections, also in the middle of a read by another thread."""
        with self._lock:
            for twin in self._sockets:
                with contextlib.suppress(OSError):
                    twin.shutdown(socket.SHUT_RDWR)
                twin.close()
            self._sockets.clear()

    def close(self) -> None:
        """End all connections, those that are still opened by a thread that was left behind too."""
        self._closed = True
        self.cut()
        super().close()

    def _opened(self, connection: socket.socket) -> None:
        """Take note of a connection before anything goes over it; forget those that their servers closed."""
        with self._lock:
            for twin in self._sockets.copy():
                if urllib3.util.wait_for_read(twin, timeout=0):
                    twin.close()
                    self._sockets.remove(twin)
            if self._closed:
                connection.close()  # whatever is sent over it fails
            else:
                self._sockets.append(connection.dup())


class _Adapter(HTTPAdapter):
    """Reports the socket of each connection that it opens, over a proxy or not, before anything goes over it."""

    def __init__(self, opened: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self._opened = opened

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return the pool of connections for a request."""
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if "ConnectionCls" not in vars(pool):  # new
            opened = self._opened

            class Connection(pool.ConnectionCls):  # type: ignore[misc]
                def _new_conn(self) -> socket.socket:
                    made: socket.socket = super()._new_conn()
                    opened(made)
                    return made

                def getresponse(self) -> Any:
                    """Close a response whose head urllib3 refuses: it would keep the socket open."""
                    made: list[http.client.HTTPResponse] = []

                    def make(*args: Any, **options: Any) -> http.client.HTTPResponse:
                        made.append(http.client.HTTPResponse(*args, **options))
                        return made[-1]

                    self.response_class = make
                    try:
                        return super().getresponse()
                    except BaseException:
                        for response in made:
                            response.close()
                        raise

            pool.ConnectionCls = Connection
        return pool


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,40}", text) else None


def _is_page(headers: Mapping[str, str]) -> bool:
    kind = headers.get("Content-Type", "").strip().lower()
    return kind.startswith(("text/html", "application/xhtml"))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait: in seconds or as a date; None if it does not."""
    try:
        seconds = urllib3.Retry().parse_retry_after(headers.get("Retry-After", ""))
    except (urllib3.exceptions.HTTPError, ValueError, TypeError, OverflowError):
        return None
    return min(seconds, 1e9)


def _explained(error: BaseException, where: str) -> TransferError:
    """Say what a failed request means, without the address's query that the library's message would show."""
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
        return TransferError(
            f"The certificate of {where} cannot be verified.",
            hint="Behind a proxy that re-signs traffic, name its certificate file in REQUESTS_CA_BUNDLE.",
        )
    if isinstance(error, ValueError):  # of requests: an address or a header that cannot be used
        return TransferError(f"{where} leads to an address that cannot be used.")
    if isinstance(error, requests.exceptions.ProxyError):
        return RetryableError(f"The proxy did not connect to {where}.")
    return RetryableError(f"{where} could not be reached ({_reason(error)}).")


def _reason(error: BaseException) -> str:
    """Name the innermost cause of a failure in a few words that hold no address."""
    causes = _causes(error)
    if any(isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)) for cause in causes):
        return "no response in time"
    texts = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    return texts[-1] if texts else type(causes[-1]).__name__


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it came from: some libraries chain errors, some hold them as values."""
    found = [error]
    for current in found:
        inner = (current.__cause__, current.__context__, getattr(current, "reason", None))
        for cause in (*inner, *current.args):
            if isinstance(cause, BaseException) and cause not in found and len(found) < 20:
                found.append(cause)
    return found
