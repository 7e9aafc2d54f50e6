"""Precision and recall of detections: which of them count, the engines that score them, and the metrics made of it.

The official evaluators drop detections at several places, and other engines differ from them exactly there. So the choice
is made here, once, and every engine and analysis gets the same detections in the same order.

The fast engine is hotcoco, compiled code that gives the official evaluators' numbers. What was found to differ before that
choice, with version 1.3:

- detections that cover no pixel stay (LVIS's evaluator drops them after applying its limit);
- the area of a detection with a mask is its box's (LVIS's evaluator as detectron2 drives it: its mask's);
- unknown image ids give a warning (LVIS's evaluator stops), and runs that fall short of a mask's size are accepted.

The official evaluators themselves, ``lvis`` for LVIS's protocol and ``pycocotools`` for COCO's, get all detections and make
every choice themselves: the fast engine, and the choice before it, are tested against them.

Dimensions: T IoU thresholds, R recall thresholds, C categories, A areas (all, small, medium, large), M limits of detections
an image and category, D detections in all, S selected ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxydet.data.config import FREQUENCIES, Protocol
from proxydet.errors import ProxydetError, RuntimeEnvironmentError

if TYPE_CHECKING:
    from proxydet.evaluation.ground_truth import GroundTruth
    from proxydet.evaluation.results import Results

Limits: TypeAlias = tuple[int | None, ...]
NO_LIMIT = 2**31 - 1
COCO_LIMITS = (1, 10, 100)
"""Detections of a category in an image that COCO's protocol counts."""

IOU_THRESHOLDS_T: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS_R: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
AREAS = ("all", "small", "medium", "large")
AREA_RANGES_A2: NDArray[np.float64] = np.array(
    [[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]]
)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision at fixed recalls, and the recall reached.

    Attributes:
        precision_TRCA: float64 in [0, 1]; -1 where a category has no annotation of that area.
        recall_TCAM: float64 in [0, 1]; -1 likewise.
        limits: M: the most detections counted (None: no limit); precision is computed with the last.
    """

    precision_TRCA: NDArray[np.float64]
    recall_TCAM: NDArray[np.float64]
    limits: Limits

    @cached_property
    def average_TCA(self) -> NDArray[np.float64]:
        """Mean precision over recalls, float64 (T, C, A); NaN where a category has no annotation of that area."""
        average_TCA: NDArray[np.float64] = self.precision_TRCA.mean(axis=1)
        average_TCA[average_TCA < 0] = np.nan
        return average_TCA

    @cached_property
    def summary_A3C(self) -> NDArray[np.float64]:
        """The `summary` of the average precision."""
        return summary(self.average_TCA.transpose(2, 0, 1))


def nothing_detected(truth: GroundTruth, limits: Limits) -> Curves:
    """Return the curves of no detection at all, on which the official evaluators fail: 0 where there is something to find."""
    categories, thresholds = len(truth.category_ids), len(IOU_THRESHOLDS_T)
    areas = len(AREA_RANGES_A2)
    precision_TRCA = np.full((thresholds, len(RECALL_THRESHOLDS_R), categories, areas), -1.0)
    recall_TCAM = np.full((thresholds, categories, areas, len(limits)), -1.0)
    ignored_A = truth.ann_crowd_A if truth.protocol == "coco" else truth.ann_ignore_A
    for area, (least, most) in enumerate(AREA_RANGES_A2):
        inside_A = (truth.ann_area_A >= least) & (truth.ann_area_A <= most)
        present = np.unique(truth.ann_category_A[inside_A & truth.counted_A & ~ignored_A])
        precision_TRCA[:, :, present, area] = 0
        recall_TCAM[:, present, area] = 0
    return Curves(precision_TRCA=precision_TRCA, recall_TCAM=recall_TCAM, limits=limits)


# -- which detections count ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Detections to score, ordered by image, then category, then descending score, then their place in the file.

    Attributes:
        detection_S: int64, their numbers among all detections.
        image_S: int64 in [0, I).
        category_S: int64 in [0, C).
        score_S: float64.
        area_S: float64, pixels: of the box when boxes are scored (of the mask where the file has no box), of the mask when
            masks are.
        capped: Detections left out because their image, or for fixed AP their category, has better ones enough.
        unjudged: Detections left out because their category is not judged in their image.
        without_area: Detections left out because they cover no pixel (LVIS only, as its evaluator does).
    """

    detection_S: NDArray[np.int64]
    image_S: NDArray[np.int64]
    category_S: NDArray[np.int64]
    score_S: NDArray[np.float64]
    area_S: NDArray[np.float64]
    capped: int
    unjudged: int
    without_area: int

    def __len__(self) -> int:
        return len(self.detection_S)

    def best_of_each_category(self) -> Selection:
        """Return the selection with the best 100 detections of a category in an image, COCO's own limit."""
        pair_S = self.image_S * (self.category_S.max(initial=0) + 1) + self.category_S
        kept = place_in_group(pair_S) < COCO_LIMITS[-1]
        columns = ("detection_S", "image_S", "category_S", "score_S", "area_S")
        return replace(self, **{name: getattr(self, name)[kept] for name in columns})


