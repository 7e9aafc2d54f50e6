"""Reading VGG Image Annotator (VIA 1 and 2): a project, or its export of annotations as JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.formats.collected import (
    Ellipse,
    Objects,
    decode_json,
    number,
    numbers,
    read_bytes,
)
from proxydet.data.images import image_sizes
from proxydet.data.records import AnnotationSource, Document, StoreReport
from proxydet.errors import DataError

_LARGEST_FILE = 256 << 20
_LONGEST_FIELD = 1 << 24
"""Characters of a field of CSV: an outline of a million points."""
_HINT = "VIA's project or its export (Annotation > Export as json or csv) has 'filename' and 'regions' of each image"
_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category", "object", "object_name")
_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


class _Entry(msgspec.Struct):
    filename: str
    regions: list[dict[str, Any]] | dict[str, dict[str, Any]] = []


class _Project(msgspec.Struct):
    images: dict[str, _Entry] = msgspec.field(name="_via_img_metadata")
    attributes: dict[str, Any] = msgspec.field(name="_via_attributes", default_factory=dict)


def read(source: AnnotationSource, _report: StoreReport) -> Document:
    """Read a project or an export. Its class is the attribute of regions that most of them have.

    Raises:
        DataError: the file cannot be read, or is not VIA's.
    """
    path = source.annotations
    data = read_bytes(path, _LARGEST_FILE, _HINT)
    declared: dict[str, Any] = {}
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
        entries = _from_csv(data, path)
    elif data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n{").startswith(b'"_via_'):
        project: _Project = decode_json(data, _Project, path, "a VIA project", _HINT)
        entries = list(project.images.values())
        declared = project.attributes.get("region") or {}
    else:
        content = decode_json(data, dict[str, _Entry], path, "an export of VIA", _HINT)
        entries = list(content.values())
    # VIA 1 numbers the regions.
    regions = [[*r.values()] if isinstance(r := e.regions, dict) else r for e in entries]
    attribute = _class_attribute(region for part in regions for region in part)
    names: list[str] = []
    if isinstance(declared, dict) and isinstance(declared.get(attribute), dict):
        options = declared[attribute].get("options")
        names = [name for name in options if name.strip()] if isinstance(options, dict) else []
    found = Objects()
    sizes = image_sizes([entry.filename for entry in entries], [None] * len(entries), source.roots)
    for entry, listed, size in zip(entries, regions, sizes, strict=True):
        found.image(entry.filename, size, "image.file")
        found.begin(entry.filename)
        for region in listed:
            _add(found, entry.filename, region, attribute)
    return found.document("VGG VIA", "region", names)


def _add(found: Objects, image: str, region: dict[str, Any], attribute: str) -> None:
    shape, attributes = region.get("shape_attributes"), region.get("region_attributes")
    shape = shape if isinstance(shape, dict) else {}
    label = _value(attributes.get(attribute)) if isinstance(attributes, dict) else ""
    kind = shape.get("name")
    if kind == "rect":
        x, y, w, h = (number(shape.get(key)) for key in ("x", "y", "width", "height"))
        box = None if None in (x, y, w, h) else (x, y, (x or 0) + (w or 0), (y or 0) + (h or 0))
        found.add(image, label, box=box)
    elif kind in ("polygon", "polyline"):
        xs, ys = numbers(shape.get("all_points_x")), numbers(shape.get("all_points_y"))
        if kind == "polyline" and (not xs or not ys or (xs[0], ys[0]) != (xs[-1], ys[-1])):
            found.drop("annotation.shape")
        else:
            outline = []
            if xs and ys and len(xs) == len(ys):
                outline = [value for point in zip(xs, ys, strict=True) for value in point]
            found.add(image, label, polygons=[outline])
    elif kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        values = numbers([shape.get(key) for key in ("cx", "cy", *radii)])
        turned = math.degrees(number(shape.get("theta")) or 0)
        found.add(image, label, polygons=[Ellipse(turned, *values)] if values else None)
    else:
        found.drop("annotation.shape")


def _value(value: object) -> str:
    """Return the class that an attribute's value names; of ticked boxes the first."""
    if isinstance(value, dict):
        return next(
            (str(name) for name, ticked in value.items() if ticked in (True, "true", "1")), ""
        )
    return "" if value is None else str(value).strip()


def _class_attribute(regions: Iterable[dict[str, Any]]) -> str:
    """Return the attribute that names the class: the one that most regions have, one of the usual names where several do."""
    counts: Counter[str] = Counter()
    for region in regions:
        attributes = region.get("region_attributes")
        if isinstance(attributes, dict):
            counts.update(key for key, value in attributes.items() if _value(value))
    most = max(counts.values(), default=0)
    often = [key for key, count in counts.items() if count == most]
    usual = [key for name in _CLASS_ATTRIBUTES for key in often if key.strip().lower() == name]
    return next(iter(usual or often), "")


def _from_csv(data: bytes, source: Path) -> list[_Entry]:
    """Return the images of a CSV export, each with its regions."""
    entries: dict[str, _Entry] = {}
    rows: csv.DictReader[str] | None = None
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        text = data.decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text.lstrip("#"), newline=""))
        if not rows.fieldnames or not set(_COLUMNS) <= set(rows.fieldnames):
            raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
        for line in rows:
            name = line["filename"]
            if name is None:
                raise ValueError("a row ends before its filename")
            entry = entries.setdefault(name, _Entry(filename=name, regions=[]))
            shape, attributes = (json.loads(line[column] or "{}") for column in _COLUMNS[1:])
            if shape and isinstance(entry.regions, list):
                entry.regions.append({"shape_attributes": shape, "region_attributes": attributes})
    except (ValueError, csv.Error, RecursionError, KeyError, TypeError) as error:
        line_number = "" if rows is None else f", line {rows.line_num}"
        raise DataError(
            f"{source} is not a CSV export of VIA{line_number}: {error}", hint=_HINT, path=source
        ) from error
    finally:
        csv.field_size_limit(limit)
    return list(entries.values())
