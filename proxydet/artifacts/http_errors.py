"""What a failed request means, in words that show no query and no credentials."""

from __future__ import annotations

import ssl

import requests
import urllib3.exceptions

from proxydet.artifacts.patience import Transient
from proxydet.errors import TransferError


def explained(error: requests.RequestException, where: str) -> TransferError:
    """Say what a failed request means, without the address's query that the library's message would show."""
    if isinstance(error, requests.exceptions.SSLError) and _caused_by(
        error, ssl.SSLCertVerificationError
    ):
        return TransferError(
            f"The certificate of {where} cannot be verified.",
            hint="Behind a proxy that re-signs traffic, name its certificate file in REQUESTS_CA_BUNDLE.",
        )
    if isinstance(error, requests.TooManyRedirects):
        return TransferError(f"{where} redirects without end.")
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return TransferError(f"{where} leads to an address that cannot be used.")
    if isinstance(error, requests.exceptions.ProxyError):
        return Transient(f"The proxy did not connect to {where}.")
    return Transient(f"{where} could not be reached ({reason(error)}).")


def reason(error: BaseException) -> str:
    """Name the innermost cause of a failure in a few words that hold no address."""
    inner: BaseException = error
    seen = 0
    while seen < 20:
        following = inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)
        if not isinstance(following, BaseException):
            break
        inner, seen = following, seen + 1
    if isinstance(inner, (TimeoutError, urllib3.exceptions.TimeoutError)):
        return "no answer in time"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return type(inner).__name__


def _caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    pending: list[object] = [error]
    for _ in range(20):
        if not pending:
            return False
        current = pending.pop()
        if isinstance(current, kind):
            return True
        if isinstance(current, BaseException):
            pending += [
                current.__cause__,
                current.__context__,
                getattr(current, "reason", None),
                *current.args,
            ]
    return False
