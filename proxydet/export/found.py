"""What an exported detector found, in the pixels of the picture; numpy only.

Dimensions: N detections, M distinct boxes, S side of a mask, H and W the picture, h and w as it went into the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import InputError

_MASK_THRESHOLD = 0.5

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that was found in one picture, best first; the fields are named as `proxydet.Detections`' are.

    Attributes:
        boxes_xyxy: float32 (N, 4), left, top, right, bottom in pixels of the picture.
        scores: float32 (N,), descending.
        class_ids: int64 (N,), places in the vocabulary, from 0.
        labels: Class name of each detection.
        image_size: Height and width of the picture in pixels.
        mask_probs: float32 (M, S, S), probabilities inside the boxes; None where the file gives boxes only.
        mask_index: int64 (N,), the mask of each detection; None likewise.
    """

    boxes_xyxy: Floats
    scores: Floats
    class_ids: Integers
    labels: tuple[str, ...]
    image_size: tuple[int, int]
    mask_probs: Floats | None
    mask_index: Integers | None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def has_masks(self) -> bool:
        """Whether the exported detector predicts masks."""
        return self.mask_probs is not None

    def mask(self, index: int) -> Bools:
        """Return a detection's mask in the image: bool (H, W).

        Raises:
            InputError: The exported detector finds boxes only.
        """
        probs, places = self._require_masks()
        return paste(probs[places[index]], self.boxes_xyxy[index], self.image_size)

    @property
    def masks(self) -> Bools:
        """All masks in the image: bool (N, H, W), N * H * W bytes.

        Raises:
            InputError: The exported detector finds boxes only.
        """
        self._require_masks()
        pasted = np.zeros((len(self), *self.image_size), dtype=np.bool_)
        for index in range(len(self)):
            pasted[index] = self.mask(index)
        return pasted

    def _require_masks(self) -> tuple[Floats, Integers]:
        if self.mask_probs is None or self.mask_index is None:
            raise InputError(
                "the exported detector finds boxes only, without masks",
                hint="export a detector that has a mask head",
            )
        return self.mask_probs, self.mask_index


def to_picture(
    outputs: dict[str, npt.NDArray[Any]],
    network_size: tuple[int, ...],
    picture_size: tuple[int, ...],
    names: Sequence[str],
) -> Found:
    """Scale boxes to the picture, and drop those that end up empty.

    Args:
        outputs: What the graph returned.
        network_size: h and w.
        picture_size: H and W.
        names: The vocabulary's class names.
    """
    sizes = np.array(picture_size, dtype=np.float32)
    bounds = np.tile(sizes[::-1], 2)
    factors = np.tile((sizes / np.array(network_size, dtype=np.float32))[::-1], 2)
    boxes_N4: Floats = np.clip(outputs["boxes"] * factors, 0, bounds)
    solid = (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])
    classes_N = outputs["classes"][solid]
    return Found(
        boxes_xyxy=boxes_N4[solid],
        scores=outputs["scores"][solid],
        class_ids=classes_N,
        labels=tuple(names[index] for index in classes_N.tolist()),
        image_size=(int(picture_size[0]), int(picture_size[1])),
        mask_probs=outputs.get("masks"),
        mask_index=outputs["mask_index"][solid] if "masks" in outputs else None,
    )


def paste(mask_SS: Floats, box_4: Floats, image_size: tuple[int, int]) -> Bools:
    """Paste a mask into a picture: the probability at each pixel's centre, interpolated, at least one half.

    Outside the mask the probability is 0; between the outermost cells' centres and the box it falls off towards that.

    Args:
        mask_SS: Probabilities in the cells of a grid over the box.
        box_4: xyxy pixels, not empty.
        image_size: H and W.

    Returns:
        bool (H, W).
    """
    height, width = image_size
    rows, columns = (
        slice(max(int(np.floor(box_4[axis])) - 1, 0), int(np.ceil(box_4[axis + 2])) + 1)
        for axis in (1, 0)
    )
    down = _weights(range(*rows.indices(height)), box_4[1], box_4[3], len(mask_SS))
    across = _weights(range(*columns.indices(width)), box_4[0], box_4[2], len(mask_SS))
    pasted = np.zeros((height, width), dtype=np.bool_)
    pasted[rows, columns] = down @ mask_SS @ across.T >= _MASK_THRESHOLD
    return pasted


def _weights(pixels: range, start: np.float32, end: np.float32, cells: int) -> Floats:
    """Return how much each pixel of an axis takes from each cell: (pixels, cells)."""
    centres = np.asarray(pixels, dtype=np.float32) + np.float32(0.5)
    position = (centres - start) / (end - start) * cells - np.float32(0.5)
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    weights: Floats = np.maximum(0, 1 - distance).astype(np.float32)
    return weights
