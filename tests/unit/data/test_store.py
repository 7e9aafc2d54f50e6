import gzip
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import proxydet.data.store as store_module
from proxydet.data.masks import decode
from proxydet.data.records import DEVIATIONS, AnnotationSource, StoreReport
from proxydet.data.store import AnnotationStore, ImageRecord
from proxydet.errors import DataError, RuntimeEnvironmentError
from proxydet.evaluation.ground_truth import GroundTruth

Write = Callable[[Any], Path]
CATEGORIES = [{"id": 9, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
IMAGE = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}


def of(store: AnnotationStore, column: str, record: ImageRecord) -> np.ndarray:
    """A column over all annotations, of those of one image."""
    return store.column(column)[record.first_annotation :][: len(record)]


def annotation(
    identity: int, image: int, category: int, box: list[float], **more: Any
) -> dict[str, Any]:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "segmentation": [polygon],
        **more,
    }


def document(images: list[Any], annotations: list[Any]) -> dict[str, Any]:
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def dropped(report: StoreReport, record: str) -> dict[str, int]:
    """How many images or annotations were left out, by deviation."""
    fates = {key: (rule.of, rule.fate) for key, rule in DEVIATIONS.items()}
    return {key: n for key, n in report.counts.items() if fates[key] == (record, "dropped")}


def open_one(write_json: Write, tmp_path: Path, *annotations: Any, **image: Any) -> AnnotationStore:
    return AnnotationStore.open(
        write_json(document([IMAGE | image], list(annotations))), cache=tmp_path / "cache"
    )


def test_records_that_are_read_in_several_chunks(write_json, tmp_path, monkeypatch):
    """Polygons keep their points, and the report its places, across chunks."""
    monkeypatch.setattr("proxydet.data.formats.coco._BLOCK_BYTES", 200)
    boxes = [[float(i), 1, 2 + i, 3] for i in range(5)]
    entries: list[Any] = [annotation(i + 1, 1, 3, box) for i, box in enumerate(boxes)]
    store = open_one(write_json, tmp_path, *entries[:3], "no record", *entries[3:])
    for row, entry in enumerate(entries):
        (polygon,) = store.polygons(row)
        assert polygon.tolist() == entry["segmentation"][0]
    assert store.report.examples == {"annotation.record": ["position 3"]}


def test_columns_hold_what_the_json_says(write_json, tmp_path):
    images = [
        {"id": 20, "coco_url": "http://images.cocodataset.org/val2017/000020.jpg", "height": 8, "width": 9,
         "neg_category_ids": [9, 3], "not_exhaustive_category_ids": [7]},
        IMAGE | {"pos_category_ids": [7]},
    ]  # fmt: skip
    runs = {"counts": [0, 4, 600 - 4], "size": [20, 30]}
    annotations = [
        annotation(5, 1, 9, [1, 2, 10, 5]),
        annotation(6, 20, 3, [0, 0, 4, 4], iscrowd=1),
        annotation(7, 1, 3, [0, 0, 30, 20], segmentation=runs, area=4.5),
    ]
    store = AnnotationStore.open(write_json(document(images, annotations)), cache=tmp_path / "c")
    assert store.report.counts == {"annotation.crowds": 1}
    assert len(store) == 2
    assert [c.id for c in store.categories] == [3, 7, 9]
    first, second = store.record(0), store.record(1)
    assert (first.image_id, first.file_name, first.height, first.width) == (
        20,
        "val2017/000020.jpg",
        8,
        9,
    )
    assert first.crowd_A.tolist() == [True]
    assert store.labels(0, "neg_category_ids").tolist() == [2, 0]
    assert store.labels(0, "not_exhaustive_category_ids").tolist() == [1]
    assert store.labels(1, "pos_category_ids").tolist() == [1]
    assert of(store, "annotation_id", second).tolist() == [5, 7]
    assert second.boxes_A4.tolist() == [[1, 2, 11, 7], [0, 0, 30, 20]]
    assert second.categories_A.tolist() == [2, 0]
    assert of(store, "area", second).tolist() == [50, 4.5]
    polygons = store.polygons(second.first_annotation)
    assert [p.tolist() for p in polygons] == [[1, 2, 11, 2, 11, 7, 1, 7]]
    assert store.polygons(second.first_annotation + 1) == []
    mask = decode(store.rle(second.first_annotation + 1), (20, 30))
    assert mask.sum() == 4
    assert mask[:4, 0].all()
    images_K, annotations_K = store.counts()
    assert images_K.tolist() == [2, 0, 1]
    assert annotations_K.tolist() == [2, 0, 1]


