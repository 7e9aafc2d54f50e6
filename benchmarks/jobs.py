"""Measures `proxydet predict --save jsonl` on many small images: workers against one, memory over time, what kill -9 costs.

::

    python benchmarks/jobs.py --run RUN [--images 10000] [--workers 2] [--json FILE]

Images of 96 x 96 pixels are drawn (rectangles and ellipses, JPEG), 20 different ones under as many names as asked for. Each process
has one thread. Seconds are those of the whole command, start and loading included, and of the images alone (from the first to the last
finished part). Memory is the resident memory of all processes of the command, in MB, sampled each second: the mean of the second and the last fifth
of the run. Then a run with workers is killed (the command and all its workers, kill -9) in the middle and continued.
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
import tempfile
import time
from pathlib import Path
from statistics import mean

from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parents[1]


def draw_images(folder: Path, count: int) -> None:
    """Draw 20 images, and link them under ``count`` names."""
    rng = random.Random(0)
    folder.mkdir()
    for index in range(min(count, 20)):
        image = Image.new("RGB", (96, 96), tuple(rng.randrange(256) for _ in range(3)))
        canvas = ImageDraw.Draw(image)
        for _ in range(4):
            x, y, w, h = (
                rng.randrange(70),
                rng.randrange(70),
                rng.randrange(10, 40),
                rng.randrange(10, 40),
            )
            shape = rng.choice([canvas.rectangle, canvas.ellipse])
            shape((x, y, x + w, y + h), fill=tuple(rng.randrange(256) for _ in range(3)))
        image.save(folder / f"{index:06d}.jpg", quality=92)
    for index in range(20, count):
        os.link(folder / f"{index % 20:06d}.jpg", folder / f"{index:06d}.jpg")


def tree(pid: int) -> list[int]:
    """The process and its children, at any depth."""
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in listed.read_text().split()]
            except OSError:
                continue
    return found


def resident(pid: int) -> float:
    """Resident memory of a process and its children in MB; of a page that several share, each has its part."""
    total = 0
    for one in tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += int(text.partition("\nPss:")[2].split()[0] if "\nPss:" in text else 0)
    return total * 1024 / 1e6


def finished(output: Path) -> int:
    """Images in finished parts."""
    lines = [
        line for path in output.glob("finished/*.jsonl") for line in path.read_text().splitlines()
    ]
    return sum(json.loads(line)["images"] for line in lines)


def predict(
    run: Path, images: Path, output: Path, workers: int, kill_after: int | None = None
) -> dict[str, float]:
    """Run the command; with ``kill_after``, kill it with its workers when so many images are finished."""
    words = [
        sys.executable,
        "-m",
        "proxydet_cli",
        "predict",
        images,
        "--run",
        run,
        "--device",
        "cpu",
    ]
    words += [
        "--save",
        "jsonl",
        "--output",
        output,
        "--workers",
        str(workers),
        "--precision",
        "fp32",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    start, samples, first = time.perf_counter(), [], None
    with subprocess.Popen(
        list(map(str, words)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            if first is None and any(output.glob("parts/*.jsonl")):
                first = time.perf_counter(), finished(output)
            samples.append(resident(process.pid))
            if kill_after is not None and finished(output) >= kill_after:
                for pid in tree(process.pid):
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.2 if kill_after is not None else 1)
        _, errors = process.communicate()
    wall = time.perf_counter() - start
    if kill_after is None and process.returncode:
        raise SystemExit(errors)
    fifth = max(1, len(samples) // 5)
    done = finished(output)
    begun, before = first or (start, 0)
    return {
        "seconds": round(wall, 1),
        "images": done,
        "images_per_second": round((done - before) / max(time.perf_counter() - begun, 1e-9), 2),
        "mb_early": round(mean(samples[fifth : 2 * fifth] or samples), 1),
        "mb_late": round(mean(samples[-fifth:]), 1),
        "mb_most": round(max(samples), 1),
    }


def main() -> None:
    """Measure, and print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        images, results = Path(place) / "images", {}
        draw_images(images, asked.images)
        for workers in (1, asked.workers):
            output = Path(place) / f"out{workers}"
            results[f"{workers} workers"] = predict(asked.run, images, output, workers)
            print(f"{workers} workers: {results[f'{workers} workers']}", flush=True)
        killed = Path(place) / "killed"
        first = predict(asked.run, images, killed, asked.workers, kill_after=asked.images // 2)
        lost_parts = len(list(killed.glob("parts/.*")))
        second = predict(asked.run, images, killed, asked.workers)
        same = all(
            (killed / "parts" / path.name).read_bytes() == path.read_bytes()
            for path in (Path(place) / "out1" / "parts").iterdir()
        )
        results["killed"] = {
            **first,
            "parts_lost": lost_parts,
            "continued": second,
            "same_rows": same,
        }
        print(f"killed: {results['killed']}")
        shutil.rmtree(killed)
    one, many = results["1 workers"]["seconds"], results[f"{asked.workers} workers"]["seconds"]
    results["speedup"] = round(one / many, 3)
    print(f"{asked.workers} workers against 1: {one / many:.2f} times as fast")
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
