"""OpenImages' average precision at IoU 0.5, with its group boxes and its class hierarchy.

The protocol of the Open Images Challenge: in each image only classes count that annotators verified, as present or as
absent. Boxes drawn around groups count as one object each; detections that lie in one (half of their area) and find
nothing else are one hit together, with the best of their scores. Average precision is the area under the curve.

*Expanded* means that what is a guitar is a musical instrument too: annotations are expanded by whoever made the
annotation file (the published ``oid_challenge_2019_val_expanded.json``); detections are expanded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from proxydet.data.formats.coco import read_hierarchy
from proxydet.errors import DataError
from proxydet.evaluation.bootstrap import (
    FewImages,
    Resamples,
    drawn_weights,
    images_of,
    pooling,
)
from proxydet.evaluation.results import Results
from proxydet.evaluation.scoring import Selection, mean_of_known, select
from proxydet.wording import first_of

if TYPE_CHECKING:
    from proxydet.evaluation.ground_truth import GroundTruth

_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class OpenImagesScore:
    """Average precision at IoU 0.5 by OpenImages' protocol.

    Attributes:
        ap50: Mean over categories that have annotations; None if none has.
        ap50_C: float64 (C,), each category; NaN for those without annotations.
        expanded: Whether detections were expanded by the hierarchy.
        hits: What it was computed from.
    """

    ap50: float | None
    ap50_C: NDArray[np.float64]
    expanded: bool
    hits: Hits = field(repr=False)


def score_openimages(
    truth: GroundTruth,
    results: Results,
    *,
    ancestors: Mapping[int, tuple[int, ...]] | None = None,
    max_detections: int = 300,
) -> OpenImagesScore:
    """Score boxes by OpenImages' protocol.

    Args:
        truth: Annotations with ``pos_category_ids`` and ``neg_category_ids``; ``iscrowd`` marks group boxes.
        results: All detections.
        ancestors: For each category number those above it, from `ancestors_in`: detections then count for these too.
            None leaves them as they are.
        max_detections: The most detections of an image, before they are expanded.
    """
    within = select(
        results, replace(truth, protocol="coco"), iou_type="bbox", per_image=max_detections
    )
    kept = results.take(within.detection_S)
    if ancestors:
        kept = _expanded(kept, ancestors)
    selection = select(kept, truth, iou_type="bbox")
    hits = _hits(truth, kept, selection)
    ap50_C = hits.ap50(np.ones(len(truth.image_ids), dtype=np.int64), len(truth.category_ids))
    return OpenImagesScore(
        ap50=mean_of_known(ap50_C), ap50_C=ap50_C, expanded=bool(ancestors), hits=hits
    )


def resample_openimages(
    scores: Mapping[str, OpenImagesScore], truth: GroundTruth, *, number: int, seed: int
) -> Resamples:
    """Compute AP50 on resamples of the images.

    Args:
        scores: What was measured, by the metric's name.
        truth: The data set.
        number: How many resamples.
        seed: Of the draws.
    """
    images, categories = len(truth.image_ids), len(truth.category_ids)
    images_1C = images_of(truth.ann_image_A, truth.ann_category_A, categories)[None]
    few = {
        name: FewImages(score.ap50_C[None, None], images_1C, ("",) * categories)
        for name, score in scores.items()
    }

    def resampled(index: int) -> list[float]:
        weight_I = drawn_weights(images, seed, index)
        values = []
        for name, score in scores.items():
            drawn_11C = score.hits.ap50(weight_I, categories)[None, None]
            values.append(_or_nan(mean_of_known(few[name].widen(drawn_11C, pooling(seed, index)))))
        return values

    return Resamples(
        names=tuple(scores),
        values_M=np.array([_or_nan(score.ap50) for score in scores.values()]),
        resampled_RM=np.array([resampled(index) for index in range(number)]),
        rare=None,
    )


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def ancestors_in(path: Path, truth: GroundTruth) -> dict[int, tuple[int, ...]]:
    """Read OpenImages' class hierarchy for the categories of a data set.

    Args:
        path: As for `read_hierarchy`.
        truth: Annotations whose categories have a ``freebase_id``.

    Returns:
        For each category number (0-based) the numbers of those above it.

    Raises:
        DataError: The file is damaged, or no label of it is a category.
    """
    labels = read_hierarchy(path)
    number = {key: index for index, key in enumerate(truth.category_keys) if key}
    if not number.keys() & labels.keys():
        unknown = [label for label, above in labels.items() if above]  # not its root
        raise DataError(
            f"{path}: none of its labels is a category of {truth.name} ({first_of(unknown)}).",
            hint="the categories need the freebase_id that the hierarchy names them by",
            path=path,
        )
    found = {
        number[label]: {number[key] for key in above if key in number} - {number[label]}
        for label, above in labels.items()
        if label in number
    }
    return {key: tuple(sorted(above)) for key, above in found.items() if above}


def _expanded(results: Results, ancestors: Mapping[int, tuple[int, ...]]) -> Results:
    """Return the detections, each followed by copies for the categories above its own."""
    above = [(int(category), *ancestors.get(int(category), ())) for category in results.category_D]
    source = np.repeat(np.arange(len(above)), [len(categories) for categories in above])
    every = [value for categories in above for value in categories]
    return replace(results.take(source), category_D=np.array(every, dtype=np.int64))


def _hits(truth: GroundTruth, results: Results, selection: Selection) -> Hits:
    """Match all detections; images are matched in ascending order, which decides between equal scores."""
    categories = len(truth.category_ids)
    key_A = truth.ann_image_A * categories + truth.ann_category_A
    order = np.argsort(key_A, kind="stable")
    key_S = selection.image_S * categories + selection.category_S
    parts: list[tuple[int, list[float], list[bool]]] = []
    starts = np.flatnonzero(np.append(True, np.diff(key_S) != 0)[: len(key_S)])
    for start, end in zip(starts, np.append(starts[1:], len(key_S)), strict=True):
        first, last = np.searchsorted(key_A[order], [key_S[start], key_S[start] + 1])
        annotations = order[first:last]
        scores, right = _image_hits(
            results.box_D4[selection.detection_S[start:end]],
            selection.score_S[start:end],
            truth.ann_box_A4[annotations],
            truth.ann_crowd_A[annotations],
        )
        parts.append((int(key_S[start]), scores, right))
    key_H = np.repeat(
        np.array([key for key, _, _ in parts], dtype=np.int64),
        [len(scores) for _, scores, _ in parts],
    )
    score_H = np.array([score for _, scores, _ in parts for score in scores])
    right_H = np.array([value for _, _, right in parts for value in right], dtype=bool)
    image_H, category_H = np.divmod(key_H, categories)
    best_first = np.lexsort((-score_H, category_H))
    return Hits(
        category_H=category_H[best_first],
        image_H=image_H[best_first],
        right_H=right_H[best_first],
        ann_image_A=truth.ann_image_A,
        ann_category_A=truth.ann_category_A,
    )


def _image_hits(
    box_D4: NDArray[np.float64],
    score_D: NDArray[np.float64],
    truth_G4: NDArray[np.float64],
    group_G: NDArray[np.bool_],
) -> tuple[list[float], list[bool]]:
    """Match one image's detections of one category, in descending order of score."""
    right_D = np.zeros(len(box_D4), dtype=bool)
    best, overlap = _best_overlap(box_D4, truth_G4[~group_G], crowd=False)
    taken = set()
    for index in np.flatnonzero(overlap >= _IOU):
        if best[index] not in taken:
            taken.add(best[index])
            right_D[index] = True
    best, overlap = _best_overlap(box_D4, truth_G4[group_G], crowd=True)
    inside_D = ~right_D & (overlap >= _IOU)
    scores = score_D[~inside_D].tolist()
    right = right_D[~inside_D].tolist()
    for group in np.unique(best[inside_D]):
        score = float(score_D[inside_D & (best == group)].max())
        # As published, a group whose best detection scores 0 is not a hit.
        if score > 0:
            scores.append(score)
            right.append(True)
    return scores, right


