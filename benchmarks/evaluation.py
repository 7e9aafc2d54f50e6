"""Measures evaluation: the fast engine against the official one, the bootstrap's cost, and its coverage.

::

    python benchmarks/evaluation.py engines --images 2000          # both engines, boxes and masks, reading included
    python benchmarks/evaluation.py engines --images 20000 --engine hotcoco
    python benchmarks/evaluation.py user --images 2000             # proxydet eval --results, everything, against lvis alone
    python benchmarks/evaluation.py sample FOLDER                  # the official numbers on real annotations
    python benchmarks/evaluation.py coverage --sets 200            # how often 95 % intervals hold
    python benchmarks/evaluation.py masks --images 20              # pasting and encoding, one by one and behind the network

Every measurement runs in a process of its own: wall time, processor time and peak memory are that process's, from reading
the files to the last number. Generated: 300 detections an image, 1,203 categories, masks shared by detections as the
detector's are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 480, 640
CATEGORIES, DETECTIONS = 1203, 300
DRAWN = 2000


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    engines = commands.add_parser("engines")
    engines.add_argument("--images", type=int, default=2000)
    engines.add_argument("--engine", choices=["hotcoco", "lvis"], action="append")
    engines.add_argument("--bootstrap", type=int, default=0)
    engines.add_argument("--errors", action="store_true", help="analyse errors too")
    engines.add_argument("--folder", type=Path, help="keep the generated files here")
    user = commands.add_parser("user")
    user.add_argument("--images", type=int, default=2000)
    user.add_argument("--folder", type=Path, help="keep the generated files here")
    coverage = commands.add_parser("coverage")
    coverage.add_argument("--sets", type=int, default=200)
    coverage.add_argument("--images", type=int, default=400)
    coverage.add_argument("--resamples", type=int, default=200)
    sample = commands.add_parser("sample")
    sample.add_argument("folder", type=Path, help="annotations, results, and expected.json")
    masks = commands.add_parser("masks")
    masks.add_argument("--images", type=int, default=20)
    child = commands.add_parser("child")
    child.add_argument("arguments", type=json.loads)
    options = parser.parse_args()
    if options.command == "child":
        measure(**options.arguments)
    elif options.command == "sample":
        compare_sample(options.folder)
    elif options.command == "user":
        compare_user(options)
    elif options.command == "masks":
        compare_masks(options.images)
    elif options.command == "engines":
        compare_engines(options)
    else:
        report_coverage(options.sets, options.images, options.resamples)


# -- engines --------------------------------------------------------------------------------------------------------


def compare_engines(options: argparse.Namespace) -> None:
    """Print one line a measurement, and for both engines the largest difference and the ratios."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generate(options.images, folder)
        for kind in ("bbox", "segm"):
            results = {
                engine: run_child(
                    folder=str(folder),
                    images=options.images,
                    kind=kind,
                    engine=engine,
                    bootstrap=options.bootstrap if engine == "hotcoco" else 0,
                    errors=options.errors and engine == "hotcoco",
                )
                for engine in options.engine or ["hotcoco", "lvis"]
            }
            for result in results.values():
                print(json.dumps({key: result[key] for key in result if key != "metrics"}))
            if len(results) == 2:
                print(json.dumps(compared(results["hotcoco"], results["lvis"])))


def compare_user(options: argparse.Namespace) -> None:
    """Print what `proxydet eval --results` takes with all that it writes, and the official evaluator alone beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generate(options.images, folder)
        for kind in ("bbox", "segm"):
            arguments = {"folder": str(folder), "images": options.images, "kind": kind}
            ours = run_child(**arguments, engine="user", bootstrap=200, errors=True)
            official = run_child(**arguments, engine="lvis", bootstrap=0, errors=False)
            for result in (ours, official):
                print(json.dumps({key: result[key] for key in result if key != "metrics"}))
            print(json.dumps(compared(ours, official)))


def compare_sample(folder: Path) -> None:
    """Print the fast engine's largest differences from what the official one gave on real annotations."""
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.evaluate import run_evaluation

    expected = json.loads((folder / "expected.json").read_text())
    for results in sorted(folder.glob("dt_*.json*")):
        case = expected[results.name.split(".")[0]]
        report = run_evaluation(
            results, folder / "lvis_val_100.json", config=EvaluationConfig(bootstrap=0)
        ).report
        for kind, part in report.types.items():
            metrics = [abs(part.metrics[name] - value) for name, value in case[kind].items()]
            by_id = {str(score.id): score.ap for score in part.categories if score.ap is not None}
            wanted = case[f"{kind}_per_category_AP"]
            if by_id.keys() != wanted.keys():
                raise SystemExit(f"{results.name}, {kind}: other categories are scored")
            categories = [abs(by_id[key] - value) for key, value in wanted.items()]
            print(
                f"{results.name:32} {kind:5} metrics {max(metrics):.1e} of {len(metrics)}  "
                f"categories {max(categories):.1e} of {len(categories)}"
            )


