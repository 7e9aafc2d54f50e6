"""What a Python user gets back: plain numpy, and other libraries' forms of the same."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from proxydet.detections import Detections
from proxydet.errors import InputError, MissingDependencyError
from proxydet.modeling.postprocess import Prediction

NAMES = ("cup", "plate", "fork")


@pytest.fixture
def found() -> Detections:
    prediction = Prediction(
        boxes_N4=torch.tensor([[2.0, 3, 12, 13], [2.0, 3, 12, 13], [20.5, 0, 39.5, 29.75]]),
        scores_N=torch.tensor([0.9, 0.6, 0.25]),
        classes_N=torch.tensor([2, 0, 0]),
        mask_probs_MSS=torch.stack([torch.ones(28, 28), torch.eye(28)]),
        mask_index_N=torch.tensor([0, 0, 1]),
        image_size=(30, 40),
    )
    return Detections(prediction, NAMES)


@pytest.fixture
def without_masks() -> Detections:
    prediction = Prediction(
        boxes_N4=torch.tensor([[2.0, 3, 12, 13]]),
        scores_N=torch.tensor([0.9]),
        classes_N=torch.tensor([1]),
        mask_probs_MSS=None,
        mask_index_N=torch.tensor([-1]),
        image_size=(30, 40),
    )
    return Detections(prediction, NAMES)


def test_arrays_are_plain_and_cannot_be_changed(found):
    assert found.boxes_xyxy.dtype == np.float32
    assert found.scores.dtype == np.float32
    assert found.class_ids.tolist() == [2, 0, 0]
    assert found.labels == ("fork", "cup", "cup")
    assert found.masks.shape == (3, 30, 40)
    assert found.masks[0, 3:13, 2:12].all()
    assert found.masks[0].sum() == 100
    for array in (found.boxes_xyxy, found.scores, found.class_ids, found.masks):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_items_carry_their_own_mask(found):
    items = list(found)
    assert [item.label for item in items] == ["fork", "cup", "cup"]
    assert items[2].box_xyxy == (20.5, 0.0, 39.5, 29.75)
    for item, mask_HW in zip(items, found.masks, strict=True):
        np.testing.assert_array_equal(item.mask, mask_HW)


def test_choosing_keeps_masks_with_their_boxes(found):
    assert found.above(0.5).labels == ("fork", "cup")
    assert len(found.above(0.95)) == 0
    assert found.top(1).labels == ("fork",)
    assert len(found.top(99)) == 3
    cups = found.of("cup")
    assert cups.scores.tolist() == found.scores[1:].tolist()
    np.testing.assert_array_equal(cups.masks, found.masks[1:])


def test_a_score_equal_to_the_threshold_is_not_above_it(found):
    assert len(found.above(0.25)) == 2


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside pycocotools
def test_coco_rows_decode_to_the_masks(found):
    rows = json.loads(json.dumps(found.to_coco("a7", category_ids=[10, 20, 30])))
    assert [row["category_id"] for row in rows] == [30, 10, 10]
    assert rows[2]["bbox"] == [20.5, 0.0, 19.0, 29.75]
    assert rows[0]["image_id"] == "a7"
    for row, mask_HW in zip(rows, found.masks, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]).astype(bool), mask_HW)
    assert [row["category_id"] for row in found.to_coco(1)] == [3, 1, 1]


def test_dictionaries_are_ready_for_json(found):
    content = json.loads(json.dumps(found.to_dict()))
    assert (content["width"], content["height"]) == (40, 30)
    assert content["detections"][1]["label"] == "cup"
    assert content["detections"][1]["mask"]["size"] == [30, 40]
    assert "mask" not in found.to_dict(masks=False)["detections"][0]


def test_detectron2_gets_instances(found):
    instances = found.to_detectron2()
    assert type(instances).__name__ == "Instances"
    assert instances.image_size == (30, 40)
    assert instances.pred_classes.tolist() == [2, 0, 0]
    np.testing.assert_array_equal(instances.pred_masks.numpy(), found.masks)


@pytest.mark.parametrize("kind", ["found", "without_masks", "nothing"])
def test_pandas_gets_the_same_numbers(request, kind):
    ours = form(request, kind)
    frame = ours.to_pandas()
    assert list(frame["label"]) == list(ours.labels)
    assert list(frame["class_id"]) == ours.class_ids.tolist()
    np.testing.assert_array_equal(frame["score"].to_numpy(), ours.scores)
    np.testing.assert_array_equal(frame[["x0", "y0", "x1", "y1"]].to_numpy(), ours.boxes_xyxy)
    assert ("mask_area" in frame) == ours.has_masks
    if ours.has_masks:
        assert list(frame["mask_area"]) == ours.masks.sum(axis=(1, 2)).tolist()
    frame["score"] = 0.0
    frame.loc[:, "x0"] = 0.0
    assert kind == "nothing" or ours.boxes_xyxy[:, 0].any()


@pytest.mark.parametrize("kind", ["found", "without_masks", "nothing"])
def test_supervision_gets_the_same_numbers(request, kind):
    import supervision

    ours = form(request, kind)
    theirs = ours.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert len(theirs) == len(ours)
    np.testing.assert_array_equal(theirs.xyxy, ours.boxes_xyxy)
    np.testing.assert_array_equal(theirs.confidence, ours.scores)
    np.testing.assert_array_equal(theirs.class_id, ours.class_ids)
    assert theirs.data["class_name"].tolist() == list(ours.labels)
    assert (theirs.mask is not None) == ours.has_masks
    if ours.has_masks:
        np.testing.assert_array_equal(theirs.mask, ours.masks)
    # Their own operations work on it.
    assert len(theirs[theirs.confidence > 0.5]) == len(ours.above(0.5))
    assert len(theirs.with_nms(threshold=0.99)) <= len(ours)
    theirs.xyxy[:] = 0
    assert kind == "nothing" or ours.boxes_xyxy.any()


def form(request: pytest.FixtureRequest, kind: str) -> Detections:
    if kind == "nothing":
        nothing: Detections = request.getfixturevalue("found").above(1.0)
        return nothing
    ours: Detections = request.getfixturevalue(kind)
    return ours


def test_missing_packages_are_named(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingDependencyError) as caught:
        found.to_supervision()
    assert "pip install supervision" in str(caught.value.hint)


def test_without_masks_everything_else_works(without_masks):
    assert not without_masks.has_masks
    (item,) = without_masks
    assert item.mask is None
    assert "segmentation" not in without_masks.to_coco(1)[0]
    assert "mask" not in without_masks.to_dict()["detections"][0]
    assert not hasattr(without_masks.to_detectron2(), "pred_masks")
    without_masks.draw(np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(InputError, match="no masks"):
        _ = without_masks.masks
    with pytest.raises(InputError, match="no masks"):
        _ = without_masks.rles


def test_nothing_found_is_an_ordinary_answer(found):
    nothing = found.above(1.0)
    assert nothing.masks.shape == (0, 30, 40)
    assert nothing.boxes_xyxy.shape == (0, 4)
    assert nothing.to_coco(1) == []
    assert nothing.to_dict()["detections"] == []
    assert nothing.rles == ()
    assert list(nothing) == []
    assert nothing.draw(Image.new("RGB", (40, 30))).getbbox() is None


def test_drawing_on_another_picture_is_refused(found):
    with pytest.raises(InputError, match="41 x 30"):
        found.draw(Image.new("RGB", (41, 30)))
    assert found.draw(Image.new("RGB", (40, 30))).getbbox() is not None
