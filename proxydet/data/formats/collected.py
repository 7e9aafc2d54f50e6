"""What readers of formats with one small record an object share: objects by class name, outlines and masks, small files.

COCO's reader streams gigabytes of JSON; these formats are files of at most some hundred megabytes, read one after the other.
"""

from __future__ import annotations

import io
import math
import os
import sys
import xml.etree.ElementTree as ElementTree
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

import msgspec
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from proxydet.data.masks import LARGEST_IMAGE, RunLengths, encode
from proxydet.data.records import (
    AnnotationEntry,
    CategoryEntry,
    Document,
    Identifier,
    ImageEntry,
    Unusable,
)
from proxydet.errors import DataError
from proxydet.files import open_regular, read_errors, refuse_placeholder

_CHUNK = 16384
_PIECE = 1 << 16
_BLOCK = 1 << 22
MOST_RUNS = 1 << 20
"""Runs of a mask, along rows or along columns."""
LARGEST_MASK = 1 << 26
"""Pixels of a mask that is decoded from an image or from brush strokes, at a byte each."""
_ANGLE_P = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_CIRCLE_P2 = np.stack([np.cos(_ANGLE_P), np.sin(_ANGLE_P)], axis=1)
"""The corners of an ellipse's outline, of radius 1."""
_PART_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def part_of_word(word: str) -> str:
    """Return which part of a data set, ``train``, ``val`` or ``test``, a word stands for; empty where it is for none."""
    return _PART_WORDS.get(word.strip().lower(), "")


