"""OpenImages: the challenge's tables turned into one COCO-format file, with the class hierarchy expanded.

A box of a class is also a box of each class above it; a class that is confirmed in an image confirms those above it; one
that is ruled out rules out those below it (the challenge's own rule).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.advice import how_to_get
from proxydet.data.images import image_size
from proxydet.data.prepare.json_files import replacing
from proxydet.errors import DataError
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


@dataclass(frozen=True)
class Hierarchy:
    """Which classes are above and below each.

    Attributes:
        above: For each label, all labels above it.
        below: For each label, all labels below it.
    """

    above: Mapping[str, frozenset[str]]
    below: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, path: Path) -> Hierarchy:
        """Read the challenge's tree; a label may stand in several places.

        Raises:
            DataError: the file is absent or not such a tree.
        """
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
        except FileNotFoundError as error:
            raise DataError(
                f"there is no class hierarchy {path}",
                hint="run: proxydet download openimages-hierarchy",
                path=path,
            ) from error
        except (
            msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError,
            KeyError, TypeError, AttributeError,
        ) as error:  # fmt: skip
            raise DataError(
                f"{path} is not a class hierarchy: {error!r}",
                hint="fetch the file again",
                path=path,
            ) from error
        below: dict[str, set[str]] = {label: set() for label in above}
        for label, ancestors_of_label in above.items():
            for ancestor in ancestors_of_label:
                below[ancestor].add(label)
        return cls(
            {label: frozenset(labels) for label, labels in above.items()},
            {label: frozenset(labels) for label, labels in below.items()},
        )


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
    classes = _read_classes(tables.classes)
    hierarchy = Hierarchy.read(tables.hierarchy)
    expander = _Expander(classes, hierarchy)
    positive, negative = _read_image_labels(tables.image_labels, expander)
    boxes = list(_read_boxes(tables.boxes, expander))
    names = sorted(positive.keys() | negative.keys() | {box.image for box in boxes})
    sizes = _read_sizes(names, images, progress)
    ids = {name: number for number, name in enumerate(names, 1)}
    content = {
        "images": [
            {
                "id": ids[name],
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "pos_category_ids": sorted(positive.get(name, ())),
                "neg_category_ids": sorted(negative.get(name, ())),
            }
            for name, (height, width) in zip(names, sizes, strict=True)
        ],
        "annotations": _annotations(boxes, ids, dict(zip(names, sizes, strict=True))),
        "categories": [
            {"id": expander.id_of[label], "name": name, "freebase_id": label}
            for label, name in classes.items()
        ],
    }
    with replacing(target) as file:
        file.write(msgspec.json.encode(content))
    return len(names), len(content["annotations"])


@dataclass(frozen=True)
class _Box:
    image: str
    categories: tuple[int, ...]
    corners: tuple[float, float, float, float]
    group: bool


class _Expander:
    def __init__(self, classes: Mapping[str, str], hierarchy: Hierarchy) -> None:
        self.id_of = {label: number for number, label in enumerate(classes, 1)}
        self._hierarchy = hierarchy

    def upwards(self, label: str) -> tuple[int, ...]:
        """The class and those above it, without those that are no classes of the challenge (the tree's root)."""
        return self._known(label, self._hierarchy.above)

    def downwards(self, label: str) -> tuple[int, ...]:
        return self._known(label, self._hierarchy.below)

    def _known(self, label: str, related: Mapping[str, frozenset[str]]) -> tuple[int, ...]:
        ids = {self.id_of[other] for other in related.get(label, ()) if other in self.id_of}
        return (self.id_of[label], *sorted(ids - {self.id_of[label]}))


def _read_classes(path: Path) -> dict[str, str]:
    classes: dict[str, str] = {}
    for number, row in enumerate(_rows(path), 1):
        # A row left out would shift the numbers of all classes behind it.
        if len(row) != 2 or row[0] in classes:
            raise DataError(
                f"{path}, row {number}: not a label of its own and a name",
                hint="fetch the file again",
                path=path,
            )
        classes[row[0]] = row[1]
    return classes


def _read_boxes(path: Path, expander: _Expander) -> Iterator[_Box]:
    columns = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
    for number, (image, label, *values) in enumerate(_columns(path, columns), 2):
        try:
            x1, x2, y1, y2, group = (float(value) for value in values)
            yield _Box(image, expander.upwards(label), (x1, y1, x2, y2), group == 1)
        except (KeyError, ValueError) as error:
            raise _bad_row(path, number, error) from error


def _read_image_labels(
    path: Path, expander: _Expander
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    positive: dict[str, set[int]] = {}
    negative: dict[str, set[int]] = {}
    for number, (image, label, confidence) in enumerate(
        _columns(path, ("ImageID", "LabelName", "Confidence")), 2
    ):
        try:
            confirmed = float(confidence) == 1
            ids = expander.upwards(label) if confirmed else expander.downwards(label)
        except (KeyError, ValueError) as error:
            raise _bad_row(path, number, error) from error
        (positive if confirmed else negative).setdefault(image, set()).update(ids)
    return positive, negative


def _annotations(
    boxes: Sequence[_Box], ids: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for box in boxes:
        height, width = sizes[box.image]
        x1, y1, x2, y2 = box.corners
        bbox = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
        for category in box.categories:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids[box.image],
                    "category_id": category,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": int(box.group),
                }
            )
    return annotations


def _read_sizes(names: Sequence[str], images: Path, progress: Progress) -> list[tuple[int, int]]:
    sizes = []
    with (
        progress.task("reading image sizes", total=len(names), unit="images") as task,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        for size in pool.map(lambda name: _size(images / f"{name}.jpg"), names):
            sizes.append(size)
            task.advance()
    return sizes


def _size(path: Path) -> tuple[int, int]:
    try:
        return image_size(path)
    except DataError as error:
        raise DataError(error.message, hint=how_to_get(path) or error.hint, path=path) from error


def _columns(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    rows = _rows(path)
    header = next(rows, [])
    if not set(names) <= set(header):
        missing = next(name for name in names if name not in header)
        raise DataError(
            f"{path} has no column {missing!r}",
            hint="give the table as OpenImages publishes it",
            path=path,
        )
    places = [header.index(name) for name in names]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number}: {len(row)} values, not {len(header)}",
                hint="fetch the file again",
                path=path,
            )
        yield tuple(row[place] for place in places)


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.reader(file) if row)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no table {path}",
            hint="get it with: proxydet download openimages-val",
            path=path,
        ) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read the table {path}: {error}", hint="fetch the file again", path=path
        ) from error


def _bad_row(path: Path, number: int, error: Exception) -> DataError:
    why = (
        f"the class {error} is not one of the challenge"
        if isinstance(error, KeyError)
        else str(error)
    )
    return DataError(f"{path}, row {number}: {why}", hint="fetch the file again", path=path)
