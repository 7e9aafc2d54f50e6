"""Text that people read: text from outside made harmless, numbers with their nouns, sizes."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""C0 and C1 controls (ESC begins a terminal's commands), line separators, marks that reverse the direction of writing,
lone surrogates (of file names that are not UTF-8)."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text that comes from outside as it may be shown: control characters are escaped (``\x1b``).

    A terminal would obey them, and a line break would forge a second line.

    Args:
        text: A class name, a file name, any text of a file that somebody else made.
        keep: Control characters that stay, such as the line breaks of text of several lines.
    """
    return _CONTROL.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def json_text(value: Any, **options: Any) -> str:
    """Return a value as JSON, not confined to ASCII, but with characters escaped that `printable` escapes.

    Args:
        value: What `json.dumps` takes.
        options: Of `json.dumps`: ``indent``, ``sort_keys``.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    # The only C0 controls outside of strings are the ends of lines.
    return _CONTROL.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)


def table_cell(value: object) -> object:
    """Return a value as it may stand in a CSV file: a spreadsheet runs text that begins as a formula does.

    Args:
        value: Text gets a ``'`` in front where it begins with ``= + - @``, and no control characters; all else is
            returned as it is.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 tar``, ``3 tars``.

    Args:
        number: How many.
        singular: The noun for one.
        plural: The noun for any other number; None adds an ``s``.
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def first_of(items: Sequence[object], most: int = 5) -> str:
    """Return the first few of ``items`` as text for a message, with dots where there are more."""
    shown = ", ".join(str(item)[:200] for item in items[:most])
    return shown if len(items) <= most else f"{shown}, ..."


def near_misses(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Return the known names that are nearly ``name``, the nearest first; of a long name the beginning counts."""
    return difflib.get_close_matches(name[:100], list(known), n=most)


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `` Did you mean 'x'?`` for the known names nearest to ``name``, or nothing."""
    close = near_misses(name, known, most)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def size_scale(size: float) -> tuple[float, str]:
    """Return the unit in which a number of bytes is said, as its bytes and its name: ``(1e6, "MB")``."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= divisor:
            return divisor, unit
    return 1.0, "B"


def size_text(size: int | None) -> str:
    """Say a size in bytes: ``1.2 GB``; ``?`` where it is not known."""
    if size is None:
        return "?"
    divisor, unit = size_scale(size)
    return f"{size} B" if unit == "B" else f"{size / divisor:.1f} {unit}"
