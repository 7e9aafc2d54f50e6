"""The loss of images of which only the classes are known (Detic, arXiv 2201.02605: the largest region stands for the image).

Dimensions: B images, C classes, L labels of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from proxydet.modeling.outputs import ImageStepOutput


def image_label_targets(labels: tuple[Tensor, ...], columns: int) -> Tensor:
    """Return 1 at the classes of each image and 0 elsewhere: (B, columns).

    Args:
        labels: Classes of each image, int64 (L,).
        columns: C, or C + 1 with a background column.
    """
    targets = torch.zeros(len(labels), columns, device=labels[0].device)
    images = [torch.full_like(classes_L, image) for image, classes_L in enumerate(labels)]
    targets[torch.cat(images), torch.cat(labels)] = 1.0
    return targets


def image_label_loss(
    step: ImageStepOutput, targets_BC: Tensor, text_DC: Tensor, temperature: float
) -> Tensor:
    """Return sigmoid cross-entropy summed over the classes, averaged over the images.

    Args:
        step: Embedding of the region that stands for each image.
        targets_BC: From `image_label_targets`.
        text_DC: Normalised text embeddings, a column each; with a zero column for the background where it counts.
        temperature: Factor from cosine to logit.
    """
    logits_BC = (temperature * step.embeddings_BD) @ text_DC
    if step.bias is not None:
        logits_BC = logits_BC + step.bias
    losses_BC = functional.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")
    return (losses_BC * step.valid_B[:, None]).sum() / len(targets_BC)
