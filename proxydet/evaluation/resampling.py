"""Average precision of a data set whose images count a given number of times each.

With weights of 1 this is the engines' average precision; with the counts of a resample, that resample's. Precision only
matters where an annotation is found, so all that depends on the weights is computed at those events, for all areas and
thresholds at once; where they stand among the other detections is worked out once.

Dimensions: I images, C categories, A areas, T IoU thresholds, S selected detections, N detections near an annotation,
K events (an annotation found by a detection, in an area and at a threshold), H segments (events of one area, threshold
and category), L counted detections of one kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxydet.evaluation.curves import RECALL_THRESHOLDS_R
from proxydet.evaluation.few_images import images_of
from proxydet.evaluation.matching import FOUND, IGNORED, Matches

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """Detections that count against precision, and how many of them are ahead of each event.

    Attributes:
        image_L: Their images, in the order of their categories and scores.
        start_H: Where the detections of each segment's category start among them.
        end_K: How many of them start no later than the event.
    """

    image_L: Integers
    start_H: Integers
    end_K: Integers

    def weigh(self, weight_I: Floats) -> tuple[Floats, Floats]:
        """Return the weight of all detections up to each event, and of those before its segment's category."""
        sums = np.zeros(len(self.image_L) + 1)
        np.cumsum(weight_I[self.image_L], out=sums[1:])
        return sums[self.end_K], sums[self.start_H]


