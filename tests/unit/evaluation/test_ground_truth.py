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
    assert GroundTruth.load(federated).protocol == "lvis"
    for row in federated["categories"]:
        del row["frequency"]
    assert GroundTruth.load(federated).protocol == "openimages"


@pytest.mark.parametrize(
    ("field", "where"),
    [("neg_category_ids", "images"), ("pos_category_ids", "images"), ("frequency", "categories")],
)
def test_almost_federated_annotations_are_refused_by_field(
    make_set: Callable[..., Any], field: str, where: str
) -> None:
    content, _ = make_set(1)
    if field == "pos_category_ids":
        for row in content["images"]:
            row[field] = []
            del row["neg_category_ids"]
        for row in content["categories"]:
            del row["frequency"]
    row = content[where][1]
    row.pop("image_count", None)
    del row[field]
    with pytest.raises(DataError, match=field) as caught:
        GroundTruth.load(content)
    assert str(row["name"] if where == "categories" else row["id"]) in caught.value.message
    assert "--protocol" in (caught.value.hint or "")
    assert GroundTruth.load(content, protocol="coco").protocol == "coco"


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


def test_objects_without_a_mask_neither_help_nor_harm(make_set: Callable[..., Any]) -> None:
    content, _ = make_set(1)
    content["annotations"][2]["segmentation"] = None
    truth = GroundTruth.load(content)
    assert truth.has_masks
    assert truth.masked_A.sum() == len(content["annotations"]) - 1
    blank = int(np.flatnonzero(~truth.masked_A)[0])
    assert truth.for_masks().ann_ignore_A.tolist() == (~truth.masked_A).tolist()
    assert truth.segmentation(blank) == []
    for row in content["annotations"]:
        del row["segmentation"]
    assert not GroundTruth.load(content).has_masks


def test_a_file_with_nothing_to_score_is_refused(
    make_set: Callable[..., Any], tmp_path: Path
) -> None:
    content, _ = make_set(1)
    path = tmp_path / "val.json"
    for change in ({"images": []}, {"annotations": []}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=next(iter(change))):
            GroundTruth.load(path)
    path.write_text(json.dumps(content)[:-100])
    with pytest.raises(DataError, match="cut short"):
        GroundTruth.load(path)
