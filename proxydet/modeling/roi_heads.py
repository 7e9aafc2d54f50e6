"""The second stage: two cascades over the proposals, the mask head of a detector that has one, and their training.

The mixup branch starts from the regions that the detection branch's last step saw, so both share the features pooled for
that step. (The published code does so in training and in inference, and the recorded numbers hold only that way.) It is
trained only through its last step; the steps before it refine boxes without gradient and classify nothing.

In training, each region is matched to the object that it overlaps most. Labels: [0, C) a class, C background, -1 a
padded row. Matching and sampling work on a whole batch and do not wait for the device; choosing the regions of the mask
head and of the mixup branch waits once each.

Dimensions: B images, R regions of an image (padded), N = B * R, G objects of an image (padded), C classes, D embedding,
F features of a box head, P chosen regions of the whole batch, M masks, S side of a pooled region or of a mask. Of the pooler:
N boxes, C channels, H and W feature cells of a level.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import proxydet.runtime.d2  # noqa: F401

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from proxydet.data.masks import crop_polygons
from proxydet.errors import ConfigError
from proxydet.extensions import build_extension, extension_errors
from proxydet.modeling.boxes import (
    Regions,
    Weights,
    apply_deltas,
    areas,
    clip,
    nonempty,
    pairwise_iou,
)
from proxydet.modeling.config import CascadeConfig, ClassifierConfig, ModelConfig
from proxydet.modeling.precision import compute_heads
from proxydet.runtime.roi_align import (
    RegionGrid,
    align_regions,
    operator_in_use,
    published_roi_align,
)

if TYPE_CHECKING:
    from detectron2.structures import Instances

    from proxydet.modeling.centernet import CenterNetOutput

PADDING = -1
# What the published code gives ground-truth boxes that join the proposals: the logit of a probability of nearly 1.
GROUND_TRUTH_OBJECTNESS = math.log((1.0 - 1e-10) / (1 - (1.0 - 1e-10)))

# --- Heads -----------------------------------------------------------------------------------------------------------


class RegionPooler(nn.Module):
    """Aligned RoIAlign over several levels (Lin et al. 2017, equation 1, chooses the level).

    Args:
        config: Levels and the size that belongs to one of them.
        side: S.
    """

    def __init__(self, config: CascadeConfig, side: int) -> None:
        super().__init__()
        self.levels = config.pool_levels
        self.side = side
        self.config = config
        # detectron2's own layer, so that a repair of its roi_align reaches this one. On a CPU there is nothing to
        # repair (no atomics), and a faster way; the published rounding is kept where it is asked for.
        self.level_poolers = nn.ModuleList(
            ROIAlign((side, side), 1.0 / 2**level, config.sampling_ratio, aligned=True)
            for level in self.levels
        )
        self._grid = RegionGrid(
            side=side,
            scales=[1.0 / 2**level for level in self.levels],
            sampling_ratio=config.sampling_ratio,
        )

    def forward(self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor) -> Tensor:
        """Pool every box.

        Args:
            features: Maps (B, C, H, W) of ``levels``, finest first.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.

        Returns:
            (N, C, S, S). Waits for the device at most once, whatever N is.
        """
        size = len(boxes_N4)
        (pooled,) = self.parts([(features, size)], boxes_N4, image_N, max(size, 1))
        return pooled

    def parts(
        self,
        groups: Sequence[tuple[list[Tensor], int]],
        boxes_N4: Tensor,
        image_N: Tensor,
        size: int,
    ) -> Iterator[Tensor]:
        """Pool every box, at most ``size`` boxes at once, so that the caller can bound its memory.

        Args:
            groups: For the images of each padded size their maps (B, C, H, W) of ``levels``, finest first, and the number of
                boxes that are pooled from them. The boxes lie group after group.
            boxes_N4: xyxy pixels.
            image_N: int64, which image of its group each box belongs to.
            size: Boxes of a part.

        Yields:
            (n, C, S, S) of one part after the other, each of one group; at least one of each, which may be empty. Waits for
            the device once under an operator of the reproducibility modes, and where the number of samples is fixed; else
            not at all.
        """
        # Boxes that are not finite have no level; whoever made them checks for them once a batch.
        boxes_N4 = boxes_N4.nan_to_num(nan=0.0)
        rois_N5 = torch.cat([image_N[:, None].to(boxes_N4.dtype), boxes_N4], dim=1)
        level_N = self._level(boxes_N4)
        parts, start = [], 0
        for features, count in groups:
            begins = range(start, start + max(count, 1), size)
            start += count
            parts += [(features, slice(begin, min(begin + size, start))) for begin in begins]
        if boxes_N4.device.type == "cpu" and operator_in_use() is not published_roi_align:
            position_N = level_N.long() - self.levels[0]
            for features, own in parts:
                yield align_regions(features, rois_N5[own], position_N[own], self._grid)
            return
        levels_L = torch.arange(self.levels[0], self.levels[-1] + 1, device=boxes_N4.device)
        is_own_LN = level_N == levels_L[:, None]
        if self.config.sampling_ratio == 0 and operator_in_use() is None:
            # Every box from every level, shrunk to a point on those that are not its own: there it has no sample, costs
            # little and counts 0. So the host need not know how many boxes each level has.
            rois_LN5 = rois_N5 * is_own_LN[:, :, None]
            for features, own in parts:
                pooled = self.level_poolers[0](features[0], rois_LN5[0, own])
                for index in range(1, len(self.levels)):
                    pooled += self.level_poolers[index](features[index], rois_LN5[index, own])
                yield pooled
            return
        counts = torch.stack([is_own_LN[:, own].sum(dim=1) for _, own in parts]).tolist()
        for (features, own), per_level in zip(parts, counts, strict=True):
            rows_of_level = level_N[own].argsort(stable=True).split(per_level)
            yield self._pool_part(features, rois_N5[own], rows_of_level)

    def _pool_part(
        self, features: list[Tensor], rois_N5: Tensor, rows_of_level: Sequence[Tensor]
    ) -> Tensor:
        output = features[0].new_zeros(len(rois_N5), features[0].shape[1], self.side, self.side)
        for pooler, maps, rows in zip(self.level_poolers, features, rows_of_level, strict=True):
            output.index_put_((rows,), pooler(maps, rois_N5[rows]))
        return output

    def level(self, boxes_N4: Tensor) -> Tensor:
        """Return the level that each box is pooled from: int64 (N,)."""
        return self._level(boxes_N4).long()

    def _level(self, boxes_N4: Tensor) -> Tensor:
        """Return the same as whole numbers in the boxes' type, which saves a kernel."""
        size, level = self.config.canonical_size, self.config.canonical_level
        # The small number keeps empty boxes at a finite level and equals the published rounding.
        octaves_N = torch.log2(areas(boxes_N4).clamp(min=0).sqrt() / size + 1e-8)
        return torch.floor(level + octaves_N).clamp(self.levels[0], self.levels[-1])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        """Pass the values on as they are."""
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return gradients[0] * ctx.factor, None


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """Return the same values; their gradient is multiplied by ``factor``."""
    scaled: Tensor = _ScaleGradient.apply(values, factor)
    return scaled


