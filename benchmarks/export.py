"""Compares an exported full-size detector with the detector in torch: what they find in photographs, and their speed.

::

    python benchmarks/export.py write model.onnx [--model r50|swinb]
    python benchmarks/export.py agree model.onnx --embeddings CLIP.npy PHOTOGRAPH... [--model r50|swinb]
    python benchmarks/export.py speed model.onnx --embeddings CLIP.npy PHOTOGRAPH [--rounds 4]
    python benchmarks/export.py pooling [--rounds 4]

Weights are random, made from the parameters' names (`tests/parity/parity_model.py`). ``write`` exports (``.onnx`` or ``.pt2``). ``agree``
looks into the photographs for all, 80, 7 and 1 of the embeddings' classes in turn, the first half at 800 and the others at
480 pixels; a detection is the same if class, box (IoU above 0.99) and score (1e-4) are. ``speed`` runs a photograph at
480x640 in turns. ``pooling``: the pooler that is exported against the detector's, both in torch, on random features of a 480x640
picture. ``--threads`` counts for both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import parity_path  # noqa: F401
import torch
from parity_model import TRIMMED, network_of
from parity_trim import base_classes
from PIL import Image

from proxydet.data.images import read_image
from proxydet.detector import Detector
from proxydet.export.exporter import TorchProgram, compare, export_detector
from proxydet.export.graph import ExportPooler
from proxydet.export.runtime import OnnxDetector
from proxydet.modeling.config import CascadeConfig
from proxydet.modeling.roi_heads import RegionPooler
from proxydet.vocabulary.vocabulary import Vocabulary

_SIZE = (640, 480)


def opened(path: Path, threads: int) -> OnnxDetector | TorchProgram:
    """Open an exported file by its ending."""
    if path.suffix == ".onnx":
        return OnnxDetector.from_file(path, threads=threads)
    return TorchProgram(path)


def vocabulary(path: Path, classes: int | None = None) -> Vocabulary:
    """Return the first classes of a file of embeddings; every fourth is novel."""
    embeddings = np.load(path).astype(np.float32)[:classes]
    places = np.arange(len(embeddings))
    return Vocabulary.from_arrays(
        [f"class {place}" for place in places], embeddings, places % 4 > 0
    )


def write(options: argparse.Namespace) -> None:
    """Export, and print the report."""
    detector = Detector(network_of(options.model, base_classes(TRIMMED)))
    report = export_detector(detector, options.file, progress=print)
    print(dataclasses.asdict(report))


def agree(options: argparse.Namespace) -> None:
    """Print a line a photograph, and the sum."""
    network = network_of(options.model, base_classes(TRIMMED))
    runner = opened(options.file, options.threads)
    matched = of = 0
    for place, photograph in enumerate(options.photographs):
        large = place < (len(options.photographs) + 1) // 2
        sides = (800, 1333) if large else (480, 640)
        result = compare(
            Detector(network, shortest=sides[0], longest=sides[1]),
            runner,
            read_image(photograph),
            vocabulary(options.embeddings, (None, 80, 7, 1)[place % 4]),
            name=photograph.name,
            score_threshold=0.02,
        )
        matched, of = matched + result.matched, of + max(result.detections, result.exported)
        print(dataclasses.asdict(result), flush=True)
    print(f"{matched} of {of} detections are the same")


def in_turn(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> None:
    """Print the median of each call's seconds, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    for name, taken in times.items():
        print(f"{name}: {statistics.median(taken[1:]):.3f} s")


def speed(options: argparse.Namespace) -> None:
    """Time a photograph at 480x640."""
    network = network_of(options.model, base_classes(TRIMMED))
    runner = opened(options.file, options.threads)
    words = vocabulary(options.embeddings)
    picture = Image.fromarray(read_image(options.photographs[0])).resize(_SIZE)
    image = np.array(picture)
    image_3HW = torch.from_numpy(image).permute(2, 0, 1)
    for threshold in (0.02, 0.3):
        settings = dataclasses.replace(Detector(network).inference, score_threshold=threshold)
        print(f"score threshold {threshold}")

        def detector(settings: object = settings) -> object:
            return network.detect([image_3HW], words, settings=settings)

        def exported(threshold: float = threshold) -> object:
            return runner.run(image, words, threshold)

        calls = {"detector": detector, "exported": exported}
        in_turn(calls, options.rounds, options.clock)


def pooling(options: argparse.Namespace) -> None:
    """Time both poolers for a cascade's step and for the masks of 50 boxes."""
    torch.manual_seed(0)
    features = [torch.randn(1, 256, 480 // stride, 640 // stride) for stride in (8, 16, 32)]
    corners = torch.rand(256, 2) * torch.tensor([400.0, 300.0])
    boxes = torch.cat([corners, corners + 16 + torch.rand(256, 2) * 220], dim=1)
    index = torch.zeros(256, dtype=torch.int64)
    for side, count in ((7, 256), (14, 50)):
        plain = RegionPooler(CascadeConfig(), side)
        calls = {
            f"{name} of {count} boxes, {side}x{side}": lambda p=pooler, n=count: p(
                features, boxes[:n], index[:n]
            )
            for name, pooler in (("detector's", plain), ("exported", ExportPooler(plain)))
        }
        in_turn(calls, options.rounds, options.clock)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (write, agree, speed, pooling):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--rounds", type=int, default=4)
        command.add_argument(
            "--cpu",
            dest="clock",
            action="store_const",
            const=time.process_time,
            default=time.perf_counter,
            help="count the process's CPU seconds over all threads",
        )
        if function is pooling:
            continue
        command.add_argument("file", type=Path)
        command.add_argument("--model", choices=("r50", "swinb"), default="r50")
        if function is not write:
            command.add_argument("--embeddings", type=Path, required=True)
            command.add_argument("photographs", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        options.function(options)


if __name__ == "__main__":
    main()
