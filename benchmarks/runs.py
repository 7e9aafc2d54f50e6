"""Trainings that are doubled and killed: is what remains the run that nobody disturbed?

::

    python benchmarks/runs.py doubled FOLDER [--times 20]
    python benchmarks/runs.py killed FOLDER [--times 50] [--processes 1] [--workers 2]

``doubled`` starts ``proxydet train`` twice at once in one folder: with the same settings, another seed, another rate, with
``--resume auto``, ``never`` and ``--overwrite``. ``killed`` ends trainings by SIGKILL at random moments: while a store, a checkpoint
or a log line is being written, or anywhere, several times a run. What they leave is compared with an undisturbed run: weights
and log lines bit for bit (times aside), and which files there are. Prints JSON; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from proxydet.data.synthetic import SyntheticConfig, make_dataset

ITERATIONS = 12
SECONDS = ("step_seconds", "data_seconds", "images_per_second", "memory_mib", "time")
DOUBLES: dict[str, tuple[str, ...]] = {
    "same": (),
    "other seed": ("--set", "seed=8"),
    "other rate": ("--set", "training.optimizer.learning_rate=3e-4"),
    "--resume auto": ("--resume", "auto"),
    "--resume never": ("--resume", "never"),
    "--overwrite": ("--overwrite",),
}


class Trainings:
    """Starts trainings of one small data set below a folder."""

    def __init__(self, folder: Path, *, processes: int = 1, workers: int = 0) -> None:
        self.folder = folder
        drawn = SyntheticConfig(
            images_train=24,
            images_val=4,
            image_label_images_per_class=2,
            size=96,
            image_label_size=48,
        )
        sets = [
            f"data.description={make_dataset(folder / 'data', drawn)}",
            f"data.workers={workers}",
            f"training.iterations={ITERATIONS}",
            "training.checkpoints.period=2",
            "training.log.period=1",
            "training.log.tensorboard=false",
            "training.threads=1",
        ]
        self._words = [word for item in sets for word in ("--set", item)]
        self._words += ["--recipe", "tiny", "--device", "cpu", "--gpus", str(processes)]

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        """Start one in ``name``; its cache is in ``name.cache``."""
        command = [sys.executable, "-m", "proxydet_cli", "train", "--output", name, *self._words]
        return subprocess.Popen(
            [*command, "--set", f"data.cache={self.folder / f'{name}.cache'}", *words],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Return the exit code and what was written to stderr."""
        with process:
            _, errors = process.communicate(timeout=1800)
        return process.returncode, errors

    def content(self, name: str) -> dict[str, Any]:
        """Return what is left of a run: weights, log lines without times, names of files."""
        folder = self.folder / name
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = [
            str(path.relative_to(self.folder)).replace(name, "NAME", 1)
            for place in (folder, self.folder / f"{name}.cache")
            for path in place.rglob("*")
            if path.is_file() and "logs" not in path.parts
        ]
        return {
            "weights": torch.load(folder / "model_final.pth", weights_only=True)["model"],
            "log": [{k: v for k, v in r.items() if k not in SECONDS} for r in records],
            "evaluations": (folder / "evaluations.jsonl").read_text(),
            "files": sorted(files),
        }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what differs between two runs."""
    left, right = one["weights"], other["weights"]
    found = [name for name in ("log", "evaluations") if one[name] != other[name]]
    if left.keys() != right.keys() or any(not torch.equal(left[n], right[n]) for n in left):
        found.append("weights")
    return found + sorted({*one["files"]} ^ {*other["files"]})


def doubled(trainings: Trainings, times: int) -> list[dict[str, Any]]:
    """Start two at once, again and again."""
    alone: dict[tuple[str, ...], dict[str, Any]] = {}
    results = []
    for number in range(times):
        kind = list(DOUBLES)[number % len(DOUBLES)]
        name = f"run{number}"
        asked: list[tuple[str, ...]] = [(), DOUBLES[kind]]
        if number // len(DOUBLES) % 2:
            asked.reverse()
        started, began = [trainings.start(name, *words) for words in asked], time.monotonic()
        while all(process.poll() is None for process in started):
            time.sleep(0.05)
        seconds = time.monotonic() - began
        ended = [trainings.finish(process) for process in started]
        codes = [code for code, _ in ended]
        wrong = []
        if sorted(codes) != [0, 5]:
            wrong = [f"exit codes {codes}: {ended}"]
        else:
            winner = codes.index(0)
            if f"process {started[winner].pid} on" not in ended[1 - winner][1].replace("\n", " "):
                wrong.append(f"does not say who holds the folder: {ended[1 - winner][1]}")
            settings = asked[winner] if "--set" in asked[winner] else ()
            if settings not in alone:
                only = f"alone{len(alone)}"
                code, errors = trainings.finish(trainings.start(only, *settings))
                assert code == 0, errors
                alone[settings] = trainings.content(only)
            wrong += differences(trainings.content(name), alone[settings])
        results.append({"kind": kind, "loser_exits_after_s": round(seconds, 1), "wrong": wrong})
        sys.stderr.write(f"{results[-1]}\n")
        for path in (trainings.folder / name, trainings.folder / f"{name}.cache"):
            shutil.rmtree(path, ignore_errors=True)
    return results


def killed(trainings: Trainings, times: int) -> list[dict[str, Any]]:
    """Kill at random moments until so many kills are done, each run several times, and let each run end."""
    began = time.monotonic()
    code, errors = trainings.finish(trainings.start("whole"))
    assert code == 0, errors
    whole, longest = trainings.content("whole"), time.monotonic() - began
    results: list[dict[str, Any]] = []
    kills, at, log_size = 0, [0.0], [0]
    while kills < times:
        name = f"run{len(results)}"
        folder, cache = trainings.folder / name, trainings.folder / f"{name}.cache"
        moments: dict[str, Callable[[], object]] = {
            "store": lambda cache=cache: any(cache.rglob(".*.tmp")),
            "checkpoint": lambda folder=folder: any((folder / "checkpoints").glob(".*.tmp")),
            "log": lambda folder=folder: size(folder / "metrics.jsonl") > log_size[0],
            "evaluation": lambda folder=folder: any(folder.glob("evaluations/*/predictions/part*")),
            "anywhere": lambda: time.monotonic() > at[0],
        }
        done = []
        order = [
            "store",
            *random.sample(["checkpoint", "checkpoint", "log", "anywhere", "anywhere"], 5),
            "evaluation",
        ]
        for kind in order:
            if kills == times:
                break
            at[0] = time.monotonic() + random.uniform(0.2, 1.0) * longest
            log_size[0] = size(folder / "metrics.jsonl")
            process = trainings.start(name)
            # Somewhere within what is being written.
            delay = random.uniform(0, 0.01) if kind in ("store", "checkpoint", "log") else 0
            while process.poll() is None and not moments[kind]():
                time.sleep(0.0005)
            time.sleep(delay)
            process.kill()
            code, errors = trainings.finish(process)
            kills += code == -signal.SIGKILL
            done.append(f"{kind}: {'killed' if code == -signal.SIGKILL else code}")
            if code not in (0, -signal.SIGKILL):
                done.append(errors)
        code, errors = trainings.finish(trainings.start(name))
        wrong = (
            [f"exit code {code}: {errors}"] if code else differences(trainings.content(name), whole)
        )
        results.append({"kills": done, "wrong": wrong})
        sys.stderr.write(f"{results[-1]}\n")
        if not wrong:
            for path in (folder, cache):
                shutil.rmtree(path, ignore_errors=True)
    return results


def size(path: Path) -> int:
    """Return the size of a file that may be absent, in bytes."""
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("doubled", "killed"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7, help="of the moments")
    given = parser.parse_args()
    random.seed(given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(given.folder.resolve(), processes=given.processes, workers=given.workers)
    if given.job == "doubled":
        results = doubled(trainings, given.times or 20)
    else:
        results = killed(trainings, given.times or 50)
    wrong = sum(bool(result["wrong"]) for result in results)
    sys.stdout.write(json.dumps({"results": results, "wrong": wrong}, indent=2) + "\n")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
