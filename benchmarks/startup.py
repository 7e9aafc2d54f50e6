"""Start-up times of the command line: medians of ten fresh processes each, in milliseconds.

Run as ``python benchmarks/startup.py``; ``--json`` writes the numbers as JSON. Wall time is what a user waits;
processor time (user and system) is what it comes to on a machine that does nothing else.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from proxydet_cli.app import COMMANDS

RUNS = 10


def cases() -> dict[str, list[str]]:
    """What is measured: a name and the command of each."""
    program = str(Path(sysconfig.get_path("scripts")) / "proxydet")
    helps = {f"proxydet {name} --help": [program, name, "--help"] for name in COMMANDS}
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import proxydet": [sys.executable, "-c", "import proxydet"],
        "proxydet --version": [program, "--version"],
        "proxydet --help": [program, "--help"],
        **helps,
    }


def measure(command: list[str]) -> dict[str, float]:
    """Run a command :data:`RUNS` times after one run that warms the file cache; median milliseconds."""
    wall, processor = [], []
    for _ in range(RUNS + 1):
        start, used = time.perf_counter(), _processor_seconds()
        subprocess.run(command, check=True, capture_output=True)
        wall.append(1000 * (time.perf_counter() - start))
        processor.append(1000 * (_processor_seconds() - used))
    return {
        "wall": round(statistics.median(wall[1:]), 1),
        "processor": round(statistics.median(processor[1:]), 1),
    }


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    results = {name: measure(command) for name, command in cases().items()}
    if "--json" in sys.argv[1:]:
        print(json.dumps(results, indent=2))
        return
    print("    wall  processor")
    for name, times in results.items():
        print(f"{times['wall']:8.1f} {times['processor']:10.1f}  {name}")


if __name__ == "__main__":
    main()