class Objects:
    """Objects of named classes, as a reader finds them one after the other."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._files: list[str] = []
        self._starts: list[int] = []
        self.images: list[ImageEntry | Unusable] = []

    def begin(self, name: str) -> None:
        """Begin a file, or an entry of one; what is added next is counted within it.

        Args:
            name: What to call it in messages.
        """
        self._files.append(name)
        self._starts.append(len(self._rows))

    def image(
        self,
        name: str,
        size: tuple[int, int] | None,
        deviation: str = "image.size",
        own_id: str | None = None,
    ) -> None:
        """Add an image.

        Args:
            name: Path below the folders of the images, or as the format has it.
            size: Height and width in pixels; None: it cannot be used.
            deviation: Of one without a size, by its key in `proxydet.data.records.DEVIATIONS`.
            own_id: Its id; without one its name.
        """
        own_id = own_id or name
        if size is None or min(size) <= 0 or size[0] * size[1] > LARGEST_IMAGE:
            self.images.append(Unusable("image.size" if size else deviation, own_id))
        else:
            height, width = size
            self.images.append(ImageEntry(id=own_id, width=width, height=height, file_name=name))

    def add(
        self,
        image: str,
        label: str,
        *,
        box: Sequence[float | None] | None = None,
        polygons: Sequence[Sequence[float]] | None = None,
        counts: bytes | None = None,
        size: tuple[int, int] = (0, 0),
        ignore: bool = False,
    ) -> None:
        """Add an object; its box is the extent of its mask, or of its outlines where none is given.

        Args:
            image: Id of its image.
            label: Its class; without one it is dropped and counted.
            box: Left, top, right, bottom in pixels; one that is not four numbers is dropped and counted.
            polygons: Outlines, each x, y, x, y, ... in pixels or an `Ellipse`.
            counts: Its mask as COCO's run lengths; empty ones are a damaged mask, which is counted.
            size: Height and width of the image, for the mask.
            ignore: Whether scoring ignores it.
        """
        self._rows.append((image, sys.intern(label.strip()), box, polygons, counts, size, ignore))

    def drop(self, deviation: str) -> None:
        """Count an object that is dropped, by the key of its deviation."""
        self._rows.append((deviation,))

    def skip(self) -> None:
        """Count a record that belongs to an object that was added before."""
        self._rows.append(())

    def document(
        self, format: str, record: str, names: Iterable[str] = (), first_id: int = 1
    ) -> Document:
        """Return what was collected.

        Args:
            format: Name of the format, for people.
            record: What the format calls an object, as of `proxydet.data.records.FIELDS`.
            names: Classes that the format declares, in its order; others follow by name.
            first_id: Id of the first class.
        """
        declared = list(names)
        known = set(declared)
        others = sorted({row[1] for row in self._rows if len(row) > 1 and row[1]} - known)
        number = {name: index for index, name in enumerate([*declared, *others], first_id)}
        rows, starts, files = self._rows, self._starts, self._files

        def called(index: Identifier) -> str:
            place = bisect_left(starts, int(index)) - 1
            return f"{record} {int(index) - starts[place]} of {files[place]}"

        def entry(index: int) -> AnnotationEntry | Unusable:
            row = rows[index - 1]
            if len(row) == 1:
                return Unusable(row[0], called(index))
            image, label, corners, polygons, counts, size, ignore = row
            if not label:
                return Unusable("annotation.category_id", called(index))
            xywh = None
            mask: list[list[float]] | RunLengths | None = None
            if corners is not None and None not in corners:
                left, top, right, bottom = corners
                xywh = (left, top, right - left, bottom - top)
            if polygons:
                mask = polygons = [o.outline() if isinstance(o, Ellipse) else o for o in polygons]
                usable = [v for outline in polygons if len(outline) >= 6 for v in outline]
                if usable and corners is None:
                    left, top, right, bottom = extent(usable)
                    xywh = (left, top, right - left, bottom - top)
            elif counts is not None:
                mask = RunLengths(counts=counts.decode(), size=size)
                if counts:
                    run_lengths = {"size": list(size), "counts": counts}
                    xywh = tuple(coco_mask.toBbox(run_lengths).tolist())
            return AnnotationEntry(
                id=index,
                image_id=image,
                category_id=number[label],
                bbox=xywh,
                segmentation=mask,
                area=None if xywh is None else _area(xywh, polygons, counts or None, size),
                ignore=int(ignore),
            )

        ids = range(1, len(rows) + 1)
        return Document(
            format=format,
            categories=[
                CategoryEntry(id=index, name=name)
                for index, name in enumerate([*declared, *others], first_id)
            ],
            images=self.images,
            annotations=(
                [entry(index) for index in ids[start : start + _CHUNK] if rows[index - 1]]
                for start in range(0, len(ids), _CHUNK)
            ),
            record=record,
            called=called,
        )


def _area(
    xywh: Sequence[float],
    polygons: list[list[float]] | None,
    counts: bytes | None,
    size: tuple[int, int],
) -> float:
    """Return pixels of an object: of its mask, of its outlines, of its box."""
    if counts is not None:
        return float(coco_mask.area({"size": list(size), "counts": counts}))
    if not polygons:
        return max(xywh[2], 0) * max(xywh[3], 0)
    total = 0.0
    for outline in polygons:
        xy = np.array(outline[: len(outline) // 2 * 2], dtype=np.float64)
        x, y = xy[0::2] - xywh[0], xy[1::2] - xywh[1]
        twice = x[:-1].dot(y[1:]) - y[:-1].dot(x[1:]) + x[-1:].dot(y[:1]) - y[-1:].dot(x[:1])
        total += abs(float(twice)) / 2
    return min(total, max(xywh[2] * xywh[3], 0)) if math.isfinite(total) else 0.0


# --- Outlines and masks ------------------------------------------------------------------------------------------------


class Ellipse(NamedTuple):
    """An ellipse as its format has it: 5 numbers in memory, until its outline is wanted."""

    degrees: float
    """By which it is turned, clockwise on the screen."""
    x: float
    """Pixels, of the center."""
    y: float
    radius_x: float
    """Pixels, before it is turned."""
    radius_y: float

    def outline(self) -> list[float]:
        """Return x, y, x, y, ... in pixels."""
        return _turned(_CIRCLE_P2 * (self.radius_x, self.radius_y), self.degrees, (self.x, self.y))


def turned_box(
    corners: Sequence[float], degrees: float, pivot: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return the upright box around a box (left, top, right, bottom) that is turned clockwise around a point."""
    left, top, right, bottom = corners
    points_42 = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    outline = _turned(points_42 - np.array(pivot), degrees, pivot)
    return extent(outline)


