"""A mask as the part of a picture that it lies in, so that small objects of large pictures stay small.

Dimensions: H and W the picture, h and w the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskWindow:
    """A mask that is False outside a window of its picture.

    Attributes:
        top: First row of the window.
        left: First column of the window.
        inside_hw: bool, the mask in the window.
        size: H and W.
    """

    top: int
    left: int
    inside_hw: Bools
    size: tuple[int, int]

    def whole(self) -> Bools:
        """Return the mask in the whole picture: bool (H, W)."""
        mask_HW = np.zeros(self.size, dtype=np.bool_)
        height, width = self.inside_hw.shape
        mask_HW[self.top : self.top + height, self.left : self.left + width] = self.inside_hw
        return mask_HW

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.inside_hw))

    def runs(self) -> Integers:
        """Return the lengths of runs of equal pixels, column after column, the first of pixels outside the mask.

        These are the counts of COCO's uncompressed run-length encoding: they add up to H * W, and only the first may
        be 0.
        """
        height, width = self.size
        columns_wh = np.zeros(
            (self.inside_hw.shape[1], self.inside_hw.shape[0] + 2), dtype=np.bool_
        )
        columns_wh[:, 1:-1] = self.inside_hw.T
        column, row = np.nonzero(columns_wh[:, 1:] != columns_wh[:, :-1])
        changes = (self.left + column) * height + self.top + row
        # Where one column ends inside the mask and the next begins inside it, nothing changes.
        changes, times = np.unique(changes, return_counts=True)
        changes = changes[times == 1]
        end = [] if len(changes) and changes[-1] == height * width else [height * width]
        counts: Integers = np.diff(changes, prepend=0, append=end)
        return counts
