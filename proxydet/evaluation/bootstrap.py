"""How far results would move on other images of the same kind: the bootstrap over images.

A resample draws as many images as there are, with replacement, and every metric is computed again from the matches. The
spread of the resamples is the standard error, and the interval is the metric plus and minus a multiple of it. The
resamples' own quantiles would be off to one side: average precision of few annotations is biased, and that of a
resample, which has fewer distinct ones, is biased more.

A category that is annotated in n images has n observations, and a resample draws from just these. The variance of their
mean comes out too small by the factor (n - 1) / n, as if the sum of squares were divided by n. Of a category with a
single image every resample that has it gives the same value: no spread at all. Rare categories have so few images, and
intervals made from plain resamples hold less often than they say. Two remedies from the statistics of surveys, where
strata of few units are common:

- deviations of a category from its value on the whole data set are multiplied by the factor that makes the variance of
  a mean of n values right (Rao and Wu, *Resampling inference with complex survey data*, JASA 1988);
- categories of a single image are pooled, as strata of a single unit are collapsed: in a resample each of them that is
  present takes the value of one drawn among them. Their quality differs too, so that this errs towards wider intervals.

Dimensions: I images, C categories, A areas, T IoU thresholds, R resamples, M metrics, S selected detections, N detections
near an annotation, K events (an annotation found by a detection, in an area and at a threshold), H segments (events of one
area, threshold and category), L counted detections of one kind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from proxydet.data.protocol import FREQUENCIES
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.matching import FOUND, IGNORED, Matches
from proxydet.evaluation.report import Interval
from proxydet.evaluation.scoring import AREAS, IOU_THRESHOLDS_T, RECALL_THRESHOLDS_R
from proxydet.reporting import SILENT, Progress

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_GROUP_METRICS = ("AP", "AP50")
_ROUNDING = 1e-9
"""Resamples that differ by less agree: they only add in another order."""
_BLOCK = 1 << 16
"""Events that are computed at once: their dozen arrays stay in the processor's cache."""
_MOST_TIMES = 60
_ENOUGH_IMAGES = 5
"""From this many images on, the varying number of them in a resample outweighs the missing spread."""


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

    def measure(self, summary_A3C: Floats) -> list[float]:
        """Return the metrics of a `summary`."""
        all_3C = summary_A3C[0]
        values = [_mean(row_C) for row_C in (*all_3C, *summary_A3C[1:, 0])]
        if self.frequencies:
            frequency_C = np.array(self.frequencies)
            values += [_mean(all_3C[0, frequency_C == value]) for value in FREQUENCIES]
        for mask_C in self.groups.values():
            values += [_mean(all_3C[0, mask_C]), _mean(all_3C[1, mask_C])]
        return values


def summary(precision_ATC: Floats) -> Floats:
    """Return what metrics are made of: the mean over IoU thresholds, and the values at 0.5 and 0.75.

    Args:
        precision_ATC: Average precision; NaN for absent categories.

    Returns:
        float64 (A, 3, C).
    """
    at_50, at_75 = (precision_ATC[:, np.isclose(IOU_THRESHOLDS_T, iou)] for iou in (0.5, 0.75))
    return np.concatenate([precision_ATC.mean(axis=1, keepdims=True), at_50, at_75], axis=1)


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
    whole_A3C = summary(precision.precision(np.ones(images, dtype=np.int64)))
    kinds = sets.frequencies or ("",) * whole_A3C.shape[2]
    few = FewImages(whole_A3C, precision.images_AC(), kinds)
    rare_C = np.array([value == "r" for value in truth.frequencies or ()], dtype=bool)

    def one(index: int) -> tuple[list[float], int]:
        drawn_A3C = summary(precision.precision(drawn_weights(images, seed, index)))
        widened_A3C = few.widen(drawn_A3C, pooling(seed, index))
        return sets.measure(widened_A3C), _present(drawn_A3C, rare_C)

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
        values_M=np.array(sets.measure(whole_A3C)),
        resampled_RM=np.array([values for values, _ in results]),
        rare=(_present(whole_A3C, rare_C), float(np.mean(present))) if rare_C.any() else None,
    )


