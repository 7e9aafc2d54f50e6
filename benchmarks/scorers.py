"""What background classes and calibrated thresholds do to false positives, on images with and without any class that is asked for.

::

    python benchmarks/scorers.py QUICKSTART OUTPUT [--seeds 5] [--asked 8] [--calibrate 80] [--test 320] [--threads 1]

QUICKSTART is the output folder of a finished ``proxydet quickstart``. New scenes of its classes are drawn, which no training saw, every
object annotated. For each seed, some classes of its training are asked for, and some scenes are set apart to learn thresholds from.
On the others, one label a box, above the thresholds: false positives on scenes without any of these classes and on all, recall,
and box AP of what is kept. The detector is the same for all seeds, the classes and scenes are not. Finished seeds in OUTPUT are not
run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proxydet.data.sources import open_config
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.analysis import calibrate, operating_point
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_split
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.scorers import calibrate_vocabulary
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import write_json
from proxydet.vocabulary.sources import TRAINING_CLASSES
from proxydet.vocabulary.vocabulary import Vocabulary

GENERAL = 0.3
# Words that the quickstart's text encoder knows, but not together: things that are in no scene.
ELSEWHERE = ["red", "green", "blue", "circle", "square", "star", "striped", "dotted"]
SETTINGS = EvaluationConfig(bootstrap=0, iou_types=("bbox",), protocol="coco")


def draw(quickstart: Path, output: Path, scenes: int) -> Path:
    """Draw scenes behind those of the quickstart's validation; return their folder."""
    made = json.loads((quickstart / "data" / "synthetic.json").read_text())
    known = {field.name for field in dataclasses.fields(SyntheticConfig)}
    config = SyntheticConfig(**{key: made[key] for key in made if key in known})
    first = config.images_val
    config = dataclasses.replace(
        config,
        images_train=1,
        image_label_images_per_class=0,
        novel_covered=0,
        images_val=first + scenes,
        not_exhaustive_rate=0.0,
    )
    make_dataset(output / "data", config)
    content = json.loads((output / "data" / "lvis_val.json").read_text())
    content["images"] = content["images"][first:]
    write_json(output / "scenes.json", content)
    return output / "data" / "val"


def part(output: Path, name: str, images: set[int], asked: set[str] | None = None) -> Path:
    """Write the annotations of some images, of some categories."""
    content = json.loads((output / "scenes.json").read_text())
    chosen = {c["id"] for c in content["categories"] if asked is None or c["name"] in asked}
    content["images"] = [row for row in content["images"] if row["id"] in images]
    content["annotations"] = [
        row
        for row in content["annotations"]
        if row["image_id"] in images and row["category_id"] in chosen
    ]
    content["categories"] = [c for c in content["categories"] if c["id"] in chosen]
    write_json(output / f"{name}.json", content)
    return output / f"{name}.json"


def measure(detector: Detector, folder: Path, output: Path, seed: int, options: Any) -> dict:
    """Measure all settings for one choice of classes and scenes."""
    rng = np.random.default_rng(seed)
    content = json.loads((output / "scenes.json").read_text())
    ids = rng.permutation([row["id"] for row in content["images"]]).tolist()
    names = rng.permutation(detector.vocabulary.names)[: options.asked].tolist()
    calibrating = part(output, f"calibrate-{seed}", set(ids[: options.calibrate]))
    testing = part(output, f"test-{seed}", set(ids[options.calibrate :]), set(names))
    one_label = detector.with_settings(agnostic_nms=True, masks=False)

    def opened(path: Path) -> DescribedSplit:
        config = open_config(path, [folder])
        return DescribedSplit.open(config, "train", protocol="coco")

    test, rows = opened(testing), {}
    asked = detector.vocabulary_of(names)
    vocabularies: dict[str, Vocabulary] = {
        "names": asked,
        "names, other words as background": detector.with_background(asked, ELSEWHERE),
        "names, training as background": detector.with_background(asked, TRAINING_CLASSES),
        "names, training as background, margin 0": detector.with_background(
            asked, TRAINING_CLASSES, margin=0
        ),
        "names, training as background, margin 2": detector.with_background(
            asked, TRAINING_CLASSES, margin=2
        ),
    }
    split = opened(calibrating)
    calibrated = calibrate_vocabulary(detector, split, asked, scores=True, even_if_worse=True)
    vocabularies["names, calibrated scores"] = calibrated.vocabulary.with_scorers(threshold=None)
    for name, words in vocabularies.items():
        found = evaluate_split(one_label, test, vocabulary=words, config=SETTINGS)
        assert found is not None
        thresholds = {"": np.full(len(words), GENERAL)}
        for what, options_of in {"that keep 0.97": {"keep": 0.97}, "for F1": {}}.items():
            learned = calibrate_vocabulary(detector, split, words, even_if_worse=True, **options_of)
            thresholds[f", thresholds {what}"] = learned.vocabulary.threshold
        for what, threshold_C in thresholds.items():
            own = dict(zip(words.names, threshold_C.tolist(), strict=True))
            truth = found.truth
            of_category = np.array([own[category.strip()] for category in truth.category_names])
            scored = found.scored["bbox"]
            limit_S = of_category[scored.matches.selection.category_S]
            point = operating_point(scored, limit_S, name + what)
            kept = found.results.take(
                np.flatnonzero(found.results.score_D > of_category[found.results.category_D])
            )
            report = run_evaluation(kept, truth, config=SETTINGS).report
            rows[name + what] = {
                **dataclasses.asdict(point),
                "ap": report.ap,
                "ap50": report.ap50,
                "ap_all": found.report.ap,
                "calibration_error": calibrate(scored.matches).error,
                "thresholds": own,
            }
    change = calibrated.scores and dataclasses.asdict(calibrated.scores)
    return {"seed": seed, "asked": names, "rows": rows, "scores": change}


def main() -> None:
    """Measure each seed, and print the means and the paired differences from the names alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--asked", type=int, default=8)
    parser.add_argument("--calibrate", type=int, default=80)
    parser.add_argument("--test", type=int, default=320)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    folder = draw(options.quickstart, options.output, options.calibrate + options.test)
    detector = Detector.from_run(options.quickstart / "run", device="cpu")
    results = []
    for seed in range(1, options.seeds + 1):
        file = options.output / f"seed-{seed}.json"
        if not file.exists():
            write_json(file, measure(detector, folder, options.output, seed, options))
        results.append(json.loads(file.read_text())["rows"])
    first = next(iter(results[0]))
    columns = {
        "false_positives_per_empty_image": ("wrong an empty image", 1),
        "false_positives_per_image": ("wrong an image", 1),
        "precision": ("precision", 100),
        "recall": ("recall", 100),
        "ap": ("AP of what is kept", 100),
        "ap_all": ("AP of all", 100),
        "calibration_error": ("calibration error", 1),
    }
    print(
        "| setting | "
        + " | ".join(title for title, _ in columns.values())
        + " | AP against names |"
    )
    print("|---" * (len(columns) + 2) + "|")
    for name in results[0]:
        cells = [
            f"{factor * statistics.mean(rows[name][key] for rows in results):.{3 if factor == 1 else 1}f}"
            for key, (_, factor) in columns.items()
        ]
        change = [100 * (rows[name]["ap"] - rows[first]["ap"]) for rows in results]
        spread = 2.78 * statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
        print(
            f"| {name} | "
            + " | ".join(cells)
            + f" | {statistics.mean(change):+.1f} ± {spread:.1f} |"
        )


if __name__ == "__main__":
    main()
