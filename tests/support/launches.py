"""Counts kernel launches and waits of the host of R50's work on a pretended GPU, and prints where they come from.

::

    python tests/support/launches.py [WORK ...] [--lines 25]

WORK: one of those in `WORKS`; all by default. Depth, levels, steps and numbers of images are those of the recipe ``r50``;
widths and image sizes are small: what is launched does not depend on them. The recipe's reproducibility is ``published``: steps that
do not say so are in mode ``off``. Autocast and the loss scaler of the recipe's fp16 are left out.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import tiny_detector as tiny
import torch
from pretended_gpu import CUDA, PretendedGpu

from proxydet.data.loader import Batch, BoxBatch, ImageLabelBatch
from proxydet.losses.config import CenterNetLossConfig, LossConfig
from proxydet.losses.criterion import Criterion
from proxydet.modeling.config import (
    BackboneConfig,
    CascadeConfig,
    ClassifierConfig,
    InferenceConfig,
    MaskConfig,
    ModelConfig,
    ProposalConfig,
    PyramidConfig,
    ResNetConfig,
)
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import Prediction, mask_edges, rles
from proxydet.runtime.modes import Mode, reproducibility_mode
from proxydet.training.checkpoint import TrainingState
from proxydet.training.config import TrainingConfig
from proxydet.training.distributed import DistInfo
from proxydet.training.step import TrainingModel, build_optimizer, train_step

CLASSES = 1203


def r50() -> ProxyDetNetwork:
    """Return a network of R50's structure with few channels, which proposes and detects many boxes."""
    config = ModelConfig(
        backbone=BackboneConfig(resnet=ResNetConfig(width=4)),
        pyramid=PyramidConfig(channels=8),
        proposals=ProposalConfig(norm_groups=4, keep_train=100, keep_test=40),
        cascade=CascadeConfig(hidden=(16, 16), samples_per_image=16, image_label_proposals=16),
        classifier=ClassifierConfig(embedding_dim=tiny.DIMENSIONS),
        masks=MaskConfig(channels=8),
    )
    network = tiny.lively(tiny.network(config, classes=CLASSES))
    with torch.no_grad():
        for predictor in network.roi_heads.box_predictor:
            # So that objects stay objects from step to step.
            predictor.bbox_pred[2].weight.mul_(0.01)
    return network


# Objects of every pyramid level in small images.
LOSSES = LossConfig(
    centernet=CenterNetLossConfig(
        size_ranges=((0, 20), (16, 40), (32, 80), (64, 160), (90, float("inf")))
    )
)


def box_batch(images: int, classes: int = CLASSES) -> BoxBatch:
    """Return images of one size with an object of each level's size."""
    boxes = [[10.0, 10.0, 10.0 + side, 10.0 + side] for side in (14, 28, 56, 90, 140)]
    return BoxBatch(
        images=tuple(tiny.image(160, 160, seed) for seed in range(images)),
        instances=tuple(
            tiny.objects((160, 160), boxes, [(seed + 7 * row) % classes for row in range(5)])
            for seed in range(images)
        ),
        image_ids=tuple(range(images)),
    )


def label_batch(images: int, classes: int = CLASSES) -> ImageLabelBatch:
    """Return images of one size with one class each."""
    return ImageLabelBatch(
        images=tuple(tiny.image(64, 64, seed) for seed in range(images)),
        labels=tuple(torch.tensor([seed % classes]) for seed in range(images)),
        image_ids=tuple(range(images)),
    )


def training_step(batch: Batch, mode: Mode = "off") -> PretendedGpu:
    """Take an optimiser step on a batch; one on objects came before, as the first reaches each parameter for the first time."""
    with reproducibility_mode(mode), PretendedGpu() as gpu:
        state = _begun(mode)
        with gpu.counted():
            _step(state, batch)
    return gpu


@cache
def _begun(mode: Mode) -> TrainingState:
    network = PretendedGpu.moved(r50().train())
    state = TrainingState(
        network=network,
        model=TrainingModel(network, Criterion(LOSSES), device=CUDA),
        optimizer=build_optimizer(network.parameters(), TrainingConfig().optimizer),
        scaler=torch.amp.GradScaler("cuda", enabled=False),
        seed=3,
        replicas=1,
    )
    _step(state, box_batch(1))
    return state


