"""What a server accepts, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from proxydet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Limits of a server. All are above 0."""

    max_upload_bytes: int = 20 * 1024 * 1024
    """Largest picture file, in bytes."""
    max_pixels: int = 50_000_000
    """Largest picture, in pixels (width x height), told from its header before anything is decoded."""
    max_words: int = 300
    """Most class names in one request."""
    max_word_length: int = 200
    """Longest class name, in characters."""
    max_detections: int = 1000
    """Most detections that a request may ask for."""
    queue_places: int = 32
    """Requests that may wait behind the one that is being looked at; more are refused."""
    wait_seconds: float = 60.0
    """Longest time from a complete upload to its answer, in seconds."""
    upload_seconds: float = 30.0
    """Longest time for an upload to arrive, and for a part of an answer to be taken, in seconds."""
    header_seconds: float = 10.0
    """Longest time for the head of a request to arrive, in seconds."""
    stop_seconds: float = 30.0
    """Longest time that open requests are given when the server is stopped, in seconds."""
    held_bytes: int = 512 * 1024 * 1024
    """Most bytes of uploads held in memory at once, over all requests."""
    connections: int = 256
    """Most connections open at once."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, besides localhost, under which the server may be addressed."""
    loopback_only: bool = True
    """The server listens on a loopback address: requests addressed to other addresses are refused."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{field.name} is {value}; it must be above 0")
