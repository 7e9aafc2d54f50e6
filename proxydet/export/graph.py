"""The detector's inference as one graph of tensors, for one picture of any size and any number of classes.

It runs the detector's own modules; only what depends on data in its shapes has another form here: pooling (see
`proxydet.export.pooling`), the choice of candidates, suppression, and the masks of distinct boxes.

Dimensions: H and W the picture, C classes, D embedding, K candidates, R regions (a fixed number, padded), L detections,
M distinct boxes, S side of a mask.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from proxydet.export.plain import make_convolutions_plain
from proxydet.export.pooling import ExportPooler
from proxydet.export.suppression import Suppression
from proxydet.modeling.centernet import CenterNetOutput, boxes_around
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.geometry import cell_centres
from proxydet.modeling.matching import Regions
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import ClassText, class_scores
from proxydet.modeling.roi_heads import FeatureBatch, RegionEmbeddings


class DetectorGraph(nn.Module):
    """A detector's network in a form that can be traced; holds a copy of the weights, in float32 on the CPU.

    Args:
        network: The detector's network.
        settings: Fusion weights, overlaps, limits, and whether there are masks; its score threshold is an input instead.
        suppression: How overlapping boxes are dropped.
    """

    def __init__(
        self, network: ProxyDetNetwork, settings: InferenceConfig, suppression: Suppression
    ) -> None:
        super().__init__()
        own = copy.deepcopy(network)
        own.cpu().float().eval().requires_grad_(False)
        make_convolutions_plain(own)
        own.roi_heads.box_pooler = ExportPooler(own.roi_heads.box_pooler)
        mask_pooler = own.roi_heads.mask_pooler
        self.masks = settings.masks and mask_pooler is not None
        if settings.masks and mask_pooler is not None:
            own.roi_heads.mask_pooler = ExportPooler(mask_pooler)
        else:
            own.roi_heads.mask_pooler = own.roi_heads.mask_head = None
        self.network = own
        self.settings = settings
        self.suppression = suppression

    def forward(
        self, image: Tensor, text: Tensor, base: Tensor, score_threshold: Tensor
    ) -> dict[str, Tensor]:
        """Find objects.

        Args:
            image: uint8 (H, W, 3), RGB, already scaled.
            text: float32 (C, D), text embeddings of any length.
            base: bool (C,), classes that count as base.
            score_threshold: float32 (), what scores at most this is left out.

        Returns:
            - ``boxes``: float32 (L, 4) xyxy, pixels of ``image``, best first.
            - ``scores``: float32 (L,), descending.
            - ``classes``: int64 (L,), rows of ``text``.
            - ``masks``: float32 (M, S, S), probabilities inside the boxes; absent where there are no masks.
            - ``mask_index``: int64 (L,), the mask of each detection, those of one box share a mask; absent likewise.
            - ``finite``: bool (), False where the network gave values that are not finite: then nothing else counts.
        """
        network = self.network
        height, width = image.shape[0], image.shape[1]
        features = list(network.backbone(self._pixels(image)).values())
        centernet = network.proposal_generator(features)
        regions = self._propose(centernet)
        levels = network.config.pyramid.all_levels
        pooled = [features[levels.index(level)] for level in network.config.cascade.pool_levels]
        scene = FeatureBatch(features=pooled, sizes_B2=_size(height, width))
        known = network.roi_heads.embed(scene, regions)
        classes = ClassText(text_DC=functional.normalize(text, dim=1).T, base_C=base)
        scores_RC = class_scores(known, classes, network.classifiers(), self.settings)
        scores_L, classes_L, regions_L = self._select(scores_RC, known, score_threshold)
        outputs = {
            "boxes": known.boxes_BR4[0][regions_L],
            "scores": scores_L,
            "classes": classes_L,
        }
        if self.masks:
            masks, mask_index_L = self._masks(scene, known.boxes_BR4[0], regions_L)
            outputs |= {"masks": masks, "mask_index": mask_index_L}
        return {**outputs, "finite": _finite(centernet, known)}

    def _pixels(self, image: Tensor) -> Tensor:
        network = self.network
        pixels = (image.permute(2, 0, 1).float() - network.pixel_mean) / network.pixel_std
        down, right = (
            _round_up(length, network.backbone.size_divisibility) - length
            for length in image.shape[:2]
        )
        return functional.pad(pixels, (0, right, 0, down))[None]

    def _propose(self, output: CenterNetOutput) -> Regions:
        """As `proxydet.modeling.centernet.CenterNet.propose`, padded to a fixed number of candidates and of regions."""
        config = self.network.config.proposals
        boxes, scores = [], []
        for heatmap, distances, stride in zip(
            output.heatmaps, output.distances, output.strides, strict=True
        ):
            points_M2 = cell_centres(heatmap.shape[2], heatmap.shape[3], stride, heatmap.device)
            probability_M = heatmap.flatten().sigmoid()
            # A coarse level can have fewer cells than candidates: cells that do not exist score 0.
            padded = torch.cat([probability_M, probability_M.new_zeros(config.candidates_test)])
            best_K, cells_K = padded.topk(config.candidates_test)
            cells_K = cells_K.clamp(max=points_M2.shape[0] - 1)
            sides_M4 = distances[0].flatten(1).T
            boxes.append(boxes_around(points_M2[cells_K], stride * sides_M4[cells_K]))
            scores.append(torch.where(best_K > config.score_floor, best_K.sqrt(), 0.0))
        boxes_K4, scores_K = torch.cat(boxes), torch.cat(scores)
        kept_R = self.suppression.keep_best(boxes_K4, scores_K, config.nms_iou, config.keep_test)
        scores_R = torch.cat([scores_K, scores_K.new_zeros(1)])[kept_R]
        boxes_R4 = torch.cat([boxes_K4, boxes_K4.new_zeros(1, 4)])[kept_R]
        return Regions(
            boxes_BR4=boxes_R4[None], objectness_BR=scores_R[None], valid_BR=(scores_R > 0)[None]
        )

    def _select(
        self, scores_RC: Tensor, known: RegionEmbeddings, score_threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, classes and regions of the detections, best first."""
        settings = self.settings
        scores_RC = torch.where(known.valid_BR[0][:, None], scores_RC, 0.0)
        if settings.one_class_per_proposal:
            scores_RC = torch.where(
                scores_RC == scores_RC.amax(dim=1, keepdim=True), scores_RC, 0.0
            )
        region_K, class_K = self.suppression.keep_best_by_class(
            known.boxes_BR4[0], scores_RC, score_threshold, settings
        )
        score_K = scores_RC.flatten()[region_K * scores_RC.shape[1] + class_K]
        # Filled up, so that the best can be taken whatever their number.
        padded = torch.cat([score_K, score_K.new_full((settings.max_detections,), -1.0)])
        best_L, order_L = padded.topk(settings.max_detections)
        real = (best_L >= 0).nonzero()[:, 0]
        order_L = order_L[real]
        return best_L[real], class_K[order_L], region_K[order_L]

    def _masks(
        self, scene: FeatureBatch, boxes_R4: Tensor, regions_L: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a mask for each box in use, and which of them each detection has."""
        used_R = torch.zeros_like(boxes_R4[:, 0]).index_fill(0, regions_L, 1.0)
        boxes_M4 = boxes_R4[used_R.nonzero()[:, 0]]
        place_R = used_R.long().cumsum(0) - 1
        image_M = torch.zeros_like(boxes_M4[:, 0]).long()
        masks_MSS = self.network.roi_heads.mask_probabilities(scene, boxes_M4, image_M)
        return masks_MSS, place_R[regions_L]


def _size(height: int, width: int) -> Tensor:
    return torch.stack([torch.full((), height), torch.full((), width)])[None].float()


def _round_up(length: int, divisor: int) -> int:
    """Round a length up to a multiple; the tracer gets the number of multiples as a symbol of its own.

    Without it every later length carries the remainder along, which the tracer's algebra does not survive.
    """
    multiples: int = torch.full((), (length + divisor - 1) // divisor).item()  # type: ignore[assignment]
    torch._check(multiples >= 1)
    return multiples * divisor


def _finite(output: CenterNetOutput, known: RegionEmbeddings) -> Tensor:
    values = [*output.heatmaps, *output.distances, *known.detection, known.boxes_BR4]
    if known.mixup_BRD is not None:
        values.append(known.mixup_BRD)
    return torch.stack([tensor.isfinite().all() for tensor in values]).all()
