import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.data.check import CheckReport, check_path
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.stats import dataset_stats
from proxydet.errors import DataError


def check(path: Path, **options: Any) -> CheckReport:
    (report,) = check_path(path, **options)
    return report


def found(report: CheckReport, level: str) -> str:
    return "\n".join(f"{f.part}: {f.text}" for f in report.findings if f.level == level)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_data_set_is_sound(small_set_with_labels: Path, decode: bool) -> None:
    report = check(small_set_with_labels, decode=decode)
    assert report.sound
    assert found(report, "error") == found(report, "warning") == ""
    text = found(report, "ok")
    assert "train: train.json (COCO JSON): 6 images, 7 annotations, 3 categories" in text
    assert "3 classes of 8 dimensions, 1 of them novel" in text
    assert "image_labels: 7 images in 2 tars" in text


def test_missing_images_are_errors_with_advice(small_set: Path) -> None:
    (small_set.parent / "train" / "3.png").unlink()
    report = check(small_set)
    assert not report.sound
    assert "1 of 6 images cannot be used, e.g.: the image '3.png'" in found(report, "error")
    assert all(f.advice for f in report.findings if f.level != "ok")


def test_a_name_too_long_for_the_disk_is_an_image_that_is_missing(small_set: Path) -> None:
    name = "a" * 5000
    change(small_set.parent / "train.json", lambda c: c["images"][0].update(file_name=name))
    assert f"1 of 6 images cannot be used, e.g.: the image '{name}'" in found(
        check(small_set), "error"
    )


def test_files_of_the_published_layout_are_named_as_they_are_downloaded(small_set: Path) -> None:
    """Photographs, embeddings and annotations that are not there: the advice is a command."""
    small_set.write_text(
        small_set.read_text()
        .replace('"embeddings.npy"', '"metadata/coco_clip_a+cname.npy"')
        .replace('"train"', '"coco/train2017"')
        .replace('"val.json"', '"lvis/lvis_v1_val.json"')
    )
    advice = {f.part: f.advice for f in check(small_set).findings if f.level == "error"}
    assert "proxydet download coco-train2017" in advice["train"]
    assert "proxydet download lvis-val" in advice["val"]
    assert "proxydet download coco-embeddings" in advice["vocabulary"]


def test_images_of_another_size_are_errors(small_set: Path) -> None:
    Image.new("RGB", (5, 5)).save(small_set.parent / "train" / "3.png")
    assert "5 x 5 pixels, its annotations are for 40 x 60" in found(check(small_set), "error")


def test_losses_and_boxes_without_masks_are_warnings(small_set: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][0]["category_id"] = 99
        content["annotations"][1]["segmentation"] = []

    change(small_set.parent / "train.json", edit)
    report = check(small_set)
    assert report.sound
    text = found(report, "warning")
    assert "1 annotation dropped: category_id" in text
    assert "1 annotation has a box and no mask" in text


def test_known_files_with_other_counts_are_named(small_set: Path) -> None:
    (small_set.parent / "train.json").rename(small_set.parent / "lvis_v1_train.json")
    small_set.write_text(small_set.read_text().replace("train.json", "lvis_v1_train.json"))
    assert "the published file 100170 and 1270141" in found(check(small_set), "warning")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"train.json"', '"absent.json"', "train: there are no annotations"),
        ('"embeddings.npy"', '"absent.npy"', "vocabulary: there are no text embeddings"),
        ('novel = ["dog"]', 'novel = ["dgo"]', "vocabulary: the novel class 'dgo'"),
        ('tars = "tars"', 'tars = "absent"', "image_labels: there is no folder of tars"),
    ],
)  # fmt: skip
def test_each_part_says_its_error_and_the_others_are_still_checked(
    small_set_with_labels: Path, old: str, new: str, message: str
) -> None:
    text = small_set_with_labels.read_text()
    assert old in text
    small_set_with_labels.write_text(text.replace(old, new))
    report = check(small_set_with_labels)
    assert message in found(report, "error")
    assert "val: all 2 images are there" in found(report, "ok")


def test_empty_and_undescribed_sets_are_errors(small_set: Path) -> None:
    change(small_set.parent / "val.json", lambda content: content.update(images=[], annotations=[]))
    assert "/val.json: images" in found(check(small_set), "error")
    head = small_set.read_text().split("[train]")[0]
    small_set.write_text(head)
    assert "no table [train]" in found(check(small_set), "error")


def test_tar_problems_are_warnings(small_set_with_labels: Path, make_tar) -> None:
    tars = small_set_with_labels.parent / "tars"
    whole = (tars / "bird.tar").read_bytes()
    (tars / "bird.tar").write_bytes(whole[:1800])
    make_tar(tars / "unknown.tar", {})
    small_set_with_labels.write_text(small_set_with_labels.read_text() + 'map = { cow = "cat" }\n')
    text = found(check(small_set_with_labels), "warning")
    assert "1 damaged tar: bird.tar" in text
    assert "1 tar is missing: cow" in text
    assert "1 tar belongs to no class and is not used: unknown.tar" in text


