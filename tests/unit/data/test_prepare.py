import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.prepare import SEEN, UNSEEN, PrepareReport, prepare
from proxydet.errors import DataError, DiskFullError

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
def root(tmp_path) -> Path:
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


def details(report: PrepareReport) -> dict[str, str]:
    return {step.path.name: step.detail for step in report.steps}


def test_rare_annotations_are_left_out_and_the_rest_is_untouched(root):
    report = prepare("lvis", root)
    assert details(report)["lvis_v1_train_norare.json"].startswith("2 annotations")
    content = json.loads((root / "lvis/lvis_v1_train_norare.json").read_text())
    assert content["images"] == lvis_content()["images"]
    assert content["categories"] == CATEGORIES
    assert content["annotations"] == [
        a for a in lvis_content()["annotations"] if a["category_id"] != 2
    ]
    assert {path.name for path in (root / "lvis").iterdir()} == {
        "lvis_v1_train.json",
        "lvis_v1_val.json",
        "lvis_v1_train_norare.json",
        "lvis_v1_train_cat_info.json",
        "lvis_v1_train_norare_cat_info.json",
    }


@pytest.mark.parametrize("with_rare", [True, False])
def test_category_info_counts_images_and_instances(root, with_rare):
    prepare("lvis", root)
    name = "lvis_v1_train_cat_info.json" if with_rare else "lvis_v1_train_norare_cat_info.json"
    rows = json.loads((root / "lvis" / name).read_text())
    assert [row["def"] for row in rows] == ["a pet", "spray", "a nut"]
    assert [row["image_count"] for row in rows] == [2, 2 if with_rare else 0, 2]
    assert [row["instance_count"] for row in rows] == [3, 2 if with_rare else 0, 2]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"categories": [{"id": 1, "name": "a"}]}, "frequency"),
        ({"annotations": [{"id": 1}]}, "annotation 0"),
        ({"categories": [3]}, r"lvis_v1_train\.json"),
        ({"categories": [{"name": "a", "frequency": "r"}]}, r"lvis_v1_train\.json"),
        ({"categories": [{"id": [1], "name": "a", "frequency": "r"}]}, r"lvis_v1_train\.json"),
        ({"categories": [{"id": "1", "name": "a", "frequency": "r"}]}, r"lvis_v1_train\.json"),
        ({"categories": [*CATEGORIES, CATEGORIES[1]]}, r"lvis_v1_train\.json"),
    ],
)
def test_files_that_are_not_lvis_are_refused(root, change, why):
    source = root / "lvis/lvis_v1_train.json"
    source.write_text(json.dumps(lvis_content() | change))
    with pytest.raises(DataError, match=why) as caught:
        prepare("lvis", root)
    assert caught.value.hint
    assert caught.value.path == source
    assert {path.name for path in source.parent.iterdir()} == {
        "lvis_v1_train.json",
        "lvis_v1_val.json",
    }


def test_lvis_is_prepared_once_and_described(root):
    first = prepare("lvis", root)
    assert [step.action for step in first.steps] == ["made"] * 6 or first.steps[
        1
    ].action == "up to date"
    assert first.problems == ()
    again = prepare("lvis", root)
    assert {step.action for step in again.steps if step.name != "dataset config"} == {"up to date"}
    forced = prepare("lvis", root, force=True)
    assert [s.action for s in forced.steps if s.name == "class counts"] == ["made", "made"]
    description = DatasetConfig.from_toml(root / "lvis.toml")
    assert Dataset(config=description).vocabulary.base.tolist() == [True, False, True]
    assert description.image_labels is None
    assert description.split("val").roots == (root / "coco",)


def test_a_file_older_than_its_source_is_made_again(root):
    prepare("lvis", root)
    source = root / "lvis/lvis_v1_train.json"
    content = lvis_content()
    content["annotations"].pop()
    source.write_text(json.dumps(content))
    later = (root / "lvis/lvis_v1_train_norare.json").stat().st_mtime_ns + 10**9
    os.utime(source, ns=(later, later))
    steps = {step.path.name: step.action for step in prepare("lvis", root).steps}
    assert steps["lvis_v1_train_norare.json"] == "made"


def test_absent_sources_are_named(tmp_path):
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


