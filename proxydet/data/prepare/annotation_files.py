"""Annotation files made from published ones. What is not touched stays as it was, byte for byte."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from proxydet.data.formats.coco import Outline, read_outline
from proxydet.errors import DataError
from proxydet.files import staged, write_bytes, write_errors

SEEN = tuple(
    """person; bicycle; car; motorcycle; train; truck; boat; bench; bird; horse; sheep; bear; zebra; giraffe;
    backpack; handbag; suitcase; frisbee; skis; kite; surfboard; bottle; fork; spoon; bowl; banana; apple; sandwich;
    orange; broccoli; carrot; pizza; donut; chair; bed; toilet; tv; laptop; mouse; remote; microwave; oven; toaster;
    refrigerator; book; clock; vase; toothbrush""".replace("\n    ", " ").split("; ")
)
"""The 48 training classes of COCO's zero-shot split, that of Bansal et al. (ECCV 2018)."""

UNSEEN = tuple(
    """airplane; bus; cat; dog; cow; elephant; umbrella; tie; snowboard; skateboard; cup; knife; cake; couch; keyboard;
    sink; scissors""".replace("\n    ", " ").split("; ")
)
"""Its 17 novel classes. The other 15 of COCO are not used."""

T = TypeVar("T")


class _Owners(msgspec.Struct, frozen=True):
    image_id: int
    category_id: int


class _Image(msgspec.Struct, frozen=True):
    id: int


class _Category(msgspec.Struct, frozen=True):
    id: int
    name: str
    frequency: str | None = None


def write_without_rare(source: Path, target: Path) -> int:
    """Write a copy of an LVIS file without the annotations of rare categories; images and categories stay.

    Args:
        source: LVIS annotations, such as ``lvis_v1_train.json``.
        target: The copy, such as ``lvis_v1_train_norare.json``.

    Returns:
        How many annotations were left out.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    outline = read_outline(source)
    rare = {c.id for _, c in _lvis_categories(outline, source) if c.frequency == "r"}
    annotations = _decoded(outline.annotations, _Owners, "annotation", source)
    kept = [raw for raw, owners in annotations if owners.category_id not in rare]
    _write(target, outline.images, kept, outline.categories)
    return len(outline.annotations) - len(kept)


def write_category_info(source: Path, target: Path, *, with_rare: bool) -> None:
    """Write the categories of an LVIS file with their counts, as the published ``lvis_v1_train_cat_info.json``.

    Args:
        source: LVIS annotations.
        target: A JSON list of the categories with ``image_count`` and ``instance_count``.
        with_rare: False counts 0 for rare categories. The published file counts them, which tells the federated loss how
            frequent categories are that training is not supposed to know.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    outline = read_outline(source)
    categories = _lvis_categories(outline, source)
    pairs: set[tuple[int, int]] = set()
    instances: Counter[int] = Counter()
    for _, owners in _decoded(outline.annotations, _Owners, "annotation", source):
        pairs.add((owners.image_id, owners.category_id))
        instances[owners.category_id] += 1
    images = Counter(category for _, category in pairs)
    rows = []
    for raw, category in sorted(categories, key=lambda entry: entry[1].id):
        counted = with_rare or category.frequency != "r"
        counts = {
            "image_count": images[category.id] if counted else 0,
            "instance_count": instances[category.id] if counted else 0,
        }
        rows.append(msgspec.json.decode(raw, type=dict[str, Any]) | counts)
    write_bytes(target, msgspec.json.encode(rows))


