"""Reading CVAT's own XML ("CVAT for images 1.1"): one file for all images, shapes in pixels, labels by name."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from proxydet.data.formats.collected import (
    LARGEST_MASK,
    MOST_RUNS,
    Ellipse,
    Objects,
    number,
    numbers,
    part_of_word,
    paste,
    refuse_entities,
    size_of,
    turned_box,
)
from proxydet.data.records import AnnotationSource, Document, StoreReport
from proxydet.errors import DataError
from proxydet.files import open_regular, read_errors, refuse_placeholder

_LARGEST_FILE = 2 << 30
_HINT = "export the task from CVAT as 'CVAT for images 1.1', 'COCO 1.0' or 'Ultralytics YOLO Detection 1.0'"
_MOST_ELEMENTS = 2_000_000
"""Elements of one image: a file with more is not CVAT's, and would fill the memory."""
_HEAD = 1 << 16


def parts(source: Path) -> list[str]:
    """Return the subsets of a project's export, in the file's order, empty for images of none; no subsets of a task's export.

    Its head lists subsets without saying whether images have none, so the file is read to its end: once where a path is searched
    for parts, not where a dataset config names one.
    """
    found = {image.get("subset") or "": None for image in _images(source, {})}
    return [] if list(found) == [""] else list(found)


def read(source: AnnotationSource, report: StoreReport) -> Document:
    """Read an XML file; ``part`` is a subset, or ``train``, ``val`` or ``test`` for all with a word for it.

    Raises:
        DataError: the file cannot be read, or is not such XML.
    """
    found = Objects()
    labels: dict[str, None] = {}
    turned: list[str] = []
    for image in _images(source.annotations, labels):
        subset = image.get("subset") or ""
        if source.part not in (None, subset, part_of_word(subset)):
            continue
        name = (image.get("name") or "").replace("\\", "/")
        size = size_of(image.get("height"), image.get("width"))
        found.image(name, size)
        found.begin(name)
        for position, shape in enumerate(image, 1):
            label, kind = shape.get("label") or "", shape.tag
            degrees = number(shape.get("rotation")) or 0.0
            if kind == "box":
                corners = numbers([shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")])
                if corners and degrees:
                    left, top, right, bottom = corners
                    corners = list(
                        turned_box(corners, degrees, ((left + right) / 2, (top + bottom) / 2))
                    )
                    turned.append(f"shape {position} of {name}")
                found.add(name, label, box=corners)
            elif kind == "polygon":
                pairs = [point.split(",") for point in (shape.get("points") or "").split(";")]
                flat = numbers([value for pair in pairs for value in pair])
                found.add(name, label, polygons=None if flat is None else [flat])
            elif kind == "ellipse":
                values = numbers([shape.get(key) for key in ("cx", "cy", "rx", "ry")])
                found.add(name, label, polygons=[Ellipse(degrees, *values)] if values else None)
            elif kind == "mask":
                counts, around = _mask(shape, size or (0, 0))
                found.add(name, label, box=around, counts=counts, size=size or (0, 0))
            else:
                found.drop("annotation.shape")
    report.count("annotation.rotation", turned)
    return found.document("CVAT XML", "shape", labels)


def _images(source: Path, labels: dict[str, None]) -> Iterator[ElementTree.Element]:
    """Yield the elements of the images one after the other; names of labels are put into ``labels``."""
    with read_errors(source, error=DataError), open_regular(source) as file:
        head = file.read(_HEAD)
        refuse_placeholder(head)
        size = file.seek(0, 2)
        file.seek(0)
        if size > _LARGEST_FILE or b"<annotations" not in head:
            large = f"is larger than {_LARGEST_FILE >> 20} MB"
            why = large if size > _LARGEST_FILE else "is not CVAT's XML for images"
            raise DataError(f"{source} {why}", hint=_HINT, path=source)
        refuse_entities(file, source, _HINT)
        try:
            depth = count = 0
            root: ElementTree.Element | None = None
            for event, element in ElementTree.iterparse(file, ("start", "end")):  # noqa: S314 - no entities, bounded
                if event == "start":
                    root = element if root is None else root
                    depth, count = depth + 1, count + 1
                    if count > _MOST_ELEMENTS:
                        raise DataError(
                            f"{source}: an image has more than {_MOST_ELEMENTS:,} elements",
                            hint=_HINT,
                            path=source,
                        )
                    continue
                depth -= 1
                if depth != 1:
                    continue
                if element.tag == "track":
                    raise DataError(
                        f"{source} is CVAT's XML for videos: it has tracks, not images",
                        hint=_HINT,
                        path=source,
                    )
                if element.tag == "image":
                    yield element
                for label in element.iter("label") if element.tag == "meta" else ():
                    name = (label.findtext("name") or "").strip()
                    if name and not label.findtext("parent"):
                        labels[name] = None
                count = 0
                if root is not None:
                    root.clear()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DataError(f"{source} is not XML: {error}", hint=_HINT, path=source) from error


def _mask(
    shape: ElementTree.Element, size: tuple[int, int]
) -> tuple[bytes, tuple[float, ...] | None]:
    """Return the run lengths of a mask element, empty where they cannot be read, and its box.

    CVAT writes the runs of what the box holds, row by row, background first.
    """
    values = numbers([shape.get(key) for key in ("left", "top", "width", "height")])
    if values is None:
        return b"", None
    left, top, width, height = map(int, values)
    box = tuple(map(float, (left, top, left + width, top + height)))
    text = shape.get("rle") or ""
    runs = None if text.count(",") > 2 * MOST_RUNS else numbers(text.split(","))
    pixels = width * height if min(left, top, width - 1, height - 1) >= 0 else 0
    if runs is None or not 0 < pixels <= min(LARGEST_MASK, size[0] * size[1]):
        return b"", box
    if sum(runs) != pixels or not all(run >= 0 and run.is_integer() for run in runs):
        return b"", box
    crop_hw = np.repeat(np.arange(len(runs)) % 2 == 1, np.array(runs, dtype=np.int64))
    return paste(crop_hw.reshape(height, width), left, top, size) or b"", box
