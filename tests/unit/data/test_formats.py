"""Annotation formats besides COCO and Pascal VOC: each read as what its tool means, through the store."""

from __future__ import annotations

import base64
import csv
import io
import json
import tempfile
import tracemalloc
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from proxydet.data.check import check_path
from proxydet.data.dataset import DatasetConfig
from proxydet.data.formats.label_studio import decode_brush, encode_brush
from proxydet.data.masks import decode
from proxydet.data.records import AnnotationSource
from proxydet.data.sources import look
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError

NAMES = ["dog", "cat & co"]
SIZE = {"a": (40, 30), "b": (64, 48), "c": (50, 20)}  # width, height
BOXES = {
    "a": [("dog", (4.0, 3.0, 20.0, 27.0)), ("cat & co", (10.0, 6.0, 30.0, 15.0))],
    "b": [("dog", (16.0, 12.0, 48.0, 36.0))],
    "c": [("cat & co", (5.0, 2.0, 45.0, 18.0))],
}
OUTLINE = [8.0, 3.0, 32.0, 3.0, 32.0, 15.0, 20.0, 27.0]


def photo(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def opened(
    path: Path, cache: Path, *images: Path, part: str | None = None, **more: object
) -> AnnotationStore:
    source = AnnotationSource(annotations=path, images=images, part=part, **more)  # type: ignore[arg-type]
    return AnnotationStore.open(source, cache=cache, warn=False)


def found(store: AnnotationStore) -> dict[str, list[tuple[str, list[float]]]]:
    """Classes and boxes of a store, by the stem of each image."""
    result = {}
    for row in range(len(store)):
        record = store.record(row)
        names = [store.categories[category].name for category in record.categories_A.tolist()]
        boxes = np.round(record.boxes_A4, 2).tolist()
        result[Path(record.file_name).stem] = list(zip(names, boxes, strict=True))
    return result


def expected(*stems: str) -> dict[str, list[tuple[str, list[float]]]]:
    return {stem: [(name, list(box)) for name, box in BOXES[stem]] for stem in stems}


# --- YOLO --------------------------------------------------------------------------------------------------------------


def yolo_rows(stem: str) -> str:
    width, height = SIZE[stem]
    rows = []
    for name, (x1, y1, x2, y2) in BOXES[stem]:
        values = (
            (x1 + x2) / 2 / width,
            (y1 + y2) / 2 / height,
            (x2 - x1) / width,
            (y2 - y1) / height,
        )
        rows.append(f"{NAMES.index(name)} " + " ".join(f"{value:.6f}" for value in values))
    return "\n".join(rows) + "\n"


def write_yolo(root: Path, layout: str, splits: dict[str, str]) -> None:
    """Write images and rows in the layout of Ultralytics, Roboflow, Label Studio (one split) or CVAT (labels next to images)."""
    for split, stems in splits.items():
        images, labels = {
            "ultralytics": (f"images/{split}", f"labels/{split}"),
            "roboflow": (f"{split}/images", f"{split}/labels"),
            "plain": ("images", "labels"),
            "cvat": ("obj_train_data", "obj_train_data"),
        }[layout]
        (root / labels).mkdir(parents=True, exist_ok=True)
        for stem in stems:
            photo(root / images / f"{stem}.jpg", SIZE[stem])
            (root / labels / f"{stem}.txt").write_text(yolo_rows(stem))
    if layout == "plain":
        (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    elif layout == "cvat":
        (root / "obj.names").write_text("\n".join(NAMES) + "\n")
        (root / "train.txt").write_text(
            "".join(
                f"data/obj_train_data/{stem}.jpg\n" for stems in splits.values() for stem in stems
            )
        )
    else:
        content = [f"names: {json.dumps(NAMES)}", "nc: 2"]
        for split in splits:
            folder = f"images/{split}" if layout == "ultralytics" else f"../{split}/images"
            content.append(f"{'val' if split == 'valid' else split}: {folder}")
        (root / "data.yaml").write_text("\n".join(content))


@pytest.mark.parametrize(
    ("layout", "splits", "source", "part"),
    [
        ("ultralytics", {"train": "ab", "val": "c"}, "data.yaml", "train"),
        ("ultralytics", {"train": "ab", "val": "c"}, "labels/train", None),
        ("ultralytics", {"train": "ab", "val": "c"}, "images/train", None),
        ("roboflow", {"train": "ab", "valid": "c"}, "data.yaml", "train"),
        ("roboflow", {"train": "ab", "valid": "c"}, "train", None),
        ("plain", {"": "ab"}, ".", None),
        ("cvat", {"": "ab"}, ".", None),
        ("cvat", {"": "ab"}, "train.txt", None),
    ],
)
def test_yolo_layouts(layout, splits, source, part, tmp_path):
    write_yolo(tmp_path / "set", layout, splits)
    store = opened(tmp_path / "set" / source, tmp_path / "c", part=part)
    assert store.format == "YOLO"
    assert [category.name for category in store.categories] == NAMES
    assert found(store) == expected("a", "b")
    assert store.report.counts == {}
    assert not store.has_masks


def test_yolo_outlines_confidences_and_keypoints(tmp_path):
    write_yolo(tmp_path, "plain", {"": "a"})
    labels = tmp_path / "labels" / "a.txt"
    fractions = " ".join(f"{v / (30 if i % 2 else 40):.6f}" for i, v in enumerate(OUTLINE))
    labels.write_text(f"0 {fractions}\n1 0.5 0.5 0.5 0.5 0.875\n0 {fractions} 0.5\n")
    store = opened(tmp_path, tmp_path / "c")
    box = ("dog", [8, 3, 32, 27])
    assert found(store)["a"] == [box, ("cat & co", [10, 7.5, 30, 22.5]), box]
    assert [len(store.polygons(row)) for row in range(3)] == [1, 0, 1]
    assert np.allclose(store.polygons(0)[0], OUTLINE, atol=1e-3)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "data.yaml").write_text("names: {0: dog}\nkpt_shape: [2, 3]\n")
    labels.write_text("0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 2\n")
    store = opened(tmp_path, tmp_path / "c")
    assert found(store)["a"] == [("dog", [10, 7.5, 30, 22.5])]
    assert not store.has_masks


def test_yolo_counts_what_it_cannot_use(tmp_path):
    write_yolo(tmp_path, "plain", {"": "ab"})
    photo(tmp_path / "images" / "empty.jpg", (8, 8))
    labels = tmp_path / "labels"
    (labels / "lost.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (labels / "b.txt").write_text(
        "0 0.5 0.5 nan 0.2\n7 0.5 0.5 0.2 0.2\n0 0.5\n0 0.5 0.5 0.5 0.5\n\n"
    )
    report = opened(tmp_path, tmp_path / "c").report
    assert report.counts == {
        "annotation.image_id.dropped": 1,
        "annotation.row": 2,
        "annotation.row.class": 1,
        "image.file": 1,
        "image.unlabelled": 1,
    }
    assert report.examples["annotation.row"] == ["row 1 of b.txt", "row 3 of b.txt"]
    assert report.examples["image.unlabelled"] == ["empty.jpg"]
    assert (report.images_in, report.images_kept) == (4, 3)


def test_yolo_store_follows_rows_names_and_image_sizes(tmp_path):
    write_yolo(tmp_path, "plain", {"": "a"})
    before = opened(tmp_path, tmp_path / "c").path
    photo(tmp_path / "images" / "a.jpg", (80, 60))
    larger = opened(tmp_path, tmp_path / "c")
    assert larger.path != before
    assert found(larger)["a"][0] == ("dog", [8, 6, 40, 54])
    (tmp_path / "classes.txt").write_text("cow\nsheep\n")
    assert found(opened(tmp_path, tmp_path / "c"))["a"][0][0] == "cow"


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("classes.txt", "dog\ndog\n", r"classes\.txt.*used by two.*'dog', by 0 and 1"),
        ("classes.txt", "", r"classes\.txt: it holds no class names"),
        ("data.yaml", "names: [a, b\n", r"data\.yaml"),
        ("data.yaml", "names: {0: dog, x: cat}", r"data\.yaml: names: 'x'"),
        ("labels/a.txt", "0 20 15 16 24\n1 20 10 20 9\n", "pixels"),
        ("labels/a.txt", "\0", r"a\.txt"),
    ],
)
def test_yolo_refuses_by_file(file, text, match, tmp_path):
    write_yolo(tmp_path, "plain", {"": "a"})
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        opened(tmp_path, tmp_path / "c")
    assert caught.value.hint


