"""The second stage: two cascades over the proposals, and the mask head of a detector that has one.

The mixup branch starts from the regions that the detection branch's last step saw, so both share the features pooled for
that step. (The published code does so in training and in inference, and the recorded numbers hold only that way.) It is
trained only through its last step; the steps before it refine boxes without gradient and classify nothing.

Dimensions: B images, R regions of an image (padded), N = B * R, D embedding, C channels, S side of a pooled region,
M masks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from proxydet.modeling import geometry
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.heads import BoxPredictor, Branch, build_heads
from proxydet.modeling.matching import Regions
from proxydet.modeling.pooling import RegionPooler

# Bounds the memory of the mask head in inference; an image seldom has more distinct boxes.
_MASKS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the heads look at.

    Attributes:
        features: Maps of the pooled levels, finest first.
        sizes_B2: Height and width of each image in pixels, without padding.
    """

    features: list[Tensor]
    sizes_B2: Tensor


@dataclass(frozen=True, kw_only=True)
class RegionEmbeddings:
    """What inference knows of every region before any vocabulary is looked at.

    Attributes:
        detection: Region embeddings (B, R, D) of each step of the detection branch.
        mixup_BRD: Region embeddings of the last step of the mixup branch; None where there is no such branch.
        mixup_boxes_BR4: The boxes that this step saw; None likewise.
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


class RoiHeads(nn.Module):
    """Box heads of both branches and the mask head.

    Args:
        config: Sizes.
        text_DC1: Normalised text embeddings of the training classes, a column each, and a zero column last.
        frequency_C: Weight of each training class in the federated draw.

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
        if config.mixup_branch:
            self._copy_branch(config.classifier.mixup_temperature)

    def _copy_branch(self, temperature: float) -> None:
        self.box_head_cmm = copy.deepcopy(self.box_head)
        self.box_predictor_cmm = nn.ModuleList()
        for predictor in self.box_predictor:
            assert isinstance(predictor, BoxPredictor)
            own = copy.deepcopy(predictor)
            own.cls_score.zs_weight = predictor.cls_score.zs_weight
            own.freq_weight = predictor.freq_weight
            own.cls_score.temperature = temperature
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
        """Weight of each training class in the federated draw (all predictors hold the same)."""
        first = self.box_predictor[0]
        assert isinstance(first, BoxPredictor)
        return first.freq_weight

    def embed(self, scene: Scene, regions: Regions) -> RegionEmbeddings:
        """Run both cascades on the proposals of a batch, in inference."""
        branch = self.detection
        shape = regions.valid_BR.shape
        embeddings = []
        for step in range(len(branch)):
            seen = regions
            pooled_NCSS = self.pool(scene, seen)
            features_NF = branch.features(step, pooled_NCSS)
            embeddings.append(branch.classifier(step)(features_NF).unflatten(0, shape))
            deltas_BR4 = branch.deltas(step, features_NF).unflatten(0, shape)
            regions = self.refine(scene, deltas_BR4, seen, step)
        mixup_BRD, mixup_boxes_BR4 = self._embed_mixup(scene, seen, pooled_NCSS)
        return RegionEmbeddings(
            detection=tuple(embeddings),
            mixup_BRD=mixup_BRD,
            mixup_boxes_BR4=mixup_boxes_BR4,
            boxes_BR4=regions.boxes_BR4,
            proposal_scores_BR=regions.objectness_BR,
            valid_BR=regions.valid_BR,
        )

    def _embed_mixup(
        self, scene: Scene, regions: Regions, pooled_NCSS: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        branch = self.mixup
        if branch is None:
            return None, None
        last = len(branch) - 1
        if last > 0:
            regions = self.mixup_regions(scene, regions, pooled_NCSS)
            pooled_NCSS = self.pool(scene, regions)
        embeddings_ND = branch.classifier(last)(branch.features(last, pooled_NCSS))
        return embeddings_ND.unflatten(0, regions.valid_BR.shape), regions.boxes_BR4

    def pool(self, scene: Scene, regions: Regions) -> Tensor:
        """Pool all regions: (N, C, S, S)."""
        boxes_N4 = regions.boxes_BR4.flatten(0, 1)
        pooled: Tensor = self.box_pooler(scene.features, boxes_N4, regions.image_N)
        return pooled

    def refine(self, scene: Scene, deltas_BR4: Tensor, regions: Regions, step: int) -> Regions:
        """Apply a step's box changes; in training, boxes that became empty are dropped."""
        weights = self.config.delta_weights[step]
        boxes_BR4 = geometry.apply_deltas(deltas_BR4.detach(), regions.boxes_BR4, weights)
        boxes_BR4 = geometry.clip(boxes_BR4, scene.sizes_B2[:, None])
        valid_BR = regions.valid_BR
        if self.training:
            valid_BR = valid_BR & geometry.nonempty(boxes_BR4)
        return regions.with_boxes(boxes_BR4, valid_BR)

    def mixup_regions(self, scene: Scene, regions: Regions, pooled_NCSS: Tensor) -> Regions:
        """Refine the regions through all but the last step of the mixup branch.

        Args:
            scene: Features and image sizes.
            regions: What the detection branch's last step saw.
            pooled_NCSS: The features pooled for them.
        """
        branch = self.mixup
        assert branch is not None
        for step in range(len(branch) - 1):
            if step > 0:
                pooled_NCSS = self.pool(scene, regions)
            deltas_N4 = branch.deltas(step, branch.features(step, pooled_NCSS))
            deltas_BR4 = deltas_N4.unflatten(0, regions.valid_BR.shape)
            regions = self.refine(scene, deltas_BR4, regions, step)
        return regions

    def mask_logits(self, scene: Scene, boxes_M4: Tensor, image_M: Tensor) -> Tensor:
        """Return mask logits (M, side, side) inside the given boxes."""
        assert self.mask_head is not None
        assert self.mask_pooler is not None
        at_once = max(len(boxes_M4), 1) if self.training else _MASKS_AT_ONCE
        parts = self.mask_pooler.parts(scene.features, boxes_M4, image_M, at_once)
        return torch.cat([self.mask_head.layers(pooled)[:, 0] for pooled in parts])

    def mask_probabilities(self, scene: Scene, boxes_M4: Tensor, image_M: Tensor) -> Tensor:
        """Return masks (M, side, side), in [0, 1], inside the given boxes."""
        return self.mask_logits(scene, boxes_M4, image_M).sigmoid_()
