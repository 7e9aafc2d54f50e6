"""Which convention the boxes of a file follow: x, y, width, height in pixels, or another one that reads as numbers too."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MOST_COMPARED = 2000
"""Boxes that are compared with their own masks."""
_ALL = 0.95
_MOST = 0.9
_FEWEST = 3
_APART = 0.05
_SMALLEST_IMAGE = 2


class BoxConvention:
    """Counts, block by block, what boxes would be in each convention; a few outliers decide nothing.

    Dimensions: N boxes of a block.
    """

    def __init__(self) -> None:
        self._boxes = self._fractions = self._beyond = self._corners = 0
        self._compared = self._differing = self._better_as_corners = 0

    def add(self, xywh_N4: npt.NDArray[np.float64], size_N2: npt.NDArray[np.integer]) -> None:
        """Count boxes.

        Args:
            xywh_N4: The four numbers of each box as the file has them, finite.
            size_N2: Height and width of each box's image, pixels.
        """
        drawn_N = xywh_N4.any(axis=1)
        boxes_N4, wh_N2 = xywh_N4[drawn_N], size_N2[drawn_N, ::-1].astype(np.float64)
        self._boxes += len(boxes_N4)
        in_unit_N = ((boxes_N4 >= 0) & (boxes_N4 <= 1)).all(axis=1)
        self._fractions += int((in_unit_N & (wh_N2 > _SMALLEST_IMAGE).all(axis=1)).sum())
        self._beyond += int((boxes_N4[:, :2] + boxes_N4[:, 2:] > wh_N2 + 1).any(axis=1).sum())
        ordered_N = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(axis=1)
        self._corners += int((ordered_N & (boxes_N4[:, 2:] <= wh_N2 + 1).all(axis=1)).sum())

    @property
    def compares(self) -> int:
        """How many more boxes are to be compared with their masks."""
        return _MOST_COMPARED - self._compared

    def compare(self, xywh_N4: npt.NDArray[np.float64], extent_N4: npt.NDArray[np.float64]) -> None:
        """Count how boxes overlap the extents of their own masks, as they are and read as two corners.

        Args:
            xywh_N4: The four numbers of each box as the file has them, finite.
            extent_N4: x, y, width, height of the mask of each, pixels.
        """
        as_is_N = _overlap(xywh_N4, extent_N4)
        sides_N2 = np.maximum(xywh_N4[:, 2:] - xywh_N4[:, :2], 0)
        as_corners_N = _overlap(np.concatenate([xywh_N4[:, :2], sides_N2], axis=1), extent_N4)
        self._compared += len(xywh_N4)
        self._differing += int((np.abs(as_is_N - as_corners_N) > _APART).sum())
        better_N = (as_corners_N > as_is_N + _APART) & (as_corners_N > 0.5)
        self._better_as_corners += int(better_N.sum())

    def deviation(self) -> str | None:
        """Return the deviation that most boxes show: fractions of the image, or two corners; None for pixels."""
        if self._boxes and self._fractions >= _ALL * self._boxes:
            return "file.convention.fractions"
        if self._differing >= _FEWEST:  # masks decide
            corners = self._better_as_corners >= _MOST * self._differing
        else:
            corners = (
                self._boxes >= _FEWEST
                and self._beyond > self._boxes / 2
                and self._corners >= _ALL * self._boxes
            )
        return "file.convention.xyxy" if corners else None


def _overlap(
    first_N4: npt.NDArray[np.float64], second_N4: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the IoU of each pair of boxes (x, y, width, height)."""
    low_N2 = np.maximum(first_N4[:, :2], second_N4[:, :2])
    ends = [boxes_N4[:, :2] + boxes_N4[:, 2:] for boxes_N4 in (first_N4, second_N4)]
    common_N = np.maximum(np.minimum(*ends) - low_N2, 0).prod(axis=1)
    union_N = first_N4[:, 2:].prod(axis=1) + second_N4[:, 2:].prod(axis=1) - common_N
    overlap_N: npt.NDArray[np.float64] = common_N / np.maximum(union_N, 1e-9)
    return overlap_N
