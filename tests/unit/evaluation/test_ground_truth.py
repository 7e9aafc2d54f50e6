"""Annotations as evaluation reads them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxydet.errors import DataError
from proxydet.evaluation.ground_truth import GroundTruth


def test_columns_are_in_the_order_of_ids(make_set: Callable[..., Any]) -> None:
    content, _ = make_set(3, images=6)
    truth = GroundTruth.load(content)
    assert truth.image_ids == tuple(sorted(row["id"] for row in content["images"]))
    assert truth.category_names[truth.category_index[5]] == "thing 1"
    row = content["annotations"][3]
    assert truth.image_ids[truth.ann_image_A[3]] == row["image_id"]
    assert truth.category_ids[truth.ann_category_A[3]] == row["category_id"]
    assert truth.ann_box_A4[3].tolist() == row["bbox"]


def test_protocol_is_recognised(make_set: Callable[..., Any]) -> None:
    federated, _ = make_set(1)
    assert GroundTruth.load(federated).protocol == "lvis"
    assert GroundTruth.load(federated, protocol="coco").judged_IC.all()
    exhaustive, _ = make_set(1, federated=False)
    assert GroundTruth.load(exhaustive).protocol == "coco"
    for row in federated["images"]:
        row["pos_category_ids"] = []
    assert GroundTruth.load(federated).protocol == "openimages"


def test_judged_pairs_are_the_annotated_and_the_verified_absent(
    make_set: Callable[..., Any],
) -> None:
    content, _ = make_set(3, images=6)
    truth = GroundTruth.load(content)
    expected = {
        (row["id"], category) for row in content["images"] for category in row["neg_category_ids"]
    }
    expected |= {
        (row["image_id"], row["category_id"]) for row in content["annotations"] if row["area"] > 0
    }
    judged = {
        (truth.image_ids[image], truth.category_ids[category])
        for image, category in np.argwhere(truth.judged_IC)
    }
    assert judged == expected


def test_zipped_files_are_read(make_set: Callable[..., Any], tmp_path: Path) -> None:
    content, _ = make_set(1)
    path = tmp_path / "val.json"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    truth = GroundTruth.load(path)
    assert truth.name == "val.json"
    assert len(truth.masks) == len(content["annotations"])


def test_masks_of_any_kind(make_set: Callable[..., Any]) -> None:
    content, _ = make_set(1)
    polygon, runs, *_ = content["annotations"]
    polygon["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    runs["segmentation"] = {"size": [48, 64], "counts": [0, 5, 48 * 64 - 5]}
    masks = GroundTruth.load(content).masks
    assert all(mask["size"] == [48, 64] for mask in masks)


@pytest.mark.parametrize(
    "segmentation",
    [None, [], {"size": [9, 9], "counts": [81]}, [[1, 2]], [[1, 2, 3, 4, 5, 6], [7]]],
    ids=["none", "empty", "size", "a point", "half a polygon"],
)
def test_masks_that_cannot_be_scored_are_told(
    make_set: Callable[..., Any], segmentation: Any
) -> None:
    content, _ = make_set(1)
    content["annotations"][2]["segmentation"] = segmentation
    truth = GroundTruth.load(content)
    with pytest.raises(DataError, match=r"1 annotations have no mask .*annotations\[2\]") as caught:
        _ = truth.masks
    assert "--iou-type bbox" in caught.value.hint


def damage(content: dict[str, Any], kind: str) -> None:
    first = content["annotations"][0]
    if kind == "image twice":
        content["images"].append(content["images"][0])
    elif kind == "category twice":
        content["categories"].append(content["categories"][0])
    elif kind == "unknown image":
        first["image_id"] = 12345
    elif kind == "unknown category":
        first["category_id"] = 12345
    elif kind == "no images":
        content["images"] = []
    elif kind == "no size":
        content["images"][1]["height"] = 0
    elif kind == "no box":
        del first["bbox"]
    elif kind == "half federated":
        del content["images"][0]["neg_category_ids"]
    elif kind == "mixed ids":
        content["images"][0]["id"] = "first"
        content["annotations"] = []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image twice", "1 image ids are there more than once"),
        ("category twice", "1 category ids are there more than once"),
        ("unknown image", r"1 annotations have a value of image_id .*annotations\[0\]: 12345"),
        (
            "unknown category",
            r"1 annotations have a value of category_id .*annotations\[0\]: 12345",
        ),
        ("no images", "lists no images"),
        ("no size", "1 images have no size"),
        ("no box", r"missing required field `bbox` - at `\$\.annotations\[0\]`"),
        ("half federated", "1 images lack neg_category_ids"),
        ("mixed ids", "some image ids are numbers and some are text"),
    ],
)
def test_damage_is_told(
    make_set: Callable[..., Any], tmp_path: Path, kind: str, message: str
) -> None:
    content, _ = make_set(1)
    damage(content, kind)
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        GroundTruth.load(path)


def test_a_cut_file_is_told(make_set: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(make_set(1)[0])[:-100])
    with pytest.raises(DataError, match="cut short"):
        GroundTruth.load(path)
