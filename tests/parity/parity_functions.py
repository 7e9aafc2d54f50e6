"""Compares single functions with the recorded numbers.

Of the losses: class-wise mixup, CenterNet targets and losses, federated loss. Of training: learning rates, repeat factors
and weights of the sampler, resize and crop.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from parity_groups import LOSS_TOLERANCE, TENSOR_TOLERANCE, Row
from parity_model import Fixture
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from proxydet.data.images import scaled_crop
from proxydet.data.loader import image_weights, repeat_factors
from proxydet.losses.config import CenterNetLossConfig, MixupLossConfig
from proxydet.losses.criterion import class_prototypes, federated_loss, mixup_loss
from proxydet.modeling.centernet import (
    Cells,
    CenterNetTargets,
    centernet_targets,
    losses_from_targets,
)
from proxydet.modeling.roi_heads import MixupOutput
from proxydet.training.config import ScheduleConfig
from proxydet.training.step import learning_rate_factor

_MIXUP_VARIANTS = {
    "obj_score.t1.0.l1": MixupLossConfig(),
    "obj_score.t0.1.l1": MixupLossConfig(temperature=0.1),
    "center.t1.0.l1": MixupLossConfig(prototype="center"),
    "obj_score.t1.0.l2": MixupLossConfig(distance="l2"),
}
_STRIDES = (8, 16, 32, 64, 128)
_REPEAT_THRESHOLD = 0.1  # of the recorded sampler


def compare_functions(fixture: Fixture) -> Iterator[Row]:
    """Compare every function that the losses are made of."""
    for name, config in _MIXUP_VARIANTS.items():
        yield from _compare_mixup(f"mixup.{name}", config, fixture)
    yield from _compare_centernet(fixture)
    labels, sampled = _tensor(fixture, "fed.gt_classes"), _tensor(fixture, "fed.sampled_classes")
    logits = _tensor(fixture, "fed.logits")
    columns = sampled[sampled < logits.shape[1] - 1]  # the background is drawn, but not looked at
    ones = torch.ones(len(columns))
    loss = federated_loss(logits[:, columns], labels, columns, ones)
    yield _relative("federated loss", float(loss), float(fixture["fed.loss"]))


def compare_training_functions(fixture: Fixture) -> Iterator[Row]:
    """Compare what decides which images are seen, how, and at which learning rate."""
    for name, iterations, base in (("r50", 90_000, 2e-4), ("swinb", 180_000, 1e-4)):
        steps, recorded = fixture[f"schedule.{name}.iterations"], fixture[f"schedule.{name}.lr"]
        rates = [base * learning_rate_factor(int(i), iterations, ScheduleConfig()) for i in steps]
        yield _largest(f"schedule, {name} (10 iterations)", np.array(rates), recorded, 1e-9)
    categories = fixture["sampler.categories"].tolist()
    box, image = _repeat_factors(categories[:40]), _repeat_factors(categories[40:])
    weights = np.concatenate(image_weights([box, np.ones(100)], [1, 4]))
    for name, own in (
        ("repeat_factors_box", box),
        ("repeat_factors_image", image),
        ("weights", weights),
    ):
        yield _largest(f"sampler, {name}", own, fixture[f"sampler.{name}"], 1e-6)
    yield from _compare_resize_crop(fixture)


def _repeat_factors(categories: list[str]) -> np.ndarray:
    labels = [[int(category) for category in text.split(",")] for text in categories]
    images = np.repeat(np.arange(len(labels)), [len(own) for own in labels])
    flat = np.array([category for own in labels for category in own])
    return repeat_factors(images, flat, image_count=len(labels), threshold=_REPEAT_THRESHOLD)


def _compare_resize_crop(fixture: Fixture) -> Iterator[Row]:
    columns = fixture["resize_crop.columns"].tolist()
    wrong, factors = 0, []
    for values in fixture["resize_crop.rows"].tolist():
        row = dict(zip(columns, values, strict=True))
        view = scaled_crop(
            int(row["height"]),
            int(row["width"]),
            size=int(row["size"]),
            scale_factor=row["scale_factor"],
            crop_y=row["u_y"],
            crop_x=row["u_x"],
        )
        size, offset = (row["scaled_h"], row["scaled_w"]), (row["offset_y"], row["offset_x"])
        wrong += view.scaled != size or view.offset != offset
        factors.append((view.factor_xy[0], row["img_scale"]))
    yield Row("resize and crop, sizes and offsets", float(wrong), 0.0, "views that differ")
    own, recorded = np.array(factors).T
    yield _largest("resize and crop, scale", own, recorded, 1e-12)


def _largest(name: str, own: np.ndarray, recorded: np.ndarray, tolerance: float) -> Row:
    difference = np.abs(own - recorded) / np.abs(recorded)
    return Row(name, float(difference.max()), tolerance, "relative")


def _compare_mixup(name: str, config: MixupLossConfig, fixture: Fixture) -> Iterator[Row]:
    labels = _tensor(fixture, "mixup.gt_classes")
    embeddings = _tensor(fixture, "mixup.region_embeddings").requires_grad_()
    # Label 40 is the background among these 41 texts.
    objects = labels < len(fixture["mixup.text_embeddings"]) - 1
    output = MixupOutput(
        embeddings_PD=embeddings[objects],
        labels_P=labels[objects],
        classes_K=labels[objects].unique(),
        objectness_P=_tensor(fixture, "mixup.objectness")[objects],
    )
    prototypes, classes = class_prototypes(output, config)
    texts = normalize(_tensor(fixture, "mixup.text_embeddings"), dim=1)[classes]
    permutation = _tensor(fixture, "mixup.permutation")
    ratio = float(fixture["mixup.lambda"])
    loss = mixup_loss(prototypes, texts, permutation, ratio, config.distance)
    loss.backward()
    assert embeddings.grad is not None
    recorded = fixture[f"{name}.grad"]
    difference = np.abs(embeddings.grad.numpy() - recorded).max() / recorded.std()
    yield _relative(f"{name} loss", float(loss.detach()), float(fixture[f"{name}.loss"]))
    yield Row(f"{name} gradient", float(difference), TENSOR_TOLERANCE, "of the spread")


def _compare_centernet(fixture: Fixture) -> Iterator[Row]:
    config = CenterNetLossConfig()
    shapes = tuple((int(height), int(width)) for height, width in fixture["centernet.level_shapes"])
    cells = Cells.of_levels(shapes, _STRIDES, config.size_ranges, torch.device("cpu"))
    truth = [_tensor(fixture, f"centernet.gt_boxes{image}") for image in range(2)]
    valid_BG = pad_sequence([torch.ones(len(boxes), dtype=torch.bool) for boxes in truth], True)
    targets = centernet_targets(pad_sequence(truth, True), valid_BG, cells, config)
    counts = [height * width for height, width in shapes]
    heatmap = _by_level(targets.heatmap_BM, counts)
    learnt = _by_level(targets.learnt_BM, counts)
    distances = _by_level(targets.distances_BM4, counts)[learnt]
    exact = "absolute"
    recorded = _tensor(fixture, "centernet.heatmap")[:, 0]
    yield Row("centernet heatmap", float((heatmap - recorded).abs().max()), 1e-6, exact)
    wrong = (learnt != _tensor(fixture, "centernet.regression_valid")).sum()
    yield Row("centernet learnt cells", float(wrong), 0, "cells")
    gap = (distances - _tensor(fixture, "centernet.regression_targets")).abs().max()
    yield Row("centernet distances", float(gap), 1e-5, exact)
    ours = sorted(_positive_places(targets, cells, counts))
    same = ours == sorted(fixture["centernet.positive_indices"].tolist())
    yield Row("centernet positive cells", float(not same), 0, "lists that differ")
    losses = losses_from_targets(
        _by_image(_tensor(fixture, "centernet.pred_agn_hm"), counts),
        _by_image(_tensor(fixture, "centernet.pred_reg"), counts),
        targets,
        config,
    )
    for name, loss in losses.items():
        yield _relative(f"centernet {name}", float(loss), float(fixture[f"centernet.loss.{name}"]))


def _positive_places(targets: CenterNetTargets, cells: Cells, counts: list[int]) -> list[int]:
    """Return the positive cells counted as the recording does: level by level, in each the images one by one."""
    places = []
    images = len(targets.centres_BGL)
    for image in range(images):
        for level, start in enumerate(cells.table_6L[3].long().tolist()):
            positive_G = targets.positive_BGL[image, :, level]
            chosen = targets.centres_BGL[image, :, level][positive_G] - start
            places += (chosen + images * start + image * counts[level]).tolist()
    return places


def _by_level(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([level.flatten(0, 1) for level in values.split(counts, dim=1)])


def _by_image(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = values.split([count for count in counts for _ in range(2)])
    return torch.stack([torch.cat(parts[image::2]) for image in range(2)])


def _tensor(fixture: Fixture, name: str) -> torch.Tensor:
    return torch.from_numpy(fixture[name])


def _relative(group: str, ours: float, recorded: float) -> Row:
    return Row(group, abs(ours - recorded) / abs(recorded), LOSS_TOLERANCE, "relative")