def test_lvis_names_prefer_the_address_over_the_2014_name(write_json, tmp_path):
    url = "http://images.cocodataset.org/train2017/000000000009.jpg"
    old = "COCO_val2014_000000000009.jpg"
    named = open_one(write_json, tmp_path, coco_url=url)
    assert named.file_name(0) == "a.png"
    dated = open_one(write_json, tmp_path, coco_url=url, file_name=old)
    assert dated.file_name(0) == "train2017/000000000009.jpg"
    assert open_one(write_json, tmp_path, file_name=old).file_name(0) == old


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"image_id": 99}, "annotation.image_id.unknown"),
        ({"category_id": 4}, "annotation.category_id.unknown"),
        ({"image_id": "x"}, "annotation.image_id.unknown"),
        ({"image_id": 2**70}, "annotation.image_id.unknown"),
        ({"image_id": None}, "annotation.image_id"),
        ({"category_id": 3.5}, "annotation.category_id"),
        ({"bbox": [1, 1, -4, 5], "segmentation": None}, "annotation.bbox"),
        ({"bbox": [1e308, 1, 1e308, 5], "segmentation": None}, "annotation.bbox"),
        ({"bbox": None, "segmentation": None}, "annotation.bbox"),
        ({"bbox": [1, 2, 3], "segmentation": []}, "annotation.bbox"),
        ({"bbox": [math.nan, 2, 3, 4], "segmentation": None}, "annotation.bbox"),
    ],
)  # fmt: skip
def test_unusable_annotations_are_dropped_and_counted(write_json, tmp_path, change, key):
    good = annotation(1, 1, 3, [1, 1, 5, 5])
    bad = annotation(2, 1, 3, [1, 1, 5, 5]) | change
    store = open_one(write_json, tmp_path, bad, good)
    assert dropped(store.report, "annotation") == {key: 1}
    assert store.report.examples[key] == ["2"]
    assert of(store, "annotation_id", store.record(0)).tolist() == [1]
    assert any(DEVIATIONS[key].what in line for line in store.report.lines())


@pytest.mark.parametrize(
    ("change", "key", "box"),
    [
        ({"bbox": [math.nan, 1, 2, 3]}, "annotation.bbox.mask", [2, 3, 10, 12]),
        ({"bbox": ["1", 1, 2, 3]}, "annotation.bbox.mask", [2, 3, 10, 12]),
        ({"bbox": None}, "annotation.bbox.mask", [2, 3, 10, 12]),
        ({"bbox": [1, 1, -4, 5]}, "annotation.bbox.mask", [2, 3, 10, 12]),
        ({"bbox": [2, 3, 0, 9]}, "annotation.bbox.mask", [2, 3, 10, 12]),
        ({"bbox": [-2, 3, 40, 12]}, "annotation.bbox.clipped", [0, 3, 30, 15]),
        ({"area": None}, "annotation.area", [2, 3, 10, 12]),
        ({"area": -1}, "annotation.area", [2, 3, 10, 12]),
        ({"area": "72"}, "annotation.area", [2, 3, 10, 12]),
        ({"area": 600}, "annotation.area.large", [2, 3, 10, 12]),
        ({"iscrowd": None}, "annotation.iscrowd", [2, 3, 10, 12]),
        ({"iscrowd": "0"}, "annotation.iscrowd", [2, 3, 10, 12]),
        ({"segmentation": {}}, None, [2, 3, 10, 12]),
        ({"segmentation": ""}, None, [2, 3, 10, 12]),
        ({"segmentation": [[]]}, None, [2, 3, 10, 12]),
        ({"segmentation": [2, 3, 10, 3, 10, 12, 2, 12]}, "annotation.segmentation.flat", [2, 3, 10, 12]),
        ({"segmentation": [[2, 3], [10, 3], [10, 12]]}, "annotation.segmentation.flat", [2, 3, 10, 12]),
        ({"id": "a3f-1"}, "annotation.id", [2, 3, 10, 12]),
        ({"id": 2**70}, "annotation.id", [2, 3, 10, 12]),
    ],
)  # fmt: skip
def test_mendable_annotations_are_used_and_counted(write_json, tmp_path, change, key, box):
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [2, 3, 8, 9]) | change)
    counts = {k: n for k, n in store.report.counts.items() if k != "file.nan"}
    assert counts == ({key: 1} if key else {})
    record = store.record(0)
    assert record.boxes_A4.tolist() == [box]
    assert not record.crowd_A.any()
    if "area" in change:
        assert of(store, "area", record).tolist() == [600 if change["area"] == 600 else 72]