class ZeroShotClassifier(nn.Module):
    """Maps region features into the space of the text embeddings.

    Args:
        config: Dimensions and bias.
        features: F.
        temperature: Factor from cosine to logit.
        text_DC1: Normalised text embeddings of the training classes, a column each, and a zero column for background.
            The heads of a network are given the same tensor.
    """

    zs_weight: Tensor

    def __init__(
        self, config: ClassifierConfig, features: int, text_DC1: Tensor, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(features, config.embedding_dim)
        self.register_buffer("zs_weight", text_DC1)
        self.cls_bias = None if config.bias is None else nn.Parameter(torch.tensor([config.bias]))

    def forward(self, features_NF: Tensor) -> Tensor:
        """Return region embeddings of length 1: (N, D)."""
        return functional.normalize(compute_heads(self.linear, features_NF), dim=1)

    def logits(self, embeddings_ND: Tensor, text_DK: Tensor) -> Tensor:
        """Return the logits (N, K) of region embeddings for K classes given by columns of normalised text."""
        logits_NK = (self.temperature * embeddings_ND) @ text_DK
        return logits_NK if self.cls_bias is None else logits_NK + self.cls_bias


class BoxPredictor(nn.Module):
    """Predicts an embedding and box deltas for the regions of one step.

    Args:
        config: Of the classifier.
        features: F.
        text_DC1: As `ZeroShotClassifier`.
        frequency_C: Weight with which the federated loss samples each training class.
    """

    freq_weight: Tensor

    def __init__(
        self, config: ClassifierConfig, features: int, text_DC1: Tensor, frequency_C: Tensor
    ) -> None:
        super().__init__()
        self.cls_score = ZeroShotClassifier(config, features, text_DC1, config.temperature)
        last = nn.Linear(features, 4)
        nn.init.normal_(last.weight, std=0.001)
        nn.init.zeros_(last.bias)
        self.bbox_pred = nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), last)
        self.register_buffer("freq_weight", frequency_C)


class Branch:
    """One cascade: a view of its heads and predictors, step by step.

    Args:
        heads: A box head a step.
        predictors: A `BoxPredictor` a step.
    """

    def __init__(self, heads: nn.ModuleList, predictors: nn.ModuleList) -> None:
        self._heads = heads
        self._predictors = predictors

    def __len__(self) -> int:
        return len(self._predictors)

    def features(self, step: int, pooled_NCSS: Tensor) -> Tensor:
        """Return a step's box-head features of pooled regions: (N, F)."""
        return cast(Tensor, compute_heads(self._heads[step], pooled_NCSS))

    def classifier(self, step: int) -> ZeroShotClassifier:
        """Return the classifier of a step."""
        return self._predictor(step).cls_score

    def deltas(self, step: int, features_NF: Tensor) -> Tensor:
        """Return the box deltas of a step: (N, 4)."""
        return cast(Tensor, compute_heads(self._predictor(step).bbox_pred, features_NF))

    def _predictor(self, step: int) -> BoxPredictor:
        return cast(BoxPredictor, self._predictors[step])