def _step(state: TrainingState, batch: Batch) -> None:
    ranks = DistInfo(device=CUDA)
    train_step(
        state, [batch], config=TrainingConfig(), step=Fraction(1), ranks=ranks, failures=Path()
    )


def inference(*sizes: tuple[int, int]) -> PretendedGpu:
    """Detect objects in images of these sizes."""
    with PretendedGpu() as gpu:
        network = gpu.moved(r50().eval().prepared())
        images = [tiny.image(*size, seed) for seed, size in enumerate(sizes)]
        with gpu.counted():
            network.detect(images, settings=InferenceConfig(score_threshold=0.0))
    return gpu


def drawn_prediction(masks: int = 300, height: int = 480, width: int = 640) -> Prediction:
    """Return detections with rough discs as masks, in boxes of 12 to 400 pixels at random places."""
    draw = torch.Generator().manual_seed(0)
    edges = torch.tensor([width, height])
    middle = torch.rand(masks, 2, generator=draw) * edges
    half = torch.exp(torch.rand(masks, 2, generator=draw) * 3.5 + 2.5) / 2
    place = torch.linspace(-1, 1, 28)
    rough = 0.1 * torch.randn(masks, 28, 28, generator=draw)
    return Prediction(
        boxes_N4=torch.cat([(middle - half).clamp(min=0), (middle + half).minimum(edges)], dim=1),
        scores_N=torch.linspace(1, 0, masks),
        classes_N=torch.zeros(masks, dtype=torch.int64),
        mask_probs_MSS=torch.sigmoid(6 * (0.8 - torch.hypot(place[:, None], place) + rough)),
        mask_index_N=torch.arange(masks),
        image_size=(height, width),
    )


def pasting() -> PretendedGpu:
    """Paste 300 masks, and show that the rest of the encoding needs no device and gives what a CPU gives."""
    drawn = drawn_prediction()
    with PretendedGpu() as gpu:
        names = ("boxes_N4", "scores_N", "classes_N", "mask_probs_MSS", "mask_index_N")
        moved = replace(drawn, **{name: getattr(drawn, name).to(CUDA) for name in names})
        with gpu.counted():
            edges = mask_edges(moved)
        counts = gpu.launches.total(), gpu.waits.total()
        assert rles(drawn, edges) == rles(drawn)
        assert (gpu.launches.total(), gpu.waits.total()) == counts
    return gpu


WORKS: dict[str, Callable[[], PretendedGpu]] = {
    "box step, 8 images": lambda: training_step(box_batch(8)),
    "label step, 2 images": lambda: training_step(label_batch(2)),
    "label step, 32 images": lambda: training_step(label_batch(32)),
    "box step, 8 images, published": lambda: training_step(box_batch(8), "published"),
    "label step, 2 images, published": lambda: training_step(label_batch(2), "published"),
    "label step, 32 images, published": lambda: training_step(label_batch(32), "published"),
    "inference, 1 image": lambda: inference((96, 128)),
    "inference, 4 images of 2 sizes": lambda: inference(*[(96, 128), (128, 96)] * 2),
    "300 masks pasted": pasting,
}


def report(gpu: PretendedGpu, lines: int) -> str:
    """Lay out counts by function and by line, the largest first."""
    launches: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for (operation, place), number in gpu.launches.items():
        launches[f"backward: {operation}" if place == "backward" else place] += number
    for (reason, place), number in gpu.waits.items():
        waits[f"{place}: {reason}"] += number
    functions: Counter[str] = Counter()
    for place, number in launches.items():
        file, _, rest = place.partition(":")
        functions[file if file == "backward" else f"{file} {rest.partition(' ')[2]}"] += number
    shown = []
    for title, counts in (("function", functions), ("line", launches), ("wait", waits)):
        shown.append(f"  by {title}")
        shown += [f"    {number:5}  {place}" for place, number in counts.most_common(lines)]
    return "\n".join(shown)


def main() -> None:
    """Print the counts of the works that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--lines", type=int, default=25, help="printed of each table (default: 25)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.works or WORKS:
        gpu = WORKS[name]()
        print(f"{name}: {gpu.launches.total():,} launches, {gpu.waits.total():,} waits")
        if options.lines:
            print(report(gpu, options.lines))


if __name__ == "__main__":
    main()
