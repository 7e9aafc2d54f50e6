"""The detector's inference as one graph of tensors, for one image of any size and any number of classes.

It runs the detector's own modules; only what depends on data in its shapes has another form here: convolutions, pooling,
the choice of candidates, suppression, and the masks of distinct boxes.

Dimensions: H and W the image, C classes, D embedding, K candidates, R regions (a fixed number, padded), P pairs of region
and class, L detections, M distinct boxes, N boxes to pool, S side of a mask or of a pooled region.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import proxydet.runtime.d2  # noqa: F401

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms, roi_align

from proxydet.errors import ConfigError
from proxydet.modeling.boxes import Regions, cell_centres
from proxydet.modeling.centernet import CenterNetOutput, boxes_around
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import ClassText, class_scores
from proxydet.modeling.roi_heads import FeatureBatch, RegionEmbeddings, RegionPooler

if TYPE_CHECKING:
    from proxydet.detector import Detector

Format = Literal["onnx", "torch"]

# torchvision's operator cannot stop early, and its time grows with the square of the pairs.
_MOST_PAIRS = 10_000
_TRACED_SIZE = (200, 264)
_TRACED_CLASSES = 5


def trace(detector: Detector, format: Format) -> torch.export.ExportedProgram:
    """Trace a detector with free image size and number of classes.

    Args:
        detector: What to trace; not changed.
        format: What the program is meant for.

    Raises:
        ConfigError: A backbone of timm or at a Python path cannot be traced.
    """
    suppression = OnnxSuppression() if format == "onnx" else TorchvisionSuppression()
    graph = DetectorGraph(detector.network, detector.inference, suppression)
    dimension = detector.network.config.classifier.embedding_dim
    example = (
        torch.zeros(*_TRACED_SIZE, 3, dtype=torch.uint8),
        torch.ones(_TRACED_CLASSES, dimension),
        torch.ones(_TRACED_CLASSES, dtype=torch.bool),
        torch.tensor(0.5),
        *(torch.ones(_TRACED_CLASSES) for _ in range(3)),
        torch.zeros(_TRACED_CLASSES, dtype=torch.bool),
    )
    free = torch.export.Dim.DYNAMIC
    of_classes: dict[int, object] = {0: torch.export.Dim("classes", min=1)}
    shapes: tuple[dict[int, object], ...]
    shapes = ({0: free, 1: free}, of_classes, of_classes, {}, *[of_classes] * 4)
    backbone = detector.network.config.backbone
    named = backbone.kind
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    if backbone.kind == "timm":
        named, context = backbone.timm, _known_padding
    try:
        with warnings.catch_warnings(), torch.no_grad(), context():
            silence_tracers()
            return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if backbone.kind in ("resnet", "swin"):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the detector cannot be exported; its backbone {named} may be why: {type(error).__name__}: {reason}",
            hint="torch.export needs a forward whose operations do not depend on the size of the image; predict, serve and "
            "eval work without an export",
        ) from error


@contextmanager
def _known_padding() -> Iterator[None]:
    """Let timm's convolutions with TensorFlow's "same" padding, which depends on the size of a map, be traced.

    The sides of maps are multiples of the strides, as images are padded to those of the coarsest level: the padding is a constant.
    """
    from timm.layers import padding

    original = padding.get_same_padding
    padding.get_same_padding = lambda x, kernel_size, stride, dilation: max(  # noqa: ARG005
        (kernel_size - 1) * dilation + 1 - stride, 0
    )
    try:
        yield
    finally:
        padding.get_same_padding = original


def silence_tracers() -> None:
    """Silence, inside ``warnings.catch_warnings``, what torch's and torchvision's tracers warn of in their own code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


# --- Suppression -------------------------------------------------------------------------------------------------------


