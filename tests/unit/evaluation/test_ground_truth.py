"""Annotations as evaluation reads them."""

import json
import tracemalloc

import numpy as np
import pytest

from proxydet.errors import DataError
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import read_results
from proxydet.evaluation.scoring import select


def test_columns_are_in_the_order_of_ids(make_set):
    content, _ = make_set(3, images=6)
    truth = GroundTruth.load(content)
    assert truth.image_ids == tuple(sorted(row["id"] for row in content["images"]))
    assert truth.category_names[truth.category_index[5]] == "thing 1"
    row = content["annotations"][3]
    assert truth.image_ids[truth.ann_image_A[3]] == row["image_id"]
    assert truth.category_ids[truth.ann_category_A[3]] == row["category_id"]
    assert truth.ann_box_A4[3].tolist() == row["bbox"]


def test_protocol_is_recognised(make_set):
    federated, _ = make_set(1)
    assert GroundTruth.load(federated).protocol == "lvis"
    assert GroundTruth.load(federated, protocol="coco").judges(np.zeros(4, int), np.arange(4)).all()
    exhaustive, _ = make_set(1, federated=False)
    assert GroundTruth.load(exhaustive).protocol == "coco"
    for row in federated["images"]:
        row["pos_category_ids"] = []
    assert GroundTruth.load(federated).protocol == "lvis"
    for row in federated["categories"]:
        del row["frequency"]
    assert GroundTruth.load(federated).protocol == "openimages"


@pytest.mark.parametrize(
    ("field", "where", "verified"),
    [
        ("neg_category_ids", "images", False),
        ("pos_category_ids", "images", False),
        ("frequency", "categories", False),
        ("frequency", "categories", True),
    ],
)
def test_almost_federated_annotations_are_refused_by_field(make_set, field, where, verified):
    content, _ = make_set(1)
    for row in content["images"]:
        row.update({"pos_category_ids": []} if verified else {})
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


def test_judged_pairs_are_the_annotated_and_the_verified_absent(make_set):
    content, _ = make_set(3, images=6)
    truth = GroundTruth.load(content)
    expected = {
        (row["id"], category) for row in content["images"] for category in row["neg_category_ids"]
    }
    expected |= {
        (row["image_id"], row["category_id"]) for row in content["annotations"] if row["area"] > 0
    }
    every_P2 = np.argwhere(np.ones((len(truth.image_ids), len(truth.category_ids))))
    judged = {
        (truth.image_ids[image], truth.category_ids[category])
        for image, category in every_P2[truth.judges(*every_P2.T)]
    }
    assert judged == expected


def test_what_is_judged_takes_memory_for_what_is_listed_only():
    """30,000 images of 30,000 categories: a table of all pairs would take 900 MB."""
    images = [
        {"id": n, "height": 9, "width": 9, "file_name": f"{n}", "neg_category_ids": [n]}
        for n in range(30_000)
    ]
    categories = [{"id": n, "name": f"{n}", "frequency": "r"} for n in range(30_000)]
    box = {"bbox": [1, 1, 5, 5], "area": 25}
    truth = GroundTruth.load(
        {
            "images": images,
            "categories": categories,
            "annotations": [{"id": 1, "image_id": 0, "category_id": 2, **box}],
        }
    )
    detections = [
        {"image_id": 7, "category_id": c, "score": 0.5, "bbox": [1, 1, 5, 5]} for c in (7, 8)
    ]
    tracemalloc.start()
    try:
        selection = select(read_results(detections, truth), truth, iou_type="bbox")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(selection), selection.unjudged) == (1, 1)
    assert peak < 100e6


def test_masks_of_any_kind(make_set):
    content, _ = make_set(1)
    polygon, runs, *_ = content["annotations"]
    polygon["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    runs["segmentation"] = {"size": [48, 64], "counts": [0, 5, 48 * 64 - 5]}
    masks = GroundTruth.load(content).masks
    assert all(mask["size"] == [48, 64] for mask in masks)


def test_a_file_with_nothing_to_score_is_refused(make_set, tmp_path):
    content, _ = make_set(1)
    path = tmp_path / "val.json"
    for change in ({"images": []}, {"annotations": []}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=next(iter(change))):
            GroundTruth.load(path)
    path.write_text(json.dumps(content)[:-100])
    with pytest.raises(DataError, match="cut short"):
        GroundTruth.load(path)