def test_boxes_without_extent_and_outside_are_scored_as_written_and_not_trained_on(
    write_json, tmp_path
):
    rows = [
        annotation(1, 1, 3, [1, 1, 0, 5], segmentation=None),
        annotation(2, 1, 3, [40, 1, 5, 5]),
        annotation(3, 1, 3, [1, 1, 5, 5]),
    ]
    store = open_one(write_json, tmp_path, *rows)
    assert store.report.counts == {"annotation.bbox.extent": 1, "annotation.bbox.outside": 1}
    assert store.column("xywh").tolist() == [row["bbox"] for row in rows]
    assert store.trainable(np.ones(3, dtype=np.bool_)).tolist() == [False, False, True]


def test_a_sliver_beyond_the_image_is_clipped_without_being_counted(write_json, tmp_path):
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [20, 10, 10.01, 10.4]))
    assert store.report.counts == {}
    assert store.record(0).boxes_A4.tolist() == [[20, 10, 30, 20]]


def test_bad_polygons_are_removed_one_by_one(write_json, tmp_path):
    good = [1, 1, 9, 1, 9, 9]
    masks = [
        [1, 2, 3, 4],
        good,
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, None],
        "x",
        [1e9, 0, 1, 1, 2, 2],
    ]
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 8, 8], segmentation=masks))
    assert store.report.counts == {"polygon.points": 2, "polygon.numbers": 2, "polygon.far": 1}
    assert [p.tolist() for p in store.polygons(0)] == [good]
    assert store.has_masks


@pytest.mark.parametrize(
    ("mask", "key"),
    [
        ({"counts": [1, 599], "size": [30, 20]}, "annotation.rle.size"),
        ({"counts": [600]}, "annotation.rle.size"),
        ({"counts": [1, 5], "size": [20, 30]}, "annotation.rle.counts"),
        ({"counts": "garbage", "size": [20, 30]}, "annotation.rle.counts"),
        ({"counts": None, "size": [20, 30]}, "annotation.rle.counts"),
        ({"counts": [600, 10**12, -(10**12)], "size": [20, 30]}, "annotation.rle.counts"),
        ([[10, 10, 20, 20]], "annotation.segmentation.polygons"),
        ([[10, 10], [20, 20]], "annotation.segmentation.polygons"),
        (3, "annotation.segmentation"),
        ([[-164.1, -221.8, 2.08e8, 3.52e8, 225.9, 236.5]], "annotation.segmentation.polygons"),
    ],
)  # fmt: skip
def test_a_damaged_mask_leaves_its_box(write_json, tmp_path, mask, key):
    rows = [annotation(1, 1, 3, [1, 1, 8, 8], segmentation=mask), annotation(2, 1, 3, [1, 1, 8, 8])]
    store = open_one(write_json, tmp_path, *rows)
    assert store.report.counts[key] == 1
    assert store.masked_A.tolist() == [False, True]
    assert store.record(0).boxes_A4.tolist() == [[1, 1, 9, 9]] * 2


def test_damaged_masks_are_refused_only_where_most_objects_have_one(write_json, tmp_path):
    """Nobody wants a file all of whose masks are damaged to become boxes in silence."""

    def rows(damaged: int) -> list[dict[str, Any]]:
        return [
            annotation(i, 1, 3, [i, i, 8, 8], segmentation=[[1, 2]] if i <= damaged else None)
            for i in range(1, 6)
        ]

    store = open_one(write_json, tmp_path, *rows(2))
    assert store.report.annotations_kept == 5
    assert store.report.counts["annotation.segmentation.polygons"] == 2
    assert not store.has_masks
    with pytest.raises(DataError, match=r"segmentation.*\(3 annotations mended"):
        open_one(write_json, tmp_path, *rows(3))


def test_run_lengths_that_python_wrote_as_bytes_are_read(write_json, tmp_path):
    mask = np.zeros((20, 30), dtype=np.uint8, order="F")
    mask[3:9, 4:20] = 1
    text = repr(coco_mask.encode(mask)["counts"])
    rle = {"counts": text, "size": [20, 30]}
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 8, 8], segmentation=rle))
    assert store.report.counts == {"annotation.segmentation.bytes": 1}
    assert (decode(store.rle(0), (20, 30)) == mask).all()


def test_a_box_is_taken_from_run_lengths(write_json, tmp_path):
    rle = {"counts": [20 * 4 + 3, 6, 600 - 20 * 4 - 9], "size": [20, 30]}
    row = annotation(1, 1, 3, [1, 1, 8, 8], segmentation=rle, bbox=None, area=6)
    assert open_one(write_json, tmp_path, row).record(0).boxes_A4.tolist() == [[4, 3, 5, 9]]


