"""The numbers that papers report, from precision and recall.

Dimensions: C categories, T IoU thresholds, R recall thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.data.protocol import FREQUENCIES, Protocol
from proxydet.evaluation.curves import AREAS, IOU_THRESHOLDS_T, Curves

Metrics = dict[str, float | None]
FREQUENCY_NAMES = dict(zip(FREQUENCIES, ("rare", "common", "frequent"), strict=True))


def official_metrics(
    curves: Curves, protocol: Protocol, frequencies: tuple[str, ...] | None
) -> Metrics:
    """Return the protocol's metrics under its own names, as fractions; None where there is nothing to measure.

    LVIS: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300, ARl@300. COCO: AP, AP50, AP75, APs,
    APm, APl, AR@1, AR@10, AR@100, ARs@100, ARm@100, ARl@100. Without a limit an image: AR, ARs, ARm, ARl.
    """
    metrics: Metrics = {
        "AP": average_precision(curves),
        "AP50": average_precision(curves, iou=0.5),
        "AP75": average_precision(curves, iou=0.75),
    }
    for area in AREAS[1:]:
        metrics[f"AP{area[0]}"] = average_precision(curves, area=area)
    if protocol == "lvis" and frequencies is not None:
        for frequency in FREQUENCIES:
            chosen_C = np.array([value == frequency for value in frequencies])
            metrics[f"AP{frequency}"] = average_precision(curves, categories=chosen_C)
    suffixes = ["" if limit is None else f"@{limit}" for limit in curves.limits]
    for index, suffix in enumerate(suffixes):
        metrics[f"AR{suffix}"] = average_recall(curves, limit=index)
    for area in AREAS[1:]:
        metrics[f"AR{area[0]}{suffixes[-1]}"] = average_recall(curves, area=area)
    return metrics


def average_precision(
    curves: Curves,
    *,
    iou: float | None = None,
    area: str = "all",
    categories: NDArray[np.bool_] | None = None,
) -> float | None:
    """Mean precision over recalls, IoU thresholds and categories that have annotations; None if none has.

    Args:
        curves: An engine's result.
        iou: One IoU threshold; None for the mean over 0.5, 0.55, ..., 0.95.
        area: One of ``all``, ``small``, ``medium``, ``large``.
        categories: Bool (C,), the categories to average over; None for all.
    """
    average_TC = curves.average_TCA[_at(iou), :, AREAS.index(area)]
    if categories is not None:
        average_TC = average_TC[:, categories]
    return _mean(average_TC[~np.isnan(average_TC)])


def average_recall(curves: Curves, *, area: str = "all", limit: int = -1) -> float | None:
    """Mean recall over IoU thresholds and categories that have annotations; None if none has.

    Args:
        curves: An engine's result.
        area: One of ``all``, ``small``, ``medium``, ``large``.
        limit: Which of the engine's limits of detections.
    """
    recall_TC = curves.recall_TCAM[:, :, AREAS.index(area), limit]
    return _mean(recall_TC[recall_TC > -1])


def category_precision(curves: Curves, *, iou: float | None = None) -> NDArray[np.float64]:
    """float64 (C,): average precision of each category; NaN for those without annotations."""
    precision_C: NDArray[np.float64] = curves.average_TCA[_at(iou), :, 0].mean(axis=0)
    return precision_C


def category_groups(
    frequencies: tuple[str, ...] | None,
    partition: Mapping[str, NDArray[np.bool_]],
) -> dict[str, NDArray[np.bool_]]:
    """Return the named sets of categories that a report averages over.

    Args:
        frequencies: C times ``"r"``, ``"c"`` or ``"f"``; None where not known.
        partition: Further sets, bool (C,) each.
    """
    groups = {}
    if frequencies is not None:
        for frequency, name in FREQUENCY_NAMES.items():
            groups[name] = np.array([value == frequency for value in frequencies])
    groups.update(partition)
    return groups


def _at(iou: float | None) -> slice | NDArray[np.intp]:
    """Return which IoU thresholds are meant; None means all."""
    return slice(None) if iou is None else np.flatnonzero(np.isclose(IOU_THRESHOLDS_T, iou))


def _mean(present: NDArray[Any]) -> float | None:
    return float(np.mean(present)) if present.size else None
