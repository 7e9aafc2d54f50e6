"""``proxydet data init``: from an export to a dataset config that check, stats and training take."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxydet.data.check import check_path
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.init import init_dataset
from proxydet.data.sources import look
from proxydet.errors import ConfigError, DataError, InputError
from proxydet_cli import main
from tests.unit.data.test_formats import (
    BOXES,
    NAMES,
    SIZE,
    WRITERS,
    expected,
    found,
    photo,
    write_cvat,
    write_labelme,
    write_via,
    write_yolo,
)


def write_coco(root: Path, stems: str, name: str = "instances.json", folder: str = "") -> Path:
    images, annotations = [], []
    for i, stem in enumerate(stems, 1):
        width, height = SIZE[stem]
        photo(root / folder / f"{stem}.jpg", SIZE[stem])
        images.append({"id": i, "file_name": f"{stem}.jpg", "width": width, "height": height})
        annotations += [
            {"id": 10 * i + n, "image_id": i, "category_id": NAMES.index(label) + 1,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 9, "iscrowd": 0}
            for n, (label, (x1, y1, x2, y2)) in enumerate(BOXES[stem])
        ]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def write_voc(root: Path, stems: str) -> Path:
    for stem in stems:
        width, height = SIZE[stem]
        photo(root / f"{stem}.jpg", SIZE[stem])
        objects = "".join(
            f"<object><name>{label.replace('&', '&amp;')}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, (x1, y1, x2, y2) in BOXES[stem]
        )
        (root / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>{width}</width><height>{height}</height></size>"
            f"{objects}</annotation>"
        )
    return root


SPLIT: dict[str, Callable[[Path], object]] = {
    "COCO JSON, Roboflow": lambda root: [
        write_coco(root / part, stems, "_annotations.coco.json")
        for part, stems in (("train", "ab"), ("valid", "c"))
    ],
    "COCO JSON, published layout": lambda root: [
        write_coco(root, "ab", "annotations/instances_train2017.json", "train2017"),
        write_coco(root, "c", "annotations/instances_val2017.json", "val2017"),
        (root / "annotations" / "captions_val2017.json").write_text('{"images": []}'),
    ],
    "Pascal VOC, Roboflow": lambda root: [
        write_voc(root / part, stems) for part, stems in (("train", "ab"), ("valid", "c"))
    ],
    "YOLO, Ultralytics": lambda root: write_yolo(root, "ultralytics", {"train": "ab", "val": "c"}),
    "YOLO, Roboflow": lambda root: write_yolo(root, "roboflow", {"train": "ab", "valid": "c"}),
    "labelme, folders": lambda root: [
        write_labelme(root / "train", "ab"),
        write_labelme(root / "val", "c"),
    ],
    "VGG VIA, folders": lambda root: [
        write_via(root / "train", "ab"),
        write_via(root / "val", "c"),
    ],
    "CVAT XML, two files": lambda root: [
        write_cvat(root / "train", "ab"),
        write_cvat(root / "val", "c"),
    ],
    "Label Studio JSON, two files": lambda root: [
        WRITERS["Label Studio JSON"](root / "train", "ab"),
        WRITERS["Label Studio JSON"](root / "val", "c"),
    ],
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROXYDET_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", SPLIT)
def test_parts_are_taken_as_found(kind, tmp_path):
    SPLIT[kind](tmp_path / "my pets")
    report = init_dataset(Path("my pets"), closed=True)
    assert report.config == Path("my-pets.toml")
    assert report.format == kind.split(",")[0]
    assert sorted(report.classes) == sorted(NAMES)
    assert {part: count.images for part, count in report.parts.items()} == {"train": 2, "val": 1}
    data = Dataset(config=DatasetConfig.from_toml(report.config))
    assert found(data.store("val")) == expected("c")
    assert data.vocabulary.names == report.classes
    (checked,) = check_path(report.config)
    assert checked.sound, checked.findings
    assert not any(finding.deviation for finding in checked.findings), checked.findings


@pytest.mark.parametrize("kind", ["COCO JSON", *WRITERS])
def test_what_is_not_split_is_split_by_a_seed(kind, tmp_path):
    write = write_coco if kind == "COCO JSON" else WRITERS[kind]
    write(tmp_path / "export", "abc")
    report = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert {part: count.images for part, count in report.parts.items()} == {"train": 2, "val": 1}
    assert "seed" in report.split
    data = Dataset(config=DatasetConfig.from_toml(report.config))
    parts = [set(found(data.store(part))) for part in ("train", "val")]
    assert parts[0] | parts[1] == {"a", "b", "c"}
    assert not parts[0] & parts[1]
    again = init_dataset(tmp_path / "export", Path("again.toml"), closed=True)
    assert again.config.read_text().splitlines()[2:] == [
        line.replace("pets", "again") for line in report.config.read_text().splitlines()[2:]
    ]
    (checked,) = check_path(report.config)
    assert checked.sound, checked.findings


def test_a_split_leaves_every_class_in_both_parts_where_it_can(tmp_path):
    path = write_coco(tmp_path / "export", "b")
    content = json.loads(path.read_text())
    for number in range(20):  # two of them with the second class
        photo(tmp_path / "export" / f"n{number}.jpg", (20, 20))
        image = {"id": 50 + number, "file_name": f"n{number}.jpg", "width": 20, "height": 20}
        content["images"].append(image)
        content["annotations"].append(
            {
                "id": 500 + number,
                "image_id": 50 + number,
                "category_id": 1 + (number < 2),
                "bbox": [1, 1, 9, 9],
            }
        )
    path.write_text(json.dumps(content))
    for seed in range(6):  # most of them leave it in one part
        report = init_dataset(path, Path(f"s{seed}.toml"), seed=seed, closed=True)
        data = Dataset(config=DatasetConfig.from_toml(report.config))
        both = [set(data.store(part).column("category").tolist()) for part in ("train", "val")]
        assert both == [{0, 1}] * 2


def test_a_test_part_is_named_and_evaluated_by_name(tmp_path):
    write_yolo(tmp_path / "set", "ultralytics", {"train": "a", "val": "b", "test": "c"})
    report = init_dataset(tmp_path / "set", closed=True)
    assert list(report.parts) == ["train", "val", "test"]
    assert found(Dataset(config=DatasetConfig.from_toml(report.config)).store("test")) == expected(
        "c"
    )


def test_without_a_text_encoder_the_commands_say_how_to_get_one(tmp_path):
    write_coco(tmp_path / "export", "abc")
    report = init_dataset(tmp_path / "export", Path("pets.toml"))
    assert report.embedded == ""
    assert not report.embeddings.exists()
    assert report.commands[:2] == (
        "proxydet download clip-vit-b32",
        "proxydet vocab build pets.toml -o pets.vocab",
    )
    from proxydet.vocabulary.names import read_names

    assert tuple(entry.name for entry in read_names(report.config)) == report.classes
    # What counts and draws needs no embeddings; what trains says how to make them.
    assert Dataset(config=DatasetConfig.from_toml(report.config)).classes.names == report.classes
    (checked,) = check_path(report.config)
    assert [finding.part for finding in checked.findings if finding.level == "error"] == [
        "vocabulary"
    ]
    assert "vocab build" in checked.findings[-1].advice


def test_published_embeddings_serve_where_they_have_all_names(tmp_path):
    from proxydet.vocabulary.sources import published_vocabulary

    table = np.random.default_rng(0).normal(size=(80, 512)).astype(np.float16)
    (tmp_path / "datasets" / "metadata").mkdir(parents=True)
    np.save(tmp_path / "datasets" / "metadata" / "coco_clip_a+cname.npy", table)
    path = write_coco(tmp_path / "export", "abc")
    path.write_text(path.read_text().replace("cat & co", "cat"))
    report = init_dataset(tmp_path / "export", Path("pets.toml"))
    assert "coco" in report.embedded
    vocabulary = Dataset(config=DatasetConfig.from_toml(report.config)).vocabulary
    known = published_vocabulary("coco")
    rows = [known.names.index(name) for name in vocabulary.names]
    assert np.array_equal(vocabulary.embeddings, known.embeddings[rows])


def test_images_elsewhere_are_named(tmp_path):
    path = write_coco(tmp_path / "export", "abc")
    (tmp_path / "photos").mkdir()
    for image in (tmp_path / "export").glob("*.jpg"):
        image.rename(tmp_path / "photos" / image.name)
    with pytest.raises(DataError, match=r"a\.jpg") as caught:
        init_dataset(path, Path("pets.toml"), closed=True)
    assert "--images" in (caught.value.hint or "")
    assert not Path("pets.toml").exists()
    assert not Path("pets.vocab").exists()
    report = init_dataset(path, Path("pets.toml"), images=[Path("photos")], closed=True)
    assert check_path(report.config)[0].sound


def test_parts_of_a_config_in_a_folder_called_after_a_part_are_kept(tmp_path):
    write_yolo(tmp_path / "export" / "training", "ultralytics", {"train": "ab", "val": "c"})
    report = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert {part: count.images for part, count in report.parts.items()} == {"train": 2, "val": 1}
    assert found(Dataset(config=DatasetConfig.from_toml(report.config)).store("train")) == expected(
        "a", "b"
    )


def write_subsets(root: Path, subsets: dict[str, str]) -> None:
    path = write_cvat(root, "".join(subsets))
    text = path.read_text()
    for stem, subset in subsets.items():
        text = text.replace(f'name="{stem}.jpg"', f'name="{stem}.jpg" subset="{subset}"')
    path.write_text(text)


def test_subsets_of_one_part_are_merged_and_others_named(tmp_path):
    write_subsets(tmp_path / "export", {"a": "Train", "b": "valid", "c": "validation"})
    report = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    data = Dataset(config=DatasetConfig.from_toml(report.config))
    assert {part: set(found(data.store(part))) for part in ("train", "val")} == {
        "train": {"a"},
        "val": {"b", "c"},
    }
    assert report.notes == ()
    write_subsets(tmp_path / "other", {"a": "Train", "b": "val", "c": "extra"})
    report = init_dataset(tmp_path / "other", Path("more.toml"), closed=True)
    assert {part: count.images for part, count in report.parts.items()} == {"train": 1, "val": 1}
    assert any("'extra'" in note and "annotations.xml" in note for note in report.notes)
    assert not any(note.endswith("not annotated: not used") for note in report.notes)
    (warning,) = [
        finding
        for finding in check_path(tmp_path / "other")[0].findings
        if finding.level == "warning" and "extra" in finding.text
    ]
    assert "annotations.xml" in warning.text


def one_part_twice(root: Path) -> None:
    write_subsets(root / "train", {"a": "train", "b": "val"})
    write_cvat(root / "val", "c")


def empty(root: Path) -> None:
    root.mkdir()


def mixed(root: Path) -> None:
    write_coco(root, "a")
    write_labelme(root / "more", "b")


def two_in_one_folder(root: Path) -> None:
    write_voc(root, "a")
    (root / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")


def next_to_each_other(root: Path) -> None:
    write_labelme(root, "a")
    write_cvat(root, "b")


def unclear(root: Path) -> None:
    write_coco(root, "a", "one.json")
    write_coco(root, "b", "two.json")


def without_objects(root: Path) -> None:
    path = write_coco(root, "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))


def twice(root: Path) -> None:
    write_yolo(root, "plain", {"": "a"})
    (root / "classes.txt").write_text("dog\ndog\n")


def without_images(root: Path) -> None:
    write_yolo(root, "plain", {"": "a"})
    (root / "images" / "a.jpg").unlink()


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (empty, "export holds no annotations"),
        (
            mixed,
            r"several formats: .*instances\.json.*more|several formats: .*more.*instances\.json",
        ),
        (two_in_one_folder, r"several formats: Pascal VOC .*YOLO"),
        (next_to_each_other, r"several formats: .*labelme"),
        (one_part_twice, r"several annotations of val: .*train.*val"),
        (unclear, r"one\.json.*two\.json"),
        (without_objects, "no annotation"),
        (twice, r"classes\.txt.*dog"),
        (without_images, "image"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(write, match, tmp_path):
    write(tmp_path / "export")
    with pytest.raises(InputError, match=match) as caught:
        init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert caught.value.hint
    assert not list(tmp_path.glob("pets.*"))
    for place in re.findall(r"proxydet data init ([^\s,;]+)(?=[,;]|$)", caught.value.hint):
        look(Path(place))  # it is not refused again


def test_what_is_mended_dropped_and_left_over_is_printed(tmp_path):
    write_yolo(tmp_path / "export", "plain", {"": "abc"})
    (tmp_path / "export" / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n9 0.5 0.5 0.2 0.2\n")
    (tmp_path / "export" / "labels" / "c.txt").unlink()
    report = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    notes = "\n".join(report.notes)
    assert "row 2 of a.txt" in notes
    assert "c.jpg" in notes
    write_labelme(tmp_path / "other", "ab")
    photo(tmp_path / "other" / "more.jpg", (9, 9))
    report = init_dataset(tmp_path / "other", closed=True)
    assert any("1 image" in note and "not annotated" in note for note in report.notes)


@pytest.mark.parametrize("name", ["pets.toml", "pets.vocab"])
def test_what_is_there_is_not_replaced_unasked(name, tmp_path):
    write_coco(tmp_path / "export", "abc")
    Path(name).write_text("mine")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert Path(name).read_text() == "mine"
    assert len(list(tmp_path.glob("pets.*"))) == 1
    assert init_dataset(tmp_path / "export", Path("pets.toml"), closed=True, overwrite=True).classes


@pytest.mark.parametrize("value", ["", " []", ' ""'])
def test_a_data_yaml_that_names_no_images_is_refused_or_its_folders_are_taken(value, tmp_path):
    write_yolo(tmp_path / "export", "ultralytics", {"train": "ab", "val": "c"})
    config = tmp_path / "export" / "data.yaml"
    config.write_text(f"names: {json.dumps(NAMES)}\ntrain:{value}\nval:{value}\n")
    with pytest.raises(DataError, match=r"data\.yaml"):
        init_dataset(config, Path("pets.toml"), closed=True)
    assert not check_path(config)[0].sound
    report = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert {part: count.images for part, count in report.parts.items()} == {"train": 2, "val": 1}
    assert all(checked.sound for checked in check_path(tmp_path / "export"))


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "valid"), ("<html>not found</html>", "valid"), ("", "test"), ("no", "test")],
)
def test_a_damaged_part_does_not_disappear(text, part, tmp_path):
    root = tmp_path / "export"
    SPLIT["COCO JSON, Roboflow"](root)
    write_coco(root / part, "c", "_annotations.coco.json").write_text(text)
    match = rf"{part}/_annotations\.coco\.json"
    if part == "test":
        notes = init_dataset(root, Path("pets.toml"), closed=True).notes
        assert any(match.replace("\\", "") in note for note in notes), notes
        found = [finding.text for report in check_path(root) for finding in report.findings]
        assert any(match.replace("\\", "") in text for text in found), found
        return
    with pytest.raises(DataError, match=match):
        init_dataset(root, Path("pets.toml"), closed=True)
    (report,) = check_path(root)
    assert not report.sound
    assert part in report.findings[0].text


def test_an_empty_list_of_pascal_voc_does_not_disappear(tmp_path):
    write_voc(tmp_path / "VOC" / "Annotations", "abc")
    lists = tmp_path / "VOC" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("")
    with pytest.raises(DataError, match=r"val\.txt"):
        init_dataset(tmp_path / "VOC", Path("pets.toml"), closed=True)
    (report,) = check_path(tmp_path / "VOC")
    assert not report.sound


def test_an_empty_file_alone_is_reported_as_empty(tmp_path):
    write_cvat(tmp_path / "export", "ab")
    (tmp_path / "export" / "annotations.xml").write_text("")
    with pytest.raises(DataError, match=r"annotations\.xml.*empty") as caught:
        init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)
    assert "VOC" not in (caught.value.hint or "")


def test_a_part_without_objects_is_not_written(tmp_path):
    path = write_coco(tmp_path / "export", "abc")
    content = json.loads(path.read_text())
    only = content["annotations"][0]["image_id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == only]
    path.write_text(json.dumps(content))
    for seed in range(3):
        output = Path(f"pets{seed}.toml")
        report = init_dataset(path, output, closed=True, seed=seed)
        assert [*report.parts] == ["train"]
        assert any("1 image with objects" in note for note in report.notes), report.notes
        assert check_path(output)[0].sound


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_a_config_cannot_hold_is_refused(seed, tmp_path):
    write_coco(tmp_path / "export", "abc")
    with pytest.raises(ConfigError, match="seed"):
        init_dataset(tmp_path / "export", Path("pets.toml"), closed=True, seed=seed)
    assert not Path("pets.toml").exists()


def test_boxes_without_extent_are_refused(tmp_path):
    path = write_coco(tmp_path / "export", "ab")
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["bbox"][2] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances\.json"):
        init_dataset(path, Path("pets.toml"), closed=True)
    assert not Path("pets.toml").exists()


def test_a_missing_image_is_noted_as_what_check_refuses(tmp_path):
    write_voc(tmp_path / "export", "abc")
    (tmp_path / "export" / "b.jpg").unlink()
    notes = init_dataset(tmp_path / "export", Path("pets.toml"), closed=True).notes
    assert any("b.jpg" in note and "data check" in note for note in notes), notes


def test_an_image_of_another_part_never_replaces_a_missing_one(tmp_path):
    root = tmp_path / "export"
    write_coco(root, "abc", "train.json", "train")
    write_coco(root, "bc", "val.json", "val")
    (root / "train" / "b.jpg").unlink()
    notes = init_dataset(root, Path("pets.toml"), closed=True).notes
    assert any("1 of 3 images" in note and "'b.jpg'" in note for note in notes), notes
    assert DatasetConfig.from_toml(Path("pets.toml")).split("train").roots == (root / "train",)
    # A name with its folder still finds an image of the other one, as LVIS has them.
    content = json.loads((root / "train.json").read_text())
    content["images"][1]["file_name"] = "val/b.jpg"
    (root / "train.json").write_text(json.dumps(content))
    assert not any(
        "missing" in note for note in init_dataset(root, Path("more.toml"), closed=True).notes
    )


def test_an_image_of_another_subset_never_replaces_a_missing_one(tmp_path):
    root = tmp_path / "export"
    write_subsets(root, {"a": "train", "b": "train", "c": "val"})
    for stem, folder in zip("abc", ("train", "val", "val"), strict=True):
        (image,) = root.rglob(f"{stem}.jpg")
        (root / "images" / folder).mkdir(parents=True, exist_ok=True)
        image.rename(root / "images" / folder / image.name)
    notes = init_dataset(root, Path("pets.toml"), closed=True).notes
    assert any("1 of 2 images" in note and "'b.jpg'" in note for note in notes), notes


def test_copies_are_found_among_images_of_equal_names(tmp_path):
    root = tmp_path / "export"
    for part, folders in (("train", "pq"), ("val", "xy")):
        path = write_coco(root / part, "ab", "ann.json")
        content = json.loads(path.read_text())
        for entry, folder in zip(content["images"], folders, strict=True):
            entry["file_name"] = f"{folder}/1.jpg"
            shade = {"p": 10, "q": 20, "x": 10, "y": 30}[folder]
            (root / part / folder).mkdir()
            Image.new("RGB", (entry["width"], entry["height"]), (shade,) * 3).save(
                root / part / folder / "1.jpg"
            )
        path.write_text(json.dumps(content))
    texts = [finding.text for report in check_path(root) for finding in report.findings]
    assert any("1 image of train is in val too" in text and "p/1.jpg" in text for text in texts), (
        texts
    )


def test_parts_are_compared(tmp_path):
    root = tmp_path / "export"
    write_coco(root / "train", "ab", "ann.json")
    path = write_coco(root / "valid", "bc", "ann.json")
    content = json.loads(path.read_text())
    names = [category["name"] for category in content["categories"]]
    content["categories"][0]["name"] = names[0].upper()
    path.write_text(json.dumps(content))
    notes = init_dataset(root, Path("pets.toml"), closed=True).notes
    found = [finding for report in check_path(Path("pets.toml")) for finding in report.findings]
    alone = [finding for report in check_path(root) for finding in report.findings]
    for texts in (notes, [f.text for f in found], [f.text for f in alone]):
        assert any("1 image of train is in val too" in text and "b.jpg" in text for text in texts)
        assert any("in val and none in train" in t and names[0].upper() in t for t in texts)
        assert any("but for case" in t and names[0] in t and names[0].upper() in t for t in texts)
    photo(root / "valid" / "b.jpg", (SIZE["b"][0], SIZE["b"][1]))
    (root / "valid" / "b.jpg").write_bytes((root / "valid" / "b.jpg").read_bytes() + b"\0")
    texts = [f.text for report in check_path(root) for f in report.findings]
    assert not any("in val too" in text for text in texts)


@pytest.mark.parametrize("value", ["/", "../../../../../../../../../../../.."])
def test_the_whole_file_system_is_not_walked(value, tmp_path):
    write_yolo(tmp_path / "export", "ultralytics", {"train": "ab", "val": "c"})
    config = tmp_path / "export" / "data.yaml"
    config.write_text(f"names: {json.dumps(NAMES)}\ntrain: {value}\nval: images/val\n")
    with pytest.raises(DataError, match=r"data\.yaml: train"):
        init_dataset(config, Path("pets.toml"), closed=True)


def test_refusals_name_the_file_of_the_part(tmp_path):
    SPLIT["COCO JSON, Roboflow"](tmp_path / "export")
    path = tmp_path / "export" / "valid" / "_annotations.coco.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(DataError, match=r"valid/_annotations\.coco\.json"):
        init_dataset(tmp_path / "export", Path("pets.toml"), closed=True)


def test_another_number_of_classes_than_names_is_noted(tmp_path):
    write_yolo(tmp_path / "export", "ultralytics", {"train": "ab", "val": "c"})
    config = tmp_path / "export" / "data.yaml"
    assert not any("nc" in f.text.split() for r in check_path(config) for f in r.findings)
    config.write_text(config.read_text().replace("nc: 2", "nc: 5"))
    found = [finding for report in check_path(config) for finding in report.findings]
    assert any(finding.deviation == "file.nc" for finding in found)


def test_images_alone_get_the_list_of_formats_and_names_are_printed_on_one_line(tmp_path, capsys):
    photo(tmp_path / "photos" / "a.jpg", (9, 9))
    (report,) = check_path(tmp_path / "photos")
    assert all(name in report.findings[0].text for name in ("COCO", "Pascal VOC", "VGG VIA"))
    path = write_coco(tmp_path / "export", "abc")
    path.write_text(path.read_text().replace(json.dumps(NAMES[0]), '"two\\nlines"'))
    with contextlib.suppress(SystemExit):
        main.main(["data", "init", str(path), "-o", "lines.toml", "--closed"])
    assert "two\\nlines" in capsys.readouterr().out


def test_a_folder_of_images_that_does_not_exist_is_named(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match="nowhere") as caught:
        init_dataset(tmp_path, tmp_path / "a.toml", images=[nowhere], closed=True)
    assert caught.value.path == nowhere