def test_a_changed_store_is_found(small_set: Path, tmp_path: Path) -> None:
    check(small_set, cache=tmp_path / "c")
    store = max((tmp_path / "c").glob("*.columns"), key=lambda p: p.stat().st_size)
    content = bytearray(store.read_bytes())
    content[100] ^= 255
    store.write_bytes(content)
    assert check(small_set, cache=tmp_path / "c").sound
    assert "the store" in found(check(small_set, cache=tmp_path / "c", decode=True), "error")


def test_a_root_reports_on_each_description_and_on_what_is_not_prepared(small_set: Path) -> None:
    root = small_set.parent
    (root / "broken.toml").write_text("name = 3")
    for source in ("lvis/lvis_v1_train.json", "coco/annotations/instances_train2017.json"):
        (root / source).parent.mkdir(parents=True)
        (root / source).touch()
    (root / "imagenet" / "ImageNet-21K").mkdir(parents=True)
    (root / "lvis.toml").write_text(small_set.read_text().replace("small", "lvis"))
    reports = {Path(report.name).name: report for report in check_path(root)}
    assert reports.keys() == {root.name, "broken", "lvis", "small"}
    advice = [f.advice for f in reports[root.name].findings if f.level == "warning"]
    assert advice == [
        "run: proxydet data prepare coco",
        "run: proxydet data prepare imagenet-lvis",
    ]
    assert not reports["broken"].sound
    assert reports["small"].sound
    with pytest.raises(DataError, match="no file or folder"):
        check_path(root / "absent")


def test_counts_are_what_is_in_the_files(small_set_with_labels: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][0] |= {"iscrowd": 1}
        content["annotations"][1] |= {"area": 2000}
        content["annotations"][2] |= {"area": 96 * 96, "segmentation": []}

    change(small_set_with_labels.parent / "train.json", edit)
    stats = dataset_stats(Dataset(config=DatasetConfig.from_toml(small_set_with_labels)))
    train, val, labels = stats.parts
    assert (train.part, train.images, train.annotations, train.images_without_annotations) == (
        "train",
        6,
        7,
        2,
    )
    assert (train.crowds, train.without_mask) == (1, 1)
    assert (train.small, train.medium, train.large) == (4, 1, 1)
    assert [(c.name, c.base, c.frequency, c.images) for c in train.classes] == [
        ("cat", True, "f", 4),
        ("dog", False, "r", 2),
        ("bird", True, "c", 1),
    ]
    assert train.group(base=True) == {"classes": 2, "occurring": 2, "annotations": 5}
    assert train.group(base=False) == {"classes": 1, "occurring": 1, "annotations": 2}
    assert (val.images, val.annotations) == (2, 1)
    assert (labels.part, labels.images) == ("image_labels", 7)
    assert [c.images for c in labels.classes] == [0, 4, 3]


def test_classes_that_the_annotations_lack_count_nothing(small_set: Path) -> None:
    np.save(small_set.parent / "embeddings.npy", np.eye(4, 8))
    small_set.write_text(
        small_set.read_text().replace('["dog"]', '["dog"]\nnames = ["bird", "cow", "cat", "dog"]')
    )
    stats = dataset_stats(Dataset(config=DatasetConfig.from_toml(small_set)))
    assert [c.images for c in stats.parts[0].classes] == [1, 0, 4, 2]


def test_labels_of_a_class_without_boxes_are_counted(small_set: Path) -> None:
    folder = small_set.parent
    np.save(folder / "embeddings.npy", np.eye(4, 8))
    labels = json.loads((folder / "train.json").read_text()) | {"annotations": []}
    labels["categories"].append({"id": 99, "name": "cow"})
    for image in labels["images"]:
        image["pos_category_ids"] = [99]
    (folder / "labels.json").write_text(json.dumps(labels))
    table = '[image_labels]\nannotations = "labels.json"\nimages = "train"\n'
    named = '["dog"]\nnames = ["bird", "cow", "cat", "dog"]'
    small_set.write_text(small_set.read_text().replace('["dog"]', named) + table)
    part = dataset_stats(Dataset(config=DatasetConfig.from_toml(small_set))).parts[-1]
    assert [c.images for c in part.classes] == [0, 6, 0, 0]
    assert part.annotations == 6


def test_decoding_reads_images_in_tars_too(small_set_with_labels: Path, make_tar, jpeg) -> None:
    whole = jpeg(40, 60)
    tars = small_set_with_labels.parent / "tars"
    make_tar(tars / "bird.tar", {"a.jpg": whole, "cut.jpg": whole[: len(whole) - 40]})
    assert check(small_set_with_labels).sound
    report = check(small_set_with_labels, decode=True)
    assert "image_labels: 1 of " in found(report, "error")
    assert "bird.tar/cut.jpg" in found(report, "error")
    assert "data.unreadable_images=skip" in report.findings[-1].advice


