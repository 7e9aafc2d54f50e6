"""Records as every reader hands them over, typed as loosely as files are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

from proxydet.data.masks import RunLengths

Identifier = int | str
_OwnId = (
    Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    | Annotated[str, msgspec.Meta(min_length=1)]
)
"""An id that others refer to, as columns hold it: a whole number of 64 bits, or a text that is not empty."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
LABEL_LISTS = ("neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids")
"""Fields of images that list categories: LVIS's verified absent, LVIS's not exhaustively annotated, verified present."""


class ImageEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an image; other fields are skipped. Sizes in pixels."""

    id: _OwnId
    width: int
    height: int
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Identifier] | None = None
    not_exhaustive_category_ids: list[Identifier] | None = None
    pos_category_ids: list[Identifier] | None = None


class AnnotationEntry(msgspec.Struct, frozen=True, gc=False):
    """What is read of an annotation; other fields are skipped. The box is x, y, width, height in pixels.

    Of a record that strict decoding refused, ``segmentation`` may be anything: `proxydet.data.masks.read` says what it is.
    """

    image_id: Identifier
    category_id: Identifier
    bbox: tuple[float, float, float, float] | None = None
    segmentation: list[list[float]] | RunLengths | None = None
    area: float | None = None
    iscrowd: int = 0
    ignore: int = 0
    id: Identifier | None = None


class CategoryEntry(msgspec.Struct, frozen=True):
    """What is read of a category; other fields are skipped."""

    id: _OwnId
    name: str
    frequency: str | None = None
    synset: str | None = None
    wnid: str | None = None
    freebase_id: str | None = None
    supercategory: str | None = None
    image_count: _Count | None = None
    instance_count: _Count | None = None
    synonyms: list[str] | None = None


class Flaw(msgspec.Struct, frozen=True):
    """A record that is dropped.

    Attributes:
        key: The deviation.
        which: Its id, or its position.
    """

    key: str
    which: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """An annotation file, opened.

    Attributes:
        format: Name of the format, for people.
        categories: The categories, in the file's order.
        images: The images, in the file's order.
        annotations: Chunks of annotations, in the file's order.
    """

    format: str
    categories: list[CategoryEntry]
    images: list[ImageEntry | Flaw]
    annotations: Iterator[list[AnnotationEntry | Flaw]]
