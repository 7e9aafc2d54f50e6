"""Splits the time of R50 inference and of a training step into parts, on random weights.

::

    python benchmarks/model_speed.py [inference|variants|boxes|labels] [--threads 2] [--rounds 5] [--clock wall|cpu]

``inference``: one 480x640 image, 300 detections, masks pasted and encoded; fewer with ``--score-threshold`` or ``--detections``,
each on a region of its own with ``--one-label``; ``--precision bf16`` where the CPU has units for it. Also the floor, which is
the time within convolutions and matrix products, its share of the network's time, and the regions that detections come from.
``variants``: the same in turn with a mask predicted, pasted and encoded for every detection (as detectron2 does) and once for
each distinct box, at thresholds 0.02 and 0.3; checks that detections and masks are equal. ``boxes``: 2 images of 416x416 with objects.
``labels``: 8 images of 208x208 with one class each. Prints the median of the rounds after one warm-up round. ``--clock cpu``
counts the process's CPU seconds over all threads, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import parity_path  # noqa: F401
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from parity_model import TRIMMED, network_of
from parity_trim import base_classes
from torch.utils._python_dispatch import TorchDispatchMode

from proxydet.data.loader import Batch, BoxBatch, ImageLabelBatch
from proxydet.losses.config import LossConfig
from proxydet.losses.criterion import Criterion
from proxydet.modeling import network as network_module
from proxydet.modeling import roi_heads
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import Prediction, assemble_predictions, rles

Times = dict[str, float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Stopwatch:
    """Adds up the time spent in parts of a program."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: Times = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside for a part."""
        start = self.clock()
        yield
        self.times[name] = self.times.get(name, 0.0) + self.clock() - start

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of a function for a part."""
        inner = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, attribute, timed)


def noise(height: int, width: int, seed: int) -> torch.Tensor:
    """Return an image of blurred noise: uint8 (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth[0].to(torch.uint8)


def box_batch() -> BoxBatch:
    """Return 2 images of 416x416 with 7 objects each."""
    images, instances = [], []
    source = np.random.default_rng(0)
    for seed in range(2):
        images.append(noise(416, 416, seed))
        corners = source.uniform(0, 250, (7, 2))
        boxes = np.concatenate([corners, corners + source.uniform(20, 160, (7, 2))], axis=1)
        objects = Instances((416, 416))
        objects.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
        objects.gt_classes = torch.from_numpy(source.integers(0, 1203, 7))
        corners_of = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        objects.gt_masks = PolygonMasks([[polygon] for polygon in corners_of])
        instances.append(objects)
    return BoxBatch(images=tuple(images), instances=tuple(instances), image_ids=(0, 1))


def label_batch() -> ImageLabelBatch:
    """Return 8 images of 208x208 with a class each."""
    images = tuple(noise(208, 208, seed) for seed in range(8))
    labels = tuple(torch.tensor([100 * seed]) for seed in range(8))
    return ImageLabelBatch(images=images, labels=labels, image_ids=tuple(range(8)))


def variants(network: ProxyDetNetwork, rounds: int, clock: Callable[[], float]) -> Times:
    """Time inference with shared masks and with a mask for each detection, in turn; check that both give the same."""
    network.for_inference(torch.device("cpu"))
    image = noise(480, 640, 0)
    times: dict[str, list[float]] = {}
    counts = {}
    for _ in range(rounds + 1):
        results = {}
        for threshold in (0.02, 0.3):
            settings = InferenceConfig(score_threshold=threshold)
            for name, ask in (("each detection", _each_mask), ("distinct boxes", _shared_masks)):
                start = clock()
                prediction, encoded = ask(network, image, settings)
                key = f"{threshold}, masks of {name}"
                times.setdefault(key, []).append(clock() - start)
                results[key] = (prediction, encoded)
                counts[key] = (len(prediction), len(prediction.mask_probs_MSS))
            (one, first), (two, second) = list(results.values())[-2:]
            assert torch.equal(one.boxes_N4, two.boxes_N4)
            assert torch.equal(one.scores_N, two.scores_N)
            assert first == second, "the masks differ"
    for key, (detections, masks) in counts.items():
        print(f"{key}: {detections} detections, {masks} masks predicted")
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def _shared_masks(
    network: ProxyDetNetwork, image: torch.Tensor, settings: InferenceConfig
) -> tuple[Prediction, list[Any]]:
    (prediction,) = network.detect([image], settings=settings)
    return prediction, rles(prediction)


def _each_mask(
    network: ProxyDetNetwork, image: torch.Tensor, settings: InferenceConfig
) -> tuple[Prediction, list[Any]]:
    """Do as `ProxyDetNetwork.detect`, with a mask for each detection."""

    def assemble(found: Any, scene: Any, sizes: Any, masks: Any) -> Any:
        # As if every detection came from a region of its own.
        found.regions_L.copy_(torch.arange(len(found.regions_L)))
        return assemble_predictions(found, scene, sizes, masks)

    network_module.assemble_predictions = assemble
    try:
        return _shared_masks(network, image, settings)
    finally:
        network_module.assemble_predictions = assemble_predictions


class Products(TorchDispatchMode):
    """Counts convolutions and matrix products for a part."""

    # Inference mode does not take the first four apart.
    NAMES = frozenset(
        f"aten::{name}"
        for name in (
            *("conv2d", "conv_transpose2d", "linear", "matmul"),
            *("convolution", "mm", "addmm", "bmm", "baddbmm"),
        )
    )

    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        super().__init__()
        self._stopwatch, self._name = stopwatch, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in self.NAMES:
            return func(*args, **(kwargs or {}))
        with self._stopwatch.part(self._name):
            return func(*args, **(kwargs or {}))


def inference(
    network: ProxyDetNetwork, stopwatch: Stopwatch, settings: InferenceConfig
) -> Callable[[], None]:
    """Return one round of inference, its parts watched."""
    network = network.for_inference(torch.device("cpu")).prepared(settings.precision)
    heads, image = network.roi_heads, noise(480, 640, 0)
    stopwatch.watch(network, "_features", "backbone")
    stopwatch.watch(network.proposal_generator, "forward", "proposals")
    stopwatch.watch(network.proposal_generator, "propose", "proposals")
    stopwatch.watch(heads, "embed", "cascades")
    stopwatch.watch(heads, "mask_probabilities", "mask head")
    stopwatch.watch(network_module, "detect_classes", "classes and suppression")

    def run() -> None:
        with stopwatch.part("network"), Products(stopwatch, "floor"):
            (prediction,) = network.detect([image], settings=settings)
        with stopwatch.part("masks pasted and encoded"):
            rles(prediction)
        stopwatch.times["detections"] = len(prediction)
        stopwatch.times["distinct regions"] = len(prediction.mask_index_N.unique())
        stopwatch.times["share of the floor"] = (
            stopwatch.times["floor"] / stopwatch.times["network"]
        )

    return run


def training(network: ProxyDetNetwork, batch: Batch, stopwatch: Stopwatch) -> Callable[[], None]:
    """Return one training step, its parts watched."""
    network.train()
    criterion, source = Criterion(LossConfig()), torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    stopwatch.watch(network, "_features", "backbone")
    stopwatch.watch(network.proposal_generator, "forward", "proposals")
    stopwatch.watch(network.proposal_generator, "propose", "proposals")
    stopwatch.watch(roi_heads, "box_steps", "cascade with mixup branch")
    stopwatch.watch(roi_heads, "_mixup_step", "of it, mixup branch")
    stopwatch.watch(roi_heads, "mask_step", "masks")
    stopwatch.watch(roi_heads, "image_label_steps", "cascade")

    def run() -> None:
        output = network(batch, generator=source)
        with stopwatch.part("losses"):
            losses = criterion(output, generator=source)
        with stopwatch.part("backward"):
            torch.stack(list(losses.values())).sum().backward()
        with stopwatch.part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("inference", "variants", "boxes", "labels"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--score-threshold", type=float, default=0.02)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--one-label", action="store_true", help="one label a box, as predict")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = network_of("r50", base_classes(TRIMMED))
    if arguments.what == "variants":
        medians = variants(network, arguments.rounds, CLOCKS[arguments.clock])
        print(f"variants, {arguments.threads} threads, {arguments.clock} seconds")
        for name, seconds in medians.items():
            print(f"{name:36} {seconds:8.3f}")
        return
    stopwatch = Stopwatch(CLOCKS[arguments.clock])
    if arguments.what == "inference":
        settings = InferenceConfig(
            score_threshold=arguments.score_threshold,
            precision=arguments.precision,
            max_detections=arguments.detections,
            agnostic_nms=arguments.one_label,
        )
        run = inference(network, stopwatch, settings)
    else:
        batch = box_batch() if arguments.what == "boxes" else label_batch()
        run = training(network, batch, stopwatch)
    rounds: list[Times] = []
    for _ in range(arguments.rounds + 1):
        stopwatch.times.clear()
        with stopwatch.part("all"):
            run()
        rounds.append(dict(stopwatch.times))
    print(f"{arguments.what}, {arguments.threads} threads, {arguments.clock} seconds")
    for name in rounds[-1]:
        print(f"{name:28} {statistics.median(times[name] for times in rounds[1:]):8.3f}")


if __name__ == "__main__":
    main()
