"""What detections are scored against, in columns.

Dimensions: I images, C categories, A annotations, which are the rows of the store in its order. Images and categories are numbered from 0 in the ascending order of
their ids, which is the order in which the official evaluators visit them: it decides between equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.data.config import FREQUENCIES, Protocol, protocol_of
from proxydet.data.formats.coco import encoded
from proxydet.data.masks import rasterize_all
from proxydet.data.records import Identifier
from proxydet.data.store import AnnotationStore


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Annotations of a data set, ready to score against: the columns of its store in the order of evaluators.

    Attributes:
        name: What to call the data set in a report.
        path: The annotation file; None when it was given as Python values.
        store: The annotations.
        protocol: ``"lvis"``: federated annotations, 300 detections an image; ``"coco"``: exhaustive annotations;
            ``"openimages"``: image-level labels verified, group boxes.
        image_ids: I ids, ascending.
        image_sizes_I2: int64, height and width in pixels.
        image_names: I file names (or addresses), for images and messages.
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
        masked_A: bool, annotations that have a mask.
        negatives_N2: int64 (image, category) pairs verified to be absent; empty unless the protocol has them.
        unexhaustive_N2: int64 (image, category) pairs of which not every object is annotated.
        positives_N2: int64 (image, category) pairs verified to be present (OpenImages).
        category_keys: C other identifiers of the category (``freebase_id``, else ``synset``, else empty).
    """

    name: str
    path: Path | None
    store: AnnotationStore
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
    masked_A: NDArray[np.bool_]
    negatives_N2: NDArray[np.int64]
    unexhaustive_N2: NDArray[np.int64]
    positives_N2: NDArray[np.int64]
    category_keys: tuple[str, ...]

    @classmethod
    def load(
        cls,
        source: Path | str | dict[str, Any],
        *,
        name: str | None = None,
        protocol: Protocol | None = None,
    ) -> GroundTruth:
        """Read annotations.

        Args:
            source: What `AnnotationStore.open` takes, or the content of a COCO or LVIS file as Python values.
            name: What to call the data set; the file's name by default.
            protocol: How to score; by default `proxydet.data.config.protocol_of` decides.

        Raises:
            DataError: The annotations cannot be used; the message names the first offenders.
        """
        if isinstance(source, dict):
            text = encoded(source, "the annotations given")
            store = AnnotationStore.from_bytes(text, "the annotations given")
            return cls.from_store(store, name=name or "annotations", protocol=protocol)
        path = Path(source)
        store = AnnotationStore.open(path)
        return cls.from_store(store, name=name or path.name, path=path, protocol=protocol)

    @classmethod
    def from_store(
        cls,
        store: AnnotationStore,
        *,
        name: str,
        path: Path | None = None,
        protocol: Protocol | None = None,
    ) -> GroundTruth:
        """Return a store's annotations for scoring.

        Args:
            store: The annotations.
            name: What to call the data set.
            path: The annotation file.
            protocol: How to score; by default `protocol_of` decides.

        Raises:
            DataError: There is nothing to score, or the protocol is in doubt.
        """
        protocol = protocol or protocol_of(store)
        store.require_objects(groups=protocol == "openimages")
        ids = store.image_ids
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rank_I = np.empty(len(ids), dtype=np.int64)
        rank_I[order] = np.arange(len(ids))
        categories = store.categories
        frequencies = tuple(category.frequency or "" for category in categories)
        counts = [category.image_count for category in categories]

        def pairs(field: str) -> NDArray[np.int64]:
            # A listed category that the file does not have can match no detection: official evaluators never notice.
            if protocol == "coco" or (field == "pos_category_ids" and protocol == "lvis"):
                return np.zeros((0, 2), dtype=np.int64)
            found_N2 = store.label_pairs(field)
            found_N2[:, 0] = rank_I[found_N2[:, 0]]
            return found_N2[np.argsort(found_N2[:, 0], kind="stable")]

        return cls(
            name=name,
            path=path,
            store=store,
            protocol=protocol,
            image_ids=tuple(ids[row] for row in order),
            image_sizes_I2=store.sizes_I2[order].astype(np.int64),
            image_names=tuple(store.file_name(row) for row in order),
            category_ids=tuple(category.id for category in categories),
            category_names=tuple(category.name for category in categories),
            frequencies=frequencies if all(value in FREQUENCIES for value in frequencies) else None,
            training_images_C=None if None in counts else np.array(counts, dtype=np.int64),
            ann_image_A=rank_I[store.column("image")],
            ann_category_A=store.column("category").astype(np.int64),
            ann_box_A4=store.column("xywh"),
            ann_area_A=store.column("area"),
            ann_crowd_A=store.column("crowd"),
            ann_ignore_A=store.column("ignore"),
            masked_A=store.masked_A,
            negatives_N2=pairs("neg_category_ids"),
            unexhaustive_N2=pairs("not_exhaustive_category_ids"),
            positives_N2=pairs("pos_category_ids"),
            category_keys=tuple(c.freebase_id or c.synset or "" for c in categories),
        )

    @cached_property
    def image_index(self) -> dict[Identifier, int]:
        """Image id to its number in [0, I)."""
        return {value: index for index, value in enumerate(self.image_ids)}

    @cached_property
    def category_index(self) -> dict[Identifier, int]:
        """Category id to its number in [0, C)."""
        return {value: index for index, value in enumerate(self.category_ids)}

    def judges(
        self, image_D: NDArray[np.int64], category_D: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return, bool (D,), whether detections of these categories in these images can be judged right or wrong.

        Federated protocols only know about the categories annotated in an image or verified to be absent from it.
        """
        if self.protocol == "coco":
            return np.ones(len(image_D), dtype=bool)
        pair_D = image_D * len(self.category_ids) + category_D
        judged_D: NDArray[np.bool_] = (
            self._judged_P[np.searchsorted(self._judged_P, pair_D)] == pair_D
        )
        return judged_D

    @cached_property
    def _judged_P(self) -> NDArray[np.int64]:
        """Judged pairs of an image and a category, each as one number, ascending; behind them one above all."""
        counted_A = self.counted_A
        annotated_N2 = np.stack(
            [self.ann_image_A[counted_A], self.ann_category_A[counted_A]], axis=1
        )
        pairs_P2 = np.concatenate([self.positives_N2, annotated_N2, self.negatives_N2])
        numbers = np.unique(pairs_P2[:, 0] * len(self.category_ids) + pairs_P2[:, 1])
        return np.append(numbers, np.iinfo(np.int64).max)

    @cached_property
    def counted_A(self) -> NDArray[np.bool_]:
        """Bool (A,): annotations that the official evaluator counts. LVIS's leaves out those of area 0."""
        if self.protocol == "lvis":
            return (self.ann_area_A > 0) & (self.ann_area_A < np.inf)
        return np.ones(len(self.ann_area_A), dtype=bool)

    @property
    def has_masks(self) -> bool:
        """Whether masks can be scored: an object that is not a crowd has one."""
        return bool((self.masked_A & ~self.ann_crowd_A).any())

    def for_masks(self) -> GroundTruth:
        """Return the truth for scoring masks, in which objects without a mask neither help nor harm.

        They become crowds (COCO) or ignored (LVIS), with their box as their mask.
        """
        if self.masked_A.all():
            return self
        unknown_A = ~self.masked_A
        return replace(
            self,
            ann_crowd_A=self.ann_crowd_A | (unknown_A & (self.protocol == "coco")),
            ann_ignore_A=self.ann_ignore_A | unknown_A,
        )

    @cached_property
    def masks(self) -> list[dict[str, Any]]:
        """A masks as compressed RLE of the image's size, polygons drawn as the COCO tools do, boxes where there is none."""
        store, found = self.store, [b""] * len(self.ann_image_A)
        has_runs_A = store.column("rle_length") > 0
        for row in np.flatnonzero(has_runs_A).tolist():
            found[row] = store.rle(row)
        names = ("polygon_start", "polygon_count", "point_offsets")
        first, number, ends = (store.column(name).tolist() for name in names)
        coordinates = store.column("coordinates")
        # Polygons of an image are drawn together, which is twice as fast as one by one.
        outlined: dict[int, list[int]] = {}
        drawn = np.flatnonzero(~has_runs_A)
        for row, image in zip(drawn.tolist(), self.ann_image_A[drawn].tolist(), strict=True):
            outlined.setdefault(image, []).append(row)
        for image, rows in outlined.items():
            polygons = [range(first[row], first[row] + number[row]) for row in rows]
            shapes = [
                [coordinates[ends[at] : ends[at + 1]] for at in places] or self.box_outline(row)
                for row, places in zip(rows, polygons, strict=True)
            ]
            height, width = self.image_sizes_I2[image].tolist()
            for row, counts in zip(rows, rasterize_all(shapes, (height, width)), strict=True):
                found[row] = counts
        sizes = self.image_sizes_I2[self.ann_image_A].tolist()
        return [{"size": size, "counts": counts} for size, counts in zip(sizes, found, strict=True)]

    def box_outline(self, index: int) -> list[list[float]]:
        """Return the box of annotation ``index``, clipped to its image, as a polygon."""
        x1, y1, x2, y2 = self.store.column("box")[index].tolist()
        return [[x1, y1, x2, y1, x2, y2, x1, y2]]

    def segmentation(self, index: int) -> list[list[float]] | dict[str, Any]:
        """Return the mask of annotation ``index`` as the official evaluators take it: polygons, RLE, or an empty list."""
        if counts := self.store.rle(index):
            size = self.image_sizes_I2[self.ann_image_A[index]].tolist()
            return {"size": size, "counts": counts}
        return [polygon.tolist() for polygon in self.store.polygons(index)]
