"""Reading and writing Label Studio: JSON (and JSON-MIN) exports of tasks, numbers in percent of the image."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.formats.collected import (
    LARGEST_MASK,
    MOST_RUNS,
    Ellipse,
    Objects,
    decode_json,
    flat_points,
    number,
    numbers,
    paste,
    read_bytes,
    scaled,
    size_of,
    turned_box,
)
from proxydet.data.images import image_sizes, readable_suffixes
from proxydet.data.records import AnnotationSource, Document, StoreReport

_LARGEST_FILE = 512 << 20
_HINT = "export the project from Label Studio as JSON, JSON-MIN, COCO or YOLO"
_IMAGE_KEYS = ("image", "img", "photo", "ocr", "url")
_MOST_PARTS = 10
"""Of an image's path that is on this machine under another folder."""
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
_BOX, _OUTLINE = "rectanglelabels", "polygonlabels"
_BRUSH, _ELLIPSE = "brushlabels", "ellipselabels"
_KINDS = {"rle": _BRUSH, "points": _OUTLINE, "radiusX": _ELLIPSE, "height": _BOX}


class _Annotation(msgspec.Struct):
    result: list[dict[str, Any]] = []
    was_cancelled: bool | None = None
    ground_truth: bool | None = None
    created_at: Any = None


def read(source: AnnotationSource, report: StoreReport) -> Document:
    """Read an export. Of several annotations of a task the ground truth is used, else the newest that was submitted.

    Raises:
        DataError: the file cannot be read, or is not such an export.
    """
    path, kind = source.annotations, list[dict[str, Any]]
    data = read_bytes(path, _LARGEST_FILE, _HINT)
    records = decode_json(data, kind, path, "an export of Label Studio", _HINT)
    tasks = [_opened(record) for record in records]
    predicted = not any(submitted for _, submitted, _ in tasks) and any(p for _, _, p in tasks)
    if predicted:
        report.count("file.predictions", [f"{len(tasks)} tasks"])
    names: list[str] = []
    results: list[list[dict[str, Any]]] = []
    given: list[tuple[int, int] | None] = []
    for position, (name, submitted, predictions) in enumerate(tasks):
        listed = predictions if predicted else submitted
        if not listed:
            report.count("image.unannotated", [name or f"task {position}"])
            continue
        if len(listed) > 1:
            report.count("image.annotations", [name])
        true = [annotation for annotation in listed if annotation.ground_truth]
        newest = max(true or listed, key=lambda entry: str(entry.created_at or ""))
        names.append(_on_disk(name, source.roots))
        results.append(newest.result)
        sizes = (size_of(r.get("original_height"), r.get("original_width")) for r in newest.result)
        given.append(next((size for size in sizes if size and min(size) >= 1), None))
    found = Objects()
    turned: list[str] = []
    measured = image_sizes(names, given, source.roots)
    for name, result, size in zip(names, results, measured, strict=True):
        found.image(name, size, "image.file")
        found.begin(name)
        for region in _regions(result):
            _add(found, name, region, size or (1, 1), turned)
    report.count("annotation.rotation", turned)
    return found.document("Label Studio JSON", "region")


def _opened(record: dict[str, Any]) -> tuple[str, list[_Annotation], list[_Annotation]]:
    """Return the image of a task, its submitted annotations, and its predictions; of JSON-MIN its one annotation."""
    if isinstance(record.get("data"), dict):
        finished = "annotations" if record.get("annotations") else "completions"
        submitted, predictions = (_annotations(record.get(k)) for k in (finished, "predictions"))
        return _image_name(record["data"]), submitted, predictions
    results = [
        {"type": kind, "value": value, **value}
        for values in record.values()
        if isinstance(values, list)
        for value in values
        if isinstance(value, dict) and (kind := _kind(value))
    ]
    return _image_name(record), [_Annotation(result=results)], []


def _annotations(listed: object) -> list[_Annotation]:
    """Return those of a list that can be read and were not cancelled."""
    found: list[_Annotation] = []
    for item in listed if isinstance(listed, list) else ():
        with suppress(msgspec.ValidationError):
            found.append(msgspec.convert(item, _Annotation))
    return [annotation for annotation in found if not annotation.was_cancelled]


