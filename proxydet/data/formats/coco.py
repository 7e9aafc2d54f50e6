"""Reading COCO, LVIS and OpenImages JSON: an object with the lists ``images``, ``annotations`` and ``categories``.

Gigabytes of records, wrapped in several ways, written by anybody: a file is mapped, not read; a gzipped one is unpacked,
within bounds, into a temporary file without a name. Lists are decoded some megabytes at a time. What JSON does not have (NaN,
lone surrogates, bytes that are not UTF-8) is mended and counted, and a record that strict decoding refuses is read again,
field by field. Results files are read with the same `JsonText`.
"""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import mmap
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from proxydet.data.formats.collected import decode_json, read_bytes
from proxydet.data.masks import are_numbers
from proxydet.data.records import (
    LABEL_LISTS,
    MOST_CATEGORIES,
    AnnotationEntry,
    CategoryEntry,
    Document,
    ImageEntry,
    StoreReport,
    Unusable,
    identifier,
    owners,
    refused,
)
from proxydet.errors import DataError
from proxydet.files import PLACEHOLDER_BYTES, open_regular, read_errors, refuse_placeholder


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


def read(source: Path | bytes, name: str, report: StoreReport) -> Document:
    """Open an annotation file; it stays mapped as long as one of its records is held.

    Args:
        source: A file, plain or gzipped, or its bytes.
        name: What to call it in messages.
        report: Where deviations of the file and of its categories are counted.

    Raises:
        DataError: the file is absent, empty, not JSON (with line and column), not in COCO's layout, or its categories
            cannot be used.
    """
    text, lists = _opened(source, name, report)

    def records(kind: type[Any], loosely: Any, of: str, field: str) -> Iterator[list[Any]]:
        lenient = partial(loosely, report)
        raw = getattr(lists, field)
        return text.records(kind, lenient, f"{of}.record", text=raw, field=field)

    first = bytes(memoryview(lists.annotations)[: 1 << 20]).split(b"}", 1)[0]
    if b'"segments_info"' in first:
        raise DataError(
            f"{name} holds panoptic annotations (segments_info), not objects",
            hint="convert it to COCO's object format (panopticapi has a converter), or name the instances file",
            path=text.path,
        )

    # One more than is taken, so that the store can refuse them without reading them all.
    found = chain.from_iterable(records(CategoryEntry, _loose_category, "category", "categories"))
    categories = [*islice(found, MOST_CATEGORIES + 1)]
    for record in categories:
        if isinstance(record, Unusable):
            raise refused(record.deviation, text.path, name, [record.which])
    return Document(
        format="COCO JSON",
        categories=categories,
        images=[*chain(*records(ImageEntry, _loose_image, "image", "images"))],
        annotations=records(AnnotationEntry, _loose_annotation, "annotation", "annotations"),
    )


def read_outline(path: Path) -> Outline:
    """Read an annotation file and leave its records as they are, for writing a file of some of them; errors as of `read`."""
    text, lists = _opened(path, str(path), StoreReport())
    return Outline(
        **{field: text.raws(getattr(lists, field), field) for field in _Lists.__struct_fields__}
    )


def _opened(source: Path | bytes, name: str, report: StoreReport) -> tuple[JsonText, _Lists]:
    """Return the text of an annotation file, and its lists; the errors say what other file it may be."""
    text = JsonText(
        source,
        name,
        kind="an annotation file",
        hint="it must be an object with lists 'images', 'annotations' and 'categories' (COCO or LVIS format)",
        report=report,
    )
    try:
        return text, text.fields(_Lists)
    except DataError as error:
        start = text.start
        if " is not an annotation file" not in error.message:
            raise
        if b'"score"' in start and b'"image_id"' in start and start[:1] == b"[":
            raise text.error(
                "it looks like a list of detections", "a results file goes with --results"
            ) from error
        raise