def test_yolo_without_names_says_which_file_to_write(tmp_path):
    write_yolo(tmp_path, "plain", {"": "a"})
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match="class names") as caught:
        opened(tmp_path, tmp_path / "c")
    assert "classes.txt" in (caught.value.hint or "")


def test_yolo_names_of_neighbours_are_not_mixed_up(tmp_path):
    for name, classes in (("pets", ["dog", "cat & co"]), ("cows", ["cow", "calf"])):
        write_yolo(tmp_path / name, "ultralytics", {"train": "a"})
        (tmp_path / name / "data.yaml").unlink()
        content = f"path: {name}\ntrain: images/train\nnames: {json.dumps(classes)}\n"
        (tmp_path / f"{name}.yaml").write_text(content)
    for name, first in (("pets", "dog"), ("cows", "cow")):
        for inner in ("labels/train", "images/train", ""):
            store = opened(
                tmp_path / name / inner,
                tmp_path / "c",
                *([] if inner else [tmp_path / name / "images"]),
            )
            assert store.categories[0].name == first
    (tmp_path / "pets.yaml").write_text("names: [a, b]")
    (tmp_path / "cows.yaml").write_text("names: [c, d]")
    with pytest.raises(DataError, match=r"cows\.yaml.*pets\.yaml"):
        opened(tmp_path / "pets" / "labels" / "train", tmp_path / "c")


# --- Shares ------------------------------------------------------------------------------------------------------------


def test_shares_of_one_file_are_disjoint_and_whole(tmp_path):
    write_yolo(tmp_path, "plain", {"": "abc"})
    whole = found(opened(tmp_path, tmp_path / "c"))
    parts = [
        found(opened(tmp_path, tmp_path / "c", share=share, seed=1))
        for share in ((0.0, 0.67), (0.67, 1.0))
    ]
    assert [len(part) for part in parts] == [2, 1]
    assert parts[0] | parts[1] == whole
    orders = {
        tuple(found(opened(tmp_path, tmp_path / "c", share=(0.0, 0.34), seed=seed)))
        for seed in range(15)
    }
    assert orders == {("a",), ("b",), ("c",)}


# --- The other formats -------------------------------------------------------------------------------------------------


def outline_of(stem: str) -> list[list[float]]:
    return [[OUTLINE[i], OUTLINE[i + 1]] for i in range(0, 8, 2)] if stem == "a" else []