def select(
    results: Results,
    truth: GroundTruth,
    *,
    iou_type: str,
    per_image: int | None = None,
    per_category: int | None = None,
) -> Selection:
    """Choose the detections that are scored.

    Args:
        results: All detections.
        truth: The data set.
        iou_type: ``"bbox"`` or ``"segm"``.
        per_image: The most detections of one image, over all its categories, the best first; None for no limit.
        per_category: The most detections of one category over the data set; None for no limit.

    Returns:
        The detections that are within the limits, cover at least a pixel where the protocol asks for that, and
        whose category is judged in their image. The limits come first: a detection of an unjudged category takes
        a place, as it does in the official evaluator.
    """
    kept = np.arange(len(results))
    if per_image is not None:
        kept = _best(kept, results.image_D, results.score_D, per_image)
    if per_category is not None:
        kept = _best(kept, results.category_D, results.score_D, per_category)
    capped = len(results) - len(kept)
    judged = truth.judges(results.image_D[kept], results.category_D[kept])
    unjudged = int(np.count_nonzero(~judged))
    kept = kept[judged]
    if iou_type == "segm":
        area = results.mask_area_M[results.mask_D[kept]]
    else:
        area = results.box_D4[kept, 2] * results.box_D4[kept, 3]
        # Without a box of its own a detection is as large as its mask, for the official evaluators too.
        drawn = results.drawn_D[kept]
        area[drawn] = results.mask_area_M[results.mask_D[kept[drawn]]]
    covers = area > 0 if truth.protocol == "lvis" else np.ones(len(kept), dtype=bool)
    kept, area = kept[covers], area[covers]
    # lexsort is stable: among equal scores the earlier detection of the file stays first.
    order = np.lexsort(
        (
            -results.score_D[kept],
            narrow(results.category_D[kept], len(truth.category_ids)),
            narrow(results.image_D[kept], len(truth.image_ids)),
        )
    )
    kept = kept[order]
    return Selection(
        detection_S=kept,
        image_S=results.image_D[kept],
        category_S=results.category_D[kept],
        score_S=results.score_D[kept],
        area_S=area[order],
        capped=capped,
        unjudged=unjudged,
        without_area=int(np.count_nonzero(~covers)),
    )


def _best(
    kept: NDArray[np.int64], group_D: NDArray[np.int64], score_D: NDArray[np.float64], most: int
) -> NDArray[np.int64]:
    """Return the ``most`` best detections of each group, in their file's order."""
    if not len(kept) or np.bincount(group_D[kept]).max() <= most:
        return kept
    order = np.lexsort((-score_D[kept], group_D[kept]))
    return np.sort(kept[order[place_in_group(group_D[kept][order]) < most]])


def narrow(numbers: NDArray[np.int64], count: int) -> NDArray[np.integer]:
    """Return numbers in [0, count] in few bytes: those of up to 16 bits are sorted in linear time."""
    return numbers.astype(np.min_scalar_type(count))


def place_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each element's place within its run of equal numbers, from 0."""
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1])[: len(group)])
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))


