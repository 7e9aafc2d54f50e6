"""The full-size detectors with the weights and inputs that the parity fixtures were recorded with.

The weights are made from the parameters' names, so that no file of weights is needed: every parameter has its own random
stream, seeded by its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks

from proxydet.data.loader import BoxBatch, ImageLabelBatch
from proxydet.losses.config import ClassificationLossConfig, LossConfig, MixupLossConfig
from proxydet.modeling.config import (
    BackboneConfig,
    CascadeConfig,
    ModelConfig,
    ProposalConfig,
    SwinConfig,
)
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.vocabulary.vocabulary import Vocabulary

Kind = Literal["r50", "swinb"]
Fixture = Mapping[str, np.ndarray]

SEED = 11  # of fixtures that do not hold theirs
CLASSES = 1203
DIMENSIONS = 512
TRIMMED = Path(__file__).resolve().parents[1] / "fixtures" / "parity"
# Buffers that follow from the sizes alone.
_DERIVED = ("num_batches_tracked", "relative_position_index")

# Without randomness: few enough proposals that all are used, only the classes that appear, no mixing, no dropped paths.
LOSSES = LossConfig(
    classification=ClassificationLossConfig(sampled_categories=1), mixup=MixupLossConfig(beta=0.0)
)


def seed_of(fixture: Fixture) -> int:
    """Return the seed of the weights that a fixture was recorded with."""
    return int(fixture.get("seed", SEED))


def network_of(kind: Kind, base_C: np.ndarray, seed: int = SEED) -> ProxyDetNetwork:
    """Build a full-size network with the fixtures' weights and their training settings.

    Args:
        kind: Which backbone.
        base_C: bool (1203,), the LVIS classes that are base.
        seed: Of the weights, as `seed_of` returns it.
    """
    backbone = BackboneConfig(
        kind="swin" if kind == "swinb" else "resnet", swin=SwinConfig(drop_path=0.0)
    )
    config = ModelConfig(
        backbone=backbone,
        proposals=ProposalConfig(keep_train=100),
        cascade=CascadeConfig(positive_fraction=1.0),
    )
    names = [f"class {index}" for index in range(CLASSES)]
    # The embeddings are overwritten by the fixtures' weights; only their shape and the base mask count here.
    vocabulary = Vocabulary.from_arrays(names, np.ones((CLASSES, DIMENSIONS)), base_C)
    network = ProxyDetNetwork(config, vocabulary)
    network.load_state_dict(weights_from_names(network.state_dict(), seed))
    return network


def weights_from_names(
    state_dict: Mapping[str, torch.Tensor], seed: int = SEED
) -> dict[str, torch.Tensor]:
    """Return a value for every parameter that depends on its name, its shape and the seed only."""
    weights = {}
    for name, current in state_dict.items():
        leaf = name.rpartition(".")[2]
        if leaf in _DERIVED:
            weights[name] = current
            continue
        # All predictors hold the same classifier and the same frequencies.
        source = leaf if leaf in ("zs_weight", "freq_weight") else name
        values = _values(source, leaf, tuple(current.shape), seed)
        weights[name] = torch.from_numpy(np.ascontiguousarray(values)).to(current.dtype)
    return weights


def _values(name: str, leaf: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    normal = stream.standard_normal(int(np.prod(shape, dtype=np.int64))).astype(np.float32)
    normal = normal.reshape(shape)
    if leaf == "zs_weight":
        normal[:, -1] = 0.0
        return normal / np.maximum(np.linalg.norm(normal, axis=0, keepdims=True), 1e-12)
    special = {
        "running_mean": lambda: 0.1 * normal,
        "running_var": lambda: 1.0 + 0.2 * np.abs(normal),
        "freq_weight": lambda: 1.0 + 10.0 * np.abs(normal),
        "scale": lambda: 1.0 + 0.1 * normal,
        "relative_position_bias_table": lambda: 0.5 * normal,
        "bias": lambda: _bias(name, normal),
    }
    if leaf in special:
        return special[leaf]()
    if len(shape) == 1:
        return (0.3 if name.endswith("bn3.weight") else 1.0) + 0.05 * normal
    fan_in = int(np.prod(shape[1:]))
    return (_gain(name) / fan_in**0.5) * normal


def _bias(name: str, normal: np.ndarray) -> np.ndarray:
    if name.endswith("centernet_head.agn_hm.bias"):
        return -2.0 + 0.0 * normal
    if name.endswith("centernet_head.bbox_pred.bias"):
        return 3.0 + 0.1 * normal
    return 0.05 * normal


def _gain(name: str) -> float:
    if name.endswith("centernet_head.bbox_pred.weight"):
        return 1.0
    if "bbox_pred.2.weight" in name:
        return 0.05
    if "backbone.bottom_up.layers" in name or "patch_embed" in name:
        return 0.7
    return 2**0.5


def images_of(fixture: Fixture) -> list[torch.Tensor]:
    """Return the two images: uint8 (3, H, W), RGB."""
    return [torch.from_numpy(fixture[f"image{index}"]).permute(2, 0, 1) for index in range(2)]


def batches_of(fixture: Fixture) -> tuple[BoxBatch, ImageLabelBatch]:
    """Return the two training batches of the same two images."""
    images = tuple(images_of(fixture))
    instances = []
    for index, image in enumerate(images):
        boxes = fixture[f"train{index}.gt_boxes"]
        objects = Instances(tuple(image.shape[1:]))
        objects.gt_boxes = Boxes(torch.from_numpy(boxes))
        objects.gt_classes = torch.from_numpy(fixture[f"train{index}.gt_classes"])
        objects.gt_masks = PolygonMasks([[_diamond(box)] for box in boxes.astype(np.float64)])
        instances.append(objects)
    labels = tuple(objects.gt_classes[:1] for objects in instances)
    return (
        BoxBatch(images=images, instances=tuple(instances), image_ids=(0, 1)),
        ImageLabelBatch(images=images, labels=labels, image_ids=(0, 1)),
    )


def _diamond(box: np.ndarray) -> np.ndarray:
    left, top, right, bottom = box
    across, down = (left + right) / 2, (top + bottom) / 2
    return np.array([across, top, right, down, across, bottom, left, down])
