"""Download speed and memory on this machine's own network, against curl in the same run.

A server in a process of its own serves one file of random bytes with sendfile. curl and proxydet fetch it in turn
into the same folder; proxydet computes and checks the SHA-256 while it fetches, and waits until the bytes are on the
disk, curl does neither. ``curl then sha256sum`` and ``curl then sync`` are what doing the same by hand costs.

    python benchmarks/download.py --size 1000 --runs 7
    python benchmarks/download.py --size 1000 --json download.json

Ratios are curl's time divided by ours, pair by pair: 1.0 is as fast, more is faster.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from proxydet.files import sha256

_COMMAND = "import sys; from proxydet_cli.main import main; sys.exit(main())"
_DIGEST = (
    'import hashlib,sys; print(hashlib.file_digest(open(sys.argv[1],"rb"),"sha256").hexdigest())'
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the file named on the command line, with ranges."""

    protocol_version = "HTTP/1.1"
    path_served = ""

    def do_GET(self) -> None:
        """Send the file or a byte range of it."""
        with Path(self.path_served).open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            asked = self.headers.get("Range", "")
            first, last = 0, total - 1
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("ETag", '"one"')
            self.end_headers()
            self.wfile.flush()
            while first <= last:
                first += os.sendfile(
                    self.connection.fileno(), file.fileno(), first, last - first + 1
                )

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(path: str) -> None:
    """Serve a file until killed; the port goes to stdout."""
    Handler.path_served = path
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def fetch(address: str, target: str, digest: str, connections: str) -> None:
    """Fetch the file as `proxydet download` does; the seconds go to stdout."""
    from proxydet.artifacts import Artifact, TransferSettings
    from proxydet.artifacts.http import Client
    from proxydet.artifacts.transfer import Transfer

    started = time.perf_counter()
    artifact = Artifact(
        name="it",
        title="it",
        licence="none",
        addresses=(address,),
        target="models/it.bin",
        sha256=digest or None,
    )
    with Client(TransferSettings(connections=int(connections))) as client:
        transfer = Transfer(artifact, Path(target), None, client, lambda _: None)
        transfer.run(take_over=True)
    seconds = time.perf_counter() - started
    print(json.dumps({"transfer_s": seconds}))


def digest_memory(size: str) -> None:
    """Compute the SHA-256 of so many MB without reading anything; the seconds go to stdout."""
    block, digest = os.urandom(1_000_000), hashlib.sha256()
    started = time.perf_counter()
    for _ in range(int(size)):
        digest.update(block)
    print(json.dumps({"transfer_s": time.perf_counter() - started}))


def timed(command: list[str], target: Path) -> dict[str, float]:
    """Run a command after removing what it makes; return wall and CPU seconds, peak memory, and what it says of itself."""
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    os.sync()
    # With byte code, as an installed package has it; the run that is not counted writes it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(target.parent / "bytecode")
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    said = json.loads(out) if out.startswith("{") else {}
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        **said,
    }


def catalogue(folder: Path, address: str, size: int, digest: str) -> Path:
    """Write a catalogue with the file in it."""
    path = folder / "catalogue.toml"
    path.write_text(
        f'[[artifacts]]\nname = "it"\ntitle = "it"\naddresses = ["{address}"]\nlicence = "none"\n'
        f'target = "models/it.bin"\nsize = {size}\nsha256 = "{digest}"\n'
    )
    return path


def measure(source: Path, folder: Path, runs: int) -> dict[str, list[dict[str, float]]]:
    """Fetch in turn by each way, ``runs`` times after one that is not counted."""
    digest, size = sha256(source), source.stat().st_size
    me = [sys.executable, __file__]
    server = subprocess.Popen([*me, "--serve", str(source)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = f"http://127.0.0.1:{int(server.stdout.readline())}/file"
        target, root = folder / "fetched.bin", folder / "root"
        curl = ["curl", "--silent", "--fail", "--output", str(target), address]
        command = [sys.executable, "-c", _COMMAND, "download", "it", "--yes", "--root", str(root)]
        command += ["--catalogue", str(catalogue(folder, address, size, digest))]
        ways: dict[str, tuple[list[str], Path]] = {
            "curl": (curl, target),
            "proxydet, 1 connection": ([*me, "--fetch", address, str(target), digest, "1"], target),
            "proxydet, 4 connections": (
                [*me, "--fetch", address, str(target), digest, "4"],
                target,
            ),
            "proxydet download, 1 c.": ([*command, "--connections", "1"], root),
            "SHA-256 alone": ([*me, "--digest", str(size // 1_000_000)], target),
            "curl then sync": (["sh", "-c", f"{' '.join(curl)} && sync {target}"], target),
            "curl then sha256, sync": (
                ["sh", "-c", f"{' '.join(curl)} && {sys.executable} -c '{_DIGEST}' {target} && sync {target}"],
                target,
            ),
        }  # fmt: skip
        results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for run in range(runs + 1):
            for name, (words, made) in ways.items():
                result = timed(words, made)
                if run:
                    results[name].append(result)
    finally:
        server.kill()
        server.wait()
    return results


def summary(results: dict[str, list[dict[str, float]]], size: int) -> list[str]:
    """Lay out medians and the ratios to curl."""
    lines = [
        f"{'way':26} {'wall s':>7} {'MB/s':>6} {'CPU s':>6} {'peak MB':>8}  curl/this  (least .. most)  transfer only"
    ]
    curls = [result["wall_s"] for result in results["curl"]]

    def of(name: str, key: str) -> float:
        return statistics.median(result.get(key, float("nan")) for result in results[name])

    for name, rows in results.items():
        ratios = [curl / row["wall_s"] for curl, row in zip(curls, rows, strict=True)]
        inner = [
            curl / row["transfer_s"]
            for curl, row in zip(curls, rows, strict=True)
            if "transfer_s" in row
        ]
        wall = of(name, "wall_s")
        lines.append(
            f"{name:26} {wall:7.2f} {size / wall / 1e6:6.0f} {of(name, 'cpu_s'):6.2f} {of(name, 'peak_mb'):8.0f}"
            f"  {statistics.median(ratios):9.2f}  ({min(ratios):.2f} .. {max(ratios):.2f})"
            + (f"  {statistics.median(inner):.2f}" if inner else "")
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=500, help="size of the file in MB")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each way")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder by default"
    )
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    options = parser.parse_args()
    assert shutil.which("curl"), "this benchmark compares with curl, which is not installed"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "source.bin"
        with source.open("wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(1_000_000))
        results = measure(source, Path(name), options.runs)
    print("\n".join(summary(results, options.size * 1_000_000)))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    workers: dict[str, Callable[..., None]] = {
        "--serve": serve,
        "--fetch": fetch,
        "--digest": digest_memory,
    }
    if len(sys.argv) > 1 and sys.argv[1] in workers:
        workers[sys.argv[1]](*sys.argv[2:])
    else:
        main()