def _image_name(fields: dict[str, Any]) -> str:
    """Return the image that a task's data name: the path of an upload, of local files or of an address."""
    texts = {key: value for key, value in fields.items() if isinstance(value, str) and value}
    for key in sorted(texts, key=lambda key: (key.lower() not in _IMAGE_KEYS, key)):
        try:
            parts = urlsplit(texts[key])
        except ValueError:
            continue
        query = parse_qs(parts.query, errors="surrogateescape")
        local = query.get("d", [""])[0] if "local-files" in parts.path else ""
        place = local or unquote(parts.path, errors="surrogateescape")
        name = place.replace("\\", "/").lstrip("/")
        if PurePosixPath(name).suffix.lower() in readable_suffixes() or key.lower() in _IMAGE_KEYS:
            return name
    return ""


def _on_disk(name: str, folders: Sequence[Path]) -> str:
    """Return as much of an image's path as leads to a file below one of the folders, the whole one where none does.

    An upload's name has eight digits in front, which its file may be without.
    """
    parts = PurePosixPath(name).parts
    starts = range(max(len(parts) - _MOST_PARTS, 0), len(parts))
    tails = [PurePosixPath(*parts[start:]) for start in starts]
    if tails and _UPLOAD.match(tails[-1].name):
        tails.append(PurePosixPath(_UPLOAD.sub("", tails[-1].name)))
    there = (t for t in tails if any(os.path.isfile(folder / t) for folder in folders))  # noqa: PTH113
    return str(next(there, name))