def _loose_annotation(
    report: StoreReport, fields: dict[str, Any], which: str
) -> AnnotationEntry | Unusable:
    """Read an annotation field by field: what is wrong costs its field where the object can still be used."""
    own_id = identifier(fields.get("id"))
    which = which if own_id is None else str(own_id)
    ids = owners(fields, which)
    if isinstance(ids, Unusable):
        return ids
    flags: dict[str, Any] = {}
    for name in ("iscrowd", "ignore"):
        value = fields.get(name, 0)
        if isinstance(value, str):
            flags[name] = int(value.strip().lower() in ("1", "true", "yes"))
        else:
            flags[name] = int(isinstance(value, (bool, int, float)) and bool(value))
        if name == "iscrowd" and value not in (0, 1):
            report.count("annotation.iscrowd", [which])
    box, area = fields.get("bbox"), fields.get("area")
    return AnnotationEntry(
        **ids,
        **flags,
        bbox=(box[0], box[1], box[2], box[3]) if are_numbers(box, 4) else None,
        segmentation=fields.get("segmentation"),
        area=area if area is not None and are_numbers([area]) else None,
        id=own_id,
    )


def _loose_image(report: StoreReport, fields: dict[str, Any], which: str) -> ImageEntry | Unusable:
    own_id, file_name = identifier(fields.get("id")), fields.get("file_name")
    called = file_name if isinstance(file_name, str) else ""
    if own_id is None:
        return Unusable("image.id", which, called)
    sides = [fields.get("width"), fields.get("height")]
    if not are_numbers(sides) or any(side != int(side) for side in sides):
        return Unusable("image.size", str(own_id), called)
    width, height = (int(side) for side in sides)
    read: dict[str, Any] = {}
    for name in LABEL_LISTS:
        value = fields.get(name)
        ids = [identifier(item) for item in value] if isinstance(value, list) else [None]
        read[name] = None if None in ids else ids
        if value is not None and read[name] is None:
            report.count("image.list.type", [own_id])
    for name in ("file_name", "coco_url"):
        read[name] = fields[name] if isinstance(fields.get(name), str) else None
    return ImageEntry(id=own_id, width=width, height=height, **read)


def _loose_category(
    report: StoreReport, fields: dict[str, Any], which: str
) -> CategoryEntry | Unusable:
    own_id = identifier(fields.get("id"))
    if own_id is None or not isinstance(fields.get("name"), str):
        return Unusable("category.record", which)
    kept = {"id": own_id, "name": fields["name"]}
    for field in msgspec.structs.fields(CategoryEntry)[2:]:
        try:
            kept[field.name] = msgspec.convert(fields.get(field.name), field.type)
        except msgspec.ValidationError:
            report.count("category.field", [own_id])
    return CategoryEntry(**kept)


_LARGEST_HIERARCHY = 64 << 20


class _Class(msgspec.Struct, rename={"label": "LabelName", "children": "Subcategory"}):
    label: str
    children: list[_Class] = []


def read_hierarchy(path: Path) -> dict[str, set[str]]:
    """Read OpenImages' class hierarchy: all labels above each label, which may stand in several places.

    Args:
        path: JSON of nested ``{"LabelName": ..., "Subcategory": [...]}``, such as
            ``challenge-2019-label500-hierarchy.json``.

    Raises:
        DataError: The file is damaged.
    """
    hint = "it is OpenImages' own file, challenge-2019-label500-hierarchy.json"
    data = read_bytes(path, _LARGEST_HIERARCHY, hint)
    tree: _Class = decode_json(data, _Class, path, "a class hierarchy", hint)
    found: dict[str, set[str]] = {}
    waiting: list[tuple[_Class, frozenset[str]]] = [(tree, frozenset())]
    while waiting:
        entry, above = waiting.pop()
        found.setdefault(entry.label, set()).update(above)
        waiting.extend((child, above | {entry.label}) for child in entry.children)
    return found


# --- JSON ------------------------------------------------------------------------------------------------------------------

_BLOCK_BYTES = 2 << 20
_LARGE_BLOCKS = 3
"""Blocks: a piece of a list that is longer is searched for tiny records before they are made objects."""
_LONGEST_RECORD = 32 << 20
"""Bytes: a longer record is not read; as Python objects it takes up to 16 times as much."""
_SHORTEST_RECORD = 16
"""Bytes: no image, annotation or detection is shorter; a list of records that are is refused."""
_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{)")
_BOUNDARIES_TRIED = 16
_SNIPPET = 40
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHER_KINDS = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF-", "a PDF"),
)
_UNPACKED_FREELY = 1 << 28
_MOST_RATIO = 200
_PLACE = re.compile(r"\(byte (\d+)\)")
_AT_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)|-?I")
_NOT_FINITE_OR_STRING = re.compile(rb'"|-?\b(?:NaN|Infinity)\b')
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEX = rb"[0-9a-fA-F]"
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]%s{2}\\u[dD][c-fC-F]%s{2}|(u[dD][89a-fA-F]%s{2})|.)" % (_HEX, _HEX, _HEX),
    re.DOTALL,
)
"""An escape in a string; the group is a surrogate that is not one of a pair."""