def write_labelme(root: Path, stems: str) -> Path:
    for stem in stems:
        width, height = SIZE[stem]
        photo(root / f"{stem}.jpg", SIZE[stem])
        shapes = [
            {
                "label": name,
                "points": [[x2, y1], [x1, y2]],
                "group_id": None,
                "shape_type": "rectangle",
            }
            for name, (x1, y1, x2, y2) in BOXES[stem]
        ]
        shapes += [
            {"label": "dog", "points": outline_of(stem), "group_id": None, "shape_type": "polygon"}
        ] * (stem == "a")
        content = {"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": f"{stem}.jpg",
                   "imageData": None, "imageHeight": height, "imageWidth": width}  # fmt: skip
        (root / f"{stem}.json").write_text(json.dumps(content))
    return root


def via_regions(stem: str) -> list[dict[str, object]]:
    shapes: list[tuple[str, dict[str, object]]] = [
        (name, {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1})
        for name, (x1, y1, x2, y2) in BOXES[stem]
    ]
    if stem == "a":
        polygon = {"name": "polygon", "all_points_x": OUTLINE[::2], "all_points_y": OUTLINE[1::2]}
        shapes.append(("dog", polygon))
    return [
        {"shape_attributes": shape, "region_attributes": {"kind": name, "note": "x" if i else ""}}
        for i, (name, shape) in enumerate(shapes)
    ]


def write_via(root: Path, stems: str, kind: str = "project") -> Path:
    entries = {}
    for stem in stems:
        photo(root / f"{stem}.jpg", SIZE[stem])
        regions = via_regions(stem)
        entries[f"{stem}.jpg99"] = {
            "filename": f"{stem}.jpg",
            "size": 99,
            "regions": regions,
            "file_attributes": {},
        }
    if kind == "csv":
        path = root / "via_export.csv"
        columns = ["filename", "file_size", "file_attributes", "region_count", "region_id",
                   "region_shape_attributes", "region_attributes"]  # fmt: skip
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            for entry in entries.values():
                for i, region in enumerate(entry["regions"]):
                    cells = [
                        json.dumps(region[key]) for key in ("shape_attributes", "region_attributes")
                    ]
                    table.writerow([entry["filename"], 99, "{}", len(entry["regions"]), i, *cells])
        return path
    if kind == "via1":
        for entry in entries.values():
            entry["regions"] = {str(i): region for i, region in enumerate(entry["regions"])}
    path = root / "via.json"
    project = {"_via_settings": {}, "_via_img_metadata": entries, "_via_attributes": {"region": {}}}
    path.write_text(json.dumps(project if kind == "project" else entries))
    return path


def write_cvat(root: Path, stems: str, subset: str = "") -> Path:
    labels = "".join(f"<label><name>{escape(name)}</name></label>" for name in NAMES)
    images = ""
    for i, stem in enumerate(stems):
        width, height = SIZE[stem]
        photo(root / "images" / subset / f"{stem}.jpg", SIZE[stem])
        shapes = "".join(
            f'<box label={quoteattr(name)} xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0"/>'
            for name, (x1, y1, x2, y2) in BOXES[stem]
        )
        if stem == "a":
            points = ";".join(f"{x},{y}" for x, y in outline_of(stem))
            shapes += f'<polygon label="dog" points="{points}"/>'
        images += (
            f'<image id="{i}" name="{stem}.jpg" width="{width}" height="{height}">{shapes}</image>'
        )
    path = root / "annotations.xml"
    path.write_text(
        f"<?xml version='1.0'?><annotations><version>1.1</version><meta><task><labels>{labels}</labels>"
        f"</task></meta>{images}</annotations>"
    )
    return path


