"""Checks and measures the detector on a GPU: correctness, speed and memory by part, at every precision.

::

    python benchmarks/gpu.py [--minutes 5] [--recipes r50 swinb] [--json FILE] [--device cuda] [--quick]

Weights and images are random; no file is needed but this repository. Prints a table, in this order:

- **correct**: the same steps twice in the mode ``strict``; R50 against the numbers recorded from the published implementation (the
  tests' fixtures), with their tolerances; later, the total loss at each other precision against float32's;
- **train**: images a second, peak memory and seconds by part, of a recipe's box batch and image-label batch, in the recipe's
  reproducibility. Parts are timed in steps of their own, in which the host waits for the device after each part;
- **predict** and **evaluate**: images a second through the network, and with masks encoded into a results file's rows.

After ``--minutes`` no new part begins, and the one that runs is finished; the report lists what was left out. Rates are compared with none
of the paper: in the facts that are kept here of its repository no training time or rate was found, only the machine (8 V100 of 32 GB).
Without a GPU, exit code 3; ``--device cpu --quick`` runs every part on the recipe ``tiny``, to try the script. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import parity_path  # noqa: F401
import torch
from parity_groups import compare_inference, compare_training
from parity_model import TRIMMED, network_of, seed_of
from parity_trim import base_classes, trim

from proxydet.detector import Detector
from proxydet.evaluation.detector_evaluation import result_rows
from proxydet.losses.criterion import Criterion
from proxydet.modeling import network as network_module
from proxydet.modeling import roi_heads
from proxydet.modeling.centernet import CenterNet
from proxydet.modeling.config import InferenceConfig, Precision
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import RunConfig, get_recipe
from proxydet.runtime.determinism import Bench, compare, random_vocabulary
from proxydet.runtime.modes import CUBLAS_VARIABLE, CUBLAS_WORKSPACE, reproducibility_mode
from proxydet.training import step as step_module

CLASSES = 1203
LOSS_TOLERANCE = {"tf32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Largest relative difference of the total loss from float32's."""

Rows = Iterator[tuple[str, dict[str, Any]]]

PARTS: list[tuple[Any, str, str]] = [
    (ProxyDetNetwork, "_features", "backbone"),
    (CenterNet, "forward", "proposals"),
    (CenterNet, "propose", "proposals"),
    (network_module, "box_steps", "cascade"),
    (network_module, "image_label_steps", "cascade"),
    (roi_heads, "_mixup_step", "mixup"),
    (network_module, "mask_step", "masks"),
    (Criterion, "__call__", "losses"),
    (torch.Tensor, "backward", "backward"),
    (step_module, "clip_gradients", "optimiser"),
    (torch.optim.AdamW, "step", "optimiser"),
]
"""What of a training step is timed as which part; a part within another is not counted for that."""


def with_precision(config: RunConfig, precision: Precision) -> RunConfig:
    """Return a configuration whose backbone and heads compute in a precision."""
    chosen = dataclasses.replace(
        config.training.precision, backbone=precision, heads=precision, initial_loss_scale=2.0**10
    )
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, precision=chosen)
    )


