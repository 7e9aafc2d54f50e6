"""Generated data sets for evaluation: small, with everything that engines disagree about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

SAMPLE = Path(__file__).resolve().parents[4] / "shared" / "real_data" / "lvis_eval_sample"
HEIGHT, WIDTH = 48, 64

GeneratedSet = tuple[dict[str, Any], list[dict[str, Any]]]


def ellipse(box: list[float], height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    """The mask of the ellipse that fills a box (x, y, width, height), as JSON has it; may be empty."""
    x, y, w, h = box
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    if w <= 0 or h <= 0:
        inside = np.zeros((height, width), dtype=bool)
    else:
        inside = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    mask = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": [height, width], "counts": mask["counts"].decode()}


def draw_set(
    seed: int,
    *,
    images: int = 6,
    categories: int = 5,
    per_image: int = 12,
    federated: bool = True,
    steps: int = 8,
    crowds: bool = False,
) -> GeneratedSet:
    """Draw annotations and detections.

    Scores have few distinct values, so that many tie; some detections and annotations cover nothing; categories and
    images may lack annotations, detections or both; boxes are near annotations, so that IoUs cross all thresholds.
    """
    draw = np.random.default_rng(seed)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for category in range(categories):
        truth["categories"].append(
            {
                "id": 3 * category + 2,
                "name": f"thing {category}",
                "frequency": "rcf"[category % 3],
                "image_count": int(draw.integers(1, 99)),
            }
        )
    ids = [row["id"] for row in truth["categories"]]
    detections: list[dict[str, Any]] = []
    for image in range(images):
        image_id = 100 - 7 * image
        present = draw.choice(ids, size=draw.integers(0, 4))
        others = [value for value in ids if value not in present]
        row = {"id": image_id, "height": HEIGHT, "width": WIDTH, "file_name": f"{image_id}.jpg"}
        if federated:
            row["neg_category_ids"] = [int(value) for value in others if draw.random() < 0.5]
            row["not_exhaustive_category_ids"] = [
                int(value) for value in set(present) if draw.random() < 0.3
            ]
        truth["images"].append(row)
        boxes = [_box(draw) for _ in range(len(present) * 2)]
        for box in boxes:
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": int(draw.choice(present)),
                    "bbox": box,
                    "area": box[2] * box[3] * 0.8 if draw.random() < 0.95 else 0.0,
                    "iscrowd": int(crowds and draw.random() < 0.2),
                    "segmentation": ellipse(box),
                }
            )
        if draw.random() < 0.2:
            continue
        for _ in range(int(draw.integers(1, per_image + 1))):
            near = boxes and draw.random() < 0.8
            box = _shaken(draw, boxes[draw.integers(len(boxes))]) if near else _box(draw)
            if draw.random() < 0.05:
                box[2 + int(draw.integers(2))] = 0.0
            mask = ellipse(box)
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": int(draw.choice(present if near else ids)),
                    "bbox": box,
                    "score": float(draw.integers(1, steps + 1)) / steps,
                    "segmentation": mask,
                }
            )
    draw.shuffle(detections)
    # A set without an object that counts is refused: there is nothing to score.
    if not truth["annotations"]:
        box = _box(draw)
        first = {"id": 1, "image_id": truth["images"][0]["id"], "category_id": ids[0], "bbox": box}
        first |= {"area": box[2] * box[3], "iscrowd": 0, "segmentation": ellipse(box)}
        truth["annotations"].append(first)
    if all(row["iscrowd"] for row in truth["annotations"]):
        truth["annotations"][0]["iscrowd"] = 0
    return truth, detections


def _box(draw: np.random.Generator) -> list[float]:
    width, height = draw.uniform(3, 40), draw.uniform(3, 40)
    x, y = draw.uniform(0, WIDTH - width), draw.uniform(0, HEIGHT - height)
    return [round(float(value), 2) for value in (x, y, width, height)]


def _shaken(draw: np.random.Generator, box: list[float]) -> list[float]:
    x, y, width, height = np.array(box) + draw.normal(size=4) * draw.choice([0, 0.5, 2, 5])
    x, y = np.clip(x, 0, WIDTH - 4), np.clip(y, 0, HEIGHT - 4)
    width, height = np.clip(width, 1, WIDTH - x), np.clip(height, 1, HEIGHT - y)
    return [round(float(value), 2) for value in (x, y, width, height)]


@pytest.fixture(scope="session")
def make_set() -> Callable[..., GeneratedSet]:
    """The function that draws a data set with detections."""
    return draw_set


@pytest.fixture(scope="session")
def sample() -> Path:
    """The folder of real LVIS annotations with the official evaluator's numbers."""
    if not SAMPLE.is_dir():
        pytest.skip("the shared fixtures (shared/real_data/lvis_eval_sample) are not here")
    return SAMPLE
