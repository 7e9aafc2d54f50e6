"""From region embeddings to predictions in the original image: classification, fusion, NMS, one mask a distinct box.

How often the host waits for the device does not depend on the number of images.

Dimensions: B images, R regions of an image (padded), N = B * R (in `Prediction` and `assemble_predictions`: detections
of an image, of the whole batch), C classes, D embedding, K candidates (pairs of region and class) of all images, L
detections of one image, M distinct masks (detections that share a box share a mask), S side of a mask, H and W the
original image, h and w a window of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import numpy.typing as npt
import torch
from detectron2.layers import paste_masks_in_image
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from proxydet.data.masks import encode
from proxydet.errors import NumericsError
from proxydet.modeling.boxes import (
    SHIFTED_UP_TO,
    NmsInput,
    clip,
    image_of_each,
    nonempty,
    pairwise_iou,
    suppress,
)
from proxydet.modeling.roi_heads import FeatureBatch, RegionEmbeddings, ZeroShotClassifier

if TYPE_CHECKING:
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.vocabulary import Vocabulary

# Chunks are whole multiples of this. A processor computes a row's ragged end with other instructions, which round
# otherwise; at multiples of this no chunk has one but the last, where it is the same as without chunks.
_STEP = 64
_MASK_THRESHOLD = 0.5
# The score of a pair of region and class that is not in the result, whatever the threshold.
_NEVER = -1.0
# Of more pairs than one in so many, computing all scores is faster than choosing pairs first.
_FEW = 8
_SAFE = 0.999  # a bound that much lower leaves out nothing by rounding
# Power of the overlap with which proposals count for each other.
_AGREEMENT = 6
# Pixels that are sampled at once, 13 bytes each (a cache of a CPU; 218 MB of another device, which pays for each launch), and
# those of which the edges are read back at once, 1 byte each. They bound the memory of a mask that fills a poster.
_SAMPLES_AT_ONCE, _SAMPLES_OFF_THE_CPU = 2**17, 2**24
_PIXELS_AT_ONCE = 2**25
# Masks are pasted at once into windows of at most so many times their pixels; the second off the CPU.
_WASTE, _WASTE_OFF_THE_CPU = 1.5, 4.0
# Where the network's mask is certainly 0.
_FAR = 9.0


# --- Results ---------------------------------------------------------------------------------------------------------


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

    def to(self, device: torch.device) -> Prediction:
        """Return the same on a device."""
        masks = self.mask_probs_MSS
        return replace(
            self,
            boxes_N4=self.boxes_N4.to(device),
            scores_N=self.scores_N.to(device),
            classes_N=self.classes_N.to(device),
            mask_probs_MSS=None if masks is None else masks.to(device),
            mask_index_N=self.mask_index_N.to(device),
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
        pasting = _Pasting(self)
        for place in np.argsort(pasting.order_M).tolist():
            left, top = pasting.low_M2[place].tolist()
            none = torch.zeros(0, int(pasting.span_M2[place, 1]), dtype=torch.bool)
            parts = [pasting.paste(part)[0].cpu() for part in pasting.parts(place, place + 1)]
            inside_wh = torch.cat([none, *parts]).numpy()
            inside_hw = np.ascontiguousarray(inside_wh.T)
            yield MaskWindow(top=top, left=left, inside_hw=inside_hw, size=self.image_size)

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


def rles(
    prediction: Prediction, edges: Callable[[], npt.NDArray[np.int64]] | None = None
) -> list[dict[str, Any]]:
    """Return every detection's mask as COCO run-length encoding (``size``, ``counts`` as text).

    A mask that several detections share is encoded once; they get the same dictionary.

    Args:
        prediction: With masks.
        edges: Its `mask_edges`, where it is pasted already.

    Raises:
        ValueError: The prediction was made without masks.
    """
    masks = len(prediction._require_masks())
    edges = mask_edges(prediction) if edges is None else edges
    counts = encode(edges(), masks, prediction.image_size)
    encoded = [
        {"size": [*prediction.image_size], "counts": text.decode("ascii")} for text in counts
    ]
    return [encoded[index] for index in prediction.mask_index_N.tolist()]


def mask_edges(prediction: Prediction) -> Callable[[], npt.NDArray[np.int64]]:
    """Paste the distinct masks on the prediction's device, and find their edges there.

    Waits for a GPU three times, twice more where the masks' windows together have more than 32 million pixels.

    Returns:
        What does the rest, which needs no device, in any thread: it returns what `proxydet.data.masks.encode` makes RLEs of.

    Raises:
        ValueError: The prediction was made without masks.
    """
    pasting = _Pasting(prediction)
    height, width = prediction.image_size
    waiting = [part for group in pasting.groups() for part in pasting.parts(*group)]
    found: list[tuple[list[_Part], list[int], npt.NDArray[np.int64]]] = []
    while waiting:
        # Of each column one more than its pixels: an edge may be before the first and after the last.
        ends = np.cumsum([part.count * part.wide * (part.high + 1) for part in waiting])
        some = max(int(np.searchsorted(ends, _PIXELS_AT_ONCE)), 1)
        parts, waiting, ends = waiting[:some], waiting[some:], ends[:some].tolist()
        edge_P = torch.empty(ends[-1], dtype=torch.bool, device=pasting.device)
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            padded_nwh = pad(pasting.paste(part), (1, 1))
            edge_nwh = edge_P[start:end].view(part.count, part.wide, part.high + 1)
            torch.ne(padded_nwh[..., 1:], padded_nwh[..., :-1], out=edge_nwh)
        on_cpu = pasting.device.type == "cpu"  # where NumPy is faster
        place_E = np.flatnonzero(edge_P.numpy()) if on_cpu else edge_P.nonzero()[:, 0].cpu().numpy()
        found.append((parts, ends, place_E))

    def edges() -> npt.NDArray[np.int64]:
        base_M = pasting.order_M * (height * width + 1) + pasting.low_M2 @ [height, 1]
        edges = [np.zeros(0, dtype=np.int64)]
        for parts, ends, place_E in found:
            cuts = np.searchsorted(place_E, ends).tolist()
            for part, start, first, last in zip(parts, [0, *ends], [0, *cuts], cuts, strict=False):
                column_E, row_E = np.divmod(place_E[first:last] - start, part.high + 1)
                mask_E, column_E = np.divmod(column_E, part.wide)
                base_E = base_M[part.start + mask_E]
                edges.append(base_E + (column_E + part.first) * height + row_E)
        return np.sort(np.concatenate(edges))

    return edges


def to_host(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return predictions on the CPU: all of them in one copy, so that the host waits for a GPU once.

    They must be on one device, and all with masks or all without.
    """
    if not predictions:
        return []
    columns = [
        [prediction.classes_N for prediction in predictions],
        [prediction.mask_index_N for prediction in predictions],
        [prediction.boxes_N4 for prediction in predictions],
        [prediction.scores_N for prediction in predictions],
        [p.mask_probs_MSS for p in predictions if p.mask_probs_MSS is not None],
    ]
    # As bytes, those of the longest type first, so that each value lies where its type may.
    parts = [part for column in columns for part in column]
    packed = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts]).cpu()
    sizes = [part.numel() * part.element_size() for part in parts]
    moved = iter(
        own.view(part.dtype).view(part.shape)
        for own, part in zip(packed.split(sizes), parts, strict=True)
    )
    classes, index, boxes, scores, masks = ([next(moved) for _ in column] for column in columns)
    return [
        Prediction(
            boxes_N4=boxes[place],
            scores_N=scores[place],
            classes_N=classes[place],
            mask_probs_MSS=masks[place] if masks else None,
            mask_index_N=index[place],
            image_size=prediction.image_size,
        )
        for place, prediction in enumerate(predictions)
    ]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What is pasted at once: ``wide`` columns of ``high`` pixels, from a first one on, of ``count`` masks from a start on."""

    start: int
    count: int
    first: int
    wide: int
    high: int


class _Pasting:
    """Pastes the masks of a prediction into windows of their image, on its device, many small ones at once.

    Each pixel comes from the arithmetic of detectron2's pasting, so that none differs.

    Attributes:
        order_M: int64, the masks in the order that all else here has: those of similar windows next to each other.
        low_M2: int64 x, y of the first pixel of each mask's window; the mask is False outside it.
        span_M2: int64, its width and height.
    """

    def __init__(self, prediction: Prediction) -> None:
        probs_MSS = prediction._require_masks()
        self.device = probs_MSS.device
        on_cpu = self.device.type == "cpu"
        self._samples = _SAMPLES_AT_ONCE if on_cpu else _SAMPLES_OFF_THE_CPU
        self._waste = _WASTE if on_cpu else _WASTE_OFF_THE_CPU
        boxes_M4 = prediction._mask_boxes(probs_MSS).cpu().numpy()
        height, width = prediction.image_size
        self.low_M2 = np.maximum(np.floor(boxes_M4[:, :2]) - 1, 0).astype(np.int64)
        high_M2 = np.minimum(np.ceil(boxes_M4[:, 2:]) + 1, (width, height)).astype(np.int64)
        self.span_M2 = np.maximum(high_M2 - self.low_M2, 0)
        steps = np.ceil(2 * np.log2(np.maximum(self.span_M2[:, 0], 1)))
        self.order_M = np.lexsort((self.span_M2[:, 1], steps))
        boxes_M4, self.low_M2 = boxes_M4[self.order_M], self.low_M2[self.order_M]
        self.span_M2 = self.span_M2[self.order_M]
        order_M = torch.from_numpy(self.order_M).to(self.device, non_blocking=True)
        self._probs_MSS = probs_MSS[order_M]
        first_M2, extent_M2 = boxes_M4[:, :2], boxes_M4[:, 2:] - boxes_M4[:, :2]
        self._places: list[Tensor] = []
        for axis in (0, 1):
            pixel_L = np.arange(self.span_M2[:, axis].max(initial=0), dtype=np.float32)
            place_ML = self.low_M2[:, axis, None].astype(np.float32) + pixel_L + np.float32(0.5)
            with np.errstate(divide="ignore", invalid="ignore"):
                place_ML = (place_ML - first_M2[:, axis, None]) / extent_M2[:, axis, None]
            place_ML = place_ML * np.float32(2) - np.float32(1)
            place_ML[pixel_L >= self.span_M2[:, axis, None]] = _FAR
            self._places.append(torch.from_numpy(place_ML).to(self.device, non_blocking=True))

    def groups(self) -> list[tuple[int, int]]:
        """Return masks that are pasted at once, from a start to an end: a window as large as any of them wastes little."""
        cuts = [0]
        pixels = wide = high = 0
        for place, (own_wide, own_high) in enumerate(self.span_M2.tolist()):
            pixels += own_wide * own_high
            wide, high = max(wide, own_wide), max(high, own_high)
            together = (place + 1 - cuts[-1]) * wide * high
            if place > cuts[-1] and together > min(self._samples, self._waste * pixels):
                cuts.append(place)
                pixels, wide, high = own_wide * own_high, own_wide, own_high
        return list(zip(cuts, [*cuts[1:], len(self.span_M2)], strict=True))

    def parts(self, start: int, end: int) -> Iterator[_Part]:
        """Yield the parts of some masks, in columns of as many pixels as are sampled at once."""
        wide, high = self.span_M2[start:end].max(axis=0, initial=0).tolist()
        step = max(self._samples // max((end - start) * high, 1), 1)
        for first in range(0, wide if high else 0, step):
            yield _Part(
                start=start, count=end - start, first=first, wide=min(step, wide - first), high=high
            )

    def paste(self, part: _Part) -> Tensor:
        """Return the pixels of a part: bool (masks, wide, high), False beyond the window of a mask."""
        masks = slice(part.start, part.start + part.count)
        x_nw = self._places[0][masks, part.first : part.first + part.wide]
        y_nh = self._places[1][masks, : part.high]
        grid_nwh2 = x_nw.new_empty(part.count, part.wide, part.high, 2)
        grid_nwh2[..., 0] = x_nw[:, :, None]
        grid_nwh2[..., 1] = y_nh[:, None, :]
        sampled_nwh = grid_sample(self._probs_MSS[masks, None], grid_nwh2, align_corners=False)
        return sampled_nwh[:, 0] >= _MASK_THRESHOLD


# --- Classification and selection ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClassText:
    """The classes to detect, on the network's device: a linear scorer of region embeddings each.

    Attributes:
        text_DC: A column each: the normalised text embedding, times the class's scale.
        base_C: bool, classes that count as base.
        bias_C: Added to the logits of all branches and steps; None: nothing is.
        threshold_C: What detections of the class must score above; NaN: the settings' threshold; None: that for all.
        background_K: int64, classes that take the regions for which they score best, and are not reported; None: there are none.
    """

    text_DC: Tensor
    base_C: Tensor
    bias_C: Tensor | None = None
    threshold_C: Tensor | None = None
    background_K: Tensor | None = None

    @classmethod
    def of(cls, vocabulary: Vocabulary, device: torch.device) -> ClassText:
        """Return the classes of a vocabulary, on a device."""

        def moved(values: npt.NDArray[Any]) -> Tensor:
            return torch.tensor(values).to(device, non_blocking=True)

        own_threshold = np.isfinite(vocabulary.threshold).any()
        hidden_K = np.flatnonzero(vocabulary.background)
        return cls(
            text_DC=moved(vocabulary.normalised() * vocabulary.scale[:, None]).T,
            base_C=moved(vocabulary.base),
            bias_C=moved(vocabulary.bias) if vocabulary.bias.any() else None,
            threshold_C=moved(vocabulary.threshold) if own_threshold else None,
            background_K=moved(hidden_K) if len(hidden_K) else None,
        )


@dataclass(frozen=True, kw_only=True)
class ClassifiedRegions:
    """The pairs of region and class that are kept of a batch, image after image, the best of each first.

    Attributes:
        boxes_L4: xyxy pixels of the network's input, clipped to the image.
        scores_L: In [0, 1].
        classes_L: int64.
        regions_L: int64, the region, counted over the whole batch, that each comes from; one can have several classes.
        counts: Pairs of each image (B,).
    """

    boxes_L4: Tensor
    scores_L: Tensor
    classes_L: Tensor
    regions_L: Tensor
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Pairs of region and class, by region and then by class.

    Attributes:
        region_K: int64, counted over the whole batch.
        class_K: int64.
        score_K: In [0, 1].
        counts_B: Pairs of each image that scored above the threshold, those that were left out since among them.
    """

    region_K: Tensor
    class_K: Tensor
    score_K: Tensor
    counts_B: Tensor

    def choose(self, index: Tensor) -> _Candidates:
        return _Candidates(
            region_K=self.region_K[index],
            class_K=self.class_K[index],
            score_K=self.score_K[index],
            counts_B=self.counts_B,
        )