Fields = TypeVar("Fields", bound=msgspec.Struct)
Loosely = Callable[[dict[str, Any], str], Any]


class _Object(msgspec.Struct, gc=False):
    """Any object, with nothing of it kept."""


class JsonText:
    """The JSON of one file or of values.

    Args:
        source: A file, plain or gzipped, or the text.
        name: What to call it in messages.
        kind: What it should be, as ``an annotation file``, for messages.
        hint: How such a file is laid out.
        report: Where mended places of the file are counted.

    Raises:
        DataError: the file cannot be opened, is empty, or is a gzip file that is damaged or grows out of bounds.
    """

    def __init__(
        self, source: Path | bytes, name: str, *, kind: str, hint: str, report: StoreReport
    ) -> None:
        self.path = source if isinstance(source, Path) else None
        self.name = name
        self._kind = kind
        self._hint = hint
        self._report = report
        text = memoryview(source if isinstance(source, bytes) else _mapped(source, kind, hint))
        self._map = text.obj
        self._text = text[len(_BOM) :] if text[: len(_BOM)] == _BOM else text

    @property
    def start(self) -> bytes:
        """The first 64 KB, without blanks before them."""
        return bytes(self._text[: 1 << 16]).lstrip()

    def error(self, why: str, hint: str = "") -> DataError:
        """Return the error of a text that is not what it should be."""
        if bytes(self._text[:2]) in (b"\xff\xfe", b"\xfe\xff"):
            why, hint = "it is UTF-16 text", "write it as UTF-8"
        return DataError(
            f"{self.name} is not {self._kind}: {why}", hint=hint or self._hint, path=self.path
        )

    def fields(self, kind: type[Fields]) -> Fields:
        """Decode an object whose fields are `msgspec.Raw`.

        Raises:
            DataError: it is not JSON (with line and column), not an object, or a field is missing.
        """
        text: Any = self._text
        while True:
            try:
                decoded = msgspec.json.decode(text, type=kind)
            except msgspec.ValidationError as error:
                raise self.error(str(error)) from error
            except RecursionError as error:
                raise self.error("it is nested too deeply") from error
            except msgspec.DecodeError as error:
                mended = _mended(text, error)
                if mended is None:
                    raise self._malformed(error, 0 if text is self._text else None) from error
                text, key, examples = mended
                self._report.count(key, examples)
            else:
                return decoded

    def raws(self, text: msgspec.Raw, field: str) -> list[msgspec.Raw]:
        """Return the records of a list as their JSON; errors as of `records`."""
        pieces = self._pieces(memoryview(text), field, [msgspec.Raw], lambda raw, _: raw)
        return list(itertools.chain.from_iterable(pieces))

    def records(
        self,
        kind: type[Any],
        loosely: Loosely,
        unusable: str,
        *,
        first: type[Any] | None = None,
        text: msgspec.Raw | None = None,
        field: str = "",
    ) -> Iterator[list[Any]]:
        """Yield the records of a list, some megabytes at a time.

        Args:
            kind: What a record is decoded to.
            first: A narrower type, with the same fields: what the records of a piece are decoded to where all of them fit it.
            loosely: Reads a record that cannot be, given as a dictionary and its name (its place in the list), to a
                ``kind`` or an `Unusable`.
            unusable: The deviation of what is not an object, or a longer one than any record is.
            text: The list; by default the whole text.
            field: The list's name.

        Raises:
            DataError: it is not JSON, or not a list of records.
        """
        decode = msgspec.json.Decoder(kind).decode

        def one(raw: msgspec.Raw, position: int) -> Any:
            try:
                if len(memoryview(raw)) <= _LONGEST_RECORD:
                    return decode(raw)
                fields = None
            except (msgspec.MsgspecError, UnicodeDecodeError):
                try:
                    # Python refuses to read a number of thousands of digits as an int; as a float it is infinite.
                    fields = json.loads(bytes(raw), parse_int=_whole_number)
                except (ValueError, RecursionError):
                    fields = None
            which = f"position {position}"
            return loosely(fields, which) if isinstance(fields, dict) else Unusable(unusable, which)

        kinds = [kind] if first is None else [first, kind]
        return self._pieces(self._text if text is None else memoryview(text), field, kinds, one)

    def _pieces(
        self,
        view: memoryview,
        field: str,
        kinds: list[type[Any]],
        one: Callable[[msgspec.Raw, int], Any],
    ) -> Iterator[list[Any]]:
        decoders = [msgspec.json.Decoder(list[kind]).decode for kind in kinds]  # type: ignore[valid-type]
        no_list = f"{field!r} is not a list of objects" if field else "it is not a list of objects"
        blanks = len(view[:4096]) - len(bytes(view[:4096]).lstrip())
        if bytes(view[blanks : blanks + 1]) != b"[":
            if bytes(view).strip():
                raise self.error(no_list)
            raise self._malformed(msgspec.DecodeError(), None)

        def checked(records: list[Any]) -> list[Any]:
            if len(records) > 1000 and len(piece) < _SHORTEST_RECORD * len(records):
                raise self.error(f"{no_list} (records of {len(piece) / len(records):.0f} bytes)")
            return records

        start, done, piece = blanks + 1, 0, b""
        while start:
            size, tries = _BLOCK_BYTES, 0
            while True:
                if not piece:
                    found: list[tuple[str, list[str]]] = []  # what was mended in it
                    boundary = _BOUNDARY.search(view, start + size)
                    end, close = (
                        (len(view), b"") if boundary is None else (boundary.start() + 1, b"]")
                    )
                    piece = b"".join((b"[", view[start:end], close))
                try:
                    # All at once where the records are as they should be, and few for the bytes that they take.
                    if len(piece) <= _LARGE_BLOCKS * _BLOCK_BYTES:
                        records = None
                        for decode in decoders:
                            with suppress(msgspec.ValidationError):
                                records = checked(decode(piece))
                                break
                        if records is not None:
                            break
                    else:
                        try:
                            checked(msgspec.json.decode(piece, type=list[_Object]))
                        except msgspec.ValidationError as error:
                            raise self.error(f"{no_list} ({error})") from error
                    raws = checked(msgspec.json.decode(piece, type=list[msgspec.Raw]))
                    records = [one(raw, position) for position, raw in enumerate(raws, done)]
                    break
                except UnicodeDecodeError:
                    piece = piece.decode("utf-8", "replace").encode()
                    found.append(("file.text", ["bytes that are not UTF-8"]))
                except msgspec.DecodeError as error:
                    if mended := _mended(piece, error):
                        piece = mended[0]
                        found.append(mended[1:])
                        continue
                    place = _PLACE.search(str(error))
                    cut = place is None or int(place[1]) >= len(piece) - 1
                    if boundary is None or not cut:
                        raise self._malformed(error, None if found else start - 1) from error
                    # It was inside of a record. A long one is not decoded again for each of its parts.
                    tries += 1
                    size = boundary.end() - start if tries < _BOUNDARIES_TRIED else 2 * size
                    piece = b""
                except RecursionError as error:
                    raise self.error("it is nested too deeply") from error
            piece = b""
            for key, examples in found:
                self._report.count(key, examples)
            yield records
            if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)  # pages that were read are not kept in memory
            done += len(records)
            start = 0 if boundary is None else boundary.end()

    def _malformed(self, error: msgspec.DecodeError, offset: int | None) -> DataError:
        """Return the error of a text that is not JSON; ``offset`` is where the decoded part of it starts, if known."""
        text, place = self._text, _PLACE.search(str(error))
        position = None if place is None or offset is None else int(place[1]) + offset
        if bytes(text[:2]) in (b"\xff\xfe", b"\xfe\xff"):
            what, hint = "is UTF-16 text", "write it as UTF-8"
        elif not self.start and not bytes(text).strip():
            what, hint = "is empty", "write or copy the file again"
        elif place is None or (
            position is not None and position >= len(text) and "trailing" not in str(error)
        ):
            what = f"ends in the middle of its JSON, after {len(text)} bytes ({error}): it is cut short"
            hint = "it was not copied or written completely: get it again"
        elif position is None:
            what, hint = f"is not JSON ({error})", "fetch or write the file again"
        else:
            line, last = 1, -1
            for at in range(0, position, _BLOCK_BYTES):
                part = bytes(text[at : min(at + _BLOCK_BYTES, position)])
                line += part.count(b"\n")
                last = at + part.rfind(b"\n") if b"\n" in part else last
            snippet = bytes(text[max(0, position - _SNIPPET) : position + _SNIPPET])
            what = (
                f"is not JSON: line {line}, column {position - last}, near "
                f"{snippet.decode('utf-8', 'replace')!r} ({error})"
            )
            hint = "correct it there, or fetch or write the file again"
        return DataError(f"{self.name} {what}", hint=hint, path=self.path)


