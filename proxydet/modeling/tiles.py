"""Large images in overlapping tiles: where the tiles are, and one prediction made of theirs.

What a tile sees of an object that it cuts, a *fragment*, ends at the tile's border. Where the object is smaller than the
overlap the next tile has it whole; a larger one may be found in the whole image. `TileMerger` drops the fragments of what is
found whole, joins those that continue each other, and applies NMS to the rest as in any image. Scores are those of the
network, which knows of no tiles. Background, and what is below its class's own threshold, is left out at the end: a tile that
sees the whole of an object as background corrects one that reports its fragment.

With several labels a box, background takes single regions from the classes before NMS, which predictions do not show; so a tile
does that, and each background class has a copy there that is reported.

Dimensions: N detections, F fragments among them, P pairs of fragments, M masks, S side of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from proxydet.data.images import Pixels
from proxydet.modeling.boxes import SHIFTED_UP_TO, NmsInput, suppress
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary

# A box that ends this near to a border is cut by it, in shares of the tile's side: boxes are not exact.
_NEAR = 0.02
# What covers this share of a fragment, with this share of its score, has it whole.
_COVERED, _AS_SURE = 0.6, 0.5
# Fragments of one object have this share of the smaller one's extent along the border in common.
_ALIGNED = 0.5
# Detections that wait for the last tile, in multiples of those in the result: each object is found a few times.
_KEPT = 16
# Pairs of boxes that are compared at once.
_PAIRS = 2**21
# The logits of a copy of a background class are above the class's own by this, or that would take its regions.
_ABOVE = 1e-3


@dataclass(frozen=True)
class Window:
    """A part of an image, in pixels: a tile, or the whole."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels_HW3: Pixels) -> Pixels:
        """Return the pixels of this part of an image: a view of (H, W, 3)."""
        return pixels_HW3[self.top : self.top + self.height, self.left : self.left + self.width]


def tile_windows(size: tuple[int, int], side: int, overlap: float) -> list[Window]:
    """Cover an image with tiles of one size, spread evenly.

    Args:
        size: Height and width of the image in pixels.
        side: Of a tile, in pixels; where the image is smaller in one direction, tiles have its extent there.
        overlap: Share of a tile's side that it has in common with the next one at least, in [0, 1).

    Returns:
        Row by row; one window where the image is not larger than a tile.
    """
    starts = []
    for length in size:
        rest = max(length - side, 0)
        steps = math.ceil(rest / max(math.floor(side * (1 - overlap)), 1))
        starts.append([round(rest * step / max(steps, 1)) for step in range(steps + 1)])
    height, width = (min(side, length) for length in size)
    return [Window(top, left, height, width) for top in starts[0] for left in starts[1]]


