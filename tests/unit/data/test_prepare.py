import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.data.classes import load_vocabulary
from proxydet.data.description import DatasetDescription
from proxydet.data.prepare import coco_zero_shot, lvis, objects365, openimages, steps
from proxydet.data.prepare.descriptions import MARK, description_text, write_description
from proxydet.data.prepare.json_files import replacing
from proxydet.data.prepare.steps import prepare
from proxydet.errors import DataError, DiskFullError, EnvironmentProblem
from proxydet.reporting import SILENT

CATEGORIES = [
    {"id": 1, "name": "cat", "frequency": "f", "synset": "cat.n.01", "def": "a pet"},
    {"id": 2, "name": "aerosol_can", "frequency": "r", "synset": "aerosol.n.02", "def": "spray"},
    {"id": 3, "name": "almond", "frequency": "c", "synset": "almond.n.02", "def": "a nut"},
]


def lvis_content(count: int = 4) -> dict[str, Any]:
    images = [
        {
            "id": i,
            "coco_url": f"http://x/train2017/{i:012}.jpg",
            "height": 20,
            "width": 30,
            "extra": [i],
        }
        for i in range(count)
    ]
    annotations = [
        {"id": i, "image_id": i % 2, "category_id": 1 + i % 3, "bbox": [1, 1, 4, 4.5], "area": 3.0,
         "segmentation": [[1, 1, 5, 1, 5, 5.5]]}
        for i in range(7)
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, "info": {}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root in the published layout, in small."""
    root = tmp_path / "datasets"
    for folder in ("lvis", "metadata", "coco/train2017"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        (root / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(lvis_content()))
    for i in range(4):
        Image.new("RGB", (30, 20)).save(root / "coco/train2017" / f"{i:012}.jpg")
    np.save(root / "metadata" / "lvis_v1_clip_a+cname.npy", np.eye(3, 4))
    return root


def test_rare_annotations_are_left_out_and_the_rest_is_untouched(root: Path) -> None:
    source, target = root / "lvis/lvis_v1_train.json", root / "out" / "norare.json"
    assert lvis.write_without_frequencies(source, target) == 2
    content = json.loads(target.read_text())
    assert content["images"] == lvis_content()["images"]
    assert content["categories"] == CATEGORIES
    assert content["annotations"] == [
        a for a in lvis_content()["annotations"] if a["category_id"] != 2
    ]
    assert [path.name for path in target.parent.iterdir()] == ["norare.json"]


@pytest.mark.parametrize("with_rare", [True, False])
def test_category_info_counts_images_and_instances(
    root: Path, tmp_path: Path, with_rare: bool
) -> None:
    source = root / "lvis/lvis_v1_train.json"
    lvis.write_category_info(source, tmp_path / "info.json", with_rare=with_rare)
    rows = json.loads((tmp_path / "info.json").read_text())
    assert [row["def"] for row in rows] == ["a pet", "spray", "a nut"]
    assert [row["image_count"] for row in rows] == [2, 2 if with_rare else 0, 2]
    assert [row["instance_count"] for row in rows] == [3, 2 if with_rare else 0, 2]


def test_files_in_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    content = lvis_content()
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "a"}]}))
    for call in (lvis.write_without_frequencies, lvis.write_category_info):
        with pytest.raises(DataError, match="no 'frequency'"):
            call(path, tmp_path / "out.json")
    path.write_text(json.dumps(content | {"annotations": [{"id": 1}]}))
    with pytest.raises(DataError, match="annotation 0 is not usable"):
        lvis.write_without_frequencies(path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_lvis_is_prepared_once_and_described(root: Path) -> None:
    first = prepare("lvis", root)
    assert [step.action for step in first.steps] == ["made"] * 6 or first.steps[
        1
    ].action == "up to date"
    assert first.problems == ()
    again = prepare("lvis", root)
    assert {step.action for step in again.steps if step.name != "data description"} == {
        "up to date"
    }
    forced = prepare("lvis", root, force=True)
    assert [s.action for s in forced.steps if s.name == "class counts"] == ["made", "made"]
    description = DatasetDescription.from_toml(root / "lvis.toml")
    assert load_vocabulary(description).base.tolist() == [True, False, True]
    assert description.image_labels is None
    assert description.split("val").roots == (root / "coco",)


def test_a_file_older_than_its_source_is_made_again(root: Path) -> None:
    prepare("lvis", root)
    source = root / "lvis/lvis_v1_train.json"
    content = lvis_content()
    content["annotations"].pop()
    source.write_text(json.dumps(content))
    later = (root / "lvis/lvis_v1_train_norare.json").stat().st_mtime_ns + 10**9
    os.utime(source, ns=(later, later))
    steps = {step.path.name: step.action for step in prepare("lvis", root).steps}
    assert steps["lvis_v1_train_norare.json"] == "made"


def test_absent_sources_are_named(tmp_path: Path) -> None:
    for dataset, missing in (
        ("lvis", "lvis_v1_train.json"),
        ("imagenet-lvis", "ImageNet-21K"),
        ("objects365", "zhiyuan_objv2_val.json"),
        ("openimages", "bbox.csv"),
        ("coco", "instances_train2017.json"),
    ):
        with pytest.raises(DataError, match=missing) as caught:
            prepare(dataset, tmp_path)
        assert caught.value.hint


def test_imagenet_lvis_is_indexed_with_its_problems(root: Path, make_tar, jpeg) -> None:
    tars = root / "imagenet" / "ImageNet-21K"
    tars.mkdir(parents=True)
    # n02682922 is aerosol.n.02; those of cat.n.01 and almond.n.02 are missing; n00000001 is no class of LVIS.
    make_tar(tars / "n02682922.tar", {"a.JPEG": jpeg(4, 6), "b.txt": b"no image"})
    make_tar(tars / "n00000001.tar", {"a.JPEG": jpeg(4, 6)})
    report = prepare("imagenet-lvis", root)
    assert report.steps[-1].detail == "1 image in 1 tar, 0 gzip-compressed"
    text = "\n".join(report.problems)
    assert "n02682922.tar/b.txt" in text
    assert "2 tars are missing, e.g. n02121620, n07750586" in text
    assert "1 tar belongs to no class" in text
    description = DatasetDescription.from_toml(root / "lvis.toml")
    assert description.image_labels is not None
    assert prepare("lvis", root).steps[-1].action == "up to date"
    assert DatasetDescription.from_toml(root / "lvis.toml") == description


def test_what_preparing_reports_is_not_logged_as_well(
    root: Path, make_tar, jpeg, caplog: pytest.LogCaptureFixture
) -> None:
    content = lvis_content()
    content["annotations"][0]["category_id"] = 99
    (root / "lvis/lvis_v1_train.json").write_text(json.dumps(content))
    assert "category_id" in "\n".join(prepare("lvis", root).problems)
    (root / "imagenet/ImageNet-21K").mkdir(parents=True)
    make_tar(root / "imagenet/ImageNet-21K/n02682922.tar", {"a.JPEG": jpeg(4, 6), "b.txt": b"-"})
    assert "1 unreadable member: " in "\n".join(prepare("imagenet-lvis", root).problems)
    assert not caplog.records


def test_a_file_without_images_is_named(root: Path) -> None:
    content = lvis_content() | {"images": [], "annotations": []}
    (root / "lvis/lvis_v1_val.json").write_text(json.dumps(content))
    assert "lvis_v1_val.json has no image that can be used" in prepare("lvis", root).problems


@pytest.mark.parametrize("dataset", ["lvis", "imagenet-lvis", "openimages"])
def test_the_folder_around_the_data_root_is_recognised(root: Path, dataset: Any) -> None:
    with pytest.raises(DataError) as caught:
        prepare(dataset, root.parent)
    assert caught.value.hint == f"the data root is the folder inside it: name {root}"


def test_descriptions_changed_by_hand_are_kept(root: Path) -> None:
    path = root / "lvis.toml"
    assert write_description(path, description_text("lvis")) == "made"
    assert write_description(path, description_text("lvis")) == "up to date"
    path.write_text(path.read_text().replace(MARK, "# mine"))
    assert write_description(path, description_text("lvis", image_labels=True)) == "kept"
    assert "image_labels" not in path.read_text()
    assert prepare("lvis", root).steps[-1].action == "kept"


def write_fixes(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_objects365_names_are_set_right(tmp_path: Path) -> None:
    source = tmp_path / "o.json"
    categories = [{"id": 1, "name": "Bakset", "x": 1}, {"id": 2, "name": "Hat, big"}]
    source.write_text(json.dumps(lvis_content() | {"categories": categories}))
    fixes = write_fixes(
        tmp_path / "f.csv", [["1", "Bakset", "Basket"], ["2", "Hat, big", "Hat, big"]]
    )
    assert objects365.write_with_fixed_names(source, fixes, tmp_path / "out.json") == 1
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "Basket", "x": 1}, categories[1]]
    assert content["annotations"] == lvis_content()["annotations"]
    # What is right already stays right.
    assert objects365.write_with_fixed_names(tmp_path / "out.json", fixes, tmp_path / "2.json") == 0
    for rows, message in (
        ([["1", "Other", "Basket"], ["2", "Hat, big", "Hat"]], "is called 'Bakset'"),
        ([["1", "Bakset", "Basket"]], "nothing of it"),
        ([["1", "Bakset"]], "rows of id"),
        ([["one", "Bakset", "Basket"]], "rows of id"),
    ):
        write_fixes(fixes, rows)
        with pytest.raises(DataError, match=message):
            objects365.write_with_fixed_names(source, fixes, tmp_path / "3.json")
    with pytest.raises(DataError, match="no table of names"):
        objects365.write_with_fixed_names(source, tmp_path / "none.csv", tmp_path / "3.json")


@pytest.fixture
def challenge(tmp_path: Path) -> openimages.OpenImagesTables:
    """Entity > (Animal > (Cat, Dog), Toy > Dog); Entity is no class of the challenge."""
    leaf = [{"LabelName": "/cat"}, {"LabelName": "/dog"}]
    animal = {"LabelName": "/animal", "Subcategory": leaf, "Part": [{"LabelName": "/ear"}]}
    toy = {"LabelName": "/toy", "Subcategory": [{"LabelName": "/dog"}]}
    tree = {"LabelName": "/entity", "Subcategory": [animal, toy]}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    (tmp_path / "classes.csv").write_text(
        '/animal,Animal\n/cat,"Cat, small"\n/dog,Dog\n/toy,Toy\n/ear,Ear\n'
    )
    (tmp_path / "boxes.csv").write_text(
        "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\nb,/dog,0.5,1,0,0.5,0\nb,/animal,0,1,0.5,1,1\n"
    )
    (tmp_path / "labels.csv").write_text(
        "ImageID,Source,LabelName,Confidence\na,verification,/cat,1\na,verification,/toy,0\nb,v,/animal,0\n"
    )
    for name, size in (("a", (40, 20)), ("b", (10, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.jpg")
    return openimages.OpenImagesTables(
        boxes=tmp_path / "boxes.csv",
        image_labels=tmp_path / "labels.csv",
        classes=tmp_path / "classes.csv",
        hierarchy=tmp_path / "tree.json",
    )


def test_openimages_is_expanded_along_the_hierarchy(challenge, tmp_path: Path) -> None:
    counts = openimages.write_expanded(challenge, tmp_path, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert counts == (2, 4)
    assert [c["name"] for c in content["categories"]] == [
        "Animal",
        "Cat, small",
        "Dog",
        "Toy",
        "Ear",
    ]
    first, second = content["images"]
    assert (first["file_name"], first["width"], first["height"]) == ("a.jpg", 40, 20)
    # Cat is an animal; what is no toy is no dog (which stands below both).
    assert (first["pos_category_ids"], first["neg_category_ids"]) == ([1, 2], [3, 4])
    assert (second["pos_category_ids"], second["neg_category_ids"]) == ([], [1, 2, 3])
    found = [(a["category_id"], a["bbox"], a["iscrowd"]) for a in content["annotations"]]
    assert found == [
        (3, [5, 0, 5, 15], 0),
        (1, [5, 0, 5, 15], 0),
        (4, [5, 0, 5, 15], 0),
        (1, [0, 15, 10, 15], 1),
    ]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        ("boxes.csv", "b,/dog", "b,/cow", r"row 2: the class '/cow'"),
        ("boxes.csv", "0.5,1,", "x,1,", "row 2: could not convert"),
        ("boxes.csv", ",IsGroupOf", ",Group", "no column 'IsGroupOf'"),
        ("boxes.csv", "0.5,1,0", "0.5,1", "row 2: 6 values, not 7"),
        ("labels.csv", "/toy", "/cow", r"row 3: the class '/cow'"),
        ("tree.json", '"LabelName": "/toy"', '"Label": "/toy"', "not a class hierarchy"),
        ("tree.json", "{", "", "not a class hierarchy"),
        ("classes.csv", "/dog,Dog", "/dog,Dog,x", "row 3: not a label"),
        ("classes.csv", "/toy,Toy", "/dog,Toy", "row 4: not a label"),
    ],
)  # fmt: skip
def test_bad_tables_name_file_and_row(challenge, tmp_path: Path, table, old, new, message) -> None:
    path = tmp_path / table
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        openimages.write_expanded(challenge, tmp_path, tmp_path / "out.json")
    assert table in caught.value.message
    assert not (tmp_path / "out.json").exists()


def test_openimages_needs_its_images(challenge, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg"):
        openimages.write_expanded(challenge, tmp_path, tmp_path / "out.json")


def test_the_zero_shot_split_keeps_categories_and_drops_empty_images(tmp_path: Path) -> None:
    names = [*coco_zero_shot.SEEN, *coco_zero_shot.UNSEEN, "stop sign"]
    assert len(set(names)) == 66
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(names)]
    ids = {c["name"]: c["id"] for c in categories}
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 5, "width": 5} for i in range(4)]
    annotations = [
        {"id": 1, "image_id": 0, "category_id": ids["person"]},
        {"id": 2, "image_id": 0, "category_id": ids["dog"]},
        {"id": 3, "image_id": 1, "category_id": ids["dog"]},
        {"id": 4, "image_id": 2, "category_id": ids["stop sign"]},
    ]
    source = tmp_path / "c.json"
    source.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    assert coco_zero_shot.write_split(source, tmp_path / "seen.json", coco_zero_shot.SEEN) == (1, 1)
    everything = (*coco_zero_shot.SEEN, *coco_zero_shot.UNSEEN)
    assert coco_zero_shot.write_split(source, tmp_path / "all.json", everything) == (2, 3)
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["categories"] == categories
    assert content["images"] == images[:2]
    with pytest.raises(DataError, match="no category 'zebra crossing'"):
        coco_zero_shot.write_split(source, tmp_path / "x.json", ["zebra crossing"])


@pytest.mark.parametrize("name", ["lvis", "coco", "coco_zero_shot", "objects365", "openimages"])
def test_every_description_can_be_read(tmp_path: Path, name: str) -> None:
    text = description_text(name, image_labels=True, novel=coco_zero_shot.UNSEEN)
    path = tmp_path / "d.toml"
    assert write_description(path, text) == "made"
    assert DatasetDescription.from_toml(path).name.replace("-", "_") == name


@pytest.mark.parametrize(
    "category",
    [
        b"3",
        b'{"name": "a", "frequency": "r"}',
        b'{"id": [1], "name": "a", "frequency": "r"}',
        b'{"id": "1", "name": "a", "frequency": "r"}',
        b'{"id": 1, "name": "\xff", "frequency": "r"}',
        b'{"id": 1, "name": "a", "frequency": "r"}, {"id": 1, "name": "b", "frequency": "f"}',
    ],
)
def test_categories_that_mean_nothing_are_refused(tmp_path: Path, category: bytes) -> None:
    source, out = tmp_path / "s.json", tmp_path / "out.json"
    source.write_bytes(b'{"images": [], "annotations": [], "categories": [' + category + b"]}")
    fixes = write_fixes(tmp_path / "f.csv", [["1", "a", "a"]])
    for attempt in (
        lambda: lvis.write_category_info(source, out),
        lambda: lvis.write_without_frequencies(source, out),
        lambda: objects365.write_with_fixed_names(source, fixes, out),
        lambda: coco_zero_shot.write_split(source, out, ["zebra"]),
    ):
        with pytest.raises(DataError) as caught:
            attempt()
        assert caught.value.hint
    assert not out.exists()


@pytest.mark.parametrize(
    "text", [b'{"LabelName": "\xff"}', b'{"LabelName": "a", "Subcategory": [' * 5000], ids=["utf", "deep"]
)  # fmt: skip
def test_hierarchies_that_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "h.json").write_bytes(text)
    for path in (tmp_path / "h.json", tmp_path):
        with pytest.raises(DataError, match="not a class hierarchy"):
            openimages.Hierarchy.read(path)


def test_a_later_change_of_any_source_counts(tmp_path: Path) -> None:
    work = steps._Work(root=tmp_path, force=False, cache=None, progress=SILENT)
    for number, name in enumerate(("old", "target", "new")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(number * 10**9, number * 10**9))
    for sources in (["old"], ["old", "new"]):
        work.file("step", "target", sources, lambda _: "")
    assert [step.action for step in work.steps] == ["up to date", "made"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EIO, EnvironmentProblem)]
)
def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, code, kind) -> None:
    def write() -> None:
        with replacing(tmp_path / "f") as file:
            file.write(b"half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(kind):
        write()
    assert list(tmp_path.iterdir()) == []