def test_labelled_images_in_folders_must_be_there(small_set: Path) -> None:
    folder = small_set.parent
    content = json.loads((folder / "train.json").read_text())
    for image in content["images"]:
        image["pos_category_ids"] = [content["categories"][0]["id"]]
    (folder / "labels.json").write_text(json.dumps(content | {"annotations": []}))
    table = '[image_labels]\nannotations = "labels.json"\nimages = "train"\n'
    small_set.write_text(small_set.read_text() + table)
    assert check(small_set).sound
    (folder / "train" / content["images"][0]["file_name"]).unlink()
    error = found(check(small_set), "error")
    assert "image_labels: 1 of " in error
    assert content["images"][0]["file_name"] in error


def test_what_is_no_description_says_what_to_name(small_set: Path) -> None:
    with pytest.raises(DataError, match="is a folder") as folder:
        DatasetConfig.from_toml(small_set.parent)
    assert folder.value.hint is not None
    assert small_set.name in folder.value.hint
    with pytest.raises(DataError, match="TOML") as annotations:
        DatasetConfig.from_toml(small_set.parent / "train.json")
    assert annotations.value.hint is not None
    assert "proxydet data init" in annotations.value.hint


def test_an_annotation_file_is_checked_on_its_own(small_set: Path) -> None:
    """Without a dataset config or embeddings; for Pascal VOC with the images that belong to it."""
    (report,) = check_path(small_set.parent / "train.json")
    assert report.sound
    assert "6 images, 7 annotations, 3 categories" in found(report, "ok")
    assert "COCO" in found(report, "ok")
    change(small_set.parent / "train.json", lambda c: c["images"][0].update(neg_category_ids=[]))
    (report,) = check_path(small_set.parent / "train.json")
    assert "neg_category_ids" in found(report, "error")
    assert check_path(small_set.parent / "train.json", protocol="coco")[0].sound


@pytest.mark.parametrize(
    ("where", "field", "value", "named"),
    [
        ("annotations", "bbox", [500, 500, 5, 5], "outside their image"),
        ("annotations", "bbox", [9, 9, 0, 0], "without extent"),
        ("images", "file_name", None, "file_name"),
    ],
)
def test_what_stops_training_is_an_error_of_the_file_on_its_own(
    small_set: Path, where: str, field: str, value: object, named: str
) -> None:
    def edit(content: dict[str, Any]) -> None:
        for row in content[where]:
            row[field] = value
            row["segmentation"] = None

    change(small_set.parent / "train.json", edit)
    assert named in found(check_path(small_set.parent / "train.json")[0], "error")
    assert named in found(check(small_set), "error")


def test_a_folder_with_no_annotations_says_what_it_should_hold(tmp_path: Path) -> None:
    (report,) = check_path(tmp_path)
    assert str(tmp_path) in found(report, "error")
    assert "Pascal VOC" in report.findings[0].text


def test_a_config_without_val_says_that_evaluation_is_not_spoken_of(small_set: Path) -> None:
    tables = small_set.read_text().split("\n[")
    small_set.write_text("\n[".join(table for table in tables if not table.startswith("val]")))
    report = check(small_set)
    assert report.sound
    assert "val: " in found(report, "warning")
    assert any(what.startswith("evaluation (") for what in report.unchecked)


def test_a_test_part_without_objects_stops_neither_training_nor_evaluation(small_set: Path) -> None:
    folder = small_set.parent
    content = json.loads((folder / "val.json").read_text())
    (folder / "test.json").write_text(json.dumps(content | {"annotations": []}))
    table = '\n[test]\nannotations = "test.json"\nimages = "val"\n'
    small_set.write_text(small_set.read_text() + table)
    report = check(small_set)
    assert report.sound
    assert "/test.json: annotations" in found(report, "warning")
    assert "test: all 2 images are there" in found(report, "ok")
    assert any("[test]" in what for what in report.unchecked)


def test_images_of_an_annotation_file_are_checked_where_they_are_next_to_it(
    small_set: Path,
) -> None:
    folder = small_set.parent
    alone = folder / "alone" / "train.json"
    alone.parent.mkdir()
    alone.write_text((folder / "train.json").read_text())
    (report,) = check_path(alone)
    assert report.sound
    assert "images: not checked" in found(report, "warning")
    assert any(what.startswith("images (") for what in report.unchecked)
    (report,) = check_path(folder / "train.json")
    assert "images: all 6 images are there" in found(report, "ok")
    assert not any(what.startswith("images (") for what in report.unchecked)
    (folder / "train" / "3.png").unlink()
    (report,) = check_path(folder / "train.json")
    assert "1 of 6 images cannot be used" in found(report, "error")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("decode", [False, True])
def test_images_cut_short_are_errors_and_those_with_more_after_their_end_are_not(
    small_set: Path, kind: str, decode: bool
) -> None:
    path = small_set.parent / "train" / "3.png"
    with Image.open(path) as image:
        image.save(path, kind)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 20)
    report = check(small_set, decode=decode)
    assert report.sound
    assert [what.startswith("pixels (") for what in report.unchecked] == [True] * (not decode)
    for kept in (len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:kept])
        assert f"cannot read the image {path}" in found(check(small_set, decode=decode), "error")
