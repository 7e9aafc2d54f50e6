"""Small words of messages that depend on a number."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 tar``, ``3 tars``.

    Args:
        number: How many.
        singular: The noun for one.
        plural: The noun for any other number; None adds an ``s``.
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