# -- the fast engine --------------------------------------------------------------------------------------------------


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
        RuntimeEnvironmentError: The engine failed. There is no silent fall-back to the other one.
    """
    if not len(selection):
        return nothing_detected(truth, limits)
    with hotcoco_errors():
        import hotcoco

        federated = truth.protocol == "lvis"
        data = hotcoco_data(truth, results, selection, iou_type)
        evaluator = hotcoco.COCOeval(*data, iou_type, lvis_style=federated)
        # LVIS's limit is one over all categories of an image, and the selection has applied it.
        evaluator.params.max_dets = [
            NO_LIMIT if federated or limit is None else limit for limit in limits
        ]
        evaluator.params.iou_thrs = IOU_THRESHOLDS_T.tolist()
        evaluator.evaluate()
        evaluator.accumulate()
        accumulated: Any = evaluator.eval
        return Curves(
            precision_TRCA=np.ascontiguousarray(accumulated["precision"][..., -1]),
            recall_TCAM=np.asarray(accumulated["recall"]),
            limits=limits,
        )


@contextlib.contextmanager
def hotcoco_errors() -> Iterator[None]:
    """Turn a failure of hotcoco into a RuntimeEnvironmentError; errors of the input stay what they are."""
    try:
        yield
    except (MemoryError, ProxydetError):
        raise
    except BaseException as error:
        # pyo3 has a failure of compiled Rust code pass by ``except Exception``, and exports no class for it.
        kind = type(error)
        panic = (kind.__module__, kind.__qualname__) == ("pyo3_runtime", "PanicException")
        if not isinstance(error, Exception) and not panic:  # Ctrl-C, an exit
            raise
        raise RuntimeEnvironmentError(
            f"The fast evaluation engine failed: {type(error).__name__}: {error}.",
            hint="evaluate with the official one, which is slower: --engine lvis",
        ) from error


def _images(truth: GroundTruth) -> list[dict[str, Any]]:
    """Return the images as annotation files list them; they and categories are numbered from 1."""
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    images: list[dict[str, Any]] = [
        {"id": number, "height": height, "width": width, **{name: [] for name in lists}}
        for number, (height, width) in enumerate(truth.image_sizes_I2.tolist(), 1)
    ]
    for name, pairs_N2 in zip(lists, (truth.negatives_N2, truth.unexhaustive_N2), strict=True):
        for image, category in pairs_N2.tolist():
            images[image][name].append(category + 1)
    return images


def hotcoco_data(
    truth: GroundTruth, results: Results, selection: Selection, iou_type: str
) -> tuple[Any, Any]:
    """Return annotations and selected detections as hotcoco holds them, ids being numbers from 1."""
    import hotcoco

    federated, with_masks = truth.protocol == "lvis", iou_type == "segm"
    counted = np.flatnonzero(truth.counted_A)
    # It has no flag for annotations to ignore; an area beyond every range makes it ignore them all the same.
    ignored_A = truth.ann_ignore_A & federated
    area_A = np.where(ignored_A, _BEYOND_EVERY_AREA, truth.ann_area_A)
    crowd_A = truth.ann_crowd_A & (not federated)
    annotations = hotcoco.COCO.from_arrays(
        _images(truth),
        [{"id": index + 1, "name": str(index)} for index in range(len(truth.category_ids))],
        truth.ann_image_A[counted] + 1,
        truth.ann_category_A[counted] + 1,
        truth.ann_box_A4[counted],
        ids=np.arange(len(counted)) + 1,
        area=area_A[counted],
        iscrowd=crowd_A[counted].astype(np.int64),
        segmentation=[*map(truth.masks.__getitem__, counted.tolist())] if with_masks else None,
    )
    chosen = selection.detection_S
    table_S7 = np.column_stack(
        [
            selection.image_S + 1,
            results.box_D4[chosen],
            selection.score_S,
            selection.category_S + 1,
        ]
    )
    masks: Any = None
    if with_masks:
        masks = [*map(results.masks.__getitem__, results.mask_D[chosen].tolist())]
    detections = annotations.load_res(table_S7, segmentation=masks)
    if with_masks or results.drawn_D[chosen].any():
        # Its loader takes the box's area.
        detections.update_anns(ids=np.arange(len(chosen)) + 1, area=selection.area_S)
    return annotations, detections


# -- the official evaluators ------------------------------------------------------------------------------------------


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
    rows: list[dict[str, Any]] = []
    for image, category, score, box, mask in zip(
        results.image_D.tolist(),
        results.category_D.tolist(),
        results.score_D.tolist(),
        results.box_D4.tolist(),
        results.mask_D.tolist(),
        strict=True,
    ):
        # Masks come without their boxes, whose area would be taken for the mask's.
        shape = {"segmentation": results.masks[mask]} if iou_type == "segm" else {"bbox": box}
        row = {"image_id": image + 1, "category_id": category + 1, "score": score}
        rows.append({**row, **shape})
    with _quiet():
        if truth.protocol == "lvis":
            from proxydet.runtime.lvis_api import LVIS, LVISEval, LVISResults

            annotations = LVIS.__new__(LVIS)
            annotations.logger = logging.getLogger("lvis.lvis")
            annotations.dataset = _annotations(truth)
            annotations._create_index()
            most = -1 if per_image is None else per_image
            detections = LVISResults(annotations, rows, max_dets=most)
            evaluator = LVISEval(annotations, detections, iou_type)
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            annotations = COCO()
            annotations.dataset = _annotations(truth)
            annotations.createIndex()
            evaluator = COCOeval(annotations, annotations.loadRes(rows), iou_type)
            evaluator.params.maxDets = [NO_LIMIT if limit is None else limit for limit in limits]
        if iou_type == "bbox":
            # Without a box of its own a detection is as large as its mask, as the evaluators have it.
            for index in np.flatnonzero(results.drawn_D).tolist():
                rows[index]["area"] = float(results.mask_area_M[results.mask_D[index]])
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    if truth.protocol == "lvis":
        return Curves(precision_TRCA=precision, recall_TCAM=recall[..., None], limits=limits)
    return Curves(precision_TRCA=precision[..., -1], recall_TCAM=recall, limits=limits)


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
            "segmentation": truth.segmentation(index) or truth.box_outline(index),
        }
        for index in range(len(truth.ann_image_A))
    ]
    categories = [
        {"id": index + 1, "name": str(index), "frequency": frequency}
        for index, frequency in enumerate(frequencies)
    ]
    return {"images": _images(truth), "annotations": annotations, "categories": categories}


# -- metrics ----------------------------------------------------------------------------------------------------------


Metrics = dict[str, float | None]
FREQUENCY_NAMES = dict(zip(FREQUENCIES, ("rare", "common", "frequent"), strict=True))


def summary(precision_ATC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what metrics are made of: the mean over IoU thresholds, and the values at 0.5 and 0.75.

    Args:
        precision_ATC: Average precision; NaN for absent categories.

    Returns:
        float64 (A, 3, C).
    """
    at_50, at_75 = (precision_ATC[:, np.isclose(IOU_THRESHOLDS_T, iou)] for iou in (0.5, 0.75))
    return np.concatenate([precision_ATC.mean(axis=1, keepdims=True), at_50, at_75], axis=1)


