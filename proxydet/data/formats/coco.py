"""Reading COCO, LVIS and OpenImages JSON: three lists of records, without turning a gigabyte into objects.

The file is mapped, not read; records stay slices of it until each is decoded. A record that strict decoding refuses is
read once more, field by field: see `_loose_annotation`.
"""

from __future__ import annotations

import itertools
import json
import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.deviations import refused
from proxydet.data.formats.records import (
    LABEL_LISTS,
    AnnotationEntry,
    CategoryEntry,
    Document,
    Flaw,
    Identifier,
    ImageEntry,
    Loose,
    RunLengths,
)
from proxydet.data.masks import are_numbers
from proxydet.errors import DataError

_BLOCK_BYTES = 4 << 20
_SHORTEST_RECORD = 16
"""Bytes: no image or annotation is shorter; a list of records that are is refused."""
_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{)")
_SNIPPET = 40
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_UNPACKED_FREELY = 1 << 28
_MOST_RATIO = 200
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)|-?I|I")
_NOT_FINITE_OR_STRING = re.compile(rb'"|-?\b(?:NaN|Infinity)\b')
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_HINT = (
    "it must be an object with lists 'images', 'annotations' and 'categories' (COCO or LVIS format)"
)
_OTHER_FORMATS = (
    (b'"_via_img_metadata"', "a project of VGG VIA: export it as COCO"),
    (b'"_via_', "a project of VGG VIA: export it as COCO"),
    (b'"shapes"', "a file of labelme: convert it to COCO or Pascal VOC"),
    (b'"completed_by"', "an export of Label Studio: export it as COCO"),
    (b'"annotations"', "not in COCO's layout"),
)


