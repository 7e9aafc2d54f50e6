"""How fast an index is searched, and what it costs to make one.

::

    python benchmarks/search.py --run runs/quickstart [--images 10000 --regions 1000000] [--threads 2] [--parts scan,index,compact]

``scan``: one new word over a synthetic index: the regions of ``--run``'s validation images, each moved by noise (a tenth of
the spread of the embeddings), until there are ``--regions`` of them. Exact, compact and approximate search, warm, next to reading
the bytes of their embeddings once; recall of the approximate hits among the exact ones; and the time of running the detector on as
many images. Searches return the 20 best images. ``index``: images a second of indexing next to predicting the same images without drawing. ``compact``: bytes an
image, and average precision of exact and compact indexes of the validation set, by number of regions.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch

from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_index, evaluate_split
from proxydet.evaluation.split import DescribedSplit
from proxydet.index.build import index_images, largest_part
from proxydet.index.search import RegionIndex
from proxydet.index.store import IndexWriter, StoredIndex, paths_of, read_words, write_part
from proxydet.inference.jobs import predict_files
from proxydet.inference.sources import find_images

WORD = "yellow dotted star"


def timed(work: Any, repeats: int = 7) -> float:
    """Return the median of some runs, in seconds, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def multiplied(source: Path, target: Path, regions: int) -> RegionIndex:
    """Make an index of as many regions, each a region of another index with noise, in parts as large as `index_images` makes them."""
    stored = StoredIndex(source)
    draw = np.random.default_rng(0)
    largest = largest_part(stored.detector)
    count, written = 0, []
    with IndexWriter(target, stored.detector, read_words(source)) as writer:
        while count < regions:
            for part in stored.parts:
                rows = np.arange(largest) % part.record.images
                arrays = part.subset(rows)
                for name, own in list(arrays.items()):
                    if name.startswith("embeddings_"):
                        values = own.astype(np.float32)
                        noise = draw.standard_normal(own.shape, np.float32)
                        moved = values + 0.1 * values.std(axis=0) * noise
                        if own.dtype == np.int8:
                            arrays[name] = np.rint(moved).clip(-127, 127).astype(np.int8)
                        else:
                            length, now = (
                                np.linalg.norm(v, axis=1, keepdims=True) for v in (values, moved)
                            )
                            arrays[name] = moved * length / now
                paths = [f"{part.path_of(row)}.{count}.{n}" for n, row in enumerate(rows.tolist())]
                written.append(write_part(target, arrays | paths_of(paths)))
                count += written[-1].regions
                if count >= regions:
                    break
        writer.commit(written)
    return RegionIndex(target)


def reading(index: RegionIndex) -> float:
    """Return the seconds of reading the embeddings of an index once."""

    def read() -> None:
        for part in index.stored.parts:
            for name, values in part.arrays.items():
                if name.startswith("embeddings_"):
                    torch.from_numpy(values).view(torch.int8).view(torch.int64).sum()

    return timed(read)


def scan(detector: Detector, folder: Path, images: list[Path], regions: int) -> dict[str, Any]:
    """Measure one new word over an exact and a compact index."""
    found: dict[str, Any] = {}
    for mode, most in (("exact", None), ("compact", 30)):
        index_images(detector, images, folder / f"{mode}.small", most_regions=most)
        index = multiplied(folder / f"{mode}.small", folder / mode, regions)
        words = index.vocabulary_of([WORD])
        settings = index.settings(score_threshold=0.3, agnostic_nms=True)

        def search(index: Any = index, words: Any = words, settings: Any = settings) -> Any:
            return index.search_classes(words, settings, top=20)

        found[mode] = {
            "images": len(index),
            "regions": index.stored.regions,
            "bytes": index.stored.bytes,
            "search_s": timed(search),
            "read_s": reading(index),
            "hits": len(index.search_classes(words, settings)),
        }
        try:
            index.build_approximate()
        except Exception as error:  # noqa: BLE001 - without FAISS the rest is measured
            print(error, file=sys.stderr)
            continue
        exactly = {hit.path for hit in index.search_classes(words, settings, top=100)}
        nearly = index.search_classes(words, settings, top=100, approximately=True)
        found[mode] |= {
            "approximate_s": timed(
                lambda index=index, words=words, settings=settings: index.search_classes(
                    words, settings, top=20, approximately=True
                )
            ),
            "recall_of_the_best_100": len(exactly & {hit.path for hit in nearly}) / len(exactly),
        }
    some = images[:40]
    vocabulary = detector.vocabulary_of([WORD])
    began = time.perf_counter()
    detector.predict_batch(some, vocabulary)
    each = (time.perf_counter() - began) / len(some)
    for mode in ("exact", "compact"):
        found[mode]["detector_s"] = each * found[mode]["images"]
        found[mode]["times_faster"] = found[mode]["detector_s"] / found[mode]["search_s"]
    return found