def write_label_studio(root: Path, stems: str, kind: str = "json") -> Path:
    tasks = []
    for i, stem in enumerate(stems):
        width, height = SIZE[stem]
        photo(root / "images" / f"{stem}.jpg", SIZE[stem])
        sizes = {"original_width": width, "original_height": height}
        values: list[tuple[str, str, dict[str, object]]] = [
            ("rectanglelabels", name, {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0,
             "width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height})
            for name, (x1, y1, x2, y2) in BOXES[stem]
        ]  # fmt: skip
        if stem == "a":
            percent = [[100 * x / width, 100 * y / height] for x, y in outline_of(stem)]
            values.append(("polygonlabels", "dog", {"points": percent, "closed": True}))
        image = f"/data/upload/1/0a1b2c3d-{stem}.jpg"
        if kind == "min":
            label = [{**value, key: [name], **sizes} for key, name, value in values]
            tasks.append(
                {"image": image, "id": i, "label": label, "annotator": 1, "annotation_id": i}
            )
            continue
        result = [
            {"id": f"r{n}", "type": key, "value": {**value, key: [name]}, **sizes}
            for n, (key, name, value) in enumerate(values)
        ]
        tasks.append(
            {"id": i, "annotations": [{"id": 1, "result": result}], "data": {"image": image}}
        )
    path = root / "project.json"
    path.write_text(json.dumps(tasks))
    return path


WRITERS = {
    "labelme": lambda root, stems: write_labelme(root, stems),
    "VGG VIA": lambda root, stems: write_via(root, stems),
    "VGG VIA, export": lambda root, stems: write_via(root, stems, "export"),
    "VGG VIA, version 1": lambda root, stems: write_via(root, stems, "via1"),
    "VGG VIA, CSV": lambda root, stems: write_via(root, stems, "csv"),
    "CVAT XML": lambda root, stems: write_cvat(root, stems),
    "Label Studio JSON": lambda root, stems: write_label_studio(root, stems),
    "Label Studio JSON, min": lambda root, stems: write_label_studio(root, stems, "min"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_boxes_outlines_and_names(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "set", "ab")
    source = look(path).parts[""]
    store = AnnotationStore.open(source, cache=tmp_path / "c", warn=False)
    assert store.format == kind.split(",")[0]
    assert store.report.counts == {}
    assert sorted(category.name for category in store.categories) == sorted(NAMES)
    boxes = expected("a", "b")
    boxes["a"].append(("dog", [8, 3, 32, 27]))
    assert found(store) == boxes
    assert [len(store.polygons(row)) for row in range(4)] == [0, 0, 1, 0]
    assert np.allclose(store.polygons(2)[0], OUTLINE, atol=1e-9)
    assert store.column("area")[2] == pytest.approx(360)
    (report,) = check_path(tmp_path / "set", cache=tmp_path / "c")
    assert report.sound, report.findings
    assert "all 2 images" in report.findings[-1].text


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_image_is_reported_by_name(kind, tmp_path):
    WRITERS[kind](tmp_path / "set", "ab")
    for photo_a in tmp_path.rglob("a.jpg"):
        photo_a.unlink()
    (report,) = check_path(tmp_path / "set", cache=tmp_path / "c")
    texts = [finding.text for finding in report.findings]
    assert any("a.jpg" in text for text in texts), texts
    # VIA writes no sizes: without the image its objects cannot be used, with it the rest can.
    assert report.sound == kind.startswith("VGG VIA")


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files_are_refused_by_name(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "set", "ab")
    path = path / "b.json" if path.is_dir() else path
    whole = path.read_bytes()
    for data in (
        whole[: len(whole) // 2],
        b"",
        whole.replace(b"]", b"]]", 1).replace(b"/>", b">", 1),
    ):
        path.write_bytes(data)
        reports = check_path(path.parent if kind == "labelme" else path, cache=tmp_path / "c")
        (error, *_) = [f for report in reports for f in report.findings if f.level == "error"]
        assert path.name in error.text
        assert error.advice


# --- What each tool can draw besides -----------------------------------------------------------------------------------


def test_labelme_circles_masks_groups_and_lines(tmp_path):
    write_labelme(tmp_path, "a")
    path = tmp_path / "a.json"
    png = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1]], dtype=np.uint8) * 255).save(png, "PNG")
    mask = base64.b64encode(png.getvalue()).decode()
    shapes = [
        {"label": "sun", "shape_type": "circle", "points": [[20, 15], [25, 15]]},
        {"label": "dog", "shape_type": "mask", "points": [[4, 6], [5, 7]], "mask": mask},
        {"label": "dog", "group_id": 7, "points": [[1, 1], [3, 1], [3, 3]]},
        {"label": "dog", "group_id": 7, "points": [[8, 8], [9, 8], [9, 9]]},
        {"label": "dog", "shape_type": "point", "points": [[8, 8]]},
        {"label": None, "shape_type": "rectangle", "points": [[8, 8], [9, 9]]},
        {"label": "dog", "shape_type": "rectangle", "points": [[8, "x"]]},
        {"label": "dog", "shape_type": "mask", "points": [[4, 6], [5, 7]], "mask": mask[:40]},
    ]
    path.write_text(json.dumps({**json.loads(path.read_text()), "shapes": shapes}))
    store = opened(tmp_path, tmp_path / "c")
    assert found(store)["a"] == [
        ("sun", pytest.approx([15, 10, 25, 20], abs=0.05)),
        ("dog", [4, 6, 6, 8]),
        ("dog", [1, 1, 9, 9]),
        ("dog", [4, 6, 6, 8]),
    ]
    assert decode(store.rle(1), (30, 40))[6:8, 4:6].tolist() == [[True, False], [True, True]]
    assert len(store.polygons(2)) == 2
    assert store.report.examples == {
        "annotation.bbox": ["shape 7 of a.json"],
        "annotation.category_id": ["shape 6 of a.json"],
        "annotation.rle.counts": ["shape 8 of a.json"],
        "annotation.shape": ["shape 5 of a.json"],
    }


def test_a_format_that_is_named_is_not_guessed(tmp_path):
    write_labelme(tmp_path, "a")
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"tool": "mine", **json.loads(path.read_text())}))
    config = tmp_path / "own.toml"
    config.write_text('name = "own"\n[train]\nannotations = "a.json"\nimages = "."\n')
    assert not check_path(config, cache=tmp_path / "c")[0].sound
    config.write_text(config.read_text() + 'format = "labelme"\n')
    split = DatasetConfig.from_toml(config).split("train")
    assert found(AnnotationStore.open(split, cache=tmp_path / "c"))["a"][:-1] == expected("a")["a"]


