"""Reports as rows, in percent: what a terminal, a CSV file and an HTML page show."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from proxydet.evaluation.bootstrap import Difference
from proxydet.evaluation.report import IOU_TYPE_NAMES, Interval, Report, TypeReport


def metric_rows(report: Report) -> list[dict[str, Any]]:
    """One row a metric: its name, and for boxes and masks its value in percent with the interval's half width."""
    names = list(dict.fromkeys(name for part in report.types.values() for name in part.metrics))
    rows = []
    for name in names:
        row: dict[str, Any] = {"metric": report.metric_prefix + name}
        for kind, part in report.types.items():
            row[IOU_TYPE_NAMES[kind]] = _percent(part.metrics.get(name))
            if part.intervals:
                row[f"{IOU_TYPE_NAMES[kind]} ±"] = _half_width(part.intervals.get(name))
        rows.append(row)
    return rows


def group_rows(report: Report) -> list[dict[str, Any]]:
    """One row a set of categories, for boxes and masks."""
    return [
        {
            "classes": group.name,
            "of": IOU_TYPE_NAMES[kind],
            "scored": group.scored,
            f"{report.metric_prefix}AP": _percent(group.ap),
            **_spread(part, f"{group.name}/AP", "AP ±"),
            f"{report.metric_prefix}AP50": _percent(group.ap50),
            **_spread(part, f"{group.name}/AP50", "AP50 ±"),
        }
        for kind, part in report.types.items()
        for group in part.groups
    ]


def difference_rows(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """One row a metric of two detectors, with the difference and whether it is clear."""
    return [
        {
            "metric": row.metric,
            "A": _percent(row.first),
            "B": _percent(row.second),
            "B - A": _percent(row.difference),
            "from": _percent(row.interval.low if row.interval else None),
            "to": _percent(row.interval.high if row.interval else None),
            "by chance": None if row.chance is None else round(row.chance, 4),
            "verdict": _verdict(row),
        }
        for row in differences
    ]


def category_csv(report: Report) -> str:
    """The scores of each category as CSV, in percent: one line a category, empty where nothing is annotated."""
    kinds = list(report.types)
    columns = ["id", "name", "frequency", "training_images", "annotations", "detections"]
    measured = [
        f"{IOU_TYPE_NAMES[kind]}_{report.metric_prefix}{metric}"
        for kind in kinds
        for metric in ("AP", "AP50")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns + measured)
    for rows in zip(*(report.types[kind].categories for kind in kinds), strict=True):
        first = rows[0]
        values = [_percent(value) for row in rows for value in (row.ap, row.ap50)]
        writer.writerow([getattr(first, name) for name in columns] + values)
    return text.getvalue()


def _verdict(row: Difference) -> str:
    if row.interval is None:
        return "too few images"
    if not row.clear:
        return "not clear"
    return "B is better" if row.difference > 0 else "A is better"


def _spread(part: TypeReport, name: str, column: str) -> dict[str, float | None]:
    return {column: _half_width(part.intervals.get(name))} if part.intervals else {}


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


def _half_width(interval: Interval | None) -> float | None:
    return None if interval is None else round(50 * (interval.high - interval.low), 2)