def write_with_fixed_names(source: Path, fixes: Path, target: Path) -> int:
    """Write a copy of an annotation file with other category names, those that mean something to a text encoder.

    Args:
        source: Objects365 annotations, such as ``zhiyuan_objv2_val.json``.
        fixes: Rows ``id,old name,new name``, one for each category.
        target: The copy.

    Returns:
        How many names were changed.

    Raises:
        DataError: a file cannot be read, or a category has neither the old nor the new name of its row.
    """
    outline = read_outline(source)
    try:
        with fixes.open(encoding="utf-8", newline="") as file:
            names = {int(row[0]): (row[1], row[2]) for row in csv.reader(file) if row}
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{fixes} does not hold rows of id, old and new name: {error}",
            hint="fetch the file again: proxydet download objects365-name-fixes",
            path=fixes,
        ) from error
    changed = 0
    categories = []
    for raw, category in _decoded(outline.categories, _Category, "category", source):
        row = names.get(category.id)
        if row is None or category.name not in row:
            raise DataError(
                f"{source}: category {category.id} is called {category.name!r}, "
                f"but {fixes.name} has {row[0] if row else 'no row for it'!r}",
                hint="the two files belong to different releases",
                path=source,
            )
        changed += category.name != row[1]
        renamed = msgspec.json.decode(raw, type=dict[str, Any]) | {"name": row[1]}
        categories.append(msgspec.Raw(msgspec.json.encode(renamed)))
    _write(target, outline.images, outline.annotations, categories)
    return changed


def write_classes(source: Path, target: Path, names: Collection[str]) -> tuple[int, int]:
    """Write the part of a COCO file that has annotations of some classes; all categories stay, in their order.

    Args:
        source: COCO annotations, such as ``instances_train2017.json``.
        target: The part.
        names: Classes to keep.

    Returns:
        How many images and annotations it holds.

    Raises:
        DataError: the file cannot be read, or a class is not in it.
    """
    outline = read_outline(source)
    categories = _decoded(outline.categories, _Category, "category", source)
    id_of = {category.name: category.id for _, category in categories}
    if missing := sorted(set(names) - id_of.keys()):
        raise DataError(
            f"{source} has no category {missing[0]!r}; it is not COCO's",
            hint="give COCO 2017's instances_train2017.json or instances_val2017.json",
            path=source,
        )
    chosen = {id_of[name] for name in names}
    kept, image_ids = [], set()
    for raw, owners in _decoded(outline.annotations, _Owners, "annotation", source):
        if owners.category_id in chosen:
            kept.append(raw)
            image_ids.add(owners.image_id)
    listed = _decoded(outline.images, _Image, "image", source)
    images = [raw for raw, image in listed if image.id in image_ids]
    _write(target, images, kept, outline.categories)
    return len(images), len(kept)


def _lvis_categories(outline: Outline, source: Path) -> list[tuple[msgspec.Raw, _Category]]:
    categories = list(_decoded(outline.categories, _Category, "category", source))
    if any(category.frequency is None for _, category in categories):
        raise DataError(
            f"{source} is not in LVIS format: its categories have no 'frequency'",
            hint="give LVIS v1's annotation file",
            path=source,
        )
    return categories


def _decoded(
    raws: Iterable[msgspec.Raw], kind: type[T], what: str, source: Path
) -> Iterator[tuple[msgspec.Raw, T]]:
    decoder = msgspec.json.Decoder(kind)
    for position, raw in enumerate(raws):
        try:
            yield raw, decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(
                f"{source}: {what} {position} is not usable: {error}",
                hint="correct it, or fetch the file again",
                path=source,
            ) from error


def _write(
    target: Path,
    images: Iterable[msgspec.Raw],
    annotations: Iterable[msgspec.Raw],
    categories: Iterable[msgspec.Raw],
) -> None:
    lists = {"images": images, "annotations": annotations, "categories": categories}
    with staged(target) as path, write_errors(target), path.open("wb", 1 << 20) as file:
        for number, (name, records) in enumerate(lists.items()):
            file.write(b"{" if number == 0 else b",\n")
            file.write(f'"{name}": ['.encode())
            for position, record in enumerate(records):
                file.write(b",\n" if position else b"\n")
                file.write(record)
            file.write(b"\n]")
        file.write(b"}\n")