def test_via_circles_ticked_names_and_points(tmp_path):
    path = write_via(tmp_path, "a")
    regions = [
        {"shape_attributes": {"name": "circle", "cx": 20, "cy": 15, "r": 5},
         "region_attributes": {"kind": {"sun": True}}},
        {"shape_attributes": {"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4, "theta": 1.5707963},
         "region_attributes": {"kind": "sun"}},
        {"shape_attributes": {"name": "point", "cx": 20, "cy": 15}, "region_attributes": {"kind": "sun"}},
        {"shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 4, "height": 4}, "region_attributes": {}},
    ]  # fmt: skip
    content = json.loads(path.read_text())
    content["_via_img_metadata"]["a.jpg99"]["regions"] = regions
    options = {"sun": "", "moon": ""}
    content["_via_attributes"]["region"]["kind"] = {"type": "checkbox", "options": options}
    path.write_text(json.dumps(content))
    store = opened(path, tmp_path / "c", tmp_path)
    assert [category.name for category in store.categories] == ["sun", "moon"]
    assert found(store)["a"] == [
        ("sun", pytest.approx([15, 10, 25, 20], abs=0.05)),
        ("sun", pytest.approx([16, 7, 24, 23], abs=0.05)),
    ]
    assert store.report.counts == {"annotation.shape": 1, "annotation.category_id": 1}


def test_via_class_is_the_attribute_with_a_usual_name_among_those_all_regions_have(tmp_path):
    path = write_via(tmp_path, "a")
    content = json.loads(path.read_text())
    for region in content["_via_img_metadata"]["a.jpg99"]["regions"]:
        attributes = region["region_attributes"]
        region["region_attributes"] = {"colour": "red", "class": attributes["kind"]}
    path.write_text(json.dumps(content))
    store = opened(path, tmp_path / "c", tmp_path)
    assert {category.name for category in store.categories} == set(NAMES)


def test_cvat_masks_ellipses_turned_boxes_and_subsets(tmp_path):
    path = write_cvat(tmp_path, "ab")
    shapes = (
        '<mask label="dog" rle="1, 3, 2" left="4" top="6" width="3" height="2"/>'
        '<mask label="dog" rle="1, 3" left="4" top="6" width="3" height="2"/>'
        '<ellipse label="dog" cx="20" cy="15" rx="5" ry="3"/>'
        '<box label="dog" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90"/>'
        '<polyline label="dog" points="1,1;2,2"/>'
    )
    text = path.read_text().replace('<image id="0"', '<image subset="Train" id="0"')
    text = text.replace('<image id="1"', '<image subset="Validation" id="1"')
    path.write_text(text.replace("</image>", f"{shapes}</image>", 1))
    parts = look(path).parts
    assert {name: source.part for name, source in parts.items()} == {
        "train": "Train",
        "val": "Validation",
    }
    assert found(AnnotationStore.open(parts["val"], cache=tmp_path / "c", warn=False)) == expected(
        "b"
    )
    store = AnnotationStore.open(parts["train"], cache=tmp_path / "c", warn=False)
    assert found(store)["a"][3:] == [
        ("dog", [4, 6, 7, 8]),
        ("dog", [4, 6, 7, 8]),
        ("dog", pytest.approx([15, 12, 25, 18], abs=0.05)),
        ("dog", pytest.approx([13, 7, 17, 17])),
    ]
    assert decode(store.rle(3), (30, 40))[6:8, 4:7].tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    assert store.report.examples["annotation.rle.counts"] == ["shape 5 of a.jpg"]
    del store.report.counts["annotation.rle.counts"]
    assert store.report.counts == {"annotation.shape": 1, "annotation.rotation": 1}


def test_cvat_masks_are_drawn_as_their_runs_say(tmp_path):
    path = write_cvat(tmp_path, "b")  # 64 x 48
    random, shapes, drawn = np.random.default_rng(0), "", []
    for density in (0.02, 0.1, 0.5, 0.9, 1.0):
        crop_hw = random.random((20, 30)) < density
        crop_hw[5:9] = True  # one run over several rows
        left, top = int(random.integers(0, 50)), int(random.integers(0, 40))
        ends = np.flatnonzero(np.diff(crop_hw.reshape(-1), prepend=False, append=False)).tolist()
        runs = np.diff([0, *ends, crop_hw.size]).tolist()
        shapes += f'<mask label="dog" rle="{", ".join(map(str, runs))}" left="{left}" top="{top}" width="30" height="20"/>'
        whole_HW = np.zeros((48, 64), dtype=np.bool_)
        part_HW = whole_HW[top : top + 20, left : left + 30]
        part_HW[:] = crop_hw[: part_HW.shape[0], : part_HW.shape[1]]
        drawn.append(whole_HW)
    path.write_text(path.read_text().replace("</image>", f"{shapes}</image>", 1))
    store = opened(path, tmp_path / "c", tmp_path)
    masks = [decode(store.rle(row), (48, 64)) for row in range(1, 6)]
    assert np.array_equal(masks, drawn)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["CVAT XML", "labelme", "Label Studio JSON"])
def test_small_files_with_huge_masks_take_little_memory(kind, tmp_path):
    side = 8192 if kind == "Label Studio JSON" else 16000
    if kind == "CVAT XML":
        path = tmp_path / "a.xml"
        path.write_text(
            f'<annotations><image id="0" name="a.png" width="{side}" height="{side}"><mask label="dog" left="0" top="0" '
            f'width="{side}" height="{side}" rle="0,{side**2}"/></image></annotations>'
        )
    elif kind == "labelme":
        path = tmp_path / "a.json"
        png = io.BytesIO()
        Image.new("1", (side, side), 1).save(png, "PNG")
        shape = {
            "label": "dog",
            "shape_type": "mask",
            "points": [[0, 0], [side - 1, side - 1]],
            "mask": base64.b64encode(png.getvalue()).decode(),
        }
        sizes = {"imagePath": "a.png", "imageHeight": side, "imageWidth": side}
        path.write_text(json.dumps({"version": "5", "flags": {}, "shapes": [shape], **sizes}))
    else:
        path = tmp_path / "a.json"
        strokes = encode_brush(np.ones((side, side), dtype=np.bool_))
        region = {
            "type": "brushlabels",
            "original_width": side,
            "original_height": side,
            "value": {"format": "rle", "rle": strokes, "brushlabels": ["dog"]},
        }
        tasks = [{"data": {"image": "a.png"}, "annotations": [{"result": [region]}]}]
        path.write_text(json.dumps(tasks))
    tracemalloc.start()
    try:
        if kind == "Label Studio JSON":
            assert opened(path, tmp_path / "c", tmp_path).has_masks
        else:  # larger than masks are decoded
            with pytest.raises(DataError, match="1 shape mended"):
                opened(path, tmp_path / "c", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 160 << 20


def test_label_studio_strokes_turned_boxes_and_several_annotators(tmp_path):
    path = write_label_studio(tmp_path, "abc")
    tasks = json.loads(path.read_text())
    sizes = {"original_width": 40, "original_height": 30}
    mask_HW = np.zeros((30, 40), dtype=np.bool_)
    mask_HW[3:9, 5:11] = True
    result = [
        {"id": "x", "type": "brushlabels", **sizes,
         "value": {"format": "rle", "rle": encode_brush(mask_HW), "brushlabels": ["dog"]}},
        {"id": "y", "type": "rectangle", "value": {"x": 50, "y": 50, "width": 25, "height": 10, "rotation": 90}, **sizes},
        {"id": "y", "type": "labels", "value": {"labels": ["dog"]}, **sizes},
        {"id": "z", "type": "ellipselabels", "value": {"x": 50, "y": 50, "radiusX": 12.5, "radiusY": 10, "ellipselabels": ["dog"]}, **sizes},
        {"id": "k", "type": "keypointlabels", "value": {"x": 5, "y": 5, "width": 1, "keypointlabels": ["dog"]}, **sizes},
        {"type": "choices", "value": {"choices": ["outdoors"]}},
        {"type": "relation", "from_id": "x", "to_id": "y"},
    ]  # fmt: skip
    other = {"result": [], "created_at": "2026-01-02"}
    tasks[0]["annotations"] = [
        {"result": result, "created_at": "2026-01-01", "ground_truth": True},
        other,
    ]
    tasks[1]["annotations"][0]["was_cancelled"] = True
    path.write_text(json.dumps(tasks))
    store = opened(path, tmp_path / "c", tmp_path / "images")
    assert found(store)["a"] == [
        ("dog", [5, 3, 11, 9]),
        ("dog", pytest.approx([17, 15, 20, 25])),
        ("dog", pytest.approx([15, 12, 25, 18], abs=0.05)),
    ]
    assert np.array_equal(decode(store.rle(0), (30, 40)), mask_HW)
    assert store.report.counts == {
        "annotation.rotation": 1,
        "annotation.shape": 1,
        "image.annotations": 1,
        "image.unannotated": 1,
    }


def test_label_studio_predictions_are_read_where_nothing_is_annotated(tmp_path):
    path = write_label_studio(tmp_path, "ab")
    tasks = json.loads(path.read_text())
    for task in tasks:
        task["predictions"] = task.pop("annotations")
    path.write_text(json.dumps(tasks))
    store = opened(path, tmp_path / "c", tmp_path / "images")
    assert found(store)["b"] == expected("b")["b"]
    assert store.report.examples == {"file.predictions": ["2 tasks"]}
    tasks[0]["annotations"] = [{"result": []}]
    path.write_text(json.dumps(tasks))
    store = opened(path, tmp_path / "c", tmp_path / "images")
    assert store.report.counts == {"image.unannotated": 1}
    assert found(store) == {"a": []}


def test_voc_outlines_are_read_next_to_their_boxes(tmp_path):
    photo(tmp_path / "a.jpg", SIZE["a"])
    corners = "".join(
        f"<x{i + 1}>{x + 1}</x{i + 1}><y{i + 1}>{y + 1}</y{i + 1}>"
        for i, (x, y) in enumerate(outline_of("a"))
    )
    (tmp_path / "a.xml").write_text(
        "<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size><object><name>dog</name>"
        f"<polygon>{corners}</polygon><bndbox><xmin>9</xmin><ymin>4</ymin><xmax>32</xmax><ymax>27</ymax></bndbox>"
        "</object></annotation>"
    )
    store = opened(tmp_path, tmp_path / "c")
    assert found(store)["a"] == [("dog", [8, 3, 32, 27])]
    assert store.polygons(0)[0].tolist() == OUTLINE
    assert store.report.counts == {}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("YOLO", "labels/b.txt"),
        ("labelme", "b.json"),
        ("VGG VIA", "via.json"),
        ("Label Studio JSON", "project.json"),
    ],
)
def test_a_set_that_was_moved_is_the_same_and_a_changed_one_another(kind, name, tmp_path):
    def write(root: Path) -> AnnotationSource:
        if kind == "YOLO":
            write_yolo(root, "plain", {"": "ab"})
        else:
            WRITERS[kind](root, "ab")
        return next(iter(look(root).parts.values()))

    def digest(source: AnnotationSource) -> str:
        return AnnotationStore.path_for(source, cache=tmp_path / "c").name

    here, there = write(tmp_path / "here"), write(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    there = next(iter(look(tmp_path / "elsewhere").parts.values()))
    assert digest(here) == digest(there)
    file = tmp_path / "here" / name
    before = digest(here)
    text = file.read_text()
    file.write_text(text.replace("dog", "cow").replace("0.5", "0.6"))
    assert file.read_text() != text
    assert digest(here) != before


def test_a_change_anywhere_in_a_large_labelme_file_is_seen(tmp_path):
    write_labelme(tmp_path, "ab")
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    large = {"imageData": "A" * (2 << 20), **content, "lineColor": "A" * (2 << 20)}
    path.write_text(json.dumps(large | {"imageData": "A" * (2 << 20)}))
    before = found(opened(tmp_path, tmp_path / "c"))["a"]
    path.write_text(path.read_text().replace("dog", "cow"))
    after = found(opened(tmp_path, tmp_path / "c"))["a"]
    assert after == [("cow" if name == "dog" else name, box) for name, box in before]


@pytest.mark.parametrize("kind", ["labelme", "VGG VIA", "Label Studio JSON"])
def test_a_path_alone_follows_the_sizes_of_its_images(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "set", "a")
    file = path / "a.json" if path.is_dir() else path
    text = file.read_text()
    for key in ("imageHeight", "imageWidth", "original_height", "original_width"):
        text = text.replace(key, f"other_{key}")
    file.write_text(text)
    store = AnnotationStore.open(path, cache=tmp_path / "c", warn=False)
    assert store.sizes_I2.tolist() == [[30, 40]]
    photo(next(tmp_path.rglob("a.jpg")), (80, 60))
    store = AnnotationStore.open(path, cache=tmp_path / "c", warn=False)
    assert store.sizes_I2.tolist() == [[60, 80]]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("<annotations><track id='0' label='dog'/></annotations>", "videos"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotations>&b;</annotations>", "entities"),
        (
            "<?xml version='1.0'?><!-- <annotations --><!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>",
            "entities",
        ),
        (
            f"<!--{'<annotations ' * 9000}--><!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>",
            "entities",
        ),
        ("<annotations><image id='0' name='a.jpg'></annotations>", "not XML"),
    ],
)
def test_other_xml_is_not_taken_for_cvat(text, match, tmp_path):
    path = tmp_path / "annotations.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        opened(path, tmp_path / "c")
    assert "annotations.xml" in caught.value.message
    assert caught.value.hint


