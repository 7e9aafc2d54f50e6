"""OpenImages: the challenge's tables turned into one COCO-format file, with the class hierarchy expanded.

A box of a class is also a box of each class above it; a class that is confirmed in an image confirms those above it; one
that is ruled out rules out those below it (the challenge's own rule).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.advice import how_to_get
from proxydet.data.images import image_size
from proxydet.errors import DataError
from proxydet.files import write_bytes
from proxydet.reporting import SILENT, Progress

_READERS = 16


@dataclass(frozen=True, kw_only=True)
class OpenImagesTables:
    """Where the challenge's tables are."""

    boxes: Path
    """CSV: ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf."""
    image_labels: Path
    """CSV: ImageID, LabelName, Confidence (1 confirmed, 0 ruled out)."""
    classes: Path
    """CSV without header: LabelName, class name; its order numbers the categories."""
    hierarchy: Path
    """JSON: nested LabelName and Subcategory."""


def write_expanded(
    tables: OpenImagesTables, images: Path, target: Path, *, progress: Progress = SILENT
) -> tuple[int, int]:
    """Write the challenge's annotations as one COCO-format file.

    Boxes become pixels; ``IsGroupOf`` becomes ``iscrowd``; image-level labels become the images' ``pos_category_ids`` and
    ``neg_category_ids``. Images are those of either table.

    Args:
        tables: The challenge's tables.
        images: Folder of ``<ImageID>.jpg``, for their sizes.
        target: The file.
        progress: Where to show the reading of sizes.

    Returns:
        How many images and annotations it holds.

    Raises:
        DataError: a table or an image cannot be read, or a table names an unknown class.
    """
    classes: dict[str, str] = {}
    for number, row in enumerate(_rows(tables.classes), 1):
        # A row left out would shift the numbers of all classes behind it.
        if len(row) != 2 or row[0] in classes:
            raise _bad_row(tables.classes, number, "not a label of its own and a name")
        classes[row[0]] = row[1]
    id_of = {label: number for number, label in enumerate(classes, 1)}
    above, below = _hierarchy(tables.hierarchy)

    def expanded(label: str, related: dict[str, set[str]]) -> list[int]:
        # The tree's root, for one, is not a class of the challenge.
        others = {id_of[other] for other in related.get(label, ()) if other in id_of}
        return [id_of[label], *sorted(others - {id_of[label]})]

    labels: dict[bool, dict[str, set[int]]] = {True: {}, False: {}}
    for number, (image, label, confidence) in _columns(
        tables.image_labels, ("ImageID", "LabelName", "Confidence")
    ):
        try:
            confirmed = float(confidence) == 1
            ids = expanded(label, above if confirmed else below)
        except (KeyError, ValueError) as error:
            raise _bad_row(tables.image_labels, number, error) from error
        labels[confirmed].setdefault(image, set()).update(ids)
    boxes: list[tuple[str, list[int], list[float]]] = []
    for number, (image, label, *texts) in _columns(
        tables.boxes, ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
    ):
        try:
            values = [float(text) for text in texts]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"not a box: {', '.join(texts)}")
            boxes.append((image, expanded(label, above), values))
        except (KeyError, ValueError) as error:
            raise _bad_row(tables.boxes, number, error) from error
    names = sorted(labels[True].keys() | labels[False].keys() | {image for image, _, _ in boxes})
    sizes = dict(zip(names, _read_sizes(names, images, progress), strict=True))
    ids_of_images = {name: number for number, name in enumerate(names, 1)}
    annotations: list[dict[str, Any]] = []
    for image, categories, (x1, x2, y1, y2, group) in boxes:
        height, width = sizes[image]
        box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
        for category in categories:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids_of_images[image],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(group == 1),
                }
            )
    content = {
        "images": [
            {
                "id": ids_of_images[name],
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "pos_category_ids": sorted(labels[True].get(name, ())),
                "neg_category_ids": sorted(labels[False].get(name, ())),
            }
            for name, (height, width) in sizes.items()
        ],
        "annotations": annotations,
        "categories": [
            {"id": id_of[label], "name": name, "freebase_id": label}
            for label, name in classes.items()
        ],
    }
    write_bytes(target, msgspec.json.encode(content))
    return len(names), len(annotations)


def _hierarchy(path: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Read the challenge's tree: all labels above each label, and all below; a label may stand in several places."""
    above: dict[str, set[str]] = {}
    try:
        tree = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        stack: list[tuple[dict[str, Any], frozenset[str]]] = [(tree, frozenset())]
        while stack:
            node, ancestors = stack.pop()
            label = node["LabelName"]
            above.setdefault(label, set()).update(ancestors)
            children = node.get("Subcategory", [])
            stack.extend((child, ancestors | {label}) for child in children)
    except (
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError,
        KeyError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path} is not a class hierarchy: {error!r}", hint="fetch the file again", path=path
        ) from error
    below: dict[str, set[str]] = {label: set() for label in above}
    for label, ancestors_of_label in above.items():
        for ancestor in ancestors_of_label:
            below[ancestor].add(label)
    return above, below


def _read_sizes(names: list[str], images: Path, progress: Progress) -> Iterator[tuple[int, int]]:
    with (
        progress.task("reading image sizes", total=len(names), unit="images") as task,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        paths = [images / f"{name}.jpg" for name in names]
        sizes = pool.map(image_size, paths)
        for path in paths:
            try:
                yield next(sizes)
            except DataError as error:
                hint = how_to_get(path) or error.hint
                raise DataError(error.message, hint=hint, path=path) from error
            task.advance()


def _columns(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row and its values of some columns."""
    rows = _rows(path)
    header = next(rows, [])
    if missing := [name for name in names if name not in header]:
        raise DataError(
            f"{path} has no column {missing[0]!r}",
            hint="give the table as OpenImages publishes it",
            path=path,
        )
    places = [header.index(name) for name in names]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise _bad_row(path, number, f"{len(row)} values, not {len(header)}")
        yield number, [row[place] for place in places]


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.reader(file) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read the table {path}: {error}", hint="fetch the file again", path=path
        ) from error


def _bad_row(path: Path, number: int, why: object) -> DataError:
    if isinstance(why, KeyError):
        why = f"the class {why} is not one of the challenge"
    return DataError(f"{path}, row {number}: {why}", hint="fetch the file again", path=path)
