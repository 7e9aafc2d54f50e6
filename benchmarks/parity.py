"""Compares the full-size detectors with the numbers recorded from the published implementation, and prints a table.

::

    python benchmarks/parity.py FOLDER [--only r50|swinb|functions] [--seed N] [--trim]

FOLDER holds ``parity_r50.npz``, ``parity_swinb.npz``, ``parity_functions.npz`` and ``parity_trajectory.npz``. Takes about 5
minutes on 2 CPU cores and 4 GB of memory. Weights are made from the parameters' names and a seed: the value ``seed`` of a file,
or ``--seed`` where it holds none (11, that of the committed files). ``--trim`` writes the small fixtures that the tests use instead of comparing.
Exit code 1 when a group is out of tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import parity_path  # noqa: F401
from parity_functions import compare_functions, compare_training_functions
from parity_groups import (
    Row,
    compare_inference,
    compare_training,
    compare_trajectory,
    compare_vocabulary,
)
from parity_model import SEED, TRIMMED, Kind, network_of, seed_of
from parity_trim import base_classes, write_trimmed


def rows_of(folder: Path, part: str, seed: int = SEED) -> Iterator[Row]:
    """Compare one part with the full fixtures of a folder; the seed is that of files that do not hold theirs."""
    if part == "functions":
        functions = _load(folder / "parity_functions.npz")
        yield from compare_functions(functions)
        yield from compare_training_functions(functions)
        return
    kind: Kind = "swinb" if part == "swinb" else "r50"
    fixture = _load(folder / f"parity_{kind}.npz")
    network = network_of(kind, base_classes(TRIMMED), seed_of({"seed": np.array(seed), **fixture}))
    for index in range(2):
        yield from compare_inference(network, fixture, index)
    for row in compare_inference(network.prepared(), fixture, 0):
        yield dataclasses.replace(row, group=f"{row.group}, prepared")
    yield from compare_vocabulary(network, fixture)
    yield from compare_training(network, fixture)
    if kind == "r50":
        trajectory = _load(folder / "parity_trajectory.npz")
        yield from compare_trajectory(network, fixture, trajectory)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("functions", "r50", "swinb"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--trim", action="store_true")
    arguments = parser.parse_args()
    if arguments.trim:
        write_trimmed(arguments.folder, TRIMMED)
        return 0
    failed = 0
    print(f"{'part':10} {'group':44} {'difference':>11} {'tolerance':>10}  unit")
    for part in (arguments.only,) if arguments.only else ("functions", "r50", "swinb"):
        for row in rows_of(arguments.folder, part, arguments.seed):
            failed += not row.passed
            verdict = "" if row.passed else "  FAILED"
            print(
                f"{part:10} {row.group:44} {row.difference:11.2e} {row.tolerance:10.0e}  {row.unit}{verdict}",
                flush=True,
            )
    print(f"{failed} groups out of tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