def _regions(result: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the value of each region; shape and labels of one id belong together."""
    merged: dict[object, dict[str, Any]] = {}
    for position, part in enumerate(result):
        value = part.get("value")
        own = part.get("id")
        if isinstance(value, dict):
            merged.setdefault(own if isinstance(own, str) else position, {}).update(value)
    yield from (value for value in merged.values() if _kind(value))


def _kind(value: dict[str, Any]) -> str:
    """Return what a value is the geometry of; empty where it is none."""
    for key, kind in _KINDS.items():
        if key in value:
            return kind
    return "other" if "x" in value or "vertices" in value else ""


def _add(
    found: Objects, image: str, value: dict[str, Any], size: tuple[int, int], turned: list[str]
) -> None:
    listed = next((value[key] for key in value if key.endswith("labels") and value[key]), None)
    label = str(listed[0]) if isinstance(listed, list) else ""
    kind = _kind(value)
    degrees = number(value.get("rotation")) or 0.0
    if kind == _BOX:
        percent = numbers([value.get(key) for key in ("x", "y", "width", "height")])
        box: Sequence[float] | None = None
        if percent:
            x, y, w, h = scaled(percent, size, 100)
            box = (x, y, x + w, y + h)
            if degrees:
                turned.append(f"a box of {image}")
                box = turned_box(box, degrees, (x, y))
        found.add(image, label, box=box)
    elif kind == _OUTLINE:
        outline = scaled(flat_points(value.get("points")) or (), size, 100)
        found.add(image, label, polygons=[outline])
    elif kind == _ELLIPSE:
        percent = numbers([value.get(key) for key in ("x", "y", "radiusX", "radiusY")])
        outlines = [Ellipse(degrees, *scaled(percent, size, 100))] if percent else None
        found.add(image, label, polygons=outlines)
    elif kind == _BRUSH:
        mask_HW = decode_brush(value.get("rle"), size)
        counts = None if mask_HW is None else paste(mask_HW, 0, 0, size)
        found.add(image, label, counts=counts, size=size)
    else:
        found.drop("annotation.shape")


# --- Brush strokes: thi.ng's run-length code of RGBA pixels --------------------------------------------------------------

_WORD = 8
_LENGTHS = (3, 4, 8, 16)
"""Bits of the four sizes in which the length of a run may be written, as Label Studio writes them."""


def decode_brush(values: object, size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """Return the mask of brush strokes, bool (H, W); None where the bytes are not such a code of an image of that size.

    Nor is noise read: a code of more than `MOST_RUNS` blocks.

    The code: the count of values (32 bits), bits of a value less 1 (5), bits of each of four kinds of lengths less 1 (4 each); then
    blocks: whether it is a run (1), which kind of length (2), the length less 1, and one value, or as many as the length.

    Args:
        values: Bytes, as a list of numbers.
        size: Height and width of the image.
    """
    pixels = size[0] * size[1]
    if not isinstance(values, list) or pixels > LARGEST_MASK or len(values) > 6 * pixels + 64:
        return None
    try:
        bits = np.unpackbits(np.array(values, dtype=np.int64).astype(np.uint8, casting="unsafe"))
    except (ValueError, TypeError, OverflowError):
        return None
    text = bits.tobytes().translate(bytes.maketrans(b"\0\1", b"01"))
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(text[place - count : place], 2)

    try:
        if take(32) != 4 * pixels or take(5) + 1 != _WORD:
            return None
        lengths = [take(4) + 1 for _ in range(4)]
        # Of the four values of a pixel only the last counts.
        mask_HW = np.zeros(pixels, dtype=np.bool_)
        at = blocks = 0
        while at < 4 * pixels:
            blocks += 1
            if blocks > MOST_RUNS:  # noise: its mask would have more runs than are kept
                return None
            run = take(1)
            end = at + 1 + take(lengths[take(2)])
            if end > 4 * pixels:
                return None
            if run:
                mask_HW[at // 4 : end // 4] = take(_WORD) > 0
            else:
                literal = bits[place : place + _WORD * (end - at)]
                if len(literal) < _WORD * (end - at):
                    return None
                mask_HW[at // 4 : end // 4] = np.packbits(literal)[3 - at % 4 :: 4] > 0
                place += _WORD * (end - at)
            at = end
    except ValueError:  # the bits end before the image does
        return None
    return mask_HW.reshape(size)


def encode_brush(mask_HW: npt.NDArray[np.bool_]) -> list[int]:
    """Return a mask, bool (H, W), as Label Studio writes brush strokes: bytes of the code that `decode_brush` reads."""
    flat = mask_HW.reshape(-1)
    cuts = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *cuts.tolist(), len(flat)]
    most = 1 << _LENGTHS[-1]
    bits = [f"{4 * len(flat):032b}{_WORD - 1:05b}", *(f"{length - 1:04b}" for length in _LENGTHS)]
    for start, end in itertools.pairwise(bounds):
        value = 255 if len(flat) and flat[start] else 0
        left = 4 * (end - start)
        while left > 0:
            length = min(left, most)
            kind = next(k for k, size in enumerate(_LENGTHS) if length <= 1 << size)
            bits.append(f"1{kind:02b}{length - 1:0{_LENGTHS[kind]}b}{value:08b}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


# --- Writing -------------------------------------------------------------------------------------------------------------


def region(
    label: str,
    score: float,
    box: Sequence[float],
    mask_HW: npt.NDArray[np.bool_] | None,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Return a prediction of an object as a region: brush strokes where it has a mask, else a box.

    Args:
        label: Its class.
        score: From 0 to 1.
        box: Left, top, right, bottom in pixels.
        mask_HW: bool (H, W).
        size: Height and width of the image.
    """
    height, width = size
    left, top, right, bottom = box
    if mask_HW is None:
        kind, name = _BOX, "box"
        value: dict[str, Any] = {
            "x": 100 * left / width,
            "y": 100 * top / height,
            "width": 100 * (right - left) / width,
            "height": 100 * (bottom - top) / height,
            "rotation": 0,
        }
    else:
        kind, name = _BRUSH, "brush"
        value = {"format": "rle", "rle": encode_brush(mask_HW)}
    sizes = {"original_width": width, "original_height": height, "image_rotation": 0}
    drawn = {"from_name": name, "to_name": "image", "type": kind, **sizes}
    return {**drawn, "score": score, "value": {**value, kind: [label]}}


def task(image: str, regions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a task whose predictions can be corrected.

    Args:
        image: URL of the image, or its absolute path: it is served by Label Studio's local files below the root folder.
        regions: As of `region`.
    """
    score = sum(entry["score"] for entry in regions) / max(len(regions), 1)
    served = f"/data/local-files/?d={quote(os.fsencode(image.lstrip('/')))}"
    result = [{"id": f"object-{index}", **entry} for index, entry in enumerate(regions)]
    return {
        "data": {"image": image if "://" in image else served},
        "predictions": [{"model_version": "proxydet", "score": score, "result": result}],
    }


def labeling_config(names: Sequence[str]) -> str:
    """Return the labeling interface (XML) that tasks of `task` need."""
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    tags = "".join(
        f'  <{tag} name="{name}" toName="image">\n{labels}  </{tag}>\n'
        for tag, name in (("RectangleLabels", "box"), ("BrushLabels", "brush"))
    )
    return f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{tags}</View>\n'