class TorchvisionSuppression:
    """How overlapping boxes are dropped, by torchvision's operator.

    Of more than 10,000 pairs above the threshold only the best are considered.
    """

    def keep_best(self, boxes_K4: Tensor, scores_K: Tensor, iou: float, limit: int) -> Tensor:
        """Return the positions (``limit``,) of the boxes to keep, best first; K where there are no more."""
        return _filled(self._nms(boxes_K4, scores_K, iou), limit, scores_K)

    def keep_best_by_class(
        self,
        boxes_R4: Tensor,
        scores_RC: Tensor,
        score_threshold: Tensor,
        iou: float,
        limit: int,  # noqa: ARG002 only ONNX stops early
    ) -> tuple[Tensor, Tensor]:
        """Return region and class of the pairs to keep, at least the best ``limit`` of each class, in any order."""
        classes = scores_RC.shape[1]
        flat_P = torch.cat([scores_RC.flatten(), scores_RC.new_full((_MOST_PAIRS,), -1.0)])
        score_P, pair_P = flat_P.topk(_MOST_PAIRS)
        above = (score_P > score_threshold).nonzero()[:, 0]
        score_P, pair_P = score_P[above], pair_P[above]
        region_P, class_P = pair_P // classes, pair_P % classes
        # Classes are moved apart in float64, which is exact.
        far = boxes_R4.amax().double() + 1
        apart = boxes_R4[region_P].double() + (class_P.double() * far)[:, None]
        kept = self._nms(apart, score_P.double(), iou)
        return region_P[kept], class_P[kept]

    @staticmethod
    def _nms(boxes_K4: Tensor, scores_K: Tensor, iou: float) -> Tensor:
        # A traced operator may take it for granted that at least two boxes are kept: two more, apart from all others
        # and with the lowest scores, make that true.
        marks_24 = boxes_K4.new_tensor([[-3e9, -3e9, -2e9, -2e9], [-6e9, -6e9, -5e9, -5e9]])
        kept: Tensor = nms(
            torch.cat([boxes_K4, marks_24]),
            torch.cat([scores_K, scores_K.new_tensor([-2.0, -2.0])]),
            iou,
        )
        return kept[:-2]


class OnnxSuppression:
    """The same by ONNX's own operator, which stops early and takes all classes at once; it can be traced, not run.

    While a detector is traced, an operator of ours stands for it, which `onnx_translations` turns into
    ``NonMaxSuppression``. It exists in the exporting process only: the ONNX file does not hold it.
    """

    def keep_best(self, boxes_K4: Tensor, scores_K: Tensor, iou: float, limit: int) -> Tensor:
        """See `TorchvisionSuppression.keep_best`; boxes that score 0 are left out."""
        floor = scores_K.new_zeros(())
        kept_L3 = _suppress()(boxes_K4, scores_K[None], floor, iou, limit)
        return _filled(kept_L3[:, 2], limit, scores_K)

    def keep_best_by_class(
        self,
        boxes_R4: Tensor,
        scores_RC: Tensor,
        score_threshold: Tensor,
        iou: float,
        limit: int,
    ) -> tuple[Tensor, Tensor]:
        """See `TorchvisionSuppression.keep_best_by_class`."""
        kept_L3 = _suppress()(boxes_R4, scores_RC.T, score_threshold, iou, limit)
        return kept_L3[:, 2], kept_L3[:, 1]


def _filled(kept_L: Tensor, limit: int, scores_K: Tensor) -> Tensor:
    """Cut positions to ``limit``, or fill them up with K."""
    return torch.cat([kept_L, kept_L.new_full((limit,), scores_K.shape[0])])[:limit]


