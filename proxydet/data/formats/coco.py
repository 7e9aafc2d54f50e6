"""Reading COCO, LVIS and OpenImages JSON: an object with the lists ``images``, ``annotations`` and ``categories``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from proxydet.data.deviations import StoreReport, refused
from proxydet.data.formats.reader import (
    LABEL_LISTS,
    MOST_CATEGORIES,
    AnnotationEntry,
    CategoryEntry,
    Document,
    Flaw,
    ImageEntry,
    JsonText,
    identifier,
    owners,
)
from proxydet.data.masks import are_numbers
from proxydet.errors import DataError


def is_file(head: bytes) -> bool:
    """Whether JSON that begins so looks like COCO's."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start[:1] == b"{" and (
        b'"images"' in head or start[1:].lstrip().startswith(b'"annotations"')
    )


@dataclass(frozen=True)
class Outline:
    """The three lists of an annotation file, each record as its JSON text."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


class _Lists(msgspec.Struct, frozen=True):
    images: msgspec.Raw
    categories: msgspec.Raw
    annotations: msgspec.Raw = msgspec.Raw(b"[]")


def read(source: Path | bytes, name: str, report: StoreReport) -> Document:
    """Open an annotation file; it stays mapped as long as one of its records is held.

    Args:
        source: A file, plain or gzipped, or its bytes.
        name: What to call it in messages.
        report: Where deviations of the file and of its categories are counted.

    Raises:
        DataError: the file is absent, empty, not JSON (with line and column), not in COCO's layout, or its categories
            cannot be used.
    """
    text, lists = _opened(source, name, report)

    def records(kind: type[Any], loosely: Any, of: str, field: str) -> Iterator[list[Any]]:
        lenient = partial(loosely, report)
        raw = getattr(lists, field)
        return text.records(kind, lenient, f"{of}.record", text=raw, field=field)

    first = bytes(memoryview(lists.annotations)[: 1 << 20]).split(b"}", 1)[0]
    if b'"segments_info"' in first:
        raise DataError(
            f"{name} holds panoptic annotations (segments_info), not objects",
            hint="convert it to COCO's object format (panopticapi has a converter), or name the instances file",
            path=text.path,
        )

    # One more than is taken, so that the store can refuse them without reading them all.
    found = chain.from_iterable(records(CategoryEntry, _loose_category, "category", "categories"))
    categories = [*islice(found, MOST_CATEGORIES + 1)]
    for record in categories:
        if isinstance(record, Flaw):
            raise refused(record.key, text.path, name, [record.which])
    return Document(
        format="COCO JSON",
        categories=categories,
        images=[*chain(*records(ImageEntry, _loose_image, "image", "images"))],
        annotations=records(AnnotationEntry, _loose_annotation, "annotation", "annotations"),
    )


def read_outline(path: Path) -> Outline:
    """Read an annotation file and leave its records as they are, for writing a file of some of them; errors as of `read`."""
    text, lists = _opened(path, str(path), StoreReport())
    return Outline(
        **{field: text.raws(getattr(lists, field), field) for field in _Lists.__struct_fields__}
    )


def _opened(source: Path | bytes, name: str, report: StoreReport) -> tuple[JsonText, _Lists]:
    """Return the text of an annotation file, and its lists; the errors say what other file it may be."""
    text = JsonText(
        source,
        name,
        kind="an annotation file",
        hint="it must be an object with lists 'images', 'annotations' and 'categories' (COCO or LVIS format)",
        report=report,
    )
    try:
        return text, text.fields(_Lists)
    except DataError as error:
        start = text.start
        if " is not an annotation file" not in error.message:
            raise
        if b'"score"' in start and b'"image_id"' in start and start[:1] == b"[":
            raise text.error(
                "it looks like a list of detections", "a results file goes with --results"
            ) from error
        raise


def _loose_annotation(
    report: StoreReport, fields: dict[str, Any], which: str
) -> AnnotationEntry | Flaw:
    """Read an annotation field by field: what is wrong costs its field where the object can still be used."""
    own_id = identifier(fields.get("id"))
    which = which if own_id is None else str(own_id)
    ids = owners(fields, which)
    if isinstance(ids, Flaw):
        return ids
    flags: dict[str, Any] = {}
    for name in ("iscrowd", "ignore"):
        value = fields.get(name, 0)
        if isinstance(value, str):
            flags[name] = int(value.strip().lower() in ("1", "true", "yes"))
        else:
            flags[name] = int(isinstance(value, (bool, int, float)) and bool(value))
        if name == "iscrowd" and value not in (0, 1):
            report.count("annotation.iscrowd", [which])
    box, area = fields.get("bbox"), fields.get("area")
    return AnnotationEntry(
        **ids,
        **flags,
        bbox=(box[0], box[1], box[2], box[3]) if are_numbers(box, 4) else None,
        segmentation=fields.get("segmentation"),
        area=area if area is not None and are_numbers([area]) else None,
        id=own_id,
    )


def _loose_image(report: StoreReport, fields: dict[str, Any], which: str) -> ImageEntry | Flaw:
    own_id, file_name = identifier(fields.get("id")), fields.get("file_name")
    called = file_name if isinstance(file_name, str) else ""
    if own_id is None:
        return Flaw("image.id", which, called)
    sides = [fields.get("width"), fields.get("height")]
    if not are_numbers(sides) or any(side != int(side) for side in sides):
        return Flaw("image.size", str(own_id), called)
    width, height = (int(side) for side in sides)
    read: dict[str, Any] = {}
    for name in LABEL_LISTS:
        value = fields.get(name)
        ids = [identifier(item) for item in value] if isinstance(value, list) else [None]
        read[name] = None if None in ids else ids
        if value is not None and read[name] is None:
            report.count("image.list.type", [own_id])
    for name in ("file_name", "coco_url"):
        read[name] = fields[name] if isinstance(fields.get(name), str) else None
    return ImageEntry(id=own_id, width=width, height=height, **read)


def _loose_category(
    report: StoreReport, fields: dict[str, Any], which: str
) -> CategoryEntry | Flaw:
    own_id = identifier(fields.get("id"))
    if own_id is None or not isinstance(fields.get("name"), str):
        return Flaw("category.record", which)
    kept = {"id": own_id, "name": fields["name"]}
    for field in msgspec.structs.fields(CategoryEntry)[2:]:
        try:
            kept[field.name] = msgspec.convert(fields.get(field.name), field.type)
        except msgspec.ValidationError:
            report.count("category.field", [own_id])
    return CategoryEntry(**kept)