class WeightedPrecision:
    """Average precision as a function of how often each image counts.

    Args:
        matches: What became of each detection.
        categories: How many categories there are.
    """

    def __init__(self, matches: Matches, categories: int) -> None:
        areas, thresholds = matches.state_NAT.shape[1:]
        self._shape = (areas, thresholds, categories)
        selection = matches.selection
        # Within a category: descending score, of equals the lower image, then the order within the image.
        order_S = np.lexsort((-selection.score_S, selection.category_S))
        self._place_S = np.empty_like(order_S)
        self._place_S[order_S] = np.arange(len(order_S))
        near_order = np.argsort(self._place_S[matches.near_N])
        self._near_N = matches.near_N[near_order]
        self._state_NAT = matches.state_NAT[near_order]
        self._matches = matches
        self._counted_annotations()
        self._collect_events(order_S)

    def _counted_annotations(self) -> None:
        counted, area = np.nonzero(self._matches.counts_GA)
        self._ann_image = self._matches.ann_image_G[counted]
        self._ann_slot = area * self._shape[2] + self._matches.ann_category_G[counted]

    def _collect_events(self, order_S: Integers) -> None:
        """Find the events, and the detections ahead of them."""
        areas, thresholds, categories = self._shape
        silent_SA = self._matches.silent_SA
        found_NAT = self._state_NAT == FOUND
        counts_NAT = found_NAT | (
            (self._state_NAT != IGNORED) & ~silent_SA[self._near_N][:, :, None]
        )
        always_SA = ~silent_SA
        always_SA[self._near_N] = counts_NAT.all(axis=2)
        sometimes_NAT = counts_NAT & ~counts_NAT.all(axis=2, keepdims=True)
        area_K, threshold_K, near_K = np.nonzero(found_NAT.transpose(1, 2, 0))
        event_K = self._near_N[near_K]
        selection = self._matches.selection
        category_K = selection.category_S[event_K]
        self._image_K = selection.image_S[event_K]
        segment_K = (area_K * thresholds + threshold_K) * categories + category_K
        self._heads = np.flatnonzero(np.append(True, np.diff(segment_K) != 0)[: len(segment_K)])
        self._lengths = np.diff(np.append(self._heads, len(segment_K)))
        self._segments = segment_K[self._heads]
        # Running from the end, nothing passes from one segment to the one before: earlier ones lie higher.
        self._level_K = np.repeat(2.0 * np.arange(len(self._heads))[::-1], self._lengths)
        self._slot_H = (area_K * categories + category_K)[self._heads]
        always = order_S[always_SA[order_S].T.nonzero()[1]]
        always_area = np.repeat(np.arange(areas), np.count_nonzero(always_SA, axis=0))
        self._always = self._ahead(always, always_area, event_K, area_K)
        some_area, some_threshold, some_near = np.nonzero(sometimes_NAT.transpose(1, 2, 0))
        self._sometimes = self._ahead(
            self._near_N[some_near],
            some_area * thresholds + some_threshold,
            event_K,
            area_K * thresholds + threshold_K,
        )

    def _ahead(
        self, listed: Integers, group: Integers, event_K: Integers, group_K: Integers
    ) -> _Ahead:
        """Place events among detections of the same group; both are ordered by group, category and score."""
        selection, size = self._matches.selection, len(self._place_S) + 1
        categories = self._shape[2]
        key = group * size + self._place_S[listed]
        by_category = group * categories + selection.category_S[listed]
        return _Ahead(
            image_L=selection.image_S[listed],
            start_H=np.searchsorted(
                by_category,
                (group_K * categories + selection.category_S[event_K])[self._heads],
                side="left",
            ),
            end_K=np.searchsorted(key, group_K * size + self._place_S[event_K], side="right"),
        )

    def images_AC(self) -> Integers:
        """Return in how many images each category has annotations that count, by area: int64 (A, C)."""
        areas, _, categories = self._shape
        number = images_of(self._ann_image, self._ann_slot, areas * categories)
        return number.reshape(areas, categories)

    def precision(self, weight_I: Floats) -> Floats:
        """Return average precision.

        Args:
            weight_I: float64, how often each image counts, 0 or more.

        Returns:
            float64 (A, T, C); NaN for categories without an annotation of that area in the images that count.
        """
        areas, thresholds, categories = self._shape
        present: Floats = np.bincount(
            self._ann_slot, weights=weight_I[self._ann_image], minlength=areas * categories
        ).astype(np.float64)
        average = np.where(present > 0, 0.0, np.nan).reshape(areas, 1, categories)
        precision_ATC = np.repeat(average, thresholds, axis=1)
        if len(self._heads):
            sums = self._sums(weight_I, present) / len(RECALL_THRESHOLDS_R)
            flat = precision_ATC.reshape(-1)
            flat[self._segments] += sums
        return precision_ATC

    def _sums(self, weight_I: Floats, present: Floats) -> Floats:
        """Return precision summed over the recall thresholds, for each area, threshold and category with events."""
        found_K = np.cumsum(weight_I[self._image_K])
        found_K -= self._spread(found_K[self._heads] - weight_I[self._image_K[self._heads]])
        always_K, before_H = self._always.weigh(weight_I)
        sometimes_K, also_before_H = self._sometimes.weigh(weight_I)
        counted_K = always_K + sometimes_K - self._spread(before_H + also_before_H)
        # The same expression as the official evaluators', to the last bit.
        precision_K = found_K / (counted_K + np.spacing(1))
        self._best_from_here_on(precision_K)
        # A segment whose annotations all have weight 0 has no event that counts; it must only not divide by 0.
        found_K /= self._spread(np.maximum(present[self._slot_H], 1e-300))
        reached_K = _thresholds_reached(found_K)
        passed_K = np.diff(reached_K, prepend=0.0)
        passed_K[self._heads] = reached_K[self._heads]
        precision_K *= passed_K
        sums: Floats = np.add.reduceat(precision_K, self._heads)
        return sums

    def _spread(self, values_H: Floats) -> Floats:
        """Give each event its segment's value."""
        return np.repeat(values_H, self._lengths)

    def _best_from_here_on(self, precision_K: Floats) -> None:
        """Replace each precision by the largest at it or after it in its segment."""
        precision_K += self._level_K
        backwards = precision_K[::-1]
        np.maximum.accumulate(backwards, out=backwards)
        precision_K -= self._level_K


def _thresholds_reached(recall: Floats) -> Floats:
    """Return how many of the recall thresholds are at most ``recall``, as floats."""
    nearest = np.rint(recall * (len(RECALL_THRESHOLDS_R) - 1))
    reached: Floats = nearest + (recall >= RECALL_THRESHOLDS_R[nearest.astype(np.int64)])
    return reached