@lru_cache(maxsize=1)
def _suppress() -> Any:
    """Register the operator that stands for ``NonMaxSuppression`` once in the process, and return it.

    It takes boxes (K, 4), scores (C, K), a score threshold, an IoU and a limit for each class, and returns
    ``NonMaxSuppression``'s rows (L, 3): 0, class, box; of each class best first.
    """
    # It has no kernel: nothing ever runs it.
    torch.library.define(
        "proxydet::suppress",
        "(Tensor boxes, Tensor scores, Tensor score_threshold, float iou, int limit) -> Tensor",
    )

    def shapes(boxes: Tensor, *_others: object) -> Tensor:
        rows = torch.library.get_ctx().new_dynamic_size()
        return boxes.new_empty((rows, 3), dtype=torch.int64)

    torch.library.register_fake("proxydet::suppress", shapes)
    return torch.ops.proxydet.suppress.default


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` makes of the operator, and of the sigmoid.

    onnxruntime's own ``Sigmoid`` is exact to about 1e-7 whatever its value, and 0 below that. Scores are products of powers of
    probabilities, and such a zero drops what the detector finds; ``Exp`` is exact in proportion to its value.
    """
    from onnxscript import opset18

    op: Any = opset18  # typed for scripts, not for tracing

    def suppress(
        boxes_K4: Any, scores_CK: Any, score_threshold: Any, iou: float, limit: int
    ) -> Any:
        return op.NonMaxSuppression(
            op.Unsqueeze(boxes_K4, [0]),
            op.Unsqueeze(scores_CK, [0]),
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou]),
            op.Reshape(score_threshold, [1]),
        )

    def sigmoid(logits: Any) -> Any:
        return op.Reciprocal(op.Add(op.Exp(op.Neg(logits)), op.Constant(value_floats=[1.0])))

    return {_suppress(): suppress, torch.ops.aten.sigmoid.default: sigmoid}


# --- Layers ------------------------------------------------------------------------------------------------------------


class ExportPooler(RegionPooler):
    """RoIAlign over the pyramid with shapes that do not depend on the boxes; same values as `RegionPooler`.

    The detector pools each box from its own level, level by level. Here every box is pooled from every level by
    torchvision's operator, and what is not from its own is set to zero before the results are added up. On levels that
    are not its own a box is shrunk to a point: where the samples follow from the size (ratio 0), that costs nothing.

    Args:
        pooler: The pooler to stand in for.
    """

    def __init__(self, pooler: RegionPooler) -> None:
        super().__init__(pooler.config, pooler.side)

    def forward(self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor) -> Tensor:
        """Pool every box: (N, C, S, S)."""
        level_N1 = self.level(boxes_N4)[:, None]
        index_N1 = image_N[:, None].to(boxes_N4.dtype)
        pooled = []
        for level, maps in zip(self.levels, features, strict=True):
            own_N1 = level_N1 == level
            rois_N5 = torch.cat([index_N1, torch.where(own_N1, boxes_N4, 0.0)], dim=1)
            cells = roi_align(
                maps,
                rois_N5,
                (self.side, self.side),
                spatial_scale=1.0 / 2**level,
                sampling_ratio=self.config.sampling_ratio,
                aligned=True,
            )
            pooled.append(torch.where(own_N1[:, :, None, None], cells, 0.0))
        return torch.stack(pooled).sum(dim=0)

    def parts(
        self,
        groups: Sequence[tuple[list[Tensor], int]],
        boxes_N4: Tensor,
        image_N: Tensor,
        size: int,  # noqa: ARG002 the detector bounds memory by it
    ) -> Iterator[Tensor]:
        """Pool every box: in one part, since an image's regions are few and the number of parts must be known."""
        ((features, _),) = groups
        yield self(features, boxes_N4, image_N)


def _make_convolutions_plain(module: nn.Module) -> None:
    """Replace every detectron2 ``Conv2d`` below a module by torch's, with its norm and its activation behind it.

    detectron2's asks, in Python, whether its input is empty. The parameters are kept.
    """
    for name, child in module.named_children():
        if not isinstance(child, Conv2d):
            _make_convolutions_plain(child)
            continue
        settings = ("stride", "padding", "dilation", "groups", "padding_mode")
        plain = nn.Conv2d(
            child.in_channels,
            child.out_channels,
            child.kernel_size,
            bias=child.bias is not None,
            device="meta",
            **{name: getattr(child, name) for name in settings},
        )
        plain.weight, plain.bias = child.weight, child.bias
        layers: list[nn.Module] = [plain]
        for layer in (child.norm, child.activation):
            if isinstance(layer, nn.Module):
                layers.append(layer)
            elif layer is nn.functional.relu:
                layers.append(nn.ReLU())
            elif layer is not None:
                raise TypeError(f"no plain form of the activation {layer!r} is known")
        setattr(module, name, plain if len(layers) == 1 else nn.Sequential(*layers))


# --- The detector ------------------------------------------------------------------------------------------------------


class DetectorGraph(nn.Module):
    """A detector's network in a form that can be traced; holds a copy of the weights, in float32 on the CPU.

    Args:
        network: The detector's network.
        settings: Fusion weights, overlaps, limits, and whether there are masks; its score threshold is an input instead.
        suppression: How overlapping boxes are dropped.
    """

    def __init__(
        self,
        network: ProxyDetNetwork,
        settings: InferenceConfig,
        suppression: TorchvisionSuppression | OnnxSuppression,
    ) -> None:
        super().__init__()
        own = copy.deepcopy(network)
        own.cpu().float().eval().requires_grad_(False)
        _make_convolutions_plain(own)
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
        self,
        image: Tensor,
        text: Tensor,
        base: Tensor,
        score_threshold: Tensor,
        bias: Tensor,
        scale: Tensor,
        threshold: Tensor,
        background: Tensor,
    ) -> dict[str, Tensor]:
        """Detect objects.

        Args:
            image: uint8 (H, W, 3), RGB, already scaled.
            text: float32 (C, D), text embeddings of any length.
            base: bool (C,), classes that count as base.
            score_threshold: float32 (), what scores at most this is left out.
            bias: float32 (C,), added to the logits of the classes; 0 for text.
            scale: float32 (C,), multiplies the cosines; 1 for text.
            threshold: float32 (C,), in place of ``score_threshold``; NaN where that holds.
            background: bool (C,), classes that take regions and are not reported.

        Returns:
            - ``boxes``: float32 (L, 4) xyxy, pixels of ``image``, best first.
            - ``scores``: float32 (L,), descending.
            - ``classes``: int64 (L,), rows of ``text``.
            - ``masks``: float32 (M, S, S), probabilities inside the boxes; absent where there are no masks.
            - ``mask_index``: int64 (L,), the mask of each detection, those of one box share a mask; absent likewise.
            - ``finite``: bool (), False where the network returned values that are not finite: then nothing else counts.
        """
        network = self.network
        height, width = image.shape[0], image.shape[1]
        pixels = (image.permute(2, 0, 1).float() - network.pixel_mean) / network.pixel_std
        divisor = network.backbone.size_divisibility
        down, right = (_round_up(length, divisor) - length for length in (height, width))
        pixels = functional.pad(pixels, (0, right, 0, down))[None]
        features = list(network.backbone(pixels).values())

        centernet = network.proposal_generator(features)
        regions = self._propose(centernet)

        levels = network.config.pyramid.all_levels
        pooled = network.config.cascade.pool_levels
        batch = FeatureBatch(
            features=[features[levels.index(level)] for level in pooled],
            sizes_B2=torch.stack([torch.full((), height), torch.full((), width)])[None].float(),
        )
        embedded = network.roi_heads.embed(batch, regions)
        boxes_R4 = embedded.boxes_BR4[0]
        weights_CD = functional.normalize(text, dim=1) * scale[:, None]
        classes = ClassText(text_DC=weights_CD.T, base_C=base, bias_C=bias)
        scores_RC = class_scores(embedded, classes, network.classifiers(), self.settings)
        threshold_C = torch.where(threshold.isnan(), score_threshold, threshold)
        scores_L, classes_L, regions_L = self._select(scores_RC, embedded, threshold_C, background)

        outputs = {"boxes": boxes_R4[regions_L], "scores": scores_L, "classes": classes_L}
        if self.masks:
            # One mask for each box in use.
            used_R = torch.zeros_like(boxes_R4[:, 0]).index_fill(0, regions_L, 1.0)
            boxes_M4 = boxes_R4[used_R.nonzero()[:, 0]]
            image_M = torch.zeros_like(boxes_M4[:, 0]).long()
            outputs["masks"] = network.roi_heads.mask_probabilities(batch, boxes_M4, image_M)
            outputs["mask_index"] = (used_R.long().cumsum(0) - 1)[regions_L]

        values = [*centernet.heatmaps, *centernet.distances, *embedded.detection]
        values.append(embedded.boxes_BR4)
        if embedded.mixup_BRD is not None:
            values.append(embedded.mixup_BRD)
        finite = torch.stack([tensor.isfinite().all() for tensor in values]).all()
        return {**outputs, "finite": finite}

    def _propose(self, output: CenterNetOutput) -> Regions:
        """As `proxydet.modeling.centernet.CenterNet.propose`, padded to a fixed number of candidates and of regions."""
        config = self.network.config.proposals
        boxes, scores = [], []
        levels = zip(output.heatmaps, output.distances, output.strides, strict=True)
        for heatmap, distances, stride in levels:
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
        self,
        scores_RC: Tensor,
        embedded: RegionEmbeddings,
        threshold_C: Tensor,
        background_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, classes and regions of the detections, best first.

        As `proxydet.modeling.postprocess.detect_classes`: with one label a box thresholds and background count behind NMS, else
        before it.
        """
        settings = self.settings
        scores_RC = torch.where(embedded.valid_BR[0][:, None], scores_RC, 0.0)
        best_only = settings.one_class_per_proposal or settings.agnostic_nms
        if not best_only:
            floor_R1 = torch.where(background_C, scores_RC, -1.0).amax(dim=1, keepdim=True)
            shown_RC = (scores_RC > threshold_C) & (scores_RC > floor_R1) & ~background_C
            scores_RC = torch.where(shown_RC, scores_RC, -1.0)
        elif settings.one_class_per_proposal:
            best_R1 = scores_RC.amax(dim=1, keepdim=True)
            scores_RC = torch.where(scores_RC == best_R1, scores_RC, 0.0)
        class_R: Tensor | None = None
        if settings.agnostic_nms:
            best_R, class_R = scores_RC.max(dim=1)
        region_K, class_K = self.suppression.keep_best_by_class(
            embedded.boxes_BR4[0],
            scores_RC if class_R is None else best_R[:, None],
            threshold_C.amin(dim=0),
            settings.nms_iou,
            max(settings.max_detections, self.network.config.proposals.keep_test * best_only),
        )
        class_K = class_K if class_R is None else class_R[region_K]
        score_K = scores_RC.flatten()[region_K * scores_RC.shape[1] + class_K]
        # What is not reported comes behind all else, and is cut off.
        shown_K = (score_K > threshold_C[class_K]) & ~background_C[class_K]
        score_K = torch.where(shown_K, score_K, -1.0)
        # Filled up, so that the best can be taken whatever their number.
        padded = torch.cat([score_K, score_K.new_full((settings.max_detections,), -1.0)])
        best_L, order_L = padded.topk(settings.max_detections)
        real = (best_L >= 0).nonzero()[:, 0]
        order_L = order_L[real]
        return best_L[real], class_K[order_L], region_K[order_L]


def _round_up(length: int, divisor: int) -> int:
    """Round a length up to a multiple; the tracer gets the number of multiples as a symbol of its own.

    Without it every later length carries the remainder along, which the tracer's algebra does not survive.
    """
    multiples: int = torch.full((), (length + divisor - 1) // divisor).item()  # type: ignore[assignment]
    torch._check(multiples >= 1)
    return multiples * divisor