@dataclass(frozen=True)
class Outline:
    """The three lists of an annotation file, each record as its JSON text."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


class _Lists(msgspec.Struct, frozen=True):
    images: msgspec.Raw
    categories: msgspec.Raw
    annotations: msgspec.Raw = msgspec.Raw(b"[]")


def read(source: Path | bytes, name: str) -> Document:
    """Open an annotation file; it stays mapped as long as one of its records is held.

    Args:
        source: A file, plain or gzipped, or its bytes.
        name: What to call it in messages.

    Raises:
        DataError: the file is absent, empty, not JSON (with line and column), not in COCO's layout, or its categories
            cannot be used.
    """
    path = source if isinstance(source, Path) else None
    text = _open(source) if isinstance(source, Path) else source
    lists, mended = _lists(text, path, name)
    blocks = _blocks(lists.annotations, "annotations", path, name)
    first = next(blocks, [])
    if first and b'"segments_info"' in bytes(first[0]):
        raise DataError(
            f"{name} holds panoptic annotations (segments_info), not objects",
            hint="convert it to COCO's object format (panopticapi has a converter), or name the instances file",
            path=path,
        )
    categories = itertools.chain.from_iterable(_blocks(lists.categories, "categories", path, name))
    images: list[ImageEntry | Loose | Flaw] = []
    for block in _blocks(lists.images, "images", path, name):
        images += _decoded(block, len(images), ImageEntry, _loose_image, "image.record")
    return Document(
        format="COCO JSON",
        categories=[_category(raw, at, mended, path, name) for at, raw in enumerate(categories)],
        images=images,
        annotations=_chunks(itertools.chain([first], blocks)),
        mended=mended,
    )


def read_outline(path: Path) -> Outline:
    """Read an annotation file and leave its records as they are, for writing a file of some of them; errors as of `read`."""
    name = str(path)
    lists, _ = _lists(_open(path), path, name)
    parts = {
        field: list(
            itertools.chain.from_iterable(_blocks(getattr(lists, field), field, path, name))
        )
        for field in ("images", "categories", "annotations")
    }
    return Outline(**parts)


def _blocks(
    text: msgspec.Raw, field: str, path: Path | None, name: str
) -> Iterator[list[msgspec.Raw]]:
    """Yield the records of a list, some megabytes at a time, so that no list of tiny records fills the memory."""
    view, start = memoryview(text), 1
    if bytes(view[:1]) != b"[":
        raise _not_records(field, "it is not a list", path, name)
    while start:
        boundary = _BOUNDARY.search(view, start + _BLOCK_BYTES)
        while True:
            end = len(view) - 1 if boundary is None else boundary.start() + 1
            whole = end - start <= 2 * _BLOCK_BYTES or boundary is not None
            piece = b"".join((b"[", view[start:end], b"]"))
            try:
                # What has no boundary for megabytes is one large record, or no list of records.
                records = msgspec.json.decode(
                    piece, type=list[msgspec.Raw] if whole else tuple[msgspec.Raw]
                )
                break
            except (msgspec.DecodeError, RecursionError) as error:
                if boundary is None:
                    raise _not_records(field, str(error), path, name) from error
                boundary = _BOUNDARY.search(view, boundary.end())  # it was inside of a record
        if len(records) > 1000 and len(piece) < _SHORTEST_RECORD * len(records):
            raise _not_records(
                field, f"records of {len(piece) / len(records):.0f} bytes", path, name
            )
        yield list(records)
        start = 0 if boundary is None else boundary.end()


def _not_records(field: str, why: str, path: Path | None, name: str) -> DataError:
    return DataError(
        f"{name} is not an annotation file: {field!r} is not a list of objects ({why})",
        hint=_HINT,
        path=path,
    )


def _chunks(
    blocks: Iterable[list[msgspec.Raw]],
) -> Iterator[list[AnnotationEntry | Loose | Flaw]]:
    start = 0
    for block in blocks:
        yield list(_decoded(block, start, AnnotationEntry, _loose_annotation, "annotation.record"))
        start += len(block)


def _decoded(
    raws: list[msgspec.Raw],
    start: int,
    kind: type[Any],
    loosely: Callable[[dict[str, Any], str], Loose | Flaw],
    unusable: str,
) -> Iterator[Any]:
    decode = msgspec.json.Decoder(kind).decode
    for position, raw in enumerate(raws, start):
        try:
            yield decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            which = f"position {position}"
            try:
                fields = json.loads(bytes(raw))
            except (ValueError, RecursionError):
                fields = None
            yield loosely(fields, which) if isinstance(fields, dict) else Flaw(unusable, which)


def identifier(value: object) -> Identifier | None:
    """Return an id: a whole number of 64 bits, however it is spelt, or a text; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return value if isinstance(value, str) and value else None


def _loose_annotation(fields: dict[str, Any], which: str) -> Loose | Flaw:
    """Read an annotation field by field: what is wrong costs its field where the object can still be used."""
    own_id = identifier(fields.get("id"))
    which = which if own_id is None else str(own_id)
    owners: dict[str, Any] = {}
    for name in ("image_id", "category_id"):
        owner = identifier(fields.get(name))
        if owner is None:
            return Flaw(f"annotation.{name}", which)
        owners[name] = owner
    mended: list[str] = []
    flags: dict[str, Any] = {}
    for name in ("iscrowd", "ignore"):
        value = fields.get(name, 0)
        if isinstance(value, (bool, int, float)):
            flags[name] = int(bool(value))
        else:
            flags[name] = int(
                isinstance(value, str) and value.strip().lower() in ("1", "true", "yes")
            )
            if name == "iscrowd":
                mended.append("annotation.iscrowd")
    box, area = fields.get("bbox"), fields.get("area")
    return Loose(
        AnnotationEntry(
            **owners,
            **flags,
            bbox=(box[0], box[1], box[2], box[3]) if are_numbers(box, 4) else None,
            segmentation=_loose_mask(fields.get("segmentation"), mended),
            area=area if area is not None and are_numbers([area]) else None,
            id=own_id,
        ),
        mended,
    )