def overhead(detector: Detector, folder: Path, images: list[Path]) -> dict[str, Any]:
    """Compare indexing with predicting without drawing, alternately, in CPU seconds and in seconds."""
    files = find_images(images)
    settings = detector.settings(
        score_threshold=0.3, masks=False if detector.inference.masks else None
    )
    plain = detector.with_settings(masks=False) if detector.inference.masks else detector
    seconds: dict[str, list[tuple[float, float]]] = {"predict": [], "exact": [], "compact": []}

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    for turn in range(4):
        for kind, own in seconds.items():
            before, began = cpu(), time.perf_counter()
            if kind == "predict":
                predict_files(plain, files, vocabulary=plain.vocabulary, settings=settings)
            else:
                most = 30 if kind == "compact" else None
                index_images(plain, images, folder / f"{kind}{turn}", most_regions=most)
            if turn:  # the first is not counted
                own.append((time.perf_counter() - began, cpu() - before))
    medians = {
        kind: [statistics.median(column) for column in zip(*own, strict=True)]
        for kind, own in seconds.items()
    }
    return {
        "images": len(images),
        **{
            kind: {
                "seconds": wall,
                "cpu_seconds": used,
                "over_predict": wall / medians["predict"][0] - 1,
                "cpu_over_predict": used / medians["predict"][1] - 1,
            }
            for kind, (wall, used) in medians.items()
        },
    }


def precision(detector: Detector, folder: Path, split: DescribedSplit) -> list[dict[str, Any]]:
    """Score indexes of the validation set: bytes an image, average precision in percent."""
    config = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
    plain = detector.with_settings(masks=False) if detector.inference.masks else detector
    scored = evaluate_split(plain, split, config=config)
    assert scored is not None
    rows = [{"index": "the detector itself", **scored.report.main.metrics}]
    images = sorted(p for root in split.roots for p in root.glob("*") if p.is_file())
    for most in (None, 100, 50, 30, 20, 10):
        place = folder / f"val{most}"
        index_images(plain, images, place, most_regions=most)
        index = RegionIndex(place)
        metrics = evaluate_index(index, split, config=config).report.main.metrics
        size = index.stored.bytes / len(index)
        name = "exact" if most is None else f"compact, {most} regions"
        rows.append({"index": name, "bytes an image": round(size), **metrics})
    return rows


def main() -> int:
    """Measure what is asked for, and print it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder of the quickstart")
    parser.add_argument("--data", type=Path, help="its dataset config [default: next to the run]")
    parser.add_argument("--regions", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=200, help="images of part index")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", default="scan,index,compact")
    parser.add_argument("--folder", type=Path, help="where indexes are kept [default: temporary]")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    detector = Detector.from_run(given.run)
    data = given.data or given.run.parent / "data" / "description.toml"
    split = DescribedSplit.open(data)
    images = sorted(p for root in split.roots for p in root.glob("*") if p.is_file())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        work = {
            "scan": lambda: scan(detector, Path(folder), images, given.regions),
            "index": lambda: overhead(detector, Path(folder), images[: given.images]),
            "compact": lambda: precision(detector, Path(folder), split),
        }
        found = {part: work[part]() for part in given.parts.split(",")}
    print(json.dumps({"threads": given.threads, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
