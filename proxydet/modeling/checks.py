"""Checks that the configurations share. Nothing here imports torch."""

from __future__ import annotations

from proxydet.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(where: str, **values: float) -> None:
    """Raise a `ConfigError` unless all values are above 0; ``where`` is the section that they are in."""
    for name, value in values.items():
        require(value > 0, f"{where}.{name} must be above 0, not {value}")


def require_share(where: str, **values: float) -> None:
    """Raise a `ConfigError` unless all values are in [0, 1]; ``where`` is the section that they are in."""
    for name, value in values.items():
        require(0.0 <= value <= 1.0, f"{where}.{name} must be in [0, 1], not {value}")