def _loose_mask(value: Any, mended: list[str]) -> list[list[float]] | RunLengths | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if value in (None, "", [], {}):
        return None
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if not are_numbers(size, 2) or any(side != int(side) for side in size):
            mended.append("annotation.rle.size")
            return None
        runs: list[int] | str | None = counts if isinstance(counts, str) else None
        if are_numbers(counts) and all(run == int(run) for run in counts):
            runs = [int(run) for run in counts]
        if runs is None:
            mended.append("annotation.rle.counts")
            return None
        return RunLengths(counts=runs, size=(int(size[0]), int(size[1])))
    if not isinstance(value, list):
        mended.append("annotation.segmentation")
        return None
    if all(not isinstance(item, list) for item in value):
        value = [value]
        mended.append("annotation.segmentation.flat")
    kept = [polygon for polygon in value if are_numbers(polygon)]
    mended.extend(["polygon.numbers"] * (len(value) - len(kept)))
    if not kept:
        mended.append("annotation.segmentation")
    return kept or None


def _loose_image(fields: dict[str, Any], which: str) -> Loose | Flaw:
    own_id = identifier(fields.get("id"))
    if own_id is None:
        return Flaw("image.id", which)
    sides = [fields.get("width"), fields.get("height")]
    if not are_numbers(sides) or any(side != int(side) for side in sides):
        return Flaw("image.size", str(own_id))
    width, height = (int(side) for side in sides)
    mended: list[str] = []
    lists: dict[str, Any] = {}
    for name in LABEL_LISTS:
        value = fields.get(name)
        ids = [identifier(item) for item in value] if isinstance(value, list) else [None]
        lists[name] = [item for item in ids if item is not None] if None not in ids else None
        if value is not None and lists[name] is None:
            mended.append("image.list.type")
    names: dict[str, Any] = {}
    for name in ("file_name", "coco_url"):
        value = fields.get(name)
        names[name] = value if isinstance(value, str) else None
    entry = ImageEntry(id=own_id, width=width, height=height, **names, **lists)
    return Loose(entry, mended)


def _category(
    raw: msgspec.Raw, position: int, mended: dict[str, list[str]], path: Path | None, name: str
) -> CategoryEntry:
    try:
        return msgspec.json.decode(raw, type=CategoryEntry)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: {error}", hint="write it as UTF-8", path=path
        ) from error
    except msgspec.MsgspecError:
        pass
    try:
        fields = json.loads(bytes(raw))
    except (ValueError, RecursionError):
        fields = None
    own_id = identifier(fields.get("id")) if isinstance(fields, dict) else None
    if own_id is None or not isinstance(fields.get("name"), str):
        raise refused("category.record", path, name, [f"position {position}"])
    kept = {"id": own_id, "name": fields["name"]}
    for field in msgspec.structs.fields(CategoryEntry)[2:]:
        value = fields.get(field.name)
        try:
            kept[field.name] = msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            mended.setdefault("category.field", []).append(str(own_id))
    return CategoryEntry(**kept)


