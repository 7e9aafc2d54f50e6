"""The text encoder that stands in for CLIP on the drawn data set."""

from __future__ import annotations

import numpy as np
import pytest

from proxydet.errors import VocabularyError
from proxydet.vocabulary.compositional import CompositionalEncoder

WORDS = ["red", "blue", "plain", "striped", "circle", "square"]


@pytest.fixture
def encoder() -> CompositionalEncoder:
    return CompositionalEncoder.create(WORDS, dim=64, noise=0.1, seed=3, aliases={"disc": "circle"})


def cosines(encoder: CompositionalEncoder, names: list[str]) -> np.ndarray:
    rows = encoder.encode(names)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_names_are_close_by_the_words_they_share(encoder):
    near = cosines(
        encoder,
        ["red striped circle", "red striped square", "red plain square", "blue plain square"],
    )[0]
    assert np.all(np.diff(near) < -0.1)


def test_a_name_has_a_short_direction_of_its_own():
    encoders = [
        CompositionalEncoder.create(WORDS, dim=64, noise=noise, seed=3) for noise in (0.0, 0.25)
    ]
    names = ["red striped circle", "red striped square"]
    plain, own = (encoder.encode(names) for encoder in encoders)
    np.testing.assert_allclose(np.linalg.norm(own - plain, axis=1), 0.25, rtol=0.01)
    assert abs((own - plain)[0] @ (own - plain)[1]) < 0.03


def test_order_articles_case_and_aliases_do_not_matter(encoder):
    rows = encoder.encode(["red striped circle", "A striped, RED disc"])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_saving_keeps_every_number(encoder, tmp_path):
    encoder.save(tmp_path / "encoder.json")
    loaded = CompositionalEncoder.load(tmp_path / "encoder.json")
    names = ["red striped disc", "blue plain square", "circle"]
    np.testing.assert_array_equal(encoder.encode(names), loaded.encode(names))


@pytest.mark.parametrize(("name", "what"), [("red giraffe", "'giraffe'"), ("the", "finds no word")])
def test_unknown_words_are_named(encoder, name, what):
    with pytest.raises(VocabularyError, match=what) as caught:
        encoder.encode([name])
    assert "striped" in str(caught.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "[" * 100_000,
        '{"format": "proxydet compositional text encoder 1"}',
        '{"format": "proxydet compositional text encoder 1", "common": [1], "words": [1], "aliases": {}, "noise": 1}',
        '{"format": "proxydet compositional text encoder 1", "common": %s}'
        % ("[" * 900 + "]" * 900),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "encoder.json"
    path.write_text(content)
    with pytest.raises(VocabularyError):
        CompositionalEncoder.load(path)
