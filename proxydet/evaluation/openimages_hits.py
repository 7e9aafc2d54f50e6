"""What OpenImages' average precision is computed from, as a function of how often each image counts.

Dimensions: I images, C categories, H hits and false detections, A annotations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Hits:
    """What became of detections, ordered by category, then descending score.

    Attributes:
        category_H: int64 in [0, C).
        image_H: int64 in [0, I).
        right_H: Whether an annotation was found.
        ann_image_A: int64 in [0, I), the images of what is to be found.
        ann_category_A: int64 in [0, C), its categories.
    """

    category_H: NDArray[np.int64]
    image_H: NDArray[np.int64]
    right_H: NDArray[np.bool_]
    ann_image_A: NDArray[np.int64]
    ann_category_A: NDArray[np.int64]

    def ap50(self, weight_I: NDArray[np.float64], categories: int) -> NDArray[np.float64]:
        """Return average precision at IoU 0.5 when each image counts a given number of times.

        Args:
            weight_I: How often, 0 or more.
            categories: How many there are.

        Returns:
            float64 (C,); NaN for categories without annotations in the images that count.
        """
        total_C = np.bincount(
            self.ann_category_A, weights=weight_I[self.ann_image_A], minlength=categories
        )
        average_C = np.where(total_C > 0, 0.0, np.nan)
        if not len(self.image_H):
            return average_C
        weight_H = weight_I[self.image_H]
        found_H = weight_H * self.right_H
        heads = np.flatnonzero(np.append(True, np.diff(self.category_H) != 0))
        lengths = np.diff(np.append(heads, len(weight_H)))
        precision_H = _running(found_H, heads, lengths) / np.maximum(
            _running(weight_H, heads, lengths), 1e-300
        )
        # Made to fall within each category: earlier ones lie higher, so that nothing passes from one to the one before.
        level_H = np.repeat(2.0 * np.arange(len(heads))[::-1], lengths)
        falling_H = np.maximum.accumulate((precision_H + level_H)[::-1])[::-1] - level_H
        area_C = np.bincount(self.category_H, weights=found_H * falling_H, minlength=categories)
        known_C = total_C > 0
        average_C[known_C] = area_C[known_C] / total_C[known_C]
        return average_C


def _running(
    values_H: NDArray[np.float64], heads: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return running sums that start anew at each of ``heads``."""
    sums_H = np.cumsum(values_H)
    before = sums_H[heads] - values_H[heads]
    within_H: NDArray[np.float64] = sums_H - np.repeat(before, lengths)
    return within_H
