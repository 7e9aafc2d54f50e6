"""Numbers in messages: nouns that follow them, and sizes in units that fit."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 tar``, ``3 tars``.

    Args:
        number: How many.
        singular: The noun for one.
        plural: The noun for any other number; None adds an ``s``.
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def size_text(size: int | None) -> str:
    """Say a size in bytes: ``1.2 GB``; ``?`` where it is not known."""
    if size is None:
        return "?"
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} B"