def test_reading_via_leaves_the_process_its_csv_limit(tmp_path):
    before = csv.field_size_limit()
    opened(write_via(tmp_path, "ab", "csv"), tmp_path / "c", tmp_path)
    assert csv.field_size_limit() == before


def test_deep_json_and_huge_files_are_refused(tmp_path, monkeypatch):
    write_labelme(tmp_path, "ab")
    path = tmp_path / "b.json"
    whole = path.read_text()
    path.write_text(whole.replace('"flags": {}', '"flags": ' + "[" * 200_000 + "]" * 200_000))
    with pytest.raises(DataError, match=r"b\.json is nested"):
        opened(tmp_path, tmp_path / "c")
    path.write_text(whole)
    monkeypatch.setattr("proxydet.data.formats.labelme._LARGEST_FILE", 100)
    with pytest.raises(DataError, match=r"a\.json is larger"):
        opened(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("kind", ["labelme", "cvat"])
def test_a_damaged_mask_costs_no_box_of_other_objects(kind, tmp_path):
    path = write_labelme(tmp_path, "a") if kind == "labelme" else write_cvat(tmp_path, "a")
    if kind == "labelme":
        content = json.loads((tmp_path / "a.json").read_text())
        box = {"label": "dog", "shape_type": "rectangle", "points": [[8, 8], [12, 14]]}
        bad = {"label": "dog", "points": [[1, 1], [3, 1]]}
        content["shapes"] = [box, box, bad]
        (tmp_path / "a.json").write_text(json.dumps(content))
    else:
        box = '<box label="dog" xtl="8" ytl="8" xbr="12" ybr="14"/>'
        bad = '<polygon label="dog" points="1,1;3,1"/>'
        head, _, rest = path.read_text().partition("<image")
        start = rest.partition(">")[0]
        path.write_text(f"{head}<image{start}>{box}{box}{bad}</image></annotations>")
    store = opened(path, tmp_path / "c")
    assert found(store)["a"] == [("dog", [8, 8, 12, 14])] * 2
    assert store.report.counts["annotation.bbox"] == 1


# --- Values that no tool writes ----------------------------------------------------------------------------------------

ODD = [None, True, -1, 5, 1.5, 1e308, 10**400, "@digits@", "", "x", "1.5,2.5", "a/" * 8000, "nan", [], [5], {}, {"x": 5}]  # fmt: skip
"""``@digits@`` stands for a number of 5,000 digits, which Python does not write."""


def write_yolo_config(root: Path) -> Path:
    write_yolo(root, "ultralytics", {"train": "ab", "val": "c"})
    path = root / "data.yaml"
    content = {"path": ".", "train": "images/train", "val": "images/val", "nc": 2, "kpt_shape": [2, 3]}  # fmt: skip
    path.write_text(json.dumps(content | {"names": {"0": "dog", "1": "cat & co"}}))
    return path


def with_odd_value(path: Path, place: float, value: object) -> None:
    """Put a value into the field of a file that is this far from its beginning (0) towards its end (1)."""
    shown = json.dumps(value).replace('"@digits@"', "9" * 5000)
    if path.suffix == ".xml":
        root = ElementTree.parse(path).getroot()
        fields = [(element, key) for element in root.iter() for key in element.attrib]
        element, key = fields[int(place * len(fields))]
        element.set(key, value if isinstance(value, str) and value[:1] != "@" else shown)
        path.write_text(ElementTree.tostring(root, encoding="unicode"))
        return
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))
        cells = [(row, column) for row in rows for column in range(len(row))]
        row, column = cells[int(place * len(cells))]
        row[column:] = [] if value is None else [shown, *row[column + 1 :]]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return
    content = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []
    inner = [content]
    while inner:
        holder = inner.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        inner += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    holder, key = places[int(place * len(places))]
    holder[key] = value
    path.write_text(json.dumps(content).replace('"@digits@"', "9" * 5000))


