"""The text tower's weights in a CLIP checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from proxydet.errors import CheckpointError
from proxydet.weight_files import read_state_dict

_TOP_LEVEL = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
    "cls_emb",
)


def read_text_tower(path: Path) -> dict[str, torch.Tensor]:
    """Read the text tower of a CLIP checkpoint; its other tensors are left in the file.

    Args:
        path: A TorchScript archive as OpenAI published them, a state dict of ``torch.save``, or a safetensors file.

    Returns:
        Tensors by the names that open_clip's ``TextTransformer`` gives them, float32 where they are numbers.

    Raises:
        CheckpointError: The file cannot be read, or holds no text tower.
    """
    tensors = read_state_dict(path, parts=(*_TOP_LEVEL, "text."))
    # Below ``text.`` in newer checkpoints, at the top in CLIP's.
    nested = {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}
    # The causal mask is computed, not learnt.
    tower = {n: t for n, t in (nested or tensors).items() if n.startswith(_TOP_LEVEL)}
    if "token_embedding.weight" not in tower:
        raise CheckpointError(
            f"{path} holds no CLIP text tower",
            hint="give a CLIP checkpoint of OpenAI or open_clip, or run: proxydet download clip-vit-b32",
            path=path,
        )
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tower.items()
    }
