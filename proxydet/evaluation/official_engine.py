"""The official evaluators behind the same interface: ``lvis`` for LVIS-style data, ``pycocotools`` for COCO-style.

They get the annotations and the detections as the files have them, and make every choice themselves: this is the
yardstick that the fast engine, and the selection before it, are held against.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from proxydet.evaluation.curves import NO_LIMIT, Curves, Limits, nothing_detected
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results


def run_official(
    truth: GroundTruth,
    results: Results,
    *,
    iou_type: str,
    limits: Limits,
    per_image: int | None = None,
) -> Curves:
    """Score detections with the official evaluator of the data set's protocol.

    Args:
        truth: What to score against.
        results: All detections, with every mask when masks are scored.
        iou_type: ``"bbox"`` or ``"segm"``.
        limits: For COCO's protocol, the most detections of a category in an image.
        per_image: For LVIS's protocol, the most detections of an image; None for no limit.
    """
    if not len(results):
        return nothing_detected(truth, limits)
    with _quiet():
        if truth.protocol == "lvis":
            return _lvis_curves(truth, results, iou_type, limits, per_image)
        return _coco_curves(truth, results, iou_type, limits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the official evaluators, which print and log at will, from the program's output."""
    logger = logging.getLogger("lvis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _annotations(truth: GroundTruth) -> dict[str, Any]:
    """Return the annotation file's content, with images, categories and annotations numbered from 1."""
    images: list[dict[str, Any]] = [
        {
            "id": index + 1,
            "height": int(height),
            "width": int(width),
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
        for index, (height, width) in enumerate(truth.image_sizes_I2)
    ]
    for image, category in truth.negatives_N2.tolist():
        images[image]["neg_category_ids"].append(category + 1)
    for image, category in truth.unexhaustive_N2.tolist():
        images[image]["not_exhaustive_category_ids"].append(category + 1)
    frequencies = truth.frequencies or ("f",) * len(truth.category_ids)
    annotations = [
        {
            "id": index + 1,
            "image_id": int(truth.ann_image_A[index]) + 1,
            "category_id": int(truth.ann_category_A[index]) + 1,
            "bbox": truth.ann_box_A4[index].tolist(),
            "area": float(truth.ann_area_A[index]),
            "iscrowd": int(truth.ann_crowd_A[index]),
            "ignore": int(truth.ann_ignore_A[index]),
            "segmentation": truth.segmentation(index),
        }
        for index in range(len(truth.ann_row_A))
    ]
    categories = [
        {"id": index + 1, "name": str(index), "frequency": frequency}
        for index, frequency in enumerate(frequencies)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _detections(results: Results, iou_type: str) -> list[dict[str, Any]]:
    """Return the detections as dictionaries; for masks without their boxes, whose area would be taken for the mask's."""
    rows: list[dict[str, Any]] = []
    columns = zip(
        results.image_D.tolist(),
        results.category_D.tolist(),
        results.score_D.tolist(),
        results.box_D4.tolist(),
        results.mask_D.tolist(),
        strict=True,
    )
    for image, category, score, box, mask in columns:
        row = {"image_id": image + 1, "category_id": category + 1, "score": score}
        if iou_type == "segm":
            row["segmentation"] = results.masks[mask]
        else:
            row["bbox"] = box
        rows.append(row)
    return rows


def _set_areas(rows: list[dict[str, Any]], results: Results, iou_type: str) -> None:
    """Give loaded rows that had no box in their file the area of their mask, as the evaluators do without a box."""
    if iou_type == "bbox":
        for index in np.flatnonzero(results.drawn_D).tolist():
            rows[index]["area"] = float(results.mask_area_M[results.mask_D[index]])


def _lvis_curves(
    truth: GroundTruth,
    results: Results,
    iou_type: str,
    limits: Limits,
    per_image: int | None,
) -> Curves:
    from proxydet.compat.lvis_api import LVIS, LVISEval, LVISResults

    annotations = LVIS.__new__(LVIS)
    annotations.logger = logging.getLogger("lvis.lvis")
    annotations.dataset = _annotations(truth)
    annotations._create_index()
    most = -1 if per_image is None else per_image
    rows = _detections(results, iou_type)
    detections = LVISResults(annotations, rows, max_dets=most)
    _set_areas(rows, results, iou_type)
    evaluator = LVISEval(annotations, detections, iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    return Curves(
        precision_TRCA=evaluator.eval["precision"],
        recall_TCAM=evaluator.eval["recall"][..., None],
        limits=limits,
    )


def _coco_curves(truth: GroundTruth, results: Results, iou_type: str, limits: Limits) -> Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = COCO()
    annotations.dataset = _annotations(truth)
    annotations.createIndex()
    rows = _detections(results, iou_type)
    detections = annotations.loadRes(rows)
    _set_areas(rows, results, iou_type)
    evaluator = COCOeval(annotations, detections, iou_type)
    evaluator.params.maxDets = [NO_LIMIT if limit is None else limit for limit in limits]
    evaluator.evaluate()
    evaluator.accumulate()
    return Curves(
        precision_TRCA=evaluator.eval["precision"][..., -1],
        recall_TCAM=evaluator.eval["recall"],
        limits=limits,
    )