def detect_classes(
    views: Sequence[RegionEmbeddings],
    classes: ClassText,
    classifiers: list[ZeroShotClassifier],
    settings: InferenceConfig,
) -> ClassifiedRegions:
    """Score every class for every region and keep the best.

    Classes are scored in chunks, and of each chunk only what can be in the result is kept, so memory does not grow with
    the vocabulary. NMS treats each class alone and no class is in two chunks: the result is the same as in one piece.

    Args:
        views: Embeddings of the regions; with several views of the same regions, scores are their mean, and the boxes
            are those of the first.
        classes: The classes to detect.
        classifiers: Those of the detection branch's steps, then that of the mixup branch's last step if there is one.
        settings: Thresholds and weights.

    Raises:
        NumericsError: Embeddings or boxes are not finite.
    """
    # One check for all: a comparison with NaN is false, so damage would pass as "nothing found".
    given = [
        values.flatten()
        for regions in views
        for values in (*_embeddings(regions), regions.boxes_BR4, regions.mixup_boxes_BR4)
        if values is not None
    ]
    if settings.rescore:
        scores_BR = agreed_scores(views[0])
        views = [replace(regions, proposal_scores_BR=scores_BR) for regions in views]
    scorers = [_Scorer(regions, classes, classifiers, settings) for regions in views]
    search = _Search(scorers, views[0], classes, settings)
    found = (search.best_classes if search.best_only else search.candidates)(len(classes.base_C))
    return search.select(found, torch.cat(given).isfinite().all())


