"""The prepared data sets by their names: annotations, published embeddings and base classes, on a root as users have it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from proxydet.data.prepare import DatasetName, prepare
from proxydet.evaluation.detector_evaluation import fusion_vocabulary
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.split import DescribedSplit, imagenet_groups
from proxydet_cli.app import run

pytestmark = [pytest.mark.shared, pytest.mark.usefixtures("unplotted")]

NAMES = ("lvis", "coco", "objects365", "openimages")
EMBEDDINGS = {
    "lvis": "lvis_v1_clip_a+cname.npy",
    "coco": "coco_clip_a+cname.npy",
    "coco_zero_shot": "coco_clip_a+cname.npy",
    "objects365": "o365_clip_a+cnamefix.npy",
    "openimages": "oid_clip_a+cname.npy",
}
SIZE = {"height": 40, "width": 60}


def annotations(categories: list[dict[str, Any]], **image: Any) -> dict[str, Any]:
    """One image with a box of each of the first 30 categories."""
    rows = [
        {
            "id": index + 1,
            "image_id": 7,
            "category_id": row["id"],
            "bbox": [index, index, 10, 10],
            "area": 100,
            "iscrowd": 0,
        }
        for index, row in enumerate(categories[:30])
    ]
    picture = {"id": 7, "file_name": "7.jpg", **SIZE, **image}
    return {"images": [picture], "annotations": rows, "categories": categories}


@pytest.fixture(scope="module")
def root(repository, tmp_path_factory, cache) -> Path:
    """All data sets, prepared: published metadata and classes, and one image each (of COCO, tinycoco's)."""
    root = tmp_path_factory.mktemp("datasets")
    real = repository.parent / "shared" / "real_data"
    (root / "metadata").symlink_to(real / "clip_text_embeddings")
    for folder in ("lvis", "coco", "objects365/annotations", "objects365/val", "oid/annotations"):
        (root / folder).mkdir(parents=True)
    for folder in ("coco", "objects365/val"):
        Image.new("RGB", (60, 40)).save(root / folder / "7.jpg")
    shutil.copytree(real / "tinycoco" / "annotations", root / "coco" / "annotations")
    for split in ("train2017", "val2017"):
        (root / "coco" / split).symlink_to(real / "tinycoco" / "images" / split)
    info = json.loads((root / "metadata" / "lvis_v1_train_cat_info.json").read_text())
    content = annotations(
        info,
        coco_url="http://images.cocodataset.org/train2017/7.jpg",
        neg_category_ids=[],
        not_exhaustive_category_ids=[],
    )
    for split in ("train", "val"):
        (root / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    with (root / "metadata" / "Objects365_names_fix.csv").open(newline="") as file:
        named = [{"id": int(row[0]), "name": row[1]} for row in csv.reader(file)]
    source = root / "objects365" / "annotations" / "zhiyuan_objv2_val.json"
    source.write_text(json.dumps(annotations(named)))
    openimages_tables(root / "oid")
    for name in get_args(DatasetName):
        if name != "imagenet-lvis":
            prepare(name, root)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROXYDET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


def openimages_tables(folder: Path) -> None:
    """500 classes, some with published spellings; one image with a dog, which the hierarchy makes an animal too."""
    names = ["Animal", "Dog", "Bat (Animal)", "Kitchen & dining room table", "Jacuzzi", "Cat"]
    names += [f"Class {index}" for index in range(len(names), 500)]
    labels = [f"/m/{index}" for index in range(500)]
    start = str(folder / "annotations" / "challenge-2019-")
    tables = {
        "classes-description-500.csv": list(zip(labels, names, strict=True)),
        "validation-detection-bbox.csv": [
            ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"],
            ["7", "/m/1", "0.1", "0.5", "0.2", "0.6", "0"],
        ],
        "validation-detection-human-imagelabels.csv": [
            ["ImageID", "LabelName", "Confidence"],
            ["7", "/m/1", "1"],
            ["7", "/m/2", "0"],
        ],
    }
    for name, rows in tables.items():
        with Path(start + name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    animals = {"LabelName": "/m/0", "Subcategory": [{"LabelName": label} for label in labels[1:3]]}
    others = [{"LabelName": label} for label in labels[3:]]
    tree = {"LabelName": "/m/root", "Subcategory": [animals, *others]}
    Path(start + "label500-hierarchy.json").write_text(json.dumps(tree))
    (folder / "images" / "validation").mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(folder / "images" / "validation" / "7.jpg")


@pytest.fixture
def here(root, monkeypatch, tmp_path) -> Path:
    """Work in a folder of one's own, with the data sets where the environment says."""
    monkeypatch.setenv("PROXYDET_DATASETS", str(root))
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return root


def perfect(truth: GroundTruth) -> list[dict[str, Any]]:
    return [
        {
            "image_id": truth.image_ids[image],
            "category_id": truth.category_ids[category],
            "bbox": box.tolist(),
            "score": 0.5,
        }
        for image, category, box in zip(
            truth.ann_image_A, truth.ann_category_A, truth.ann_box_A4, strict=True
        )
    ]


@pytest.mark.parametrize("name", [*NAMES, "coco_zero_shot"])
def test_a_name_is_enough(here, name, capsys):
    truth = DescribedSplit.open(here / f"{name}.toml").truth
    kept = np.flatnonzero(~truth.ann_crowd_A)
    Path("r.json").write_text(json.dumps([perfect(truth)[index] for index in kept]))
    words = ["--results", "r.json", "--data", name, "--bootstrap", "0", "--json"]
    with pytest.raises(SystemExit) as done:
        run(["eval", *words])
    assert done.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    protocol = name if name in ("lvis", "openimages") else "coco"
    assert shown["protocol"] == protocol
    assert shown["counts"]["annotations"] == len(truth.ann_image_A)
    assert shown["results"]["bbox"]["metrics"]["AP50"] == pytest.approx(1)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_classes_have_their_own_published_embeddings(here, name):
    split = DescribedSplit.open(here / f"{name}.toml")
    table = np.load(here / "metadata" / EMBEDDINGS[name])
    assert split.data.vocabulary.names == tuple(
        entry.strip() for entry in split.truth.category_names
    )
    np.testing.assert_array_equal(split.data.vocabulary.embeddings, table.astype(np.float32))


def test_names_are_spelt_as_published(here):
    def names(name: str) -> tuple[str, ...]:
        return DescribedSplit.open(here / f"{name}.toml").data.vocabulary.names

    assert {"bow_(decorative_ribbons)", "aerosol_can", "stop_sign"} <= set(names("lvis"))
    assert {"stop sign", "hair drier"} <= set(names("coco"))
    assert {"Bat (Animal)", "Kitchen & dining room table"} <= set(names("openimages"))
    with (here / "metadata" / "Objects365_names_fix.csv").open(newline="") as file:
        corrected = [(row[1], row[2].strip()) for row in csv.reader(file)]
    assert names("objects365") == tuple(new for _, new in corrected)
    assert sum(old != new for old, new in corrected) > 10


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_base_classes_for_the_fusion_are_those_near_a_base_class_of_lvis(here, name):
    """Counted here from the tables alone: largest cosine above 0.9 with a class of LVIS that is not rare."""
    trained = DescribedSplit.open(here / "lvis.toml").data.vocabulary
    info = json.loads((here / "metadata" / "lvis_v1_train_cat_info.json").read_text())
    base = np.array([row["frequency"] != "r" for row in sorted(info, key=lambda row: row["id"])])
    np.testing.assert_array_equal(trained.base, base)
    found = fusion_vocabulary(
        DescribedSplit.open(here / f"{name}.toml").data.vocabulary, trained
    ).base
    # The classes of training keep their marks, however near a rare class is to a base class.
    if name == "lvis":
        np.testing.assert_array_equal(found, base)
        return
    tables = [np.load(here / "metadata" / EMBEDDINGS[key]).astype(float) for key in (name, "lvis")]
    own, theirs = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in tables)
    expected = (own @ theirs[base].T).max(axis=1) > 0.9
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < len(expected)


def test_zero_shot_classes_are_48_seen_and_17_unseen(here):
    split = DescribedSplit.open(here / "coco_zero_shot.toml")
    novel = split.groups["novel"]
    assert novel.sum() == 17
    assert (split.groups["base"] == ~novel).all()
    annotated = np.zeros(80, dtype=bool)
    annotated[split.truth.ann_category_A] = True
    assert annotated.sum() <= 65
    names = np.array(split.truth.category_names)
    assert set(names[novel]) >= {"airplane", "cat", "scissors"}


def test_rare_classes_that_imagenet_has_are_277_of_337(here):
    groups = imagenet_groups(DescribedSplit.open(here / "lvis.toml").truth)
    counts = {name: int(mask.sum()) for name, mask in groups.items()}
    assert counts == {"rare, in ImageNet-LVIS": 277, "rare, not in ImageNet-LVIS": 60}


def test_openimages_expands_by_the_hierarchy(here, capsys):
    box = [6.0, 8.0, 24.0, 16.0]
    rows = [{"image_id": 1, "category_id": 2, "bbox": box, "score": 0.5}]
    Path("r.json").write_text(json.dumps(rows))
    tree = here / "oid" / "annotations" / "challenge-2019-label500-hierarchy.json"
    words = ["--results", "r.json", "--data", "openimages", "--hierarchy", str(tree), "--json"]
    with pytest.raises(SystemExit):
        run(["eval", *words])
    metrics = json.loads(capsys.readouterr().out)["results"]["bbox"]["metrics"]
    # The dog is found; the animal that it is too only where the detection is expanded.
    assert metrics == {"AP50": 0.5, "AP50 expanded": 1.0}
