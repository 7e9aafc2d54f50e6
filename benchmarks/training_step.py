"""Splits the time of an R50 training step into parts, and sets each change beside its straightforward variant.

::

    python benchmarks/training_step.py boxes|labels [--settings parity|published] [--rounds 5] [--data DESCRIPTION.toml]
        [--clock wall|cpu] [--threads 2] [--json FILE]

``boxes``: 2 images of 416x416 with 7 objects each. ``labels``: 8 images of 208x208 with one class each. Weights are random. Settings
``parity`` are those of the recorded numbers (100 proposals an image, all of them used), ``published`` those of the recipe
(2,000 proposals, 512 drawn). Every round runs our step and then each variant on the same batch with the same random
numbers, so that a busy machine slows all of them; ratios are medians over the rounds of variant / ours. The total loss
of every variant is printed: they are to be equal. ``data`` is one worker's time for such a batch from JPEG files of
``--data``; it is spent beside the step, not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import parity_path  # noqa: F401
import torch
from model_speed import CLOCKS, Stopwatch, Times, box_batch, label_batch
from parity_model import CLASSES, DIMENSIONS, TRIMMED, network_of, weights_from_names
from parity_trim import base_classes
from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align

from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.loader import Batch, TrainingLoader, TrainingSources
from proxydet.losses import criterion as criterion_module
from proxydet.losses.config import LossConfig, MixupLossConfig
from proxydet.losses.criterion import Criterion, image_label_loss
from proxydet.modeling import network as network_module
from proxydet.modeling import roi_heads
from proxydet.modeling import roi_heads as pooling
from proxydet.modeling.boxes import clip
from proxydet.modeling.config import ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.roi_heads import ImageStepOutput, MixupOutput
from proxydet.runtime.roi_align import RegionGrid
from proxydet.training.config import OptimizerConfig
from proxydet.training.step import build_optimizer, clip_gradients
from proxydet.vocabulary.vocabulary import Vocabulary

Patches = list[tuple[Any, str, Callable[..., Any]]]


# -- straightforward variants ----------------------------------------------------------------------------------------


def pool_by_torchvision(
    features: Sequence[Tensor], rois_N5: Tensor, level_N: Tensor, grid: RegionGrid
) -> Tensor:
    """Pool regions by torchvision's CPU kernel, level after level."""
    pooled = rois_N5.new_zeros(len(rois_N5), features[0].shape[1], grid.side, grid.side)
    size, ratio = (grid.side, grid.side), grid.sampling_ratio
    for level, (maps, scale) in enumerate(zip(features, grid.scales, strict=True)):
        rows = (level_N == level).nonzero()[:, 0]
        own = roi_align(maps, rois_N5[rows], size, scale, ratio, aligned=True)
        pooled.index_put_((rows,), own)
    return pooled


def whole_mixup_step(
    heads: Any, scene: Any, regions: Any, truth: Any, classes: int, pooled_NCSS: Tensor
) -> MixupOutput:
    """Run the mixup branch as the detection branch runs: pool, embed, classify and refine every region at every step."""
    del pooled_NCSS
    branch, config = heads.mixup, heads.config
    for step in range(len(branch)):
        pooled = heads.pool(scene, regions)
        features_NF = branch.features(step, roi_heads.scale_gradient(pooled, 1.0 / config.steps))
        classifier = branch.classifier(step)
        embeddings_ND = classifier(features_NF)
        classifier.logits(embeddings_ND, classifier.zs_weight)
        deltas_BR4 = branch.deltas(step, features_NF).unflatten(0, regions.valid_BR.shape)
        seen = regions
        regions = heads.refine(scene, deltas_BR4, regions, step)
    labels_BR = roi_heads.match(seen, truth, config.iou_thresholds[-1], classes).labels_BR
    chosen = roi_heads._foreground_indices(labels_BR, classes)
    return MixupOutput(
        embeddings_PD=embeddings_ND[chosen],
        labels_P=labels_BR.flatten()[chosen],
        classes_K=labels_BR.flatten()[chosen].unique(),
        objectness_P=seen.objectness_BR.flatten()[chosen],
    )