def agreed_scores(regions: RegionEmbeddings) -> Tensor:
    """Return for each region the chance that one at least of the proposals that agree on it is of an object: (B, R), in [0, 1].

    A proposal network scores each proposal alone, and those of classes that it was not trained on low. How many proposals
    the box heads moved to the same place does not depend on that (after Zheng and Liu 2024, arXiv 2404.08603). Each counts with
    its score times the sixth power of its overlap: ``1 - exp(-sum_j IoU_ij**6 score_j)``.

    Args:
        regions: Final boxes and scores of the proposals.
    """
    scores_BR = torch.where(regions.valid_BR, regions.proposal_scores_BR, 0.0)
    agreement_BRR = pairwise_iou(regions.boxes_BR4, regions.boxes_BR4) ** _AGREEMENT
    return 1 - (agreement_BRR * -scores_BR[:, None]).sum(dim=2).exp()


def class_scores(
    regions: RegionEmbeddings,
    classes: ClassText,
    classifiers: list[ZeroShotClassifier],
    settings: InferenceConfig,
) -> Tensor:
    """Return the fused score of every class for every region: (N, C), padded regions included.

    Args:
        regions: Embeddings of the regions.
        classes: The classes to score.
        classifiers: As `detect_classes` takes them.
        settings: Fusion weights, and whether proposals count for each other.
    """
    if settings.rescore:
        regions = replace(regions, proposal_scores_BR=agreed_scores(regions))
    scorer = _Scorer(regions, classes, classifiers, settings)
    return scorer.scores(slice(0, classes.text_DC.shape[1]))


