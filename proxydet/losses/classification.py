"""Federated sigmoid cross-entropy (Zhou et al. 2021, arXiv 2103.07461, appendix) and the box loss of a cascade step.

Dimensions: N regions, C classes, K looked-at classes, D embedding. Labels: [0, C) a class, C background, -1 padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from proxydet.modeling.geometry import Weights, deltas_between


def choose_categories(
    labels_N: Tensor,
    frequency_C: Tensor,
    *,
    sampled: int,
    objects: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Choose the classes that a step's loss looks at: those that appear, and others drawn by frequency.

    The background counts as one of the sampled classes where it appears, but is never looked at. The draw without
    replacement is a race of exponential clocks (Efraimidis and Spirakis 2006), so that it needs no answer from the
    device: the columns always number ``max(sampled, objects + 1)``, and those that are one too many weigh 0.

    Args:
        labels_N: Labels of the step's regions.
        frequency_C: Weights of the draw, not negative.
        sampled: Classes to look at, the background included; 0 looks at all.
        objects: Objects of the batch: an upper bound of the classes that appear, background aside.
        generator: Source of randomness; None is torch's global one.

    Returns:
        Columns int64 (K,) in [0, C), and their weight (K,), 0 or 1.
    """
    classes = len(frequency_C)
    columns = torch.arange(classes, device=labels_N.device)
    if sampled == 0:
        return columns, torch.ones_like(frequency_C)
    appears = torch.zeros(classes + 2, dtype=torch.bool, device=labels_N.device)
    appears[labels_N] = True  # -1 is the last entry, the background the one before it
    device = labels_N.device if generator is None else generator.device
    clocks_C = torch.empty(classes, device=device).exponential_(generator=generator)
    speed_C = frequency_C / clocks_C.to(labels_N.device, non_blocking=True)
    priority_C = torch.where(appears[:classes], torch.inf, speed_C)
    wanted = min(max(sampled, objects + 1), classes)
    top_K, columns_K = priority_C.topk(wanted)
    room = sampled - appears[classes].long()
    place_K = torch.arange(wanted, device=labels_N.device)
    weights_K = appears[columns_K] | ((place_K < room) & (top_K > 0))
    return columns_K, weights_K.to(frequency_C.dtype)


def federated_loss(
    logits_NK: Tensor, labels_N: Tensor, columns_K: Tensor, weights_K: Tensor
) -> Tensor:
    """Return sigmoid cross-entropy summed over the looked-at classes, divided by the number of regions.

    Args:
        logits_NK: Logits of the looked-at classes only.
        labels_N: Labels.
        columns_K: The class of each column.
        weights_K: Weight of each column.
    """
    valid_N = labels_N >= 0
    targets_NK = (labels_N[:, None] == columns_K).to(logits_NK.dtype)
    losses_NK = functional.binary_cross_entropy_with_logits(logits_NK, targets_NK, reduction="none")
    weighted_NK = losses_NK * weights_K * valid_N[:, None]
    return weighted_NK.sum() / valid_N.sum().clamp(min=1)


def box_loss(
    deltas_N4: Tensor,
    boxes_N4: Tensor,
    targets_N4: Tensor,
    labels_N: Tensor,
    *,
    classes: int,
    delta_weights: Weights,
) -> Tensor:
    """Return the L1 loss of the box changes of regions that stand for an object, divided by the number of regions.

    Args:
        deltas_N4: Predicted changes.
        boxes_N4: The regions.
        targets_N4: The box of each region's object.
        labels_N: Labels.
        classes: C.
        delta_weights: Scale of the changes.
    """
    valid_N = labels_N >= 0
    positive_N1 = (valid_N & (labels_N < classes))[:, None]
    # Other rows may have empty boxes, whose changes are not finite: they are replaced before, not masked after.
    unit_4 = boxes_N4.new_tensor([0.0, 0.0, 1.0, 1.0])
    wanted_N4 = deltas_between(
        torch.where(positive_N1, boxes_N4, unit_4),
        torch.where(positive_N1, targets_N4, unit_4),
        delta_weights,
    )
    differences_N4 = (deltas_N4 - wanted_N4).abs() * positive_N1
    return differences_N4.sum() / valid_N.sum().clamp(min=1)
