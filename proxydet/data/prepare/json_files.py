"""Reading and writing large annotation files record by record; what is not touched stays as it was, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from proxydet.errors import DataError
from proxydet.files import staged, write_errors

RawList = Iterable[msgspec.Raw]


class _Ids(msgspec.Struct, frozen=True):
    image_id: int
    category_id: int


def ids_of(annotations: RawList, path: Path) -> Iterator[tuple[msgspec.Raw, int, int]]:
    """Yield each annotation with the ids of its image and category.

    Raises:
        DataError: an annotation has none.
    """
    decoder = msgspec.json.Decoder(_Ids)
    for position, raw in enumerate(annotations):
        try:
            ids = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: annotation {position} is not usable: {error}",
                hint="correct it, or fetch the file again",
                path=path,
            ) from error
        yield raw, ids.image_id, ids.category_id


def categories_of(raws: RawList, path: Path) -> list[dict[str, Any]]:
    """Return the category records with all their fields.

    Raises:
        DataError: a record is no object, has no whole number as its id, or shares it with another.
    """
    categories: list[dict[str, Any]] = []
    seen: set[int] = set()
    for position, raw in enumerate(raws):
        try:
            category = msgspec.json.decode(raw, type=dict[str, Any])
            identity = category.get("id")
            if type(identity) is not int or identity in seen:
                raise ValueError(f"its id is {identity!r}, which is no whole number or there twice")
        except (msgspec.MsgspecError, ValueError) as error:
            raise DataError(
                f"{path}: category {position} is not usable: {error}",
                hint="fetch the file again",
                path=path,
            ) from error
        seen.add(identity)
        categories.append(category)
    return categories


def write_annotation_file(
    path: Path, images: RawList, annotations: RawList, categories: RawList
) -> None:
    """Write an annotation file, in one step.

    Raises:
        DiskFullError: there is no room for it.
    """
    lists: Mapping[str, RawList] = {
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    with replacing(path) as file:
        for number, (name, records) in enumerate(lists.items()):
            file.write(b"{" if number == 0 else b",\n")
            file.write(f'"{name}": ['.encode())
            for position, record in enumerate(records):
                file.write(b",\n" if position else b"\n")
                file.write(record)
            file.write(b"\n]")
        file.write(b"}\n")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file under a temporary name and give it its own when all went well; removes what a killed process left.

    Raises:
        DiskFullError: there is no room for it.
    """
    with staged(path) as temporary, write_errors(path), temporary.open("wb", 1 << 20) as file:
        yield file