def best_scores_above(
    regions: RegionEmbeddings,
    classes: ClassText,
    classifiers: list[ZeroShotClassifier],
    settings: InferenceConfig,
    threshold_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the regions of an image that score above the threshold of a class, and the best such score of each.

    The scores are those of `class_scores`, without rescoring. Most regions are left out by the highest logit of the detection
    branch's steps, before any sigmoid, and before the mixup branch's embeddings are read: that branch is a factor of at most 1.

    Args:
        regions: Embeddings of the regions of one image, or of many as one: N of them.
        classes: The classes to score.
        classifiers: As `detect_classes` takes them.
        settings: Fusion weights.
        threshold_C: For each class; infinite where it does not count.

    Returns:
        Places of the regions, ascending: int64 (K,); their scores: float32 (K,), in [0, 1].
    """
    first, *others = [
        classifier.logits(values_1ND[0], classes.text_DC)
        for classifier, values_1ND in zip(classifiers, regions.detection, strict=False)
    ]
    highest_NC = functools.reduce(torch.maximum, others, first)
    if classes.bias_C is not None:
        highest_NC += classes.bias_C
    most = regions.proposal_scores_BR.amax().clamp(min=1e-12)
    share_C = (_SAFE * threshold_C.clamp(min=0) ** 2 / most).clamp(max=1)
    if regions.mixup_BRD is not None:
        share_C = share_C.pow(1 / (1 - torch.where(classes.base_C, settings.alpha, settings.beta)))
    region_K = (highest_NC > share_C.logit()).any(dim=1).nonzero()[:, 0]

    def hopeful(values_1N: Tensor) -> Tensor:
        return values_1N[:, region_K]

    mixup = regions.mixup_BRD
    kept = replace(
        regions,
        detection=tuple(hopeful(values_1ND) for values_1ND in regions.detection),
        mixup_BRD=None if mixup is None else hopeful(mixup),
        boxes_BR4=hopeful(regions.boxes_BR4),
        proposal_scores_BR=hopeful(regions.proposal_scores_BR),
        valid_BR=hopeful(regions.valid_BR),
    )
    scores_KC = class_scores(kept, classes, classifiers, settings)
    best_K = scores_KC.masked_fill_(scores_KC <= threshold_C, _NEVER).amax(dim=1)
    above = best_K > _NEVER
    return region_K[above], best_K[above]


def _embeddings(regions: RegionEmbeddings) -> list[Tensor]:
    mixup = [] if regions.mixup_BRD is None else [regions.mixup_BRD]
    return [*regions.detection, *mixup]


class _Scorer:
    """Scores of all regions for a range of classes (model description, "test-time scores")."""

    def __init__(
        self,
        regions: RegionEmbeddings,
        classes: ClassText,
        classifiers: list[ZeroShotClassifier],
        settings: InferenceConfig,
    ) -> None:
        self._embeddings = [values.flatten(0, 1) for values in _embeddings(regions)]
        self._classifiers = classifiers
        self._steps = len(regions.detection)
        self._classes = classes
        self._weight_C = torch.where(classes.base_C, settings.alpha, settings.beta)
        self._proposal_N1 = regions.proposal_scores_BR.flatten()[:, None]

    def scores(self, columns: slice | Tensor) -> Tensor:
        """Return the scores (N, classes) of a range of classes, or of those at some places."""
        text_DC, bias_C = self._classes.text_DC[:, columns], self._classes.bias_C
        if bias_C is not None:
            bias_C = bias_C[columns]
        scores_NC = self._probabilities(0, text_DC, bias_C)
        for step in range(1, self._steps):
            scores_NC += self._probabilities(step, text_DC, bias_C)
        scores_NC /= self._steps
        if len(self._embeddings) > self._steps:
            weight_C = self._weight_C[columns]
            mixup_NC = self._probabilities(self._steps, text_DC, bias_C).pow_(weight_C)
            scores_NC = scores_NC.pow_(1 - weight_C).mul_(mixup_NC)
        return scores_NC.mul_(self._proposal_N1).sqrt_()

    def scores_above(self, columns: slice, least: float | Tensor) -> Tensor:
        """Return the scores (N, classes) of a range of classes that can be above a limit; `_NEVER` where they cannot.

        The mixup branch gives a factor of 1 at most, and the mean of the steps' probabilities is at most that of the highest
        logit: what is hopeless by these is left out without a sigmoid or a power of each pair of region and class.
        """
        text_DC, bias_C = self._classes.text_DC[:, columns], self._classes.bias_C
        logits = [
            classifier.logits(embeddings_ND, text_DC)
            for classifier, embeddings_ND in zip(self._classifiers, self._embeddings, strict=True)
        ]
        if bias_C is not None:
            logits = [logits_NC + bias_C[columns] for logits_NC in logits]
        highest_NC = logits[0]
        for logits_NC in logits[1 : self._steps]:
            highest_NC = torch.maximum(highest_NC, logits_NC)
        mixup = len(logits) > self._steps
        weight = self._weight_C.amax() if mixup else 0
        share_N1 = _SAFE * torch.as_tensor(least).clamp(min=0) ** 2 / self._proposal_N1
        hopeful_NC = highest_NC > share_N1.clamp(max=1).pow(1 / (1 - weight)).logit()
        if hopeful_NC.count_nonzero() > hopeful_NC.numel() // _FEW:
            return self.scores(columns)
        region_K, class_K = hopeful_NC.nonzero(as_tuple=True)
        steps = [logits_NC[region_K, class_K].sigmoid_() for logits_NC in logits]
        score_K = torch.stack(steps[: self._steps]).mean(dim=0)
        if mixup:
            weight_K = self._weight_C[columns][class_K]
            score_K = score_K.pow_(1 - weight_K).mul_(steps[-1].pow_(weight_K))
        score_K = score_K.mul_(self._proposal_N1[region_K, 0]).sqrt_()
        return torch.full_like(highest_NC, _NEVER).index_put_((region_K, class_K), score_K)

    def _probabilities(self, index: int, text_DC: Tensor, bias_C: Tensor | None) -> Tensor:
        logits_NC = self._classifiers[index].logits(self._embeddings[index], text_DC)
        if bias_C is not None:
            logits_NC += bias_C
        return logits_NC.sigmoid_()


class _Search:
    """Searches the scores for detections, a chunk of classes at a time.

    Background classes take the regions for which they score best. With one label a box they are classes as all others until NMS
    is done, so that they also take boxes that overlap; then they are left out, and so is what is not above its class's
    threshold. With several labels a box, both is done to each region before NMS.

    Attributes:
        best_only: Whether only the best class of a region can be in the result.
    """

    def __init__(
        self,
        scorers: list[_Scorer],
        regions: RegionEmbeddings,
        classes: ClassText,
        settings: InferenceConfig,
    ) -> None:
        self._scorers = scorers
        self._settings = settings
        # Over all classes at once, no class of a region survives its best one: the boxes are the same.
        self.best_only = settings.one_class_per_proposal or settings.agnostic_nms
        self._least: float | Tensor = settings.score_threshold
        self._threshold_C = classes.threshold_C
        if self._threshold_C is not None:
            general = torch.full_like(self._threshold_C, settings.score_threshold)
            self._threshold_C = torch.where(self._threshold_C.isnan(), general, self._threshold_C)
            # Where the scores are made, what is not above the thresholds is marked.
            self._least = self._threshold_C.amin() if self.best_only else _NEVER / 2
        self._background_C: Tensor | None = None
        if classes.background_K is not None:
            self._background_C = torch.zeros_like(classes.base_C)
            self._background_C[classes.background_K] = True
            if not self.best_only:
                self._floor_N1 = self._mean_scores(classes.background_K).amax(1, keepdim=True)
        self._boxes_N4 = regions.boxes_BR4.flatten(0, 1)
        self._valid_N1 = regions.valid_BR.flatten()[:, None]
        self._images, self._regions = regions.valid_BR.shape

    def candidates(self, classes: int) -> _Candidates:
        """Return the pairs that score above the threshold and can be in the result."""
        found: list[_Candidates] = []
        for columns, scores_NC in self._chunks(classes):
            above_NC = (scores_NC > self._least) & self._valid_N1
            region_K, class_K = above_NC.nonzero(as_tuple=True)
            part = self._gather(region_K, class_K + columns.start, scores_NC[region_K, class_K])
            found.append(part if scores_NC.shape[1] == classes else self._prune(part))
        if len(found) == 1:
            return found[0]
        everything = _Candidates(
            region_K=torch.cat([part.region_K for part in found]),
            class_K=torch.cat([part.class_K for part in found]),
            score_K=torch.cat([part.score_K for part in found]),
            counts_B=torch.stack([part.counts_B for part in found]).sum(dim=0),
        )
        return everything.choose(everything.region_K.argsort(stable=True))

    def best_classes(self, classes: int) -> _Candidates:
        """Return each region's best class, where it scores above the threshold."""
        best_N = torch.full_like(self._boxes_N4[:, 0], _NEVER)
        class_N = torch.zeros_like(best_N, dtype=torch.int64)
        for columns, scores_NC in self._chunks(classes):
            chunk_N, place_N = scores_NC.max(dim=1)
            better_N = chunk_N > best_N
            best_N = torch.where(better_N, chunk_N, best_N)
            class_N = torch.where(better_N, place_N + columns.start, class_N)
        above_N = (best_N > self._least) & self._valid_N1[:, 0]
        region_K = above_N.nonzero()[:, 0]
        return self._gather(region_K, class_N[region_K], best_N[region_K])

    def select(self, found: _Candidates, finite: Tensor) -> ClassifiedRegions:
        """Apply NMS and keep the best of each image.

        Args:
            found: What to select from.
            finite: bool (), whether everything that the scores come from is finite.

        Raises:
            NumericsError: It is not.
        """
        # One wait for the counts of every image, and for whether they mean anything.
        numbers = torch.cat([self._count(found.region_K), found.counts_B, finite[None]]).tolist()
        if not numbers[-1]:
            raise NumericsError(
                "the box heads returned values that are not finite",
                hint="the weights are damaged, or half precision is too narrow for them: use float32",
            )
        boxes_K4, settings = self._boxes_N4[found.region_K], self._settings
        boxes = NmsInput(
            boxes_N4=boxes_K4,
            scores_N=found.score_K,
            classes_N=torch.zeros_like(found.class_K) if settings.agnostic_nms else found.class_K,
            counts=numbers[: self._images],
            candidates=numbers[self._images : -1],
        )
        own = self._threshold_C is not None or self._background_C is not None
        filtered = self.best_only and own
        limit = max(settings.max_detections, self._regions if filtered else 0)
        kept = suppress(boxes, iou=settings.nms_iou, limit=limit)
        if filtered:
            kept = self._reported(found, kept)
        places_L = torch.cat(kept)
        return ClassifiedRegions(
            boxes_L4=boxes_K4[places_L],
            scores_L=found.score_K[places_L],
            classes_L=found.class_K[places_L],
            regions_L=found.region_K[places_L],
            counts=[len(places) for places in kept],
        )

    def _reported(self, found: _Candidates, kept: list[Tensor]) -> list[Tensor]:
        """Leave out background classes, and what is not above the threshold of its class."""
        places_L = torch.cat(kept)
        class_L = found.class_K[places_L]
        right_L = torch.ones_like(places_L, dtype=torch.bool)
        if self._threshold_C is not None:
            right_L &= found.score_K[places_L] > self._threshold_C[class_L]
        if self._background_C is not None:
            right_L &= ~self._background_C[class_L]
        places_L = places_L[right_L]
        parts = places_L.split(self._count(found.region_K[places_L]).tolist())
        return [places[: self._settings.max_detections] for places in parts]

    def _chunks(self, classes: int) -> Iterator[tuple[slice, Tensor]]:
        width = -(-self._settings.class_chunk // _STEP) * _STEP
        for start in range(0, classes, width):
            columns = slice(start, min(start + width, classes))
            if classes > width and len(self._scorers) == 1:
                # A large list of classes is searched in two stages; the scores of a usual one are computed as they are published.
                scores_NC = self._scorers[0].scores_above(columns, self._least)
            else:
                scores_NC = self._mean_scores(columns)
            if self._threshold_C is not None and not self.best_only:
                scores_NC.masked_fill_(scores_NC <= self._threshold_C[columns], _NEVER)
            if self._background_C is not None and not self.best_only:
                hidden_NC = (scores_NC <= self._floor_N1) | self._background_C[columns]
                scores_NC.masked_fill_(hidden_NC, _NEVER)
            yield columns, scores_NC

    def _mean_scores(self, columns: slice | Tensor) -> Tensor:
        scores_NC = self._scorers[0].scores(columns)
        for scorer in self._scorers[1:]:
            scores_NC += scorer.scores(columns)
        if len(self._scorers) > 1:
            scores_NC /= len(self._scorers)
        return scores_NC

    def _gather(self, region_K: Tensor, class_K: Tensor, score_K: Tensor) -> _Candidates:
        counts_B = self._count(region_K)
        return _Candidates(region_K=region_K, class_K=class_K, score_K=score_K, counts_B=counts_B)

    def _count(self, region_K: Tensor) -> Tensor:
        image_K = region_K // max(self._regions, 1)
        return (image_K[:, None] == torch.arange(self._images, device=image_K.device)).sum(dim=0)

    def _prune(self, part: _Candidates) -> _Candidates:
        """Leave out of an image's many candidates of a chunk those that NMS drops, or that are too many."""
        limit = self._settings.max_detections
        enough = max(4 * limit, SHIFTED_UP_TO)
        counts = part.counts_B.tolist()
        places = torch.arange(len(part.region_K), device=part.region_K.device).split(counts)
        crowded = [image for image, count in enumerate(counts) if count > enough]
        if not crowded:
            return part
        many = torch.cat([places[image] for image in crowded])
        boxes = NmsInput(
            boxes_N4=self._boxes_N4[part.region_K[many]],
            scores_N=part.score_K[many],
            classes_N=part.class_K[many],
            counts=[counts[image] for image in crowded],
        )
        kept = dict(enumerate(places))
        survivors = suppress(boxes, iou=self._settings.nms_iou, limit=limit)
        kept |= {
            image: many[own.sort().values] for image, own in zip(crowded, survivors, strict=True)
        }
        return part.choose(torch.cat(list(kept.values())))


MaskPredictor = Callable[[FeatureBatch, Tensor, Tensor, Sequence[int]], Tensor]
"""Masks in [0, 1] of boxes, which lie image after image, given the image of each and the boxes of each image."""


def assemble_predictions(
    found: ClassifiedRegions,
    batch: FeatureBatch,
    original_sizes: list[tuple[int, int]],
    mask_probabilities: MaskPredictor | None,
) -> list[Prediction]:
    """Scale boxes to the original images, drop those that end up empty, and predict one mask a distinct box of the rest.

    Waits for the device once.

    Args:
        found: What is kept of each image.
        batch: Features that the masks are predicted from.
        original_sizes: Height and width of each original image.
        mask_probabilities: Predicts masks; None makes boxes without masks.
    """
    device, images = batch.sizes_B2.device, len(original_sizes)
    sizes_B2 = torch.tensor(original_sizes, dtype=torch.float32).to(device, non_blocking=True)
    scales_B4 = (sizes_B2 / batch.sizes_B2).flip(1).repeat(1, 2)
    image_L = image_of_each(found.counts, device)
    scaled_L4 = clip(found.boxes_L4 * scales_B4[image_L], sizes_B2[image_L])
    solid_L = nonempty(scaled_L4)
    numbers_B = torch.arange(images, device=device)
    own_LB = image_L[:, None] == numbers_B
    # All classes of a region have the same box and share a mask. Sorted by region, those without a box behind all others,
    # each first one of a region begins a mask.
    region_L = torch.where(solid_L, found.regions_L, torch.iinfo(torch.int64).max)
    sorted_L, order_L = region_L.sort(stable=True)
    first_L = solid_L[order_L]
    first_L[1:] &= sorted_L[1:] != sorted_L[:-1]
    number_L = torch.empty_like(order_L).scatter_(0, order_L, first_L.cumsum(0) - 1)
    counted = [(own_LB & solid_L[:, None]).sum(dim=0), (own_LB[order_L] & first_L[:, None]).sum(0)]
    numbers: list[int] = torch.cat(counted).tolist()
    counts, masks_of_each = numbers[:images], numbers[images:]
    boxes_L4, scores_L, classes_L = found.boxes_L4, found.scores_L, found.classes_L
    if sum(counts) < len(scores_L):
        solid = (~solid_L).to(torch.uint8).argsort(stable=True)[: sum(counts)]
        boxes_L4, scores_L, classes_L = boxes_L4[solid], scores_L[solid], classes_L[solid]
        scaled_L4, number_L, image_L = scaled_L4[solid], number_L[solid], image_L[solid]
    masks: Sequence[Tensor | None] = [None] * images
    mask_index_L = torch.full_like(classes_L, -1)
    if mask_probabilities is not None:
        boxes_M4 = boxes_L4.new_empty(sum(masks_of_each), 4)
        boxes_M4[number_L] = boxes_L4
        image_M = image_of_each(masks_of_each, device)
        masks = mask_probabilities(batch, boxes_M4, image_M, masks_of_each).split(masks_of_each)
        before_B = torch.tensor([sum(masks_of_each[:image]) for image in range(images)])
        mask_index_L = number_L - before_B.to(device, non_blocking=True)[image_L]
    return [
        Prediction(
            boxes_N4=boxes,
            scores_N=scores,
            classes_N=classes,
            mask_probs_MSS=own_masks,
            mask_index_N=mask_index,
            image_size=size,
        )
        for boxes, scores, classes, own_masks, mask_index, size in zip(
            scaled_L4.split(counts),
            scores_L.split(counts),
            classes_L.split(counts),
            masks,
            mask_index_L.split(counts),
            original_sizes,
            strict=True,
        )
    ]
