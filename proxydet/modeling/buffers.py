"""What the training vocabulary puts into the network's buffers.

Dimensions: C classes, D embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from proxydet.errors import ConfigError
from proxydet.modeling.config import ModelConfig
from proxydet.vocabulary.vocabulary import Vocabulary


def text_with_background(vocabulary: Vocabulary) -> Tensor:
    """Return normalised text embeddings, a column each, and a zero column for the background last: (D, C + 1)."""
    text_DC = torch.tensor(vocabulary.normalised()).T
    return torch.cat([text_DC, text_DC.new_zeros(len(text_DC), 1)], dim=1).contiguous()


def draw_weights(
    config: ModelConfig,
    vocabulary: Vocabulary,
    image_counts: np.ndarray[tuple[int], np.dtype[np.generic]] | None,
) -> Tensor:
    """Return each class's weight in the federated draw: (C,), the image counts to the configured power.

    Args:
        config: Holds the power.
        vocabulary: The classes.
        image_counts: (C,) training images of each class; None weighs all alike.

    Raises:
        ConfigError: The counts do not fit the vocabulary, or one is negative.
    """
    if image_counts is None:
        return torch.ones(len(vocabulary))
    counts_C = torch.as_tensor(np.asarray(image_counts), dtype=torch.float32)
    if counts_C.shape != (len(vocabulary),) or not bool((counts_C >= 0).all()):
        raise ConfigError(
            f"image counts of shape {tuple(counts_C.shape)} do not fit {len(vocabulary)} classes",
            hint="give one count, 0 or more, for each class of the training vocabulary",
        )
    return counts_C**config.classifier.frequency_power
