"""Overlaps of detections with the annotations of their image and category.

Dimensions: S selected detections, G annotations, P pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.curves import IOU_THRESHOLDS_T
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results
from proxydet.evaluation.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Detections and annotations of the same image and category that overlap enough to match.

    Attributes:
        detection_P: int64 in [0, S), ascending.
        annotation_P: int64 in [0, G), ascending within a detection.
        group_P: int64, one number for each (image, category).
        iou_P: float64 in [0.5, 1]: intersection over union; over the detection's area for crowds.
    """

    detection_P: NDArray[np.int64]
    annotation_P: NDArray[np.int64]
    group_P: NDArray[np.int64]
    iou_P: NDArray[np.float64]


def overlapping_pairs(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    annotations: NDArray[np.int64],
    iou_type: str,
    images: tuple[int, int],
) -> Pairs:
    """Return the pairs that overlap by at least IoU 0.5.

    Args:
        truth: All annotations.
        results: All detections.
        selection: The S detections.
        annotations: The G annotations, ordered by image and category.
        iou_type: ``"bbox"`` or ``"segm"``.
        images: The first image to look at, and the one to stop before.
    """
    categories = len(truth.category_ids)
    key_G = truth.ann_image_A[annotations] * categories + truth.ann_category_A[annotations]
    first, last = np.searchsorted(selection.image_S, images)
    key_S = selection.image_S[first:last] * categories + selection.category_S[first:last]
    begin_S = np.searchsorted(key_G, key_S, side="left")
    number_S = np.searchsorted(key_G, key_S, side="right") - begin_S
    detection_P = np.repeat(np.arange(len(key_S)), number_S)
    starts_P = np.repeat(np.cumsum(number_S) - number_S, number_S)
    annotation_P = np.arange(len(detection_P)) - starts_P + begin_S[detection_P]
    crowd_P = truth.ann_crowd_A[annotations[annotation_P]] & (truth.protocol == "coco")
    detection_P += first
    chosen = selection.detection_S[detection_P]
    if iou_type == "bbox":
        iou_P = box_iou(
            results.box_D4[chosen], truth.ann_box_A4[annotations[annotation_P]], crowd_P
        )
    else:
        group_P = key_G[annotation_P]
        iou_P = _mask_iou(truth, results, chosen, annotations[annotation_P], crowd_P, group_P)
    enough = iou_P >= IOU_THRESHOLDS_T[0]
    return Pairs(
        detection_P=detection_P[enough],
        annotation_P=annotation_P[enough],
        group_P=key_G[annotation_P[enough]],
        iou_P=iou_P[enough],
    )


def box_iou(
    first_P4: NDArray[np.float64], second_P4: NDArray[np.float64], crowd_P: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return intersection over union of pairs of boxes, computed in the COCO tools' order of operations.

    Args:
        first_P4: Detections: x, y, width, height.
        second_P4: Annotations, likewise.
        crowd_P: Pairs where the union is replaced by the detection's area.
    """
    far_P2 = np.minimum(first_P4[:, :2] + first_P4[:, 2:], second_P4[:, :2] + second_P4[:, 2:])
    sides_P2 = far_P2 - np.maximum(first_P4[:, :2], second_P4[:, :2])
    both_P = np.where((sides_P2 > 0).all(axis=1), sides_P2[:, 0] * sides_P2[:, 1], 0.0)
    first_P = first_P4[:, 2] * first_P4[:, 3]
    union_P = np.where(crowd_P, first_P, first_P + second_P4[:, 2] * second_P4[:, 3] - both_P)
    return np.divide(both_P, union_P, out=np.zeros_like(both_P), where=both_P > 0)


def _mask_iou(
    truth: GroundTruth,
    results: Results,
    detection_P: NDArray[np.int64],
    annotation_P: NDArray[np.int64],
    crowd_P: NDArray[np.bool_],
    group_P: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return intersection over union of pairs of masks; the pairs of a group are all of its detections with all of its annotations."""
    from hotcoco.primitives import mask_iou

    iou_P = np.zeros(len(group_P))
    changes = np.flatnonzero(np.diff(group_P)) + 1
    bounds = [0, *changes.tolist(), len(group_P)] if len(group_P) else []
    for start, end in itertools.pairwise(bounds):
        masks = results.mask_D[detection_P[start:end]]
        # A group's pairs are a table: one row a detection, one column an annotation.
        columns = int(np.count_nonzero(detection_P[start:end] == detection_P[start]))
        wanted = annotation_P[start : start + columns]
        found_DG = mask_iou(
            [results.masks[index] for index in masks[::columns]],
            [truth.masks[index] for index in wanted],
            crowd_P[start : start + columns],
        )
        iou_P[start:end] = found_DG.ravel()
    return iou_P