def all_columns(labels_N: Tensor, frequency_C: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Weigh every class, most of them by 0, instead of choosing columns."""
    columns_K, weights_K = CHOOSE(labels_N, frequency_C, **how)
    weights_C = torch.zeros_like(frequency_C).index_put_((columns_K,), weights_K)
    return torch.arange(len(frequency_C)), weights_C


CHOOSE = criterion_module.choose_categories


def prototypes_by_loop(output: MixupOutput, config: MixupLossConfig) -> tuple[Tensor, Tensor]:
    """Make the prototypes class by class, in a loop."""
    classes_K = output.labels_P.unique()
    rows = []
    for label in classes_K.tolist():
        own = output.labels_P == label
        weights = torch.softmax(output.objectness_P[own] / config.temperature, dim=0)
        rows.append(functional.normalize(weights @ output.embeddings_PD[own], dim=0))
    return torch.stack(rows), classes_K


def whole_label_steps(heads: Any, scene: Any, regions: Any) -> tuple[Any, ...]:
    """Run an image-label batch as a box batch runs: every region with gradient, with the logits of every class."""
    boxes_BR4 = clip(regions.boxes_BR4, scene.sizes_B2[:, None])
    regions = regions.with_boxes(boxes_BR4, regions.valid_BR)
    branch, outputs = heads.detection, []
    images = torch.arange(len(boxes_BR4))
    for step in range(len(branch)):
        pooled = heads.pool(scene, regions)
        features_NF = branch.features(
            step, roi_heads.scale_gradient(pooled, 1.0 / heads.config.steps)
        )
        classifier = branch.classifier(step)
        embeddings_BRD = classifier(features_NF).unflatten(0, regions.valid_BR.shape)
        logits_BRC = classifier.logits(embeddings_BRD, classifier.zs_weight)
        largest_B4, valid_B = roi_heads.largest_but_last(regions)
        which_B = (regions.boxes_BR4 == largest_B4[:, None]).all(dim=2).long().argmax(dim=1)
        outputs.append((logits_BRC[images, which_B], embeddings_BRD[images, which_B], valid_B))
        deltas_N4 = branch.deltas(step, features_NF)
        regions = heads.refine(scene, deltas_N4.unflatten(0, regions.valid_BR.shape), regions, step)
    return tuple(
        _LogitsOutput(embeddings_BD=embeddings, valid_B=valid, bias=None, logits_BC=logits)
        for logits, embeddings, valid in outputs
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LogitsOutput(ImageStepOutput):
    logits_BC: Tensor


def label_loss_of_logits(
    step: Any, targets_BC: Tensor, text_DC: Tensor, temperature: float
) -> Tensor:
    """Take the loss of logits that are already there."""
    if not isinstance(step, _LogitsOutput):
        return image_label_loss(step, targets_BC, text_DC, temperature)
    losses_BC = functional.binary_cross_entropy_with_logits(
        step.logits_BC, targets_BC, reduction="none"
    )
    return (losses_BC * step.valid_B[:, None]).sum() / len(targets_BC)


VARIANTS: dict[str, dict[str, Patches]] = {
    "boxes": {
        "ours": [],
        "torchvision's RoIAlign": [(pooling, "align_regions", pool_by_torchvision)],
        "whole mixup branch": [(roi_heads, "_mixup_step", whole_mixup_step)],
        "all classes in the federated loss": [(criterion_module, "choose_categories", all_columns)],
        "prototypes in a loop": [(criterion_module, "class_prototypes", prototypes_by_loop)],
    },
    "labels": {
        "ours": [],
        "torchvision's RoIAlign": [(pooling, "align_regions", pool_by_torchvision)],
        "every region with gradient": [
            (network_module, "image_label_steps", whole_label_steps),
            (criterion_module, "image_label_loss", label_loss_of_logits),
        ],
    },
}
for _patches in VARIANTS.values():
    _patches["all of these"] = [patch for patches in _patches.values() for patch in patches]


# -- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    """Put other functions in place."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def build(settings: str) -> ProxyDetNetwork:
    """Build R50 with weights made from names."""
    base_C = base_classes(TRIMMED)
    if settings == "parity":
        return network_of("r50", base_C).train()
    names = [f"class {index}" for index in range(CLASSES)]
    vocabulary = Vocabulary.from_arrays(names, np.ones((CLASSES, DIMENSIONS)), base_C)
    network = ProxyDetNetwork(ModelConfig(), vocabulary)
    network.load_state_dict(weights_from_names(network.state_dict()))
    return network.train()


class Step:
    """A training step whose parts are watched.

    Args:
        network: The network.
        batch: What it is trained on, always the same.
        clock: Tells the time.
    """

    def __init__(self, network: ProxyDetNetwork, batch: Batch, clock: Callable[[], float]) -> None:
        self.network, self.batch = network, batch
        self.stopwatch = Stopwatch(clock)
        self.criterion = Criterion(LossConfig())
        # A rate so small that all rounds see the same weights.
        self.optimizer = build_optimizer(network.parameters(), OptimizerConfig(learning_rate=1e-12))
        watch = self.stopwatch.watch
        watch(network, "_features", "backbone")
        watch(network.proposal_generator, "forward", "proposals")
        watch(network.proposal_generator, "propose", "proposals")

    def __call__(self, patches: Patches) -> tuple[Times, float]:
        """Take a step with other functions in place; return the time of its parts and the total loss."""
        stopwatch, source = self.stopwatch, torch.Generator().manual_seed(0)
        stopwatch.times.clear()
        with patched([*patches, *_watched(stopwatch, patches)]), stopwatch.part("all"):
            with stopwatch.part("forward"):
                output = self.network(self.batch, generator=source)
                with stopwatch.part("losses"):
                    losses = self.criterion(output, generator=source)
                total = torch.stack(list(losses.values())).sum()
            with stopwatch.part("backward"):
                total.backward()
            with stopwatch.part("clipping and optimiser"):
                clip_gradients(self.network.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        times = dict(stopwatch.times)
        if "mixup branch" in times:
            times["cascade"] -= times["mixup branch"]
        return times, total.item()


def _watched(stopwatch: Stopwatch, patches: Patches) -> Patches:
    """Return the functions of the second stage, or what a variant puts in their place, with the time taken."""
    chosen = {(owner.__name__, name): function for owner, name, function in patches}
    # Each is replaced where it is looked up.
    named = {
        (network_module, "box_steps"): "cascade",
        (network_module, "image_label_steps"): "cascade",
        (network_module, "masked_regions"): "masks",
        (network_module, "mask_step"): "masks",
        (roi_heads, "_mixup_step"): "mixup branch",
    }

    def timed(owner: Any, name: str, part: str) -> Callable[..., Any]:
        inner = chosen.get((owner.__name__, name), getattr(owner, name))

        def run(*args: Any, **kwargs: Any) -> Any:
            with stopwatch.part(part):
                return inner(*args, **kwargs)

        return run

    return [(owner, name, timed(owner, name, part)) for (owner, name), part in named.items()]


def measure(what: str, settings: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Run all variants of a batch, round by round."""
    step = Step(build(settings), box_batch() if what == "boxes" else label_batch(), clock)
    times: dict[str, list[Times]] = {name: [] for name in VARIANTS[what]}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, patches in VARIANTS[what].items():
            found, losses[name] = step(patches)
            if number > 0:
                times[name].append(found)
    ours = times["ours"]
    result: dict[str, Any] = {
        "parts": {part: statistics.median(t[part] for t in ours) for part in ours[0]}
    }
    result["variants"] = {
        name: {
            "loss": losses[name],
            **{
                part: statistics.median(t[part] for t in found)
                for part in ("forward", "backward", "all")
            },
            "ratio": statistics.median(
                theirs["all"] / own["all"] for theirs, own in zip(found, ours, strict=True)
            ),
        }
        for name, found in times.items()
    }
    return result


def data_seconds(what: str, path: Path, rounds: int, clock: Callable[[], float]) -> float:
    """Seconds that one worker needs for a batch of this kind from the photographs of a description."""
    boxes = SourceConfig(batch_size=2, size=416, scale=(0.1, 2.0), ratio=1.0)
    labels = SourceConfig(batch_size=8, size=208, scale=(0.5, 1.5), ratio=1e6)
    config = DataConfig(boxes=boxes, image_labels=labels if what == "labels" else None, workers=0)
    description = DatasetConfig.from_toml(path)
    sources = TrainingSources(config, Dataset(config=description, cache=config.cache))
    batches = iter(TrainingLoader(sources, rank=0, world_size=1, seed=0))
    next(batches)
    seconds = []
    for _ in range(4 * rounds):
        start = clock()
        next(batches)
        seconds.append(clock() - start)
    return statistics.median(seconds)


def report(result: dict[str, Any]) -> str:
    """Lay the numbers out."""
    lines = [f"{part:36} {seconds:8.3f}" for part, seconds in result["parts"].items()]
    lines += ["", f"{'':36} {'forward':>8} {'backward':>8} {'all':>8} {'ratio':>6}   loss"]
    lines += [
        f"{name:36} {row['forward']:8.3f} {row['backward']:8.3f} {row['all']:8.3f} {row['ratio']:6.2f}"
        f"   {row['loss']:.6g}"
        for name, row in result["variants"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=tuple(VARIANTS))
    parser.add_argument("--settings", choices=("parity", "published"), default="parity")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock, start = CLOCKS[options.clock], time.strftime("%Y-%m-%d %H:%M")
    result = measure(options.what, options.settings, options.rounds, clock)
    if options.data is not None:
        seconds = data_seconds(options.what, options.data, options.rounds, clock)
        result["parts"] = {"data (in a worker)": seconds, **result["parts"]}
    print(f"{start}  {options.what}, {options.settings} settings, {options.clock} seconds")
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(vars(options) | result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
