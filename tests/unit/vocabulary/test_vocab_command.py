"""``proxydet vocab`` from end to end, with the drawn data set's text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

WORDS = ["red", "blue", "circle", "square", "striped"]


@pytest.fixture
def encoder(tmp_path) -> Path:
    path = tmp_path / "text_encoder.json"
    CompositionalEncoder.create(WORDS, dim=32, noise=0.1, seed=2, aliases={"disc": "circle"}).save(
        path
    )
    return path


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("red circle\nblue square\n# not this\nred striped circle | striped red disc\n")
    return path


def test_build_writes_what_the_encoder_gives(encoder, names, tmp_path, cli):
    target = tmp_path / "shapes.vocab"
    code, out, _ = cli("vocab", "build", names, "-o", target, "--encoder", encoder, "--json")
    assert code == 0
    made = Vocabulary.load(target)
    assert made.names == ("red circle", "blue square", "red striped circle")
    assert json.loads(out) == {
        "file": str(target),
        "classes": 3,
        "dimensions": 32,
        "digest": made.digest,
    }
    wanted = CompositionalEncoder.load(encoder).encode(["red circle", "blue square"])
    np.testing.assert_array_equal(made.embeddings[:2], wanted)


def test_names_are_checked_before_clip_is_looked_for(tmp_path, cli, monkeypatch):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    twice = tmp_path / "twice.txt"
    twice.write_text("cup\nplate\ncup\n")
    for words in (
        ("build", twice, "-o", tmp_path / "a.npz"),
        ("show", twice, "--against", _saved(tmp_path)),
    ):
        code, _, err = cli("vocab", *words)
        assert code == 3
        assert "'cup'" in err
        assert "line 1 and line 3" in err
        assert "hint: " in err


def _saved(folder: Path) -> Path:
    return Vocabulary.from_arrays(["a", "b"], np.eye(2)).save(folder / "training.npz")


def test_show_says_what_is_base_and_why(encoder, names, tmp_path, cli):
    training = tmp_path / "training.txt"
    training.write_text("red circle\nblue circle\n")
    words = ("show", names, "--against", training, "--encoder", encoder)
    code, out, err = cli("vocab", *words, "--alike-above", "0.8")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["red", "circle", "base"]
    assert lines[2].split()[:3] == ["blue", "square", "novel"]
    assert "hard to tell apart: 'red circle' and 'red striped circle'" in err
    _, out, _ = cli("vocab", *words, "--json", "--neighbours", "1")
    report = json.loads(out)
    assert [entry["base"] for entry in report["classes"]] == [True, False, False]
    assert report["classes"][0]["nearest"][0]["name"] == "red circle"


def test_show_takes_the_training_vocabulary_of_a_run(encoder, names, tmp_path, cli):
    run = tmp_path / "run"
    rows = CompositionalEncoder.load(encoder).encode(["blue square"])
    Vocabulary.from_arrays(["blue square"], rows).save(run / "vocabulary.npz")
    code, _, err = cli("vocab", "show", names, "--run", run, "--encoder", encoder)
    assert (code, "run folder" in err) == (3, True)
    (run / "config.yaml").touch()
    _, out, _ = cli("vocab", "show", names, "--run", run, "--encoder", encoder, "--json")
    assert [entry["base"] for entry in json.loads(out)["classes"]] == [False, True, False]


def test_show_names_what_clip_would_cut(encoder, tmp_path, cli):
    """74 words and "a", start and end are the 77 tokens that are read."""
    fits, long = " ".join(["cat"] * 74), " ".join(["dog"] * 75)
    many_letters = (
        "a very long but ordinary name of a thing that stands in a kitchen, or in another room"
    )
    saved = Vocabulary.from_arrays([fits, long, many_letters], np.eye(3, 32)).save(
        tmp_path / "long.vocab"
    )
    words = ("show", saved, "--against", saved)
    code, _, err = cli("vocab", *words)
    assert code == 0
    assert err.count("too long for CLIP") == 1
    assert "reads 77 tokens: 'dog dog" in err
    assert "has 78" in err
    _, out, _ = cli("vocab", *words, "--json")
    assert json.loads(out)["cut"] == [{"name": long, "tokens": 78, "read": 77}]


def test_mistakes_are_named(encoder, names, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    code, _, err = cli("vocab", "build", names, "-o", tmp_path / "a.vocab")
    assert code == 3
    assert "proxydet download clip-vit-b32" in err
    code, _, err = cli("vocab", "build", names, "-o", tmp_path / "a.txt", "--encoder", encoder)
    assert code == 3
    assert ".vocab" in err
    code, _, err = cli("vocab", "show", names, "--run", tmp_path, "--against", "lvis")
    assert code == 2
    monkeypatch.setenv("PROXYDET_DATASETS", str(tmp_path / "none"))
    code, _, err = cli("vocab", "show", "lvsi")
    assert code == 3
    assert "'lvsi' is neither" in err
    assert "hint: Did you mean 'lvis'?" in err
    code, _, err = cli("vocab", "show", "lvis")
    assert code == 3
    assert "proxydet download lvis-metadata" in err


def test_show_takes_a_table_of_embeddings_with_its_names(encoder, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    rows = CompositionalEncoder.load(encoder).encode(["red circle", "blue square"])
    saved = Vocabulary.from_arrays(["red circle"], rows[:1]).save(tmp_path / "training.npz")
    table, names = tmp_path / "table.npy", tmp_path / "names.txt"
    np.save(table, rows)
    names.write_text("red circle\nblue square\n")
    words = ("show", table, "--against", saved)
    _, out, _ = cli("vocab", *words, "--names", names, "--json")
    found = json.loads(out)["classes"]
    assert [(entry["name"], entry["base"]) for entry in found] == [
        ("red circle", True),
        ("blue square", False),
    ]
    code, _, err = cli("vocab", *words)
    assert (code, "--names NAMES.txt" in err) == (3, True)
