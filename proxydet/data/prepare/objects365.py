"""Objects365: the misspelt class names set right, so that they mean something to a text encoder."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec

from proxydet.data.formats.coco import read_outline
from proxydet.data.prepare.json_files import categories_of, write_annotation_file
from proxydet.errors import DataError


def write_with_fixed_names(source: Path, fixes: Path, target: Path) -> int:
    """Write a copy of an annotation file with other category names.

    Args:
        source: Objects365 annotations, such as ``zhiyuan_objv2_val.json``.
        fixes: Rows ``id,old name,new name``, one for each category.
        target: The copy.

    Returns:
        How many names were changed.

    Raises:
        DataError: a file cannot be read, or a category has neither the old nor the new name of its row.
    """
    document = read_outline(source)
    names = _read_fixes(fixes)
    changed = 0
    categories = []
    for category in categories_of(document.categories, source):
        row = names.get(category["id"])
        if row is None or category.get("name") not in row:
            raise DataError(
                f"{source}: category {category['id']} is called {category.get('name')!r}, "
                f"but {fixes.name} says {row[0] if row else 'nothing of it'!r}",
                hint="the two files belong to different releases",
                path=source,
            )
        new = row[1]
        changed += category["name"] != new
        categories.append(msgspec.Raw(msgspec.json.encode(category | {"name": new})))
    write_annotation_file(target, document.images, document.annotations, categories)
    return changed


def _read_fixes(path: Path) -> dict[int, tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        return {int(identity): (old, new) for identity, old, new in rows}
    except FileNotFoundError as error:
        raise DataError(
            f"there is no table of names {path}",
            hint="get it with: proxydet download metadata",
            path=path,
        ) from error
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(
            f"{path} does not hold rows of id, old and new name: {error}",
            hint="fetch the file again: proxydet download objects365-name-fixes",
            path=path,
        ) from error
