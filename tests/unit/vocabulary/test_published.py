"""The published vocabularies, from files like those that are downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from proxydet.errors import VocabularyError
from proxydet.vocabulary.sources import PUBLISHED_VOCABULARIES, published_vocabulary


@pytest.fixture
def datasets(tmp_path) -> Path:
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    categories = [
        {"id": 2, "name": "zebra", "frequency": "r"},
        {"id": 1, "name": "ant", "frequency": "f"},
        {"id": 3, "name": "bee", "frequency": "c"},
    ]
    (metadata / "lvis_v1_train_cat_info.json").write_text(json.dumps(categories))
    rng = np.random.default_rng(0)
    np.save(metadata / "lvis_v1_clip_a+cname.npy", rng.normal(size=(3, 8)).astype(np.float16))
    np.save(metadata / "coco_clip_a+cname.npy", rng.normal(size=(80, 8)).astype(np.float16))
    np.save(metadata / "o365_clip_a+cnamefix.npy", rng.normal(size=(2, 8)).astype(np.float16))
    (metadata / "Objects365_names_fix.csv").write_text("2,Sneaker,Sneakers\n1,Person,Person\n")
    np.save(metadata / "oid_clip_a+cname.npy", rng.normal(size=(2, 8)).astype(np.float16))
    (tmp_path / "oid" / "annotations").mkdir(parents=True)
    (tmp_path / "oid/annotations/challenge-2019-classes-description-500.csv").write_text(
        "/m/061hd_,Infant bed\n/m/06m11,Rose\n"
    )
    np.save(
        metadata / "lvis_gpt3_text-davinci-002_features_author.npy",
        rng.normal(size=(3, 8)).astype(np.float16),
    )
    return tmp_path


def test_lvis_is_in_the_order_of_its_ids_with_rare_classes_novel(datasets):
    vocabulary = published_vocabulary("lvis", datasets=datasets)
    assert vocabulary.names == ("ant", "zebra", "bee")
    assert vocabulary.base.tolist() == [True, False, True]
    stored = np.load(datasets / "metadata" / "lvis_v1_clip_a+cname.npy")
    np.testing.assert_array_equal(vocabulary.embeddings, stored.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("coco", ("person", "bicycle")),
        ("objects365", ("Person", "Sneakers")),
        ("openimages", ("Infant bed", "Rose")),
    ],
)
def test_the_others_have_their_names_in_order(datasets, name, first):
    assert published_vocabulary(name, datasets=datasets).names[:2] == first


def test_a_table_of_others_has_the_classes_of_lvis(datasets):
    described = published_vocabulary("lvis-descriptions", datasets=datasets)
    assert described.names == ("ant", "zebra", "bee")
    assert described.base.tolist() == [True, False, True]
    with pytest.raises(VocabularyError, match="lvis_image_exemplar") as caught:
        published_vocabulary("lvis-exemplars", datasets=datasets)
    assert caught.value.hint == "run: proxydet download lvis-exemplars lvis-category-info"


def test_all_is_every_class_of_the_tables_of_names_once(datasets):
    rng = np.random.default_rng(4)
    coco = rng.normal(size=(80, 8))
    np.save(datasets / "metadata" / "coco_clip_a+cname.npy", coco)
    lvis = np.stack([rng.normal(size=8), coco[22], rng.normal(size=8)])  # zebra is in both
    np.save(datasets / "metadata" / "lvis_v1_clip_a+cname.npy", lvis)
    people = np.stack([coco[0], rng.normal(size=8)])
    np.save(datasets / "metadata" / "o365_clip_a+cnamefix.npy", people)
    everything = published_vocabulary("all", datasets=datasets)
    assert everything.names[:3] == ("ant", "zebra", "bee")
    assert {"person", "Rose", "Sneakers"} <= set(everything.names)
    assert "Person" not in everything.names  # COCO's person
    assert len(everything) == len(set(map(str.lower, everything.names)))


@pytest.mark.parametrize("name", PUBLISHED_VOCABULARIES)
def test_missing_files_name_the_download(tmp_path, name):
    with pytest.raises(VocabularyError) as caught:
        published_vocabulary(name, datasets=tmp_path)
    assert "proxydet download" in str(caught.value.hint)


def test_names_of_downloads_are_in_the_catalogue(tmp_path):
    from proxydet.artifacts.catalogue import Catalogue

    catalogue = Catalogue.load()
    for name in PUBLISHED_VOCABULARIES:
        with pytest.raises(VocabularyError) as caught:
            published_vocabulary(name, datasets=tmp_path)
        command = str(caught.value.hint).removeprefix("run: proxydet download ")
        assert catalogue.resolve(command.split())


def test_damaged_files_are_named(datasets):
    (datasets / "metadata" / "lvis_v1_train_cat_info.json").write_text('[{"id": 1}]')
    with pytest.raises(VocabularyError, match="cat_info"):
        published_vocabulary("lvis", datasets=datasets)
    (datasets / "metadata" / "coco_clip_a+cname.npy").write_bytes(b"no array")
    with pytest.raises(VocabularyError, match="coco_clip"):
        published_vocabulary("coco", datasets=datasets)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(VocabularyError) as caught:
        published_vocabulary("lviss")
    assert "objects365" in str(caught.value.hint)


@pytest.mark.shared
def test_the_real_files_are_read(repository, tmp_path):
    real = repository.parent / "shared" / "real_data" / "clip_text_embeddings"
    (tmp_path / "metadata").symlink_to(real)
    lvis = published_vocabulary("lvis", datasets=tmp_path)
    assert (len(lvis), int(lvis.base.sum())) == (1203, 866)
    coco = published_vocabulary("coco", datasets=tmp_path)
    cosines = coco.normalised() @ lvis.normalised().T
    # Names that both have, spelt alike, were embedded alike: the rows are in the right order.
    shared = [name for name in coco.names if name in lvis.names]
    assert len(shared) > 30
    for name in shared:
        assert cosines[coco.names.index(name), lvis.names.index(name)] > 0.999
    assert len(published_vocabulary("objects365", datasets=tmp_path)) == 365
