"""Fetching one file: from the first address that serves the right bytes, resuming what is there.

The bytes go to a hidden file beside the final one (`proxydet.artifacts.partfile`). Only when their digest, or where
none is published what they hold, has been checked does that file get its final name.
"""

from __future__ import annotations

import logging

from proxydet.artifacts.attempts import Attempts
from proxydet.artifacts.partfile import PartFile
from proxydet.artifacts.patience import Stopped
from proxydet.artifacts.replies import NotThere
from proxydet.artifacts.stream import Sink
from proxydet.artifacts.wanted import Line, Received, Wanted
from proxydet.errors import ArtifactError, DigestError, TransferError
from proxydet.reporting import Task

_logger = logging.getLogger(__name__)


def fetch_file(wanted: Wanted, line: Line, task: Task, *, take_over: bool) -> Received:
    """Fetch a file, check it and give it its final name.

    Args:
        wanted: The file.
        line: What it shares with other transfers.
        task: Where its bytes are counted.
        take_over: Whether the lock of the target is held, so that leftovers of earlier runs may be used.

    Raises:
        NotThere: No address has the file.
        DigestError: Bytes came, but not the right ones.
        TransferError: No address served it; the message says why for each.
        DiskFullError: There is no room.
    """
    part = PartFile(wanted.target, take_over=take_over)
    try:
        sink = Sink(part, line.rate, task, line.client.stop)
        failures: list[ArtifactError] = []
        for address in wanted.addresses:
            try:
                received = Attempts(wanted, line, sink, address).run()
            except Stopped:
                raise
            except (TransferError, DigestError) as error:
                _logger.info("%s: %s", wanted.name, error.message)
                failures.append(error)
            else:
                part.move_to_target()
                return received
        raise _summary(wanted, failures)
    finally:
        part.close()


def _summary(wanted: Wanted, failures: list[ArtifactError]) -> ArtifactError:
    """Build the error that says why no address served the file."""
    reasons = " ".join(error.message for error in failures)
    hint = next((error.hint for error in failures if error.hint), None) or _next_step(
        wanted, failures
    )
    if wanted.page is not None:
        hint = f"Open {wanted.page} in a browser and save the file as {wanted.target}."
    if all(isinstance(error, NotThere) for error in failures):
        return NotThere(reasons, hint=hint)
    if any(isinstance(error, DigestError) for error in failures):
        return DigestError(reasons, hint=hint, path=wanted.target)
    return TransferError(reasons, hint=hint, path=wanted.target)


def _next_step(wanted: Wanted, failures: list[ArtifactError]) -> str:
    if all(isinstance(error, NotThere) for error in failures):
        return f"Its source moved it. Name another with --mirror, or put the file there yourself: {wanted.target}"
    return (
        "Check the network (HTTPS_PROXY behind a proxy) or wait, then run the same command again: what was fetched "
        "is kept. --mirror names another source."
    )
