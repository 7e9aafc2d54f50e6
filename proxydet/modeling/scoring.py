"""From region embeddings to detections: classification, fusion of the two branches, suppression.

Dimensions: B images, R regions of an image (padded), N = B * R, C classes, D embedding, K candidates (pairs of region and
class) of all images, L detections of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from proxydet.errors import NumericsError
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.heads import ZeroShotClassifier
from proxydet.modeling.roi_heads import RegionEmbeddings
from proxydet.modeling.suppression import keep_best_by_class


@dataclass(frozen=True, kw_only=True)
class ClassText:
    """The classes to look for, on the network's device.

    Attributes:
        text_DC: Normalised text embeddings, a column each.
        base_C: bool, classes that count as base.
    """

    text_DC: Tensor
    base_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The detections of one image, best first.

    Attributes:
        boxes_L4: xyxy pixels of the network's input, clipped to the image.
        scores_L: In [0, 1].
        classes_L: int64.
        regions_L: int64, the region (of this image) that each comes from; one region can have several classes.
    """

    boxes_L4: Tensor
    scores_L: Tensor
    classes_L: Tensor
    regions_L: Tensor


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    region_K: Tensor
    class_K: Tensor
    score_K: Tensor


def detect_classes(
    regions: RegionEmbeddings,
    classes: ClassText,
    classifiers: list[ZeroShotClassifier],
    settings: InferenceConfig,
) -> list[Detections]:
    """Score every class for every region and keep the best.

    Args:
        regions: What the heads know of the regions.
        classes: What to look for.
        classifiers: Those of the detection branch's steps, then that of the mixup branch's last step if there is one.
        settings: Thresholds and weights.

    Returns:
        One `Detections` an image.

    Raises:
        NumericsError: Embeddings or boxes are not finite.
    """
    embeddings = [*regions.detection]
    if regions.mixup_BRD is not None:
        embeddings.append(regions.mixup_BRD)
    _require_finite([*embeddings, regions.boxes_BR4, regions.mixup_boxes_BR4])
    scorer = _Scorer(regions, embeddings, classes, classifiers, settings)
    found = scorer.candidates(settings.class_chunk)
    return _select(found, regions, settings)


def _require_finite(results: list[Tensor | None]) -> None:
    # One look for the whole batch: a comparison with NaN is false, so damage would pass as "nothing found".
    finite = [values.isfinite().all() for values in results if values is not None]
    if not bool(torch.stack(finite).all()):
        raise NumericsError(
            "the box heads gave values that are not finite",
            hint="the weights are damaged, or half precision is too narrow for them: use float32",
        )


class _Scorer:
    """Scores of all regions for a range of classes (model description, "test-time scores")."""

    def __init__(
        self,
        regions: RegionEmbeddings,
        embeddings: list[Tensor],
        classes: ClassText,
        classifiers: list[ZeroShotClassifier],
        settings: InferenceConfig,
    ) -> None:
        self._embeddings = [values.flatten(0, 1) for values in embeddings]
        self._classifiers = classifiers
        self._steps = len(regions.detection)
        self._classes = classes
        self._settings = settings
        self._weight_C = torch.where(classes.base_C, settings.alpha, settings.beta)
        self._proposal_N = regions.proposal_scores_BR.flatten()
        self._valid_N1 = regions.valid_BR.flatten()[:, None]

    def candidates(self, chunk: int) -> _Candidates:
        """Return the pairs of region and class that score above the threshold, by region."""
        found: list[_Candidates] = []
        best_N = torch.full_like(self._proposal_N, -1.0)
        for start in range(0, len(self._classes.base_C), chunk):
            scores_NC = self._scores(slice(start, start + chunk))
            best_N = torch.maximum(best_N, scores_NC.amax(dim=1))
            region_K, class_K = (
                (scores_NC > self._settings.score_threshold) & self._valid_N1
            ).nonzero(as_tuple=True)
            score_K = scores_NC[region_K, class_K]
            found.append(_Candidates(region_K=region_K, class_K=class_K + start, score_K=score_K))
        everything = _join(found)
        if self._settings.one_class_per_proposal:
            winners = everything.score_K == best_N[everything.region_K]
            everything = _choose(everything, winners)
        if len(found) > 1:
            everything = _choose(everything, everything.region_K.argsort(stable=True))
        return everything

    def _scores(self, columns: slice) -> Tensor:
        text_DC = self._classes.text_DC[:, columns]
        scores_NC = self._probabilities(0, text_DC)
        for step in range(1, self._steps):
            scores_NC += self._probabilities(step, text_DC)
        scores_NC /= self._steps
        if len(self._embeddings) > self._steps:
            weight_C = self._weight_C[columns]
            mixup_NC = self._probabilities(self._steps, text_DC).pow_(weight_C)
            scores_NC = scores_NC.pow_(1 - weight_C).mul_(mixup_NC)
        return scores_NC.mul_(self._proposal_N[:, None]).sqrt_()

    def _probabilities(self, index: int, text_DC: Tensor) -> Tensor:
        return self._classifiers[index].logits(self._embeddings[index], text_DC).sigmoid_()


def _select(
    found: _Candidates, regions: RegionEmbeddings, settings: InferenceConfig
) -> list[Detections]:
    images, count = regions.valid_BR.shape
    image_K = found.region_K // max(count, 1)
    per_image = torch.bincount(image_K, minlength=images).tolist()
    results = []
    for image, (region_K, class_K, score_K) in enumerate(
        zip(
            (found.region_K - image_K * count).split(per_image),
            found.class_K.split(per_image),
            found.score_K.split(per_image),
            strict=True,
        )
    ):
        boxes_K4 = regions.boxes_BR4[image][region_K]
        kept = keep_best_by_class(
            boxes_K4, score_K, class_K, settings.nms_iou, settings.max_detections
        )
        results.append(
            Detections(
                boxes_L4=boxes_K4[kept],
                scores_L=score_K[kept],
                classes_L=class_K[kept],
                regions_L=region_K[kept],
            )
        )
    return results


def _join(parts: list[_Candidates]) -> _Candidates:
    if len(parts) == 1:
        return parts[0]
    return _Candidates(
        region_K=torch.cat([part.region_K for part in parts]),
        class_K=torch.cat([part.class_K for part in parts]),
        score_K=torch.cat([part.score_K for part in parts]),
    )


def _choose(found: _Candidates, index: Tensor) -> _Candidates:
    return _Candidates(
        region_K=found.region_K[index],
        class_K=found.class_K[index],
        score_K=found.score_K[index],
    )
