"""Unpacking a zip of many small files, as COCO's are, against unzip and Python's zipfile in the same run.

    python benchmarks/unpack.py                      # train2017's number and sizes: 39 GB of room for 19 GB of files
    python benchmarks/unpack.py --files 12000 --runs 5 --folder /mnt/disk

Every way is a process of its own that writes the same files into the same file system and checks every CRC; ours
writes a journal and a listing besides, and gives the folder its name only when all is there. Before each, what earlier
ones wrote is removed and synced, and the archive is dropped from memory, so that all read it from the disk. After
each, the file system is synced, in the same way for all; both times are told, without that sync and with it. The order
of the ways is another one in each round. Files do not compress, as photographs do not; their sizes are spread evenly
from half of ``--bytes`` to one and a half times it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

_ROOM_TO_SPARE = 1 << 30


def make(archive: str, files: str, size: str) -> None:
    """Write a zip with so many files of about so many random bytes, stored as they are."""
    mean, chance = int(size), random.Random(0)
    pool = os.urandom(2 * mean + 1_000_000)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as opened:
        for number in range(int(files)):
            begin, length = chance.randrange(1_000_000), chance.randrange(mean // 2, 3 * mean // 2)
            opened.writestr(f"train2017/{number:012}.jpg", pool[begin : begin + length])


def by_us(archive: str, folder: str) -> None:
    """Unpack as `proxydet download` does."""
    import threading

    from proxydet.artifacts import Provided, Unpack
    from proxydet.artifacts.archives import unpack
    from proxydet.reporting import SILENT

    data = Path(folder) / "datasets"
    data.mkdir(parents=True, exist_ok=True)
    (data / "a.zip").hardlink_to(archive)
    unpack(
        data / "a.zip",
        Unpack(folder="datasets", provides=(Provided(path="train2017"),)),
        folder=data,
        listing=data / "a.tsv",
        digest="0" * 64,
        progress=SILENT,
        stop=threading.Event(),
    )


def by_zipfile(archive: str, folder: str) -> None:
    """Unpack with the standard library."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)


@dataclass(frozen=True)
class Run:
    """What one way took once."""

    wall_s: float
    """Seconds until the process ended."""
    synced_s: float
    """Seconds until the file system was synced."""
    cpu_s: float
    """Seconds of all its threads, in user and system."""
    peak_mb: float
    """Largest memory; never below that of the process that started it, which Linux counts in."""


def timed(command: list[str], archive: Path, folder: Path) -> Run:
    """Run a command that unpacks an archive into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sync(folder)
    with archive.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    sync(folder)
    synced = time.perf_counter() - started
    return Run(wall, synced, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def sync(folder: Path) -> None:
    """Wait until everything on a folder's file system is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)


def require_room(folder: Path, needed: int) -> None:
    """End with a message where the archive and its files do not fit."""
    free = shutil.disk_usage(folder).free
    if needed + _ROOM_TO_SPARE > free:
        raise SystemExit(
            f"{(needed + _ROOM_TO_SPARE) / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free: "
            "name another --folder, or fewer --files."
        )


def environment(folder: Path) -> str:
    """Say what was measured where: date, machine, versions, file system, commit."""
    here = Path(__file__).parent

    def told(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, cwd=here, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    kind = told("stat", "-f", "-c", "%T", str(folder)) or "unknown"
    changed = " with changes" if told("git", "status", "--porcelain") else ""
    commit = told("git", "rev-parse", "--short", "HEAD") or "unknown"
    unzip = told("unzip", "-v").partition(", by ")[0].rstrip(",") or "no unzip"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{date.today()}; {os.cpu_count()} cores, {model or platform.machine()}; {platform.system()} "
        f"{platform.release()}; Python {platform.python_version()}; {unzip}; file system {kind}; "
        f"commit {commit}{changed}; load at the start {load}"
    )


def spread(values: list[float], digits: int = 2) -> str:
    """Write the median of some values, and the least and the most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def table(results: dict[str, list[Run]], files: int, size: int, floor_mb: float) -> list[str]:
    """Lay out medians and spreads as Markdown; ratios are taken round by round."""
    base = "unzip" if "unzip" in results else "zipfile"
    lines = [
        f"| way | s | s with sync | files/s with sync | MB/s with sync | CPU s | peak MB | {base} / this, with sync |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, runs in results.items():
        synced = statistics.median(run.synced_s for run in runs)
        peak = max(run.peak_mb for run in runs)
        ratios = [
            theirs.synced_s / run.synced_s for theirs, run in zip(results[base], runs, strict=True)
        ]
        cells = (
            way,
            spread([run.wall_s for run in runs]),
            spread([run.synced_s for run in runs]),
            f"{files / synced:.0f}",
            f"{size / synced / 1e6:.0f}",
            spread([run.cpu_s for run in runs]),
            f"{peak:.0f}" if peak > 1.05 * floor_mb else f"not above {floor_mb:.0f}",
            spread(ratios),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=118_287, help="COCO train2017's by default")
    parser.add_argument("--bytes", type=int, default=163_000, help="mean size; COCO's by default")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    require_room(options.folder, 2 * options.files * options.bytes)
    print(environment(options.folder), flush=True)
    me = [sys.executable, __file__]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        archive, folder = Path(name) / "a.zip", Path(name) / "out"
        # In a process of its own: what this one takes is counted into the peak of all that it starts.
        subprocess.run(
            [*me, "--make", str(archive), str(options.files), str(options.bytes)], check=True
        )
        size = archive.stat().st_size
        print(f"{options.files} files, {size / 1e9:.2f} GB, {options.runs} rounds", flush=True)
        ways = {
            "proxydet": [*me, "--us", str(archive), str(folder)],
            "zipfile": [*me, "--zipfile", str(archive), str(folder)],
        }
        if shutil.which("unzip"):
            ways["unzip"] = ["unzip", "-q", str(archive), "-d", str(folder)]
        floor = timed(["true"], archive, folder).peak_mb
        results: dict[str, list[Run]] = {way: [] for way in ways}
        for number in range(options.runs):
            order = list(ways)
            for way in order[number % len(order) :] + order[: number % len(order)]:
                results[way].append(timed(ways[way], archive, folder))
    print("\n".join(table(results, options.files, size, floor)))


if __name__ == "__main__":
    workers: dict[str, Callable[..., None]] = {
        "--make": make,
        "--us": by_us,
        "--zipfile": by_zipfile,
    }
    if len(sys.argv) > 1 and sys.argv[1] in workers:
        workers[sys.argv[1]](*sys.argv[2:])
    else:
        main()
