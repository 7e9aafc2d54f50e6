"""Turning the category and image records of an annotation file into columns, by stated rules.

Images are dropped when: their record cannot be read, their size is not positive, they have no file name, or their id
was there before. Categories are what everything else refers to, so a doubtful one is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.annotation_json import CategoryEntry, ImageEntry, decode_entry
from proxydet.data.columns import ColumnWriter
from proxydet.data.store_report import StoreReport
from proxydet.errors import DataError

# LVIS v0.5 names its images by the COCO 2014 release; the 2017 release that users have is in the address.
_COCO_2014_NAME = re.compile(r"COCO_(train|val|test)2014_")
LABEL_LISTS = ("neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids")


def read_categories(raws: Sequence[msgspec.Raw], path: Path) -> list[CategoryEntry]:
    """Decode the categories, in ascending order of their id.

    Raises:
        DataError: a record is unreadable, an id or a name is there twice, or a name is empty.
    """
    decoder = msgspec.json.Decoder(CategoryEntry)
    categories = []
    for position, raw in enumerate(raws):
        try:
            categories.append(decode_entry(raw, decoder, CategoryEntry))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: category {position} is not usable: {error}",
                hint="every category needs a whole number as 'id' and a text as 'name'",
                path=path,
            ) from error
    for what, values in (
        ("id", [str(category.id) for category in categories]),
        ("name", [category.name.strip() for category in categories]),
    ):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated or "" in values:
            problem = (
                f"two categories with the {what} {repeated[0]!r}"
                if repeated
                else "a category without a name"
            )
            raise DataError(
                f"{path} has {problem}",
                hint="give each category an id and a name of its own",
                path=path,
            )
    return sorted(categories, key=lambda category: category.id)


def image_name(image: ImageEntry) -> str:
    """Return the path of an image below its root, with forward slashes; empty where the record has none.

    ``file_name`` where there is one; LVIS v1 gives only an address, whose last two parts are folder and name.
    """
    name = (image.file_name or "").strip()
    if image.coco_url and (not name or _COCO_2014_NAME.search(name)):
        parts = PurePosixPath(urlsplit(image.coco_url).path).parts
        return "/".join(parts[-2:]).lstrip("/")
    return name


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """The images that are kept.

    Attributes:
        row_of: Row of each image id.
        dropped_ids: Ids of images that were left out; another image may have the same.
        sizes_I2: int32 (I, 2), height and width.
    """

    row_of: dict[int, int]
    dropped_ids: set[int]
    sizes_I2: npt.NDArray[np.int32]
    _entries: list[ImageEntry]
    _names: list[str]

    def write(
        self, writer: ColumnWriter, row_of_category: dict[int, int], report: StoreReport
    ) -> None:
        """Write the columns ``image_id``, ``size``, names and the lists of categories of each image."""
        writer.add("image_id", np.array([entry.id for entry in self._entries], dtype=np.int64))
        writer.add("size", self.sizes_I2)
        names = [name.encode("utf-8", "surrogatepass") for name in self._names]
        writer.add("name_offsets", _offsets([len(name) for name in names]))
        writer.add("names", np.frombuffer(b"".join(names), dtype=np.uint8))
        for field in LABEL_LISTS:
            rows, lengths, unknown = [], [], []
            for entry in self._entries:
                known = [row_of_category[c] for c in getattr(entry, field) if c in row_of_category]
                if len(known) < len(getattr(entry, field)):
                    unknown.append(entry.id)
                rows.extend(known)
                lengths.append(len(known))
            writer.add(f"{field}_offsets", _offsets(lengths))
            writer.add(field, np.array(rows, dtype=np.int32))
            report.repair(f"unknown category removed from {field}", unknown)


def read_images(raws: Sequence[msgspec.Raw], report: StoreReport) -> ImageTable:
    """Decode the images and drop the unusable ones, counted in ``report``."""
    decoder = msgspec.json.Decoder(ImageEntry)
    kept: list[ImageEntry] = []
    names: list[str] = []
    row_of: dict[int, int] = {}
    dropped: set[int] = set()
    for position, raw in enumerate(raws):
        try:
            image = decode_entry(raw, decoder, ImageEntry)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            report.drop_image("image record not readable", f"position {position}")
            continue
        name = image_name(image)
        problem = _problem(image, name, row_of)
        if problem:
            report.drop_image(problem, str(image.id))
            dropped.add(image.id)
            continue
        row_of[image.id] = len(kept)
        kept.append(image)
        names.append(name)
    report.images_in = len(raws)
    report.images_kept = len(kept)
    sizes = np.array([(image.height, image.width) for image in kept], dtype=np.int32)
    return ImageTable(
        row_of=row_of,
        dropped_ids=dropped,
        sizes_I2=sizes.reshape(-1, 2),
        _entries=kept,
        _names=names,
    )


def _problem(image: ImageEntry, name: str, row_of: dict[int, int]) -> str:
    if image.id in row_of:
        return "image id repeated"
    if image.width <= 0 or image.height <= 0:
        return "image size not positive"
    if not name:
        return "image without a file name"
    return ""


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
