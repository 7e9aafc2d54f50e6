"""Measures the annotation store against ``json`` and ``lvis.LVIS`` on a generated file like LVIS v1 train.

::

    python benchmarks/store.py build             # build, reopen, json.load, lvis.LVIS: seconds and memory
    python benchmarks/store.py workers           # memory of a process with 4 loader workers that read everything
    python benchmarks/store.py tars              # indexing 997 tars, files per second

``--scale 0.2`` makes the file a fifth of LVIS's 1.1 GB (100,000 images, 1.27 M annotations). Files go to a temporary folder.
Each measurement runs in a process of its own. ``--json FILE`` keeps the figures. Times of a busy machine are ratios at best.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

IMAGES, ANNOTATIONS, CATEGORIES = 100_000, 1_270_000, 1203
POINTS = 49
"""Mean number of polygon points of an annotation, which makes the file 1.1 GB as LVIS's is."""
WORKERS = 4


def generate(path: Path, scale: float) -> dict[str, Any]:
    """Write an LVIS-like file and return what is in it."""
    rng = np.random.default_rng(0)
    images, annotations = round(IMAGES * scale), round(ANNOTATIONS * scale)
    weights = 1 / np.arange(1, CATEGORIES + 1)
    category = rng.choice(CATEGORIES, annotations, p=weights / weights.sum()) + 1
    owner = np.sort(rng.integers(images, size=annotations)) + 1
    points = rng.geometric(1 / (POINTS - 4), annotations) + 3
    with path.open("w") as file:
        file.write('{"info": {}, "annotations": [')
        for index in range(annotations):
            x, y, w, h = (round(float(v), 2) for v in rng.uniform(5, 200, 4))
            polygon = (rng.random((points[index], 2)) * (w, h) + (x, y)).round(2).ravel().tolist()
            record = {
                "area": round(w * h / 2, 2),
                "id": index + 1,
                "segmentation": [polygon],
                "image_id": int(owner[index]),
                "bbox": [x, y, w, h],
                "category_id": int(category[index]),
            }
            file.write(("," if index else "") + json.dumps(record))
        file.write('], "images": ')
        json.dump([_image(i, rng) for i in range(1, images + 1)], file)
        file.write(', "categories": ')
        groups = "rcf"
        json.dump(
            [{"id": i, "name": f"class {i}", "frequency": groups[i % 3], "synset": f"s{i}.n.01", "synonyms": [], "def": "",
              "image_count": 10, "instance_count": 20} for i in range(1, CATEGORIES + 1)],
            file,
        )  # fmt: skip
        file.write("}")
    return {"bytes": path.stat().st_size, "images": images, "annotations": annotations}


def _image(number: int, rng: np.random.Generator) -> dict[str, Any]:
    negatives = rng.integers(1, CATEGORIES + 1, 8).tolist()
    return {
        "id": number,
        "height": 480,
        "width": 640,
        "coco_url": f"http://images.cocodataset.org/train2017/{number:012}.jpg",
        "flickr_url": f"http://farm1.staticflickr.com/{number}/{number}.jpg",
        "license": 1,
        "neg_category_ids": negatives,
        "not_exhaustive_category_ids": [],
    }


