"""What an evaluation gives back: plain values, all fractions in [0, 1]; tables show them in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from proxydet.data.formats.records import Identifier
from proxydet.evaluation.curves import Curves
from proxydet.evaluation.metrics import Metrics

FORMAT = 1
"""Of results.json; another number where keys are renamed or go."""
IOU_TYPE_NAMES = {"bbox": "box", "segm": "mask"}


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
        detections: All detections.
        capped: Left out by the limit an image, or for fixed AP a category.
        unjudged: Left out because nobody knows whether their category is in their image.
        without_mask: Detections that have no mask; masks are scored where there are none of these.
        without_area: Left out because they cover no pixel, by iou type.
    """

    images: int
    images_with_detections: int
    annotations: int
    detections: int
    capped: int
    unjudged: int
    without_mask: int
    without_area: Mapping[str, int]


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
    """

    dataset: str
    protocol: str
    engine: str
    fixed: bool
    counts: Counts
    types: Mapping[str, TypeReport]

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
        types = {
            kind: {
                "metrics": {self.metric_prefix + key: value for key, value in part.metrics.items()},
                "intervals": {
                    self.metric_prefix + key: asdict(value) for key, value in part.intervals.items()
                },
                "resampling": asdict(part.resampling) if part.resampling else None,
                "groups": [self._group(score) for score in part.groups],
            }
            for kind, part in self.types.items()
        }
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "engine": self.engine,
            "fixed": self.fixed,
            "counts": asdict(self.counts),
            "results": types,
        }

    def _group(self, score: GroupScore) -> dict[str, Any]:
        averages = ("ap", "ap50", "ap75")
        return {
            self.metric_prefix + key if key in averages else key: value
            for key, value in asdict(score).items()
        }
