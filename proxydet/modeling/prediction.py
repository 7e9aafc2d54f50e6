"""What the detector found in one image.

Dimensions: N detections, M distinct masks (detections that share a box share a mask), S side of a mask, H and W the image, h and w
a window of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask
import torch
from detectron2.layers import paste_masks_in_image
from torch import Tensor
from torch.nn.functional import grid_sample

_MASK_THRESHOLD = 0.5
# Pixels that are sampled at once: bounds the memory of a mask that fills a poster.
_SAMPLES_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskWindow:
    """A mask that is False outside a window of its image, so that small objects of large images stay small.

    Attributes:
        top: First row of the window.
        left: First column of the window.
        inside_hw: bool, the mask in the window.
        size: H and W.
    """

    top: int
    left: int
    inside_hw: npt.NDArray[np.bool_]
    size: tuple[int, int]

    def whole(self) -> npt.NDArray[np.bool_]:
        """Return the mask in the whole image: bool (H, W)."""
        mask_HW = np.zeros(self.size, dtype=np.bool_)
        height, width = self.inside_hw.shape
        mask_HW[self.top : self.top + height, self.left : self.left + width] = self.inside_hw
        return mask_HW

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.inside_hw))

    def runs(self) -> npt.NDArray[np.int64]:
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
        counts: npt.NDArray[np.int64] = np.diff(changes, prepend=0, append=end)
        return counts


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Detections of one image, best first.

    Attributes:
        boxes_N4: float32 xyxy, pixels of the original image.
        scores_N: float32 in [0, 1], descending.
        classes_N: int64, rows of the vocabulary.
        mask_probs_MSS: float32 in [0, 1], masks inside their boxes; None where no masks were predicted.
        mask_index_N: int64, the mask of each detection; -1 where no masks were predicted.
        image_size: Height and width of the original image.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor
    mask_probs_MSS: Tensor | None
    mask_index_N: Tensor
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores_N)

    def to(self, device: torch.device | str) -> Prediction:
        """Return the prediction with all tensors on ``device``."""
        return Prediction(
            boxes_N4=self.boxes_N4.to(device),
            scores_N=self.scores_N.to(device),
            classes_N=self.classes_N.to(device),
            mask_probs_MSS=None if self.mask_probs_MSS is None else self.mask_probs_MSS.to(device),
            mask_index_N=self.mask_index_N.to(device),
            image_size=self.image_size,
        )

    def choose(self, index: Tensor) -> Prediction:
        """Return some of the detections.

        Args:
            index: Positions (int64) or a bool mask (N,), in the order wanted.

        Returns:
            A prediction with only the masks that are still in use.
        """
        mask_probs_MSS, mask_index_N = self.mask_probs_MSS, self.mask_index_N[index]
        if mask_probs_MSS is not None:
            used, mask_index_N = mask_index_N.unique(return_inverse=True)
            mask_probs_MSS = mask_probs_MSS[used]
        return Prediction(
            boxes_N4=self.boxes_N4[index],
            scores_N=self.scores_N[index],
            classes_N=self.classes_N[index],
            mask_probs_MSS=mask_probs_MSS,
            mask_index_N=mask_index_N,
            image_size=self.image_size,
        )

    @property
    def has_masks(self) -> bool:
        """Whether masks were predicted (true also where nothing was found)."""
        return self.mask_probs_MSS is not None

    def distinct_masks(self) -> Tensor:
        """Return each distinct mask pasted into the image, as detectron2 does: bool (M, H, W).

        Raises:
            ValueError: The prediction was made without masks.
        """
        probs_MSS = self._require_masks()
        if len(probs_MSS) == 0:
            return torch.zeros(0, *self.image_size, dtype=torch.bool, device=self.boxes_N4.device)
        pasted: Tensor = paste_masks_in_image(
            probs_MSS, self._mask_boxes(probs_MSS), self.image_size, threshold=_MASK_THRESHOLD
        )
        return pasted

    def windows(self) -> Iterator[MaskWindow]:
        """Yield each distinct mask (M of them) where it lies in the image: the pixels of `distinct_masks`.

        Raises:
            ValueError: The prediction was made without masks.
        """
        probs_MSS = self._require_masks()
        height, width = self.image_size
        boxes_M4 = self._mask_boxes(probs_MSS).cpu()
        for probs_SS, box_4 in zip(probs_MSS.cpu(), boxes_M4, strict=True):
            left, top = (box_4[:2].floor() - 1).clamp(min=0).int().tolist()
            right, bottom = (box_4[2:].ceil() + 1).int().tolist()
            rows, columns = (top, min(bottom, height)), (left, min(right, width))
            yield MaskWindow(
                top=top,
                left=left,
                inside_hw=_pasted(probs_SS, box_4, rows, columns).numpy(),
                size=self.image_size,
            )

    def _require_masks(self) -> Tensor:
        if self.mask_probs_MSS is None:
            raise ValueError(
                "this prediction has no masks: they are made by a detector with a mask head, under "
                "InferenceConfig(masks=True)"
            )
        return self.mask_probs_MSS

    def _mask_boxes(self, probs_MSS: Tensor) -> Tensor:
        """Return the box of each distinct mask: (M, 4)."""
        boxes_M4 = self.boxes_N4.new_empty(len(probs_MSS), 4)
        if len(boxes_M4):
            boxes_M4[self.mask_index_N] = self.boxes_N4  # detections of one mask have the same box
        return boxes_M4


def masks(prediction: Prediction) -> Tensor:
    """Return every detection's mask in the image: bool (N, H, W).

    Raises:
        ValueError: The prediction was made without masks.
    """
    return prediction.distinct_masks()[prediction.mask_index_N]


def rles(prediction: Prediction) -> list[dict[str, Any]]:
    """Return every detection's mask as COCO run-length encoding (``size``, ``counts`` as text).

    A mask that several detections share is encoded once; they get the same dictionary.

    Raises:
        ValueError: The prediction was made without masks.
    """
    encoded = []
    for window in prediction.windows():
        counts = {"size": list(window.size), "counts": window.runs().tolist()}
        rle: dict[str, Any] = coco_mask.frPyObjects(counts, *window.size)
        encoded.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
    return [encoded[index] for index in prediction.mask_index_N.tolist()]


def to_host(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return predictions on the CPU, moved in as many pieces for many as for one.

    They must be on one device, and all with masks or all without.
    """
    if not predictions:
        return []
    found = [len(prediction) for prediction in predictions]
    masks = [p.mask_probs_MSS for p in predictions if p.mask_probs_MSS is not None]
    moved: Sequence[Tensor | None] = [None] * len(predictions)
    if masks:
        moved = torch.cat(masks).cpu().split([len(of_image) for of_image in masks])
    columns = zip(
        torch.cat([prediction.boxes_N4 for prediction in predictions]).cpu().split(found),
        torch.cat([prediction.scores_N for prediction in predictions]).cpu().split(found),
        torch.cat([prediction.classes_N for prediction in predictions]).cpu().split(found),
        moved,
        torch.cat([prediction.mask_index_N for prediction in predictions]).cpu().split(found),
        strict=True,
    )
    return [
        Prediction(
            boxes_N4=boxes,
            scores_N=scores,
            classes_N=classes,
            mask_probs_MSS=probabilities,
            mask_index_N=index,
            image_size=prediction.image_size,
        )
        for prediction, (boxes, scores, classes, probabilities, index) in zip(
            predictions, columns, strict=True
        )
    ]


def _pasted(
    probs_SS: Tensor, box_4: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Paste a mask into a window of its image: the arithmetic of detectron2's pasting, so that no pixel differs."""
    first_2, last_2 = box_4.unflatten(0, (2, 2))
    x_w, y_h = (
        ((torch.arange(*span, dtype=torch.float32) + 0.5 - first) / (last - first) * 2 - 1)
        for span, first, last in zip((columns, rows), first_2, last_2, strict=True)
    )
    inside_hw = torch.empty(len(y_h), len(x_w), dtype=torch.bool)
    some = max(_SAMPLES_AT_ONCE // max(len(x_w), 1), 1)
    for part_hw, y in zip(inside_hw.split(some), y_h.split(some), strict=True):
        grid_hw2 = torch.stack(torch.meshgrid(x_w, y, indexing="xy"), dim=-1)
        sampled = grid_sample(probs_SS[None, None], grid_hw2[None], align_corners=False)
        torch.ge(sampled[0, 0], _MASK_THRESHOLD, out=part_hw)
    return inside_hw
