"""What files say of classes: descriptions, hierarchies, and the embeddings that are made with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from proxydet.errors import VocabularyError
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.descriptions import (
    describe,
    read_descriptions,
    read_hierarchy,
    with_hierarchy,
)
from proxydet.vocabulary.names import ClassWords
from proxydet.vocabulary.vocabulary import Vocabulary, build_vocabulary

KITCHEN = """
ladle:
  synonyms: [soup ladle]
  sentences: ["A {} serves soup."]
  descriptions: [with a long handle, "a deep {}"]
  templates: ["one {}", "two {}"]
coffee maker:
- A machine that brews coffee.
- It stands in kitchens.
whisk: A wire tool that beats eggs.
"""


class Recorder:
    """Gives each text a direction of its own, four times as long as the one before, and keeps the texts."""

    dim = 16

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, names: Sequence[str]) -> np.ndarray:
        self.texts += names
        return (np.eye(16)[: len(names)] * 4.0 ** np.arange(len(names))[:, None]).astype(np.float32)


@pytest.fixture
def kitchen(tmp_path):
    path = tmp_path / "kitchen.yaml"
    path.write_text(KITCHEN)
    return path


def test_a_class_has_sentences_or_all_that_is_said_of_it(kitchen):
    ladle, maker, whisk = read_descriptions(kitchen)
    assert ladle == ClassWords(
        "ladle",
        synonyms=("soup ladle",),
        sentences=("A {} serves soup.",),
        descriptions=("with a long handle", "a deep {}"),
        templates=("one {}", "two {}"),
    )
    assert maker.sentences == ("A machine that brews coffee.", "It stands in kitchens.")
    assert whisk.sentences == ("A wire tool that beats eggs.",)


def test_json_and_a_classes_key_are_read_alike(kitchen, tmp_path):
    path = tmp_path / "kitchen.json"
    said = {"classes": {"whisk": ["A wire tool that beats eggs."]}}
    path.write_text(json.dumps(said))
    assert read_descriptions(path) == read_descriptions(kitchen)[2:]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- ladle", "mapping"),
        ("ladle: {sentence: [x]}", "Did you mean 'sentences'"),
        ("ladle: {sentences: {a: b}}", "sentences of 'ladle'"),
        ("ladle: [[x]]", "sentences of 'ladle'"),
        ("ladle: {templates: [a spoon]}", "template 'a spoon' of 'ladle'"),
        ("ladle: ['']", "one of the sentences of 'ladle'"),
        ("ladle: [" + "x" * 501 + "]", "501 characters"),
        ("ladle: [x", "not valid YAML"),
        ("", "mapping"),
    ],
)
def test_mistakes_name_file_class_and_key(tmp_path, text, named):
    path = tmp_path / "said.yaml"
    path.write_text(text)
    with pytest.raises(VocabularyError) as caught:
        read_descriptions(path)
    assert named in caught.value.message
    assert "said.yaml" in caught.value.message
    assert caught.value.hint


def test_names_are_matched_without_case_and_underscores_unless_that_is_ambiguous(kitchen):
    asked = [ClassWords(name) for name in ("Coffee_maker", "cup", "Whisk", "whisk ")]
    found = describe(asked[:3], read_descriptions(kitchen))
    assert [len(entry.sentences) for entry in found.classes] == [2, 0, 1]
    assert (found.missing, found.unused) == (("cup",), ("ladle",))
    assert describe(asked[2:], read_descriptions(kitchen)).missing == ("Whisk", "whisk ")


def test_names_and_descriptions_are_averaged_apart_and_mixed_by_the_weight(kitchen):
    encoder = Recorder()
    made = build_vocabulary(
        read_descriptions(kitchen)[:1], encoder, prompts="photo", description_weight=0.25
    )
    assert encoder.texts == [
        *("one ladle", "two ladle", "one soup ladle", "two soup ladle"),
        *("A ladle serves soup.", "one ladle, with a long handle", "a deep ladle"),
    ]
    names, said = np.zeros(16), np.zeros(16)
    names[:4], said[4:7] = 1 / 2, 1 / np.sqrt(3)
    np.testing.assert_allclose(made.embeddings[0], 0.75 * names + 0.25 * said, rtol=1e-6)


@pytest.mark.parametrize(("weight", "texts"), [(0, ["a whisk"]), (1, ["It whisks."])])
def test_the_ends_of_the_weight_embed_one_kind_of_text(weight, texts):
    encoder = Recorder()
    said = [ClassWords("whisk", sentences=("It whisks.",))]
    build_vocabulary(said, encoder, description_weight=weight)
    assert encoder.texts == texts


def test_a_class_that_nothing_is_said_of_keeps_the_embedding_of_its_name():
    made = build_vocabulary(["cup", ClassWords("whisk", sentences=("x",))], Recorder())
    np.testing.assert_array_equal(made.embeddings[0], np.eye(16)[0])
    with pytest.raises(VocabularyError, match="weight"):
        build_vocabulary(["cup"], Recorder(), description_weight=1.5)


# --- Hierarchies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "animal: {dog: [poodle, beagle], cat: }",
        "poodle: dog\nbeagle: dog\ndog: animal\ncat: animal",
        "animal: [{dog: [poodle]}, cat]\nbeagle: dog",
        json.dumps(
            {
                "categories": [
                    {"id": 1, "name": "poodle", "supercategory": "dog"},
                    {"id": 2, "name": "beagle", "supercategory": "dog"},
                    {"id": 3, "name": "dog", "supercategory": "animal"},
                    {"id": 4, "name": "cat", "supercategory": "animal"},
                    {"id": 5, "name": "animal", "supercategory": "animal"},
                ]
            }
        ),
    ],
)
def test_a_tree_parents_and_categories_say_the_same(tmp_path, text):
    path = tmp_path / "tree.yaml"
    path.write_text(text)
    assert {n: p for n, p in read_hierarchy(path).items() if p} == {
        "dog": ("animal",),
        "cat": ("animal",),
        "poodle": ("dog",),
        "beagle": ("dog",),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: b\nb: c\nc: a", "a < b < c < a"),
        ("a: a", "a < a"),
        ("a:\nb:", "no hierarchy"),
        ("[a, b]", "no hierarchy"),
        ("a: ['']", "empty"),
    ],
)
def test_what_is_no_tree_is_named(tmp_path, text, named):
    path = tmp_path / "tree.yaml"
    path.write_text(text)
    with pytest.raises(VocabularyError) as caught:
        read_hierarchy(path)
    assert named in caught.value.message
    assert "tree.yaml" in caught.value.message


def test_sentences_follow_the_paths_through_a_class():
    parents = {
        "animal": (),
        "guard dog": ("dog", "guard"),
        "dog": ("animal",),
        "poodle": ("dog",),
        "guard": (),
    }
    asked = [ClassWords(name) for name in ("Dog", "poodle", "Guard_Dog", "cup")]
    found = with_hierarchy(asked, parents)
    assert found.missing == ("cup",)
    assert [entry.sentences for entry in found.classes] == [
        (
            "a Guard_Dog, which is a Dog, which is an animal",
            "a poodle, which is a Dog, which is an animal",
        ),
        ("a poodle, which is a Dog, which is an animal",),
        ("a Guard_Dog, which is a Dog, which is an animal", "a Guard_Dog, which is a guard"),
        (),
    ]


def test_paths_are_bounded_in_number_and_length():
    """Layers of ten classes, each below all of the next: 10^9 paths."""
    parents = {
        f"{layer}.{i}": tuple(f"{layer + 1}.{j}" for j in range(10)) if layer < 9 else ()
        for layer in range(10)
        for i in range(10)
    }
    (entry,) = with_hierarchy([ClassWords("0.0")], parents).classes
    assert len(entry.sentences) == 64
    assert max(text.count("which is") for text in entry.sentences) == 6


def test_lvis_categories_give_synonyms_and_definitions(tmp_path):
    path = tmp_path / "cat_info.json"
    row = {"id": 1, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"], "def": "a dispenser"}  # fmt: skip
    path.write_text(json.dumps([row, {"id": 2, "name": "cup"}]))
    can, cup = read_descriptions(path)
    assert can.synonyms == ("aerosol can", "spray can")
    assert (can.descriptions, cup) == (("a dispenser",), ClassWords("cup"))


class Synset:
    """A synset as NLTK has it."""

    known: ClassVar[dict[str, Synset]] = {}

    def __init__(self, name: str, *above: str) -> None:
        self._name, self._above = name, above
        self.known[name] = self

    def name(self) -> str:
        return self._name

    def lemma_names(self) -> list[str]:
        return [self._name.partition(".")[0]]

    def hypernyms(self) -> list[Synset]:
        return [self.known[name] for name in self._above]


def test_wordnet_gives_the_hypernyms_of_synsets(tmp_path, monkeypatch):
    for name, *above in (
        ("poodle.n.01", "dog.n.01"), ("dog.n.01", "animal.n.01"), ("animal.n.01",),
        ("bat.n.01", "animal.n.01"), ("racket.n.01", "bat.n.05"), ("bat.n.05",),
    ):  # fmt: skip
        Synset(name, *above)
    classes = [("dog", "dog.n.01"), ("French_poodle", "poodle.n.01"), ("bat", "bat.n.01"), ("racket", "racket.n.01"), ("x", "x.n.01")]  # fmt: skip
    path = tmp_path / "cat_info.json"
    path.write_text(json.dumps([{"name": n, "synset": s} for n, s in classes]))
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(VocabularyError, match="has WordNet synsets"):
        read_hierarchy(path)
    corpus, reader = ModuleType("nltk.corpus"), ModuleType("nltk.corpus.reader.wordnet")
    corpus.wordnet = SimpleNamespace(ensure_loaded=lambda: None, synset=Synset.known.__getitem__)  # type: ignore[attr-defined]
    reader.WordNetError = LookupError  # type: ignore[attr-defined]
    for name, module in {"nltk": ModuleType("nltk"), "nltk.corpus": corpus, "nltk.corpus.reader": ModuleType("r"), "nltk.corpus.reader.wordnet": reader}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    assert {name: above for name, above in read_hierarchy(path).items() if above} == {
        "French_poodle": ("dog",),
        "dog": ("animal",),
        "bat": ("animal",),
    }


# --- The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path):
    path = tmp_path / "text_encoder.json"
    words = ["red", "blue", "circle", "square", "shape"]
    CompositionalEncoder.create(words, dim=32, noise=0.1, seed=2).save(path)
    return path


def test_build_reports_classes_that_are_in_one_of_the_files_only(encoder, tmp_path, cli):
    names, said, target = tmp_path / "n.txt", tmp_path / "said.yaml", tmp_path / "a.vocab"
    names.write_text("red circle\nblue square\n")
    said.write_text("Red_Circle: {descriptions: [a red shape]}\nred square: [a red square]\n")
    words = ("vocab", "build", names, "-o", target, "--encoder", encoder, "--descriptions", said)
    done = cli(*words)
    assert done.code == 0
    assert "has no entry for 1 of 2 classes: 'blue square'" in done.err
    assert "1 classes that are not named: 'red square'" in done.err
    assert len(cli(*words, "--json").data["notes"]) == 2
    rows = CompositionalEncoder.load(encoder).encode(["red circle", "red circle shape"])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    made = Vocabulary.load(target)
    np.testing.assert_allclose(made.embeddings[0], unit.mean(axis=0), rtol=1e-5)
    assert cli("vocab", "build", "-o", target, "--encoder", encoder, "--descriptions", said).code == 0  # fmt: skip
    assert Vocabulary.load(target).names == ("Red_Circle", "red square")


def test_build_takes_a_hierarchy_and_writes_nothing_where_it_fails(encoder, tmp_path, cli):
    names, tree, target = tmp_path / "n.txt", tmp_path / "tree.yaml", tmp_path / "a.vocab"
    names.write_text("red circle\nblue square\n")
    tree.write_text("shape: [red circle]\n")
    words = ("vocab", "build", names, "-o", target, "--encoder", encoder, "--hierarchy", tree)
    tree.write_text("shape: [red circle]\nred circle: cube\n")
    assert cli(*words).code == 3  # the encoder does not know cubes
    tree.write_text("shape: red circle\nred circle: shape\n")
    assert (cli(*words).code, target.exists()) == (3, False)
    tree.write_text("shape: [red circle]\n")
    assert cli(*words, "--description-weight", "1").code == 0
    wanted = CompositionalEncoder.load(encoder).encode(["red circle shape", "blue square"])
    cosines = Vocabulary.load(target).normalised() @ wanted.T / np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-6)
    assert cli("vocab", "build", "-o", target).code == 2