def test_ids_missing_or_repeated_get_new_ones(write_json, tmp_path):
    nameless = annotation(0, 1, 3, [1, 1, 5, 5])
    del nameless["id"]
    twins = [annotation(2, 1, 3, [1, 1, 5, 5]), annotation(2, 1, 9, [1, 1, 5, 5])]
    store = open_one(write_json, tmp_path, *twins, nameless)
    assert of(store, "annotation_id", store.record(0)).tolist() == [2, 1, 3]
    assert store.report.counts == {"annotation.id": 2}
    assert store.report.examples["annotation.id"] == ["2", "position 2"]


@pytest.mark.parametrize(
    ("images", "key"),
    [
        ([IMAGE, IMAGE | {"id": 2}], "image.name.repeated"),
        ([IMAGE, IMAGE | {"file_name": "b.png"}], "image.id.repeated"),
        ([IMAGE, IMAGE | {"id": "2", "file_name": "b.png"}], "image.id.mixed"),
    ],
)  # fmt: skip
def test_ambiguous_images_are_refused(write_json, tmp_path, images, key):
    path = write_json(document(images, [annotation(1, 1, 3, [1, 1, 5, 5])]))
    with pytest.raises(DataError, match=DEVIATIONS[key].field):
        AnnotationStore.open(path, cache=tmp_path / "c")


@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_an_id_of_the_other_type_is_refused_by_its_field(write_json, tmp_path, field):
    row = annotation(1, 1, 3, [1, 1, 5, 5])
    row[field] = str(row[field])
    with pytest.raises(DataError, match=field):
        open_one(write_json, tmp_path, row)


def test_text_ids_are_used_as_they_are(write_json, tmp_path):
    content = document([IMAGE | {"id": "img-a"}], [annotation(1, "img-a", 3, [1, 1, 5, 5])])  # type: ignore[arg-type]
    store = AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    assert store.report.counts == {}
    assert store.image_ids == ("img-a",)
    text = pickle.dumps(store)
    assert len(text) < 1000
    assert pickle.loads(text).record(0).image_id == "img-a"


@pytest.mark.parametrize(
    ("boxes", "masks", "refused"),
    [
        ([[5, 5, 15, 15], [8, 2, 29, 18]], True, "bbox"),
        ([[5, 5, 15, 15], [20, 12, 29, 19], [16, 11, 28, 18], [2, 12, 25, 19]], False, "bbox"),
        ([[0.1, 0.1, 0.5, 0.25], [0.2, 0.2, 0.4, 0.4]], False, "bbox"),
        ([[5, 5, 15, 15], [8, 2, 10, 12], [1, 1, 29, 19]], False, ""),
    ],
    ids=["corners, by the masks", "corners, by the image", "fractions", "as it should be"],
)
def test_boxes_of_another_convention_are_refused(write_json, tmp_path, boxes, masks, refused):
    rows = [
        annotation(n, 1, 3, box, segmentation=[corners_polygon(box)] if masks else None)
        for n, box in enumerate(boxes, 1)
    ]
    if refused:
        with pytest.raises(DataError, match=refused):
            open_one(write_json, tmp_path, *rows)
    else:
        assert len(open_one(write_json, tmp_path, *rows).record(0)) == len(boxes)


ODD = {
    "corners and one without extent": [[100 + n, 100, 180 + n, 190] for n in range(119)] + [[9, 9, 9, 9]],
    "corners and two others": [[100 + n, 100, 180 + n, 190] for n in range(118)] + [[90, 90, 9, 9]] * 2,
    "fractions and one above 1": [[0.1, 0.2, 0.3, 0.4]] * 119 + [[0.0, 0.2, 1.0000001, 0.4]],
    "fractions and one of negative extent": [[0.1, 0.2, 0.3, 0.4]] * 3 + [[0.3, 0.3, -5, 0.2]],
}  # fmt: skip


@pytest.mark.parametrize("boxes", ODD.values(), ids=ODD)
def test_a_few_odd_boxes_do_not_hide_the_convention(write_json, tmp_path, boxes):
    rows = [annotation(n, 1, 3, box, segmentation=None) for n, box in enumerate(boxes, 1)]
    with pytest.raises(DataError, match="bbox"):
        open_one(write_json, tmp_path, *rows, height=200, width=300)


