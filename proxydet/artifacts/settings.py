"""How transfers behave: patience, parallel connections, speed limit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxydet.artifacts.addresses import check_address
from proxydet.errors import ConfigError, TransferError

_MULTIPLES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


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
    slow_seconds: float = 60.0
    """A connection that stays below ``slow_bytes`` for so many seconds counts as dead."""
    slow_bytes: int = 60_000
    """See ``slow_seconds``."""
    retries: int = 6
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
        for name in ("connections", "jobs", "retries", "slow_bytes", "chunk_bytes", "piece_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        for name in (
            "connect_timeout",
            "read_timeout",
            "slow_seconds",
            "longest_delay",
            "limit_rate",
        ):
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
        ConfigError: It is none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([kMG]?)(?:B|B/s)?", text.strip(), re.ASCII)
    rate = float(match[1]) * _MULTIPLES[match[2]] if match else 0.0
    if rate <= 0:
        raise ConfigError(
            f"{text!r} is not a rate.", hint="Write bytes a second, such as 800k or 20M."
        )
    return rate