def test_imagenet_lvis_is_indexed_with_its_problems(root, make_tar, jpeg):
    tars = root / "imagenet" / "ImageNet-21K"
    tars.mkdir(parents=True)
    # n02682922 is aerosol.n.02; those of cat.n.01 and almond.n.02 are missing; n00000001 is no class of LVIS.
    make_tar(tars / "n02682922.tar", {"a.JPEG": jpeg(4, 6), "b.txt": b"no image"})
    make_tar(tars / "n00000001.tar", {"a.JPEG": jpeg(4, 6)})
    report = prepare("imagenet-lvis", root)
    assert report.steps[-1].detail == "1 image in 1 tar, 0 gzip-compressed"
    text = "\n".join(report.problems)
    assert "n02682922.tar/b.txt" in text
    assert "2 tars are missing: n02121620, n07750586" in text
    assert "1 tar belongs to no class" in text
    description = DatasetConfig.from_toml(root / "lvis.toml")
    assert description.image_labels is not None
    assert prepare("lvis", root).steps[-1].action == "up to date"
    assert DatasetConfig.from_toml(root / "lvis.toml") == description


def test_what_preparing_reports_is_not_logged_as_well(root, make_tar, jpeg, caplog):
    content = lvis_content()
    content["annotations"][0]["category_id"] = 99
    (root / "lvis/lvis_v1_train.json").write_text(json.dumps(content))
    assert "category_id" in "\n".join(prepare("lvis", root).problems)
    (root / "imagenet/ImageNet-21K").mkdir(parents=True)
    make_tar(root / "imagenet/ImageNet-21K/n02682922.tar", {"a.JPEG": jpeg(4, 6), "b.txt": b"-"})
    assert "1 unreadable member: " in "\n".join(prepare("imagenet-lvis", root).problems)
    assert not caplog.records


def test_a_file_without_images_is_named(root):
    content = lvis_content() | {"images": [], "annotations": []}
    (root / "lvis/lvis_v1_val.json").write_text(json.dumps(content))
    assert "lvis_v1_val.json has no image that can be used" in prepare("lvis", root).problems


@pytest.mark.parametrize("dataset", ["lvis", "imagenet-lvis", "openimages"])
def test_the_folder_around_the_data_root_is_recognised(root, dataset):
    with pytest.raises(DataError) as caught:
        prepare(dataset, root.parent)
    assert caught.value.hint == f"the data root is the folder inside it: name {root}"


def test_descriptions_changed_by_hand_are_kept(root):
    path = root / "lvis.toml"
    assert prepare("lvis", root).steps[-1].action == "made"
    assert prepare("lvis", root).steps[-1].action == "up to date"
    mine = path.read_text().replace(path.read_text().splitlines()[0], "# mine")
    path.write_text(mine)
    (root / "imagenet/ImageNet-21K").mkdir(parents=True)
    assert prepare("lvis", root).steps[-1].action == "kept"
    assert path.read_text() == mine


@pytest.fixture
def objects365(tmp_path) -> Path:
    """A data root whose first class is misspelt."""
    root = tmp_path / "o"
    (root / "objects365/annotations").mkdir(parents=True)
    (root / "metadata").mkdir()
    categories = [{"id": 1, "name": "Bakset", "x": 1}, {"id": 2, "name": "Hat, big"}]
    annotations = [a | {"category_id": 1 + a["id"] % 2} for a in lvis_content()["annotations"]]
    content = lvis_content() | {"categories": categories, "annotations": annotations}
    (root / "objects365/annotations/zhiyuan_objv2_val.json").write_text(json.dumps(content))
    write_fixes(root, [["1", "Bakset", "Basket"], ["2", "Hat, big", "Hat, big"]])
    return root


