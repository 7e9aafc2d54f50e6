"""Peak memory and time of scoring 20,000 classes, in chunks and in one piece, each in a process of its own.

::

    python benchmarks/many_classes.py [--classes 20000] [--chunks 2048 20000] [--threads 2]

4 pictures of 256 regions, random embeddings of 512 dimensions, threshold 0.02. Memory is what the process's largest resident
size grows by during `proxydet.modeling.postprocess.detect_classes`. Checks that all give the same detections.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional

from proxydet.modeling.config import ClassifierConfig, InferenceConfig
from proxydet.modeling.postprocess import ClassText, detect_classes
from proxydet.modeling.roi_heads import RegionEmbeddings, ZeroShotClassifier

PICTURES, REGIONS, DIMENSIONS = 4, 256, 512
TEMPERATURES = (50.0, 50.0, 50.0, 1.0)


def regions() -> RegionEmbeddings:
    """Return random boxes and embeddings of three detection steps and a mixup step."""
    shape = (PICTURES, REGIONS)
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


def main() -> None:
    """Measure each chunk size in a fresh process, or, with ``--alone``, one in this."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 20_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.classes, arguments.chunks[0])))
        return
    digests = set()
    for chunk in arguments.chunks:
        command = [sys.executable, __file__, "--alone", "--classes", str(arguments.classes)]
        command += ["--chunks", str(chunk), "--threads", str(arguments.threads)]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        digests.add(told["digest"])
        print(f"chunks of {chunk:6}: {told['megabytes']:7.0f} MB, {told['seconds']:6.2f} s")
    assert len(digests) == 1, "the detections differ"
    print("all give the same detections")


if __name__ == "__main__":
    main()
