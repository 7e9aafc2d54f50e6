"""Annotation formats besides COCO and Pascal VOC: each read as what its tool means, through the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxydet.data.check import check_path
from proxydet.data.sources import AnnotationSource
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
    source = AnnotationSource(path=path, images=images, part=part, **more)  # type: ignore[arg-type]
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
def test_yolo_layouts(
    layout: str, splits: dict[str, str], source: str, part: str | None, tmp_path: Path
) -> None:
    write_yolo(tmp_path / "set", layout, splits)
    store = opened(tmp_path / "set" / source, tmp_path / "c", part=part)
    assert store.format == "YOLO"
    assert [category.name for category in store.categories] == NAMES
    assert found(store) == expected("a", "b")
    assert store.report.counts == {}
    assert not store.has_masks


def test_yolo_outlines_confidences_and_keypoints(tmp_path: Path) -> None:
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


def test_yolo_counts_what_it_cannot_use(tmp_path: Path) -> None:
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


def test_yolo_store_follows_rows_names_and_image_sizes(tmp_path: Path) -> None:
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
def test_yolo_refuses_by_file(file: str, text: str, match: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, "plain", {"": "a"})
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        opened(tmp_path, tmp_path / "c")
    assert caught.value.hint


def test_yolo_without_names_says_which_file_to_write(tmp_path: Path) -> None:
    write_yolo(tmp_path, "plain", {"": "a"})
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match="class names") as caught:
        opened(tmp_path, tmp_path / "c")
    assert "classes.txt" in (caught.value.hint or "")


def test_check_reads_a_yolo_folder_and_its_images(tmp_path: Path) -> None:
    write_yolo(tmp_path, "plain", {"": "ab"})
    (report,) = check_path(tmp_path, cache=tmp_path / "c")
    assert report.sound
    assert "all 2 images" in report.findings[-1].text


# --- Shares ------------------------------------------------------------------------------------------------------------


def test_shares_of_one_file_are_disjoint_and_whole(tmp_path: Path) -> None:
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
        for seed in range(12)
    }
    assert orders == {("a",), ("b",), ("c",)}
