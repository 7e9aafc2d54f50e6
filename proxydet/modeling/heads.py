"""The heads of one cascade: region embedding, zero-shot classifier, box refinement.

Dimensions: N regions, C classes, D embedding, F features of a box head, S side of a pooled region.
"""

from __future__ import annotations

from typing import Any, cast

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch import Tensor, nn
from torch.nn import functional

from proxydet.modeling.config import CascadeConfig, ClassifierConfig


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
        return functional.normalize(self.linear(features_NF), dim=1)

    def logits(self, embeddings_ND: Tensor, text_DK: Tensor) -> Tensor:
        """Return the logits (N, K) of region embeddings for K classes given by columns of normalised text."""
        logits_NK = (self.temperature * embeddings_ND) @ text_DK
        return logits_NK if self.cls_bias is None else logits_NK + self.cls_bias


class BoxPredictor(nn.Module):
    """What one step says of its regions: an embedding and a box change.

    Args:
        config: Of the classifier.
        features: F.
        text_DC1: As `ZeroShotClassifier`.
        frequency_C: Weight of each training class in the draw of the federated loss.
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
        """Return what the box head of a step makes of pooled regions: (N, F)."""
        return cast(Tensor, self._heads[step](pooled_NCSS))

    def classifier(self, step: int) -> ZeroShotClassifier:
        """Return the classifier of a step."""
        return self._predictor(step).cls_score

    def deltas(self, step: int, features_NF: Tensor) -> Tensor:
        """Return the box changes of a step: (N, 4)."""
        return cast(Tensor, self._predictor(step).bbox_pred(features_NF))

    def _predictor(self, step: int) -> BoxPredictor:
        return cast(BoxPredictor, self._predictors[step])


def build_heads(
    cascade: CascadeConfig,
    classifier: ClassifierConfig,
    channels: int,
    text_DC1: Tensor,
    frequency_C: Tensor,
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Build the box heads and predictors of one cascade, one of each a step."""
    pooled = ShapeSpec(channels=channels, height=cascade.pool_size, width=cascade.pool_size)
    heads = nn.ModuleList(
        FastRCNNConvFCHead(pooled, conv_dims=[], fc_dims=list(cascade.hidden))
        for _ in range(cascade.steps)
    )
    predictors = nn.ModuleList(
        BoxPredictor(classifier, cascade.hidden[-1], text_DC1, frequency_C)
        for _ in range(cascade.steps)
    )
    return heads, predictors