def measures(
    summary_A3C: NDArray[np.float64],
    frequencies: Sequence[str] | None,
    groups: Mapping[str, NDArray[np.bool_]],
) -> dict[str, float]:
    """Return the metrics of a `summary` by name; NaN where there is nothing to measure.

    Args:
        summary_A3C: Of average precision.
        frequencies: C times ``"r"``, ``"c"`` or ``"f"``; None where not known.
        groups: Named sets of categories, bool (C,).
    """
    all_3C = summary_A3C[0]
    parts = dict(zip(("AP", "AP50", "AP75"), all_3C, strict=True))
    parts |= {f"AP{area[0]}": summary_A3C[index, 0] for index, area in enumerate(AREAS) if index}
    if frequencies:
        frequency_C = np.array(frequencies)
        parts |= {f"AP{value}": all_3C[0, frequency_C == value] for value in FREQUENCIES}
    for group, mask_C in groups.items():
        parts |= {f"{group}/AP": all_3C[0, mask_C], f"{group}/AP50": all_3C[1, mask_C]}
    means = {name: mean_of_known(values) for name, values in parts.items()}
    return {name: np.nan if value is None else value for name, value in means.items()}


def official_metrics(
    curves: Curves, protocol: Protocol, frequencies: tuple[str, ...] | None
) -> Metrics:
    """Return the protocol's metrics under its own names, as fractions; None where there is nothing to measure.

    LVIS: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300, ARl@300. COCO: AP, AP50, AP75, APs,
    APm, APl, AR@1, AR@10, AR@100, ARs@100, ARm@100, ARl@100. Without a limit an image: AR, ARs, ARm, ARl.
    """
    precisions = measures(curves.summary_A3C, frequencies if protocol == "lvis" else None, {})
    metrics: Metrics = {n: None if np.isnan(value) else value for n, value in precisions.items()}
    recall_TCAM = np.where(curves.recall_TCAM > -1, curves.recall_TCAM, np.nan)
    suffixes = ["" if limit is None else f"@{limit}" for limit in curves.limits]
    for index, suffix in enumerate(suffixes):
        metrics[f"AR{suffix}"] = mean_of_known(recall_TCAM[:, :, 0, index])
    for index, area in enumerate(AREAS[1:], 1):
        metrics[f"AR{area[0]}{suffixes[-1]}"] = mean_of_known(recall_TCAM[:, :, index, -1])
    return metrics


def frequency_groups(frequencies: tuple[str, ...] | None) -> dict[str, NDArray[np.bool_]]:
    """Return the rare, common and frequent categories, bool (C,) each; nothing where frequencies are not known."""
    if frequencies is None:
        return {}
    return {
        name: np.array([value == frequency for value in frequencies])
        for frequency, name in FREQUENCY_NAMES.items()
    }


def mean_of_known(values: NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are not NaN; None if there is none."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if known.size else None