def _turned(
    points_P2: npt.NDArray[np.float64], degrees: float, center: tuple[float, float]
) -> list[float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    outline: list[float] = (points_P2 @ [[cos, sin], [-sin, cos]] + center).reshape(-1).tolist()
    return outline


def extent(flat: Sequence[float]) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of points given as x, y, x, y, ..."""
    return min(flat[0::2]), min(flat[1::2]), max(flat[0::2]), max(flat[1::2])


def paste(
    crop_hw: npt.NDArray[np.bool_], left: int, top: int, size: tuple[int, int]
) -> bytes | None:
    """Return the run lengths of a mask that covers a part of an image, without drawing the image.

    Args:
        crop_hw: bool (h, w).
        left: Pixels of the image left of it.
        top: Pixels of the image above it.
        size: Height and width of the image.

    Returns:
        COCO's run lengths; None for an image too large for them, or for more runs than `MOST_RUNS`.
    """
    height, width = size
    if not crop_hw.size or not 0 < height * width <= LARGEST_IMAGE:
        return None
    inside = crop_hw[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    edges_E: list[npt.NDArray[np.int64]] = []
    count, step = 0, max(_BLOCK // max(len(inside), 1), 1)
    for start in range(0, inside.shape[1], step):  # some columns at a time: several bytes a pixel
        padded = np.pad(inside[:, start : start + step].T, ((0, 0), (1, 1)))
        column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])
        edges_E.append((column + start + max(left, 0)) * height + row + max(top, 0))
        if (count := count + len(row)) > 2 * MOST_RUNS:
            return None
    return encode(np.concatenate([np.zeros(0, np.int64), *edges_E]), 1, size)[0]


def number(value: object) -> float | None:
    """Return a number below 1e9 that is given as one or spelt; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if -1e9 < found < 1e9 else None


def numbers(values: object) -> list[float] | None:
    """Return a list of numbers below 1e9; None where a value is not one."""
    if not isinstance(values, list | tuple):
        return None
    found = [number(value) for value in values]
    return None if None in found else [value for value in found if value is not None]


def size_of(height: object, width: object) -> tuple[int, int] | None:
    """Return a size as a format spells it; None where a side is missing, 0 or not a number."""
    sides = numbers([height, width])
    return (int(sides[0]), int(sides[1])) if sides and all(sides) else None


def scaled(values: Iterable[float], size: tuple[int, int], whole: float = 1) -> list[float]:
    """Return x, y, x, y, ... (or width, height) in pixels, given as parts of an image of that height and width."""
    return [value * size[1 - place % 2] / whole for place, value in enumerate(values)]


def flat_points(points: object) -> list[float] | None:
    """Return a list of points [x, y] as x, y, x, y, ...; None where it is not one."""
    if not isinstance(points, list):
        return None
    pairs = [numbers(point) for point in points]
    if any(pair is None or len(pair) != 2 for pair in pairs):
        return None
    return [value for pair in pairs for value in pair or ()]


# --- Files -------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int, hint: str) -> bytes:
    """Return what a file holds.

    Raises:
        DataError: it cannot be read, is larger than ``limit`` bytes, or is a placeholder of Git LFS or a web page.
    """
    with read_errors(path, error=DataError), open_regular(path) as file:
        # Python sets aside what may be read, not what is there.
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        refuse_placeholder(data)
    if len(data) > limit:
        raise DataError(f"{path} is larger than {limit >> 20} MB", hint=hint, path=path)
    return data


def read_xml(path: Path, limit: int, root: str, format: str, hint: str) -> ElementTree.Element:
    """Read an XML file that somebody else wrote.

    Args:
        path: The file.
        limit: Largest size in bytes; the tree takes up to 40 times as much memory.
        root: Name of its root.
        format: What it should be, for messages.
        hint: How such a file is laid out.

    Raises:
        DataError: it cannot be read, is not XML, declares entities, or has another root.
    """
    data = read_bytes(path, limit, hint)
    if not data.strip():
        raise DataError(f"{path} is empty", hint="get the file again, or remove it", path=path)
    if b"\0" in data:
        why = "is not text of one byte a character"
    else:
        try:
            refuse_entities(io.BytesIO(data), path, hint)
            tree = ElementTree.fromstring(data)  # noqa: S314 - no entities, bounded size
            if tree.tag == root:
                return tree
            why = f"is not {format}: its root is <{tree.tag[:40]}>"
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            why = f"is not XML: {error}"
    raise DataError(f"{path} {why}", hint=hint, path=path)


def refuse_entities(file: BinaryIO, path: Path, hint: str) -> None:
    """Refuse XML that declares anything of its own: entities and defaults of attributes grow, and no format needs them.

    Args:
        file: The XML; it is read up to its first element, before which declarations stand, and set back to its start.
        path: What to call it in messages.
        hint: How such a file is laid out.

    Raises:
        DataError: it declares entities or the like.
    """
    parser = expat.ParserCreate()
    found: list[bool] = []

    def at_doctype(_name: str, _system: str | None, _public: str | None, inside: int) -> None:
        if inside:
            raise DataError(
                f"{path} declares entities of its own, which are not read", hint=hint, path=path
            )

    parser.StartDoctypeDeclHandler = at_doctype
    parser.StartElementHandler = lambda *_: found.append(True)
    try:
        while not found and (block := file.read(_PIECE)):
            parser.Parse(block)
    except (expat.ExpatError, ValueError, LookupError):
        pass  # whoever reads the whole reports it
    file.seek(0)


def decode_json(data: bytes, kind: Any, path: Path, format: str, hint: str) -> Any:
    """Decode JSON to a type.

    Raises:
        DataError: it is not JSON, or not of that type.
    """
    try:
        return msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as error:
        why = f"is not {format}: {error}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = f"is not JSON ({error})"
        if "truncated" in str(error) or not data.strip():
            why = f"is cut short: its JSON ends after {len(data)} bytes"
            hint = "it was not copied or written completely: get it again"
    except RecursionError:
        why = "is nested too deeply"
    raise DataError(f"{path} {why}", hint=hint, path=path)
