"""How far results would move on other images of the same kind: the bootstrap over images.

A resample draws as many images as there are, with replacement, and every metric is computed anew from the matches. The
spread of the resamples is the standard error, and the interval is the metric plus and minus a multiple of it. The
resamples' own quantiles would be off to one side: average precision of few annotations is biased, and that of a
resample, which has fewer distinct ones, is biased more. What categories of few images lack in spread is added by
:mod:`proxydet.evaluation.few_images`.

Dimensions: I images, C categories, A areas, T IoU thresholds, R resamples, M metrics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from proxydet.data.protocol import FREQUENCIES
from proxydet.evaluation.curves import AREAS, IOU_THRESHOLDS_T
from proxydet.evaluation.few_images import FewImages
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.report import Interval
from proxydet.evaluation.resampling import WeightedPrecision
from proxydet.reporting import SILENT, Progress

Floats = NDArray[np.float64]
_GROUP_METRICS = ("AP", "AP50")
_ROUNDING = 1e-9
"""Resamples that differ by less agree: they only add in another order."""


@dataclass(frozen=True, kw_only=True)
class Resamples:
    """Metrics of resampled data sets.

    Attributes:
        names: M metrics: the official ones of precision, and ``GROUP/AP`` and ``GROUP/AP50`` for each group.
        values_M: On the data set itself; NaN where there is nothing to measure.
        resampled_RM: On each resample, deviations widened for categories of few images; may leave [0, 1].
        rare: How many rare categories have annotations, in the data set and on average in a resample; None without
            frequencies.
    """

    names: tuple[str, ...]
    values_M: Floats
    resampled_RM: Floats
    rare: tuple[int, float] | None

    def intervals(self, confidence: float) -> dict[str, Interval]:
        """Return an interval for each metric whose resamples differ.

        Where all resamples agree there is no spread to speak of, only too few images to show one: categories of a
        single image each are either in a resample as they are or not at all.
        """
        intervals = _intervals(self.names, self.values_M, self.resampled_RM, confidence)
        return {
            name: value for name, value in intervals.items() if value.high - value.low > _ROUNDING
        }


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What metrics average over.

    Attributes:
        frequencies: C times ``"r"``, ``"c"`` or ``"f"``; None where not known.
        groups: Named sets of categories, bool (C,).
    """

    frequencies: tuple[str, ...] | None
    groups: Mapping[str, NDArray[np.bool_]]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, in the order of `measure`."""
        by_frequency = [f"AP{value}" for value in FREQUENCIES] if self.frequencies else []
        by_group = [f"{group}/{name}" for group in self.groups for name in _GROUP_METRICS]
        return (
            "AP",
            "AP50",
            "AP75",
            *(f"AP{area[0]}" for area in AREAS[1:]),
            *by_frequency,
            *by_group,
        )

    def measure(self, precision_ATC: Floats) -> list[float]:
        """Return the metrics of average precision float64 (A, T, C) with NaN for absent categories."""
        all_TC = precision_ATC[0]
        at = [int(np.flatnonzero(np.isclose(IOU_THRESHOLDS_T, iou))[0]) for iou in (0.5, 0.75)]
        values = [_mean(all_TC), *(_mean(all_TC[index]) for index in at)]
        values += [_mean(precision_ATC[area]) for area in range(1, len(AREAS))]
        if self.frequencies:
            frequency_C = np.array(self.frequencies)
            values += [_mean(all_TC[:, frequency_C == value]) for value in FREQUENCIES]
        for mask_C in self.groups.values():
            values += [_mean(all_TC[:, mask_C]), _mean(all_TC[at[0], mask_C])]
        return values


def resample(
    precision: WeightedPrecision,
    truth: GroundTruth,
    sets: Sets,
    *,
    number: int,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Resamples:
    """Compute all metrics on the data set and on resamples of its images.

    Resample r of a seed draws the same images whatever is evaluated, so that two detectors' resamples are pairs.

    Args:
        precision: Average precision as a function of the images' weights.
        truth: The data set.
        sets: What metrics average over.
        number: How many resamples.
        seed: Of the draws.
        progress: Where progress is shown.
    """
    images = len(truth.image_ids)
    whole_ATC = precision.precision(np.ones(images))
    kinds = sets.frequencies or ("",) * whole_ATC.shape[2]
    few = FewImages(whole_ATC, precision.images_AC(), kinds)
    rare_C = np.array([value == "r" for value in truth.frequencies or ()], dtype=bool)

    def one(index: int) -> tuple[list[float], int]:
        drawn_ATC = precision.precision(drawn_weights(images, seed, index))
        widened_ATC = few.widen(drawn_ATC, pooling(seed, index))
        return sets.measure(widened_ATC), _present(drawn_ATC, rare_C)

    results = []
    with (
        progress.task("resampling", total=number, unit="resamples") as task,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        for result in pool.map(one, range(number)):
            results.append(result)
            task.advance()
    present = [count for _, count in results]
    return Resamples(
        names=sets.names,
        values_M=np.array(sets.measure(whole_ATC)),
        resampled_RM=np.array([values for values, _ in results]),
        rare=(_present(whole_ATC, rare_C), float(np.mean(present))) if rare_C.any() else None,
    )


def drawn_weights(images: int, seed: int, index: int) -> Floats:
    """Return how often each image is in a resample, float64 (I,): the same for every detector and metric.

    Args:
        images: How many there are.
        seed: Of all resamples.
        index: Which resample.
    """
    draw = np.random.default_rng([seed, index])
    return np.bincount(draw.integers(0, images, images), minlength=images).astype(np.float64)


def pooling(seed: int, index: int) -> np.random.Generator:
    """Return the generator that pools a resample's categories of a single image: the same for every detector."""
    return np.random.default_rng([seed, index, 1])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better one detector is than another on the same images.

    Attributes:
        metric: Its name.
        first: The first detector's value.
        second: The second's.
        difference: Second minus first.
        interval: Of the difference; None where there is one, but too few images to show how far it varies.
        chance: How often a difference at least this far from 0, either way, would come up if there were none; None
            where there is no interval.
    """

    metric: str
    first: float
    second: float
    difference: float
    interval: Interval | None
    chance: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0; never without one."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def differences(first: Resamples, second: Resamples, confidence: float) -> tuple[Difference, ...]:
    """Compare two detectors by pairs of resamples of the same images.

    Args:
        first: One detector's metrics, from `resample`.
        second: The other's, with the same seed and number on the same data set.
        confidence: Of the intervals, as 0.95.
    """
    if first.names != second.names or first.resampled_RM.shape != second.resampled_RM.shape:
        raise ValueError("the resamples are not pairs: other metrics, or another number")
    values_M = second.values_M - first.values_M
    resampled_RM = second.resampled_RM - first.resampled_RM
    intervals = _intervals(first.names, values_M, resampled_RM, confidence, least=-1.0)
    compared = []
    for index, name in enumerate(first.names):
        if name not in intervals:
            continue
        interval, chance = _surety(
            float(values_M[index]),
            intervals[name],
            float(np.nanstd(resampled_RM[:, index], ddof=1)),
        )
        compared.append(
            Difference(
                metric=name,
                first=float(first.values_M[index]),
                second=float(second.values_M[index]),
                difference=float(values_M[index]),
                interval=interval,
                chance=chance,
            )
        )
    return tuple(compared)


def _surety(
    difference: float, interval: Interval, error: float
) -> tuple[Interval | None, float | None]:
    """Return a difference's interval and chance, both None where the resamples agree on one (see `Resamples`)."""
    if interval.high - interval.low > _ROUNDING:
        return interval, 2 * (1 - NormalDist().cdf(abs(difference) / error))
    return (interval, 1.0) if abs(difference) <= _ROUNDING else (None, None)


def _intervals(
    names: Sequence[str],
    values_M: Floats,
    resampled_RM: Floats,
    confidence: float,
    *,
    least: float = 0.0,
) -> dict[str, Interval]:
    reach = NormalDist().inv_cdf(0.5 + confidence / 2)
    intervals = {}
    for index, name in enumerate(names):
        column_R = resampled_RM[:, index]
        known_R = column_R[~np.isnan(column_R)]
        if np.isnan(values_M[index]) or len(known_R) < 2:
            continue
        half = reach * float(known_R.std(ddof=1))
        value = float(values_M[index])
        intervals[name] = Interval(low=max(least, value - half), high=min(1.0, value + half))
    return intervals


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _present(precision_ATC: Floats, chosen_C: NDArray[np.bool_]) -> int:
    if not chosen_C.any():
        return 0
    return int(np.count_nonzero(~np.isnan(precision_ATC[0, 0, chosen_C])))