@pytest.mark.parametrize("runs", [False, True], ids=["polygons", "run lengths"])
@pytest.mark.parametrize(
    ("written", "stopped"),
    [
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], True),
        (lambda x, y, w, h: [y, x, h, w], True),
        (lambda x, y, w, h: [x / 3, y / 2, w / 3, h / 2], True),
        (lambda x, y, w, h: [x - 2, y - 1, w + 3, h + 3], False),
    ],
    ids=["centre", "row first", "percent", "loose"],
)
def test_boxes_that_are_not_where_their_masks_are_are_refused(
    write_json, tmp_path, written, stopped, runs
):
    rows = []
    for n in range(4):
        box = [150.0 + n, 20.0 + n, 60.0, 30.0]
        row = annotation(n, 1, 3, box)
        if runs:
            mask = coco_mask.frPyObjects(row["segmentation"], 200, 300)[0]
            row["segmentation"] = mask | {"counts": mask["counts"].decode()}
        rows.append(row | {"bbox": written(*box)})
    if stopped:
        with pytest.raises(DataError, match=r"bbox: .*masks"):
            open_one(write_json, tmp_path, *rows, height=200, width=300)
    else:
        assert len(open_one(write_json, tmp_path, *rows, height=200, width=300).record(0)) == 4


def corners_polygon(box: list[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def test_roboflows_root_category_is_no_class(write_json, tmp_path):
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])])
    content["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 3, "name": "cat", "supercategory": "pets"},
        {"id": 4, "name": "dog", "supercategory": "pets"},
    ]
    store = AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    assert [category.name for category in store.categories] == ["cat", "dog"]
    assert store.report.counts == {"category.root": 1}
    assert store.record(0).categories_A.tolist() == [0]


def test_a_frequency_left_out_follows_from_the_image_count(write_json, tmp_path):
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])])
    content["categories"] = [
        {"id": 3, "name": "cat", "frequency": "f", "image_count": 500},
        *({"id": n, "name": f"c{n}", "image_count": n} for n in (10, 11, 100, 101)),
    ]
    store = AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    assert [category.frequency for category in store.categories] == ["f", "r", "c", "c", "f"]


@pytest.mark.parametrize("crowds", [1, 3, 20])
def test_crowds_are_reported_and_a_file_of_crowds_is_refused(write_json, tmp_path, crowds):
    rows = [annotation(n, 1, 3, [1, 1, 5, 5], iscrowd=int(n < crowds)) for n in range(20)]
    store = open_one(write_json, tmp_path, *rows)
    assert ("annotation.crowds" in store.report.counts) == (crowds == 3)
    if crowds == 20:
        with pytest.raises(DataError, match="iscrowd"):
            store.require_objects()
    else:
        store.require_objects()


@pytest.mark.parametrize(
    "wrap", [lambda text: text, gzip.compress, lambda text: b"\xef\xbb\xbf" + text],
    ids=["plain", "gzip", "byte order mark"],
)  # fmt: skip
def test_files_are_read_however_they_are_wrapped(tmp_path, wrap):
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])])
    path = tmp_path / "a.json"
    path.write_bytes(wrap(json.dumps(content).encode()))
    store = AnnotationStore.open(path, cache=tmp_path / "c")
    assert store.report.annotations_kept == 1
    assert store.report.counts == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"images": [1,\n  {"a": }]}', "line 2, column 9"),
        ('{"images": [], "categories": []', "cut short"),
        ('{"images": [], "categories": []} x', "not JSON"),
        ("[]", "not an annotation file"),
        ('{"images": []}', "categories"),
        ('{"images": {}, "categories": []}', "not an annotation file"),
        ('{"images": [NaN], "categories": [', "cut short|not JSON"),
        ("[" * 100_000, "not an annotation file"),
        ('[{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 1, 2, 2]}]', "detections"),
        ('{"images": [], "categories": [], "annotations": [{"image_id": 1, "segments_info": []}]}', "panoptic"),
        ("", "empty"),
    ],
)  # fmt: skip
def test_what_is_not_an_annotation_file_is_refused(write_json, tmp_path, text, match):
    path = write_json(text)
    with pytest.raises(DataError, match=match) as caught:
        AnnotationStore.open(path, cache=tmp_path / "c")
    assert "annotations.json" in caught.value.message


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("proxydet.data.formats.coco._UNPACKED_FREELY", 1 << 20)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * (8 << 20)))
    with pytest.raises(DataError, match="200 times"):
        AnnotationStore.open(path, cache=tmp_path / "c")


