import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxydet.data.store as store_module
from proxydet.data.run_lengths import to_mask
from proxydet.data.store import AnnotationStore
from proxydet.data.store_report import StoreReport
from proxydet.errors import DataError

Write = Callable[[Any], Path]
CATEGORIES = [{"id": 9, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
IMAGE = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}


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


def open_one(write_json: Write, tmp_path: Path, *annotations: Any, **image: Any) -> AnnotationStore:
    return AnnotationStore.open(
        write_json(document([IMAGE | image], list(annotations))), cache=tmp_path / "cache"
    )


def test_records_that_are_read_in_several_chunks(
    write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polygons keep their points, and the report its places, across chunks."""
    monkeypatch.setattr("proxydet.data.store_build._CHUNK", 2)
    boxes = [[float(i), 1, 2 + i, 3] for i in range(5)]
    entries: list[Any] = [annotation(i + 1, 1, 3, box) for i, box in enumerate(boxes)]
    store = open_one(write_json, tmp_path, *entries[:3], "no record", *entries[3:])
    for row, entry in enumerate(entries):
        (polygon,) = store.polygons(row)
        assert polygon.tolist() == entry["segmentation"][0]
    assert store.report.examples == {"annotation record not readable": ["position 3"]}


def test_columns_hold_what_the_json_says(write_json: Write, tmp_path: Path) -> None:
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
    assert store.report.clean
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
    assert second.annotation_ids_A.tolist() == [5, 7]
    assert second.boxes_A4.tolist() == [[1, 2, 11, 7], [0, 0, 30, 20]]
    assert second.categories_A.tolist() == [2, 0]
    assert second.areas_A.tolist() == [50, 4.5]
    polygons = store.polygons(second.first_annotation)
    assert [p.tolist() for p in polygons] == [[1, 2, 11, 2, 11, 7, 1, 7]]
    assert store.polygons(second.first_annotation + 1) == []
    mask = to_mask(store.run_lengths(second.first_annotation + 1), 20, 30)
    assert mask.sum() == 4
    assert mask[:4, 0].all()
    images_K, annotations_K = store.counts()
    assert images_K.tolist() == [2, 0, 1]
    assert annotations_K.tolist() == [2, 0, 1]


def test_lvis_names_prefer_the_address_over_the_2014_name(
    write_json: Write, tmp_path: Path
) -> None:
    url = "http://images.cocodataset.org/train2017/000000000009.jpg"
    old = "COCO_val2014_000000000009.jpg"
    named = open_one(write_json, tmp_path, coco_url=url)
    assert named.file_name(0) == "a.png"
    dated = open_one(write_json, tmp_path, coco_url=url, file_name=old)
    assert dated.file_name(0) == "train2017/000000000009.jpg"
    assert open_one(write_json, tmp_path, file_name=old).file_name(0) == old


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 99}, "annotation of an unknown image"),
        ({"category_id": 4}, "annotation of an unknown category"),
        ({"image_id": "x"}, "annotation record not readable"),
        ({"image_id": 2**70}, "annotation record not readable"),
        ({"segmentation": 3}, "annotation record not readable"),
        ({"bbox": [1, 1, 0, 5]}, "box not finite or without width and height"),
        ({"bbox": [1, 1, -4, 5]}, "box not finite or without width and height"),
        ({"bbox": [40, 1, 5, 5]}, "box outside the image"),
        ({"bbox": [-9, 1, 9, 5]}, "box outside the image"),
        ({"bbox": [1e308, 1, 1e308, 5]}, "box outside the image"),
        ({"bbox": None, "segmentation": None}, "annotation without a usable box or polygon"),
        ({"bbox": [1, 2, 3], "segmentation": []}, "annotation without a usable box or polygon"),
        ({"bbox": [math.nan, 2, 3, 4], "segmentation": [[1, 2]]}, "annotation without a usable box or polygon"),
    ],
)  # fmt: skip
def test_unusable_annotations_are_dropped_and_counted(
    write_json: Write, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    good = annotation(1, 1, 3, [1, 1, 5, 5])
    bad = annotation(2, 1, 3, [1, 1, 5, 5]) | change
    store = open_one(write_json, tmp_path, bad, good)
    assert store.report.annotations_dropped == {reason: 1}
    assert store.report.annotations_kept == 1
    assert store.record(0).annotation_ids_A.tolist() == [1]
    assert any(reason in line for line in store.report.lines())


@pytest.mark.parametrize(
    ("change", "what", "box"),
    [
        ({"bbox": [math.nan, 1, 2, 3]}, "box taken from the polygons", [2, 3, 10, 12]),
        ({"bbox": [1, math.inf, 2, 3]}, "box taken from the polygons", [2, 3, 10, 12]),
        ({"bbox": ["1", 1, 2, 3]}, "box taken from the polygons", [2, 3, 10, 12]),
        ({"bbox": None}, "box taken from the polygons", [2, 3, 10, 12]),
        ({"bbox": [-2, 3, 40, 12]}, "box clipped to the image", [0, 3, 30, 15]),
        ({"area": None}, "area taken from the box", [2, 3, 10, 12]),
        ({"area": -1}, "area taken from the box", [2, 3, 10, 12]),
        ({"area": "big"}, "area taken from the box", [2, 3, 10, 12]),
    ],
)  # fmt: skip
def test_repairable_annotations_are_mended_and_counted(
    write_json: Write, tmp_path: Path, change: dict[str, Any], what: str, box: list[float]
) -> None:
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [2, 3, 8, 9]) | change)
    assert store.report.repaired == {what: 1}
    record = store.record(0)
    assert record.boxes_A4.tolist() == [box]
    if "area" in change:
        assert record.areas_A.tolist() == [72]


def test_a_sliver_beyond_the_image_is_clipped_without_being_counted(
    write_json: Write, tmp_path: Path
) -> None:
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [20, 10, 10.01, 10.4]))
    assert store.report.clean
    assert store.record(0).boxes_A4.tolist() == [[20, 10, 30, 20]]


def test_bad_polygons_are_removed_one_by_one(write_json: Write, tmp_path: Path) -> None:
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
    assert store.report.repaired == {"polygon removed that is not 3 or more points": 5}
    assert [p.tolist() for p in store.polygons(0)] == [good]
    assert store.has_masks


@pytest.mark.parametrize(
    "mask",
    [
        {"counts": [600], "size": [20, 30]},
        {"counts": [1, 599], "size": [30, 20]},
        {"counts": [1, 5], "size": [20, 30]},
        {"counts": "garbage", "size": [20, 30]},
    ],
)  # fmt: skip
def test_run_lengths_that_do_not_fit_leave_a_box_without_mask(
    write_json: Write, tmp_path: Path, mask: Any
) -> None:
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 8, 8], segmentation=mask))
    assert store.report.repaired == {"mask removed whose run lengths do not fit the image": 1}
    assert store.report.without_mask == 1
    assert not store.has_masks
    assert len(store.run_lengths(0)) == 0


def test_ids_missing_or_repeated_are_given_anew(write_json: Write, tmp_path: Path) -> None:
    nameless = annotation(0, 1, 3, [1, 1, 5, 5])
    del nameless["id"]
    twins = [annotation(2, 1, 3, [1, 1, 5, 5]), annotation(2, 1, 9, [1, 1, 5, 5])]
    store = open_one(write_json, tmp_path, *twins, nameless)
    assert store.record(0).annotation_ids_A.tolist() == [2, 1, 3]
    assert sum(store.report.repaired.values()) == 2
    assert list(store.report.examples.values()) == [["2", "none"]]
    assert store.report.annotations_kept == 3


def test_numbers_of_the_wrong_json_type_are_understood(write_json: Write, tmp_path: Path) -> None:
    loose = annotation(1, 1, 3, [1, 1, 5, 5]) | {
        "image_id": 1.0,
        "category_id": 3.0,
        "iscrowd": True,
    }
    store = open_one(write_json, tmp_path, loose, height=20.0)
    assert store.report.clean
    assert store.record(0).crowd_A.tolist() == [True]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 1, "file_name": "b.png", "height": 2, "width": 2}, "image id repeated"),
        ({"id": 2, "file_name": "b.png", "height": 0, "width": 2}, "image size not positive"),
        ({"id": 2, "file_name": "b.png", "height": 2, "width": -2}, "image size not positive"),
        ({"id": 2, "file_name": " ", "height": 2, "width": 2}, "image without a file name"),
        ({"id": 2, "height": 2, "width": 2}, "image without a file name"),
        ({"id": 2, "file_name": "b.png", "height": 2}, "image record not readable"),
        ({"id": "b", "file_name": "b.png", "height": 2, "width": 2}, "image record not readable"),
        (["b.png"], "image record not readable"),
    ],
)  # fmt: skip
def test_unusable_images_are_dropped_and_counted(
    write_json: Write, tmp_path: Path, image: Any, reason: str
) -> None:
    annotations = [annotation(1, 1, 3, [1, 1, 5, 5]), annotation(2, 2, 3, [1, 1, 5, 5])]
    store = AnnotationStore.open(
        write_json(document([IMAGE, image], annotations)), cache=tmp_path / "c"
    )
    report = store.report
    assert report.images_dropped == {reason: 1}
    assert (report.images_in, report.images_kept) == (2, 1)
    assert sum(report.annotations_dropped.values()) == 1
    if isinstance(image, dict) and image["id"] == 2 and "width" in image:
        assert report.annotations_dropped == {"annotation of a dropped image": 1}


def test_unknown_negative_categories_are_removed(write_json: Write, tmp_path: Path) -> None:
    store = open_one(write_json, tmp_path, neg_category_ids=[3, 1000])
    assert store.labels(0, "neg_category_ids").tolist() == [0]
    assert store.report.repaired == {"unknown category removed from neg_category_ids": 1}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "two categories with the id '1'"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": " a"}], "two categories with the name 'a'"),
        ([{"id": 1, "name": " "}], "a category without a name"),
        ([{"id": 1}], "category 0 is not usable"),
        ([{"id": 1, "name": 4}], "category 0 is not usable"),
        (["a"], "category 0 is not usable"),
    ],
)  # fmt: skip
def test_doubtful_categories_are_an_error(
    write_json: Write, tmp_path: Path, categories: Any, message: str
) -> None:
    path = write_json({"images": [], "categories": categories})
    with pytest.raises(DataError, match=message):
        AnnotationStore.open(path, cache=tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.columns*"))


def test_an_empty_data_set_has_a_store(write_json: Write, tmp_path: Path) -> None:
    store = AnnotationStore.open(write_json({"images": [], "categories": []}), cache=tmp_path / "c")
    assert len(store) == 0
    assert store.counts()[0].tolist() == []
    no_objects = open_one(write_json, tmp_path)
    assert len(no_objects.record(0)) == 0


def test_the_store_is_made_once_and_again_when_the_source_changes(
    write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5]))
    source = tmp_path / "annotations.json"
    monkeypatch.setattr("proxydet.data.store.build_store", lambda *_, **__: pytest.fail("built"))
    assert AnnotationStore.open(source, cache=tmp_path / "cache").path == store.path
    # The same content elsewhere has the same store.
    copy = source.with_name("copy.json")
    copy.write_bytes(source.read_bytes())
    assert AnnotationStore.open(copy, cache=tmp_path / "cache").path == store.path
    monkeypatch.undo()
    source.write_text(json.dumps(document([IMAGE], [])))
    assert AnnotationStore.open(source, cache=tmp_path / "cache").report.annotations_in == 0


def test_a_store_can_be_pickled(write_json: Write, tmp_path: Path) -> None:
    store = open_one(write_json, tmp_path, annotation(1, 1, 3, [1, 1, 5, 5]))
    text = pickle.dumps(store)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert again.record(0).boxes_A4.tolist() == [[1, 1, 6, 6]]
    assert store.damaged_columns() == []


def test_losses_are_logged_once(
    write_json: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = annotation(1, 1, 55, [1, 1, 5, 5])
    open_one(write_json, tmp_path, bad)
    assert "1 annotation of an unknown category (e.g. 1)" in caplog.text
    caplog.clear()
    open_one(write_json, tmp_path, bad)
    assert caplog.text == ""


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


@settings(max_examples=150)
@given(
    st.lists(st.one_of(loose_image, st.just(IMAGE), anything), max_size=4),
    st.lists(st.one_of(loose_annotation, anything), max_size=8),
)
def test_nothing_is_lost_silently(
    tmp_path_factory, images: list[Any], annotations: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    store = AnnotationStore.open(folder / "a.json", cache=folder)
    report: StoreReport = store.report
    assert report.images_in == len(images)
    assert report.images_in == report.images_kept + sum(report.images_dropped.values())
    assert report.annotations_in == len(annotations)
    assert report.annotations_in == report.annotations_kept + sum(
        report.annotations_dropped.values()
    )
    assert sum(len(store.record(i)) for i in range(len(store))) == report.annotations_kept
    for index in range(len(store)):
        record = store.record(index)
        assert len(set(record.annotation_ids_A.tolist())) == len(record)
        assert (record.boxes_A4[:, 2:] > record.boxes_A4[:, :2]).all()
        assert (record.boxes_A4 >= 0).all()
        assert (record.boxes_A4[:, 2:] <= [record.width, record.height]).all()
        assert np.isfinite(record.areas_A).all()
        for row in range(record.first_annotation, record.first_annotation + len(record)):
            assert all(len(p) >= 6 and np.isfinite(p).all() for p in store.polygons(row))


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(tmp_path_factory, text: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.json").write_bytes(b'{"images": [], "categories": [], "annotations": [' + text)
    with pytest.raises(DataError):
        AnnotationStore.open(folder / "a.json", cache=folder)


def test_another_version_has_a_store_of_its_own(
    write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_json(document([IMAGE], []))
    path = AnnotationStore.path_for(source, cache=tmp_path)
    monkeypatch.setattr("proxydet.data.store.STORE_VERSION", 99)
    assert AnnotationStore.path_for(source, cache=tmp_path) != path


def test_annotations_of_an_image_keep_their_order(write_json: Write, tmp_path: Path) -> None:
    images = [IMAGE | {"id": i} for i in (1, 2, 3)]
    rows = [annotation(i + 1, i % 3 + 1, 3, [1, 1, 5, 5]) for i in range(3000)]
    store = AnnotationStore.open(write_json(document(images, rows)), cache=tmp_path / "c")
    assert store.record(1).annotation_ids_A.tolist() == list(range(2, 3001, 3))


def test_a_source_that_changes_while_it_is_read_gets_no_store(
    write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
