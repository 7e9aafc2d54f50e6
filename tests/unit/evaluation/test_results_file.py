"""Reading of results files, and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxydet.data.masks import rasterize
from proxydet.data.records import DEVIATIONS
from proxydet.errors import DataError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results, read_results

FAST = EvaluationConfig(bootstrap=0)


@pytest.fixture
def files(tmp_path, make_set) -> tuple[GroundTruth, list[Any], Path]:
    truth, detections = make_set(1, images=6, per_image=25)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(detections))
    return GroundTruth.load(truth), detections, path


def assert_equal(first: Results, second: Results) -> None:
    for name in ("image_D", "category_D", "score_D", "box_D4", "mask_D", "mask_area_M"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.masks == second.masks


def test_plain_zipped_and_values_are_one(files):
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
def test_blocks_of_any_size_give_the_same(files, monkeypatch, block, indent):
    truth, detections, path = files
    for row in detections[::3]:
        # Nested lists of objects, and text that looks like a boundary: no place to cut at.
        row["parts"] = [{"a": 1}, {"b": "},{"}, {"c": [{"d": 2}, {"e": 3}]}]
    expected = read_results(detections, truth)
    path.write_text(json.dumps(detections, indent=indent))
    monkeypatch.setattr("proxydet.data.formats.coco._BLOCK_BYTES", block)
    assert_equal(read_results(path, truth), expected)


def test_only_masks_that_can_be_judged_are_kept(files):
    truth, detections, path = files
    results = read_results(path, truth)
    judged_D = truth.judges(results.image_D, results.category_D)
    assert 0 < judged_D.sum() < len(detections)
    np.testing.assert_array_equal(results.mask_D >= 0, judged_D)
    assert len(read_results(path, truth, keep_every_mask=True).masks) == len(detections)


def test_boxes_are_drawn_around_masks_that_have_none(files):
    truth, detections, _ = files
    bare = [{key: row[key] for key in row if key != "bbox"} for row in detections]
    report = run_evaluation(bare, truth, config=FAST).report
    expected = run_evaluation(detections, truth, config=FAST).report
    assert report.types["segm"].metrics == expected.types["segm"].metrics
    assert report.types["bbox"].metrics["AP"] is not None


def test_masks_as_polygons_and_uncompressed_runs(files):
    truth, detections, _ = files
    rows = [
        {**detections[0], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]},
        {**detections[1], "segmentation": {"size": [48, 64], "counts": [10, 20, 48 * 64 - 30]}},
        {**detections[2], "segmentation": None},
    ]
    results = read_results(rows, truth, keep_every_mask=True)
    assert results.mask_area_M.tolist() == [64.0, 20.0]
    assert results.mask_D.tolist() == [0, 1, -1]


def test_masks_for_some_detections_only(files):
    truth, detections, _ = files
    del detections[3]["segmentation"]
    assert set(run_evaluation(detections, truth, config=FAST).report.types) == {"bbox"}


def test_what_is_no_record_is_dropped_and_counted(files, caplog):
    truth, detections, path = files
    path.write_text(json.dumps([*detections[:2], "no record", *detections[2:], None]))
    results = read_results(path, truth)
    assert_equal(results, read_results(detections, truth))
    assert results.report.examples == {
        "detection.record": ["position 2", f"position {len(detections) + 1}"]
    }
    assert "2 detections dropped: record not an object" in caplog.text


def broken(rows: list[Any], index: int, **changes: Any) -> list[Any]:
    rows[index] = {**rows[index], **changes}
    return rows


REFUSED = {
    "unknown image": ({"image_id": 5}, r"2 detections refused: image_id .*position 2: image_id 5"),
    "unknown category": (
        {"category_id": 4},
        r"2 detections refused: category_id .*position 2: category_id 4",
    ),
    "outside": ({"bbox": [50, 1, 20, 5]}, r"2 detections refused: bbox .*of width 64, height 48"),
    "left of": ({"bbox": [-2, 1, 20, 5]}, r"2 detections refused: bbox"),
    "huge id": ({"image_id": 10**30}, r"refused: image_id .*image_id 10{30}"),
}


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_of_this_data_set_is_told_with_its_place(files, changes, message, as_file):
    truth, detections, path = files
    rows = broken(broken(detections, 2, **changes), 4, **changes)
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as caught:
        read_results(path if as_file else rows, truth, keep_every_mask=True)
    assert caught.value.hint
    assert caught.value.path == (path if as_file else None)


SQUARE = [[1, 1, 9, 1, 9, 9, 1, 9]]
COUNTS = rasterize(SQUARE, (48, 64))
DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "endless score": ({"score": float("inf")}, "detection.score"),
    "no score": ({"score": float("nan")}, "detection.score"),
    "score as text": ({"score": "high"}, "detection.score"),
    "endless number": ({"score": 10**400}, "detection.score"),
    "score null": ({"score": None}, "detection.score"),
    "id of another kind": ({"image_id": [1]}, "annotation.image_id"),
    "category null": ({"category_id": None}, "annotation.category_id"),
    "negative side": ({"bbox": [1, 1, -4, 5], "segmentation": None}, "annotation.bbox"),
    "far box": ({"bbox": [1, 1, 4e9, 5], "segmentation": None}, "annotation.bbox"),
    "neither": ({"bbox": None, "segmentation": None}, "annotation.bbox"),
    "neither can be read": ({"bbox": None, "segmentation": "mask.png"}, "annotation.bbox"),
}
MENDED: dict[str, tuple[dict[str, Any], str, float | None]] = {
    "box with NaN": ({"bbox": [0, 0, float("nan"), 1]}, "annotation.bbox.mask", 64),
    "negative side": ({"bbox": [1, 1, -4, 5]}, "annotation.bbox.mask", 64),
    "box of five": ({"bbox": [1, 2, 3, 4, 5]}, "annotation.bbox.mask", 64),
    "flat": ({"segmentation": [1, 1, 9, 1, 9, 9, 1, 9]}, "annotation.segmentation.flat", 64),
    "points": ({"segmentation": [[1, 1], [9, 1], [9, 9]]}, "annotation.segmentation.flat", 28),
    "lists of points": (
        {"segmentation": [[[1, 1], [9, 1], [9, 9]]]},
        "annotation.segmentation.flat",
        28,
    ),
    "one bad polygon": ({"segmentation": [[1, 2, 3], [1, 1, 9, 1, 9, 9]]}, "polygon.points", 28),
    "bytes": (
        {"segmentation": {"size": [48, 64], "counts": repr(COUNTS)}},
        "annotation.segmentation.bytes",
        64,
    ),
    "size": ({"segmentation": {"size": [40, 64], "counts": "0"}}, "annotation.rle.size", None),
    "no size": ({"segmentation": {"counts": [640, 30]}}, "annotation.rle.size", None),
    "huge": ({"segmentation": {"size": [1e200, 64], "counts": "0"}}, "annotation.rle.size", None),
    "runs": ({"segmentation": {"size": [48, 64], "counts": "54"}}, "annotation.rle.counts", None),
    "text": ({"segmentation": {"size": [48, 64], "counts": "é"}}, "annotation.rle.counts", None),
    "null": ({"segmentation": {"size": [48, 64], "counts": None}}, "annotation.rle.counts", None),
    "long runs": (
        {"segmentation": {"size": [48, 64], "counts": [640, 30, 100000]}},
        "annotation.rle.counts",
        None,
    ),
    "kind": ({"segmentation": "mask.png"}, "annotation.segmentation", None),
    "two points": ({"segmentation": [[10, 10, 30, 30]]}, "annotation.segmentation.polygons", None),
    "far": ({"segmentation": [[1, 1, 9, 1e9, 3e8, 9]]}, "annotation.segmentation.polygons", None),
}


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(("changes", "key"), DROPPED.values(), ids=DROPPED)
def test_a_detection_that_cannot_be_scored_is_dropped_counted_and_told(
    files, changes, key, as_file, caplog
):
    truth, detections, path = files
    rows = broken(broken(detections, 2, **changes), 4, **changes)
    path.write_text(json.dumps(rows))
    results = read_results(path if as_file else rows, truth)
    others = [row for at, row in enumerate(rows) if at not in (2, 4)]
    assert_equal(results, read_results(others, truth))
    assert results.report.counts[key] == 2
    assert results.report.examples[key] == ["position 2", "position 4"]
    report = results.report
    assert (report.annotations_in, report.annotations_kept) == (len(rows), len(rows) - 2)
    assert f"2 detections dropped: {DEVIATIONS[key].field}" in caplog.text
    counts = run_evaluation(rows, truth, config=FAST).report.to_dict()["counts"]
    assert [line for line in counts["deviations"] if line.startswith("2 detections dropped: ")]
    # A file of which nothing is left is refused, with what was wrong.
    with pytest.raises(DataError, match=f"no detection is left.*{DEVIATIONS[key].field}"):
        read_results([rows[2]], truth)


@pytest.mark.parametrize(("changes", "key", "area"), MENDED.values(), ids=MENDED)
def test_annotations_and_results_have_one_fate(tmp_path, make_set, changes, key, area):
    """The same record, as an annotation and as a detection: the same count, the same mask left."""
    drawn, detections = make_set(1, images=6, per_image=25)
    truth = GroundTruth.load(drawn)
    for row in detections:
        row["segmentation"], row["bbox"] = SQUARE, [1, 1, 8, 8]
    rows = broken(broken(detections, 2, **changes), 4, **changes)
    results = read_results(rows, truth, keep_every_mask=True)
    counts = {k: n for k, n in results.report.counts.items() if k != "file.nan"}
    assert counts[key] == 2
    if area is None:
        assert results.mask_area_M[results.mask_D[[2, 4]]].tolist() == [0, 0]
        assert (results.without_mask, results.damaged_masks) == (0, 2)
    else:
        assert results.mask_area_M[results.mask_D[[2, 4]]].tolist() == [area, area]
    assert (results.box_D4[:, 2:] >= 0).all()

    drawn["annotations"] = [
        {**row, "id": at, "image_id": row["image_id"], "area": 1, "iscrowd": 0}
        for at, row in enumerate(rows)
    ]
    store = GroundTruth.load(drawn).store
    assert {k: store.report.counts[k] for k in counts} == counts
    row = store.column("annotation_id").tolist().index(2)
    assert bool(store.masked_A[row]) == (area is not None)


def as_corners(row: dict[str, Any]) -> list[float]:
    x, y, width, height = row["bbox"]
    return [x, y, x + width, y + height]


def as_fractions(row: dict[str, Any]) -> list[float]:
    x, y, width, height = row["bbox"]
    return [x / 64, y / 48, width / 64, height / 48]


def with_outlier(rows: list[Any]) -> list[Any]:
    return [{**rows[0], "bbox": [1, 1, 9, 9]}, *rows[1:]]


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize(("spell", "masks", "what"), [
    (as_fractions, True, "fractions"),
    (as_fractions, False, "fractions"),
    (as_corners, True, r"\[x1, y1, x2, y2\]"),
])  # fmt: skip
def test_boxes_of_another_convention_are_refused(files, spell, masks, what, outlier):
    truth, detections, path = files
    rows = [{**row, "bbox": spell(row)} for row in detections if min(row["bbox"][2:]) > 3]
    if not masks:
        for row in rows:
            del row["segmentation"]
    path.write_text(json.dumps(with_outlier(rows) if outlier else rows))
    with pytest.raises(DataError, match=f"results.json: bbox: .*{what}"):
        read_results(path, truth, allow_outside=True)


def test_corners_that_reach_out_of_the_image_as_widths_are_refused(files):
    truth, detections, _ = files
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "score")}
        | {"bbox": [20 + at % 20, 20 + at % 9, 44 + at % 20, 40 + at % 8]}
        for at, row in enumerate(detections)
    ]
    with pytest.raises(DataError, match=r"bbox: .*\[x1, y1, x2, y2\]"):
        read_results(with_outlier(rows), truth, allow_outside=True)
    # A few that reach out are what they are: single wrong boxes.
    inside = [{**row, "bbox": [1, 1, 9, 9]} for row in rows[4:]]
    assert len(read_results(rows[:4] + inside, truth, allow_outside=True)) == len(rows)


@pytest.mark.parametrize("count", [1, 12])
def test_corners_inside_the_image_either_way_are_warned_of(caplog, count):
    images = [{"id": at, "file_name": f"{at}.jpg", "width": 640, "height": 480} for at in range(12)]
    box = [100, 90, 200, 150]
    objects = [
        {"id": at + 1, "image_id": at, "category_id": 1, "bbox": box, "area": 30000, "iscrowd": 0}
        for at in range(12)
    ]
    truth = GroundTruth.load(
        {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    )
    rows = [
        {"image_id": at, "category_id": 1, "score": 0.9, "bbox": as_corners({"bbox": box})}
        for at in range(count)
    ]
    read_results(rows, truth)
    assert "bbox" in caplog.text
    assert "[x1, y1, x2, y2]" in caplog.text
    caplog.clear()
    read_results([{**row, "bbox": box} for row in rows], truth)
    read_results([{**row, "bbox": [400, 300, 80, 90]} for row in rows], truth)
    assert caplog.text == ""


@pytest.mark.parametrize("federated", [True, False])
def test_a_damaged_mask_is_an_empty_one_in_both_engines(make_set, federated):
    drawn, detections = make_set(1, images=6, per_image=25, federated=federated)
    truth = GroundTruth.load(drawn)
    damaged = {"size": [48, 64], "counts": "54"}
    rows = [
        row | ({"segmentation": damaged} if at % 7 == 0 else {})
        for at, row in enumerate(detections)
    ]
    empty = [
        row | ({"segmentation": {"size": [48, 64], "counts": [48 * 64]}} if at % 7 == 0 else {})
        for at, row in enumerate(detections)
    ]
    expected = run_evaluation(empty, truth, config=FAST).report
    for engine in ("hotcoco", "lvis"):
        config = EvaluationConfig(bootstrap=0, engine=engine)  # type: ignore[arg-type]
        report = run_evaluation(rows, truth, config=config).report
        assert list(report.types) == ["bbox", "segm"]
        assert report.counts.without_mask == 0
        assert report.counts.damaged_masks > 0
        for kind, part in report.types.items():
            assert part.metrics == pytest.approx(expected.types[kind].metrics, nan_ok=True)


def test_masks_none_of_which_can_be_read_are_refused_where_most_detections_have_one(files):
    truth, detections, _ = files
    for at, row in enumerate(detections):
        row["segmentation"] = None if at else [[10, 10, 30, 30]]
    assert len(read_results(detections, truth)) == len(detections)
    for row in detections:
        row["segmentation"] = [[10, 10, 30, 30]]
    with pytest.raises(DataError, match=r"segmentation.*none of them can be read"):
        read_results(detections, truth)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text.replace(b'"file_name": "', b'"file_name": "\\udcff', 1),
        lambda text: text.replace(b'"file_name": "', b'"file_name": "\\ud800', 1),
        lambda text: text.replace(b'"file_name": "', b'"file_name": "\xff', 1),
    ],
    ids=["second half of a surrogate pair", "first half", "not UTF-8"],
)
def test_text_that_is_not_unicode_costs_no_other_record(tmp_path, make_set, wrap):
    """In annotations and in results: read with U+FFFD, counted."""
    drawn, detections = make_set(1, images=6, per_image=25)
    drawn["images"][0]["note"] = "pair \U0001f600, escaped \\udcff"
    path = tmp_path / "annotations.json"
    path.write_bytes(wrap(json.dumps(drawn).encode()))
    truth = GroundTruth.load(path)
    assert truth.store.report.counts["file.text"] == 1
    first = drawn["images"][0]
    assert truth.image_names[truth.image_index[first["id"]]] == "\ufffd" + first["file_name"]
    path = tmp_path / "results.json"
    path.write_bytes(wrap(json.dumps(saved_by_predict(drawn, detections, "")).encode()))
    results = read_results(path, truth)
    assert results.report.counts["file.text"] == 1
    assert_equal(results, read_results(detections, truth))


def test_a_pixel_of_rounding_is_no_reaching_out_and_more_is_allowed_when_that_is_said(files):
    truth, detections, _ = files
    assert len(read_results(broken(detections, 2, bbox=[-0.9, 0, 65.5, 48.9]), truth))
    rows = broken(detections, 2, bbox=[50, 1, 20, 5])
    assert len(read_results(rows, truth, allow_outside=True)) == len(rows)


def test_another_data_set_is_named(files, make_set):
    truth, detections, _ = files
    for row in detections:
        row["image_id"] += 10_000
    with pytest.raises(DataError, match="results of another data set than annotations") as caught:
        read_results(detections, truth)
    assert "annotation file of the data set" in caught.value.hint


@pytest.mark.parametrize(("key", "every"), [("image_id", True), ("category_id", False)])
def test_ids_written_as_text_are_not_taken_for_another_data_set(files, key, every):
    truth, detections, _ = files
    for row in detections if every else detections[:1]:
        row[key] = str(row[key])
    with pytest.raises(DataError, match=f"{key} '") as caught:
        read_results(detections, truth)
    assert "numbers or as text" in caught.value.hint
    assert "another data set" not in str(caught.value)


def test_a_file_that_was_joined_twice_is_refused_unless_it_is_meant(files):
    truth, detections, path = files
    path.write_text(json.dumps(detections + detections))
    with pytest.raises(
        DataError, match=r"every detection of all \d images .* more than once"
    ) as caught:
        read_results(path, truth)
    assert "--allow-duplicates" in caught.value.hint
    assert len(read_results(path, truth, allow_duplicates=True)) == 2 * len(detections)


def test_one_image_that_is_there_twice_is_a_warning(files, caplog):
    truth, detections, path = files
    image = detections[0]["image_id"]
    twice = detections + [row for row in detections if row["image_id"] == image]
    path.write_text(json.dumps(twice))
    assert len(read_results(path, truth)) == len(twice)
    assert f"every detection of 1 images occurs more than once (images {image})" in caplog.text


def test_one_detection_that_is_there_twice_is_accepted(files):
    truth, detections, _ = files
    assert len(read_results([*detections, detections[0]], truth)) == len(detections) + 1


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("block", [200, 2**20])
def test_a_truncated_file(files, monkeypatch, kept, block):
    truth, _, path = files
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    monkeypatch.setattr("proxydet.data.formats.coco._BLOCK_BYTES", block)
    with pytest.raises(DataError, match="cut short") as caught:
        read_results(path, truth)
    assert caught.value.hint


def test_a_file_that_ends_in_a_number(files, tmp_path):
    truth, _, path = files
    path.write_text('[{"image_id": 1, "category_id": 2, "score": 0.')
    with pytest.raises(DataError, match="cut short"):
        read_results(path, truth)
    annotations = tmp_path / "annotations.json"
    annotations.write_text('{"images": [{"id": 1, "width": -')
    with pytest.raises(DataError, match="cut short"):
        GroundTruth.load(annotations)


def test_a_truncated_gzip_file(files):
    truth, _, path = files
    path.write_bytes(gzip.compress(path.read_bytes())[:-200])
    with pytest.raises(DataError, match="damaged gzip file"):
        read_results(path, truth)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[1 2]", "is not JSON: line 1, column 4"),
        ('[{"image_id": 1}] x', "is not JSON: line 1"),
        ("{]", "is not JSON"),
        ("3", "is not a results file"),
        ("[" + "0," * 2000 + "0]", "is not a list of objects"),
        ('{"annotation": []}', "no list of annotations"),
        ('{"annotations": {}}', "no list of annotations"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 2}]}', "score"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('[{"image_id": 1, "category_id": 2, "score": 1, "x":' + "[" * 100_000, "nested too dee"),
        ('[{"image_id": 1}]', "no detection is left.*category_id"),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 2, "bbox": [1, 1, 2, 2]}]}',
            "annotation file",
        ),
        ('[{"image_id": 1, "category_id": 2, "score": "high"}]', "no detection is left.*score"),
    ],
)
def test_a_file_of_another_kind(files, content, message):
    truth, _, path = files
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_results(path, truth)
    assert str(path) in caught.value.message


def test_an_empty_list_is_a_detector_that_finds_nothing(files, caplog):
    assert len(read_results([], files[0])) == 0
    assert "no detection" in caplog.text


def test_a_record_is_told_with_its_place_in_the_whole_file(files, monkeypatch):
    truth, detections, path = files
    rows = broken(broken(detections, 20, score="high"), 30, score=float("nan"))
    path.write_text(json.dumps(rows))
    monkeypatch.setattr("proxydet.data.formats.coco._BLOCK_BYTES", 1000)
    report = read_results(path, truth).report
    assert report.examples["detection.score"] == ["position 20", "position 30"]
    assert report.counts == {"detection.score": 2, "file.nan": 1}
    path.write_text(json.dumps(detections)[:-1] + ",\n {]")
    with pytest.raises(DataError, match="line 2, column 3"):
        read_results(path, truth)


def test_utf_16_is_named(files):
    truth, detections, path = files
    path.write_text(json.dumps(detections), encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        read_results(path, truth)


def test_a_file_that_is_not_there(files, tmp_path):
    truth, _, _ = files
    with pytest.raises(DataError, match=r"cannot read .*absent\.json: No such file"):
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
def test_what_predict_saves_is_mapped_by_names(tmp_path, make_set, folder):
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


def test_images_that_were_not_predicted_are_counted(make_set, caplog):
    drawn, detections = make_set(1, images=6, per_image=25)
    content = saved_by_predict(drawn, detections, "")
    read_results(content, GroundTruth.load(drawn))
    assert not caplog.text
    left_out = {row["id"] for row in content["images"][:2]}
    content["images"] = content["images"][2:]
    content["annotations"] = [
        row for row in content["annotations"] if row["image_id"] not in left_out
    ]
    read_results(content, GroundTruth.load(drawn))
    assert "2 of the 6 images" in caplog.text
    # A plain list does not say which images it is of.
    caplog.clear()
    read_results(detections[:1], GroundTruth.load(drawn))
    assert not caplog.text


def test_an_object_without_names_goes_by_ids(files):
    truth, detections, _ = files
    assert_equal(read_results({"predictions": detections}, truth), read_results(detections, truth))


def test_images_and_classes_that_the_data_set_lacks_are_named(make_set):
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
    with pytest.raises(DataError, match="refused: category_id"):
        read_results(content, truth)


def test_two_images_of_one_name_are_refused(make_set):
    drawn, detections = make_set(1, images=6, per_image=25)
    content = saved_by_predict(drawn, detections, "a/")
    content["images"][0]["file_name"] = "b/" + drawn["images"][1]["file_name"]
    with pytest.raises(DataError, match="are both the image"):
        read_results(content, GroundTruth.load(drawn))


def test_a_byte_order_mark_and_whole_numbers_with_a_point_are_read(files):
    truth, detections, path = files
    expected = read_results(detections, truth)
    path.write_text(json.dumps(detections), encoding="utf-8-sig")
    assert_equal(read_results(path, truth), expected)
    for row in detections:
        row["image_id"], row["category_id"] = float(row["image_id"]), float(row["category_id"])
    assert_equal(read_results(detections, truth), expected)


def test_boxes_drawn_around_masks_are_so_for_unjudged_detections_too(files):
    truth, detections, _ = files
    for row in detections:
        del row["bbox"]
    results = read_results(detections, truth)
    covers = results.mask_area_M[results.mask_D] > 0
    assert (results.mask_D >= 0).all()
    assert results.drawn_D.all()
    assert (results.box_D4[covers][:, 2:] > 0).all()


number = st.one_of(
    st.integers(-5, 70), st.floats(-60, 80), st.sampled_from([math.nan, math.inf, 1e308, 2**64])
)
anything = st.one_of(
    st.none(), st.booleans(), number, st.text(max_size=3), st.lists(number, max_size=5)
)
mask = st.one_of(
    anything,
    st.lists(st.one_of(st.lists(number, min_size=4, max_size=9), anything), max_size=3),
    st.fixed_dictionaries(
        {}, optional={"counts": anything, "size": st.one_of(st.just([48, 64]), anything)}
    ),
    st.just({"size": [48, 64], "counts": repr(COUNTS)}),
)
detection = st.fixed_dictionaries(
    {"image_id": st.sampled_from([1, 1.0, 1, [1]]), "category_id": st.sampled_from([1, None])},
    optional={
        "score": st.one_of(st.floats(0, 1), anything),
        "bbox": st.one_of(st.lists(number, min_size=4, max_size=4), anything),
        "segmentation": mask,
    },
)


def test_images_that_were_dropped_from_the_annotations_are_dropped_by_their_names_too():
    size = {"height": 48, "width": 64}
    box = {"category_id": 1, "bbox": [1, 1, 9, 9]}
    truth = GroundTruth.load(
        {
            "images": [
                {"id": 1, "file_name": "a/x.png", **size},
                {"id": 2, "file_name": "a/y.png", "height": 0, "width": 64},
                {"id": 3, "file_name": "a/z.png"},
            ],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 1, **box}],
        }
    )
    given_file = {
        "images": [{"id": 7 + at, "file_name": f"{name}.png"} for at, name in enumerate("xyz")],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 7 + at, "score": 0.5, **box} for at in range(3)],
    }
    results = read_results(given_file, truth)
    assert results.image_D.tolist() == [0]
    assert results.report.counts["detection.image_id.dropped"] == 2
    given_file["images"][2]["file_name"] = "elsewhere.png"
    with pytest.raises(DataError, match="1 detection refused: image_id"):
        read_results(given_file, truth)


@pytest.mark.parametrize(
    ("content", "kind"), [(b"\x89PNG\r\n\x1a\n", "PNG image"), (b"PK\x03\x04", "ZIP archive")]
)
def test_a_file_that_is_no_text_is_named_with_what_was_wanted(files, content, kind):
    truth, _, path = files
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"is a {kind}, not a results file"):
        read_results(path, truth)
    with pytest.raises(DataError, match=f"is a {kind}, not an annotation file"):
        GroundTruth.load(path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(detection, anything), max_size=6), st.booleans())
def test_no_detection_is_lost_silently(rows, every_mask):
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}
    truth = GroundTruth.load(
        {
            "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [{**box, "segmentation": SQUARE}],
        }
    )
    sound = {**box, "segmentation": SQUARE}
    given_rows = [sound, *rows]
    results = read_results(
        given_rows, truth, keep_every_mask=every_mask, allow_outside=True, allow_duplicates=True
    )
    report = results.report
    fates = {key: (rule.of, rule.fate) for key, rule in DEVIATIONS.items()}
    dropped = sum(
        count
        for key, count in report.counts.items()
        if fates[key] in (("annotation", "dropped"), ("detection", "dropped"))
    )
    assert report.annotations_in == len(given_rows)
    assert report.annotations_in == report.annotations_kept + dropped == len(results) + dropped
    assert np.isfinite(results.box_D4).all()
    assert np.isfinite(results.score_D).all()
    assert (results.mask_D < len(results.masks)).all()
    assert results.without_mask == np.count_nonzero(results.mask_D < 0)
    assert all(len(mask["counts"]) for mask in results.masks)