def _whole_number(digits: str) -> float:
    return int(digits) if len(digits) < 300 else float(digits)


def encoded(value: Any, name: str) -> bytes:
    """Return Python values as JSON, numpy's among them.

    Raises:
        DataError: they hold something that JSON has nothing for.
    """

    def plain(other: Any) -> Any:
        if isinstance(other, bytes):  # of a mask
            return other.decode("ascii", "replace")
        if isinstance(other, np.generic | np.ndarray):
            return other.tolist()
        raise TypeError(f"a value of type {type(other).__name__}")

    try:
        return json.dumps(value, default=plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{name} cannot be written as JSON: {error}",
            hint="give dictionaries and lists of numbers and texts",
        ) from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of small containers without cycles: looking for cycles among them takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mapped(path: Path, kind: str, hint: str) -> mmap.mmap:
    """Return a file's text, unpacked where it is gzipped; ``kind`` and ``hint`` as of `JsonText`."""
    with read_errors(path, error=DataError), open_regular(path) as file:
        head = file.read(PLACEHOLDER_BYTES)
        refuse_placeholder(head)
        if not head:
            raise ValueError("it is empty")
        if other := next((other for mark, other in _OTHER_KINDS if head.startswith(mark)), ""):
            if "archive" in other:
                hint = "unpack it, and name the file in it"
            raise DataError(f"{path} is {other}, not {kind}", hint=hint, path=path)
        if not head.startswith(_GZIP):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Annotations shrink by a factor of 3 to 30, a bomb by a thousand.
        most = max(_UNPACKED_FREELY, _MOST_RATIO * file.seek(0, 2))
        file.seek(0)
        try:
            with gzip.open(file) as packed, tempfile.TemporaryFile(prefix="proxydet-") as unpacked:
                while block := packed.read(_BLOCK_BYTES):
                    unpacked.write(block)
                    if unpacked.tell() > most:
                        raise DataError(
                            f"{path} unpacks to more than {_MOST_RATIO} times its size",
                            hint="unpack it, if it is what you expect, and name the plain file",
                            path=path,
                        )
                unpacked.flush()
                return mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            why = "it is cut short" if isinstance(error, EOFError) else error
            raise DataError(
                f"{path} is a damaged gzip file: {why}", hint="copy or fetch it again", path=path
            ) from error


def _mended(text: Any, error: msgspec.DecodeError) -> tuple[bytes, str, list[str]] | None:
    """Return JSON text without what JSON does not have and ``error`` is about, the deviation, and what was replaced.

    NaN and infinities become null, surrogates that are not one of a pair U+FFFD. None where it is about something else.
    """
    place = _PLACE.search(str(error))
    text = bytes(text)
    parts, found = bytearray(), []
    if place is None or not _AT_NOT_FINITE.match(text, int(place[1])):
        # Where the first half of a pair is without its second, the decoder may take what follows for the end.

        def replaced(match: re.Match[bytes]) -> bytes:
            if match[1] is None:
                return match[0]
            found.append(match[0].decode())
            return b"\\ufffd"

        if _MAYBE_SURROGATE.search(text):
            text = _ESCAPE.sub(replaced, text)
        return (text, "file.text", found) if found else None
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
    return (bytes(parts) + text[copied:], "file.nan", found) if found else None
