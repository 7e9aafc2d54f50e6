"""Start-up times of the command line: median of ten fresh processes each, in milliseconds.

Run as ``python benchmarks/startup.py``; ``--json`` writes the numbers as JSON.
"""

from __future__ import annotations

import json
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


def median_milliseconds(command: list[str]) -> float:
    """Run a command :data:`RUNS` times after one run that warms the file cache; the median wall time."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    results = {name: round(median_milliseconds(command), 1) for name, command in cases().items()}
    if "--json" in sys.argv[1:]:
        print(json.dumps(results, indent=2))
        return
    for name, milliseconds in results.items():
        print(f"{milliseconds:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
