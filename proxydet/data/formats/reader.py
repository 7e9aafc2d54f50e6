"""Reading the JSON of annotations and of results: gigabytes of records, wrapped in several ways, written by anybody.

A file is mapped, not read; a gzipped one is unpacked, within bounds, into a temporary file without a name. Lists are
decoded some megabytes at a time. What JSON does not have (NaN, lone surrogates, bytes that are not UTF-8) is mended and
counted, and a record that strict decoding refuses is read again, field by field, by the rules of its format.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np

from proxydet.data.deviations import StoreReport
from proxydet.data.masks import RunLengths
from proxydet.errors import DataError
from proxydet.files import PLACEHOLDER_BYTES, PlaceholderError, open_regular, refuse_placeholder

Identifier = int | str
_OwnId = (
    Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    | Annotated[str, msgspec.Meta(min_length=1)]
)
"""An id that others refer to, as columns hold it: a whole number of 64 bits, or a text that is not empty."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
MOST_CATEGORIES = 200_000
"""Categories of a file: ten times as many as any published vocabulary has."""
LABEL_LISTS = ("neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids")
"""Fields of images that list categories: LVIS's verified absent, LVIS's not exhaustively annotated, verified present."""


class ImageEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an image; other fields are skipped. Sizes in pixels."""

    id: _OwnId
    width: int
    height: int
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Identifier] | None = None
    not_exhaustive_category_ids: list[Identifier] | None = None
    pos_category_ids: list[Identifier] | None = None


class AnnotationEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an annotation; other fields are skipped. The box is x, y, width, height in pixels.

    Of a record that strict decoding refused, ``segmentation`` may be anything: `proxydet.data.masks.read` says what it is.
    """

    image_id: Identifier
    category_id: Identifier
    bbox: tuple[float, float, float, float] | None = None
    segmentation: list[list[float]] | RunLengths | None = None
    area: float | None = None
    iscrowd: int = 0
    ignore: int = 0
    id: Identifier | None = None


class CategoryEntry(msgspec.Struct, frozen=True):
    """What is read of a category; other fields are skipped."""

    id: _OwnId
    name: str
    frequency: str | None = None
    synset: str | None = None
    wnid: str | None = None
    freebase_id: str | None = None
    supercategory: str | None = None
    image_count: _Count | None = None
    instance_count: _Count | None = None
    synonyms: list[str] | None = None


# LVIS v0.5 names its images by the COCO 2014 release; the 2017 release that users have is in the address.
_COCO_2014_NAME = re.compile(r"COCO_(train|val|test)2014_")


def image_name(image: ImageEntry) -> str:
    """Return the path of an image below its root, empty where the record has none.

    ``file_name`` where there is one; LVIS v1 gives only an address, whose last two parts are folder and name.
    """
    name = (image.file_name or "").strip()
    if image.coco_url and (not name or _COCO_2014_NAME.search(name)):
        parts = PurePosixPath(urlsplit(image.coco_url).path).parts
        return "/".join(parts[-2:]).lstrip("/")
    return name


class Flaw(msgspec.Struct, frozen=True):
    """A record that is dropped.

    Attributes:
        key: The deviation.
        which: Its id, or its position.
        file_name: Of an image, where it has one.
    """

    key: str
    which: str
    file_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Document:
    """An annotation file, opened.

    Attributes:
        format: Name of the format, for people.
        categories: The categories, in the file's order.
        images: The images, in the file's order.
        annotations: Chunks of annotations, in the file's order.
        record: As of `proxydet.data.deviations.StoreReport`.
        called: What to call the annotation of an id in messages; None calls it by the id.
    """

    format: str
    categories: list[CategoryEntry]
    images: list[ImageEntry | Flaw]
    annotations: Iterator[list[AnnotationEntry | Flaw]]
    record: str = "annotation"
    called: Callable[[Identifier], str] | None = None


_BLOCK_BYTES = 4 << 20
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
        text = memoryview(source if isinstance(source, bytes) else _opened(source, kind, hint))
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
        pieces = self._pieces(memoryview(text), field, msgspec.Raw, lambda raw, _: raw)
        return list(itertools.chain.from_iterable(pieces))

    def records(
        self,
        kind: type[Any],
        loosely: Loosely,
        unusable: str,
        *,
        text: msgspec.Raw | None = None,
        field: str = "",
    ) -> Iterator[list[Any]]:
        """Yield the records of a list, some megabytes at a time.

        Args:
            kind: What a record is decoded to.
            loosely: Reads a record that cannot be, given as a dictionary and its name (its place in the list), to a
                ``kind`` or a `Flaw`.
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
            return loosely(fields, which) if isinstance(fields, dict) else Flaw(unusable, which)

        return self._pieces(self._text if text is None else memoryview(text), field, kind, one)

    def _pieces(
        self,
        view: memoryview,
        field: str,
        kind: type[Any],
        one: Callable[[msgspec.Raw, int], Any],
    ) -> Iterator[list[Any]]:
        decode = msgspec.json.Decoder(list[kind]).decode  # type: ignore[valid-type]
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
                        try:
                            records = checked(decode(piece))
                            break
                        except msgspec.ValidationError:
                            pass
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


def identifier(value: object) -> Identifier | None:
    """Return an id: a whole number of 64 bits, however it is spelt, or a text; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return value if isinstance(value, str) and value else None


def owners(fields: dict[str, Any], which: str) -> dict[str, Any] | Flaw:
    """Return ``image_id`` and ``category_id`` of a record, or the flaw of one of which they cannot be read."""
    found = {name: identifier(fields.get(name)) for name in ("image_id", "category_id")}
    missing = next((name for name, value in found.items() if value is None), None)
    return found if missing is None else Flaw(f"annotation.{missing}", which)


def other_spelling(value: Identifier) -> Identifier | None:
    """Return an id as the other type writes it, a number's text or a text's number; None where it has none."""
    if isinstance(value, int):
        return str(value)
    return int(value) if re.fullmatch(r"-?\d{1,18}", value.strip(), re.ASCII) else None


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


def _opened(path: Path, kind: str, hint: str) -> mmap.mmap:
    """Return a file's text, unpacked where it is gzipped; ``kind`` and ``hint`` as of `JsonText`."""
    try:
        with open_regular(path) as file:
            head = file.read(PLACEHOLDER_BYTES)
            refuse_placeholder(head)
            if other := next((other for mark, other in _OTHER_KINDS if head.startswith(mark)), ""):
                if "archive" in other:
                    hint = "unpack it, and name the file in it"
                raise DataError(f"{path} is {other}, not {kind}", hint=hint, path=path)
            if not head.startswith(_GZIP):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Annotations shrink by a factor of 3 to 30, a bomb by a thousand.
            most = max(_UNPACKED_FREELY, _MOST_RATIO * file.seek(0, 2))
            file.seek(0)
            with (
                gzip.open(file) as packed,
                tempfile.TemporaryFile(prefix="proxydet-") as unpacked,
            ):
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
    except PlaceholderError as error:
        raise DataError(
            f"cannot read {path}: {error.what}", hint=error.remedy, path=path
        ) from error
    except (OSError, ValueError) as error:
        # An empty file cannot be mapped, which Python says in its own words.
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror or error
        raise DataError(
            f"cannot read {path}: {reason}",
            hint="check that it is a file that you may read",
            path=path,
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