def test_numbers_of_the_wrong_json_type_are_understood(write_json, tmp_path):
    loose = annotation(1, 1, 3, [1, 1, 5, 5]) | {
        "image_id": 1.0,
        "category_id": 3.0,
        "iscrowd": True,
    }
    store = open_one(write_json, tmp_path, loose, height=20.0)
    assert store.report.counts == {}
    assert store.record(0).crowd_A.tolist() == [True]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 2, "file_name": "b.png", "height": 0, "width": 2}, "image.size"),
        ({"id": 2, "file_name": "b.png", "height": 2, "width": -2}, "image.size"),
        ({"id": 2, "file_name": "b.png", "height": 2**20, "width": 2**20}, "image.size"),
        ({"id": None, "file_name": "b.png", "height": 2, "width": 2}, "image.id"),
        ({"id": 2**70, "file_name": "b.png", "height": 2, "width": 2}, "image.id"),
        ({"id": "", "file_name": "b.png", "height": 2, "width": 2}, "image.id"),
        ({"id": 2, "file_name": "b.png", "height": 2}, "image.size"),
        (["b.png"], "image.record"),
    ],
)  # fmt: skip
def test_unusable_images_are_dropped_and_counted(write_json, tmp_path, image, reason):
    annotations = [annotation(1, 1, 3, [1, 1, 5, 5]), annotation(2, 2, 3, [1, 1, 5, 5])]
    store = AnnotationStore.open(
        write_json(document([IMAGE, image], annotations)), cache=tmp_path / "c"
    )
    report = store.report
    assert dropped(report, "image") == {reason: 1}
    assert (report.images_in, report.images_kept) == (2, 1)
    known = isinstance(image, dict) and image["id"] == 2
    assert dropped(report, "annotation") == {
        f"annotation.image_id.{'dropped' if known else 'unknown'}": 1
    }


@pytest.mark.parametrize(
    ("where", "change", "key"),
    [
        ("images", IMAGE, "image.id.again"),
        ("images", IMAGE | {"id": 2, "file_name": "b.png", "neg_category_ids": "3"}, "image.list.type"),
        ("categories", {"id": 4, "name": "cow", "synonyms": "kine", "image_count": -1}, "category.field"),
    ],
)  # fmt: skip
def test_odd_fields_of_images_and_categories_are_counted_and_cost_nothing_else(
    write_json, tmp_path, where, change, key
):
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])])
    content[where] = [*content[where], change]
    store = AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    assert store.report.counts.keys() == {key}
    assert len(store) == len({image["id"] for image in content["images"]})
    assert len(store.categories) == len(content["categories"])
    assert store.column("xywh").tolist() == [[1, 1, 5, 5]]


def test_a_number_of_thousands_of_digits_costs_its_field_alone(tmp_path):
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5]) | {"area": 123456}])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content).replace("123456", "9" * 5000))
    store = AnnotationStore.open(path, cache=tmp_path / "c")
    assert store.report.counts == {"annotation.area": 1}
    assert store.column("area").tolist() == [25]


def test_unknown_negative_categories_are_removed(write_json, tmp_path):
    store = open_one(write_json, tmp_path, neg_category_ids=[3, 1000])
    assert store.labels(0, "neg_category_ids").tolist() == [0]
    assert store.report.counts == {"image.list": 1}


@pytest.mark.parametrize(
    ("categories", "key"),
    [
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category.id.repeated"),
        ([{"id": 1, "name": "a"}, {"id": "1", "name": "b"}], "category.id.mixed"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": " a"}], "category.name.repeated"),
        ([{"id": 1, "name": " "}], "category.name.empty"),
        ([{"id": 1}], "category.record"),
        ([{"id": 1, "name": 4}], "category.record"),
        ([{"id": 2**70, "name": "a"}], "category.record"),
        (["a"], "category.record"),
    ],
)  # fmt: skip
def test_doubtful_categories_are_an_error(write_json, tmp_path, categories, key):
    path = write_json({"images": [], "categories": categories})
    with pytest.raises(DataError, match=DEVIATIONS[key].what[:20].replace("(", "[(]")):
        AnnotationStore.open(path, cache=tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.columns*"))


def test_an_empty_data_set_has_a_store(write_json, tmp_path):
    store = AnnotationStore.open(write_json({"images": [], "categories": []}), cache=tmp_path / "c")
    assert len(store) == 0
    assert store.counts()[0].tolist() == []
    no_objects = open_one(write_json, tmp_path)
    assert len(no_objects.record(0)) == 0


def test_the_store_is_made_once_and_again_when_the_source_changes(
    write_json, tmp_path, monkeypatch
):
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5]))
    source = tmp_path / "annotations.json"
    monkeypatch.setattr("proxydet.data.store.build_store", lambda *_, **__: pytest.fail("built"))
    assert AnnotationStore.open(source, cache=tmp_path / "cache").path == store.path
    # The same content elsewhere has the same store.
    copy = source.with_name("copy.json")
    copy.write_bytes(source.read_bytes())
    other = AnnotationStore.open(copy, cache=tmp_path / "cache")
    assert other.path == store.path
    names = [pickle.loads(pickle.dumps(each)).source_name for each in (store, other)]
    assert names == [str(source), str(copy)]
    monkeypatch.undo()
    source.write_text(json.dumps(document([IMAGE], [])))
    assert AnnotationStore.open(source, cache=tmp_path / "cache").report.annotations_in == 0


