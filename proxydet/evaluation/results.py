"""Detections in columns, whatever file they came from.

Dimensions: D detections, M distinct masks. Detections keep the order of their file: among equal scores in one image the
official evaluators count the earlier one first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Results:
    """Detections of a data set, numbered as its :class:`~proxydet.evaluation.ground_truth.GroundTruth` numbers.

    Attributes:
        path: The file that they were read from; None for values.
        image_D: int64 in [0, I).
        category_D: int64 in [0, C).
        score_D: float64, finite.
        box_D4: float64, x, y, width, height in pixels of the original image.
        mask_D: int64 in [0, M), which mask a detection has; -1 where it has none, or none was kept because its
            category is not judged in its image.
        masks: M compressed RLE masks (``size`` and ``counts``).
        mask_area_M: float64, pixels.
        without_mask: How many detections the file has no mask for.
    """

    path: Path | None
    image_D: NDArray[np.int64]
    category_D: NDArray[np.int64]
    score_D: NDArray[np.float64]
    box_D4: NDArray[np.float64]
    mask_D: NDArray[np.int64]
    masks: list[dict[str, Any]] = field(repr=False)
    mask_area_M: NDArray[np.float64]
    without_mask: int

    def __len__(self) -> int:
        return len(self.score_D)

    @property
    def has_masks(self) -> bool:
        """Whether masks can be scored: every detection has one."""
        return self.without_mask == 0

    def take(self, chosen: NDArray[np.int64]) -> Results:
        """Return the detections of the given numbers, in their file's order."""
        kept = np.sort(chosen)
        return replace(
            self,
            image_D=self.image_D[kept],
            category_D=self.category_D[kept],
            score_D=self.score_D[kept],
            box_D4=self.box_D4[kept],
            mask_D=self.mask_D[kept],
        )


@dataclass
class ResultsBuilder:
    """Collects detections part by part, and holds them in arrays rather than in Python objects.

    Attributes:
        path: The file that they come from; None for values.
        seen: Detections looked at, including those that could not be placed in the data set.
    """

    path: Path | None = None
    seen: int = 0
    _parts: list[Results] = field(default_factory=list)

    def add(self, part: Results) -> None:
        """Append detections."""
        self._parts.append(part)

    def build(self) -> Results:
        """Return all detections added so far."""
        parts, self._parts = self._parts or [_NOTHING], []
        before = np.cumsum([0] + [len(part.masks) for part in parts])
        return Results(
            path=self.path,
            image_D=np.concatenate([part.image_D for part in parts]),
            category_D=np.concatenate([part.category_D for part in parts]),
            score_D=np.concatenate([part.score_D for part in parts]),
            box_D4=np.concatenate([part.box_D4 for part in parts]),
            mask_D=np.concatenate(
                [
                    np.where(part.mask_D < 0, -1, part.mask_D + shift)
                    for part, shift in zip(parts, before, strict=False)
                ]
            ),
            masks=[mask for part in parts for mask in part.masks],
            mask_area_M=np.concatenate([part.mask_area_M for part in parts]),
            without_mask=sum(part.without_mask for part in parts),
        )


_NOTHING = Results(
    path=None,
    image_D=np.zeros(0, dtype=np.int64),
    category_D=np.zeros(0, dtype=np.int64),
    score_D=np.zeros(0),
    box_D4=np.zeros((0, 4)),
    mask_D=np.zeros(0, dtype=np.int64),
    masks=[],
    mask_area_M=np.zeros(0),
    without_mask=0,
)
