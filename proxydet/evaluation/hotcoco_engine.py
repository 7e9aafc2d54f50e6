"""The fast engine: hotcoco, compiled code that gives the official evaluators' numbers.

It differs from them in what it does with detections that the official ones drop, so it only ever gets a
:class:`~proxydet.evaluation.selection.Selection`. What was found to differ before that choice, with version 1.3:

- detections that cover no pixel stay (LVIS's evaluator drops them after applying its limit);
- the area of a detection with a mask is its box's (LVIS's evaluator as detectron2 drives it: its mask's);
- unknown image ids give a warning (LVIS's evaluator stops), and runs that fall short of a mask's size are accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from proxydet.errors import EnvironmentProblem
from proxydet.evaluation.curves import (
    AREA_RANGES_A2,
    IOU_THRESHOLDS_T,
    NO_LIMIT,
    Curves,
    Limits,
    nothing_detected,
)
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results
from proxydet.evaluation.selection import Selection

_Value = TypeVar("_Value")
_BEYOND_EVERY_AREA = 2 * AREA_RANGES_A2.max()


def run_hotcoco(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    *,
    iou_type: str,
    limits: Limits,
) -> Curves:
    """Score selected detections with hotcoco, a compiled engine.

    Args:
        truth: What to score against.
        results: All detections.
        selection: Those of them that are scored.
        iou_type: ``"bbox"`` or ``"segm"``.
        limits: For COCO's protocol, the most detections of a category in an image (1, 10, 100); for LVIS's the
            selection has applied its limit already, and this is only handed on.

    Raises:
        EnvironmentProblem: The engine failed. There is no silent fall-back to the other one.
    """
    if not len(selection):
        return nothing_detected(truth, limits)
    return _guarded(lambda: _hotcoco_curves(truth, results, selection, iou_type, limits))


def tide_errors(
    truth: GroundTruth, results: Results, selection: Selection, iou_type: str
) -> dict[str, Any]:
    """Break errors down by kind, as TIDE does, with the engine's own implementation.

    Returns:
        ``ap_base``, ``counts`` and ``delta_ap`` by kind: ``Cls``, ``Loc``, ``Both``, ``Dupe``, ``Bkg``, ``Miss``.

    Raises:
        EnvironmentProblem: The engine failed.
    """

    def job() -> dict[str, Any]:
        evaluator = _evaluator(truth, results, selection, iou_type, (None,))
        evaluator.evaluate()
        errors: dict[str, Any] = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)
        return errors

    return _guarded(job)


def _guarded(job: Callable[[], _Value]) -> _Value:
    try:
        return job()
    except MemoryError:
        raise
    except Exception as error:
        raise _failed(error) from error
    except BaseException as error:
        if not _is_panic(error):  # Ctrl-C, an exit
            raise
        raise _failed(error) from error


def _is_panic(error: BaseException) -> bool:
    """Whether compiled Rust code failed; pyo3 has such a failure pass by ``except Exception``, and exports no class for it."""
    kind = type(error)
    return (kind.__module__, kind.__qualname__) == ("pyo3_runtime", "PanicException")


def _failed(error: BaseException) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"The fast evaluation engine failed: {type(error).__name__}: {error}.",
        hint="evaluate with the official one, slower but the yardstick: --engine lvis",
    )


def _hotcoco_curves(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    iou_type: str,
    limits: Limits,
) -> Curves:
    evaluator = _evaluator(truth, results, selection, iou_type, limits)
    evaluator.evaluate()
    evaluator.accumulate()
    accumulated: Any = evaluator.eval
    return Curves(
        precision_TRCA=np.ascontiguousarray(accumulated["precision"][..., -1]),
        recall_TCAM=np.asarray(accumulated["recall"]),
        limits=limits,
    )


def _evaluator(
    truth: GroundTruth,
    results: Results,
    selection: Selection,
    iou_type: str,
    limits: Limits,
) -> Any:
    import hotcoco

    federated = truth.protocol == "lvis"
    annotations = _hotcoco_annotations(hotcoco, truth, iou_type)
    detections = _hotcoco_detections(annotations, results, selection, iou_type)
    evaluator = hotcoco.COCOeval(annotations, detections, iou_type, lvis_style=federated)
    # LVIS's limit is one over all categories of an image, and the selection has applied it.
    evaluator.params.max_dets = [
        NO_LIMIT if federated or limit is None else limit for limit in limits
    ]
    evaluator.params.iou_thrs = IOU_THRESHOLDS_T.tolist()
    return evaluator


def _hotcoco_annotations(hotcoco: Any, truth: GroundTruth, iou_type: str) -> Any:
    federated = truth.protocol == "lvis"
    counted = np.flatnonzero(truth.counted_A)
    images: list[dict[str, Any]] = [
        {"id": index + 1, "height": int(height), "width": int(width)}
        for index, (height, width) in enumerate(truth.image_sizes_I2)
    ]
    for key, pairs_N2 in (
        ("neg_category_ids", truth.negatives_N2),
        ("not_exhaustive_category_ids", truth.unexhaustive_N2),
    ):
        for image, category in pairs_N2.tolist():
            images[image].setdefault(key, []).append(category + 1)
    # It has no flag for annotations to ignore; an area beyond every range makes it ignore them all the same.
    ignored_A = truth.ann_ignore_A & federated
    area_A = np.where(ignored_A, _BEYOND_EVERY_AREA, truth.ann_area_A)
    crowd_A = truth.ann_crowd_A & (not federated)
    return hotcoco.COCO.from_arrays(
        images,
        [{"id": index + 1, "name": str(index)} for index in range(len(truth.category_ids))],
        truth.ann_image_A[counted] + 1,
        truth.ann_category_A[counted] + 1,
        truth.ann_box_A4[counted],
        ids=np.arange(len(counted)) + 1,
        area=area_A[counted],
        iscrowd=crowd_A[counted].astype(np.int64),
        segmentation=[truth.masks[index] for index in counted] if iou_type == "segm" else None,
    )


def _hotcoco_detections(
    annotations: Any, results: Results, selection: Selection, iou_type: str
) -> Any:
    chosen = selection.detection_S
    table_S7 = np.column_stack(
        [
            selection.image_S + 1,
            results.box_D4[chosen],
            selection.score_S,
            selection.category_S + 1,
        ]
    )
    masks = None
    if iou_type == "segm":
        masks = [results.masks[index] for index in results.mask_D[chosen]]
    detections = annotations.load_res(table_S7, segmentation=masks)
    if iou_type == "segm" or results.drawn_D[chosen].any():
        # Its loader takes the box's area.
        detections.update_anns(ids=np.arange(len(chosen)) + 1, area=selection.area_S)
    return detections
