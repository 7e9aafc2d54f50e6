"""The report of an evaluation: plain values, all fractions in [0, 1]; its tables, in percent."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from proxydet.wording import table_cell

if TYPE_CHECKING:
    from proxydet.data.records import Identifier
    from proxydet.evaluation.bootstrap import Difference
    from proxydet.evaluation.scoring import Curves, Metrics

FORMAT = 1
"""Of results.json; another number where keys are renamed or go."""
_CATEGORY_COLUMNS = ("id", "name", "frequency", "training_images", "annotations")
IOU_TYPE_NAMES = {"bbox": "box", "segm": "mask"}
AP_KEYS = ("ap", "ap50", "ap75")


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """Average precision over a named set of categories.

    Attributes:
        name: The set.
        categories: How many it has.
        scored: How many of them have annotations; the average is over these.
        ap: Over IoU thresholds from 0.5 to 0.95; None when no category is scored, as the next two.
        ap50: At IoU 0.5.
        ap75: At IoU 0.75.
    """

    name: str
    categories: int
    scored: int
    ap: float | None
    ap50: float | None
    ap75: float | None


@dataclass(frozen=True, kw_only=True)
class CategoryScore:
    """Average precision of one category.

    Attributes:
        id: As the annotation file has it.
        name: Likewise.
        frequency: ``"r"``, ``"c"``, ``"f"``, or None where the file does not say.
        training_images: In how many training images it is; None where the file does not say.
        annotations: How many annotations are counted.
        detections: How many detections are scored.
        ap: None when there is no annotation, as the next.
        ap50: At IoU 0.5.
    """

    id: Identifier
    name: str
    frequency: str | None
    training_images: int | None
    annotations: int
    detections: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a metric.

    Attributes:
        low: Its lower end, as a fraction.
        high: Its upper end.
    """

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals were made: by the bootstrap over images.

    Attributes:
        number: How many resamples.
        confidence: Of the intervals.
        seed: Of the draws.
        rare: How many rare categories are scored, and how many of them are in a resample on average: a category of one
            image is in 63 of 100 resamples only, so that AP of rare categories is the least certain. None without
            frequencies.
    """

    number: int
    confidence: float
    seed: int
    rare: tuple[int, float] | None


@dataclass(frozen=True, kw_only=True)
class TypeReport:
    """All numbers for boxes, or for masks.

    Attributes:
        iou_type: ``"bbox"`` or ``"segm"``.
        metrics: The protocol's metrics under its own names.
        groups: Average precision over sets of categories.
        categories: One a category, in ascending order of ids.
        intervals: Confidence intervals by metric name, and by ``GROUP/AP`` and ``GROUP/AP50``; empty when none were
            asked for.
        resampling: How they were made; None without.
        curves: Precision and recall as the engine gave them.
    """

    iou_type: str
    metrics: Metrics
    groups: tuple[GroupScore, ...]
    categories: tuple[CategoryScore, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    resampling: Resampling | None = None
    curves: Curves | None = field(default=None, repr=False)

    def group(self, name: str) -> GroupScore:
        """Return the score of a set of categories; KeyError when there is none of that name."""
        for score in self.groups:
            if score.name == name:
                return score
        raise KeyError(name)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many detections there were and why some were not scored.

    Attributes:
        images: Images of the data set.
        images_with_detections: Those of them that have a detection.
        annotations: Annotations of the data set.
        annotations_without_mask: Those of them without one; where others have masks these neither help nor harm masks.
        detections: All detections.
        capped: Left out by the limit an image, or for fixed AP a category.
        unjudged: Left out because nobody knows whether their category is in their image.
        without_mask: Detections that have no mask; masks are scored where there are none of these.
        damaged_masks: Detections whose mask cannot be read; where masks are scored, it counts as an empty one.
        without_area: Left out because they cover no pixel, by iou type.
        deviations: What was mended and dropped of the results file, one line of text for each kind.
    """

    images: int
    images_with_detections: int
    annotations: int
    annotations_without_mask: int
    detections: int
    capped: int
    unjudged: int
    without_mask: int
    damaged_masks: int
    without_area: Mapping[str, int]
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of an evaluation.

    Attributes:
        dataset: The data set's name.
        protocol: ``"lvis"``, ``"coco"`` or ``"openimages"``.
        engine: ``"hotcoco"``, ``"lvis"`` (the official evaluators), or ``"proxydet"`` for OpenImages.
        fixed: Whether this is fixed AP, which can't be compared with AP.
        counts: What was scored.
        types: By iou type, ``"bbox"`` and ``"segm"``.
        masks_left_out: Why masks are not scored, where nobody asked for boxes only; None where they are.
    """

    dataset: str
    protocol: str
    engine: str
    fixed: bool
    counts: Counts
    types: Mapping[str, TypeReport]
    masks_left_out: str | None = None

    @property
    def main(self) -> TypeReport:
        """The masks' report, or the boxes' where no masks were scored."""
        return self.types.get("segm") or self.types["bbox"]

    @property
    def ap(self) -> float | None:
        """Average precision of masks (of boxes where no masks were scored), as a fraction; None for OpenImages.

        Fixed AP where `fixed`; :meth:`to_dict` names that differently.
        """
        return self.main.metrics.get("AP")

    @property
    def ap50(self) -> float | None:
        """The same at IoU 0.5."""
        return self.main.metrics.get("AP50")

    @property
    def ap_rare(self) -> float | None:
        """The same over rare categories, the novel ones of LVIS; None where the data set has no frequencies."""
        return self.main.metrics.get("APr")

    @property
    def metric_prefix(self) -> str:
        """What to put before a metric's name so that fixed AP is never taken for AP."""
        return "fixed-" if self.fixed else ""

    def per_class(self) -> tuple[CategoryScore, ...]:
        """Return the scores of each category."""
        return self.main.categories

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it: fractions, None where there is nothing to measure."""
        prefix = self.metric_prefix
        types = {
            kind: {
                "metrics": {prefix + key: value for key, value in part.metrics.items()},
                "intervals": {prefix + key: asdict(value) for key, value in part.intervals.items()},
                "resampling": asdict(part.resampling) if part.resampling else None,
                "groups": [
                    {
                        prefix + key if key in AP_KEYS else key: value
                        for key, value in asdict(score).items()
                    }
                    for score in part.groups
                ],
            }
            for kind, part in self.types.items()
        }
        categories = [
            {
                **{name: getattr(scores[0], name) for name in _CATEGORY_COLUMNS},
                **{
                    kind: {
                        "detections": score.detections,
                        f"{prefix}ap": score.ap,
                        f"{prefix}ap50": score.ap50,
                    }
                    for kind, score in zip(self.types, scores, strict=True)
                },
            }
            for scores in zip(*(part.categories for part in self.types.values()), strict=True)
        ]
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "engine": self.engine,
            "fixed": self.fixed,
            "masks_left_out": self.masks_left_out,
            "counts": asdict(self.counts),
            "results": types,
            "categories": categories,
        }


# -- tables, in percent -----------------------------------------------------------------------------------------------


def metric_rows(report: Report, digits: int = 2) -> list[dict[str, Any]]:
    """One row a metric: its name, and for boxes and masks its value in percent with the interval's half width."""
    names = list(dict.fromkeys(name for part in report.types.values() for name in part.metrics))
    rows = []
    for name in names:
        row: dict[str, Any] = {"metric": report.metric_prefix + name}
        for kind, part in report.types.items():
            row[IOU_TYPE_NAMES[kind]] = percent(part.metrics.get(name), digits)
            if part.intervals:
                row[f"{IOU_TYPE_NAMES[kind]} ±"] = _half_width(part.intervals.get(name), digits)
        rows.append(row)
    return rows


