"""What classes of exemplars find, against their names, and both fused: AP over draws and numbers of exemplars.

::

    python benchmarks/exemplars.py RUN OUTPUT [--draws 5] [--counts 1 2 5 10 50] [--images 3200]

RUN is a quickstart's run folder; copy it before, since its region statistics are stored in it. Exemplars are drawn from images that
are made for it with another seed than its data; everything is scored on the run's validation images, boxes, by the way that
``proxydet eval`` takes. Draws are paired: all rows of a draw and a count see the same exemplars.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np

from proxydet.data.dataset import DatasetConfig, VocabularySpec
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.files import write_json
from proxydet.inference.exemplars import (
    embed_shown,
    find_exemplars,
    in_detector,
    region_statistics,
)
from proxydet.models import configuration_of
from proxydet.vocabulary.exemplars import classes_of_exemplars
from proxydet.vocabulary.vocabulary import Vocabulary


def score(
    detector: Detector, description: DatasetConfig, vocabulary: Vocabulary, file: Path
) -> list[float]:
    """Return box AP in percent of all, base and novel classes."""
    classes = VocabularySpec(embeddings=vocabulary.save(file))
    report = evaluate(
        detector,
        dataclasses.replace(description, vocabulary=classes),
        config=EvaluationConfig(bootstrap=0, batch_size=8, iou_types=("bbox",)),
    )
    assert report is not None
    assert report.ap is not None
    ap_C = {row.name: row.ap for row in report.per_class() if row.ap is not None}
    trained = dict(zip(detector.vocabulary.names, detector.vocabulary.base, strict=True))
    parts = [[ap for name, ap in ap_C.items() if trained[name] == kind] for kind in (True, False)]
    return [100 * value for value in (report.ap, *(statistics.fmean(part) for part in parts))]


def main() -> None:
    """Embed once, score each draw; print one table, and write it with all numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 5, 10, 50])
    parser.add_argument("--images", type=int, default=3200)
    asked = parser.parse_args()
    began = time.process_time()
    pool = asked.output / "pool"
    if not (pool / "lvis_val.json").is_file():
        make_dataset(pool, SyntheticConfig(seed=11, images_train=8, images_val=asked.images))
    detector = Detector.from_run(asked.run).with_settings(masks=False)
    names = detector.vocabulary.names
    measured = region_statistics(detector)
    shown = find_exemplars(pool / "description.toml", split="val", most=10**6)
    regions: list[list[np.ndarray]] = [[] for _ in names]
    place = [names.index(name) for name in shown.names]
    for image, kept_K, own_KD in embed_shown(in_detector(detector), shown):
        for row, region_D in zip(image.classes_A[kept_K], own_KD, strict=True):
            regions[place[row]].append(region_D)
    print(f"exemplars of a class: {min(map(len, regions))} to {max(map(len, regions))}")
    description = DatasetConfig.from_toml(configuration_of(asked.run)["data"]["description"])
    file = asked.output / "classes.vocab"
    steeper = detector.vocabulary.with_scorers(scale=np.full(len(names), 1.6))
    scores = {"names": [score(detector, description, detector.vocabulary, file)]}
    scores["names, scale 1.6"] = [score(detector, description, steeper, file)]
    print(f"names: {scores['names'][0]}", flush=True)
    for count in asked.counts:
        for draw in range(asked.draws):
            rng = np.random.default_rng([count, draw])
            chosen = [np.stack(own)[rng.permutation(len(own))[:count]] for own in regions]
            for method, text in (("exemplars", None), ("fused", detector.vocabulary)):
                made = classes_of_exemplars(names, chosen, measured, text).vocabulary
                rows = scores.setdefault(f"{count} {method}", [])
                rows.append(score(detector, description, made, file))
                if (count, method) == (5, "fused"):
                    free = made.with_scorers(bias=None, scale=made.scale * 1.25)
                    rows = scores.setdefault("5 fused, sum of logits", [])
                    rows.append(score(detector, description, free, file))
        print(table(scores), flush=True)
    cpu_s = time.process_time() - began
    write_json(asked.output / "scores.json", {"scores": scores, "cpu_s": cpu_s})


def table(scores: dict[str, list[list[float]]]) -> str:
    """Return means over the draws, with the difference from names, its standard deviation and its least over draws."""
    lines = ["| box AP, % | all | base | novel |", "|---|---|---|---|"]
    names = scores["names"][0]
    for method, rows in scores.items():
        cells = []
        for column, plain in zip(zip(*rows, strict=True), names, strict=True):
            apart = [value - plain for value in column]
            spread = f"±{statistics.stdev(apart):.1f}" if len(apart) > 1 else ""
            least = f", least {min(apart):+.1f}" if len(apart) > 1 else ""
            cells.append(
                f"{statistics.fmean(column):.1f} ({statistics.fmean(apart):+.1f}{spread}{least})"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