def compared(fast: dict[str, Any], official: dict[str, Any]) -> dict[str, Any]:
    """How the two engines' numbers, times and memory relate."""
    differences = [
        abs(value - official["metrics"][name])
        for name, value in fast["metrics"].items()
        if value is not None
    ]
    return {
        "kind": fast["kind"],
        "largest difference": max(differences),
        "times faster, wall": round(official["wall s"] / fast["wall s"], 1),
        "times faster, processor": round(official["processor s"] / fast["processor s"], 1),
        "times less memory": round(official["peak MiB"] / fast["peak MiB"], 1),
    }


def run_child(**arguments: Any) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = [sys.executable, __file__, "child", json.dumps(arguments)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(
    *, folder: str, images: int, kind: str, engine: str, bootstrap: int, errors: bool
) -> None:
    """Evaluate in this process and print time, memory and metrics."""
    import hotcoco  # noqa: F401 - imports are not what is measured
    import pycocotools.cocoeval  # noqa: F401

    from proxydet.evaluation.analysis import analyse
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet.evaluation.evaluate import run_evaluation
    from proxydet.runtime import lvis_api  # noqa: F401

    if engine == "user":
        import importlib

        from proxydet_cli.app import run

        for module in [
            "jinja2",
            "matplotlib.backends.backend_svg",
            "matplotlib.figure",
            "numpy.random",
            "pydantic",
            "proxydet.evaluation.page",
            "proxydet.inference.writers",
            "proxydet_cli.opening",
            "proxydet_cli.progress",
        ]:
            importlib.import_module(module)
    results = Path(folder) / f"{kind}_{images}.json"
    annotations = Path(folder) / f"truth_{images}.json"
    start, processor = time.perf_counter(), time.process_time()
    if engine == "lvis":
        metrics = official(annotations, results, kind)
    elif engine == "user":
        output = Path(folder) / f"user_{kind}"
        words = ["--results", str(results), "--data", str(annotations), "--output", str(output)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            run(["eval", *words])
        written = json.loads((output / "results.json").read_text())
        metrics = written["results"][kind]["metrics"]
    else:
        config = EvaluationConfig(bootstrap=bootstrap, iou_types=(kind,))
        evaluation = run_evaluation(results, annotations, config=config)
        metrics = evaluation.report.types[kind].metrics
        if errors:
            analyse(evaluation)
    print(
        json.dumps(
            {
                "kind": kind,
                "engine": engine,
                "images": images,
                "resamples": bootstrap,
                "errors": errors,
                "wall s": round(time.perf_counter() - start, 2),
                "processor s": round(time.process_time() - processor, 2),
                "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "metrics": metrics,
            }
        )
    )


def official(annotations: Path, results: Path, kind: str) -> dict[str, float]:
    """The official evaluator as its users run it, on the files as they are."""
    import warnings

    from proxydet.runtime.lvis_api import LVIS, LVISEval, LVISResults

    warnings.simplefilter("ignore")
    truth = LVIS(str(annotations))
    detections = json.loads(results.read_text())
    if kind == "segm":
        for row in detections:
            del row["bbox"]  # otherwise areas are taken from the boxes; detectron2 does the same
    evaluator = LVISEval(truth, LVISResults(truth, detections), kind)
    evaluator.run()
    return {name: float(value) for name, value in evaluator.get_results().items()}


def generate(images: int, folder: Path) -> None:
    """Write annotations, and results with and without masks, unless they are there.

    More images than `DRAWN` are copies of these under other ids: drawing masks takes longer than scoring them.
    """
    if (folder / f"truth_{images}.json").is_file():
        return
    if images > DRAWN:
        generate(DRAWN, folder)
        _repeat(images, folder)
        return
    draw = np.random.default_rng(0)
    share_C = draw.permutation(np.arange(1, CATEGORIES + 1) ** -0.8)
    share_C /= share_C.sum()
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": c + 1, "name": f"c{c}", "frequency": "rcf"[c % 3]} for c in range(CATEGORIES)
        ],
    }
    with (
        (folder / f"bbox_{images}.json").open("w") as boxes,
        (folder / f"segm_{images}.json").open("w") as masks,
    ):
        for image in range(images):
            rows = _image(draw, share_C, image + 1, truth)
            separator = "[" if image == 0 else ","
            masks.write(separator + json.dumps(rows)[1:-1])
            for row in rows:
                del row["segmentation"]
            boxes.write(separator + json.dumps(rows)[1:-1])
        boxes.write("]")
        masks.write("]")
    (folder / f"truth_{images}.json").write_text(json.dumps(truth))