def group_rows(report: Report, digits: int = 2) -> list[dict[str, Any]]:
    """One row a set of categories, for boxes and masks."""
    return [
        {
            "classes": group.name,
            "of": IOU_TYPE_NAMES[kind],
            "scored": group.scored,
            f"{report.metric_prefix}AP": percent(group.ap, digits),
            **_spread(part, f"{group.name}/AP", "AP ±", digits),
            f"{report.metric_prefix}AP50": percent(group.ap50, digits),
            **_spread(part, f"{group.name}/AP50", "AP50 ±", digits),
        }
        for kind, part in report.types.items()
        for group in part.groups
    ]


def difference_rows(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """One row a metric of two detectors, with the difference and whether it is clear."""
    return [
        {
            "metric": row.metric,
            "A": percent(row.first),
            "B": percent(row.second),
            "B - A": percent(row.difference),
            "from": percent(row.interval.low if row.interval else None),
            "to": percent(row.interval.high if row.interval else None),
            "by chance": None if row.chance is None else round(row.chance, 4),
            "verdict": _verdict(row),
        }
        for row in differences
    ]


def category_csv(report: Report) -> str:
    """The scores of each category as CSV, in percent with six decimals: one line a category, empty without annotations."""
    measured = [
        f"{IOU_TYPE_NAMES[kind]}_{report.metric_prefix}{metric}"
        for kind in report.types
        for metric in ("AP", "AP50")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CATEGORY_COLUMNS, "detections", *measured])
    for scores in zip(*(part.categories for part in report.types.values()), strict=True):
        first = scores[0]
        cells = [getattr(first, name) for name in _CATEGORY_COLUMNS]
        values = [value for score in scores for value in (score.ap, score.ap50)]
        writer.writerow(
            [
                *map(table_cell, cells),
                first.detections,
                *(None if value is None else round(100 * value, 6) for value in values),
            ]
        )
    return text.getvalue()


def _verdict(row: Difference) -> str:
    if row.interval is None:
        return "too few images"
    if not row.clear:
        return "not clear"
    return "B is better" if row.difference > 0 else "A is better"


def _spread(part: TypeReport, name: str, column: str, digits: int) -> dict[str, float | None]:
    return {column: _half_width(part.intervals.get(name), digits)} if part.intervals else {}


def percent(value: float | None, digits: int = 2) -> float | None:
    """Return a fraction in percent, rounded."""
    return None if value is None else round(100 * value, digits)


def _half_width(interval: Interval | None, digits: int) -> float | None:
    return None if interval is None else round(50 * (interval.high - interval.low), digits)
