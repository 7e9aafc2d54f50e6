"""One HTTP request for a stretch of a file, checked: what comes back is the stretch asked for, or an error.

The transport is `requests`: proxies, ``REQUESTS_CA_BUNDLE`` and ``~/.netrc`` work as its users know them, and
certificates are always verified.
"""

from __future__ import annotations

import http.cookiejar
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import requests
import urllib3.exceptions

from proxydet._version import __version__
from proxydet.artifacts.addresses import check_address, host_of, shown
from proxydet.artifacts.http_errors import explained, reason
from proxydet.artifacts.patience import Stopped, Transient
from proxydet.artifacts.replies import Reply, check_status
from proxydet.artifacts.settings import TransferSettings
from proxydet.errors import ConfigError, TransferError

COOKIES_VARIABLE = "PROXYDET_COOKIES"
"""Environment variable that names a cookies.txt file (Netscape format) for sources that ask for an account."""

_logger = logging.getLogger(__name__)

_ASKING_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask for."""

    address: str
    """Where."""
    pinned: bool
    """Whether the digest of the whole file is known: plain HTTP is accepted only then."""
    first: int = 0
    """Offset of the first byte wanted."""
    last: int | None = None
    """Offset of the last byte wanted; None for the rest of the file."""
    validator: str | None = None
    """The server's name for the version that earlier bytes came from: another version is sent from its start."""

    @property
    def ranged(self) -> bool:
        """Whether less than the whole file is wanted."""
        return self.first > 0 or self.last is not None

    def headers(self) -> dict[str, str]:
        """Return the request headers."""
        # Bytes are kept as they are stored: compression on the way would change offsets and lengths.
        headers = {"Accept-Encoding": "identity", "Accept": "*/*"}
        if self.ranged:
            headers["Range"] = f"bytes={self.first}-{'' if self.last is None else self.last}"
            if self.validator is not None:
                headers["If-Range"] = self.validator
        return headers


class Client:
    """Makes requests; one for all transfers of a job, as a context manager that closes its connections.

    Args:
        settings: Timeouts.
        stop: When set, reads end with `Stopped` as soon as the next bytes come.

    Raises:
        ConfigError: The cookie file that the environment names cannot be read.
    """

    def __init__(self, settings: TransferSettings, stop: threading.Event | None = None) -> None:
        self.settings = settings
        self.stop = stop or threading.Event()
        self.unreachable: set[str] = set()
        self._cookies = _cookies()
        self._local = threading.local()
        self._sessions: list[requests.Session] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for session in self._sessions:
            session.close()

    def open(self, request: Request) -> OpenReply:
        """Send a request.

        Returns:
            The reply, with its body still to be read; close it (it is a context manager).

        Raises:
            Transient: A failure that may pass.
            TransferError: Any other failure; the message shows no query and no credentials.
        """
        check_address(request.address, pinned=request.pinned)
        session = self._session()
        session.pinned = request.pinned
        where = shown(request.address)
        try:
            response = session.get(
                request.address,
                headers=request.headers(),
                stream=True,
                timeout=(self.settings.connect_timeout, self.settings.read_timeout),
            )
        except requests.RequestException as error:
            raise explained(error, where) from error
        try:
            _logger.debug("%s %s", response.status_code, where)
            reply = check_status(response, where)
        except TransferError:
            response.close()
            raise
        return OpenReply(response, reply, self)

    def announced_size(self, address: str, *, pinned: bool) -> int | None:
        """Ask a server how long a file is, without fetching it; None where it does not say.

        Args:
            address: The address.
            pinned: Whether the digest of the file is known.

        Raises:
            TransferError: The address, or one that it redirects to, is refused.
        """
        check_address(address, pinned=pinned)
        session = self._session()
        session.pinned = pinned
        headers = Request(address=address, pinned=pinned).headers()
        wait = min(self.settings.connect_timeout, _ASKING_SECONDS)
        try:
            with session.head(
                address, headers=headers, timeout=wait, allow_redirects=True
            ) as answer:
                page = answer.headers.get("Content-Type", "").lower().startswith("text/html")
                length = answer.headers.get("Content-Length", "")
                told = (
                    answer.status_code == 200 and not page and length.isascii() and length.isdigit()
                )
                return int(length[:18]) if told else None
        except requests.RequestException as error:
            _logger.debug("%s did not say its size: %s", shown(address), reason(error))
            return None

    def has_credentials(self, address: str) -> bool:
        """Tell whether a cookie or a netrc entry is at hand for the host of an address."""
        host = host_of(address)
        for cookie in self._cookies:
            domain = cookie.domain.lstrip(".").lower()
            if host == domain or host.endswith("." + domain):
                return True
        return requests.utils.get_netrc_auth(address) is not None

    def _session(self) -> _Session:
        session = getattr(self._local, "session", None)
        if session is None:
            session = _Session()
            session.headers["User-Agent"] = f"proxydet/{__version__}"
            session.cookies.update(self._cookies)
            self._local.session = session
            self._sessions.append(session)
        return session


class OpenReply:
    """A reply whose body is being read.

    Attributes:
        reply: Status and headers, checked.
        client: Who asked.
    """

    def __init__(self, response: requests.Response, reply: Reply, client: Client) -> None:
        self.reply = reply
        self._response = response
        self.client = client

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes as soon as some are there; none at the end.

        Raises:
            Transient: The connection broke, went silent, or ended before the announced length.
            Stopped: The stop sign was given.
        """
        if self.client.stop.is_set():
            raise Stopped
        try:
            return self._response.raw.read1(count, decode_content=False) or b""
        except (urllib3.exceptions.HTTPError, OSError) as error:
            where = shown(self.reply.address)
            raise Transient(f"The connection to {where} broke off ({reason(error)}).") from error

    def __enter__(self) -> OpenReply:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._response.close()


class _Session(requests.Session):
    """A session that checks every redirect before it follows it."""

    pinned = False

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return where a reply redirects to, after checking it."""
        target = super().get_redirect_target(resp)
        if target is not None:
            absolute = requests.compat.urljoin(resp.url, target)
            try:
                check_address(absolute, pinned=self.pinned, came_from=resp.url)
            except TransferError:
                resp.close()
                raise
        return target


def _cookies() -> http.cookiejar.CookieJar:
    named = os.environ.get(COOKIES_VARIABLE)
    if not named:
        return http.cookiejar.CookieJar()
    jar = http.cookiejar.MozillaCookieJar(named)
    try:
        jar.load(ignore_discard=True)
    except (OSError, http.cookiejar.LoadError) as error:
        raise ConfigError(
            f"The cookie file that {COOKIES_VARIABLE} names cannot be read.",
            hint="It must be a cookies.txt file in Netscape format, as browser extensions export it.",
            path=Path(named),
        ) from error
    return jar
