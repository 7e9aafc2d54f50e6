"""Which convention the boxes of a file follow: x, y, width, height in pixels, or another one that reads as numbers too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MOST_COMPARED = 2000
"""Boxes, the first of the file, that are compared with their own masks."""
_ALL = 0.95
_MOST = 0.9
_FEWEST = 3
_FITS = 0.5
"""IoU of a box with its mask's box: from here on the two are of one object."""
_SMALLEST_IMAGE = 2


class BoxConvention:
    """Counts, block by block, what boxes would be in each convention; a few outliers decide nothing.

    Annotations and results are both read with it. Dimensions: N boxes of a block.

    Args:
        exact: Whether masks fill their boxes, as annotated ones do; of detections either may be far off.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._fits, self._apart = (0.9, 0.25) if exact else (_FITS, 0.05)
        self._boxes = self._fractions = self._beyond = self._corners = 0
        self._compared = self._differing = self._better_as_corners = self._unlike = 0

    def add(self, xywh_N4: npt.NDArray[np.float64], size_N2: npt.NDArray[np.integer]) -> None:
        """Count boxes; those that are not finite or without extent say nothing.

        Args:
            xywh_N4: The four numbers of each box as the file has them.
            size_N2: Height and width of each box's image, pixels.
        """
        # By columns: numpy reduces along rows of four slowly.
        x_N, y_N, w_N, h_N = xywh_N4.T
        width_N, height_N = size_N2[:, 1], size_N2[:, 0]
        telling_N = (w_N > 0) & (h_N > 0)
        for side_N in (x_N, y_N, w_N, h_N):
            telling_N &= np.isfinite(side_N)
        self._boxes += int(telling_N.sum())
        in_unit_N = (x_N >= 0) & (y_N >= 0)
        for side_N in (x_N, y_N, w_N, h_N):
            in_unit_N &= side_N < 1.001
        in_unit_N &= (width_N > _SMALLEST_IMAGE) & (height_N > _SMALLEST_IMAGE)
        self._fractions += int((in_unit_N & telling_N).sum())
        beyond_N = (x_N + w_N > width_N + 1) | (y_N + h_N > height_N + 1)
        self._beyond += int((beyond_N & telling_N).sum())
        ordered_N = (w_N > x_N) & (h_N > y_N) & (w_N <= width_N + 1) & (h_N <= height_N + 1)
        self._corners += int((ordered_N & telling_N).sum())

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
        self._differing += int((np.abs(as_is_N - as_corners_N) > self._apart).sum())
        better_N = (as_corners_N > as_is_N + self._apart) & (as_corners_N > self._fits)
        self._better_as_corners += int(better_N.sum())
        self._unlike += int((as_is_N < _FITS).sum())

    def deviation(self) -> tuple[str, str] | None:
        """Return the deviation that most boxes show, and how many of how many do; None where they are as they should be."""
        if self._boxes and self._fractions >= _ALL * self._boxes:
            return "file.convention.fractions", f"{self._fractions} of {self._boxes} boxes"
        number, total = self._corners, self._boxes
        if self._differing >= (1 if self._exact else _FEWEST):  # masks decide
            number, total = self._better_as_corners, self._differing
            corners = number >= _MOST * total
        else:
            corners = total >= _FEWEST and self._beyond > total / 2 and number >= _ALL * total
        if corners:
            return "file.convention.xyxy", f"{number} of {total} boxes"
        if self._exact and self._compared >= _FEWEST and self._unlike > self._compared / 2:
            return "file.convention.masks", f"{self._unlike} of {self._compared} boxes"
        return None


def fit_by_convention(
    xywh_N4: npt.NDArray[np.float64], annotated: Sequence[npt.NDArray[np.float64]]
) -> tuple[int, int]:
    """Count the detections that fit an annotated box of their image in one convention only.

    Args:
        xywh_N4: The four numbers of each detection's box as the file has them.
        annotated: For each detection x, y, width, height of the annotated boxes of its image: float64 (A, 4), pixels.

    Returns:
        How many fit as they are, and how many read as two corners.
    """
    sides_N2 = np.maximum(xywh_N4[:, 2:] - xywh_N4[:, :2], 0)
    corners_N4 = np.concatenate([xywh_N4[:, :2], sides_N2], axis=1)
    # One row a pair of a detection and an annotated box of its image.
    row_P = np.repeat(np.arange(len(annotated)), [len(boxes_A4) for boxes_A4 in annotated])
    boxes_P4 = np.concatenate([np.zeros((0, 4)), *annotated])
    as_is_N, as_corners_N = (
        np.bincount(row_P, _overlap(read_N4[row_P], boxes_P4) >= _FITS, len(annotated)) > 0
        for read_N4 in (xywh_N4, corners_N4)
    )
    return int((as_is_N & ~as_corners_N).sum()), int((as_corners_N & ~as_is_N).sum())


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
