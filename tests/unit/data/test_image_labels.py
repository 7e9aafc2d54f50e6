import json
import logging

import numpy as np
import pytest

from proxydet.data.dataset import Dataset, DatasetConfig, ImageLabelSpec
from proxydet.data.image_labels import TarClasses, match_tars, open_label_images, synset_of_wnid
from proxydet.errors import DataError


def match(description: DatasetConfig) -> TarClasses:
    assert description.image_labels is not None
    categories = Dataset(config=description).store("train").categories
    return match_tars(description.image_labels, Dataset(config=description).vocabulary, categories)


def test_the_table_of_imagenet_lvis_is_whole():
    table = synset_of_wnid()
    assert len(table) == 997
    assert len(set(table.values())) == 997
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in table)
    assert table["n02691156"] == "airplane.n.01"
    assert table["n02773838"] == "bag.n.06"


def test_tars_are_matched_by_synset_name_wnid_and_map(small_set_with_labels, make_tar):
    folder = small_set_with_labels.parent / "tars"
    make_tar(folder / "n02691156.tar", {})
    make_tar(folder / "felines.tar", {})
    make_tar(folder / "other.tar", {})
    text = small_set_with_labels.read_text()
    small_set_with_labels.write_text(text + 'map = { felines = "cat", absent = "dog" }\n')
    annotations = small_set_with_labels.parent / "train.json"
    annotations.write_text(annotations.read_text().replace("cat.n.01", "airplane.n.01"))
    found = match(DatasetConfig.from_toml(small_set_with_labels))
    assert found.class_of_tar == {
        "dog.n.01.tar": 1,
        "bird.tar": 2,
        "n02691156.tar": 0,
        "felines.tar": 0,
    }
    assert found.without_class == ("other.tar",)
    assert found.missing == ("absent",)


def test_missing_wordnet_ids_are_reported(small_set_with_labels, make_tar, caplog):
    folder = small_set_with_labels.parent / "tars"
    make_tar(folder / "n02691156.tar", {})
    (folder / "bird.tar").unlink()
    annotations = small_set_with_labels.parent / "train.json"
    annotations.write_text(
        annotations.read_text()
        .replace("cat.n.01", "airplane.n.01")
        .replace("bird.n.01", "almond.n.02")
    )
    description = DatasetConfig.from_toml(small_set_with_labels)
    assert match(description).missing == ("n07750586",)
    with caplog.at_level(logging.INFO):
        open_label_images(
            description.image_labels,
            Dataset(config=description).vocabulary,
            Dataset(config=description).store("train").categories,
        )
    assert "1 tar is missing: n07750586" in caplog.text


def test_images_carry_the_class_of_their_tar(small_set_with_labels):
    description = DatasetConfig.from_toml(small_set_with_labels)
    images = open_label_images(
        description.image_labels,
        Dataset(config=description).vocabulary,
        Dataset(config=description).store("train").categories,
    )
    assert len(images) == 7
    assert [images.labels(row).tolist() for row in (0, 2, 3, 6)] == [[2], [2], [1], [1]]
    assert images.shapes_I2[3].tolist() == [20, 30]
    assert images.name(3) == "dog.n.01.tar/0.jpg"
    assert images.image(5, exif_orientation=True).size == (20, 20)


def test_image_labels_from_json(small_set):
    images = [
        {"id": 1, "file_name": "1.png", "height": 60, "width": 40, "pos_category_ids": [9, 3]},
        {"id": 2, "file_name": "2.png", "height": 40, "width": 60, "pos_category_ids": [7]},
    ]
    content = json.loads((small_set.parent / "train.json").read_text())
    content = {"images": images, "categories": content["categories"]}
    (small_set.parent / "labels.json").write_text(json.dumps(content))
    table = '\n[image_labels]\nannotations = "labels.json"\nimages = "train"\n'
    small_set.write_text(small_set.read_text() + table)
    description = DatasetConfig.from_toml(small_set)
    labelled = open_label_images(
        description.image_labels, Dataset(config=description).vocabulary, ()
    )
    assert [labelled.labels(row).tolist() for row in range(2)] == [[2, 0], [1]]
    assert labelled.image(1, exif_orientation=True).size == (60, 40)
    assert labelled.name(1) == "2.png"
    np.testing.assert_array_equal(labelled.shapes_I2, [[60, 40], [40, 60]])


def test_sources_without_any_class_are_an_error(small_set_with_labels, tmp_path):
    description = DatasetConfig.from_toml(small_set_with_labels)
    vocabulary = Dataset(config=description).vocabulary
    categories = Dataset(config=description).store("train").categories
    with pytest.raises(DataError, match="no folder of tars"):
        match_tars(ImageLabelSpec(tars=tmp_path / "absent"), vocabulary, categories)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.tar").touch()
    with pytest.raises(DataError, match="none of the 1 tar in"):
        match_tars(ImageLabelSpec(tars=tmp_path / "others"), vocabulary, categories)
    spec = ImageLabelSpec(tars=tmp_path / "tars", map={"bird": "birb"})
    with pytest.raises(DataError, match=r"'birb'.*Did you mean 'bird'"):
        match_tars(spec, vocabulary, categories)