class TileMerger:
    """Makes one prediction of what is found in the tiles of an image; its memory does not grow with their number.

    Args:
        size: Height and width of the image in pixels.
        settings: Overlap and number of the detections that are kept, and whether there is one label a box.
        classes: What is detected; None: the classes of the training.

    Attributes:
        classes: What to detect in each tile: background is reported, after all others, and classes have no own thresholds.
        detecting: The settings to detect with in each tile.
    """

    def __init__(
        self, size: tuple[int, int], settings: InferenceConfig, classes: Vocabulary | None = None
    ) -> None:
        self._size = size
        self._settings = settings
        self._most = _KEPT * settings.max_detections
        self.classes, self.detecting = classes, replace(settings, tiles=0)
        # What each class must score above to be reported; None: all that is detected is.
        self._threshold_C: Tensor | None = None
        if classes is not None and (
            classes.background.any() or np.isfinite(classes.threshold).any()
        ):
            asked, hidden = len(classes.reported), classes.names[len(classes.reported) :]
            self.classes = classes.with_scorers(threshold=None, background=None)
            if hidden and not (settings.agnostic_nms or settings.one_class_per_proposal):
                copies = self.classes.subset(hidden)
                copies = Vocabulary.from_arrays(
                    [f"{name}\0" for name in hidden],
                    copies.embeddings,
                    copies.base,
                    bias=copies.bias + _ABOVE,
                    scale=copies.scale,
                )
                self.classes = classes.with_scorers(threshold=None).joined(copies)
            own_C = classes.threshold[:asked]
            threshold_C = np.where(np.isnan(own_C), settings.score_threshold, own_C)
            self.detecting = replace(
                self.detecting,
                score_threshold=float(threshold_C.min()),
                max_detections=self._most,
            )
            self._threshold_C = torch.full((len(self.classes),), torch.inf)
            self._threshold_C[:asked] = torch.from_numpy(threshold_C)
        self._parts: list[Prediction] = []
        # Of each detection, whether its tile cuts it left, above, right and below, and whether that is the whole image.
        self._marks: list[Tensor] = []

    def __len__(self) -> int:
        """Detections that wait for the last tile."""
        return sum(map(len, self._parts))

    def add(self, prediction: Prediction, window: Window) -> None:
        """Take what was found in a tile, or in the whole image.

        Args:
            prediction: On the CPU, boxes in pixels of the window.
            window: Where it is.
        """
        height, width = self._size
        place_4 = torch.tensor([window.left, window.top] * 2)
        near = _NEAR * max(window.height, window.width)
        x0, y0, x1, y1 = prediction.boxes_N4.unbind(dim=1)
        marks = [  # a border of the image cuts nothing
            (x0 < near) & (window.left > 0),
            (y0 < near) & (window.top > 0),
            (x1 > window.width - near) & (window.left + window.width < width),
            (y1 > window.height - near) & (window.top + window.height < height),
            torch.full_like(x0, (window.height, window.width) == self._size, dtype=torch.bool),
        ]
        boxes_N4 = prediction.boxes_N4 + place_4
        self._parts.append(replace(prediction, boxes_N4=boxes_N4, image_size=self._size))
        self._marks.append(torch.stack(marks, dim=1))
        if len(self) > 2 * self._most:
            self._keep_best()

    def merged(self) -> Prediction:
        """Return what was found in the image, each object once, boxes and masks in its pixels."""
        self._keep_best()
        found, marks_N5 = self._without_covered(self._parts[0], self._marks[0])
        found = self._with_joined(found, marks_N5[:, :4])
        if len(found) == 0:
            return found
        classes_N, settings = found.classes_N, self._settings
        boxes = NmsInput(
            boxes_N4=found.boxes_N4,
            scores_N=found.scores_N,
            classes_N=torch.zeros_like(classes_N) if settings.agnostic_nms else classes_N,
            counts=[len(found)],
            # The way that is exact for the coordinates of any image.
            candidates=[SHIFTED_UP_TO + 1],
        )
        limit = settings.max_detections if self._threshold_C is None else len(found)
        (kept,) = suppress(boxes, iou=settings.nms_iou, limit=limit)
        if self._threshold_C is not None:
            reported = found.scores_N[kept] > self._threshold_C[classes_N[kept]]
            kept = kept[reported][: settings.max_detections]
        return found.choose(kept)

    def _keep_best(self) -> None:
        found, marks_N5 = _together(self._parts), torch.cat(self._marks)
        best = found.scores_N.argsort(descending=True, stable=True)[: self._most]
        self._parts, self._marks = [found.choose(best)], [marks_N5[best]]

    def _without_covered(self, found: Prediction, marks_N5: Tensor) -> tuple[Prediction, Tensor]:
        """Leave out the fragments of what is found whole.

        A tile that has a box whole has all in it whole, so its class does not matter. In the whole image an object may be
        too small to be found, and a larger one around it: there it does.
        """
        fragment_N = marks_N5[:, :4].any(dim=1)
        others = (~fragment_N).nonzero()[:, 0]
        keep_N = torch.ones_like(fragment_N)
        boxes_N4, scores_N, classes_N = found.boxes_N4, found.scores_N, found.classes_N
        for places in _pieces(fragment_N.nonzero()[:, 0], len(others)):
            shared_FN = _shared(boxes_N4[places], boxes_N4[others]).prod(dim=2)
            covered_FN = shared_FN >= _COVERED * _extent(boxes_N4[places]).prod(dim=1)[:, None]
            covered_FN &= scores_N[others] >= _AS_SURE * scores_N[places, None]
            covered_FN &= ~marks_N5[others, 4] | (classes_N[others] == classes_N[places, None])
            keep_N[places] = ~covered_FN.any(dim=1)
        return found.choose(keep_N), marks_N5[keep_N]

    def _with_joined(self, found: Prediction, cut_N4: Tensor) -> Prediction:
        """Join fragments that continue each other across borders; the best one's score and class are those of all."""
        places_F = cut_N4.any(dim=1).nonzero()[:, 0]
        boxes_F4, cut_F4, classes_F = (
            found.boxes_N4[places_F],
            cut_N4[places_F],
            found.classes_N[places_F],
        )
        pairs = [torch.zeros(0, 2, dtype=torch.int64)]
        for part in _pieces(torch.arange(len(places_F)), len(places_F)):
            own_4 = boxes_F4[part, None]
            shared = _shared(boxes_F4[part], boxes_F4)
            # One ends at the right or lower border of its tile, the other goes beyond it and begins at a left or upper one.
            facing = cut_F4[part, None, 2:] & cut_F4[:, :2] & (shared > 0)
            facing &= (boxes_F4[:, :2] > own_4[..., :2]) & (boxes_F4[:, 2:] > own_4[..., 2:])
            extent = torch.minimum(_extent(boxes_F4[part])[:, None], _extent(boxes_F4))
            aligned = (shared >= _ALIGNED * extent).flip(2)
            joined = (facing & aligned).any(dim=2)
            if not self._settings.agnostic_nms:
                joined &= classes_F[part, None] == classes_F
            pairs.append(joined.nonzero() + torch.tensor([int(part[0]), 0]))
        ends = torch.cat([*pairs, *(pair.flip(1) for pair in pairs)])
        # The least place among the fragments of each object: of those that are joined, however far along.
        group_F = torch.arange(len(places_F))
        while True:
            least_F = group_F.scatter_reduce(0, ends[:, 0], group_F[ends[:, 1]], "amin")
            if torch.equal(least_F, group_F):
                break
            group_F = least_F
        groups, counts = group_F.unique(return_counts=True)
        alone_N = torch.ones(len(found), dtype=torch.bool)
        parts = []
        for group in groups[counts > 1].tolist():
            places = places_F[group_F == group]
            alone_N[places] = False
            own = found.choose(places)
            box_4 = torch.cat([own.boxes_N4[:, :2].amin(dim=0), own.boxes_N4[:, 2:].amax(dim=0)])
            best = own.choose(own.scores_N.argmax()[None])
            probs = own.mask_probs_MSS
            if probs is not None:
                probs = _masks_in(box_4, own.boxes_N4, probs[own.mask_index_N])
            parts.append(replace(best, boxes_N4=box_4[None], mask_probs_MSS=probs))
        return _together([found.choose(alone_N), *parts])