def write_fixes(root: Path, rows: list[list[str]]) -> None:
    with (root / "metadata/Objects365_names_fix.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_objects365_names_are_corrected(objects365):
    folder = objects365 / "objects365/annotations"
    fixed = folder / "zhiyuan_objv2_val_fixname.json"
    assert details(prepare("objects365", objects365))[fixed.name] == "1 name changed"
    before = json.loads((folder / "zhiyuan_objv2_val.json").read_text())
    after = json.loads(fixed.read_text())
    assert after["categories"] == [
        {"id": 1, "name": "Basket", "x": 1},
        {"id": 2, "name": "Hat, big"},
    ]
    assert after["annotations"] == before["annotations"]
    # What is right already stays right.
    fixed.replace(folder / "zhiyuan_objv2_val.json")
    assert details(prepare("objects365", objects365))[fixed.name] == "0 names changed"


def test_a_relative_root_is_the_same(objects365, monkeypatch):
    monkeypatch.chdir(objects365.parent)
    steps = prepare("objects365", Path(objects365.name)).steps
    assert steps[0].action == "made"
    assert steps[0].path.resolve().is_relative_to(objects365)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([["1", "Other", "Basket"], ["2", "Hat, big", "Hat"]], "'Bakset'"),
        ([["1", "Basket", "Basket"]], "category 1"),
        ([["2", "Hat, big", "Hat"]], "category 1"),
        ([["1", "Bakset"]], r"names_fix\.csv"),
        ([["one", "Bakset", "Basket"]], r"names_fix\.csv"),
    ],
)
def test_corrections_of_another_release_are_refused(objects365, rows, why):
    write_fixes(objects365, rows)
    with pytest.raises(DataError, match=why) as caught:
        prepare("objects365", objects365)
    assert caught.value.hint
    assert not list(objects365.glob("**/*fixname*"))


TABLES = {
    "hierarchy": "challenge-2019-label500-hierarchy.json",
    "classes": "challenge-2019-classes-description-500.csv",
    "boxes": "challenge-2019-validation-detection-bbox.csv",
    "labels": "challenge-2019-validation-detection-human-imagelabels.csv",
}


@pytest.fixture
def challenge(tmp_path) -> Path:
    """Entity > (Animal > (Cat, Dog), Toy > Dog); Entity is no class of the challenge."""
    folder, images = tmp_path / "oid/annotations", tmp_path / "oid/images/validation"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    leaf = [{"LabelName": "/cat"}, {"LabelName": "/dog"}]
    animal = {"LabelName": "/animal", "Subcategory": leaf, "Part": [{"LabelName": "/ear"}]}
    toy = {"LabelName": "/toy", "Subcategory": [{"LabelName": "/dog"}]}
    tree = {"LabelName": "/entity", "Subcategory": [animal, toy]}
    (folder / TABLES["hierarchy"]).write_text(json.dumps(tree))
    (folder / TABLES["classes"]).write_text(
        '/animal,Animal\n/cat,"Cat, small"\n/dog,Dog\n/toy,Toy\n/ear,Ear\n'
    )
    (folder / TABLES["boxes"]).write_text(
        "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\nb,/dog,0.5,1,0,0.5,0\nb,/animal,0,1,0.5,1,1\n"
    )
    (folder / TABLES["labels"]).write_text(
        "ImageID,Source,LabelName,Confidence\na,verification,/cat,1\na,verification,/toy,0\nb,v,/animal,0\n"
    )
    for name, size in (("a", (40, 20)), ("b", (10, 30))):
        Image.new("RGB", size).save(images / f"{name}.jpg")
    return tmp_path


EXPANDED = "oid/annotations/oid_challenge_2019_val_expanded.json"


def test_openimages_is_expanded_along_the_hierarchy(challenge):
    report = prepare("openimages", challenge)
    content = json.loads((challenge / EXPANDED).read_text())
    assert report.steps[0].detail == "2 images, 4 boxes after expansion"
    (problem,) = report.problems
    assert "iscrowd" in problem
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
        ("boxes", "b,/dog", "b,/cow", r"row 2: .*'/cow'"),
        ("boxes", "0.5,1,", "x,1,", "row 2: "),
        ("boxes", "0.5,1,", "nan,1,", "row 2: "),
        ("boxes", "0.5,1,", "-inf,1,", "row 2: "),
        ("boxes", ",IsGroupOf", ",Group", "'IsGroupOf'"),
        ("boxes", "0.5,1,0", "0.5,1", "row 2: 6 values, not 7"),
        ("labels", "/toy", "/cow", r"row 3: .*'/cow'"),
        ("hierarchy", '"LabelName": "/toy"', '"Label": "/toy"', "hierarchy"),
        ("hierarchy", "{", "", "hierarchy"),
        ("hierarchy", "/entity", "\udcff", "hierarchy"),
        ("hierarchy", "{", '{"LabelName": "a", "Subcategory": [' * 5000, "hierarchy"),
        ("classes", "/dog,Dog", "/dog,Dog,x", "row 3"),
        ("classes", "/toy,Toy", "/dog,Toy", "row 4"),
    ],
)  # fmt: skip
def test_bad_tables_name_file_and_row(challenge, table, old, new, message):
    path = challenge / "oid/annotations" / TABLES[table]
    assert old in path.read_text()
    text = path.read_text().replace(old, new, 1)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        prepare("openimages", challenge)
    assert path.name in caught.value.message
    assert not (challenge / EXPANDED).exists()


