"""Reading COCO, LVIS and image-label JSON: the three lists of records, without turning a gigabyte into objects.

The file is mapped, not read; the records stay slices of it until each is decoded. A file that is not JSON for the
strict reader only because Python wrote ``NaN`` into it is read by Python's own, slowly.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from proxydet.errors import DataError

_logger = logging.getLogger(__name__)

_SNIPPET = 40
_WHOLE = {
    "id",
    "image_id",
    "category_id",
    "width",
    "height",
    "iscrowd",
    "image_count",
    "instance_count",
}
_LENIENT_START = re.compile(rb"-?(?:NaN|Infinity)|\xef\xbb\xbf|-I")
T = TypeVar("T")
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Pixels = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]


class RunLengths(msgspec.Struct, frozen=True):
    """A mask as run lengths, column by column, starting with background."""

    counts: list[int] | str
    size: tuple[int, int]


class ImageEntry(msgspec.Struct, frozen=True):
    """What is read of an image; other fields are skipped."""

    id: _Id
    width: _Pixels
    height: _Pixels
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[int] = []
    not_exhaustive_category_ids: list[int] = []
    pos_category_ids: list[int] = []


class AnnotationEntry(msgspec.Struct, frozen=True):
    """What is read of an annotation; other fields are skipped."""

    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float] | None = None
    segmentation: list[list[float]] | RunLengths | None = None
    area: float | None = None
    iscrowd: int = 0
    id: _Id | None = None


class CategoryEntry(msgspec.Struct, frozen=True):
    """What is read of a category; other fields are skipped."""

    id: _Id
    name: str
    frequency: str | None = None
    synset: str | None = None
    wnid: str | None = None
    image_count: int | None = None
    instance_count: int | None = None
    synonyms: list[str] = []


class _Document(msgspec.Struct, frozen=True):
    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw] = []


@dataclass(frozen=True, kw_only=True)
class AnnotationDocument:
    """The records of an annotation file, each as its JSON text."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


def read_annotations(path: Path) -> AnnotationDocument:
    """Read an annotation file; it stays mapped as long as one of its records is held.

    Raises:
        DataError: the file is absent, empty, not JSON (with line and column), or has no list of images or categories.
    """
    try:
        with path.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no annotation file {path}",
            hint="check the paths in the data description; they are relative to its folder",
            path=path,
        ) from error
    except (OSError, ValueError) as error:
        # An empty file cannot be mapped, which Python says in its own words.
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror or error
        raise DataError(
            f"cannot read {path}: {reason}",
            hint="check that it is a file that you may read",
            path=path,
        ) from error
    try:
        document = msgspec.json.decode(text, type=_Document)
    except msgspec.ValidationError as error:
        raise _not_annotations(path, str(error)) from error
    except msgspec.DecodeError as error:
        document = _read_leniently(text, path, error)
    except RecursionError as error:
        raise _not_annotations(path, "it is nested too deeply") from error
    return AnnotationDocument(
        images=document.images, annotations=document.annotations, categories=document.categories
    )


def decode_entry(raw: msgspec.Raw, decoder: msgspec.json.Decoder[T], kind: type[T]) -> T:
    """Decode one record, forgiving numbers of the wrong JSON type.

    Args:
        raw: The record's JSON text.
        decoder: The decoder of ``kind``, made once.
        kind: `ImageEntry`, `AnnotationEntry` or `CategoryEntry`.

    Raises:
        msgspec.MsgspecError: a needed field is absent or of a type that means nothing here.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        fields = msgspec.json.decode(raw)
        if not isinstance(fields, dict):
            raise
        return msgspec.convert(_repair(fields), kind)


def _repair(fields: dict[str, Any]) -> dict[str, Any]:
    """Mend what other writers do: booleans and whole floats for integers, null or NaN inside boxes and polygons."""
    repaired = dict(fields)
    for name in _WHOLE & fields.keys():
        value = fields[name]
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            repaired[name] = int(value)
    if not _is_number_list(fields.get("bbox"), 4):
        repaired["bbox"] = None
    polygons = fields.get("segmentation")
    if isinstance(polygons, list):
        # What is no list of numbers becomes an empty polygon, which is counted where polygons are checked.
        repaired["segmentation"] = [p if _is_number_list(p) else [] for p in polygons]
    if not isinstance(fields.get("area"), (int, float)) or isinstance(fields.get("area"), bool):
        repaired["area"] = None
    return repaired


def _is_number_list(value: Any, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
    )


def _read_leniently(text: mmap.mmap, path: Path, error: msgspec.DecodeError) -> _Document:
    match = re.search(r"\(byte (\d+)\)", str(error))
    if match is None:
        raise DataError(
            f"{path} ends in the middle of its JSON, after {len(text)} bytes ({error})",
            hint="it was not copied or written completely: get it again",
            path=path,
        ) from error
    position = int(match.group(1))
    if not _LENIENT_START.match(text, position):
        raise DataError(
            f"{path} is not JSON: {_place(text, position)} ({error})",
            hint="correct it there, or fetch or write the file again",
            path=path,
        ) from error
    _logger.warning("%s holds NaN, Infinity or a byte order mark; reading it slowly", path)
    try:
        loaded = json.loads(text[:])
        # Written again by msgspec, which turns NaN and infinities into null.
        return msgspec.json.decode(msgspec.json.encode(loaded), type=_Document)
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{path} is not JSON: {problem}", hint="fetch or write the file again", path=path
        ) from problem
    except (UnicodeError, OverflowError, RecursionError) as problem:
        raise DataError(
            f"{path} cannot be read: {problem}",
            hint="it must be COCO or LVIS JSON in UTF-8; fetch or write the file again",
            path=path,
        ) from problem
    except msgspec.ValidationError as problem:
        raise _not_annotations(path, str(problem)) from problem


def _place(text: mmap.mmap, position: int) -> str:
    before = text[:position]
    line = before.count(b"\n") + 1
    column = position - (before.rfind(b"\n") + 1) + 1
    snippet = text[max(0, position - _SNIPPET) : position + _SNIPPET].decode("utf-8", "replace")
    return f"line {line}, column {column}, near {snippet!r}"


def _not_annotations(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is not an annotation file: {why}",
        hint="it must be an object with lists 'images', 'annotations' and 'categories' (COCO or LVIS format)",
        path=path,
    )
