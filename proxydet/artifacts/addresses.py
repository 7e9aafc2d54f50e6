"""Web addresses: which are accepted, and how they are shown.

Plain HTTP is accepted only where the file's digest is known beforehand, or from this machine itself. The same rule
holds at every redirect. Nothing that may hold a secret (user names, query strings) is ever shown or logged.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from urllib.parse import urlsplit

from proxydet.errors import TransferError

_LONGEST = 4096
_NOT_PLAIN = re.compile(r"[\x00-\x20\x7f]")


def check_address(address: str, *, pinned: bool, came_from: str | None = None) -> None:
    """Accept an address to read from, or say why not.

    Args:
        address: The address.
        pinned: Whether the digest of what it serves is known beforehand.
        came_from: The address that redirected here; None for the first.

    Raises:
        TransferError: It is not a web address, carries credentials, is plain HTTP without need, or is a redirect
            from the outside to this machine.
    """
    where = f"The redirect from {shown(came_from)}" if came_from else "The address"
    if len(address) > _LONGEST or _NOT_PLAIN.search(address):
        raise TransferError(f"{where} is too long or holds blanks or control characters.")
    try:
        parts = urlsplit(address)
        host, has_user, _ = parts.hostname, parts.username is not None, parts.port
    except ValueError as error:
        raise TransferError(f"{where} cannot be read: {error}.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise TransferError(f"{where} ({shown(address)}) is not an https or http address.")
    if has_user:
        raise TransferError(
            f"{where} ({shown(address)}) carries a user name or password.",
            hint="Keep credentials in ~/.netrc or in a cookie file named by PROXYDET_COOKIES.",
        )
    local = _is_this_machine(host)
    if came_from and local and not _is_this_machine(host_of(came_from)):
        raise TransferError(
            f"{where} leads to this machine itself ({shown(address)}); that is refused."
        )
    if parts.scheme == "http" and not pinned and not local:
        raise TransferError(
            f"{where} ({shown(address)}) is not encrypted, and no digest is known to check the file against.",
            hint="Use an https address, or add the file's sha256 to its catalogue entry.",
        )


@functools.lru_cache(maxsize=1000)  # the members of a family come from one host
def _is_this_machine(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        number = ipaddress.ip_address(name)
    except ValueError:
        return False
    return number.is_loopback or number.is_unspecified


def host_of(address: str) -> str:
    """Return the host of an address, in lower case; empty where there is none."""
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:
        return ""


def shown(address: str) -> str:
    """Return an address as messages and logs may show it: without user name, password, query and fragment."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(unreadable address)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
