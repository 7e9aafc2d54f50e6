"""Measures how many training images a second a worker reads and augments, against decoding them alone.

::

    python benchmarks/loader.py DESCRIPTION.toml [--seconds 5] [--clock wall|cpu] [--json FILE]

Steps build on each other: decode; resize, crop and mirror; boxes, classes and masks. Variants of the resize are measured on the
same images and views: the whole image, only the rows and columns that the view needs (what is used), and torch's own.
`plain_sample` is `box_sample` made the straightforward way: through numpy arrays, with the whole image resized.
Times of a busy machine are ratios at best; ``--clock cpu`` counts seconds of this process's processor time, except where workers
take part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from proxydet.data.config import DataConfig
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.images import View, find_image, open_image, read_image, training_view
from proxydet.data.loader import TrainingLoader, TrainingSources, make_instances

Pixels = Any


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Callable[[], float]


def rate(work: Callable[[int], object], seconds: float, clock: Clock = time.perf_counter) -> float:
    """Calls a second of ``work(number)``, after one warm-up round."""
    work(0)
    start, count = clock(), 0
    while clock() - start < seconds:
        work(count)
        count += 1
    return count / (clock() - start)


def whole_resize(pixels: Pixels, view: View) -> Pixels:
    """Resize the whole image, its width first whatever the version of Pillow, then cut."""
    height, width = view.scaled
    wide = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BILINEAR)
    resized = wide.resize((width, height), Image.Resampling.BILINEAR)
    top, left = view.offset
    part = np.asarray(resized)[top : top + view.size[0], left : left + view.size[1]]
    return np.array(part[:, ::-1] if view.mirrored else part)


def plain_sample(sources: TrainingSources, root: Path, row: int) -> torch.Tensor:
    """Make a box sample through numpy arrays, a copy at every station."""
    record = sources.store.record(row)
    with Image.open(root / record.file_name) as opened:
        pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    rng = np.random.default_rng(row)
    view = training_view(*pixels.shape[:2], DataConfig().boxes, flip_probability=0.5, rng=rng)
    usable = sources.usable_A[record.first_annotation :][: len(record)]
    make_instances(sources.store, record, usable, view, sources.targets)
    return torch.from_numpy(whole_resize(pixels, view)).permute(2, 0, 1).contiguous()


def torchvision_decode(file: Path) -> torch.Tensor:
    """Decode a JPEG by torchvision: uint8 (3, H, W)."""
    encoded = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB)


def measure_decoders(files: list[Path], seconds: float, clock: Clock) -> dict[str, Any]:
    """Images a second of Pillow, of torchvision, and of torchvision with the copy that resizing by Pillow needs."""
    files = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg")]
    equal = [
        np.array_equal(read_image(file), torchvision_decode(file).permute(1, 2, 0))
        for file in files
    ]
    ways: dict[str, Callable[[Path], object]] = {
        "Pillow": open_image,
        "torchvision": torchvision_decode,
        "torchvision, then Pillow's image": lambda file: Image.fromarray(
            torchvision_decode(file).permute(1, 2, 0).numpy()
        ),
    }
    found: dict[str, Any] = {
        name: round(rate(lambda n, way=way: way(files[n % len(files)]), seconds, clock), 1)
        for name, way in ways.items()
    }
    return {**found, "files with equal pixels": f"{sum(equal)} of {len(equal)}"}


def torch_resize(pixels: Pixels, view: View) -> Pixels:
    """Resize by torch's antialiased 8-bit kernel, then cut."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    top, left = view.offset
    resized = functional.interpolate(image, view.scaled, mode="bilinear", antialias=True)
    part = resized[0, :, top : top + view.size[0], left : left + view.size[1]]
    return (part.flip(2) if view.mirrored else part).permute(1, 2, 0).contiguous().numpy()


def measure_resizes(
    images: list[Pixels], config: DataConfig, seconds: float, clock: Clock
) -> dict[str, Any]:
    """Images a second of each way to resize, and how its pixels differ from resizing the whole image."""
    rng = np.random.default_rng(0)
    views = [
        training_view(*image.shape[:2], config.boxes, flip_probability=0.5, rng=rng)
        for image in images
        for _ in range(8)
    ]
    pairs = list(zip([image for image in images for _ in range(8)], views, strict=True))
    ways: dict[str, Callable[[Pixels, View], Pixels]] = {
        "whole image": whole_resize,
        "what is needed": lambda pixels, view: view.image(pixels),
        "torch": torch_resize,
    }
    result = {}
    for name, way in ways.items():
        differences = [
            np.abs(way(*pair).astype(int) - whole_resize(*pair))
            for pair in pairs[:: max(1, len(pairs) // 64)]
        ]
        result[name] = {
            "images_per_second": round(
                rate(lambda n, way=way: way(*pairs[n % len(pairs)]), seconds, clock), 1
            ),
            "largest_difference": int(max(d.max() for d in differences)),
            "share_of_values_that_differ": float(np.mean([np.mean(d > 0) for d in differences])),
        }
    return result


def measure(path: Path, seconds: float, clock: Clock) -> dict[str, Any]:
    """All measurements of a data set."""
    torch.set_num_threads(1)
    description = DatasetConfig.from_toml(path)
    config = DataConfig(workers=0)
    sources = TrainingSources(config, Dataset(config=description, cache=config.cache))
    store, roots = sources.store, description.split("train").roots
    files = [find_image(store.file_name(row), roots) for row in range(min(len(store), 64))]

    def sample(number: int) -> torch.Tensor:
        row = number % len(files)
        return sources.sample("boxes", row, np.random.default_rng(row)).image

    def plain(number: int) -> torch.Tensor:
        row = number % len(files)
        return plain_sample(sources, files[row].parent, row)

    for row in range(len(files)):
        assert torch.equal(plain(row), sample(row))
    result: dict[str, Any] = {
        "images": len(files),
        "decode": round(rate(lambda n: read_image(files[n % len(files)]), seconds, clock), 1),
        "decoders": measure_decoders(files, seconds, clock),
        "box_sample": round(rate(sample, seconds, clock), 1),
    }
    result["plain_sample"] = round(rate(plain, seconds, clock), 1)
    if "image_labels" in sources.images:
        count = len(sources.images["image_labels"])

        def label_sample(number: int) -> torch.Tensor:
            rng = np.random.default_rng(number)
            return sources.sample("image_labels", number % count, rng).image

        result["label_sample"] = round(rate(label_sample, seconds, clock), 1)
    result["resize"] = measure_resizes([read_image(file) for file in files], config, seconds, clock)
    for workers in (0, 1, 2):
        boxes_only = DataConfig(workers=workers, image_labels=None)
        loader = TrainingLoader(
            TrainingSources(boxes_only, Dataset(config=description, cache=boxes_only.cache)),
            rank=0,
            world_size=1,
            seed=0,
        )
        batches = iter(loader)
        # The first batches are ready when workers have started.
        for _ in itertools.islice(batches, 2 * workers + 1):
            pass
        result[f"loader, {workers} workers"] = round(
            rate(lambda _, batches=batches: next(batches), 2 * seconds) * config.boxes.batch_size, 1
        )
    result["box_sample_over_plain_sample"] = round(result["box_sample"] / result["plain_sample"], 3)
    result["box_sample_over_decode"] = round(result["box_sample"] / result["decode"], 3)
    return result


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("description", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.description, options.seconds, CLOCKS[options.clock])
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