def _repeat(images: int, folder: Path) -> None:
    """Write copies of the drawn images under other ids."""
    copies = images // DRAWN
    if copies * DRAWN != images:
        raise SystemExit(f"--images must be at most {DRAWN}, or a multiple of it")
    for kind in ("bbox", "segm"):
        text = (folder / f"{kind}_{DRAWN}.json").read_bytes()[1:-1]
        with (folder / f"{kind}_{images}.json").open("wb") as file:
            for copy in range(copies):
                file.write(b"," if copy else b"[")
                file.write(_shifted(text, copy * DRAWN))
            file.write(b"]")
    truth = json.loads((folder / f"truth_{DRAWN}.json").read_text())
    for key, name in (("images", "id"), ("annotations", "image_id")):
        truth[key] = [
            {**row, name: row[name] + copy * DRAWN} for copy in range(copies) for row in truth[key]
        ]
    for number, row in enumerate(truth["annotations"], 1):
        row["id"] = number
    (folder / f"truth_{images}.json").write_text(json.dumps(truth))


def _shifted(text: bytes, by: int) -> bytes:
    return re.sub(rb'"image_id": (\d+)', lambda m: b'"image_id": %d' % (int(m[1]) + by), text)


def _image(
    draw: np.random.Generator, share_C: np.ndarray, image_id: int, truth: dict[str, Any]
) -> list[dict[str, Any]]:
    objects = int(draw.integers(1, 22))
    category_A = draw.choice(CATEGORIES, size=objects, p=share_C)
    negative = np.setdiff1d(draw.choice(CATEGORIES, size=10, p=share_C), category_A)
    unsure = category_A[:1] if draw.random() < 0.3 else []
    truth["images"].append(
        {
            "id": image_id,
            "height": HEIGHT,
            "width": WIDTH,
            "neg_category_ids": [int(c) + 1 for c in negative],
            "not_exhaustive_category_ids": [int(c) + 1 for c in unsure],
        }
    )
    sides = np.exp(draw.uniform(np.log(8), np.log(300), (objects, 2)))
    corner = draw.uniform(0, 1, (objects, 2)) * ([WIDTH, HEIGHT] - sides)
    box_A4 = np.round(np.concatenate([corner, sides], axis=1), 2)
    for category, box, polygon in zip(category_A, box_A4, _ellipses(box_A4), strict=True):
        truth["annotations"].append(
            {
                "id": len(truth["annotations"]) + 1,
                "image_id": image_id,
                "category_id": int(category) + 1,
                "bbox": box.tolist(),
                "area": float(box[2] * box[3] * 0.785),
                "segmentation": [np.round(polygon, 2).tolist()],
            }
        )
    return _detections(draw, share_C, image_id, box_A4, category_A)