def test_openimages_needs_its_images(challenge):
    (challenge / "oid/images/validation/a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg"):
        prepare("openimages", challenge)


@pytest.fixture
def coco(tmp_path) -> Path:
    """A data root with COCO's classes of both splits and one more."""
    names = [*SEEN, *UNSEEN, "stop sign"]
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(names)]
    ids = {c["name"]: c["id"] for c in categories}
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 5, "width": 5} for i in range(4)]
    annotations = [
        {"id": n, "image_id": image, "category_id": ids[name], "bbox": [0, 0, 4, 4], "area": 16}
        for n, (image, name) in enumerate(
            [(0, "person"), (0, "dog"), (1, "dog"), (2, "stop sign")], 1
        )
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        path = tmp_path / f"coco/annotations/instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return tmp_path


def test_the_zero_shot_split_keeps_categories_and_drops_empty_images(coco):
    assert (len(set(SEEN)), len(set(UNSEEN)), len({*SEEN, *UNSEEN})) == (48, 17, 65)
    found = details(prepare("coco", coco))
    train, val = (
        coco / "coco/zero-shot" / f"instances_{name}_2_oriorder.json"
        for name in ("train2017_seen", "val2017_all")
    )
    assert found[train.name] == "1 image, 1 annotation of 48 classes"
    assert found[val.name] == "2 images, 3 annotations of 65 classes"
    source = json.loads((coco / "coco/annotations/instances_val2017.json").read_text())
    content = json.loads(val.read_text())
    assert content["categories"] == source["categories"]
    assert content["images"] == source["images"][:2]
    assert content["annotations"] == source["annotations"][:3]
    novel = DatasetConfig.from_toml(coco / "coco_zero_shot.toml").vocabulary.novel
    assert novel == UNSEEN


def test_a_file_that_is_not_coco_is_refused(coco):
    path = coco / "coco/annotations/instances_train2017.json"
    path.write_text(path.read_text().replace('"zebra"', '"zebra crossing"'))
    with pytest.raises(DataError, match="'zebra'"):
        prepare("coco", coco)


def test_every_description_can_be_read(root, objects365, challenge, coco):
    prepare("lvis", root)
    prepare("objects365", objects365)
    prepare("openimages", challenge)
    prepare("coco", coco)
    names = [DatasetConfig.from_toml(path).name for path in root.parent.glob("**/*.toml")]
    assert sorted(names) == ["coco", "coco-zero-shot", "lvis", "objects365", "openimages"]


def test_a_later_change_of_any_source_counts(objects365):
    def actions() -> list[str]:
        return [step.action for step in prepare("objects365", objects365).steps[:1]]

    fixes = objects365 / "metadata/Objects365_names_fix.csv"
    fixed = objects365 / "objects365/annotations/zhiyuan_objv2_val_fixname.json"
    assert actions() == ["made"]
    assert actions() == ["up to date"]
    later = fixed.stat().st_mtime_ns + 10**9
    os.utime(fixes, ns=(later, later))
    assert actions() == ["made"]


def test_a_file_that_cannot_be_written_leaves_nothing(root, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(root.rglob("*"))
    cache = root.parent / "cache"
    prepare("lvis", root, cache=cache)
    for path in set(root.rglob("*")) - before:
        path.unlink()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskFullError, match=r"lvis_v1_train_norare\.json"):
        prepare("lvis", root, cache=cache)
    assert set(root.rglob("*")) == before
