"""From decoded detections to checked columns."""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.data.formats.records import Identifier
from proxydet.data.masks import polygon_fault
from proxydet.evaluation.results import Results, ResultsBuilder
from proxydet.evaluation.validation import Problems

_ABSENT = msgspec.Raw(b"")


class DetectionRow(msgspec.Struct, gc=False):
    """One detection as results files spell it; the box is x, y, width, height in pixels."""

    image_id: Identifier
    category_id: Identifier
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw = _ABSENT


class _Rle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


# JSON of at most this length is no mask: it is absent, null, or an empty list.
_SHORTEST = 4
_Mask: TypeAlias = _Rle | list[list[float]]
_MASKS = msgspec.json.Decoder(list[_Mask])


def add_rows(
    builder: ResultsBuilder, rows: list[DetectionRow], problems: Problems, *, keep_every_mask: bool
) -> None:
    """Check detections, and append them when they can be placed in the data set.

    Args:
        builder: Where to append.
        rows: Detections in their file's order.
        problems: Where to note what is wrong; detections with an unknown name are noted and not appended.
        keep_every_mask: Keep the masks of detections too that the protocol cannot judge.
    """
    truth, first = problems.truth, builder.seen
    builder.seen += len(rows)
    images = [row.image_id for row in rows]
    categories = [row.category_id for row in rows]
    image_D = _numbers(images, truth.image_index)
    category_D = _numbers(categories, truth.category_index)
    score_D = np.array([row.score for row in rows], dtype=np.float64)
    problems.check_names("image_id", images, image_D, first)
    problems.check_names("category_id", categories, category_D, first)
    problems.add(
        "have a score that is not finite",
        np.flatnonzero(~np.isfinite(score_D)),
        lambda index: f"detection {first + index}: {score_D[index]}",
    )
    known_D = (image_D >= 0) & (category_D >= 0)
    wanted_D = known_D.copy()
    if not keep_every_mask:
        wanted_D[known_D] = truth.judged_IC[image_D[known_D], category_D[known_D]]
    with_mask_D = _with_mask(rows)
    mask_D, masks, area_M = _masks(rows, wanted_D & with_mask_D, image_D, problems, first)
    box_D4 = _boxes(rows, with_mask_D, mask_D, masks, problems, first)
    problems.check_boxes(image_D, box_D4, first)
    builder.add(
        Results(
            path=builder.path,
            image_D=image_D[known_D],
            category_D=category_D[known_D],
            score_D=score_D[known_D],
            box_D4=box_D4[known_D],
            mask_D=mask_D[known_D],
            masks=masks,
            mask_area_M=area_M,
            without_mask=int(np.count_nonzero(~with_mask_D)),
        )
    )


def _numbers(ids: list[Identifier], index: dict[Identifier, int]) -> NDArray[np.int64]:
    """Return the number of each id; -1 where the data set does not have it."""
    try:
        return np.fromiter(map(index.__getitem__, ids), dtype=np.int64, count=len(ids))
    except KeyError:
        return np.array([index.get(value, -1) for value in ids], dtype=np.int64)


def _with_mask(rows: list[DetectionRow]) -> NDArray[np.bool_]:
    given = [row.segmentation for row in rows]
    if given.count(_ABSENT) == len(given):  # a file of boxes; comparing is faster than measuring
        return np.zeros(len(given), dtype=bool)
    with_mask_D: NDArray[np.bool_] = np.array([len(text) for text in given]) > _SHORTEST
    return with_mask_D


def _masks(
    rows: list[DetectionRow],
    wanted_D: NDArray[np.bool_],
    image_D: NDArray[np.int64],
    problems: Problems,
    first: int,
) -> tuple[NDArray[np.int64], list[dict[str, Any]], NDArray[np.float64]]:
    """Return the number of each detection's mask (-1 where it has none), the wanted masks, and their areas."""
    wanted = np.flatnonzero(wanted_D).tolist()
    # Detections of one box share its mask: each is read once.
    known: dict[tuple[int, bytes], int] = {}
    images = image_D.tolist()
    number_W = np.array(
        [
            known.setdefault((images[index], bytes(rows[index].segmentation)), len(known))
            for index in wanted
        ],
        dtype=np.int64,
    )
    found = _read_masks(list(known), problems.truth.image_sizes_I2)
    readable_K = np.array([mask is not None for mask in found], dtype=bool)
    place_K = np.where(readable_K, np.cumsum(readable_K) - 1, -1)
    mask_D = np.full(len(rows), -1, dtype=np.int64)
    if wanted:
        mask_D[wanted] = place_K[number_W]
        unreadable = np.array(wanted)[~readable_K[number_W]]
        problems.add("have a damaged mask", unreadable, lambda index: f"detection {first + index}")
    masks = [mask for mask in found if mask is not None]
    image_K = np.array([image for image, _ in known], dtype=np.int64)
    area_M = problems.check_masks(masks, image_K[readable_K], mask_D, first)
    return mask_D, masks, area_M


def _read_masks(
    texts: list[tuple[int, bytes]], sizes_I2: NDArray[np.int64]
) -> list[dict[str, Any] | None]:
    """Return masks in compressed runs; None for what is of no known kind.

    Args:
        texts: Image number and JSON of each.
        sizes_I2: Height and width of the images, in which polygons are rasterised as the COCO tools do.
    """
    values: list[_Mask | None]
    try:
        values = list(_MASKS.decode(b"[" + b",".join(text for _, text in texts) + b"]"))
    except msgspec.ValidationError:
        values = [_try_mask(text) for _, text in texts]
    return [
        None if value is None else _compressed(value, sizes_I2[image])
        for (image, _), value in zip(texts, values, strict=True)
    ]


def _try_mask(text: bytes) -> _Mask | None:
    try:
        return _MASKS.decode(b"[" + text + b"]")[0]
    except msgspec.ValidationError:
        return None


def _compressed(value: _Mask, size_2: NDArray[np.int64]) -> dict[str, Any] | None:
    try:
        if isinstance(value, list):
            if not value or any(polygon_fault(polygon) for polygon in value):
                return None
            merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(value, *size_2.tolist()))
            return merged
        own = list(value.size)
        if isinstance(value.counts, str):
            return {"size": own, "counts": value.counts.encode("ascii")}
        encoded: dict[str, Any] = coco_mask.frPyObjects({"size": own, "counts": value.counts}, *own)
    except (UnicodeEncodeError, OverflowError):
        return None
    return encoded


def _boxes(
    rows: list[DetectionRow],
    with_mask_D: NDArray[np.bool_],
    mask_D: NDArray[np.int64],
    masks: list[dict[str, Any]],
    problems: Problems,
    first: int,
) -> NDArray[np.float64]:
    """Return the boxes, drawn around the mask where a detection has only that."""
    given = [row.bbox for row in rows]
    if None not in given:
        flat = chain.from_iterable(given)  # type: ignore[arg-type]
        return np.fromiter(flat, dtype=np.float64, count=4 * len(rows)).reshape(-1, 4)
    without = np.array([index for index, box in enumerate(given) if box is None], dtype=np.int64)
    box_D4 = np.array([box or (0.0, 0.0, 0.0, 0.0) for box in given], dtype=np.float64)
    bare = without[~with_mask_D[without]]
    problems.add("have neither a box nor a mask", bare, lambda index: f"detection {first + index}")
    drawn = without[mask_D[without] >= 0]
    if len(drawn) and not problems.found:
        box_D4[drawn] = coco_mask.toBbox([masks[index] for index in mask_D[drawn]])
    return box_D4