def _detections(
    draw: np.random.Generator,
    share_C: np.ndarray,
    image_id: int,
    box_A4: np.ndarray,
    category_A: np.ndarray,
) -> list[dict[str, Any]]:
    distinct = DETECTIONS // 3
    near = draw.integers(0, len(box_A4), distinct)
    box_M4 = box_A4[near].copy()
    spread = draw.uniform(0, 0.25, (distinct, 1))
    box_M4[:, :2] += draw.normal(size=(distinct, 2)) * spread * box_M4[:, 2:]
    box_M4[:, 2:] *= np.exp(draw.normal(size=(distinct, 2)) * spread)
    corner = np.clip(box_M4[:, :2], 0, [WIDTH - 4, HEIGHT - 4])
    box_M4 = np.concatenate([corner, np.minimum(box_M4[:, 2:], [WIDTH, HEIGHT] - corner)], axis=1)
    masks = [
        coco_mask.frPyObjects([shape.tolist()], HEIGHT, WIDTH)[0] for shape in _ellipses(box_M4)
    ]
    mask_D = draw.integers(0, distinct, DETECTIONS)
    right_D = draw.random(DETECTIONS) < 0.3
    category_D = np.where(
        right_D, category_A[near[mask_D]], draw.choice(CATEGORIES, size=DETECTIONS, p=share_C)
    )
    score_D = (draw.random(DETECTIONS) * np.where(right_D, 1, 0.6)).astype(np.float32)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_D[index]) + 1,
            "bbox": [float(np.float32(side)) for side in box_M4[mask]],
            "score": float(score_D[index]),
            "segmentation": {
                "size": [HEIGHT, WIDTH],
                "counts": masks[mask]["counts"].decode(),
            },
        }
        for index, mask in enumerate(mask_D)
    ]


