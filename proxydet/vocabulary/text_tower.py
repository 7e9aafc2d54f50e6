"""CLIP's text tower, built from open_clip's transformer without the image half."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.errors import CheckpointError, VocabularyError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def tower_settings(model: str) -> dict[str, Any]:
    """Look up what a model's text tower is built of.

    Args:
        model: open_clip's name of the model.

    Returns:
        The arguments of open_clip's ``TextTransformer``, ``quick_gelu``, and ``cut``: whether its context can be cut to the
        length of the texts.

    Raises:
        VocabularyError: open_clip has no such model, or its text tower is of another kind.
    """
    import open_clip
    from open_clip.transformer import TextTransformer

    config = open_clip.get_model_config(model)
    if config is None:
        raise VocabularyError(
            f"open_clip has no model {model!r}",
            hint="see open_clip.list_models(); OpenAI's weights need ...-quickgelu",
        )
    text = {key: value for key, value in config["text_cfg"].items() if value is not None}
    accepted = set(inspect.signature(TextTransformer.__init__).parameters)
    foreign = sorted(set(text) - accepted)
    if foreign:
        raise VocabularyError(
            f"the text tower of {model!r} is not one that can be used here (it needs {', '.join(foreign)})",
            hint="encode the names with open_clip yourself and give the embeddings as a .npy file",
        )
    causal = text.get("pool_type", "argmax") == "argmax" and not text.get("no_causal_mask")
    return {
        "context_length": 77,
        **text,
        "output_dim": config["embed_dim"],
        "quick_gelu": bool(config.get("quick_gelu")),
        # Behind the end token nothing is read, so padding can be left out.
        "cut": causal and not text.get("embed_cls"),
    }


def load_tower(settings: dict[str, Any], weights: Path, model: str) -> torch.nn.Module:
    """Build a text tower with its weights.

    Args:
        settings: What `tower_settings` gave.
        weights: CLIP checkpoint.
        model: The model's name, for messages.

    Raises:
        CheckpointError: The weights cannot be read, or are not those of the model.
    """
    import torch
    from open_clip.transformer import QuickGELU, TextTransformer

    from proxydet.vocabulary.clip_weights import read_text_tower

    arguments = {k: v for k, v in settings.items() if k not in ("quick_gelu", "cut")}
    with torch.device("meta"):
        tower = TextTransformer(
            **arguments, act_layer=QuickGELU if settings["quick_gelu"] else torch.nn.GELU
        )
    given = read_text_tower(weights)
    expected = tower.state_dict()
    wrong = sorted(
        {name for name in expected if name not in given}
        | {name for name in given if name not in expected}
        | {name for name in given if name in expected and given[name].shape != expected[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"{weights} does not fit the text tower of {model}: {len(wrong)} tensors differ in name or shape, "
            f"the first: {', '.join(wrong[:3])}",
            hint="name the open_clip model that the weights belong to",
            path=weights,
        )
    tower.load_state_dict(given, assign=True)
    if tower.attn_mask is not None:
        # Not in checkpoints, and made on the meta device above.
        tower.attn_mask = causal_mask(tower.num_pos)
    logger.info("loaded the text tower of %s from %s", model, weights)
    ready: torch.nn.Module = tower.eval()
    return ready


def causal_mask(length: int) -> torch.Tensor:
    """Return what is added to attention so that no token sees a later one: (length, length), 0 or minus infinity."""
    import torch

    return torch.full((length, length), float("-inf")).triu_(1)
