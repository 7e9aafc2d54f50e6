"""LVIS: the annotations without rare classes, and the counts of images per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.formats.coco import read_outline
from proxydet.data.prepare.json_files import categories_of, ids_of, replacing, write_annotation_file
from proxydet.errors import DataError


def write_without_frequencies(
    source: Path, target: Path, frequencies: Collection[str] = ("r",)
) -> int:
    """Write a copy of an LVIS file without the annotations of some frequency groups; images and categories stay.

    Args:
        source: LVIS annotations, such as ``lvis_v1_train.json``.
        target: The copy, such as ``lvis_v1_train_norare.json``.
        frequencies: Groups to leave out.

    Returns:
        How many annotations were left out.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    document = read_outline(source)
    left_out = {
        category["id"]
        for category in _categories(document.categories, source)
        if category["frequency"] in frequencies
    }
    kept = [raw for raw, _, c in ids_of(document.annotations, source) if c not in left_out]
    write_annotation_file(target, document.images, kept, document.categories)
    return len(document.annotations) - len(kept)


def write_category_info(source: Path, target: Path, *, with_rare: bool = True) -> None:
    """Write the categories of an LVIS file with their counts, as the published ``lvis_v1_train_cat_info.json``.

    Args:
        source: LVIS annotations.
        target: A JSON list of the categories with ``image_count`` and ``instance_count``.
        with_rare: False counts 0 for classes of frequency ``r``. The published file counts them, which tells the federated
            loss how frequent classes are that training is not supposed to know.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    document = read_outline(source)
    categories = _categories(document.categories, source)
    pairs: set[tuple[int, int]] = set()
    instances: Counter[int] = Counter()
    for _, image_id, category_id in ids_of(document.annotations, source):
        pairs.add((image_id, category_id))
        instances[category_id] += 1
    images = Counter(category_id for _, category_id in pairs)
    rows = []
    for category in sorted(categories, key=lambda c: c["id"]):
        counted = with_rare or category["frequency"] != "r"
        rows.append(
            category
            | {
                "image_count": images[category["id"]] if counted else 0,
                "instance_count": instances[category["id"]] if counted else 0,
            }
        )
    with replacing(target) as file:
        file.write(msgspec.json.encode(rows))


def _categories(raws: list[msgspec.Raw], source: Path) -> list[dict[str, Any]]:
    categories = categories_of(raws, source)
    if not all("frequency" in category for category in categories):
        raise DataError(
            f"{source} is not in LVIS format: its categories have no 'frequency'",
            hint="give LVIS v1's annotation file",
            path=source,
        )
    return categories
