"""What detections are scored against, in columns.

Dimensions: I images, C categories, A annotations. Images and categories are numbered from 0 in the ascending order of
their ids, which is the order in which the official evaluators visit them: it decides between equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.data.masks import polygon_fault
from proxydet.errors import DataError
from proxydet.evaluation.annotation_file import (
    AnnotationFile,
    Identifier,
    ImageRow,
    read_annotation_file,
)
from proxydet.evaluation.json_input import first_offenders

Protocol: TypeAlias = Literal["lvis", "coco", "openimages"]
FREQUENCIES = ("r", "c", "f")


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Annotations of a data set, ready to score against.

    Attributes:
        name: What to call the data set in a report.
        path: The annotation file; None when it was given as Python values.
        protocol: ``"lvis"``: federated annotations, 300 detections an image; ``"coco"``: exhaustive annotations;
            ``"openimages"``: image-level labels verified, group boxes.
        image_ids: I ids, ascending.
        image_sizes_I2: int64, height and width in pixels.
        image_names: I file names (or addresses), for pictures and messages.
        category_ids: C ids, ascending.
        category_names: C names, as the file has them.
        frequencies: C times ``"r"``, ``"c"`` or ``"f"``; None where the file does not say.
        training_images_C: int64, in how many training images each category is; None where the file does not say.
        ann_image_A: int64 in [0, I).
        ann_category_A: int64 in [0, C).
        ann_box_A4: float64, x, y, width, height in pixels.
        ann_area_A: float64, pixels; the file's own number (of the mask), the box's where the file has none.
        ann_crowd_A: bool, crowds (COCO) or groups (OpenImages).
        ann_ignore_A: bool, annotations that neither help nor harm.
        negatives_N2: int64 (image, category) pairs verified to be absent; empty unless the protocol has them.
        unexhaustive_N2: int64 (image, category) pairs of which not every object is annotated.
        positives_N2: int64 (image, category) pairs verified to be present (OpenImages).
        segmentations: A raw JSON values, read when masks are asked for.
        category_keys: C other identifiers of the category (``freebase_id``, else ``synset``, else empty).
    """

    name: str
    path: Path | None
    protocol: Protocol
    image_ids: tuple[Identifier, ...]
    image_sizes_I2: NDArray[np.int64]
    image_names: tuple[str, ...]
    category_ids: tuple[Identifier, ...]
    category_names: tuple[str, ...]
    frequencies: tuple[str, ...] | None
    training_images_C: NDArray[np.int64] | None
    ann_image_A: NDArray[np.int64]
    ann_category_A: NDArray[np.int64]
    ann_box_A4: NDArray[np.float64]
    ann_area_A: NDArray[np.float64]
    ann_crowd_A: NDArray[np.bool_]
    ann_ignore_A: NDArray[np.bool_]
    negatives_N2: NDArray[np.int64]
    unexhaustive_N2: NDArray[np.int64]
    positives_N2: NDArray[np.int64]
    segmentations: list[msgspec.Raw] = field(repr=False)
    category_keys: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        source: Path | str | dict[str, Any],
        *,
        name: str | None = None,
        protocol: Protocol | None = None,
    ) -> GroundTruth:
        """Read annotations in COCO's or LVIS's format.

        Args:
            source: A JSON file, plain or gzipped, or its content as Python values.
            name: What to call the data set; the file's name by default.
            protocol: How to score. By default LVIS's when the images say which categories are verified to be absent
                and the categories have a frequency, COCO's otherwise.

        Raises:
            DataError: The annotations cannot be used; the message names the first offenders.
        """
        origin = Path(source) if isinstance(source, str) else source
        rows = read_annotation_file(origin)
        path = origin if isinstance(origin, Path) else None
        label = name or (path.name if path is not None else "annotations")
        return _from_rows(rows, path=path, name=label, protocol=protocol or _recognise(rows))

    @cached_property
    def image_index(self) -> dict[Identifier, int]:
        """Image id to its number in [0, I)."""
        return {value: index for index, value in enumerate(self.image_ids)}

    @cached_property
    def category_index(self) -> dict[Identifier, int]:
        """Category id to its number in [0, C)."""
        return {value: index for index, value in enumerate(self.category_ids)}

    @cached_property
    def judged_IC(self) -> NDArray[np.bool_]:
        """Bool (I, C): whether a detection of this category in this image can be told right from wrong.

        Federated protocols only know about the categories annotated in an image or verified to be absent from it.
        """
        shape = (len(self.image_ids), len(self.category_ids))
        if self.protocol == "coco":
            return np.ones(shape, dtype=bool)
        judged = np.zeros(shape, dtype=bool)
        judged[self.positives_N2[:, 0], self.positives_N2[:, 1]] = True
        counted_A = self.counted_A
        judged[self.ann_image_A[counted_A], self.ann_category_A[counted_A]] = True
        judged[self.negatives_N2[:, 0], self.negatives_N2[:, 1]] = True
        return judged

    @cached_property
    def counted_A(self) -> NDArray[np.bool_]:
        """Bool (A,): annotations that the official evaluator looks at. LVIS's leaves out those of area 0."""
        if self.protocol == "lvis":
            return (self.ann_area_A > 0) & (self.ann_area_A < np.inf)
        return np.ones(len(self.ann_area_A), dtype=bool)

    @cached_property
    def masks(self) -> list[dict[str, Any]]:
        """A masks as compressed RLE of the image's size, polygons rasterised as the COCO tools do.

        Raises:
            DataError: An annotation has no mask, or one that is not of its image's size.
        """
        masks: list[dict[str, Any]] = []
        wrong: list[str] = []
        for index, (raw, image) in enumerate(
            zip(self.segmentations, self.ann_image_A, strict=True)
        ):
            height, width = (int(side) for side in self.image_sizes_I2[image])
            mask = _rasterise(raw, height, width)
            if mask is None or mask["size"] != [height, width]:
                wrong.append(f"annotations[{index}] of image {self.image_ids[image]!r}")
            else:
                masks.append(mask)
        if wrong:
            raise DataError(
                f"{self.name}: {len(wrong)} annotations have no mask of their image's size ({first_offenders(wrong)}).",
                hint="evaluate boxes only with: --iou-type bbox",
                path=self.path,
            )
        return masks


