"""Load on `proxydet serve`: many clients at once, and rude ones among them; latency, refusals, memory.

    python benchmarks/serve.py [--run FOLDER] [--pictures FOLDER] [--clients 32] [--seconds 60]

Without a run, a model of the quickstart's size with fresh weights, and drawn pictures of the quickstart's size. Every
answer is compared with that of `Detector.predict` in this process. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from proxydet.config import dump_yaml
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import get_recipe
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

PROGRAM = "import sys; from proxydet_cli.main import main; sys.exit(main(sys.argv[1:]))"
THRESHOLD = 0.1
EXPECTED = {400, 403, 404, 405, 408, 413, 415}


def fresh_run(folder: Path, data: Path) -> Path:
    """Write a run folder with a quickstart's model and fresh weights."""
    encoder = CompositionalEncoder.load(data / "text_encoder.json")
    names = [" ".join(pair) for pair in zip(encoder.words, list(encoder.words)[1:], strict=False)]
    recipe = get_recipe("quickstart")
    vocabulary = Vocabulary.from_arrays(names, encoder.encode(names))
    torch.manual_seed(0)
    network = ProxyDetNetwork(recipe.model, vocabulary)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(recipe))
    vocabulary.save(folder / "vocabulary.npz")
    encoder.save(folder / "text_encoder.json")
    torch.save({"model": network.state_dict()}, folder / "model_final.pth")
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """A picture, the words asked for, and the answer that is right."""

    data: bytes
    words: str
    wanted: dict[str, Any]


def make_cases(detector: Detector, pictures: list[Path]) -> tuple[list[Case], float]:
    """Look at the pictures in this process; also seconds a picture, the files' decoding included."""
    names = detector.vocabulary.names
    asked = [list(names), list(names[:3]), [names[0]]]
    for words in asked:
        detector.predict(pictures[0], words)
    cases, spent = [], 0.0
    for index, path in enumerate(pictures):
        words = asked[index % len(asked)]
        began = time.perf_counter()
        found = detector.predict(path, words, score_threshold=THRESHOLD).to_dict()
        spent += time.perf_counter() - began
        wanted = json.loads(json.dumps(found))
        cases.append(Case(path.read_bytes(), ", ".join(words), wanted))
    return cases, spent / len(cases)


class Load:
    """Clients, their latencies and what went wrong."""

    def __init__(self, address: str, cases: list[Case], seconds: float) -> None:
        self.address = address
        self.cases = cases
        self.end = time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.rude: Counter[str] = Counter()
        self.latencies: list[float] = []

    async def client(self, seed: int) -> None:
        """Ask without a pause until the end; come back when told to."""
        choose = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.address, timeout=120) as http:
            while time.monotonic() < self.end:
                case = choose.choice(self.cases)
                began = time.perf_counter()
                answer = await http.post(
                    "api/predict",
                    files={"picture": ("a.jpg", case.data)},
                    data={"words": case.words, "score_threshold": str(THRESHOLD)},
                )
                if answer.status_code == 503:
                    self.statuses["503"] += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                    continue
                self.latencies.append(time.perf_counter() - began)
                right = answer.status_code == 200 and {**answer.json(), "file": None} == {
                    **case.wanted,
                    "file": None,
                }
                self.statuses[str(answer.status_code) if right else "wrong"] += 1

    async def rude_client(self, seed: int) -> None:
        """Send what nobody should, one thing after the other."""
        choose = random.Random(seed)
        host, port = self.address.split("//")[1].strip("/").split(":")
        while time.monotonic() < self.end:
            name, request = choose.choice(list(rude_requests(choose).items()))
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(request)
                await writer.drain()
                if name in ("gone in mid-upload", "slow head"):
                    await asyncio.sleep(0.2)
                    self.rude[f"{name}: left"] += 1
                    continue
                line = await asyncio.wait_for(reader.readline(), 120)
                status = int(line.split()[1])
                self.rude[
                    f"{name}: {status if status in EXPECTED else f'UNEXPECTED {status}'}"
                ] += 1
            except ConnectionError:
                self.rude[f"{name}: closed"] += 1
            finally:
                writer.close()
            await asyncio.sleep(0.05)

    async def run(self, clients: int, rude: int, process: int) -> dict[str, float]:
        """Let all clients run to the end; the server's memory at half time."""
        jobs = [self.client(seed) for seed in range(clients)]
        jobs += [self.rude_client(seed) for seed in range(rude)]
        running = asyncio.gather(*jobs)
        await asyncio.sleep((self.end - time.monotonic()) / 2)
        half = memory_mib(process)
        await running
        return half