@pytest.mark.parametrize("kind", ["YOLO", *WRITERS])
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.sampled_from(ODD))
@example(place=0.0, value=10**400)
@example(place=0.0, value="a/" * 8000)
def test_odd_values_end_in_findings_with_advice(kind, place, value):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        path = WRITERS[kind](root, "ab") if kind != "YOLO" else write_yolo_config(root)
        with_odd_value(path / "a.json" if path.is_dir() else path, place, value)
        for report in check_path(path, cache=Path(folder) / "c"):
            assert all(f.advice for f in report.findings if f.level == "error"), report.findings


LARGE = 10**400


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("labelme", '"imageHeight": 30', f'"imageHeight": {LARGE}'),
        ("VGG VIA", '"x": 4.0', f'"x": {LARGE}'),
        ("Label Studio JSON", '"x": 10.0', f'"x": {LARGE}'),
        ("Label Studio JSON", '"annotations": [', '"predictions": 7, "annotations": 5, "rest": ['),
        ("Label Studio JSON", "0a1b2c3d-a.jpg", "a/" * 20_000 + "a.jpg"),
        ("CVAT XML", "</image>", '<mask label="dog" rle="1.5,2.5" left="4" top="6" width="2" height="2"/></image>'),
        ("VGG VIA, CSV", "filename,", "filename,filename,filename,filename,filename,filename,filename,filename,"),
    ],
)  # fmt: skip
def test_odd_values_that_were_met_are_findings(kind, before, after, tmp_path):
    path = WRITERS[kind](tmp_path, "ab")
    file = path / "a.json" if path.is_dir() else path
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    (report,) = check_path(path, cache=tmp_path / "c")
    assert all(f.advice for f in report.findings if f.level == "error")


