"""Reading labelme: one JSON file an image, next to it, with shapes in pixels."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from proxydet.data.formats.collected import (
    LARGEST_MASK,
    Ellipse,
    Objects,
    decode_json,
    extent,
    flat_points,
    paste,
    read_bytes,
    size_of,
)
from proxydet.data.images import files_below, image_sizes
from proxydet.data.records import AnnotationSource, Document, StoreReport

_LARGEST_FILE = 256 << 20
"""Bytes of a file: labelme stores the image itself in it."""
_HINT = "labelme has one .json file an image, with 'shapes' and 'imagePath'"


class _File(msgspec.Struct):
    shapes: list[dict[str, Any]]
    imagePath: Any = None
    imageHeight: Any = None
    imageWidth: Any = None


def files(source: Path) -> list[Path]:
    """Return the files that a path names: itself, or those below a folder."""
    return [source] if source.is_file() else files_below(source, (".json",))


def read(source: AnnotationSource, _report: StoreReport) -> Document:
    """Read a file, or those below a folder. Shapes of one label and ``group_id`` in an image are one object.

    Raises:
        DataError: a file cannot be read, or is not labelme's.
    """
    found, path = Objects(), source.annotations
    above, paths = path if path.is_dir() else path.parent, files(path)
    names: list[str] = []
    given: list[tuple[int, int] | None] = []
    shapes: list[list[dict[str, Any]]] = []
    for path in paths:
        data = read_bytes(path, _LARGEST_FILE, _HINT)
        content: _File = decode_json(data, _File, path, "labelme", _HINT)
        name = str(content.imagePath or path.with_suffix("").name).replace("\\", "/")
        # The image is named from the file's own folder; the folders of the images may lie above it.
        names.append((path.parent.relative_to(above) / name).as_posix())
        given.append(size_of(content.imageHeight, content.imageWidth))
        shapes.append(content.shapes)
    sizes = image_sizes(names, given, source.roots)
    for path, name, size, listed in zip(paths, names, sizes, shapes, strict=True):
        found.image(name, size, "image.file")
        found.begin(path.name)
        _add_shapes(found, name, size or (1, 1), listed)
    return found.document("labelme", "shape")


def _add_shapes(
    found: Objects, image: str, size: tuple[int, int], shapes: list[dict[str, Any]]
) -> None:
    groups: dict[tuple[str, str], list[Sequence[float]]] = {}
    for shape in shapes:
        label = "" if shape.get("label") is None else str(shape["label"])
        flat = flat_points(shape.get("points")) or []
        kind, group = shape.get("shape_type") or "polygon", shape.get("group_id")
        if kind == "mask" and len(flat) == 4:
            left, top, right, bottom = extent(flat)
            box = (left, top, right + 1, bottom + 1)
            counts = _mask(shape.get("mask"), box, size) or b""
            found.add(image, label, box=box, counts=counts, size=size)
        elif kind == "rectangle":
            found.add(image, label, box=extent(flat) if len(flat) in (4, 8) else None)
        elif kind in ("polygon", "circle", "oriented_rectangle"):
            outline: Sequence[float] = flat
            if kind == "circle" and len(flat) == 4:
                radius = math.dist(flat[:2], flat[2:])
                outline = Ellipse(0, flat[0], flat[1], radius, radius)
            outlines = [] if group is None else groups.setdefault((label, str(group)), [])
            outlines.append(outline)
            if len(outlines) == 1:
                found.add(image, label, polygons=outlines)
            else:
                found.skip()
        else:
            found.drop("annotation.shape")


def _mask(text: object, box: Sequence[float], size: tuple[int, int]) -> bytes | None:
    """Return the run lengths of a mask, a PNG in base64 of what the box holds; None where it cannot be read."""
    try:
        data = base64.b64decode(str(text), validate=True)
        # By its header, before Pillow opens it: a PNG of some kilobytes may hold a billion pixels.
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        if height > size[0] or width > size[1] or width * height > LARGEST_MASK or min(box) < 0:
            return None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            light = image.mode in ("1", "L", "P")
            if image.size != (width, height) or not (light or width * height <= LARGEST_MASK // 8):
                return None
            plain = image if image.mode in ("1", "L") else image.convert("L")
            crop_hw = np.asarray(plain) > 0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return paste(crop_hw, round(box[0]), round(box[1]), size)