def drawn_weights(images: int, seed: int, index: int) -> Integers:
    """Return how often each image is in a resample, int64 (I,): the same for every detector and metric.

    Args:
        images: How many there are.
        seed: Of all resamples.
        index: Which resample.
    """
    draw = np.random.default_rng([seed, index])
    return np.bincount(draw.integers(0, images, images), minlength=images)


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


def _present(summary_A3C: Floats, chosen_C: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(~np.isnan(summary_A3C[0, 0, chosen_C])))


class WeightedPrecision:
    """Average precision as a function of how often each image counts.

    With weights of 1 this is the engines' average precision; with the counts of a resample, that resample's. Precision
    only matters where an annotation is found, so all that depends on the weights is computed at those events, for all
    areas and thresholds at once; where they stand among the other detections is worked out once.

    Args:
        matches: What each detection was matched to.
        categories: How many categories there are.
    """

    def __init__(self, matches: Matches, categories: int) -> None:
        areas, thresholds = matches.state_NAT.shape[1:]
        self._shape = (areas, thresholds, categories)
        selection, silent_SA = matches.selection, matches.silent_SA
        counted, area = np.nonzero(matches.counts_GA)
        self._ann_image = matches.ann_image_G[counted]
        self._ann_slot = area * categories + matches.ann_category_G[counted]
        # Within a category: descending score, of equals the lower image, then the order within the image.
        order_S = np.lexsort((-selection.score_S, selection.category_S))
        place_S = np.empty_like(order_S)
        place_S[order_S] = np.arange(len(order_S))
        near_order = np.argsort(place_S[matches.near_N])
        near_N, state_NAT = matches.near_N[near_order], matches.state_NAT[near_order]
        found_NAT = state_NAT == FOUND
        counts_NAT = found_NAT | ((state_NAT != IGNORED) & ~silent_SA[near_N][:, :, None])
        always_NA = counts_NAT.all(axis=2)
        always_SA = ~silent_SA
        always_SA[near_N] = always_NA
        # Both orders go from category to category, so that a block of categories is a slice of each.
        category_N = selection.category_S[near_N]
        cuts_N = np.flatnonzero(np.diff(category_N, prepend=-1))
        events_N = np.cumsum(found_NAT.sum(axis=(1, 2)))
        starts = [0, *(cuts_N[np.flatnonzero(np.diff(events_N[cuts_N] // _BLOCK, prepend=0))])]
        self._blocks = []
        for low, high in zip(starts, [*starts[1:], len(near_N)], strict=True):
            if low == high:
                continue
            within = np.searchsorted(
                selection.category_S[order_S], [category_N[low], category_N[high - 1] + 1]
            )
            block = _Block(
                selection.image_S,
                selection.category_S,
                categories,
                place_S,
                order_S[slice(*within)],
                near_N[low:high],
                found_NAT[low:high],
                always_SA,
                (counts_NAT & ~always_NA[:, :, None])[low:high],
            )
            if len(block.head_H):
                self._blocks.append(block)

    def images_AC(self) -> Integers:
        """Return in how many images each category has annotations that count, by area: int64 (A, C)."""
        areas, _, categories = self._shape
        number = images_of(self._ann_image, self._ann_slot, areas * categories)
        return number.reshape(areas, categories)

    def precision(self, weight_I: Integers) -> Floats:
        """Return average precision.

        Args:
            weight_I: int64, how often each image counts, 0 or more.

        Returns:
            float64 (A, T, C); NaN for categories without an annotation of that area in the images that count.
        """
        areas, thresholds, categories = self._shape
        weight_I = np.asarray(weight_I, dtype=np.int64)
        present = np.bincount(
            self._ann_slot, weights=weight_I[self._ann_image], minlength=areas * categories
        ).astype(np.float64)
        average_A1C = np.where(present > 0, 0.0, np.nan).reshape(areas, 1, categories)
        precision_ATC = np.repeat(average_A1C, thresholds, axis=1)
        short_I = weight_I.astype(np.int32)
        for block in self._blocks:
            precision_ATC.reshape(-1)[block.segment_H] += block.precision_H(short_I, present)
        return precision_ATC


class _Block:
    """The events of some categories, few enough to stay in a processor's cache.

    Args:
        image_S: Images of the selected detections.
        category_S: Their categories.
        categories: How many categories there are.
        place_S: Where each detection stands when they are sorted by category, then score.
        order_L: The detections of these categories, sorted so.
        near_N: Those of them near an annotation.
        found_NAT: Where these find one.
        always_SA: Which detections count against precision at every threshold.
        some_NAT: Where those near an annotation count that do not count at every threshold.
    """

    def __init__(
        self,
        image_S: Integers,
        category_S: Integers,
        categories: int,
        place_S: Integers,
        order_L: Integers,
        near_N: Integers,
        found_NAT: NDArray[np.bool_],
        always_SA: NDArray[np.bool_],
        some_NAT: NDArray[np.bool_],
    ) -> None:
        thresholds = found_NAT.shape[2]
        area_K, threshold_K, at_K = np.nonzero(found_NAT.transpose(1, 2, 0))
        event_K = near_N[at_K]
        self._image_K = image_S[event_K]
        category_K = category_S[event_K]
        segment_K = (area_K * thresholds + threshold_K) * categories + category_K
        self.head_H = np.flatnonzero(np.diff(segment_K, prepend=-1))
        self._length_H = np.diff(self.head_H, append=len(segment_K))
        self.segment_H = segment_K[self.head_H]
        self._slot_H = (area_K * categories + category_K)[self.head_H]
        # Running from the end, nothing passes from one segment to the one before: earlier ones lie higher.
        self._level_K = np.repeat(2.0 * np.arange(len(self.head_H))[::-1], self._length_H)
        # Detections that count against precision at every threshold, and at some; how many of its category's are ahead of
        # each event.
        always_area, at = np.nonzero(always_SA[order_L].T)
        some_area, some_threshold, some_at = np.nonzero(some_NAT.transpose(1, 2, 0))
        self._ahead = []
        for listed, group, group_K in (
            (order_L[at], always_area, area_K),
            (
                near_N[some_at],
                some_area * thresholds + some_threshold,
                area_K * thresholds + threshold_K,
            ),
        ):
            if not len(listed):
                continue
            size = len(place_S) + 1
            end_K = np.searchsorted(
                group * size + place_S[listed], group_K * size + place_S[event_K], side="right"
            )
            list_L = group * categories + category_S[listed]
            none_K = list_L[end_K - 1] != group_K * categories + category_K
            end_K[none_K | (end_K == 0)] = 0
            head_L = np.flatnonzero(np.diff(list_L, prepend=-1))
            self._ahead.append((image_S[listed], head_L, end_K))

    def precision_H(self, weight_I: NDArray[np.int32], present: Floats) -> Floats:
        """Return the average precision of each segment.

        Args:
            weight_I: How often each image counts.
            present: Weight of the annotations of each area and category.
        """
        # Sums of whole numbers: faster than those of floats, and exact.
        weight_K = weight_I.take(self._image_K)
        weight_K[self.head_H[1:]] -= np.add.reduceat(weight_K, self.head_H)[:-1]
        found_K = np.cumsum(weight_K, dtype=np.int32)
        counted_K = np.zeros_like(found_K)
        for image_L, head_L, end_K in self._ahead:
            sums = np.zeros(len(image_L) + 1, dtype=np.int32)
            weight_L = weight_I.take(image_L, out=sums[1:], mode="clip")
            weight_L[head_L[1:]] -= np.add.reduceat(weight_L, head_L)[:-1]
            np.cumsum(weight_L, out=weight_L)
            counted_K += sums.take(end_K)
        # The same expression as the official evaluators', to the last bit.
        best_K = found_K / (counted_K + np.spacing(1))
        # The largest precision at an event or after it in its segment; the bits of floats from 0 up order as they do.
        best_K += self._level_K
        backwards = best_K.view(np.int64)[::-1]
        np.maximum.accumulate(backwards, out=backwards)
        best_K -= self._level_K
        # A segment whose annotations all have weight 0 has no event that counts; it must only not divide by 0.
        present_H = np.maximum(present[self._slot_H], 1e-300)
        recall_K = found_K / np.repeat(present_H, self._length_H)
        # Recall thresholds are multiples of a hundredth, as rounded as these: how many each event has reached.
        reached_K = np.rint(recall_K * (len(RECALL_THRESHOLDS_R) - 1))
        reached_K += recall_K >= reached_K * RECALL_THRESHOLDS_R[1]
        passed_K = np.diff(reached_K, prepend=0)
        passed_K[self.head_H] = reached_K[self.head_H]
        best_K *= passed_K
        sums_H: Floats = np.add.reduceat(best_K, self.head_H) / len(RECALL_THRESHOLDS_R)
        return sums_H


class FewImages:
    """Widens the average precision of resamples where categories have few images.

    Args:
        whole_ATC: Average precision on the data set itself; NaN for absent categories.
        images_AC: int64 (A, C), in how many images each category has annotations of an area.
        kinds_C: Categories of a single image are pooled with those of the same kind.
    """

    def __init__(
        self, whole_ATC: Floats, images_AC: NDArray[np.int64], kinds_C: Sequence[str]
    ) -> None:
        self._whole_ATC = whole_ATC
        factors = np.array([widening(number) for number in range(_ENOUGH_IMAGES + 1)])
        self._factor_A1C = factors[np.minimum(images_AC, _ENOUGH_IMAGES)][:, None]
        kind_C = np.array(kinds_C)
        single_AC = images_AC == 1
        self._pools = [
            (area, np.flatnonzero(single_C & (kind_C == kind)))
            for area, single_C in enumerate(single_AC)
            for kind in np.unique(kind_C)
        ]

    def widen(self, drawn_ATC: Floats, draw: np.random.Generator) -> Floats:
        """Return a resample's average precision with its deviations widened; values may leave [0, 1].

        Args:
            drawn_ATC: On the resample; NaN for categories that it lacks. T may be any quantities.
            draw: Of this resample only, so that two detectors' resamples stay pairs.
        """
        wide_ATC = self._whole_ATC + self._factor_A1C * (drawn_ATC - self._whole_ATC)
        for area, pool in self._pools:
            taken = draw.choice(pool, len(pool)) if len(pool) else pool
            absent_TC = np.isnan(drawn_ATC[area][:, pool])
            wide_ATC[area][:, pool] = np.where(absent_TC, np.nan, self._whole_ATC[area][:, taken])
        return wide_ATC


def widening(images: int) -> float:
    """Return by what to multiply a resampled mean's deviations, when it is over the values of a few images.

    In a resample of a large data set about Poisson(n) of a category's images are drawn. Given m of them, the mean has the
    variance s^2 (n - 1) / (n m), where s^2 is the unbiased estimate; it should be s^2 / n.

    Args:
        images: How many, n.

    Returns:
        At least 1; 1 for a single image, whose deviations are all 0.
    """
    if not 2 <= images < _ENOUGH_IMAGES:
        return 1.0
    chance, inverse = math.exp(-images), 0.0
    for times in range(1, _MOST_TIMES):
        chance *= images / times
        inverse += chance / times
    inverse /= 1 - math.exp(-images)
    return max(1.0, 1 / math.sqrt((images - 1) * inverse))


def images_of(
    image_G: NDArray[np.int64], slot_G: NDArray[np.int64], slots: int
) -> NDArray[np.int64]:
    """Return in how many images each slot (as a category) has an entry, int64 (``slots``,).

    Args:
        image_G: The images of the entries.
        slot_G: Their slots.
        slots: How many there are.
    """
    pairs = np.unique(image_G * slots + slot_G)
    return np.bincount(pairs % slots, minlength=slots)
