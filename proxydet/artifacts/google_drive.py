"""Google Drive's page in place of a file: the form that asks to continue without a virus scan, or an error."""

from __future__ import annotations

import re
from urllib.parse import urlencode, urljoin, urlsplit

from proxydet.artifacts.addresses import host_of
from proxydet.errors import TransferError

_HOSTS = frozenset({"drive.google.com", "drive.usercontent.google.com", "docs.google.com"})
_QUOTA = re.compile(r"quota exceeded|too many users|download quota", re.IGNORECASE)
_SIGN_IN = re.compile(r"sign in|you need access|request access", re.IGNORECASE)


def is_drive(address: str) -> bool:
    """Return whether an address belongs to Google Drive."""
    return host_of(address) in _HOSTS


def address_behind_page(page: str, address: str) -> str:
    """Return the address that the form on a confirmation page leads to.

    Args:
        page: The page, HTML.
        address: Where it came from.

    Raises:
        TransferError: The page offers no download; see `page_error`.
    """
    from html.parser import HTMLParser  # few downloads need it

    forms: list[tuple[str, dict[str, str]]] = []

    class Forms(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = {name: value or "" for name, value in attrs}
            if tag == "form":
                forms.append((given.get("action", ""), {}))
            elif tag == "input" and forms and given.get("name"):
                forms[-1][1][given["name"]] = given.get("value", "")

    Forms().feed(page)
    for action, fields in forms:
        try:
            target = urljoin(address, action)
        except ValueError:
            continue
        if "confirm" in fields and "id" in fields and is_drive(target):
            return f"{target}{'&' if urlsplit(target).query else '?'}{urlencode(fields)}"
    raise page_error(page)


def page_error(page: str) -> TransferError:
    """Return the error that a page without such a form means: the daily quota is used up, or the file is not public."""
    if _QUOTA.search(page):
        return TransferError(
            "Google Drive does not serve this file right now: its daily quota is used up.",
            hint="Try again in a day, or fetch it in a browser while signed in to a Google account.",
        )
    if _SIGN_IN.search(page):
        return TransferError(
            "Google Drive asks to sign in for this file.",
            hint="Fetch it in a browser, or name a cookies.txt file of your browser in PROXYDET_COOKIES.",
        )
    return TransferError(
        "Google Drive sent a page in place of the file.",
        hint="Fetch the file in a browser and put it in its place by hand.",
    )