def test_losses_are_told_whoever_made_the_store(write_json, tmp_path, caplog):
    bad = annotation(1, 1, 55, [1, 1, 5, 5])
    open_one(write_json, tmp_path, bad)
    assert "1 annotation dropped: category_id" in caplog.text
    caplog.clear()
    open_one(write_json, tmp_path, bad)
    (record,) = caplog.records
    assert "1 dropped" in record.getMessage()
    assert f"data check {tmp_path / 'annotations.json'}" in record.getMessage()
    caplog.clear()
    open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5]))
    open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5]))
    assert caplog.text == ""


@pytest.mark.parametrize("value", [2, 2.0, 0.5, "1", None])
def test_an_iscrowd_that_is_neither_0_nor_1_is_counted(write_json, tmp_path, value):
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5], iscrowd=value))
    assert store.report.counts["annotation.iscrowd"] == 1


def test_a_file_of_too_many_categories_is_refused(write_json, tmp_path, monkeypatch):
    for module in ("store", "formats.coco"):
        monkeypatch.setattr(f"proxydet.data.{module}.MOST_CATEGORIES", 20)
    categories = [{"id": n, "name": f"{n}"} for n in range(21)]
    content = document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])]) | {"categories": categories}
    with pytest.raises(DataError, match="categories: more than"):
        AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    content["categories"] = categories[1:]
    store = AnnotationStore.open(write_json(content), cache=tmp_path / "c")
    assert len(store.categories) == 20


number = st.one_of(
    st.integers(-5, 40),
    st.floats(-50, 60),
    st.sampled_from([math.nan, math.inf, 1e308, -1e308, 2**64]),
)
anything = st.one_of(
    st.none(), st.booleans(), number, st.text(max_size=3), st.lists(number, max_size=5)
)
loose_annotation = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.integers(0, 4), anything),
        "image_id": st.one_of(st.integers(0, 3), anything),
        "category_id": st.one_of(st.sampled_from([3, 7, 9]), anything),
        "bbox": st.one_of(st.lists(number, min_size=4, max_size=4), anything),
        "area": anything,
        "iscrowd": st.one_of(st.integers(0, 1), anything),
        "segmentation": st.one_of(
            st.lists(st.one_of(st.lists(number, min_size=4, max_size=9), anything), max_size=3),
            st.fixed_dictionaries(
                {}, optional={"counts": anything, "size": st.one_of(st.just([20, 30]), anything)}
            ),
            anything,
        ),
    },
)
loose_image = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.integers(0, 3), anything),
        "width": st.one_of(st.integers(0, 40), anything),
        "height": st.one_of(st.integers(0, 40), anything),
        "file_name": st.one_of(st.just("a.jpg"), anything),
        "neg_category_ids": anything,
    },
)


@settings(max_examples=40)
@given(
    st.lists(st.one_of(loose_image, st.just(IMAGE), anything), max_size=4),
    st.lists(st.one_of(loose_annotation, anything), max_size=8),
)
def test_nothing_is_lost_silently(tmp_path_factory, images, annotations):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    try:
        store = AnnotationStore.open(folder / "a.json", cache=folder)
    except DataError as error:  # refused as a whole: says by which field
        message = error.message
        if not any(rule.field in message for rule in DEVIATIONS.values()):
            raise
        return
    report: StoreReport = store.report
    assert report.images_in == len(images)
    assert report.images_in == report.images_kept + sum(dropped(report, "image").values())
    assert report.annotations_in == len(annotations)
    lost = sum(dropped(report, "annotation").values())
    assert report.annotations_in == report.annotations_kept + lost
    assert sum(len(store.record(i)) for i in range(len(store))) == report.annotations_kept
    for index in range(len(store)):
        record = store.record(index)
        assert len(set(of(store, "annotation_id", record).tolist())) == len(record)
        assert (record.boxes_A4[:, 2:] >= record.boxes_A4[:, :2]).all()
        assert (record.boxes_A4 >= 0).all()
        assert (record.boxes_A4[:, 2:] <= [record.width, record.height]).all()
        assert np.isfinite(of(store, "area", record)).all()
        for row in range(record.first_annotation, record.first_annotation + len(record)):
            assert all(len(p) >= 6 and np.isfinite(p).all() for p in store.polygons(row))


