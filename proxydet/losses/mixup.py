"""Class-wise mixup (ProxyDet, arXiv 2312.07266, section 3).

A prototype of each class in the batch (only base classes are annotated) is mixed with that of another, and their text embeddings by the same ratio; the
mixtures stand in for novel classes that lie between base classes.

Dimensions: P regions, K classes in the batch, C classes, D embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from proxydet.losses.config import MixupLossConfig
from proxydet.modeling.outputs import MixupOutput


def class_prototypes(output: MixupOutput, config: MixupLossConfig) -> tuple[Tensor, Tensor]:
    """Return the visual prototype of each class in the batch.

    Args:
        output: Regions that stand for an object.
        config: How regions are weighed.

    Returns:
        Normalised prototypes (K, D) and their classes (K,), ascending. Waits for the device once, for K.
    """
    classes_K = torch.unique(output.labels_P)
    of_class_KP = classes_K[:, None] == output.labels_P
    scores_P = output.objectness_P / config.temperature
    if config.prototype == "center":
        scores_P = torch.zeros_like(scores_P)
    # One softmax a row over the regions of that class; as a product of matrices it adds in a fixed order.
    weights_KP = (
        scores_P.expand_as(of_class_KP).masked_fill(~of_class_KP, -torch.inf).softmax(dim=1)
    )
    return functional.normalize(weights_KP @ output.embeddings_PD, dim=1), classes_K


def draw_mixing_ratio(beta: float, generator: torch.Generator | None) -> float:
    """Draw from Beta(beta, beta); 0 stands for its limit, 0 or 1 with equal chance."""
    # torch has no Beta draw with a generator of one's own; its generator seeds numpy's.
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=device).item()
    source = np.random.default_rng(int(seed))
    return float(source.integers(2)) if beta == 0 else float(source.beta(beta, beta))


def mixup_loss(
    prototypes_KD: Tensor,
    texts_KD: Tensor,
    permutation_K: Tensor,
    ratio: float,
    distance: str,
) -> Tensor:
    """Return the distance of mixed prototypes and equally mixed text embeddings.

    Args:
        prototypes_KD: Normalised visual prototypes.
        texts_KD: Normalised text embeddings of the same classes.
        permutation_K: Which class each one is mixed with.
        ratio: Share of the class itself, in [0, 1].
        distance: ``"l1"``, the mean absolute difference, or ``"l2"``, the mean squared one.
    """
    mixed_KD, mixed_text_KD = (
        functional.normalize(ratio * rows_KD + (1 - ratio) * rows_KD[permutation_K], dim=1)
        for rows_KD in (prototypes_KD, texts_KD)
    )
    if distance == "l1":
        return functional.l1_loss(mixed_KD, mixed_text_KD)
    return functional.mse_loss(mixed_KD, mixed_text_KD)


def class_wise_mixup_loss(
    output: MixupOutput,
    text_DC1: Tensor,
    config: MixupLossConfig,
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the weighted loss of a batch; a zero connected to the branch where no region stands for an object.

    Args:
        output: Regions that stand for an object.
        text_DC1: Normalised text embeddings, a column each.
        config: Weight and variant.
        generator: Source of the mixing ratio and the pairing; None is torch's global one.
    """
    ratio = draw_mixing_ratio(config.beta, generator)
    if len(output.labels_P) == 0:
        return output.embeddings_PD.sum() * 0
    prototypes_KD, classes_K = class_prototypes(output, config)
    device = "cpu" if generator is None else generator.device
    permutation_K = torch.randperm(len(classes_K), generator=generator, device=device)
    loss = mixup_loss(
        prototypes_KD,
        text_DC1.T[classes_K],
        permutation_K.to(classes_K.device, non_blocking=True),
        ratio,
        config.distance,
    )
    return config.weight * loss
