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
area, threshold and category), L counted detections of one kind, B categories computed at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.matching import FOUND, IGNORED, Matches
from proxydet.evaluation.report import Interval
from proxydet.evaluation.scoring import AREAS, RECALL_THRESHOLDS_R, measures, narrow, summary
from proxydet.reporting import SILENT, Progress

if TYPE_CHECKING:
    from proxydet.evaluation.ground_truth import GroundTruth

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_ROUNDING = 1e-9
"""Resamples that differ by less agree: they only add in another order."""
_SEGMENTS_AT_ONCE = 256
"""Segments of a block, about; with as many weightings as these, what a step touches stays in the processor's cache."""
_WEIGHTINGS_AT_ONCE, _VALUES_AT_ONCE = 256, 1 << 23
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
        whole_A3C: The `summary` of the data set itself; None for OpenImages.
    """

    names: tuple[str, ...]
    values_M: Floats
    resampled_RM: Floats
    rare: tuple[int, float] | None
    whole_A3C: Floats | None = None

    def intervals(self, confidence: float) -> dict[str, Interval]:
        """Return an interval for each metric whose resamples differ.

        Where all resamples agree there is no spread to speak of, only too few images to show one: categories of a
        single image each are either in a resample as they are or not at all.
        """
        intervals = _intervals(self.names, self.values_M, self.resampled_RM, confidence)
        return {
            name: value for name, value in intervals.items() if value.high - value.low > _ROUNDING
        }


def resample(
    precision: WeightedPrecision,
    truth: GroundTruth,
    groups: Mapping[str, NDArray[np.bool_]],
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
        groups: Sets of categories to average over, besides those of one frequency.
        number: How many resamples.
        seed: Of the draws.
        progress: Where progress is shown.
    """
    images, categories = len(truth.image_ids), precision.categories
    rare_C = np.array([value == "r" for value in truth.frequencies or ()], dtype=bool)
    values, present = [], []
    at_once = max(16, min(_WEIGHTINGS_AT_ONCE, _VALUES_AT_ONCE // max(images, 12 * categories)))
    with progress.task("resampling", total=number, unit="resamples") as task:
        # The data set itself, which has every image once, is resample -1.
        for start in range(-1, number, at_once):
            indices = range(start, min(start + at_once, number))
            weight_RI = [
                drawn_weights(images, seed, r) if r >= 0 else np.ones(images) for r in indices
            ]
            drawn_RA3C = np.empty((len(indices), len(AREAS), 3, categories))
            for category_B, precision_ATBR in precision.blocks(np.transpose(weight_RI)):
                drawn_RA3C[..., category_B] = np.moveaxis(summary(precision_ATBR), -1, 0)
            if start < 0:
                whole_A3C = drawn_RA3C[0].copy()
                kinds = truth.frequencies or ("",) * categories
                few = FewImages(whole_A3C, precision.images_AC(), kinds)
            for index, drawn_A3C in zip(indices, drawn_RA3C, strict=True):
                if index >= 0:
                    widened_A3C = few.widen(drawn_A3C, pooling(seed, index))
                    values.append([*measures(widened_A3C, truth.frequencies, groups).values()])
                    present.append(_present(drawn_A3C, rare_C))
            task.advance(len(indices))
    whole = measures(whole_A3C, truth.frequencies, groups)
    return Resamples(
        names=tuple(whole),
        whole_A3C=whole_A3C,
        values_M=np.array([*whole.values()]),
        resampled_RM=np.array(values),
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
        raise ValueError("the resamples are not paired: the metrics or their number differ")
    values_M = second.values_M - first.values_M
    resampled_RM = second.resampled_RM - first.resampled_RM
    intervals = _intervals(first.names, values_M, resampled_RM, confidence, least=-1.0)
    compared = []
    for index, name in enumerate(first.names):
        if name not in intervals:
            continue
        difference, interval, chance = float(values_M[index]), intervals[name], None
        if interval.high - interval.low > _ROUNDING:
            error = float(np.nanstd(resampled_RM[:, index], ddof=1))
            chance = 2 * (1 - NormalDist().cdf(abs(difference) / error))
        elif abs(difference) <= _ROUNDING:
            chance = 1.0
        compared.append(
            Difference(
                metric=name,
                first=float(first.values_M[index]),
                second=float(second.values_M[index]),
                difference=difference,
                interval=None if chance is None else interval,
                chance=chance,
            )
        )
    return tuple(compared)


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


def _present(summary_A3C: Floats, chosen_C: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(~np.isnan(summary_A3C[0, 0, chosen_C])))


class WeightedPrecision:
    """Average precision as a function of how often each image counts.

    With weights of 1 this is the engines' average precision; with the counts of a resample, that resample's. Precision
    only matters where an annotation is found, so all that depends on the weights is computed at those events. Weightings
    are columns: one step handles an event of each of several segments for all weightings at once.

    Args:
        matches: What each detection was matched to.
        categories: How many categories there are.
    """

    def __init__(self, matches: Matches, categories: int) -> None:
        areas, thresholds = matches.state_NAT.shape[1:]
        self._shape, self.categories = (areas, thresholds, categories), categories
        selection = matches.selection
        counted, area = np.nonzero(matches.counts_GA)
        self._ann_image = matches.ann_image_G[counted]
        self._ann_slot = area * categories + matches.ann_category_G[counted]
        # Categories of like numbers of events are neighbours, so that their segments end in like steps.
        found_NAT = matches.state_NAT == FOUND
        near_category_N = selection.category_S[matches.near_N]
        events_C = np.bincount(near_category_N, found_NAT.sum(axis=(1, 2)), minlength=categories)
        self._category_C = np.argsort(-events_C, kind="stable")
        rank_C = np.argsort(self._category_C)
        # Within a category: descending score, of equals the lower image, then the order within the image.
        order_S = np.lexsort((-selection.score_S, narrow(rank_C[selection.category_S], categories)))
        place_S = np.empty_like(order_S)
        place_S[order_S] = np.arange(len(order_S))
        image_S, rank_S = selection.image_S[order_S], rank_C[selection.category_S[order_S]]
        place_N = place_S[matches.near_N]
        silent_SA = matches.silent_SA[order_S]
        counts_NAT = (matches.state_NAT != IGNORED) & ~silent_SA[place_N][:, :, None] | found_NAT
        # Detections that count against precision at every threshold; those near an annotation may at some only.
        always_SA = ~silent_SA
        always_SA[place_N] = counts_NAT.all(axis=2)

        def listed(
            chosen: NDArray[np.bool_], place: Integers | None = None
        ) -> tuple[Integers, Integers]:
            """Return the group (category, area, threshold) and the place of what is chosen, in ascending order."""
            at_L, *parts = np.nonzero(chosen)
            place_L = at_L if place is None else place[at_L]
            group_L = rank_S[place_L]
            for part, size in zip(parts, chosen.shape[1:], strict=True):
                group_L = group_L * size + part
            order_L = np.lexsort((place_L, narrow(group_L, int(group_L.max(initial=0)))))
            return group_L[order_L], place_L[order_L]

        segment_K, place_K = listed(found_NAT, place_N)
        ahead = []
        for group_K, (group_L, place_L) in (
            (segment_K // thresholds, listed(always_SA)),
            (segment_K, listed(counts_NAT & ~always_SA[place_N][:, :, None], place_N)),
        ):
            key_L, key_K = (
                group * len(order_S) + place
                for group, place in ((group_L, place_L), (group_K, place_K))
            )
            end_K = np.searchsorted(key_L, key_K, side="right")
            ahead.append((image_S[place_L], np.searchsorted(group_L, group_K), end_K))
        slot_G, image_G = rank_C[self._ann_slot % categories] * areas + area, self._ann_image
        order_G = np.argsort(slot_G, kind="stable")
        slot_G, image_G = slot_G[order_G], image_G[order_G]
        segments_C = np.bincount(np.unique(segment_K) // (areas * thresholds), minlength=categories)
        block_C = np.cumsum(segments_C + 1) // _SEGMENTS_AT_ONCE
        cuts = [*np.flatnonzero(np.diff(block_C, prepend=-1)).tolist(), categories]
        self._blocks = []
        for first, end in itertools.pairwise(cuts):
            in_K = slice(*np.searchsorted(segment_K, np.array([first, end]) * areas * thresholds))
            in_G = slice(*np.searchsorted(slot_G, np.array([first, end]) * areas))
            block = _Block(
                (end - first, areas, thresholds),
                segment_K[in_K] - first * areas * thresholds,
                image_S[place_K[in_K]],
                [(image_L, start_K[in_K], end_K[in_K]) for image_L, start_K, end_K in ahead],
                slot_G[in_G] - first * areas,
                image_G[in_G],
            )
            self._blocks.append((self._category_C[first:end], block))

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
        precision_ATC = np.empty(self._shape)
        for category_B, precision_ATBR in self.blocks(np.asarray(weight_I)[:, None]):
            precision_ATC[:, :, category_B] = precision_ATBR[..., 0]
        return precision_ATC

    def blocks(self, weight_IR: NDArray[Any]) -> Iterator[tuple[Integers, Floats]]:
        """Yield categories, some at a time, with their average precision.

        Args:
            weight_IR: How often each image counts, 0 or more, in R weightings.

        Yields:
            int64 (B,), numbers of categories, and float64 (A, T, B, R), NaN as of `precision`.
        """
        weight_IR = np.ascontiguousarray(weight_IR, dtype=np.float64)
        for category_B, block in self._blocks:
            yield category_B, np.moveaxis(block.precision(weight_IR), 0, 2)


def _in_turns(
    first_G: Integers, length_G: Integers, step: int = 1
) -> tuple[Integers, Integers, list[int]]:
    """Return elements of groups in turns: the first one of every group, then the second one of every group that has one.

    Args:
        first_G: Position of each group's first element.
        length_G: How many it has.
        step: From an element's position to that of the next.

    Returns:
        The groups by descending length, so that those that have a turn are always the first ones; the positions; and
        where each turn starts in them, and where the last one ends.
    """
    order_G = np.argsort(-length_G, kind="stable")
    sizes = len(length_G) - np.cumsum(np.bincount(length_G))[:-1]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    turn_L = np.repeat(np.arange(len(sizes)), sizes)
    group_L = order_G[np.arange(starts[-1]) - starts[turn_L]]
    return order_G, first_G[group_L] + step * turn_L, starts.tolist()


class _Sums:
    """Sums over groups of rows of a table, with some of the groups empty.

    Args:
        row_L: The rows, group by group.
        first_G: Where each group starts in them.
        length_G: How many rows it has.
    """

    def __init__(self, row_L: Integers, first_G: Integers, length_G: Integers) -> None:
        self.order_G, at_L, self._starts = _in_turns(first_G, length_G)
        self._row_L = row_L[at_L]

    def of(self, table_IR: Floats) -> Floats:
        """Return the sums, in the groups' order ``order_G``."""
        sums_GR = np.zeros((len(self.order_G), table_IR.shape[1]))
        buffer_GR = np.empty_like(sums_GR)
        for start, end in itertools.pairwise(self._starts):
            size = end - start
            table_IR.take(self._row_L[start:end], 0, buffer_GR[:size], "clip")
            sums_GR[:size] += buffer_GR[:size]
        return sums_GR


class _Ahead:
    """How many detections of a list are ahead of each event, itself included.

    Args:
        image_L: The detections' images; those of a segment, or of all segments of an area and category, in succession.
        start_K: Where the detections of each event's segment start in them.
        end_K: Behind which of them the event is.
    """

    def __init__(self, image_L: Integers, start_K: Integers, end_K: Integers) -> None:
        # Each distinct number of detections is a row: the sum of the row before, and what lies between the two.
        size = len(image_L) + 1
        key_U, row_K = np.unique(start_K * size + end_K, return_inverse=True)
        start_U, end_U = np.divmod(key_U, size)
        head_V = np.flatnonzero(np.diff(start_U, prepend=-1))
        from_U = np.append(start_U[:1], end_U[:-1])
        from_U[head_V] = start_U[head_V]
        self._sums = _Sums(image_L, from_U, end_U - from_U)
        _, at_U, self._starts = _in_turns(head_V, np.diff(head_V, append=len(key_U)))
        self._position_U = np.argsort(self._sums.order_G)[at_U]
        self.row_K = np.argsort(at_U)[row_K]

    def of(self, weight_IR: Floats) -> Floats:
        """Return the weights' sums, one row a distinct number of detections; ``row_K`` is the row of each event."""
        sums_UR = self._sums.of(weight_IR).take(self._position_U, axis=0)
        for before, start, end in zip(
            self._starts, self._starts[1:], self._starts[2:], strict=False
        ):
            sums_UR[start:end] += sums_UR[before : before + end - start]
        return sums_UR


class _Block:
    """The events of some categories, few enough to stay in a processor's cache.

    Args:
        shape: B categories, A areas, T thresholds.
        segment_K: The segment of each event, ascending, in [0, B x A x T).
        image_K: The image of each event; within a segment in descending order of score.
        ahead: Lists of detections that count against precision, as `_Ahead` takes them.
        slot_G: Category and area of each annotation that counts, ascending, in [0, B x A).
        image_G: The image of each.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        segment_K: Integers,
        image_K: Integers,
        ahead: Sequence[tuple[Integers, Integers, Integers]],
        slot_G: Integers,
        image_G: Integers,
    ) -> None:
        self._shape = shape
        slots = np.arange(shape[0] * shape[1])
        first = np.searchsorted(slot_G, slots)
        self._annotations = _Sums(
            image_G, first, np.searchsorted(slot_G, slots, side="right") - first
        )
        self._slot_of_row = np.argsort(self._annotations.order_G)
        head_H = np.flatnonzero(np.diff(segment_K, prepend=-1))
        length_H = np.diff(head_H, append=len(segment_K))
        # From the last event of each segment to its first.
        order_H, at_K, self._starts = _in_turns(head_H + length_H - 1, length_H, -1)
        self._segment_H = segment_K[head_H[order_H]]
        self._image_K = image_K[at_K]
        self._events = _Sums(image_K, head_H, length_H)
        self._ahead = []
        for image_L, start_K, end_K in ahead:
            if (end_K > start_K).any():
                table = _Ahead(image_L, start_K, end_K)
                self._ahead.append((table, table.row_K[at_K]))

    def precision(self, weight_IR: Floats) -> Floats:
        """Return average precision, float64 (B, A, T, R), for weightings of images."""
        categories, areas, thresholds = self._shape
        weightings = weight_IR.shape[1]
        present_SR = self._annotations.of(weight_IR)[self._slot_of_row]
        average_SR = np.where(present_SR > 0, 0.0, np.nan)
        average_STR = np.repeat(average_SR[:, None], thresholds, axis=1)
        if len(self._segment_H):
            average_STR.reshape(-1, weightings)[self._segment_H] += self._average_HR(
                weight_IR, present_SR
            )
        return average_STR.reshape(categories, areas, thresholds, weightings)

    def _average_HR(self, weight_IR: Floats, present_SR: Floats) -> Floats:
        """Return the average precision of each segment that has events."""
        # A segment whose annotations all have weight 0 has no event that counts; it must only not divide by 0.
        present_HR = np.maximum(present_SR[self._segment_H // self._shape[2]], 1e-300)
        found_HR = self._events.of(weight_IR)
        tables = [(table.of(weight_IR), row_K) for table, row_K in self._ahead]
        average_HR, best_HR = np.zeros_like(found_HR), np.zeros_like(found_HR)
        buffers = np.empty((4, *found_HR.shape))
        over_HR = np.empty(found_HR.shape, dtype=bool)
        for start, end in itertools.pairwise(self._starts):
            size = end - start
            found, best, over = found_HR[:size], best_HR[:size], over_HR[:size]
            gain, reached, other, third = buffers[:, :size]
            first, *rest = tables
            first[0].take(first[1][start:end], 0, gain, "clip")
            for sums_UR, row_K in rest:
                gain += sums_UR.take(row_K[start:end], 0, other, "clip")
            # The same expression as the official evaluators', to the last bit.
            gain += np.spacing(1)
            np.divide(found, gain, out=gain)
            # By how much the largest precision here or later exceeds the largest one later.
            gain -= best
            np.maximum(gain, 0, out=gain)
            best += gain
            # Recall thresholds are multiples of a hundredth, as rounded as these: how many are reached here.
            np.divide(found, present_HR[:size], out=other)
            np.multiply(other, len(RECALL_THRESHOLDS_R) - 1, out=reached)
            np.rint(reached, out=reached)
            np.multiply(reached, RECALL_THRESHOLDS_R[1], out=third)
            np.greater_equal(other, third, out=over)
            reached += over
            gain *= reached
            average_HR[:size] += gain
            found -= weight_IR.take(self._image_K[start:end], 0, other, "clip")
        return average_HR / len(RECALL_THRESHOLDS_R)


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