def rude_requests(choose: random.Random) -> dict[str, bytes]:
    """Requests that must be refused, or that their client leaves."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    bomb = bytearray(png.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    noise = choose.randbytes(3000)
    form = b"--x\r\nContent-Disposition: form-data; name=picture; filename=a\r\n\r\n"
    many = b"--x\r\nContent-Disposition: form-data; name=words\r\n\r\na\r\n" * 100

    def post(body: bytes, kind: str = "image/png", length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        head = f"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {size}\r\n\r\n".encode() + body

    boundary = "multipart/form-data; boundary=x"
    return {
        "decompression bomb": post(bytes(bomb)),
        "no picture": post(noise),
        "cut picture": post(b"\xff\xd8\xff\xe0" + noise),
        "broken form": post(form + noise, boundary),
        "many fields": post(many + b"--x--\r\n", boundary),
        "stated too large": post(noise, length=10**10),
        "too large in pieces": b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 21,
        "gone in mid-upload": post(noise, length=1_000_000),
        "slow head": b"POST /api/pre",
        "other host": b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "traversal": b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "no HTTP": noise[:200] + b"\r\n\r\n",
    }


def memory_mib(process: int) -> dict[str, float]:
    """Resident memory of a process now, and at its highest, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    shown = np.percentile(seconds, [50, 90, 95, 99, 100]) * 1000
    return dict(zip(("p50", "p90", "p95", "p99", "max"), shown.round(1).tolist(), strict=True))


def measure(run: Path, pictures: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Start the server, warm it up, load it, stop it."""
    detector = Detector.from_run(run, device="cpu")
    cases, alone = make_cases(detector, pictures)
    command = [sys.executable, "-c", PROGRAM, "serve", "--run", str(run), "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["address"]
            one = Load(address, cases, options.seconds / 6)
            asyncio.run(one.run(1, 0, server.pid))
            before = memory_mib(server.pid)
            began = time.monotonic()
            load = Load(address, cases, options.seconds)
            half = asyncio.run(load.run(options.clients, options.rude, server.pid))
            spent = time.monotonic() - began
            after = memory_mib(server.pid)
            server.terminate()
            code = server.wait(60)
        finally:
            server.kill()
    return {
        "in this process, seconds a picture": round(alone, 4),
        "one client": {
            "requests a second": round(sum(one.statuses.values()) / (options.seconds / 6), 2),
            "milliseconds": percentiles(one.latencies),
        },
        "clients": options.clients,
        "seconds": round(spent, 1),
        "answers": dict(load.statuses),
        "answers a second": round(load.statuses["200"] / spent, 2),
        "milliseconds": percentiles(load.latencies),
        "rude": dict(sorted(load.rude.items())),
        "memory, MiB": {
            "before": round(before["VmRSS"]),
            "at half time": round(half["VmRSS"]),
            "after": round(after["VmRSS"]),
            "highest": round(after["VmHWM"]),
        },
        "detections a picture": round(
            statistics.mean(len(case.wanted["detections"]) for case in cases), 1
        ),
        "exit code": code,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rude", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        make_dataset(data, SyntheticConfig(images_train=2, images_val=12))
        run = options.run or fresh_run(Path(temporary) / "run", data)
        pictures = sorted((options.pictures or data / "val").glob("*.jpg"))[:24]
        print(json.dumps(measure(run, pictures, options), indent=2))


if __name__ == "__main__":
    main()
