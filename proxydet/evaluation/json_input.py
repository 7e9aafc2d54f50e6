"""Reading of JSON files that others made: gzipped or plain, with errors that say where they are damaged."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from proxydet.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_Item = TypeVar("_Item")


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked when the file is gzipped (told by its content, not by its name).

    Raises:
        DataError: The file is absent, unreadable, empty, or a damaged gzip file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path} is a damaged gzip file: {error}.",
                hint="copy or download the file again",
                path=path,
            ) from error
    if not data.strip():
        raise empty(path)
    return data


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that cannot be opened or read."""
    return DataError(
        f"Cannot read {path}: {error.strerror or error}.",
        hint="check the path, and that you may read the file",
        path=path,
    )


def empty(path: Path) -> DataError:
    """Return the error for a file without content."""
    return DataError(f"{path} is empty.", hint="write or copy the file again", path=path)


def damaged_json(
    path: Path | None,
    error: msgspec.MsgspecError,
    *,
    what: str,
    hint: str | None = None,
    length: int | None = None,
) -> DataError:
    """Return the error for JSON that cannot be decoded: cut short, malformed, or of another layout.

    Args:
        path: The file; None for values.
        error: What the decoder said.
        what: What it should be.
        hint: What to do where it is something else.
        length: Of the text, in bytes: a number or word that is cut short is malformed at its very end.
    """
    where = str(path) if path is not None else "The value given"
    detail = str(error)
    if "truncated" in detail or f"(byte {length})" in detail:
        return DataError(
            f"{where} ends in the middle of its JSON: it is cut short.",
            hint="the program that wrote it was stopped or the copy is incomplete: write or copy it again",
            path=path,
        )
    if isinstance(error, msgspec.ValidationError):
        return DataError(f"{where} is not {what}: {detail}.", hint=hint, path=path)
    return DataError(f"{where} is not valid JSON: {detail}.", hint=hint, path=path)


def first_offenders(items: Sequence[_Item], *, most: int = 5) -> str:
    """Return the first few of ``items`` as text for an error message, with dots where there are more."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, ..."