def _ellipses(box_M4: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    x = box_M4[:, 0:1] + box_M4[:, 2:3] / 2 * (1 + np.cos(angle))
    y = box_M4[:, 1:2] + box_M4[:, 3:4] / 2 * (1 + np.sin(angle))
    shapes: np.ndarray = np.stack([x, y], axis=2).reshape(len(box_M4), -1)
    return shapes


# -- coverage -------------------------------------------------------------------------------------------------------


def report_coverage(sets: int, images: int, resamples: int) -> None:
    """Print how often a 95 % interval holds the mean over many data sets of the same size."""
    from proxydet.evaluation.bootstrap import resample
    from proxydet.evaluation.scoring import measures, summary

    draw = np.random.default_rng(7)
    rate_C = np.concatenate([np.full(10, 0.3), np.full(20, 0.05), np.full(30, 4 / images)])
    quality_C = draw.normal(0.5, 0.7, len(rate_C))
    frequencies = ("f",) * 10 + ("c",) * 20 + ("r",) * 30
    names = ("AP", "AP50", "APr", "APc", "APf")
    means = np.nanmean(
        [
            [measures(summary(whole_ATC), frequencies, {})[name] for name in names]
            for whole_ATC in (
                simulated([1, index], images, rate_C, quality_C, frequencies)[0]
                for index in range(10 * sets)
            )
        ],
        axis=0,
    )
    held, widths, seconds = [], [], 0.0
    for index in range(sets):
        _, precision, truth = simulated([2, index], images, rate_C, quality_C, frequencies)
        start = time.perf_counter()
        drawn = resample(precision, truth, {}, number=resamples, seed=index)
        seconds += time.perf_counter() - start
        found = [drawn.intervals(0.95).get(name) for name in names]
        held.append(
            [
                interval is not None and interval.low <= mean <= interval.high
                for interval, mean in zip(found, means, strict=True)
            ]
        )
        widths.append([np.nan if i is None else i.high - i.low for i in found])
    rows = zip(names, means, np.mean(held, axis=0), np.nanmean(widths, axis=0) / 2, strict=True)
    for name, mean, share, half in rows:
        print(f"{name:5} mean {mean:.4f}  held by {100 * share:.1f} %  half width {half:.4f}")
    print(f"{sets} sets of {images} images, {resamples} resamples, {seconds / sets:.2f} s a set")


def simulated(
    seed: list[int],
    images: int,
    rate_C: np.ndarray,
    quality_C: np.ndarray,
    frequencies: tuple[str, ...],
) -> Any:
    """Draw a data set with detections; return its precision, as a function of weights too, and its annotations.

    Images differ in how hard they are, which ties the fates of their objects together; categories differ in quality.
    """
    from types import SimpleNamespace

    from proxydet.evaluation.bootstrap import WeightedPrecision

    draw = np.random.default_rng(seed)
    precision = WeightedPrecision(_matches(draw, images, rate_C, quality_C), len(rate_C))
    truth = SimpleNamespace(image_ids=range(images), frequencies=frequencies)
    return precision.precision(np.ones(images, dtype=np.int64)), precision, truth


def _matches(
    draw: np.random.Generator, images: int, rate_C: np.ndarray, quality_C: np.ndarray
) -> Any:
    from proxydet.evaluation.matching import FOUND, UNMATCHED, Matches, Pairs
    from proxydet.evaluation.scoring import AREAS, IOU_THRESHOLDS_T, Selection

    ease_I = draw.normal(0, 0.7, images)
    crowd_I = draw.gamma(1.5, 1 / 1.5, (images, 1))
    image_G, category_G = _pairs(draw.poisson(rate_C * crowd_I))
    ease_G = quality_C[category_G] + ease_I[image_G] + draw.normal(0, 1, len(image_G))
    seen_G = ease_G + draw.normal(0, 0.5, len(image_G)) > -0.5
    iou_G = _squash(0.8 * ease_G + 1 + draw.normal(0, 0.7, len(image_G)))
    image_F, category_F = _pairs(
        draw.poisson(np.broadcast_to(0.02 + rate_C, (images, len(rate_C))))
    )
    stray_F = draw.normal(-1.2, 1.2, len(image_F)) + 0.5 * ease_I[image_F]
    image_S = np.concatenate([image_G[seen_G], image_F])
    category_S = np.concatenate([category_G[seen_G], category_F])
    score_S = _squash(np.concatenate([(ease_G + draw.normal(0, 1, len(ease_G)))[seen_G], stray_F]))
    iou_S = np.concatenate([iou_G[seen_G], np.zeros(len(image_F))])
    order = np.lexsort((-score_S, category_S, image_S))
    iou_S = iou_S[order]
    near = np.flatnonzero(iou_S >= IOU_THRESHOLDS_T[0])
    state_NT = np.where(iou_S[near, None] >= IOU_THRESHOLDS_T, FOUND, UNMATCHED).astype(np.int8)
    selection = Selection(
        detection_S=order,
        image_S=image_S[order],
        category_S=category_S[order],
        score_S=score_S[order],
        area_S=np.ones(len(order)),
        capped=0,
        unjudged=0,
        without_area=0,
    )
    return Matches(
        selection=selection,
        near_N=near,
        state_NAT=np.repeat(state_NT[:, None], len(AREAS), axis=1),
        annotation_N=np.zeros_like(near),
        iou_N=iou_S[near],
        silent_SA=np.zeros((len(order), len(AREAS)), dtype=bool),
        pairs=Pairs(
            detection_P=near,
            annotation_P=near,
            iou_P=iou_S[near],
            same_P=np.ones(len(near), dtype=bool),
        ),
        ann_image_G=image_G,
        ann_category_G=category_G,
        ann_index_G=np.arange(len(image_G)),
        counts_GA=np.ones((len(image_G), len(AREAS)), dtype=bool),
    )


def _pairs(counts_IC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, category = np.nonzero(counts_IC)
    times = counts_IC[image, category]
    return np.repeat(image, times), np.repeat(category, times)


def _squash(values: np.ndarray) -> np.ndarray:
    squashed: np.ndarray = 1 / (1 + np.exp(-values))
    return squashed


# -- masks ----------------------------------------------------------------------------------------------------------


def compare_masks(images: int) -> None:
    """Print the processor time an image of all threads, and of the one that feeds the network, before and now.

    Before: each mask pasted and encoded alone, between two batches. Now: as `proxydet eval` does it. Files are compared.
    """
    import torch

    from proxydet.evaluation.detector_evaluation import PredictionFolder, result_rows
    from proxydet.inference.pipeline import WriteBehind
    from proxydet.modeling.postprocess import rles

    torch.set_num_threads(1)
    found = [drawn_prediction(seed) for seed in range(4)]
    assert [mask_by_mask(one) for one in found] == [rles(one) for one in found]
    classes = list(range(CATEGORIES))
    written = []
    for name in ("before", "now") * 2:
        with tempfile.TemporaryDirectory() as temporary:
            folder = PredictionFolder(Path(temporary), {})
            everything, feeding = time.process_time(), time.thread_time()
            with folder.writer(0) as writer, WriteBehind([writer], 1) as behind:
                for image in range(images):

                    def rows(image: int = image, name: str = name) -> list[dict[str, Any]]:
                        one = found[image % len(found)]
                        encoded = mask_by_mask(one) if name == "before" else rles(one)
                        bare = dataclasses.replace(one, mask_probs_MSS=None)
                        made = result_rows(bare, image, classes)
                        return [
                            {**row, "segmentation": mask}
                            for row, mask in zip(made, encoded, strict=True)
                        ]

                    if name == "before":
                        writer.add(None, writer.prepare((image, rows)))
                    else:
                        behind.add((image, rows), f"image {image}")
                feeding = time.thread_time() - feeding
                behind.finish()
            everything = time.process_time() - everything
            written.append(folder.join(list(range(images))).read_bytes())
        print(
            f"{name}: {1e3 * everything / images:.1f} ms of processor time an image, "
            f"{1e3 * feeding / images:.1f} ms of it in the thread that feeds the network"
        )
    assert len(set(written)) == 1


def drawn_prediction(seed: int) -> Any:
    """Return 300 detections with a mask each: rough discs in boxes of 12 to 400 pixels, at random places."""
    import torch

    from proxydet.modeling.postprocess import Prediction

    draw = torch.Generator().manual_seed(seed)
    edges = torch.tensor([WIDTH, HEIGHT])
    middle = torch.rand(DETECTIONS, 2, generator=draw) * edges
    half = torch.exp(torch.rand(DETECTIONS, 2, generator=draw) * 3.5 + 2.5) / 2
    boxes = torch.cat([(middle - half).clamp(min=0), (middle + half).minimum(edges)], dim=1)
    place = torch.linspace(-1, 1, 28)
    radius = torch.hypot(place[:, None], place[None, :])
    rough = 0.1 * torch.randn(DETECTIONS, 28, 28, generator=draw)
    return Prediction(
        boxes_N4=boxes,
        scores_N=torch.rand(DETECTIONS, generator=draw).sort(descending=True).values,
        classes_N=torch.randint(CATEGORIES, (DETECTIONS,), generator=draw),
        mask_probs_MSS=torch.sigmoid(6 * (0.8 - radius + rough)),
        mask_index_N=torch.arange(DETECTIONS),
        image_size=(HEIGHT, WIDTH),
    )


def mask_by_mask(prediction: Any) -> list[dict[str, Any]]:
    """Paste and encode each mask alone, as ProxyDet did it until commit 40bb5b8."""
    import torch
    from torch.nn.functional import grid_sample

    encoded = []
    height, width = prediction.image_size
    for probs_SS, box_4 in zip(prediction.mask_probs_MSS, prediction.boxes_N4, strict=True):
        left, top = (box_4[:2].floor() - 1).clamp(min=0).int().tolist()
        right, bottom = (box_4[2:].ceil() + 1).int().tolist()
        spans = (left, min(right, width)), (top, min(bottom, height))
        x_w, y_h = (
            ((torch.arange(*span, dtype=torch.float32) + 0.5 - first) / (last - first) * 2 - 1)
            for span, first, last in zip(spans, box_4[:2], box_4[2:], strict=True)
        )
        grid_hw2 = torch.stack(torch.meshgrid(x_w, y_h, indexing="xy"), dim=-1)
        sampled = grid_sample(probs_SS[None, None], grid_hw2[None], align_corners=False)
        inside_hw = (sampled[0, 0] >= 0.5).numpy()
        columns_wh = np.zeros((len(x_w), len(y_h) + 2), dtype=np.bool_)
        columns_wh[:, 1:-1] = inside_hw.T
        column, row = np.nonzero(columns_wh[:, 1:] != columns_wh[:, :-1])
        changes, times = np.unique((left + column) * height + top + row, return_counts=True)
        changes = changes[times == 1]
        end = [] if len(changes) and changes[-1] == height * width else [height * width]
        counts = np.diff(changes, prepend=0, append=end).tolist()
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        encoded.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
    return encoded


if __name__ == "__main__":
    main()
