"""Reading of results that were made elsewhere: LVIS's and COCO's results JSON, plain or gzipped.

The format is one list of ``{"image_id", "category_id", "score", "bbox": [x, y, width, height], "segmentation": RLE}``.
Such a file holds some gigabytes for LVIS's validation set, so it is read in blocks, each decoded and turned into
columns before the next is read; of the masks only those are kept that can be scored.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import numpy as np

from proxydet.errors import DataError
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.json_input import damaged_json, empty, unreadable
from proxydet.evaluation.result_rows import DetectionRow, add_rows
from proxydet.evaluation.results import Results, ResultsBuilder
from proxydet.evaluation.validation import Problems, check_duplicates

_BLOCK_BYTES = 8 * 2**20
_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{)")
_BOUNDARY_REACHES = (2**13, 2**20)
_BOUNDARIES_TRIED = 8
_NOT_FINITE = re.compile(rb"-?\b(?:NaN|Infinity)\b")
_FIRST_KEY = b'"image_id"'
_SHOWN = 5
_HINT = (
    "results are a JSON list of objects with image_id, category_id, score, and bbox or segmentation"
)
_FORMAT = "a list of detections in COCO's or LVIS's results format"


_ROWS = msgspec.json.Decoder(list[DetectionRow])


def read_results(
    source: Path | str | list[dict[str, Any]],
    truth: GroundTruth,
    *,
    keep_every_mask: bool = False,
    allow_outside: bool = False,
) -> Results:
    """Read detections and check them against the data set that they claim to be of.

    Args:
        source: A results file, plain or gzipped JSON, or the same as Python values.
        truth: The data set.
        keep_every_mask: Keep masks that the protocol does not look at too; the official evaluator wants them.
        allow_outside: Accept boxes that reach out of their image by more than a pixel.

    Raises:
        DataError: The file is damaged, or its detections cannot be of this data set; the message has the first
            offenders and their count.
    """
    path = None if isinstance(source, list) else Path(source)
    problems = Problems(truth=truth, path=path, allow_outside=allow_outside)
    builder = ResultsBuilder(path=path)
    parts = _rows_of_list(source) if isinstance(source, list) else _rows_of_file(Path(source))
    with _without_garbage_collector():
        for rows in parts:
            add_rows(builder, rows, problems, keep_every_mask=keep_every_mask)
    problems.raise_if_any(builder.seen)
    results = builder.build()
    check_duplicates(results, truth)
    return results


@contextlib.contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Keep the collector from walking over a million new objects, none of which is in a cycle, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rows_of_list(source: list[dict[str, Any]]) -> Iterator[list[DetectionRow]]:
    try:
        yield _ROWS.decode(json.dumps(source, default=_plain))
    except msgspec.ValidationError as error:
        raise damaged_json(None, error, what=_FORMAT, hint=_HINT) from error
    except msgspec.DecodeError as error:
        raise _damage(None, json.dumps(source, default=_plain).encode(), 0, error) from error


def _plain(value: Any) -> Any:
    """Return what JSON has for numpy's numbers and arrays, and for the bytes of a mask."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise DataError(
        f"Detections cannot hold a value of type {type(value).__name__}.",
        hint="give numbers, texts, lists and dictionaries",
    )


def _rows_of_file(path: Path) -> Iterator[list[DetectionRow]]:
    """Decode a JSON list piece by piece: each piece ends where one element ends and the next begins."""
    pending = b""
    done = 0
    with _open(path) as stream:
        while block := _read(stream, path):
            pending += block
            for end, start in _boundaries(pending) if len(block) == _BLOCK_BYTES else ():
                rows = _try_decode(pending[:end] + b"]", path, done)
                if rows is not None:
                    yield rows
                    done += len(rows)
                    pending = b"[" + pending[start:]
                    break
    if not pending.strip():
        raise empty(path)
    try:
        yield _ROWS.decode(pending)
    except msgspec.ValidationError as error:
        raise damaged_json(path, _renumbered(error, done), what=_FORMAT, hint=_HINT) from error
    except msgspec.DecodeError as error:
        raise _damage(path, pending, done, error) from error


def _boundaries(text: bytes) -> list[tuple[int, int]]:
    """Return the last places where one object ends and the next begins, the last first."""
    found: list[tuple[int, int]] = []
    for reach in _BOUNDARY_REACHES:
        start = max(0, len(text) - reach)
        found = [(match.start() + 1, match.end()) for match in _BOUNDARY.finditer(text, start)]
        if len(found) >= _BOUNDARIES_TRIED:
            break
    return found[: -_BOUNDARIES_TRIED - 1 : -1]


def _try_decode(text: bytes, path: Path, done: int) -> list[DetectionRow] | None:
    """Decode a piece; None where it was cut inside a nested list, or is damaged: then more is read, and told at the end."""
    try:
        return _ROWS.decode(text)
    except msgspec.ValidationError as error:
        raise damaged_json(path, _renumbered(error, done), what=_FORMAT, hint=_HINT) from error
    except msgspec.DecodeError:
        return None


def _damage(path: Path | None, text: bytes, done: int, error: msgspec.DecodeError) -> DataError:
    """Return the error for text that is not JSON; the usual cause is NaN, which Python writes and JSON does not have."""
    places = list(_NOT_FINITE.finditer(text))
    if not places:
        return damaged_json(path, error, what=_FORMAT, hint=_HINT, length=len(text))
    shown = []
    for match in places[:_SHOWN]:
        number = done + text.count(_FIRST_KEY, 0, match.start()) - 1
        shown.append(f"{match[0].decode()} in detection {number}")
    where = str(path) if path is not None else "The detections given"
    return DataError(
        f"{where}: {len(places)} numbers are not finite ({', '.join(shown)}).",
        hint="the detector that made them diverged, or divided by zero: look at these images' outputs",
        path=path,
    )


def _renumbered(error: msgspec.ValidationError, done: int) -> msgspec.ValidationError:
    """Return the error with the detection's number counted from the start of the file."""
    text = re.sub(r"\$\[(\d+)\]", lambda found: f"$[{int(found[1]) + done}]", str(error), count=1)
    return msgspec.ValidationError(text)


def _open(path: Path) -> IO[bytes]:
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _read(stream: IO[bytes], path: Path) -> bytes:
    try:
        return stream.read(_BLOCK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is a damaged or incomplete gzip file: {error}.",
            hint="copy or download the file again",
            path=path,
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