class Benchmark:
    """The parts of the benchmark.

    Args:
        device: ``cuda`` or ``cpu``.
        recipes: Names of recipes.
        quick: Measure once, and of the precisions only float32.
    """

    def __init__(self, device: str, recipes: list[str], *, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.recipes = {name: get_recipe(name) for name in recipes}
        self.precisions: tuple[Precision, ...] = ("fp32",) if quick else get_args(Precision)
        self.steps = 1 if quick else 5

    def parts(self) -> list[tuple[str, Callable[[], Rows]]]:
        """Return name and work of every part, in the order in which they are to run."""
        # cuBLAS reads the mode's setting when it is first used, so this comes before all other work.
        found: list[tuple[str, Callable[[], Rows]]] = [("correct: determinism", self.determinism)]
        if not self.quick:  # half a minute on a CPU, where the tests do the same
            found.append(("correct: parity", self.parity))
        for name, config in self.recipes.items():
            for precision in self.precisions:
                for work in (self.training, self.inference):
                    label = {"training": "train", "inference": "predict, evaluate"}[work.__name__]
                    found.append(
                        (
                            f"{label}: {name} {precision}",
                            lambda work=work, args=(name, config, precision): work(*args),
                        )
                    )
        return found

    def parity(self) -> Rows:
        """Compare R50 with the recorded numbers."""
        with np.load(TRIMMED / "parity_r50.npz", allow_pickle=False) as archive:
            fixture = dict(archive)
        network = network_of("r50", base_classes(TRIMMED), seed_of(fixture)).to(self.device)
        for row in (
            *compare_inference(network, fixture, 0, trim),
            *compare_training(network, fixture),
        ):
            yield (
                row.group,
                {
                    "difference": row.difference,
                    "tolerance": row.tolerance,
                    "passed": row.passed,
                },
            )

    def determinism(self) -> Rows:
        """Take the same steps twice."""
        name, config = next(iter(self.recipes.items()))
        with reproducibility_mode("strict"):
            bench = Bench(with_precision(config, "fp32"), device=self.device, classes=CLASSES)
            first, second = bench.repeat(2), bench.repeat(2)
        found = compare(first, second)
        yield f"{name}, two steps twice", {**found, "passed": found["first"] is None}

    def training(self, name: str, config: RunConfig, precision: Precision) -> Rows:
        """Measure steps on each kind of batch, whole and by part."""
        bench = Bench(with_precision(config, precision), device=self.device, classes=CLASSES)
        for batch in bench.batches:
            bench.batches = [batch]
            self._start_peak()
            with reproducibility_mode(config.reproducibility):
                measured = bench.measure(self.steps)
                with Stopwatch(self.device) as stopwatch:
                    bench.measure(self.steps)
            seconds = measured["step_seconds"]
            row = {
                "reproducibility": config.reproducibility,
                "images_per_second": len(batch) / seconds,
                "milliseconds": seconds * 1000,
            }
            total = sum(measured["losses"].values())
            if precision == "fp32":
                self._totals[name, batch.kind] = total
            elif (name, batch.kind) in self._totals:
                expected = self._totals[name, batch.kind]
                row["loss_difference"] = abs(total - expected) / abs(expected)
                row["passed"] = row["loss_difference"] <= LOSS_TOLERANCE[precision]
            if self.device == "cuda":
                row["memory_gib"] = measured["memory_mib"] / 1024
            row |= {
                f"{part}_ms": 1000 * seconds / (self.steps + 1)
                for part, seconds in stopwatch.seconds.items()
            }
            yield f"{name} {precision} {len(batch)} {batch.kind} {batch.images[0].shape[1]}", row

    _totals: dict[tuple[str, str], float] = {}  # noqa: RUF012

    def inference(self, name: str, config: RunConfig, precision: Precision) -> Rows:
        """Measure detection in images of 480x640 one by one and four at once, and evaluation."""
        if precision == "tf32":  # not a choice of inference
            return
        vocabulary = random_vocabulary(CLASSES, config.model.classifier.embedding_dim)
        network = ProxyDetNetwork(config.model, vocabulary).for_inference(torch.device(self.device))
        settings = InferenceConfig(precision=precision, score_threshold=0.0)
        detector = Detector(
            network,
            shortest=config.data.test_shortest_side,
            longest=config.data.test_longest_side,
            inference=settings,
        )
        height, width = (48, 64) if self.quick else (480, 640)
        images = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
        for count in (1, 4):
            for what in ("predict", "evaluate"):

                def work(count: int = count, what: str = what) -> None:
                    found = detector.predict_images(list(images[:count]))
                    if what == "evaluate":
                        for prediction in found:
                            result_rows(prediction, 0, range(CLASSES))

                self._start_peak()
                seconds = self._median(work)
                row = {"images_per_second": count / seconds, "milliseconds": 1000 * seconds}
                if self.device == "cuda":
                    row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                yield f"{what} {name} {precision} batch {count}", row

    def _start_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _median(self, work: Callable[[], None]) -> float:
        times = []
        for _ in range(self.steps + 1):
            start = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))


class Stopwatch:
    """Within this context, the seconds of the parts of training steps are added up; the device is waited for after each."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._since = device, 0.0
        self._running: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Stopwatch:
        for owner, attribute, part in PARTS:
            timed = self._timed(getattr(owner, attribute), part)
            self._stack.enter_context(mock.patch.object(owner, attribute, timed))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _timed(self, inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._next(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._next(None)

        return run

    def _next(self, part: str | None) -> None:
        """Count the time since the last call for the part that was running, and go to another, or back (None)."""
        self._wait()
        now = time.perf_counter()
        if self._running:
            current = self._running[-1]
            self.seconds[current] = self.seconds.get(current, 0.0) + now - self._since
        self._since = now
        if part is None:
            self._running.pop()
        else:
            self._running.append(part)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    root = Path(__file__).resolve().parents[1]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)  # noqa: S607
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": asked.stdout.strip() or "unknown",
    }


def line(name: str, row: dict[str, Any]) -> str:
    """Lay out a row of the table."""
    values = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "passed"
    ]
    failed = "" if row.get("passed", True) else "  FAILED"
    return f"  {name:36} {', '.join(values)}{failed}"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--recipes", nargs="+", default=None, metavar="RECIPE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU; --device cpu --quick tries the script without one", file=sys.stderr)
        return 3
    if options.device == "cuda":
        # The modes need it from CUDA's first use on, and take it back in between.
        os.environ[CUBLAS_VARIABLE] = CUBLAS_WORKSPACE
    start, left_out = time.monotonic(), []
    recipes = options.recipes or (["tiny"] if options.quick else ["r50", "swinb"])
    benchmark = Benchmark(options.device, recipes, quick=options.quick)
    results: dict[str, Any] = {"machine": machine(options.device), "parts": {}}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    failed = 0
    for part, work in benchmark.parts():
        if time.monotonic() - start > 60 * options.minutes:
            left_out.append(part)
            continue
        print(part, flush=True)
        rows = results["parts"][part] = {}
        try:
            for name, row in work():
                rows[name] = row
                failed += not row.get("passed", True)
                print(line(name, row), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            rows["out of memory"] = {"message": str(error).splitlines()[0]}
            print(line("out of memory", rows["out of memory"]), flush=True)
    results |= {"left_out": left_out, "failed": failed, "minutes": (time.monotonic() - start) / 60}
    if left_out:
        print(f"left out after {options.minutes:g} minutes: {'; '.join(left_out)}")
    print(f"{failed} checks failed")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