def _open(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if file.read(2) != _GZIP:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            file.seek(0)
            return _gunzip(file.read(), path)
    except (OSError, ValueError) as error:
        # An empty file cannot be mapped, which Python says in its own words.
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror or error
        raise DataError(
            f"cannot read {path}: {reason}",
            hint="check that it is a file that you may read",
            path=path,
        ) from error


def _gunzip(packed: bytes, path: Path) -> bytes:
    """Unpack a gzip file, bounded: annotations shrink by a factor of 3 to 30, a bomb by a thousand."""
    most = max(_UNPACKED_FREELY, _MOST_RATIO * len(packed))
    parts: list[bytes] = []
    rest = packed
    try:
        while rest:
            unpacker = zlib.decompressobj(wbits=31)
            parts.append(unpacker.decompress(rest, most + 1 - sum(map(len, parts))))
            if sum(map(len, parts)) > most:
                raise DataError(
                    f"{path} unpacks to more than {_MOST_RATIO} times its size",
                    hint="unpack it, if it is what you expect, and name the plain file",
                    path=path,
                )
            if not unpacker.eof:
                raise zlib.error("it is cut short")
            rest = unpacker.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise DataError(
            f"{path} is a damaged gzip file: {error}", hint="copy or fetch it again", path=path
        ) from error
    return b"".join(parts)


def _lists(
    text: mmap.mmap | bytes, path: Path | None, name: str
) -> tuple[_Lists, dict[str, list[str]]]:
    """Find the three lists; a byte order mark is passed over, NaN and infinities are read as null."""
    found: list[str] = []
    data: Any = memoryview(text)[len(_BOM) :] if text[:3] == _BOM else text
    while True:
        try:
            return msgspec.json.decode(data, type=_Lists), {"file.nan": found} if found else {}
        except msgspec.ValidationError as error:
            raise _not_annotations(data, str(error), path, name) from error
        except RecursionError as error:
            raise _not_annotations(b"", "it is nested too deeply", path, name) from error
        except msgspec.DecodeError as error:
            place = re.search(r"\(byte (\d+)\)", str(error))
            at = data[int(place[1]) : int(place[1]) + 9] if place else b""
            if found or not _NOT_FINITE.match(bytes(at)):
                raise _not_json(data, error, path, name) from error
            data, found = _with_nulls(bytes(data))


def _with_nulls(text: bytes) -> tuple[bytes, list[str]]:
    """Return JSON text with null for NaN and infinities outside of strings, and what was replaced."""
    parts, found = bytearray(), []
    at = copied = 0
    while match := _NOT_FINITE_OR_STRING.search(text, at):
        if match[0] == b'"':
            end = _REST_OF_STRING.match(text, match.end())
            if end is None:
                break
            at = end.end()
            continue
        parts += text[copied : match.start()] + b"null"
        found.append("NaN" if match[0] == b"NaN" else "Infinity")
        at = copied = match.end()
    return bytes(parts) + text[copied:], found


def _not_json(text: Any, error: msgspec.DecodeError, path: Path | None, name: str) -> DataError:
    match = re.search(r"\(byte (\d+)\)", str(error))
    if bytes(text[:2]) in (b"\xff\xfe", b"\xfe\xff"):
        what, hint = "is UTF-16 text", "write it as UTF-8"
    elif not bytes(text[:4096]).strip() and not bytes(text).strip():
        what, hint = "is empty", "write or copy the file again"
    elif match is None or (int(match[1]) >= len(text) and "trailing" not in str(error)):
        what = f"ends in the middle of its JSON, after {len(text)} bytes ({error}): it is cut short"
        hint = "it was not copied or written completely: get it again"
    else:
        position = int(match[1])
        before = bytes(text[:position])
        line = before.count(b"\n") + 1
        column = position - (before.rfind(b"\n") + 1) + 1
        snippet = bytes(text[max(0, position - _SNIPPET) : position + _SNIPPET])
        what = (
            f"is not JSON: line {line}, column {column}, near {snippet.decode('utf-8', 'replace')!r} "
            f"({error})"
        )
        hint = "correct it there, or fetch or write the file again"
    return DataError(f"{name} {what}", hint=hint, path=path)


def _not_annotations(text: Any, why: str, path: Path | None, name: str) -> DataError:
    start = bytes(text[: 1 << 16])
    what = next((other for mark, other in _OTHER_FORMATS if mark in start), "")
    hint = _HINT
    if b'"score"' in start and b'"image_id"' in start and start.lstrip()[:1] == b"[":
        what, hint = "a list of detections", f"a results file goes with --results; {_HINT}"
    return DataError(
        f"{name} is not an annotation file: {why}{f' (it looks like {what})' if what else ''}",
        hint=hint,
        path=path,
    )
