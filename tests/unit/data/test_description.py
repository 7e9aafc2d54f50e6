import dataclasses
from pathlib import Path

import numpy as np
import pytest

from proxydet.data.dataset import (
    Dataset,
    DatasetConfig,
)
from proxydet.data.sources import open_config
from proxydet.errors import DataError, VocabularyError
from proxydet.vocabulary.vocabulary import Vocabulary


def edited(path: Path, *changes: tuple[str, str]) -> DatasetConfig:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return DatasetConfig.from_toml(path)


def test_paths_are_relative_to_the_file(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_set.parent)
    description = DatasetConfig.from_toml(Path(small_set.name))
    assert description.name == "small"
    assert description.vocabulary.embeddings == small_set.parent / "embeddings.npy"
    assert description.split("train").roots == (small_set.parent / "train",)
    assert description.split("val").roots == (small_set.parent / "val",)
    assert description.image_labels is None


def test_home_and_absolute_paths_and_encoders(
    small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    (small_set.parent / "enc.json").touch()
    description = edited(
        small_set,
        ('images = "train"', 'images = ["~/a", "/b"]'),
        ('novel = ["dog"]', 'encoder = "enc.json"'),
    )
    assert description.split("train").roots == (Path("/somewhere/a"), Path("/b"))
    assert description.vocabulary.encoder == str(small_set.parent / "enc.json")
    assert edited(small_set, ("enc.json", "ViT-B/32")).vocabulary.encoder == "ViT-B/32"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[val]", "[vall]", r"vall.*Did you mean val"),
        ("novel = ", "novell = ", r"vocabulary\.novell.*novel"),
        ('name = "small"', "", "name is missing"),
        ('embeddings = "embeddings.npy"', "", r"vocabulary\.embeddings"),
        ('novel = ["dog"]', "novel = 3", r"vocabulary\.novel"),
        ('novel = ["dog"]', 'novel_frequency = ["x"]', "'r', 'c' and 'f'"),
        ("[val]", "[val", "not valid TOML"),
        ('images = "train"', "", r"train\.images"),
        ("[val]", "[image_labels]\n[val]", "either tars or annotations"),
        ("[val]", '[image_labels]\ntars = "a"\nannotations = "b"\n[val]', "either tars or annotations"),
        ("[val]", '[image_labels]\nannotations = "b"\n[val]', "go together"),
        ('images = "train"', 'images = "train"\nformat = "coco"', r"train\.format.*COCO JSON"),
        ('images = "train"', 'images = "train"\nformat = "YOLO"\nreader = "a:b"', "format and reader"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_and_the_file(
    small_set: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        edited(small_set, (old, new))
    assert "set.toml" in caught.value.message


def test_names_may_be_a_file(small_set: Path) -> None:
    (small_set.parent / "data.yaml").write_text("names: {1: dog, 0: cat, 2: cow}\n")
    old = 'embeddings = "embeddings.npy"'
    description = edited(small_set, (old, f'{old}\nnames = "data.yaml"'))
    assert description.vocabulary.names == ("cat", "dog", "cow")
    with pytest.raises(VocabularyError, match=r"absent\.txt"):
        edited(small_set, ("data.yaml", "absent.txt"))


def test_absent_files_and_splits(small_set: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset config"):
        DatasetConfig.from_toml(tmp_path / "x.toml")
    with pytest.raises(DataError, match="is a folder"):
        DatasetConfig.from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        DatasetConfig.from_toml(tmp_path / "latin.toml")
    (tmp_path / "instances.json").write_bytes(b"[" * (9 << 20))
    with pytest.raises(DataError, match="larger") as caught:
        DatasetConfig.from_toml(tmp_path / "instances.json")
    assert "proxydet data init" in str(caught.value.hint)
    with pytest.raises(DataError, match="there is no split 'dev'"):
        DatasetConfig.from_toml(small_set).split("dev")


def test_rows_of_embeddings_are_categories_in_order_of_their_ids(small_set: Path) -> None:
    description = DatasetConfig.from_toml(small_set)
    vocabulary = Dataset(config=description).vocabulary
    assert vocabulary.names == ("cat", "dog", "bird")
    assert vocabulary.base.tolist() == [True, False, True]
    np.testing.assert_array_equal(
        vocabulary.embeddings, np.load(small_set.parent / "embeddings.npy")
    )
    store = Dataset(config=description).store("train")
    assert store.class_rows(vocabulary.names).tolist() == [0, 1, 2]
    # Of 6 images, number % 4 classes each, cat first.
    assert Dataset(config=description).image_counts().tolist() == [4, 2, 1]
    assert Dataset(config=description).image_counts(with_novel=False).tolist() == [4, 0, 1]


def test_novel_by_frequency_and_by_name_add_up(small_set: Path) -> None:
    description = edited(small_set, ('novel = ["dog"]', 'novel = ["cat"]\nnovel_frequency = ["r"]'))
    assert Dataset(config=description).vocabulary.base.tolist() == [False, False, True]


def test_names_map_rows_to_categories(small_set: Path) -> None:
    np.save(small_set.parent / "embeddings.npy", np.eye(4, 8))
    description = edited(
        small_set, ('novel = ["dog"]', 'names = ["bird", "cow", "cat", "dog"]\nnovel = ["cow"]')
    )
    vocabulary = Dataset(config=description).vocabulary
    assert vocabulary.names == ("bird", "cow", "cat", "dog")
    store = Dataset(config=description).store("train")
    assert store.class_rows(vocabulary.names).tolist() == [2, 3, 0]
    assert Dataset(config=description).image_counts().tolist() == [1, 0, 4, 2]


def test_annotations_that_are_gone_name_the_config_only_where_there_is_one(small_set: Path) -> None:
    config = edited(small_set, ("train.json", "absent.json"))
    with pytest.raises(DataError, match=r"absent\.json") as caught:
        Dataset(config=config).store("train")
    assert "[train]" in str(caught.value.hint)
    with pytest.raises(DataError, match=r"absent\.json") as caught:
        Dataset(config=open_config(small_set.parent / "absent.json")).store("train")
    assert "config" not in str(caught.value.hint)


def test_a_saved_vocabulary_brings_names_and_base(small_set: Path) -> None:
    Vocabulary.from_arrays(["bird", "dog", "cat"], np.eye(3), [True, True, False]).save(
        small_set.parent / "pets.vocab"
    )
    description = edited(small_set, ("embeddings.npy", "pets.vocab"), ('novel = ["dog"]', ""))
    assert Dataset(config=description).vocabulary.names == ("bird", "dog", "cat")
    assert Dataset(config=description).vocabulary.base.tolist() == [True, True, False]
    clash = edited(small_set, ("[train]", 'names = ["a"]\n[train]'))
    with pytest.raises(VocabularyError, match="differ from 'names'"):
        _ = Dataset(config=clash).vocabulary


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (('novel = ["dog"]', 'novel = ["dgo"]'), VocabularyError, "'dgo' is not in the vocabulary.*'dog'"),
        (("embeddings.npy", "absent.npy"), VocabularyError, "no text embeddings"),
        (("embeddings.npy", "set.toml"), VocabularyError, "set.toml"),
        (("embeddings.npy", "objects.npy"), VocabularyError, "it holds Python objects, not numbers"),
        (("embeddings.npy", "arrays"), VocabularyError, "does not hold a vocabulary"),
        (("embeddings.npy", "four.npy"), VocabularyError, "3 classes, but four.npy has 4 rows"),
        (('novel = ["dog"]', 'names = ["cat", "dog"]'), VocabularyError, "'names' has 2 classes"),
        (('novel = ["dog"]', 'names = ["cat", "dog", "cow"]'), DataError, "'bird'"),
        (("train.json", "absent.json"), DataError, "absent.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(small_set: Path, change, error, message: str) -> None:
    np.save(small_set.parent / "four.npy", np.eye(4))
    np.save(small_set.parent / "objects.npy", np.array([{}], dtype=object))
    with (small_set.parent / "arrays").open("wb") as file:
        np.savez(file, a=np.eye(4))
    description = edited(small_set, change)
    dataset = Dataset(config=description)
    with pytest.raises(error, match=message) as caught:
        dataset.store("train").class_rows(dataset.vocabulary.names)
    assert caught.value.hint
    assert "pickle" not in str(caught.value)


def test_categories_that_are_background_are_named_as_such(small_set: Path) -> None:
    store = Dataset(config=edited(small_set)).store("train")
    *reported, hidden = [category.name for category in store.categories]
    with pytest.raises(DataError, match=f"background.*'{hidden}'"):
        store.class_rows(reported, [hidden])
    with pytest.raises(DataError, match=f"not in the vocabulary.*'{hidden}'"):
        store.class_rows(reported)


def test_frequency_groups_need_frequencies(small_set: Path) -> None:
    annotations = small_set.parent / "train.json"
    annotations.write_text(annotations.read_text().replace('"frequency"', '"often"'))
    description = edited(small_set, ('novel = ["dog"]', 'novel_frequency = ["r"]'))
    with pytest.raises(VocabularyError, match="needs categories with a 'frequency'"):
        _ = Dataset(config=description).vocabulary


def test_declared_counts_stand_in_for_classes_that_were_removed(small_set: Path) -> None:
    annotations = small_set.parent / "train.json"
    annotations.write_text(
        annotations.read_text()
        .replace('"name": "dog"', '"name": "dog", "image_count": 77')
        .replace('"category_id": 7', '"category_id": 3')
        .replace('"name": "cat"', '"name": "cat", "image_count": 5000')
    )
    description = DatasetConfig.from_toml(small_set)
    counts = Dataset(config=description).image_counts()
    assert counts.tolist() == [4, 77, 1]


class Built(Exception):
    """Raised in place of building the network, with the counts that it was given."""


@pytest.mark.parametrize(("counted", "expected"), [(True, [4, 2, 1]), (False, [4, 0, 1])])
def test_training_counts_novel_classes_only_where_it_is_asked_to(
    small_set: Path, counted: bool, expected: list[int], tmp_path: Path, monkeypatch
) -> None:
    from proxydet.recipes import RECIPES
    from proxydet.training import train as module

    def build(config, vocabulary, counts):
        raise Built(counts.tolist())

    monkeypatch.setattr(module, "ProxyDetNetwork", build)
    tiny = RECIPES["tiny"]()
    data = dataclasses.replace(
        tiny.data, description=small_set, count_novel_classes=counted, image_labels=None
    )
    with pytest.raises(Built) as caught:
        module.train(dataclasses.replace(tiny, data=data), output=tmp_path / "run")
    assert caught.value.args[0] == expected
