"""What fine-tuning gains on its own classes and loses on others: plain, and with each way of forgetting less, on paired seeds.

::

    python benchmarks/finetune.py OUTPUT [--start RUN] [--novel 30] [--iterations 1050] [--images 240] [--epochs 18] [--seeds 3]
                                  [--methods plain frozen default ...]

A detector is trained on synthetic images without the novel half of the classes (or ``--start`` names a quickstart's run), then
fine-tuned on other images, of which only the novel classes are annotated: what the detector knew is in them too, unannotated.
Each method and seed is one ``proxydet.finetune.finetune_config`` and ``run_training``; seeds are paired: all methods see the same
batches. Own and untouched classes are scored on the validation images of the first data set, which no training saw. Finished
runs in OUTPUT are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.files import write_json, write_text
from proxydet.finetune import finetune_config
from proxydet.models import configuration_of, find_detector
from proxydet.quickstart import quickstart_config
from proxydet.recipes import resolve_config
from proxydet.training_run import run_training

OFF = ["training.freeze=[]", "training.interpolation=1", "losses.distillation.weight=0"]
METHODS = {
    "plain": OFF,
    "frozen": OFF[1:],
    "mixed": [OFF[0], OFF[2]],
    "frozen, mixed": OFF[2:],
    "distilled": OFF[:2],
    "frozen, distilled": OFF[1:2],
    "default": [],
}
"""Overrides of `finetune_config`'s own choice: frozen parts, a mixture with the starting weights, distillation."""


def train_start(output: Path, *, novel: int, iterations: int) -> Path:
    """Train a quickstart's detector on the classes that are not novel; return its run folder."""
    drawn = SyntheticConfig(novel_classes=novel, novel_covered=0)
    description = make_dataset(output / "data", drawn)
    recipe = resolve_config("quickstart", None, [f"training.iterations={iterations}"])
    config = quickstart_config(description, seed=7, recipe=recipe)
    return run_training(config, output=output / "run").folder


def new_data(start: Path, description: Path, images: int) -> Path:
    """Draw other images of all classes, and keep the annotations of those that are novel to a detector."""
    root = start.with_name("new")
    target = root / "own.toml"
    if target.is_file():
        return target
    known = Dataset(config=DatasetConfig.from_toml(description)).vocabulary
    own = [name for name, base in zip(known.names, known.base, strict=True) if not base]
    make_dataset(root, SyntheticConfig(seed=11, images_train=8, images_val=images))
    drawn = json.loads((root / "lvis_val.json").read_text())
    kept = {c["id"]: c["name"] for c in drawn["categories"] if c["name"] in own}
    objects = [a for a in drawn["annotations"] if a["category_id"] in kept]
    used = {entry["image_id"] for entry in objects}
    keys = ("id", "file_name", "width", "height")
    document = {
        "images": [{k: i[k] for k in keys} for i in drawn["images"] if i["id"] in used],
        "annotations": objects,
        "categories": [{"id": number, "name": name} for number, name in sorted(kept.items())],
    }
    write_text(root / "own.json", json.dumps(document))
    rows = known.subset([name for _, name in sorted(kept.items())])
    np.save(root / "own.npy", rows.embeddings)
    tables = "".join(
        f'[{name}]\nannotations = "own.json"\nimages = "val"\nshare = {share}\n'
        for name, share in (("train", [0.0, 0.8]), ("val", [0.8, 1.0]))
    )
    encoder = description.parent / "text_encoder.json"
    vocabulary = f'[vocabulary]\nembeddings = "own.npy"\nencoder = "{encoder}"\n'
    return write_text(target, f'name = "own"\n{vocabulary}{tables}')


def score(detector: Detector, description: Path) -> dict[str, float]:
    """Return AP in percent of own (novel to the start) and untouched classes, boxes and masks."""
    config = EvaluationConfig(bootstrap=0, batch_size=8)
    report = evaluate(detector, description, config=config)
    assert report is not None
    names = {"novel": "own", "base": "untouched"}
    return {
        f"{names[group.name]} {kind}": 100 * (group.ap if group.ap is not None else math.nan)
        for kind, part in report.types.items()
        for group in part.groups
        if group.name in names
    }


def main() -> None:
    """Train, fine-tune, score; print one table, and write it with all numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--novel", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=1050)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--epochs", type=float, default=18)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["plain", "frozen, mixed", "default"])
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, of all methods")
    asked = parser.parse_args()
    began = time.process_time()
    run = asked.start or train_start(asked.output, novel=asked.novel, iterations=asked.iterations)
    start = find_detector(run=run, weights=None, config=None)
    assert start.run is not None
    description = Path(configuration_of(start.run)["data"]["description"])
    data = new_data(asked.output / "run", description, asked.images)
    scores: dict[str, list[dict[str, float]]] = {
        "start": [score(Detector.from_run(start.run), description)]
    }
    for seed in range(1, asked.seeds + 1):
        for method in asked.methods:
            overrides = [f"seed={seed}", *METHODS[method], *asked.set]
            config, _ = finetune_config(start, data, overrides=overrides, epochs=asked.epochs)
            folder = asked.output / f"{method.replace(', ', '-')}-{seed}"
            run_training(config, output=folder)
            found = score(Detector.from_run(folder), description)
            scores.setdefault(method, []).append(found)
            print(f"seed {seed}, {method}: {found}", flush=True)
    print(table(scores))
    write_json(
        asked.output / "scores.json", {"scores": scores, "cpu_s": time.process_time() - began}
    )


def table(scores: dict[str, list[dict[str, Any]]]) -> str:
    """Return means over the seeds, with half the spread of the paired differences from plain fine-tuning."""
    columns = list(scores["start"][0])
    lines = [f"{'AP, %':20}" + "".join(f"{column:>18}" for column in columns)]
    for method, rows in scores.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            text = f"{statistics.fmean(values):.1f}"
            plain = scores.get("plain", [])
            if method not in ("start", "plain") and len(values) == len(plain) > 1:
                apart = [
                    row[column] - other[column] for row, other in zip(rows, plain, strict=True)
                ]
                text += f" ({statistics.fmean(apart):+.1f}±{statistics.stdev(apart):.1f})"
            cells.append(f"{text:>18}")
        lines.append(f"{method:20}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