def test_a_class_number_beyond_the_class_table_is_refused(tmp_path):
    path = write_yolo_config(tmp_path)
    path.write_text("train: images/train\nnames: {0: cat, 9000000: dog}\n")
    with pytest.raises(DataError, match=r"data\.yaml: names: 9000000") as caught:
        opened(path, tmp_path / "c")
    assert caught.value.hint


# --- What a folder holds -----------------------------------------------------------------------------------------------


def test_links_to_folders_are_searched_once(tmp_path):
    write_yolo(tmp_path / "elsewhere", "roboflow", {"train": "ab"})
    root = tmp_path / "set"
    root.mkdir()
    (root / "export").symlink_to(tmp_path / "elsewhere" / "train", target_is_directory=True)
    (tmp_path / "elsewhere" / "train" / "back").symlink_to(root, target_is_directory=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    ((_, source),) = look(root).parts.items()
    store = AnnotationStore.open(source, cache=tmp_path / "c", warn=False)
    assert found(store) == expected("a", "b")


def test_what_a_search_passes_over_is_named(tmp_path):
    deep = tmp_path.joinpath(*"abcdefgh")
    deep.mkdir(parents=True)
    (deep / "instances.json").write_text('{"images": [], "categories": []}')
    with pytest.raises(DataError, match=r"not searched: .*/a/b/c/d/e/f/g"):
        look(tmp_path)
    for number in range(25):
        (tmp_path / f"{number:02}.json").write_text('{"settings": 1}')
    write_yolo(tmp_path / "set", "plain", {"": "a"})
    for number in range(70):
        photo(tmp_path / "set" / "images" / f"of{number}" / "x.jpg", (4, 4))
    unsearched = " ".join(look(tmp_path).unsearched)
    assert "5 of the 25 .json files" in unsearched
    report = check_path(tmp_path, cache=tmp_path / "c")
    assert any("5 of the 25 .json files" in finding.text for finding in report[0].findings)


def test_coco_with_thousands_of_categories_in_front_and_rows_after_empty_files_are_found(tmp_path):
    content = {
        "categories": [{"id": i, "name": f"class {i}" * 4} for i in range(1, 3000)],
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]}],
    }
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(content))
    assert look(tmp_path / "coco").format == "COCO JSON"
    write_yolo(tmp_path / "yolo", "plain", {"": "ab"})
    for number in range(25):
        (tmp_path / "yolo" / "labels" / f"0{number}.txt").touch()
    assert look(tmp_path / "yolo").format == "YOLO"


def test_an_image_that_was_turned_in_place_is_seen(tmp_path):
    write_yolo(tmp_path, "plain", {"": "a"})
    image = tmp_path / "images" / "a.bmp"
    (tmp_path / "images" / "a.jpg").unlink()
    photo(image, (40, 32))  # rows of BMP are padded to 4 bytes
    before = AnnotationStore.path_for(tmp_path, cache=tmp_path / "c")
    assert AnnotationStore.path_for(tmp_path, cache=tmp_path / "c") == before
    length = image.stat().st_size
    photo(image, (32, 40))
    assert image.stat().st_size == length
    assert AnnotationStore.path_for(tmp_path, cache=tmp_path / "c") != before


def test_noise_instead_of_brush_strokes_is_not_read(monkeypatch):
    monkeypatch.setattr("proxydet.data.formats.label_studio.MOST_RUNS", 1000)
    noise = np.random.default_rng(0).random((60, 60)) > 0.5
    read = decode_brush(encode_brush(noise[:20]), (20, 60))
    assert read is not None
    assert np.array_equal(read, noise[:20])
    assert decode_brush(encode_brush(noise), (60, 60)) is None
