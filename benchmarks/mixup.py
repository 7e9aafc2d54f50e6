"""Why class-wise mixup helps or hurts on the quickstart's data: variants of it on paired seeds.

::

    python benchmarks/mixup.py OUTPUT [--seeds 3] [--start-iterations 1200] [--iterations 400] [--colours 5] [--shapes 4]
                               [--textures 3] [--novel 12] [--variants without recipe stopped ...] [--fresh]

A detector without the mixup branch is trained on a drawn data set; from its weights each variant trains on, for the same steps on the
same batches, at a third of the learning rate (``--fresh``: each variant from fresh weights, for all the steps). Each is
scored on 400 validation scenes as it is, by the detection branch alone and by the mixup branch alone. Finished runs in OUTPUT are not
trained again, so seeds and variants can be added. ``--colours``, ``--shapes`` and ``--textures`` say how many classes there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.files import write_json
from proxydet.quickstart import quickstart_config
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training_run import run_training

WEIGHT, GRADIENT = "losses.mixup.weight", "model.cascade.mixup_gradient"
VARIANTS: dict[str, list[str] | None] = {
    "without": None,
    "recipe": [],
    "published-weight": [f"{WEIGHT}=256"],
    "scaled-weight": [f"{WEIGHT}=32"],
    "light": [f"{WEIGHT}=4"],
    "damped": [f"{GRADIENT}=0.1"],
    "stopped": [f"{GRADIENT}=0"],
    "stopped-strong": [f"{GRADIENT}=0", f"{WEIGHT}=128"],
    "unmixed": [f"{GRADIENT}=0", "losses.mixup.beta=0"],
    "centre": [f"{GRADIENT}=0", "losses.mixup.prototype=center"],
    "l2": [f"{GRADIENT}=0", "losses.mixup.distance=l2"],
}
"""Overrides of the recipe; None has no mixup branch."""
FUSIONS = {"as it is": None, "detection alone": 0.0, "mixup alone": 1.0}
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def configuration(description: Path, seed: int, name: str, sets: list[str]) -> RunConfig:
    """Return the configuration of a variant."""
    own = VARIANTS[name]
    recipe = resolve_config("quickstart", None, [*sets, *(own or [])])
    return quickstart_config(description, seed=seed, mixup=own is not None, recipe=recipe)


def scores(run: Path, description: Path) -> dict[str, float]:
    """Return the mask AP in percent of base and novel classes, by each fusion."""
    detector, found = Detector.from_run(run), {}
    for fusion, weight in FUSIONS.items():
        if weight is not None:
            if not detector.network.config.mixup_branch:
                continue
            detector = detector.with_settings(alpha=weight, beta=weight)
        report = evaluate(detector, description, config=EvaluationConfig(bootstrap=0, batch_size=8))
        assert report is not None
        for group in report.main.groups:
            if group.name in ("base", "novel"):
                found[f"{group.name}, {fusion}"] = 100 * (
                    math.nan if group.ap is None else group.ap
                )
    return found


def main() -> None:
    """Train, score, and print the differences from the variant without the branch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-iterations", type=int, default=1200)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--images", type=int, default=1000)
    for name, count in (("colours", 5), ("shapes", 4), ("textures", 3), ("novel", 12)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:7])
    parser.add_argument("--fresh", action="store_true")
    asked = parser.parse_args()
    drawn = SyntheticConfig(
        images_train=asked.images,
        images_val=400,
        colours=asked.colours,
        shapes=asked.shapes,
        textures=asked.textures,
        novel_classes=asked.novel,
        novel_covered=asked.novel * 3 // 4,
    )
    description = make_dataset(asked.output / "data", drawn)
    table: dict[str, dict[int, dict[str, float]]] = {}
    for seed in range(1, asked.seeds + 1):
        steps = asked.start_iterations + (asked.iterations if asked.fresh else 0)
        sets = [f"training.iterations={steps}"]
        if not asked.fresh:
            start = asked.output / f"start-{seed}"
            run_training(configuration(description, seed, "without", sets), output=start)
            rate = resolve_config("quickstart").training.optimizer.learning_rate / 3
            sets = [
                f"training.iterations={asked.iterations}",
                f"training.optimizer.learning_rate={rate}",
                f"training.weights={start / 'model_final.pth'}",
            ]
        for name in asked.variants:
            folder = asked.output / f"{'fresh-' if asked.fresh else ''}{name}-{seed}"
            saved = folder / "scores.json"
            if not saved.is_file():
                run_training(configuration(description, seed + 100, name, sets), output=folder)
                write_json(saved, scores(folder, description))
            table.setdefault(name, {})[seed] = json.loads(saved.read_text())
            print(
                seed, name, {key: round(ap, 1) for key, ap in table[name][seed].items()}, flush=True
            )
    for name, rows in table.items():
        if name == "without" or "without" not in table:
            continue
        cells = []
        for key in next(iter(rows.values())):
            group = key.split(",")[0]
            gaps = [
                row[key] - table["without"][seed][f"{group}, as it is"]
                for seed, row in rows.items()
            ]
            half = math.nan
            if len(gaps) > 1:
                half = _T.get(len(gaps) - 1, 2.0) * statistics.stdev(gaps) / math.sqrt(len(gaps))
            cells.append(f"{key} {statistics.fmean(gaps):+.1f} ± {half:.1f}")
        print(f"{name:18}", "; ".join(cells))
    write_json(asked.output / "mixup.json", {"drawn": dataclasses.asdict(drawn), "scores": table})


if __name__ == "__main__":
    main()