def _together(parts: Sequence[Prediction]) -> Prediction:
    """Return the detections of several predictions of one image, part after part."""
    masks = [part.mask_probs_MSS for part in parts if part.mask_probs_MSS is not None]
    before = np.cumsum([0, *map(len, masks)]) if masks else np.zeros(len(parts), int)
    return replace(
        parts[0],
        boxes_N4=torch.cat([part.boxes_N4 for part in parts]),
        scores_N=torch.cat([part.scores_N for part in parts]),
        classes_N=torch.cat([part.classes_N for part in parts]),
        mask_probs_MSS=torch.cat(masks) if masks else None,
        mask_index_N=torch.cat(
            [part.mask_index_N + int(n) for part, n in zip(parts, before, strict=False)]
        ),
    )


def _pieces(places: Tensor, others: int) -> Sequence[Tensor]:
    """Split places so that not too many pairs with the others are compared at once."""
    return places.split(max(_PAIRS // max(others, 1), 1)) if len(places) else ()


def _extent(boxes_N4: Tensor) -> Tensor:
    """Return width and height of each box: (N, 2)."""
    return boxes_N4[:, 2:] - boxes_N4[:, :2]


def _shared(boxes_F4: Tensor, others_N4: Tensor) -> Tensor:
    """Return width and height of what two boxes have in common, 0 where they are apart: (F, N, 2)."""
    low = torch.maximum(boxes_F4[:, None, :2], others_N4[:, :2])
    high = torch.minimum(boxes_F4[:, None, 2:], others_N4[:, 2:])
    return (high - low).clamp(min=0)


def _masks_in(box_4: Tensor, boxes_F4: Tensor, probs_FSS: Tensor) -> Tensor:
    """Return what the masks in some boxes are together, in a box around these: (1, S, S)."""
    side = probs_FSS.shape[1]
    share_S = (torch.arange(side) + 0.5) / side
    place_2S = box_4[:2, None] + (box_4[2:] - box_4[:2])[:, None] * share_S
    place_F2S = (place_2S - boxes_F4[:, :2, None]) / _extent(boxes_F4)[:, :, None] * 2 - 1
    x_FSS = place_F2S[:, 0, None, :].expand(-1, side, -1)
    y_FSS = place_F2S[:, 1, :, None].expand(-1, -1, side)
    grid_FSS2 = torch.stack([x_FSS, y_FSS], dim=3)
    return grid_sample(probs_FSS[:, None], grid_FSS2, align_corners=False).amax(dim=0)
