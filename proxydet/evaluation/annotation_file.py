"""The annotation file as evaluation reads it: COCO's layout, LVIS's and OpenImages' additions included.

Training reads annotations through the column store of :mod:`proxydet.data`; evaluation reads the file itself, because
what is scored against must be exactly what the file says: nothing repaired, nothing dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from proxydet.errors import DataError
from proxydet.evaluation.json_input import damaged_json, first_offenders, read_bytes

Identifier: TypeAlias = int | str


class ImageRow(msgspec.Struct, gc=False):
    """One entry of ``images``; sizes in pixels."""

    id: Identifier
    height: int
    width: int
    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[Identifier] | None = None
    not_exhaustive_category_ids: list[Identifier] | None = None
    pos_category_ids: list[Identifier] | None = None


class AnnotationRow(msgspec.Struct, gc=False):
    """One entry of ``annotations``; the box is x, y, width, height in pixels."""

    image_id: Identifier
    category_id: Identifier
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0
    ignore: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class CategoryRow(msgspec.Struct, gc=False):
    """One entry of ``categories``."""

    id: Identifier
    name: str
    frequency: str | None = None
    image_count: int | None = None
    synset: str | None = None
    freebase_id: str | None = None


class AnnotationFile(msgspec.Struct, gc=False):
    """A whole annotation file; other keys are ignored."""

    images: list[ImageRow]
    annotations: list[AnnotationRow]
    categories: list[CategoryRow]


def read_annotation_file(source: Path | dict[str, Any]) -> AnnotationFile:
    """Read and check an annotation file.

    Args:
        source: A JSON file, plain or gzipped, or the same as Python values.

    Returns:
        The file's rows in their order.

    Raises:
        DataError: The file is unreadable, damaged or of another layout, an identifier is there twice, or an
            annotation names an image or a category that the file does not have.
    """
    path = source if isinstance(source, Path) else None
    data = b""
    try:
        data = read_bytes(source) if isinstance(source, Path) else msgspec.json.encode(source)
        rows = msgspec.json.decode(data, type=AnnotationFile)
    except (msgspec.MsgspecError, TypeError) as error:
        if isinstance(error, TypeError):
            raise DataError(
                f"The annotations given cannot be written as JSON: {error}.",
                hint="give COCO or LVIS annotations: dictionaries and lists of numbers and texts",
            ) from error
        raise damaged_json(
            path,
            error,
            what="an annotation file in COCO's or LVIS's format",
            hint="it needs images, annotations and categories; a results file goes with --results",
            length=len(data),
        ) from error
    _check(rows, path)
    return rows


def _check(rows: AnnotationFile, path: Path | None) -> None:
    where = str(path) if path is not None else "The annotations given"
    if not rows.images or not rows.categories:
        missing = "images" if not rows.images else "categories"
        raise DataError(
            f"{where} lists no {missing}: there is nothing to evaluate on.",
            hint="check that it is the split that you mean",
            path=path,
        )
    images = _unique([row.id for row in rows.images], "image", where, path)
    categories = _unique([row.id for row in rows.categories], "category", where, path)
    for key, known in (("image_id", images), ("category_id", categories)):
        unknown = [
            (index, getattr(row, key))
            for index, row in enumerate(rows.annotations)
            if getattr(row, key) not in known
        ]
        if unknown:
            shown = first_offenders(
                [f"annotations[{index}]: {value!r}" for index, value in unknown]
            )
            raise DataError(
                f"{where}: {len(unknown)} annotations have a value of {key} that the file does not list ({shown}).",
                hint="check the annotation file with: proxydet data check",
                path=path,
            )
    wrong = [row.id for row in rows.images if row.width <= 0 or row.height <= 0]
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} images have no size (ids {first_offenders(wrong)}).",
            hint="give every image its height and width",
            path=path,
        )


def _unique(ids: list[Identifier], what: str, where: str, path: Path | None) -> set[Identifier]:
    known: set[Identifier] = set()
    twice = [value for value in ids if value in known or known.add(value)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(
            f"{where}: {len(twice)} {what} ids are there more than once ({first_offenders(twice)}).",
            hint="give each an id of its own",
            path=path,
        )
    if len({type(value) for value in known}) > 1:
        raise DataError(
            f"{where}: some {what} ids are numbers and some are text; they must be of one kind.",
            hint="make them all numbers, as COCO and LVIS do",
            path=path,
        )
    return known
