"""Reading of results files, and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxydet.errors import DataError
from proxydet.evaluation import results as results_module
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import evaluate_results
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results, read_results

FAST = EvaluationConfig(bootstrap=0)


@pytest.fixture
def files(tmp_path: Path, make_set: Callable[..., Any]) -> tuple[GroundTruth, list[Any], Path]:
    truth, detections = make_set(1, images=6, per_image=25)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(detections))
    return GroundTruth.load(truth), detections, path


def assert_equal(first: Results, second: Results) -> None:
    for name in ("image_D", "category_D", "score_D", "box_D4", "mask_D", "mask_area_M"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.masks == second.masks


def test_plain_zipped_and_values_are_one(files: Any) -> None:
    truth, detections, path = files
    from_values = read_results(detections, truth)
    zipped = path.with_suffix(".json.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert_equal(read_results(path, truth), from_values)
    assert_equal(read_results(zipped, truth), from_values)
    indented = path.with_name("indented.json")
    indented.write_text(json.dumps(detections, indent=3))
    assert_equal(read_results(indented, truth), from_values)


@pytest.mark.parametrize("block", [64, 300, 1000, 4096])
@pytest.mark.parametrize("indent", [None, 2])
def test_blocks_of_any_size_give_the_same(
    files: Any, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    truth, detections, path = files
    for row in detections[::3]:
        # Nested lists of objects, and text that looks like a boundary: no place to cut at.
        row["parts"] = [{"a": 1}, {"b": "},{"}, {"c": [{"d": 2}, {"e": 3}]}]
    expected = read_results(detections, truth)
    path.write_text(json.dumps(detections, indent=indent))
    monkeypatch.setattr(results_module, "_BLOCK_BYTES", block)
    assert_equal(read_results(path, truth), expected)


def test_only_masks_that_can_be_judged_are_kept(files: Any) -> None:
    truth, detections, path = files
    results = read_results(path, truth)
    judged_D = truth.judged_IC[results.image_D, results.category_D]
    assert 0 < judged_D.sum() < len(detections)
    np.testing.assert_array_equal(results.mask_D >= 0, judged_D)
    assert len(read_results(path, truth, keep_every_mask=True).masks) == len(detections)


def test_boxes_are_drawn_around_masks_that_have_none(files: Any) -> None:
    truth, detections, _ = files
    bare = [{key: row[key] for key in row if key != "bbox"} for row in detections]
    report = evaluate_results(bare, truth, config=FAST)
    expected = evaluate_results(detections, truth, config=FAST)
    assert report.types["segm"].metrics == expected.types["segm"].metrics
    assert report.types["bbox"].metrics["AP"] is not None


def test_masks_as_polygons_and_uncompressed_runs(files: Any) -> None:
    truth, detections, _ = files
    rows = [
        {**detections[0], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]},
        {**detections[1], "segmentation": {"size": [48, 64], "counts": [10, 20, 48 * 64 - 30]}},
        {**detections[2], "segmentation": None},
    ]
    results = read_results(rows, truth, keep_every_mask=True)
    assert results.mask_area_M.tolist() == [64.0, 20.0]
    assert results.mask_D.tolist() == [0, 1, -1]


def test_masks_for_some_detections_only(files: Any) -> None:
    truth, detections, _ = files
    del detections[3]["segmentation"]
    assert set(evaluate_results(detections, truth, config=FAST).types) == {"bbox"}


def broken(rows: list[Any], index: int, **changes: Any) -> list[Any]:
    rows[index] = {**rows[index], **changes}
    return rows


BAD_VALUES = {
    "unknown image": ({"image_id": 5}, r"2 of \d+ detections name images.*detection 2: image_id 5"),
    "unknown category": (
        {"category_id": 4},
        r"2 of .* name categories.*detection 2: category_id 4",
    ),
    "endless score": (
        {"score": float("inf")},
        r"2 numbers are not finite \(Infinity in detection 2,",
    ),
    "no score": ({"score": float("nan")}, r"2 numbers are not finite \(NaN in detection 2,"),
    "endless box": ({"bbox": [0, 0, float("nan"), 1]}, r"2 numbers are not finite \(NaN in det"),
    "negative side": ({"bbox": [1, 1, -4, 5]}, r"2 of .* negative.*detection 2: \[1, 1, -4, 5\]"),
    "outside": ({"bbox": [50, 1, 20, 5]}, r"2 of .* reaches out of their image.*of 48 x 64"),
    "left of": ({"bbox": [-2, 1, 20, 5]}, r"2 of .* reaches out of their image"),
    "mask size": (
        {"segmentation": {"size": [40, 64], "counts": "0"}},
        r"2 of .* not of their image's size .*40 x 64 in image .* of 48 x 64\)\.$",
    ),
    "mask runs": (
        {"segmentation": {"size": [48, 64], "counts": "54"}},
        r"2 of .* have a damaged mask \(detection 2 in image \d+: run lengths that do not fill it; detection 4 ",
    ),
    "mask kind": ({"segmentation": "mask.png"}, r"2 of .* have a damaged mask"),
    "mask polygon": ({"segmentation": [[1, 2, 3]]}, r"damaged mask .* fewer than 3 points"),
    "mask two points": ({"segmentation": [[10, 10, 30, 30]]}, r"damaged mask .* fewer than 3 poi"),
    "mask flat": ({"segmentation": [1, 1, 9, 1, 9, 9]}, r"damaged mask .* flat list of numbers"),
    "mask far": (
        {"segmentation": [[1, 1, 9, 1e9, 3e8, 9]]},
        r"damaged mask .* coordinate beyond 100000 pixels",
    ),
    "mask point pairs": ({"segmentation": [[[1, 1], [9, 1], [9, 9]]]}, r"damaged mask .* lists of"),
    "mask bytes": (
        {"segmentation": {"size": [48, 64], "counts": "b'PPY'"}},
        r"damaged mask .* Python's b'",
    ),
    "mask null": ({"segmentation": {"size": [48, 64], "counts": None}}, r"damaged mask .* no run"),
    "mask long runs": (
        {"segmentation": {"size": [48, 64], "counts": [640, 30, 100000]}},
        r"damaged mask .* do not fill",
    ),
    "mask without size": ({"segmentation": {"counts": [640, 30]}}, r"damaged mask .* with a size"),
    "mask huge": (
        {"segmentation": {"size": [1e200, 64], "counts": "0"}},
        r"not of their image's size",
    ),
    "endless number": ({"score": 10**400}, r"\$\[2\]\.score"),
    "id of another kind": ({"image_id": [1]}, r"\$\[2\]\.image_id"),
    "huge id": ({"image_id": 10**30}, r"name images.*image_id 10{30}"),
    "box of five": ({"bbox": [1, 2, 3, 4, 5]}, r"\$\[2\]\.bbox"),
    "mask text": (
        {"segmentation": {"size": [48, 64], "counts": "é"}},
        r"2 of .* have a damaged mask",
    ),
    "neither": ({"bbox": None, "segmentation": None}, r"2 of .* neither a box nor a mask"),
}


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_is_told_with_its_place(
    files: Any, changes: dict[str, Any], message: str, as_file: bool
) -> None:
    truth, detections, path = files
    rows = broken(broken(detections, 2, **changes), 4, **changes)
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as caught:
        read_results(path if as_file else rows, truth, keep_every_mask=True)
    assert caught.value.hint
    assert caught.value.path == (path if as_file else None)


def test_boxes_may_reach_out_when_that_is_said(files: Any) -> None:
    truth, detections, _ = files
    rows = broken(detections, 2, bbox=[50, 1, 20, 5])
    assert len(read_results(rows, truth, allow_outside=True)) == len(rows)


def test_a_pixel_of_rounding_is_no_reaching_out(files: Any) -> None:
    truth, detections, _ = files
    assert len(read_results(broken(detections, 2, bbox=[-0.9, 0, 65.5, 48.9]), truth))


def test_another_data_set_is_named(files: Any, make_set: Callable[..., Any]) -> None:
    truth, detections, _ = files
    for row in detections:
        row["image_id"] += 10_000
    with pytest.raises(DataError, match="results of another data set than annotations") as caught:
        read_results(detections, truth)
    assert "annotation file of the data set" in caught.value.hint


@pytest.mark.parametrize(("key", "every"), [("image_id", True), ("category_id", False)])
def test_ids_written_as_text_are_not_taken_for_another_data_set(
    files: Any, key: str, every: bool
) -> None:
    truth, detections, _ = files
    for row in detections if every else detections[:1]:
        row[key] = str(row[key])
    with pytest.raises(DataError, match=f"{key} '") as caught:
        read_results(detections, truth)
    assert "numbers or as text" in caught.value.hint
    assert "another data set" not in str(caught.value)


def test_a_file_that_was_joined_twice_is_refused_unless_it_is_meant(files: Any) -> None:
    truth, detections, path = files
    path.write_text(json.dumps(detections + detections))
    with pytest.raises(
        DataError, match=r"every detection of all \d images .* more than once"
    ) as caught:
        read_results(path, truth)
    assert "--allow-duplicates" in caught.value.hint
    assert len(read_results(path, truth, allow_duplicates=True)) == 2 * len(detections)


def test_one_image_that_is_there_twice_is_a_warning(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    truth, detections, path = files
    image = detections[0]["image_id"]
    twice = detections + [row for row in detections if row["image_id"] == image]
    path.write_text(json.dumps(twice))
    assert len(read_results(path, truth)) == len(twice)
    assert f"every detection of 1 images occurs more than once (images {image})" in caplog.text


def test_one_detection_that_is_there_twice_is_accepted(files: Any) -> None:
    truth, detections, _ = files
    assert len(read_results([*detections, detections[0]], truth)) == len(detections) + 1


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("block", [200, 2**20])
def test_a_truncated_file(
    files: Any, monkeypatch: pytest.MonkeyPatch, kept: float, block: int
) -> None:
    truth, _, path = files
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    monkeypatch.setattr(results_module, "_BLOCK_BYTES", block)
    with pytest.raises(DataError, match="cut short") as caught:
        read_results(path, truth)
    assert caught.value.hint


def test_a_file_that_ends_in_a_number(files: Any, tmp_path: Path) -> None:
    truth, _, path = files
    path.write_text('[{"image_id": 1, "category_id": 2, "score": 0.')
    with pytest.raises(DataError, match="cut short"):
        read_results(path, truth)
    annotations = tmp_path / "annotations.json"
    annotations.write_text('{"images": [{"id": 1, "width": -')
    with pytest.raises(DataError, match="cut short"):
        GroundTruth.load(annotations)


def test_a_truncated_gzip_file(files: Any) -> None:
    truth, _, path = files
    path.write_bytes(gzip.compress(path.read_bytes())[:-200])
    with pytest.raises(DataError, match="damaged or incomplete gzip"):
        read_results(path, truth)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[1 2]", "not .* results format|not valid JSON"),
        ("{]", "not .* results format|not valid JSON"),
        ('{"annotation": []}', "is not a list of detections"),
        ('{"annotations": {}}', "is not a list of detections"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 2}]}', "`score`"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('[{"image_id": 1, "category_id": 2, "score": 1, "x":' + "[" * 100_000, "nested too dee"),
        ('[{"image_id": 1}]', r"missing required field `category_id` - at `\$\[0\]`"),
        ('[{"image_id": 1, "category_id": 2, "score": "high"}]', r"\$\[0\]\.score"),
    ],
)
def test_a_file_of_another_kind(files: Any, content: str, message: str) -> None:
    truth, _, path = files
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(path, truth)


def test_a_wrong_type_is_told_with_its_number_in_the_whole_file(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, detections, path = files
    path.write_text(json.dumps(broken(detections, 20, score="high")))
    monkeypatch.setattr(results_module, "_BLOCK_BYTES", 1000)
    with pytest.raises(DataError, match=r"\$\[20\]\.score"):
        read_results(path, truth)


def test_a_file_that_is_not_there(files: Any, tmp_path: Path) -> None:
    truth, _, _ = files
    with pytest.raises(DataError, match=r"Cannot read .*absent\.json: No such file"):
        read_results(tmp_path / "absent.json", truth)


def saved_by_predict(truth: dict[str, Any], detections: list[Any], folder: str) -> dict[str, Any]:
    """The same detections as ``predict --save coco`` writes them: images and classes have numbers of its own."""
    image_of = {row["id"]: number for number, row in enumerate(truth["images"][::-1], start=1)}
    class_of = {row["id"]: number for number, row in enumerate(truth["categories"][::-1], start=1)}
    annotations = [
        {
            **row,
            "id": number,
            "image_id": image_of[row["image_id"]],
            "category_id": class_of[row["category_id"]],
            "iscrowd": 0,
            "area": 1.0,
        }
        for number, row in enumerate(detections, start=1)
    ]
    return {
        "images": [
            {**row, "id": image_of[row["id"]], "file_name": folder + row["file_name"]}
            for row in truth["images"]
        ],
        "categories": [
            {"id": class_of[row["id"]], "name": row["name"]} for row in truth["categories"]
        ],
        "annotations": annotations,
    }


@pytest.mark.parametrize("folder", ["", "/data/images/", "photos\\\\"])
def test_what_predict_saves_is_mapped_by_names(
    tmp_path: Path, make_set: Callable[..., Any], folder: str
) -> None:
    drawn, detections = make_set(1, images=6, per_image=25)
    truth = GroundTruth.load(drawn)
    content = saved_by_predict(drawn, detections, folder)
    assert_equal(read_results(content, truth), read_results(detections, truth))
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    assert_equal(read_results(path, truth), read_results(detections, truth))
    # Annotation files may name folders too, as long as only one image fits.
    for row in drawn["images"]:
        row["file_name"] = f"val/{row['file_name']}"
    assert_equal(read_results(path, GroundTruth.load(drawn)), read_results(detections, truth))


def test_an_object_without_names_goes_by_ids(files: Any) -> None:
    truth, detections, _ = files
    assert_equal(read_results({"predictions": detections}, truth), read_results(detections, truth))


def test_images_and_classes_that_the_data_set_lacks_are_named(make_set: Callable[..., Any]) -> None:
    drawn, detections = make_set(1, images=6, per_image=25)
    truth = GroundTruth.load(drawn)
    content = saved_by_predict(drawn, detections, "")
    for row in content["images"]:
        row["file_name"] = "other" + row["file_name"]
    with pytest.raises(DataError, match=r"none of its 6 images is in .*\(other"):
        read_results(content, truth)
    content = saved_by_predict(drawn, detections, "")
    for row in content["categories"]:
        row["name"] = "no " + row["name"]
    with pytest.raises(DataError, match=r"none of its 5 categories .*\(no thing"):
        read_results(content, truth)
    content["categories"][0]["name"] = "thing 0"
    with pytest.raises(DataError, match="name categories that the data set does not have"):
        read_results(content, truth)


def test_two_images_of_one_name_are_refused(make_set: Callable[..., Any]) -> None:
    drawn, detections = make_set(1, images=6, per_image=25)
    content = saved_by_predict(drawn, detections, "a/")
    content["images"][0]["file_name"] = "b/" + drawn["images"][1]["file_name"]
    with pytest.raises(DataError, match="are both the image"):
        read_results(content, GroundTruth.load(drawn))


def test_a_byte_order_mark_and_whole_numbers_with_a_point_are_read(files: Any) -> None:
    truth, detections, path = files
    expected = read_results(detections, truth)
    path.write_text(json.dumps(detections), encoding="utf-8-sig")
    assert_equal(read_results(path, truth), expected)
    for row in detections:
        row["image_id"], row["category_id"] = float(row["image_id"]), float(row["category_id"])
    assert_equal(read_results(detections, truth), expected)


def test_boxes_drawn_around_masks_are_so_for_unjudged_detections_too(files: Any) -> None:
    truth, detections, _ = files
    for row in detections:
        del row["bbox"]
    results = read_results(detections, truth)
    covers = results.mask_area_M[results.mask_D] > 0
    assert (results.mask_D >= 0).all()
    assert results.drawn_D.all()
    assert (results.box_D4[covers][:, 2:] > 0).all()


def test_damage_at_the_start_of_a_long_file_is_found_at_once(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, detections, path = files
    rows = broken(detections, 1, score=float("nan"))
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(results_module, "_BLOCK_BYTES", 1000)
    with pytest.raises(DataError, match=r"1 numbers are not finite \(NaN in detection 1\)"):
        read_results(path, truth)
