"""Google Drive's page in place of a file: the question whether to continue without a virus scan, or a refusal."""

from __future__ import annotations

import re
from html.parser import HTMLParser
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
    """Return the address that the page's own button leads to.

    Args:
        page: The page, HTML.
        address: Where it came from.

    Raises:
        TransferError: The page offers no download; see `refusal`.
    """
    reader = _Forms()
    reader.feed(page)
    for action, fields in reader.forms:
        try:
            goal = urljoin(address, action)
        except ValueError:
            continue
        if "confirm" in fields and "id" in fields and is_drive(goal):
            return f"{goal}{'&' if urlsplit(goal).query else '?'}{urlencode(fields)}"
    raise refusal(page)


def refusal(page: str) -> TransferError:
    """Return what a page without a button means: the daily quota is used up, or the file is not public."""
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


class _Forms(HTMLParser):
    """Collects every form of a page: where it leads, and its hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a form or one of its fields."""
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append((given.get("action", ""), {}))
        elif tag == "input" and self.forms and given.get("name"):
            self.forms[-1][1][given["name"]] = given.get("value", "")
