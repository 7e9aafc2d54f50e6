"""The spread that categories of few images have, and that resamples of the images do not show.

A category that is annotated in n images has n observations, and a resample draws from just these. The variance of their
mean comes out too small by the factor (n - 1) / n, as if the sum of squares were divided by n. Of a category with a
single image every resample that has it gives the same value: no spread at all. Rare categories have so few images, and
intervals made from plain resamples hold less often than they say. Two remedies from the statistics of surveys, where
strata of few units are common:

- deviations of a category from its value on the whole data set are multiplied by the factor that makes the variance of
  a mean of n values right (Rao and Wu, *Resampling inference with complex survey data*, JASA 1988);
- categories of a single image are pooled, as strata of a single unit are collapsed: in a resample each of them that is
  present takes the value of one drawn among them. Their quality differs too, so that this errs towards wider intervals.

Dimensions: A areas, T IoU thresholds, C categories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_MOST_TIMES = 60
_ENOUGH_IMAGES = 5
"""From this many images on, the varying number of them in a resample outweighs the missing spread."""


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
            drawn_ATC: On the resample; NaN for categories that it lacks.
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
