"""Unpacking a zip of many small files, as COCO's are, against unzip and Python's zipfile in the same run.

    python benchmarks/unpack.py --files 118287 --bytes 20000

Every way writes the same files into the same file system; ours writes a journal besides, checks every CRC, and gives
the folder its name only when all is there. Files do not compress, as photographs do not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path


def make(path: Path, files: int, size: int) -> None:
    """Write a zip with so many files of about so many random bytes, stored as they are."""
    chance = random.Random(0)
    pool = os.urandom(2 * size + 1_000_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(files):
            begin, length = chance.randrange(1_000_000), chance.randrange(size // 2, 3 * size // 2)
            archive.writestr(f"train2017/{number:012}.jpg", pool[begin : begin + length])


def by_us(archive: str, folder: str) -> None:
    """Unpack as `proxydet download` does."""
    from proxydet.artifacts.artifact import Artifact, Provided, Unpack
    from proxydet.artifacts.root import Root
    from proxydet.artifacts.unpacking import unpack
    from proxydet.reporting import SILENT

    root = Path(folder)
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    (root / "datasets" / "a.zip").hardlink_to(archive)
    rule = Unpack(folder="datasets", provides=(Provided(path="train2017"),))
    artifact = Artifact(
        name="a",
        title="t",
        licence="l",
        addresses=("https://example.org/a",),
        target="datasets/a.zip",
        unpack=rule,
    )
    unpack(artifact, "0" * 64, Root(root), SILENT)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def by_zipfile(archive: str, folder: str) -> None:
    """Unpack with the standard library."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def timed(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command into an empty folder; return its wall and CPU seconds and what it says of itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, **(json.loads(out) if out.startswith("{") else {})}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=118_287, help="COCO's by default")
    parser.add_argument("--bytes", type=int, default=20_000, help="size of a file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        archive, folder = Path(name) / "a.zip", Path(name) / "out"
        make(archive, options.files, options.bytes)
        me = [sys.executable, __file__]
        ways = {
            "proxydet": [*me, "--us", str(archive), str(folder)],
            "zipfile": [*me, "--zipfile", str(archive), str(folder)],
        }
        if shutil.which("unzip"):
            ways["unzip"] = ["unzip", "-q", str(archive), "-d", str(folder)]
        results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.runs):
            for way, command in ways.items():
                results[way].append(timed(command, folder))
        size = archive.stat().st_size
    for way, rows in results.items():
        wall, cpu, memory = (
            statistics.median(row.get(key, float("nan")) for row in rows)
            for key in ("wall_s", "cpu_s", "peak_mb")
        )
        print(
            f"{way:10} {wall:7.2f} s  {options.files / wall:8.0f} files/s  {size / wall / 1e6:6.0f} MB/s"
            f"  CPU {cpu:6.2f} s  peak {memory:.0f} MB"
        )


if __name__ == "__main__":
    workers: dict[str, Callable[[str, str], None]] = {"--us": by_us, "--zipfile": by_zipfile}
    if len(sys.argv) > 1 and sys.argv[1] in workers:
        workers[sys.argv[1]](*sys.argv[2:])
    else:
        main()