def _best_overlap(
    box_D4: NDArray[np.float64], truth_G4: NDArray[np.float64], *, crowd: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the annotation that each detection overlaps most, the first of equals, and by how much."""
    detections, annotations = len(box_D4), len(truth_G4)
    if not annotations:
        return np.full(detections, -1), np.zeros(detections)
    iou_DG = coco_mask.iou(box_D4, truth_G4, [crowd] * annotations)
    return iou_DG.argmax(axis=1), iou_DG.max(axis=1)


@dataclass(frozen=True, kw_only=True)
class Hits:
    """The results of detections, ordered by category, then descending score.

    Attributes:
        category_H: int64 in [0, C).
        image_H: int64 in [0, I).
        right_H: Whether an annotation was found.
        ann_image_A: int64 in [0, I), the images of what is to be found.
        ann_category_A: int64 in [0, C), its categories.
    """

    category_H: NDArray[np.int64]
    image_H: NDArray[np.int64]
    right_H: NDArray[np.bool_]
    ann_image_A: NDArray[np.int64]
    ann_category_A: NDArray[np.int64]

    def ap50(self, weight_I: NDArray[np.int64], categories: int) -> NDArray[np.float64]:
        """Return average precision at IoU 0.5 when each image counts a given number of times.

        Args:
            weight_I: How often, 0 or more.
            categories: How many there are.

        Returns:
            float64 (C,); NaN for categories without annotations in the images that count.
        """
        total_C = np.bincount(
            self.ann_category_A, weights=weight_I[self.ann_image_A], minlength=categories
        )
        average_C = np.where(total_C > 0, 0.0, np.nan)
        if not len(self.image_H):
            return average_C
        weight_H = weight_I[self.image_H]
        found_H = weight_H * self.right_H
        heads = np.flatnonzero(np.append(True, np.diff(self.category_H) != 0))
        lengths = np.diff(np.append(heads, len(weight_H)))
        precision_H = _running(found_H, heads, lengths) / np.maximum(
            _running(weight_H, heads, lengths), 1e-300
        )
        # Made to fall within each category: earlier ones lie higher, so that nothing passes from one to the one before.
        level_H = np.repeat(2.0 * np.arange(len(heads))[::-1], lengths)
        falling_H = np.maximum.accumulate((precision_H + level_H)[::-1])[::-1] - level_H
        area_C = np.bincount(self.category_H, weights=found_H * falling_H, minlength=categories)
        known_C = total_C > 0
        average_C[known_C] = area_C[known_C] / total_C[known_C]
        return average_C


def _running(
    values_H: NDArray[np.int64], heads: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return running sums that restart at each of ``heads``."""
    sums_H = np.cumsum(values_H)
    before = sums_H[heads] - values_H[heads]
    within_H: NDArray[np.int64] = sums_H - np.repeat(before, lengths)
    return within_H