def _rasterise(raw: msgspec.Raw, height: int, width: int) -> dict[str, Any] | None:
    value = msgspec.json.decode(raw) if bytes(raw) else None
    if not value or (isinstance(value, list) and any(polygon_fault(polygon) for polygon in value)):
        return None
    if isinstance(value, list):
        merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(value, height, width))
        return merged
    if isinstance(value["counts"], list):
        encoded: dict[str, Any] = coco_mask.frPyObjects(value, *value["size"])
        return encoded
    return {"size": list(value["size"]), "counts": value["counts"].encode("ascii")}


def _recognise(rows: AnnotationFile) -> Protocol:
    if all(row.pos_category_ids is not None for row in rows.images):
        return "openimages"
    federated = sum(row.neg_category_ids is not None for row in rows.images)
    if 0 < federated < len(rows.images):
        lacking = [row.id for row in rows.images if row.neg_category_ids is None]
        raise DataError(
            f"{len(lacking)} images lack neg_category_ids while others have it (ids {first_offenders(lacking)}).",
            hint="give every image the list (empty where nothing is verified absent), or evaluate as COCO",
        )
    with_frequency = all(row.frequency in FREQUENCIES for row in rows.categories)
    return "lvis" if federated and with_frequency else "coco"


def _from_rows(
    rows: AnnotationFile, *, path: Path | None, name: str, protocol: Protocol
) -> GroundTruth:
    images = sorted(rows.images, key=lambda row: row.id)
    categories = sorted(rows.categories, key=lambda row: row.id)
    image_index = {row.id: index for index, row in enumerate(images)}
    category_index = {row.id: index for index, row in enumerate(categories)}
    box_A4 = np.array([row.bbox for row in rows.annotations], dtype=np.float64).reshape(-1, 4)
    area = [row.bbox[2] * row.bbox[3] if row.area is None else row.area for row in rows.annotations]
    counts = [row.image_count for row in categories]
    frequencies = tuple(row.frequency or "" for row in categories)
    return GroundTruth(
        name=name,
        path=path,
        protocol=protocol,
        image_ids=tuple(row.id for row in images),
        image_sizes_I2=np.array([(row.height, row.width) for row in images], dtype=np.int64),
        image_names=tuple(row.file_name or row.coco_url for row in images),
        category_ids=tuple(row.id for row in categories),
        category_names=tuple(row.name for row in categories),
        frequencies=frequencies if all(value in FREQUENCIES for value in frequencies) else None,
        training_images_C=None if None in counts else np.array(counts, dtype=np.int64),
        ann_image_A=_column([image_index[row.image_id] for row in rows.annotations]),
        ann_category_A=_column([category_index[row.category_id] for row in rows.annotations]),
        ann_box_A4=box_A4,
        ann_area_A=np.array(area, dtype=np.float64),
        ann_crowd_A=np.array([bool(row.iscrowd) for row in rows.annotations], dtype=bool),
        ann_ignore_A=np.array([bool(row.ignore) for row in rows.annotations], dtype=bool),
        negatives_N2=_pairs(images, category_index, "neg_category_ids", protocol),
        unexhaustive_N2=_pairs(images, category_index, "not_exhaustive_category_ids", protocol),
        positives_N2=_pairs(images, category_index, "pos_category_ids", protocol),
        segmentations=[row.segmentation for row in rows.annotations],
        category_keys=tuple(row.freebase_id or row.synset or "" for row in categories),
    )


def _column(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _pairs(
    images: list[ImageRow], category_index: dict[Identifier, int], key: str, protocol: Protocol
) -> NDArray[np.int64]:
    """Return the (image, category) pairs that one of the images' lists spells out; none outside federated data."""
    if protocol == "coco":
        return np.zeros((0, 2), dtype=np.int64)
    # A listed category that the file does not have can match no detection: the official evaluator never notices it.
    pairs = [
        (index, category_index[value])
        for index, row in enumerate(images)
        for value in (getattr(row, key) or ())
        if value in category_index
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
