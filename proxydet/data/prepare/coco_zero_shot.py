"""COCO's zero-shot split: 48 classes to train on, 17 unseen ones; the other 15 of COCO are not used.

The split is that of Bansal et al. (ECCV 2018) in the form that open-vocabulary detection uses: training holds the
annotations of the 48 classes and every image with at least one of them; validation those of all 65.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from proxydet.data.formats.coco import read_outline
from proxydet.data.formats.records import CategoryEntry, Identifier
from proxydet.data.prepare.json_files import ids_of, write_annotation_file
from proxydet.errors import DataError

SEEN = tuple(
    """person; bicycle; car; motorcycle; train; truck; boat; bench; bird; horse; sheep; bear; zebra; giraffe;
    backpack; handbag; suitcase; frisbee; skis; kite; surfboard; bottle; fork; spoon; bowl; banana; apple; sandwich;
    orange; broccoli; carrot; pizza; donut; chair; bed; toilet; tv; laptop; mouse; remote; microwave; oven; toaster;
    refrigerator; book; clock; vase; toothbrush""".replace("\n    ", " ").split("; ")
)
"""The 48 classes of training."""

UNSEEN = tuple(
    """airplane; bus; cat; dog; cow; elephant; umbrella; tie; snowboard; skateboard; cup; knife; cake; couch; keyboard;
    sink; scissors""".replace("\n    ", " ").split("; ")
)
"""The 17 novel classes."""


def write_split(source: Path, target: Path, names: Collection[str]) -> tuple[int, int]:
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
    document = read_outline(source)
    wanted = _category_ids(document.categories, names, source)
    kept = []
    image_ids = set()
    for raw, image, category in ids_of(document.annotations, source):
        if category in wanted:
            kept.append(raw)
            image_ids.add(image)
    images = [raw for raw in document.images if _id(raw, source) in image_ids]
    write_annotation_file(target, images, kept, document.categories)
    return len(images), len(kept)


def _category_ids(raws: list[msgspec.Raw], names: Collection[str], source: Path) -> set[Identifier]:
    try:
        entries = [msgspec.json.decode(raw, type=CategoryEntry) for raw in raws]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            f"{source}: a category is not usable: {error}", hint="fetch the file again", path=source
        ) from error
    missing = sorted(set(names) - {entry.name for entry in entries})
    if missing:
        raise DataError(
            f"{source} has no category {missing[0]!r}; it is not COCO's",
            hint="give COCO 2017's instances_train2017.json or instances_val2017.json",
            path=source,
        )
    return {entry.id for entry in entries if entry.name in set(names)}


class _Identified(msgspec.Struct, frozen=True):
    id: int


def _id(raw: msgspec.Raw, source: Path) -> int:
    try:
        return msgspec.json.decode(raw, type=_Identified).id
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{source}: an image is not usable: {error}", hint="fetch the file again", path=source
        ) from error