def build_heads(
    cascade: CascadeConfig,
    classifier: ClassifierConfig,
    channels: int,
    text_DC1: Tensor,
    frequency_C: Tensor,
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Build the box heads and predictors of one cascade, one of each a step.

    Raises:
        ConfigError: The box head at a Python path cannot be made, or returns features of another shape.
    """
    pooled = ShapeSpec(channels=channels, height=cascade.pool_size, width=cascade.pool_size)

    def box_head() -> nn.Module:
        if cascade.box_head is None:
            return cast(
                nn.Module, FastRCNNConvFCHead(pooled, conv_dims=[], fc_dims=list(cascade.hidden))
            )
        key, side, features = "model.cascade.box_head", cascade.pool_size, cascade.hidden[-1]
        head = build_extension(
            cascade.box_head,
            key,
            cascade.box_head_options,
            channels=channels,
            pool_size=side,
            features=features,
        )
        shape: Any = None
        if isinstance(head, nn.Module):
            with (
                extension_errors(f"{key} is {cascade.box_head}: running it"),
                torch.no_grad(),
            ):
                shape = tuple(head.eval()(torch.zeros(2, channels, side, side)).shape)
            head.train()
        if shape != (2, features):
            raise ConfigError(
                f"{key} is {cascade.box_head}, which must make a torch.nn.Module that maps pooled regions "
                f"(N, {channels}, {side}, {side}) to features (N, {features}); "
                + (
                    f"of 2 regions it gives {shape}."
                    if shape
                    else f"it makes a {type(head).__name__}."
                ),
                hint="correct its forward, or model.cascade.hidden, whose last width is that of the features",
            )
        return cast(nn.Module, head)

    heads = nn.ModuleList(box_head() for _ in range(cascade.steps))
    predictors = nn.ModuleList(
        BoxPredictor(classifier, cascade.hidden[-1], text_DC1, frequency_C)
        for _ in range(cascade.steps)
    )
    return heads, predictors


# Bounds the memory of the mask head in inference; an image seldom has more distinct boxes.
_MASKS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Features of a batch of images, which the heads pool from.

    Attributes:
        features: Maps of the pooled levels, finest first, of the first images: those of one padded size.
        sizes_B2: Height and width of each image in pixels, without padding.
        further: The same maps of the images that follow, of one padded size after the other.
        place_B: int64, the place of each image among those of its padded size; None where there is one size.
    """

    features: list[Tensor]
    sizes_B2: Tensor
    further: tuple[list[Tensor], ...] = ()
    place_B: Tensor | None = None

    def pooled_by(
        self,
        pooler: RegionPooler,
        boxes_N4: Tensor,
        image_N: Tensor,
        counts: Sequence[int],
        size: int,
    ) -> Iterator[Tensor]:
        """Pool boxes, which lie image after image, as `RegionPooler.parts`.

        Args:
            pooler: Pools.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.
            counts: Boxes of each image (B,); not needed where there is one padded size.
            size: Boxes of a part.
        """
        if self.place_B is None:
            # The shape, not the length, which an export cannot trace.
            count = boxes_N4.shape[0]
            return pooler.parts([(self.features, count)], boxes_N4, image_N, size)
        groups, image = [], 0
        for maps in (self.features, *self.further):
            images = maps[0].shape[0]
            groups.append((maps, sum(counts[image : image + images])))
            image += images
        return pooler.parts(groups, boxes_N4, self.place_B[image_N], size)


@dataclass(frozen=True, kw_only=True)
class RegionEmbeddings:
    """Embeddings, boxes and scores of every region, before classification by a vocabulary.

    Attributes:
        detection: Region embeddings (B, R, D) of each step of the detection branch.
        mixup_BRD: Region embeddings of the last step of the mixup branch; None where there is no such branch.
        mixup_boxes_BR4: The boxes that this step pooled; None likewise.
        boxes_BR4: The detection branch's final boxes, clipped to the image.
        proposal_scores_BR: The proposal network's scores.
        valid_BR: bool, False where padded.
    """

    detection: tuple[Tensor, ...]
    mixup_BRD: Tensor | None
    mixup_boxes_BR4: Tensor | None
    boxes_BR4: Tensor
    proposal_scores_BR: Tensor
    valid_BR: Tensor

    def cpu(self) -> RegionEmbeddings:
        """Return the same values on the CPU."""
        moved = {
            field.name: value.cpu()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, detection=tuple(values.cpu() for values in self.detection), **moved)

    def choose(self, index_B: Tensor) -> RegionEmbeddings:
        """Return those of some images, int64 (B,), in the order wanted."""
        mixup_BRD, boxes_BR4 = self.mixup_BRD, self.mixup_boxes_BR4
        return RegionEmbeddings(
            detection=tuple(values[index_B] for values in self.detection),
            mixup_BRD=None if mixup_BRD is None else mixup_BRD[index_B],
            mixup_boxes_BR4=None if boxes_BR4 is None else boxes_BR4[index_B],
            boxes_BR4=self.boxes_BR4[index_B],
            proposal_scores_BR=self.proposal_scores_BR[index_B],
            valid_BR=self.valid_BR[index_B],
        )


class RoiHeads(nn.Module):
    """Box heads of both branches and the mask head.

    Args:
        config: Sizes.
        text_DC1: Normalised text embeddings of the training classes, a column each, and a zero column last.
        frequency_C: Weight with which the federated loss samples each training class.

    Attributes:
        detection: The detection branch.
        mixup: The mixup branch; None where the model has none.
        mask_head: Predicts masks; None for a detector of boxes.
    """

    def __init__(self, config: ModelConfig, text_DC1: Tensor, frequency_C: Tensor) -> None:
        super().__init__()
        self.config = config.cascade
        channels = config.pyramid.channels
        self.box_pooler = RegionPooler(config.cascade, config.cascade.pool_size)
        self.box_head, self.box_predictor = build_heads(
            config.cascade, config.classifier, channels, text_DC1, frequency_C
        )
        self.mask_pooler: RegionPooler | None = None
        self.mask_head: MaskRCNNConvUpsampleHead | None = None
        if config.masks is not None:
            side = config.masks.pool_size
            self.mask_pooler = RegionPooler(config.cascade, side)
            self.mask_head = MaskRCNNConvUpsampleHead(
                ShapeSpec(channels=channels, height=side, width=side),
                num_classes=1,
                conv_dims=[config.masks.channels] * (config.masks.convs + 1),
            )
        self._has_mixup = config.mixup_branch
        if not config.mixup_branch:
            return
        self.box_head_cmm = copy.deepcopy(self.box_head)
        self.box_predictor_cmm = nn.ModuleList()
        for predictor in self.box_predictor:
            assert isinstance(predictor, BoxPredictor)
            own = copy.deepcopy(predictor)
            own.cls_score.zs_weight = predictor.cls_score.zs_weight
            own.freq_weight = predictor.freq_weight
            own.cls_score.temperature = config.classifier.mixup_temperature
            own.cls_score.cls_bias = None
            # Only the last step's embedding has a loss. What can never get a gradient is frozen, so that neither the
            # optimiser nor a process group waits for one.
            own.bbox_pred.requires_grad_(False)
            self.box_predictor_cmm.append(own)
        self.box_head_cmm[:-1].requires_grad_(False)
        self.box_predictor_cmm[:-1].requires_grad_(False)

    @property
    def detection(self) -> Branch:
        """The detection branch."""
        return Branch(self.box_head, self.box_predictor)

    @property
    def mixup(self) -> Branch | None:
        """The mixup branch; None where the model has none."""
        return Branch(self.box_head_cmm, self.box_predictor_cmm) if self._has_mixup else None

    @property
    def frequency_C(self) -> Tensor:
        """Weight with which the federated loss samples each training class (all predictors hold the same)."""
        first = self.box_predictor[0]
        assert isinstance(first, BoxPredictor)
        return first.freq_weight

    def embed(
        self, batch: FeatureBatch, regions: Regions, *, refine: bool = True
    ) -> RegionEmbeddings:
        """Run both cascades on the proposals of a batch, in inference.

        Args:
            batch: Features and image sizes.
            regions: The proposals.
            refine: Whether each step moves the boxes, as in detection; else all steps pool the boxes as given.
        """
        branch = self.detection
        shape = regions.valid_BR.shape
        embeddings = []
        for step in range(len(branch)):
            seen = regions
            pooled_NCSS = self.pool(batch, seen)
            features_NF = branch.features(step, pooled_NCSS)
            embeddings.append(branch.classifier(step)(features_NF).unflatten(0, shape))
            if refine:
                deltas_BR4 = branch.deltas(step, features_NF).unflatten(0, shape)
                regions = self.refine(batch, deltas_BR4, seen, step)
        mixup_BRD, mixup_boxes_BR4 = None, None
        mixup = self.mixup
        if mixup is not None:
            last = len(mixup) - 1
            if last > 0 and refine:
                seen = self.mixup_regions(batch, seen, pooled_NCSS)
                pooled_NCSS = self.pool(batch, seen)
            embeddings_ND = mixup.classifier(last)(mixup.features(last, pooled_NCSS))
            mixup_BRD, mixup_boxes_BR4 = embeddings_ND.unflatten(0, shape), seen.boxes_BR4
        return RegionEmbeddings(
            detection=tuple(embeddings),
            mixup_BRD=mixup_BRD,
            mixup_boxes_BR4=mixup_boxes_BR4,
            boxes_BR4=regions.boxes_BR4,
            proposal_scores_BR=regions.objectness_BR,
            valid_BR=regions.valid_BR,
        )

    def pool(self, batch: FeatureBatch, regions: Regions) -> Tensor:
        """Pool all regions: (N, C, S, S)."""
        images, each = regions.valid_BR.shape
        boxes_N4, image_N = regions.boxes_BR4.flatten(0, 1), regions.image_N
        parts = batch.pooled_by(
            self.box_pooler, boxes_N4, image_N, [each] * images, max(len(boxes_N4), 1)
        )
        first, *others = parts
        return torch.cat([first, *others]) if others else first

    def refine(
        self, batch: FeatureBatch, deltas_BR4: Tensor, regions: Regions, step: int
    ) -> Regions:
        """Apply a step's box deltas; in training, boxes that became empty are dropped."""
        weights = self.config.delta_weights[step]
        boxes_BR4 = apply_deltas(deltas_BR4.detach(), regions.boxes_BR4, weights)
        boxes_BR4 = clip(boxes_BR4, batch.sizes_B2[:, None])
        valid_BR = regions.valid_BR
        if self.training:
            valid_BR = valid_BR & nonempty(boxes_BR4)
        return regions.with_boxes(boxes_BR4, valid_BR)

    def mixup_regions(self, batch: FeatureBatch, regions: Regions, pooled_NCSS: Tensor) -> Regions:
        """Refine the regions through all but the last step of the mixup branch.

        Args:
            batch: Features and image sizes.
            regions: The regions that the detection branch's last step pooled.
            pooled_NCSS: The features pooled for them.
        """
        branch = self.mixup
        assert branch is not None
        for step in range(len(branch) - 1):
            if step > 0:
                pooled_NCSS = self.pool(batch, regions)
            deltas_N4 = branch.deltas(step, branch.features(step, pooled_NCSS))
            deltas_BR4 = deltas_N4.unflatten(0, regions.valid_BR.shape)
            regions = self.refine(batch, deltas_BR4, regions, step)
        return regions

    def mask_logits(
        self,
        batch: FeatureBatch,
        boxes_M4: Tensor,
        image_M: Tensor,
        counts: Sequence[int] = (),
    ) -> Tensor:
        """Return mask logits (M, side, side) inside the given boxes.

        Args:
            batch: Features and image sizes.
            boxes_M4: xyxy pixels.
            image_M: int64, which image each box belongs to.
            counts: Boxes of each image (B,), which lie image after image: of a batch of several padded sizes.
        """
        assert self.mask_head is not None
        assert self.mask_pooler is not None
        at_once = max(len(boxes_M4), 1) if self.training else _MASKS_AT_ONCE
        parts = batch.pooled_by(self.mask_pooler, boxes_M4, image_M, counts, at_once)
        return torch.cat([compute_heads(self.mask_head.layers, pooled)[:, 0] for pooled in parts])

    def mask_probabilities(
        self,
        batch: FeatureBatch,
        boxes_M4: Tensor,
        image_M: Tensor,
        counts: Sequence[int] = (),
    ) -> Tensor:
        """Return masks (M, side, side), in [0, 1], inside the given boxes; arguments as of `mask_logits`."""
        return self.mask_logits(batch, boxes_M4, image_M, counts).sigmoid_()


# --- Training: objects, matching, sampling ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchObjects:
    """The objects of a batch of images.

    Attributes:
        boxes_BG4: xyxy pixels; zero where padded.
        classes_BG: int64 in [0, C); zero where padded.
        valid_BG: bool, False where padded.
        counts: Objects of each image, known without asking the device.
        masks: Each image's masks, one an object; None where an image comes without.
        masked_BG: bool, whether the object has a mask: of one without, the entry in ``masks`` is empty.
    """

    boxes_BG4: Tensor
    classes_BG: Tensor
    valid_BG: Tensor
    counts: tuple[int, ...]
    masks: tuple[PolygonMasks | BitMasks | None, ...]
    masked_BG: Tensor

    @classmethod
    def from_instances(cls, instances: tuple[Instances, ...], device: torch.device) -> BatchObjects:
        """Collect ``gt_boxes``, ``gt_classes`` and (where there) ``gt_masks`` of every image, on one device.

        Every object of an image with ``gt_masks`` has a mask, unless ``gt_masked`` (bool) says otherwise.

        Boxes and classes are put together where they are and moved in one piece, not once an image.
        """
        counts = tuple(len(image) for image in instances)
        masked = [
            image.gt_masked
            if image.has("gt_masked")
            else torch.full((len(image),), image.has("gt_masks"), dtype=torch.bool)
            for image in instances
        ]
        boxes_BG4 = pad_sequence([image.gt_boxes.tensor.float() for image in instances], True)
        valid_BG = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return cls(
            boxes_BG4=boxes_BG4.to(device, non_blocking=True),
            classes_BG=pad_sequence([image.gt_classes for image in instances], True).to(
                device, non_blocking=True
            ),
            valid_BG=valid_BG.to(device, non_blocking=True),
            counts=counts,
            masks=tuple(
                image.gt_masks.to(device, non_blocking=True) if image.has("gt_masks") else None
                for image in instances
            ),
            masked_BG=pad_sequence(masked, True).to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each region stands for.

    Attributes:
        labels_BR: int64 in [-1, C].
        objects_BR: int64, the object of its image that overlaps most (also for background); 0 where there is none.
    """

    labels_BR: Tensor
    objects_BR: Tensor

    def boxes_from(self, truth: BatchObjects) -> Tensor:
        """Return the box of each region's object: (B, R, 4), zeros where the image has none."""
        if truth.boxes_BG4.shape[1] == 0:
            return truth.boxes_BG4.new_zeros(*self.labels_BR.shape, 4)
        index_BR4 = self.objects_BR[:, :, None].expand(-1, -1, 4)
        return truth.boxes_BG4.gather(1, index_BR4)

    def masked_from(self, truth: BatchObjects) -> Tensor:
        """Return whether each region's object has a mask: bool (B, R), False where the image has no object."""
        if truth.masked_BG.shape[1] == 0:
            return torch.zeros_like(self.labels_BR, dtype=torch.bool)
        return truth.masked_BG.gather(1, self.objects_BR)


def match(regions: Regions, truth: BatchObjects, threshold: float, classes: int) -> Assignment:
    """Give each region the class of the object that it overlaps most.

    Args:
        regions: The boxes.
        truth: The objects.
        threshold: Overlap from which a region counts as the object; below, it is background.
        classes: C, which is also the background's label.
    """
    if truth.boxes_BG4.shape[1] == 0:
        objects_BR = torch.zeros_like(regions.valid_BR, dtype=torch.int64)
        labels_BR = torch.full_like(objects_BR, classes)
    else:
        iou_BRG = pairwise_iou(regions.boxes_BR4, truth.boxes_BG4)
        iou_BRG = iou_BRG.masked_fill(~truth.valid_BG[:, None, :], -1.0)
        best_BR, objects_BR = iou_BRG.max(dim=2)
        labels_BR = truth.classes_BG.gather(1, objects_BR)
        labels_BR = torch.where(best_BR >= threshold, labels_BR, classes)
    return Assignment(
        labels_BR=torch.where(regions.valid_BR, labels_BR, PADDING), objects_BR=objects_BR
    )


def append_ground_truth(regions: Regions, truth: BatchObjects) -> Regions:
    """Return the regions with every object's own box added at the end of its image."""
    objectness_BG = torch.full_like(truth.boxes_BG4[:, :, 0], GROUND_TRUTH_OBJECTNESS)
    return Regions(
        boxes_BR4=torch.cat([regions.boxes_BR4, truth.boxes_BG4], dim=1),
        objectness_BR=torch.cat([regions.objectness_BR, objectness_BG * truth.valid_BG], dim=1),
        valid_BR=torch.cat([regions.valid_BR, truth.valid_BG], dim=1),
    )


def sample(
    regions: Regions,
    assignment: Assignment,
    *,
    size: int,
    positive_fraction: float,
    classes: int,
    generator: torch.Generator | None,
) -> tuple[Regions, Assignment]:
    """Sample the regions to train on: objects up to a share, the rest background.

    Args:
        regions: All boxes.
        assignment: What they stand for.
        size: Regions to sample an image; fewer where there are not enough.
        positive_fraction: Largest share of ``size`` that may be objects.
        classes: C, the background's label.
        generator: Source of randomness; None is torch's global one.
    """
    labels_BR = assignment.labels_BR
    positive_BR = (labels_BR >= 0) & (labels_BR < classes)
    background_BR = labels_BR == classes
    positives_B = positive_BR.sum(dim=1, keepdim=True).clamp(max=int(size * positive_fraction))
    chance_BR = random_like(regions.objectness_BR, generator)
    chosen_BR = (_rank(positive_BR, chance_BR) < positives_B) & positive_BR
    chosen_BR |= (_rank(background_BR, chance_BR) < size - positives_B) & background_BR
    # A stable sort on "not chosen" moves the sampled rows to the front and keeps their order.
    order_BS = (~chosen_BR).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    valid_BS = chosen_BR.gather(1, order_BS)
    sampled = Regions(
        boxes_BR4=regions.boxes_BR4.gather(1, order_BS[:, :, None].expand(-1, -1, 4)),
        objectness_BR=regions.objectness_BR.gather(1, order_BS),
        valid_BR=valid_BS,
    )
    return sampled, Assignment(
        labels_BR=torch.where(valid_BS, labels_BR.gather(1, order_BS), PADDING),
        objects_BR=assignment.objects_BR.gather(1, order_BS),
    )


def random_like(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers in [0, 1) of the shape, type and device of ``values``, sampled where the generator is."""
    device = values.device if generator is None else generator.device
    uniform = torch.rand(values.shape, generator=generator, device=device, dtype=values.dtype)
    return uniform.to(values.device, non_blocking=True)


def _rank(among_BR: Tensor, chance_BR: Tensor) -> Tensor:
    """Return each row's place in a random order of the rows that are ``among``; the others come after them."""
    order_BR = (chance_BR + (~among_BR)).argsort(dim=1, stable=True)
    return order_BR.argsort(dim=1)


# --- Training: what the losses need ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainingClasses:
    """The training classes, as the losses need them.

    Attributes:
        text_DC1: Normalised text embeddings, a column each, the last one zero (background).
        frequency_C: Weight with which the federated loss samples each class.
        temperature: Factor from cosine to logit.
    """

    text_DC1: Tensor
    frequency_C: Tensor
    temperature: float

    @property
    def classes(self) -> int:
        """C, which is also the background's label."""
        return self.text_DC1.shape[1] - 1


@dataclass(frozen=True, kw_only=True)
class ReferenceOutput:
    """What other weights predict of a step's regions; nothing is learnt in them.

    Attributes:
        embeddings_BRD: Region embeddings of length 1.
        deltas_BR4: Box changes.
    """

    embeddings_BRD: Tensor
    deltas_BR4: Tensor


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """One step of the detection branch on a box batch.

    Attributes:
        embeddings_BRD: Region embeddings of length 1.
        deltas_BR4: Predicted box changes.
        regions: The boxes that this step saw.
        assignment: What they stand for.
        targets_BR4: The box of each region's object.
        delta_weights: Scale of the box changes.
        bias: Learnt bias of the logits (1,), None where there is none.
        reference: What the starting weights predict of the same regions, where training is to keep it.
    """

    embeddings_BRD: Tensor
    deltas_BR4: Tensor
    regions: Regions
    assignment: Assignment
    targets_BR4: Tensor
    delta_weights: Weights
    bias: Tensor | None
    reference: ReferenceOutput | None = None


@dataclass(frozen=True, kw_only=True)
class MixupOutput:
    """The last step of the mixup branch: its regions that stand for an object, from all images.

    The classes are base classes because only those are annotated in training data, as published: novel classes that an
    annotation file does hold take part.

    Attributes:
        embeddings_PD: Region embeddings of length 1.
        labels_P: int64 in [0, C).
        classes_K: int64, the classes among the labels, ascending.
        objectness_P: Score of the proposal (about 23 for a ground-truth box).
    """

    embeddings_PD: Tensor
    labels_P: Tensor
    classes_K: Tensor
    objectness_P: Tensor


@torch.no_grad()
def with_reference(
    steps: Sequence[StepOutput], heads: RoiHeads, batch: FeatureBatch
) -> tuple[StepOutput, ...]:
    """Return the steps of the detection branch with what other weights predict of their regions.

    Args:
        steps: Of `box_steps`.
        heads: The second stage with the other weights.
        batch: Features that they pool from, and image sizes.
    """
    branch = heads.detection
    found = []
    for number, step in enumerate(steps):
        features_NF = branch.features(number, heads.pool(batch, step.regions))
        shape = step.regions.valid_BR.shape
        reference = ReferenceOutput(
            embeddings_BRD=branch.classifier(number)(features_NF).unflatten(0, shape),
            deltas_BR4=branch.deltas(number, features_NF).unflatten(0, shape),
        )
        found.append(replace(step, reference=reference))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class MaskedRegions:
    """The regions of the first step that stand for an object which has a mask, image after image.

    Attributes:
        boxes_P4: Their boxes.
        image_P: int64, the image of each.
        object_P: int64, the object of that image.
        targets_PSS: float32 on the host, what the masks in the boxes should be, which a thread draws meanwhile; None where
            the masks lie on the device.
    """

    boxes_P4: Tensor
    image_P: Tensor
    object_P: Tensor
    targets_PSS: Future[Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class MaskOutput(MaskedRegions):
    """Masks predicted for them.

    Attributes:
        logits_PSS: Mask logits, which fill the boxes.
    """

    logits_PSS: Tensor


@dataclass(frozen=True, kw_only=True)
class BoxTrainingOutput:
    """Everything that the losses of a box batch need.

    Attributes:
        centernet: The proposal network's output.
        truth: The objects.
        steps: The detection branch, a step each.
        mixup: The mixup branch; None where the model has none.
        masks: The mask head; None where the model has none, or no image comes with masks.
        table: The classes.
    """

    centernet: CenterNetOutput
    truth: BatchObjects
    steps: tuple[StepOutput, ...]
    mixup: MixupOutput | None
    masks: MaskOutput | None
    table: TrainingClasses


@dataclass(frozen=True, kw_only=True)
class ImageStepOutput:
    """One step of the detection branch on an image-label batch: the region that stands for the image.

    Attributes:
        embeddings_BD: Its embedding, of length 1.
        valid_B: bool, False where an image has no region.
        bias: Learnt bias of the logits (1,), None where there is none.
    """

    embeddings_BD: Tensor
    valid_B: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ImageLabelTrainingOutput:
    """Everything that the losses of an image-label batch need.

    Attributes:
        centernet: The proposal network's output, without gradient.
        zero: A scalar 0, to be added to a loss: it gives a gradient of 0 to the proposal network, which no loss trains.
        labels: Classes of each image: int64 (L,), in [0, C).
        steps: The detection branch, a step each.
        table: The classes.
    """

    centernet: CenterNetOutput
    zero: Tensor
    labels: tuple[Tensor, ...]
    steps: tuple[ImageStepOutput, ...]
    table: TrainingClasses


TrainingOutput: TypeAlias = BoxTrainingOutput | ImageLabelTrainingOutput


# --- Training: the steps ---------------------------------------------------------------------------------------------


def sample_regions(
    config: CascadeConfig,
    regions: Regions,
    truth: BatchObjects,
    classes: int,
    generator: torch.Generator | None,
) -> tuple[Regions, Assignment]:
    """Add the objects' own boxes to the proposals and sample the regions to train on."""
    regions = append_ground_truth(regions, truth)
    assignment = match(regions, truth, config.iou_thresholds[0], classes)
    return sample(
        regions,
        assignment,
        size=config.samples_per_image,
        positive_fraction=config.positive_fraction,
        classes=classes,
        generator=generator,
    )


def box_steps(
    heads: RoiHeads,
    batch: FeatureBatch,
    regions: Regions,
    assignment: Assignment,
    truth: BatchObjects,
    *,
    classes: int,
) -> tuple[tuple[StepOutput, ...], MixupOutput | None]:
    """Run both cascades on a box batch.

    Args:
        heads: The second stage.
        batch: Features and image sizes.
        regions: The sampled regions.
        assignment: Their labels and objects.
        truth: The objects.
        classes: C, the background's label.
    """
    branch, config = heads.detection, heads.config
    outputs: list[StepOutput] = []
    pooled_NCSS = heads.pool(batch, regions)
    shape = regions.valid_BR.shape
    for step in range(len(branch)):
        if step > 0:
            regions = heads.refine(batch, outputs[-1].deltas_BR4, regions, step - 1)
            assignment = match(regions, truth, config.iou_thresholds[step], classes)
            pooled_NCSS = heads.pool(batch, regions)
        # Each step moves the shared features by its share only.
        features_NF = branch.features(step, scale_gradient(pooled_NCSS, 1.0 / len(branch)))
        classifier = branch.classifier(step)
        outputs.append(
            StepOutput(
                embeddings_BRD=classifier(features_NF).unflatten(0, shape),
                deltas_BR4=branch.deltas(step, features_NF).unflatten(0, shape),
                regions=regions,
                assignment=assignment,
                targets_BR4=assignment.boxes_from(truth),
                delta_weights=config.delta_weights[step],
                bias=classifier.cls_bias,
            )
        )
    return tuple(outputs), _mixup_step(heads, batch, regions, truth, classes, pooled_NCSS.detach())


def _mixup_step(
    heads: RoiHeads,
    batch: FeatureBatch,
    regions: Regions,
    truth: BatchObjects,
    classes: int,
    pooled_NCSS: Tensor,
) -> MixupOutput | None:
    branch, config = heads.mixup, heads.config
    if branch is None:
        return None
    with torch.no_grad():
        regions = heads.mixup_regions(batch, regions, pooled_NCSS)
    threshold = config.iou_thresholds[-1]
    # Which regions and classes these are is found out on the host, which has to know how many: one wait for the device.
    labels_N = match(regions, truth, threshold, classes).labels_BR.flatten().cpu()
    places = _foreground_indices(labels_N, classes)
    device = regions.valid_BR.device
    chosen, labels_P, classes_K = (
        values.to(device, non_blocking=True)
        for values in (places, labels_N[places], labels_N[places].unique())
    )
    pooled = heads.box_pooler(
        batch.features, regions.boxes_BR4.flatten(0, 1)[chosen], regions.image_N[chosen]
    )
    last = len(branch) - 1
    share = config.mixup_gradient / len(branch)
    features_PF = branch.features(last, scale_gradient(pooled, share))
    return MixupOutput(
        embeddings_PD=branch.classifier(last)(features_PF),
        labels_P=labels_P,
        classes_K=classes_K,
        objectness_P=regions.objectness_BR.flatten()[chosen],
    )


def masked_regions(
    heads: RoiHeads, regions: Regions, assignment: Assignment, truth: BatchObjects, classes: int
) -> MaskedRegions:
    """Choose the regions that stand for an object which has a mask, and begin to draw these.

    Waits for the device once.
    """
    is_object_BR = (assignment.labels_BR >= 0) & (assignment.labels_BR < classes)
    table_BR6 = torch.cat(
        [
            regions.boxes_BR4,
            assignment.objects_BR[..., None],
            (is_object_BR & assignment.masked_from(truth))[..., None],
        ],
        dim=2,
    )
    table_N6 = table_BR6.flatten(0, 1).cpu()
    places = table_N6[:, 5].nonzero()[:, 0]
    boxes_P4, object_P = table_N6[places, :4], table_N6[places, 4].long()
    image_P = places // max(regions.valid_BR.shape[1], 1)
    device = regions.valid_BR.device
    targets_PSS = None
    if not any(isinstance(masks, BitMasks) for masks in truth.masks):
        assert heads.mask_pooler is not None
        rows_P6 = torch.cat([boxes_P4, image_P[:, None], object_P[:, None]], dim=1)
        thread = ThreadPoolExecutor(1, thread_name_prefix="mask targets")
        side = 2 * heads.mask_pooler.side  # the head doubles it
        targets_PSS = thread.submit(crop_masks, rows_P6, truth.masks, side, torch.device("cpu"))
        thread.shutdown(wait=False)
    return MaskedRegions(
        boxes_P4=regions.boxes_BR4.flatten(0, 1)[places.to(device, non_blocking=True)],
        image_P=image_P.to(device, non_blocking=True),
        object_P=object_P.to(device, non_blocking=True),
        targets_PSS=targets_PSS,
    )


def crop_masks(
    rows_P6: Tensor,
    masks: Sequence[PolygonMasks | BitMasks | None],
    side: int,
    device: torch.device,
) -> Tensor:
    """Return objects cut out by boxes and resized: float32 (P, side, side), 0 or 1.

    Args:
        rows_P6: On the CPU: box, image and object, image after image.
        masks: Of each image.
        side: Side of the result.
        device: Where to return it.
    """
    parts = [torch.zeros(0, side, side, device=device)]
    for image, own in enumerate(masks):
        chosen = rows_P6[rows_P6[:, 4] == image]
        if len(chosen) and isinstance(own, PolygonMasks):
            shapes = [own.polygons[mask] for mask in chosen[:, 5].long().tolist()]
            cropped = torch.from_numpy(crop_polygons(shapes, chosen[:, :4].numpy(), side))
            parts.append(cropped.to(device, torch.float32, non_blocking=True))
        elif len(chosen) and own is not None:
            objects = chosen[:, 5].long().to(own.device, non_blocking=True)
            boxes = chosen[:, :4].to(own.device, non_blocking=True)
            cropped = own[objects].crop_and_resize(boxes, side)
            parts.append(cropped.to(device, torch.float32, non_blocking=True))
    return torch.cat(parts)


def mask_step(heads: RoiHeads, batch: FeatureBatch, regions: MaskedRegions) -> MaskOutput:
    """Predict masks for the regions that stand for an object which has a mask."""
    return MaskOutput(
        logits_PSS=heads.mask_logits(batch, regions.boxes_P4, regions.image_P), **vars(regions)
    )


def image_label_steps(
    heads: RoiHeads, batch: FeatureBatch, regions: Regions
) -> tuple[ImageStepOutput, ...]:
    """Run the detection branch on an image-label batch.

    Each step's loss takes one region an image, the largest of all but the last. So only that one has a gradient; the
    others are only refined, to find the next step's largest.
    """
    boxes_BR4 = clip(regions.boxes_BR4, batch.sizes_B2[:, None])
    regions = regions.with_boxes(boxes_BR4, regions.valid_BR)
    image_B = torch.arange(len(boxes_BR4), device=boxes_BR4.device)
    branch = heads.detection
    outputs = []
    for step in range(len(branch)):
        if step > 0:
            with torch.no_grad():
                features_NF = branch.features(step - 1, heads.pool(batch, regions))
                deltas_N4 = branch.deltas(step - 1, features_NF)
                deltas_BR4 = deltas_N4.unflatten(0, regions.valid_BR.shape)
                regions = heads.refine(batch, deltas_BR4, regions, step - 1)
        largest_B4, valid_B = largest_but_last(regions)
        pooled = heads.box_pooler(batch.features, largest_B4, image_B)
        classifier = branch.classifier(step)
        features_BF = branch.features(step, scale_gradient(pooled, 1.0 / len(branch)))
        outputs.append(
            ImageStepOutput(
                embeddings_BD=classifier(features_BF), valid_B=valid_B, bias=classifier.cls_bias
            )
        )
    return tuple(outputs)


def largest_but_last(regions: Regions) -> tuple[Tensor, Tensor]:
    """Choose each image's largest region, the last one left out (the published choice; a lone region is taken).

    Returns:
        Boxes (B, 4), zero where an image has no region; and which images have one: bool (B,).
    """
    images, count = regions.valid_BR.shape
    if count == 0:
        empty_B4 = regions.boxes_BR4.new_zeros(images, 4)
        return empty_B4, torch.zeros(images, dtype=torch.bool, device=empty_B4.device)
    positions_R = torch.arange(count, device=regions.valid_BR.device)
    last_B = torch.where(regions.valid_BR, positions_R, -1).amax(dim=1)
    # The last one ranks below every other valid one and above padding, so it wins only when it is alone.
    areas_BR = areas(regions.boxes_BR4)
    areas_BR = torch.where(positions_R == last_B[:, None], -1.0, areas_BR)
    areas_BR = torch.where(regions.valid_BR, areas_BR, -2.0)
    chosen_B = areas_BR.argmax(dim=1)
    index_B14 = chosen_B[:, None, None].expand(-1, 1, 4)
    return regions.boxes_BR4.gather(1, index_B14)[:, 0], last_B >= 0


def _foreground_indices(labels_BR: Tensor, classes: int) -> Tensor:
    """Return the indices of the foreground regions among those of all images (P,)."""
    return ((labels_BR >= 0) & (labels_BR < classes)).flatten().nonzero()[:, 0]
