"""Peak memory and time of scoring many classes: 20,000 in chunks and in one piece, and a detector on a large list of names.

::

    python benchmarks/many_classes.py [--classes 20000] [--chunks 2048 20000] [--threads 2]
    python benchmarks/many_classes.py --run RUN --images FOLDER [--classes 4000] [--rounds 5] [--threads 2]

The first scores 4 images of 256 regions, random embeddings of 512 dimensions, threshold 0.02. Memory is what the process's largest
resident size grows by during `proxydet.modeling.postprocess.detect_classes`. Checks that all give the same detections.

The second runs a detector as `proxydet predict` does (one label, threshold 0.3) on the images of a folder, alternately with the
first 60 classes of its vocabulary and with these filled up to ``--classes``, and reports the CPU milliseconds an image, their ratio,
and what the process's largest resident size grew by. Fillers are random, but as far from the classes' mean as the classes are, as
other names would be: directions without regard to that mean score high nearly everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional

from proxydet.data.images import read_image
from proxydet.detector import Detector
from proxydet.inference.sources import find_images
from proxydet.modeling.config import ClassifierConfig, InferenceConfig
from proxydet.modeling.postprocess import ClassText, detect_classes
from proxydet.modeling.roi_heads import RegionEmbeddings, ZeroShotClassifier
from proxydet.vocabulary.vocabulary import Vocabulary

IMAGES, REGIONS, DIMENSIONS = 4, 256, 512
TEMPERATURES = (50.0, 50.0, 50.0, 1.0)


def regions() -> RegionEmbeddings:
    """Return random boxes and embeddings of three detection steps and a mixup step."""
    shape = (IMAGES, REGIONS)
    corners = torch.rand(*shape, 2) * 500
    boxes = torch.cat([corners, corners + torch.rand(*shape, 2) * 200 + 1], dim=2)
    steps = [functional.normalize(torch.randn(*shape, DIMENSIONS), dim=2) for _ in TEMPERATURES]
    return RegionEmbeddings(
        detection=tuple(steps[:3]),
        mixup_BRD=steps[3],
        mixup_boxes_BR4=boxes,
        boxes_BR4=boxes,
        proposal_scores_BR=torch.rand(shape),
        valid_BR=torch.ones(shape, dtype=torch.bool),
    )


def measure(classes: int, chunk: int) -> dict[str, object]:
    """Score once; return seconds, megabytes and a digest of what was found."""
    torch.manual_seed(0)
    seen = regions()
    text_CD = functional.normalize(torch.randn(classes, DIMENSIONS), dim=1)
    text = ClassText(text_DC=text_CD.T, base_C=torch.rand(classes) > 0.5)
    config = ClassifierConfig(embedding_dim=DIMENSIONS)
    classifiers = [
        ZeroShotClassifier(config, 8, torch.zeros(DIMENSIONS, 2), temperature)
        for temperature in TEMPERATURES
    ]
    settings = InferenceConfig(score_threshold=0.02, class_chunk=chunk)
    before, start = peak(), time.perf_counter()
    with torch.inference_mode():
        found = detect_classes([seen], text, classifiers, settings)
    seconds, megabytes = time.perf_counter() - start, peak() - before
    digest = hashlib.sha256()
    for values in (found.boxes_L4, found.scores_L, found.classes_L):
        digest.update(values.numpy().tobytes())
    return {"seconds": seconds, "megabytes": megabytes, "digest": digest.hexdigest()}


def peak() -> float:
    """Return the largest resident size so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_detector(run: Path, folder: Path, classes: int, rounds: int) -> None:
    """Run a detector with 60 classes and with many, alternately; print times, ratio and memory."""
    detector = Detector.from_run(run, device="cpu")
    pixels = [read_image(each.path) for each in find_images([str(folder)])]
    trained = detector.vocabulary
    rng = np.random.default_rng(0)

    def filled(count: int) -> Vocabulary:
        unit = trained.normalised()
        mean = unit.mean(axis=0)
        rows = rng.standard_normal((max(count - len(trained), 0), trained.dimension))
        rows -= (rows @ mean)[:, None] * mean / (mean @ mean)
        rows *= np.linalg.norm(unit - mean, axis=1).mean() / np.linalg.norm(rows, axis=1)[:, None]
        rows += mean
        names = [*trained.names, *(f"filler {i}" for i in range(len(rows)))][:count]
        table = np.concatenate([unit, rows])[:count]
        return detector.with_base(Vocabulary.from_arrays(names, table))

    settings = detector.settings(score_threshold=0.3, max_detections=300, agnostic_nms=True)
    seconds: dict[int, list[float]] = {60: [], classes: []}
    vocabularies = {count: filled(count) for count in seconds}
    for each in range(rounds + 1):
        for count, vocabulary in vocabularies.items():
            before, start = peak(), time.process_time()
            found = 0
            for image in pixels:
                (prediction,) = detector.predict_images([image], vocabulary, settings=settings)
                found += len(prediction)
            spent = (time.process_time() - start) / len(pixels)
            if each:  # the first round warms up
                seconds[count].append(spent)
            else:
                print(f"{count:6} classes: {found} detections, {peak() - before:4.0f} MB more")
    for count, spent in seconds.items():
        print(f"{count:6} classes: {1000 * median(spent):7.2f} CPU ms an image")
    ratios = [many / few for few, many in zip(*seconds.values(), strict=True)]
    print(f"ratio {median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")


def main() -> None:
    """Measure each chunk size in a fresh process, or, with ``--alone``, one in this; or a detector."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="measure this run's detector instead")
    parser.add_argument("--images", type=Path, help="folder of images for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, help="default: 20,000, of a detector 4,000")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 20_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    classes = arguments.classes or (20_000 if arguments.run is None else 4_000)
    torch.set_num_threads(arguments.threads)
    if arguments.run is not None:
        measure_detector(arguments.run, arguments.images, classes, arguments.rounds)
        return
    if arguments.alone:
        print(json.dumps(measure(classes, arguments.chunks[0])))
        return
    digests = set()
    for chunk in arguments.chunks:
        command = [sys.executable, __file__, "--alone", "--classes", str(classes)]
        command += ["--chunks", str(chunk), "--threads", str(arguments.threads)]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        digests.add(measured["digest"])
        print(f"chunks of {chunk:6}: {measured['megabytes']:7.0f} MB, {measured['seconds']:6.2f} s")
    assert len(digests) == 1, "the detections differ"
    print("all give the same detections")


if __name__ == "__main__":
    main()