class PeakMemory:
    """Largest resident memory of this process while a block runs, sampled: all, and without mapped files."""

    def __enter__(self) -> PeakMemory:
        self.rss = self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.rss = max(self.rss, _status("VmRSS"))
            self.anonymous = max(self.anonymous, _status("RssAnon"))


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def measure(job: str, source: Path, cache: Path) -> dict[str, float]:
    """Run one job here and return seconds and megabytes."""
    before = _status("VmRSS")
    if job == "store":
        from proxydet.data.store import AnnotationStore
    elif job == "lvis":
        from proxydet.runtime.lvis_api import LVIS
    before = _status("VmRSS")
    with PeakMemory() as peak:
        start, busy = time.perf_counter(), time.process_time()
        if job == "store":
            kept: Any = AnnotationStore.open(source, cache=cache)
            for row in (0, len(kept) // 2, len(kept) - 1):
                kept.record(row)
        elif job == "json":
            with source.open() as file:
                kept = json.load(file)
        else:
            kept = LVIS(str(source))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        time.sleep(0.05)
    return {
        "seconds": round(seconds, 3),
        "processor_seconds": round(busy, 3),
        "added_MB": round((_status("VmRSS") - before) / 1e6, 1),
        "peak_MB": round(peak.rss / 1e6, 1),
        "peak_without_files_MB": round(peak.anonymous / 1e6, 1),
    }


def run_build(folder: Path, scale: float, *, lists: bool = True) -> dict[str, Any]:
    """Build, reopen, and read by the usual means (unless ``lists`` is off: these need 7 GB at full size)."""
    source, cache = folder / "lvis.json", folder / "cache"
    result: dict[str, Any] = {"file": generate(source, scale)}
    print(result["file"], flush=True)
    jobs = {"store, first time": "store", "store, again": "store"}
    if lists:
        jobs |= {"json.load": "json", "lvis.LVIS": "lvis"}
    for name, job in jobs.items():
        command = [sys.executable, __file__, "one", "--job", job, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:20} {result[name]}", flush=True)
    (store,) = cache.glob("*.columns")
    result["store_bytes"] = store.stat().st_size
    return result


def run_workers(folder: Path, scale: float) -> dict[str, Any]:
    """Memory of a process and 4 workers that read all annotations, as columns and as a list of dictionaries."""
    source = folder / "lvis.json"
    result: dict[str, Any] = {"file": generate(source, scale)}
    for kind in ("nothing", "store", "dictionaries"):
        command = [sys.executable, __file__, "tree", "--job", kind, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind:20} {result[kind]}", flush=True)
    return result


def measure_tree(kind: str, source: Path, cache: Path) -> dict[str, float]:
    """Start workers that read all annotations, and add up the proportional memory of all processes."""
    held: Any = None
    if kind == "store":
        from proxydet.data.store import AnnotationStore

        held = AnnotationStore.open(source, cache=cache)
    elif kind == "dictionaries":
        with source.open() as file:
            held = json.load(file)["annotations"]
    context = multiprocessing.get_context("fork")
    ready, leave = context.Barrier(WORKERS + 1), context.Event()

    def work() -> None:
        touched = 0.0
        if kind == "store":
            for row in range(len(held)):
                record = held.record(row)
                for place in range(len(record)):
                    polygons = held.polygons(record.first_annotation + place)
                    touched += sum(float(polygon.sum()) for polygon in polygons)
        elif kind == "dictionaries":
            touched = sum(sum(map(sum, annotation["segmentation"])) for annotation in held)
        ready.wait()
        leave.wait()

    workers = [context.Process(target=work) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    ready.wait()
    total = sum(_pss(pid) for pid in (os.getpid(), *(worker.pid for worker in workers)))
    leave.set()
    for worker in workers:
        worker.join()
    return {"pss_MB": round(total / 1e6, 1)}


def _pss(pid: int | None) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) * 1024


def run_tars(folder: Path, scale: float) -> dict[str, Any]:
    """Index 997 tars of photographs' size."""
    from PIL import Image

    from proxydet.data.image_labels import TarClasses, TarImages

    per_tar = max(1, round(40 * scale))
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (375, 500, 3)).astype(np.uint8)).save(
        buffer, "JPEG", quality=60
    )
    content = buffer.getvalue()
    names = [f"n{number:08}.tar" for number in range(997)]
    for name in names:
        with tarfile.open(folder / name, "w") as tar:
            for image in range(per_tar):
                member = tarfile.TarInfo(f"{name[:-4]}_{image}.JPEG")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    result: dict[str, Any] = {
        "tars": len(names),
        "images": len(names) * per_tar,
        "bytes_each": len(content),
    }
    matched = TarClasses(class_of_tar=dict.fromkeys(names, 0))
    for processes in (1, os.cpu_count() or 1):
        start = time.perf_counter()
        with mock.patch("os.cpu_count", return_value=processes):
            images = TarImages.open(folder, matched, cache=folder / str(processes))
        seconds = time.perf_counter() - start
        result[f"{processes} processes"] = {
            "seconds": round(seconds, 2),
            "files_per_second": round(len(images) / seconds),
        }
        start = time.perf_counter()
        TarImages.open(folder, matched, cache=folder / str(processes))
        result[f"{processes} processes"]["reopen_seconds"] = round(time.perf_counter() - start, 4)
    start = time.perf_counter()
    rows = rng.integers(len(images), size=2000).tolist()
    for row in rows:
        images.encoded(row)
    result["random_reads_per_second"] = round(len(rows) / (time.perf_counter() - start))
    return result


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "workers", "tars", "one", "tree"])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--store-only", action="store_true", help="leave json.load and lvis.LVIS out"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what in ("one", "tree"):
        run = measure if options.what == "one" else measure_tree
        print(json.dumps(run(options.job, options.folder / "lvis.json", options.folder / "cache")))
        return
    folder = Path(tempfile.mkdtemp(prefix="proxydet-store-"))
    try:
        build = partial(run_build, lists=not options.store_only)
        runs = {"build": build, "workers": run_workers, "tars": run_tars}
        result = {"scale": options.scale, **runs[options.what](folder, options.scale)}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
