"""Which file each entry of an annotation file gets, the same for check, training, evaluation and image labels."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.data.check import CheckReport, check_path
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.loader import TrainingLoader, TrainingSources
from proxydet.errors import DataError
from proxydet.evaluation.split import DescribedSplit
from proxydet.recipes import resolve_config
from proxydet.training_run import scheduled_evaluation

Rename = Callable[[list[dict[str, Any]]], None]


def edit_images(annotations: Path, change: Rename) -> None:
    content = json.loads(annotations.read_text())
    change(content["images"])
    annotations.write_text(json.dumps(content))


def names(*file_names: str) -> Rename:
    def change(images: list[dict[str, Any]]) -> None:
        for image, name in zip(images, file_names, strict=False):
            image["file_name"] = name

    return change


def errors(report: CheckReport) -> dict[str, str]:
    found: dict[str, str] = {}
    for f in report.findings:
        if f.level == "error":
            found[f.part] = f"{found.get(f.part, '')} {f.text} {f.advice}"
    return found


def train_batches(path: Path, **config: Any) -> list[Any]:
    boxes = SourceConfig(batch_size=6, size=48, scale=(1.0, 1.0), ratio=1.0)
    settings = DataConfig(workers=0, boxes=boxes, image_labels=None, **config)
    description = DatasetConfig.from_toml(path)
    sources = TrainingSources(settings, Dataset(config=description, cache=settings.cache))
    loader = TrainingLoader(sources, rank=0, world_size=1, seed=0)
    return list(itertools.islice(loader, 4))


# The images 101 and 102 of "val"; every file but that of the last case is there.
ONE_FILE = [
    ("101.png", "101.png"),
    ("101.png", "./101.png"),
    ("cam1/101.png", "cam2/101.png"),
    ("101.png", "C:\\photos\\101.png"),
    ("../a/101.png", "/data/b/101.png"),
    ("cam1/9.png", "cam1\\9.png"),
]


@pytest.mark.parametrize("entries", ONE_FILE)
@pytest.mark.parametrize("split", ["train", "val"])
def test_two_entries_of_one_file_are_refused_everywhere(small_set, entries, split):
    text = small_set.read_text()
    small_set.write_text(text.replace('"train.json"', '"val.json"').replace('"train"', '"val"'))
    edit_images(small_set.parent / "val.json", names(*entries))
    description = DatasetConfig.from_toml(small_set)
    found = errors(check_path(small_set)[0])[split]
    config = resolve_config("tiny", overrides=[f"data.description={small_set}"])
    for refuse in (
        lambda: train_batches(small_set),
        lambda: DescribedSplit.open(description, split).roots,
        lambda: scheduled_evaluation(config),
    ):
        with pytest.raises(DataError) as caught:
            refuse()
        for message in (found, caught.value.message):
            assert "101 (" in message
            assert "102 (" in message
            assert all(repr(entry) in message for entry in entries)


def test_equal_last_parts_are_fine_where_each_has_a_file(small_set):
    val = small_set.parent / "val"
    for number, folder in ((101, "cam1"), (102, "cam2")):
        (val / folder).mkdir()
        (val / f"{number}.png").rename(val / folder / "1.png")
    edit_images(small_set.parent / "val.json", names("cam1/1.png", "cam2\\1.png"))
    description = DatasetConfig.from_toml(small_set)
    assert check_path(small_set, decode=True)[0].sound
    images = DescribedSplit.open(description)
    assert images.read_id(101).shape == (60, 40, 3)
    assert images.read_id(102).shape == (40, 60, 3)


def test_image_labels_of_one_file_are_refused(small_set):
    labels = [
        {"id": n, "file_name": f"{n}/1.png", "height": 60, "width": 40, "pos_category_ids": [n]}
        for n in (3, 7)
    ]
    categories = json.loads((small_set.parent / "train.json").read_text())["categories"]
    content = {"images": labels, "categories": categories}
    (small_set.parent / "labels.json").write_text(json.dumps(content))
    table = '\n[image_labels]\nannotations = "labels.json"\nimages = "train"\n'
    small_set.write_text(small_set.read_text() + table)
    description = DatasetConfig.from_toml(small_set)
    assert "'3/1.png'" in errors(check_path(small_set)[0])["image_labels"]
    with pytest.raises(DataError, match=r"3/1\.png.*7/1\.png"):
        TrainingSources(DataConfig(), Dataset(config=description))


@pytest.fixture
def turned_set(small_set) -> Path:
    """`small_set` with photographs whose EXIF orientation is a quarter turn, annotated as if there were none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in small_set.parent.glob("*/*.png"):
        with Image.open(path) as image:
            image.load()
        image.save(path, exif=exif)
    return small_set


def test_exif_is_named_where_it_explains_the_size(turned_set):
    found = errors(check_path(turned_set, decode=True)[0])
    # Evaluation takes the orientation that fits the annotations, so only training is in the way.
    assert found.keys() == {"train"}
    with pytest.raises(DataError, match="EXIF") as caught:
        train_batches(turned_set)
    assert "data.exif_orientation=false" in str(caught.value.hint)
    assert "EXIF" in found["train"]
    assert str(caught.value.hint) in found["train"]
    assert len(train_batches(turned_set, exif_orientation=False)) == 4
    images = DescribedSplit.open(DatasetConfig.from_toml(turned_set))
    with Image.open(turned_set.parent / "val/101.png") as image:
        np.testing.assert_array_equal(images.read_id(101), np.asarray(image))


def test_sizes_that_are_swapped_without_exif_are_said_to_be_swapped(small_set):
    def swap(images: list[dict[str, Any]]) -> None:
        for image in images:
            image["width"], image["height"] = image["height"], image["width"]

    edit_images(small_set.parent / "train.json", swap)
    with pytest.raises(DataError, match="swapped") as caught:
        train_batches(small_set)
    assert "exif" not in str(caught.value.hint)
    found = errors(check_path(small_set, decode=True)[0])
    assert str(caught.value.hint) in found["train"]


def test_the_evaluation_of_a_run_is_checked_before_it_and_keeps_stores_where_the_run_does(
    small_set, tmp_path, monkeypatch
):
    """An evaluation that would be refused must not be found out after hours of training."""
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "of the user"))
    stores = tmp_path / "of the run"
    overrides = [f"data.description={small_set}", f"data.cache={stores}"]
    assert scheduled_evaluation(resolve_config("tiny", overrides=overrides)) is not None
    assert list(stores.glob("*.columns"))
    assert not (tmp_path / "of the user").exists()

    def almost_federated(images: list[dict[str, Any]]) -> None:
        images[0].pop("neg_category_ids", None)
        images[1]["neg_category_ids"] = []

    edit_images(small_set.parent / "val.json", almost_federated)
    with pytest.raises(DataError, match="neg_category_ids"):
        scheduled_evaluation(resolve_config("tiny", overrides=overrides))
    chosen = resolve_config("tiny", overrides=[*overrides, "evaluation.protocol=coco"])
    assert scheduled_evaluation(chosen) is not None
