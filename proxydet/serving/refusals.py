"""Why a request is not answered: a status, and what the command line would say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from proxydet.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    ProxydetError,
    VocabularyError,
)

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
