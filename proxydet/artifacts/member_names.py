"""Which names inside an archive are accepted: plain relative ones below what the archive is to provide."""

from __future__ import annotations

import re
from collections.abc import Collection

from proxydet.errors import ArchiveError

_LONGEST_PART = 240
_DEEPEST = 32


def checked_name(name: str, tops: Collection[str], archive: str) -> str:
    """Return the path of a member relative to the folder unpacked into, or refuse it.

    Args:
        name: The name as the archive gives it; a leading ``./`` and a trailing ``/`` mean nothing.
        tops: First path parts below which members may lie.
        archive: What messages call the archive.

    Returns:
        The path with forward slashes; empty for the folder itself.

    Raises:
        ArchiveError: The name is absolute, leads upwards, or is not plain; or it lies elsewhere than it should.
    """
    plain = name
    while plain.startswith("./"):
        plain = plain[2:]
    plain = plain[:-1] if plain.endswith("/") else plain
    if plain in ("", "."):
        return ""
    parts = plain.split("/")
    if (
        len(parts) > _DEEPEST
        or re.match(r"[A-Za-z]:", plain)
        or not all(_plain(part) for part in parts)
    ):
        raise ArchiveError(
            f"{archive} holds a file called {name[:200]!r}, which could be written outside its folder.",
            hint="The archive is damaged or hostile: do not use it.",
        )
    if parts[0] not in tops:
        raise ArchiveError(
            f"{archive} holds {name[:200]!r}, but only {', '.join(sorted(tops))} may come from it.",
            hint="It is not the archive that the catalogue describes.",
        )
    return plain


def _plain(part: str) -> bool:
    if part in ("", ".", "..") or not part.isprintable() or "\\" in part:
        return False
    return len(part.encode("utf-8", errors="replace")) <= _LONGEST_PART