@settings(max_examples=60)
@given(st.binary(max_size=60))
@example(b"I\xe0\x15")  # the beginning of Infinity, then nothing: a reader never ended on it
@example(b"-I")
@example(b"NaN\xff")
def test_any_bytes_are_refused_or_read(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.json").write_bytes(b'{"images": [], "categories": [], "annotations": [' + text)
    with pytest.raises(DataError):
        AnnotationStore.open(folder / "a.json", cache=folder)


def test_another_version_has_a_store_of_its_own(write_json, tmp_path, monkeypatch):
    source = write_json(document([IMAGE], []))
    path = AnnotationStore.path_for(source, cache=tmp_path)
    monkeypatch.setattr("proxydet.data.store.STORE_VERSION", 99)
    assert AnnotationStore.path_for(source, cache=tmp_path) != path


def test_annotations_of_an_image_keep_their_order(write_json, tmp_path):
    images = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    rows = [annotation(i + 1, i % 3 + 1, 3, [1, 1, 5, 5]) for i in range(3000)]
    store = AnnotationStore.open(write_json(document(images, rows)), cache=tmp_path / "c")
    assert of(store, "annotation_id", store.record(1)).tolist() == list(range(2, 3001, 3))


def test_a_source_that_changes_while_it_is_read_gets_no_store(write_json, tmp_path, monkeypatch):
    """Its store would carry the digest of what was there before."""
    source = write_json(document([IMAGE], []))
    convert = store_module.build_store

    def change_and_convert(path: Path, target: Path, **options: Any) -> None:
        write_json(document([IMAGE], [annotation(1, 1, 3, [1, 1, 5, 5])]))
        convert(path, target, **options)

    monkeypatch.setattr(store_module, "build_store", change_and_convert)
    with pytest.raises(DataError, match="changed while it was read"):
        AnnotationStore.open(source, cache=tmp_path / "c")
    monkeypatch.undo()
    assert not list((tmp_path / "c").glob("*.columns"))
    assert AnnotationStore.open(source, cache=tmp_path / "c").report.annotations_kept == 1


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "--5"},
        {"segmentation": {"size": [20, 30], "counts": "b'a'" + "-" * 4000 + "b'a'"}},
        {"bbox": [0, 0, 5e8, 5e8], "segmentation": None},
    ],
    ids=["dashes", "an expression", "a far box"],
)
def test_hostile_records_are_dropped_or_used(write_json, tmp_path, change):
    """Also when masks are scored: an object without one counts neither way, whatever its box."""
    rows = [annotation(1, 1, 3, [1, 1, 5, 5]), annotation(2, 1, 3, [1, 1, 5, 5]) | change]
    content = document([IMAGE], rows)
    content["categories"][0] = content["categories"][0] | {"image_count": 10**30}
    path = write_json(content)
    store = AnnotationStore.open(path, cache=tmp_path / "c")
    assert store.report.annotations_kept >= 1
    masks = GroundTruth.load(path).for_masks().masks
    assert len(masks) == store.report.annotations_kept


def test_text_with_nan_is_read_in_time_that_grows_with_its_length(write_json, tmp_path):
    row = annotation(1, 1, 3, [1, 1, 5, 5]) | {"note": 'NaN "quoted" \\ Infinity'}
    text = json.dumps(document([IMAGE], [row])).replace("25", "NaN", 1)
    store = AnnotationStore.open(write_json(text), cache=tmp_path / "c")
    assert store.report.counts["file.nan"] == 1
    with pytest.raises(DataError):
        AnnotationStore.open(write_json('{"images": [NaN, "' + '\\"' * 200_000), cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_named_with_what_moves_it(
    write_json, tmp_path, monkeypatch
):
    (tmp_path / "home").touch()
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "home"))
    path = write_json(document([IMAGE], [annotation(5, 1, 9, [1, 2, 10, 5])]))
    with pytest.raises(RuntimeEnvironmentError, match="home") as caught:
        AnnotationStore.open(path)
    assert "PROXYDET_CACHE" in str(caught.value.hint)


def test_a_named_format_has_a_store_of_its_own(write_json, tmp_path):
    path = write_json(document([IMAGE], []))

    def store(**options: Any) -> str:
        source = AnnotationSource(annotations=path, images=(), **options)
        return AnnotationStore.path_for(source, cache=tmp_path / "cache").name

    assert store() == store(format="COCO JSON")
    assert len({store(), store(format="CVAT XML"), store(format="Label Studio JSON")}) == 3
