import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proxydet.errors import VocabularyError
from proxydet.vocabulary.vocabulary import Vocabulary, load_embeddings


def table(rows: int, dims: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dims)).astype(np.float32)


def test_names_are_stripped_and_everything_is_read_only():
    vocabulary = Vocabulary.from_arrays([" cat ", "dog\n"], table(2).astype(np.float16))
    assert vocabulary.names == ("cat", "dog")
    assert vocabulary.embeddings.dtype == np.float32
    assert vocabulary.base.tolist() == [True, True]
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.embeddings[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.base[0] = False


def test_the_callers_arrays_stay_writable_and_do_not_leak_in():
    embeddings, base = table(2), np.array([True, False])
    vocabulary = Vocabulary.from_arrays(["a", "b"], embeddings, base)
    embeddings[:] = 7
    base[:] = False
    assert vocabulary.embeddings.max() < 7
    assert vocabulary.base.tolist() == [True, False]


@pytest.mark.parametrize(
    ("names", "embeddings", "base", "message"),
    [
        (["a", " "], table(2), None, r"class name 1 \(counted from 0\) is empty"),
        (["a", "b", "a "], table(3), None, "0 and 2"),
        (["a", 3], table(2), None, "class name 1 is 3"),
        ("ab", table(2), None, "not one string"),
        ([], table(1), None, "at least one"),
        (["a", "b"], table(3), None, "2 class names but 3"),
        (["a"], np.zeros(4), None, "shape"),
        (["a"], np.zeros((1, 0)), None, "shape"),
        (["a"], [["x"]], None, "must be numbers"),
        (["a", "b"], [[1.0, 2], [np.nan, 1]], None, "not finite, rows 1"),
        (["a", "b"], [[1.0, 2], [np.inf, 1]], None, "not finite, rows 1"),
        (["a", "b"], [[0.0, 0], [1, 1]], None, "all zero, rows 0"),
        (["a", "b"], table(2), [True, False, False], "shape"),
        (["a", "b"], table(2), [0.5, 1], "True and False"),
    ],
)
def test_what_makes_no_vocabulary_is_refused(names, embeddings, base, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_arrays(names, embeddings, base)


def test_equality_and_hash_follow_the_content():
    first = Vocabulary.from_arrays(["a", "b"], table(2))
    again = Vocabulary.from_arrays(["a", "b"], table(2))
    assert first == again
    assert len({first, again}) == 1
    assert first != Vocabulary.from_arrays(["ab", "b"], table(2))
    assert first != Vocabulary.from_arrays(["a", "b"], table(2, seed=1))
    assert first != first.with_base([True, False])
    assert first != "a"


def test_names_are_delimited_in_the_digest():
    one = Vocabulary.from_arrays(["ab", "c"], table(2))
    other = Vocabulary.from_arrays(["a", "bc"], table(2))
    assert one.digest != other.digest


def test_normalised_rows_have_length_one():
    vocabulary = Vocabulary.from_arrays(["a", "b"], table(2) * 1e-18)
    np.testing.assert_allclose(np.linalg.norm(vocabulary.normalised(), axis=1), 1, rtol=1e-6)


def test_base_by_similarity_compares_with_the_training_classes():
    vocabulary = Vocabulary.from_arrays(["near", "far", "opposite"], [[1.0, 0.1], [1, 1], [-1, 0]])
    split = vocabulary.base_by_similarity([[5.0, 0]], threshold=0.9)
    assert split.base.tolist() == [True, False, False]
    # A bias says nothing of the embedding; a scale says that it is not a text's.
    biased = vocabulary.with_scorers(bias=[1, -1, 2], background=[0, 0, 1])
    assert biased.base_by_similarity([[5.0, 0]]).base.tolist() == [True, False, False]
    shown = vocabulary.with_scorers(scale=[1, 1, 2]).with_base([False, True, True])
    assert shown.base_by_similarity([[5.0, 0]]).base.tolist() == [True, False, True]
    # The threshold itself is not enough: "exceeds".
    same = Vocabulary.from_arrays(["same"], [[3.0, 4]]).base_by_similarity([[3.0, 4]], 1.0)
    assert same.base.tolist() == [False]
    with pytest.raises(VocabularyError, match="different text encoders"):
        vocabulary.base_by_similarity([[1.0, 0, 0]])
    with pytest.raises(VocabularyError, match="threshold"):
        vocabulary.base_by_similarity([[1.0, 0]], 2)


def test_subset_keeps_rows_and_base_together():
    vocabulary = Vocabulary.from_arrays(["a", "b", "c"], table(3), [True, False, True])
    part = vocabulary.subset(["c", "b"])
    assert part.names == ("c", "b")
    assert part.base.tolist() == [True, False]
    np.testing.assert_array_equal(part.embeddings, vocabulary.embeddings[[2, 1]])
    with pytest.raises(VocabularyError, match="'x'"):
        vocabulary.subset(["a", "x"])


@given(
    st.lists(
        st.text("abçé日 _(),'", min_size=1).filter(str.strip),
        min_size=1,
        max_size=6,
        unique_by=str.strip,
    ),
    st.data(),
)
def test_saving_and_loading_changes_nothing(tmp_path_factory, names, data):
    embeddings = data.draw(
        hnp.arrays(np.float32, (len(names), 3), elements=st.floats(0.5, 2, width=32))
    )
    base = data.draw(hnp.arrays(np.bool_, len(names)))
    vocabulary = Vocabulary.from_arrays(names, embeddings, base)
    path = tmp_path_factory.mktemp("vocabulary") / "v.npz"
    assert Vocabulary.load(vocabulary.save(path)) == vocabulary


def test_saving_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "sub" / "v"
    Vocabulary.from_arrays(["a"], table(1)).save(path)
    Vocabulary.from_arrays(["b"], table(1)).save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["v"]
    assert Vocabulary.load(path).names == ("b",)


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(VocabularyError, match="no vocabulary file"):
        Vocabulary.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", table(2))
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    np.savez(
        tmp_path / "pickled.npz", names=np.array(["a", None]), embeddings=table(2), base=[1, 1]
    )
    whole = Vocabulary.from_arrays(["a"], table(1)).save(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "one.npy", "other.npz", "pickled.npz", "cut.npz", "empty.npz"):
        with pytest.raises(VocabularyError, match="does not hold a vocabulary"):
            Vocabulary.load(tmp_path / name)


@pytest.fixture
def saved(tmp_path) -> Path:
    return Vocabulary.from_arrays(["cup", "pan"], np.eye(2, 8)).save(tmp_path / "v.vocab")


def test_every_damaged_byte_is_an_error_or_harmless(saved):
    content = saved.read_bytes()
    for position in range(0, len(content), 3):
        for value in (0x00, 0x10, 0xFF):
            damaged = bytearray(content)
            damaged[position] = value
            saved.write_bytes(damaged)
            with contextlib.suppress(VocabularyError):
                Vocabulary.load(saved)
        saved.write_bytes(content[:position])
        with pytest.raises(VocabularyError, match=r"v\.vocab"):
            Vocabulary.load(saved)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    zeros = np.zeros((40_000, 512), np.float32)
    np.savez_compressed(path, names=np.array(["a"]), embeddings=zeros, base=np.ones(1, bool))
    assert path.stat().st_size < 1e6
    with pytest.raises(VocabularyError, match=r"bomb\.npz unpacks to more"):
        Vocabulary.load(path)


def test_arrays_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "v.npz"
    for names in (np.array([1, 2]), np.array([["a", "b"]])):
        np.savez(path, names=names, embeddings=np.eye(2), base=np.ones(2, bool))
        with pytest.raises(VocabularyError, match="names are not"):
            Vocabulary.load(path)


def test_a_table_whose_header_asks_for_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.eye(4))
    path.write_bytes(path.read_bytes().replace(b"(4, 4), ", b"(99999999, 9999), "))
    with pytest.raises(VocabularyError, match=r"t\.npy"):
        load_embeddings(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(VocabularyError, match="Python objects"):
        load_embeddings(path)


def scored() -> Vocabulary:
    return Vocabulary.from_arrays(
        ["a", "b", "c"],
        table(3),
        [True, False, False],
        bias=[0, 0.5, -1],
        scale=[1, 2, 0.5],
        threshold=[np.nan, 0.2, np.nan],
        background=[False, False, True],
    )


def test_scorers_are_kept_by_files_and_subsets_and_joins(tmp_path):
    vocabulary = scored()
    plain = Vocabulary.from_arrays(vocabulary.names, vocabulary.embeddings, vocabulary.base)
    assert vocabulary != plain
    loaded = Vocabulary.load(vocabulary.save(tmp_path / "v.npz"))
    assert loaded == vocabulary
    for other in (loaded, vocabulary.with_base([True] * 3), vocabulary.subset(["c", "a", "b"])):
        own = other.subset(vocabulary.names)
        for name, values in vocabulary.scorers.items():
            np.testing.assert_array_equal(getattr(own, name), values)
    assert vocabulary.with_scorers(bias=None, scale=None, threshold=None, background=None) == plain
    assert vocabulary.reported == ("a", "b")
    more = vocabulary.joined(Vocabulary.from_arrays(["d"], table(1)))
    assert more.names == ("a", "b", "d", "c")  # background behind the others
    assert more.bias.tolist() == [0, 0.5, 0, -1]
    assert more.subset(vocabulary.names) == vocabulary
    with np.load(plain.save(tmp_path / "plain.npz")) as arrays:  # as 0.1 wrote it
        assert sorted(arrays) == ["base", "embeddings", "names"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bias", [0, np.inf, 0]),
        ("bias", [0, 1]),
        ("bias", ["a", "b", "c"]),
        ("scale", [1, 0, 1]),
        ("scale", [1, np.nan, 1]),
        ("threshold", [0.1, 1.5, 0.2]),
        ("threshold", [-0.1, 0.5, 0.2]),
        ("background", [True, True, True]),
        ("background", [0, 2, 0]),
    ],
)
def test_scorers_of_wrong_values_are_refused(name, values):
    with pytest.raises(VocabularyError, match=name):
        Vocabulary.from_arrays(["a", "b", "c"], table(3), **{name: values})


def test_background_classes_stand_behind_the_others_with_all_that_is_theirs():
    marks = {"base": [0, 1, 1, 0], "bias": [1, 2, 3, 4], "scale": [1, 2, 3, 4]}
    made = Vocabulary.from_arrays(
        [*"abcd"], np.eye(4), background=[True, False, True, False], **marks
    )
    assert made.names == ("b", "d", "a", "c")
    assert made.reported == ("b", "d")
    assert made.embeddings.argmax(axis=1).tolist() == [1, 3, 0, 2]
    assert made.base.tolist() == [True, False, False, True]
    assert made.bias.tolist() == made.scale.tolist() == [2, 4, 1, 3]
    assert made.background.tolist() == [False, False, True, True]
    assert made.with_scorers(background=[False] * 4).names == made.names


def test_background_is_added_from_another_vocabulary():
    asked = Vocabulary.from_arrays([*"ab"], np.eye(2, 4), threshold=[0.5, np.nan])
    other = Vocabulary.from_arrays([*"cd"], np.eye(4)[2:], threshold=[0.1, 0.2], bias=[1, 2])
    made = asked.with_background(other)
    assert (made.names, made.reported) == (("a", "b", "c", "d"), ("a", "b"))
    np.testing.assert_array_equal(made.threshold, np.float32([0.5, np.nan, np.nan, np.nan]))
    assert made.bias.tolist() == [0, 0, 1, 2]
    assert made.with_background(Vocabulary.from_arrays([*"e"], [[1, 1, 1, 1]])).reported == (
        "a",
        "b",
    )
    with pytest.raises(VocabularyError, match="'b'"):
        asked.with_background(Vocabulary.from_arrays([*"bc"], np.eye(2, 4)))
    # Of a whole list what is asked for is left out, by name or because it is nearly the same.
    alike = Vocabulary.from_arrays(
        ["b", "almost a", "c"], [[0, 0, 0, 1], [9, 1, 0, 0], [0, 0, 1, 0]]
    )
    assert asked.with_background(alike, alike_above=0.9).names == ("a", "b", "c")
    assert asked.with_background(asked, alike_above=0.9) == asked
    with pytest.raises(VocabularyError, match="dimensions"):
        asked.with_background(Vocabulary.from_arrays([*"c"], [[1.0, 0]]), alike_above=0.9)
    # What is background already stays as it is.
    assert made.with_background(other) == made
    assert made.with_background(other, alike_above=0.9) == made
    further = Vocabulary.from_arrays([*"de"], [[0, 0, 0, 1], [0, 0, 1, 1]], background=[0, 1])
    added = made.with_background(further)
    assert dict(zip(added.names, added.bias.tolist(), strict=True)) == {**dict.fromkeys("abe", 0), "c": 1, "d": 2}  # fmt: skip
    assert added.reported == ("a", "b")


def test_only_plain_classes_can_be_trained():
    plain = Vocabulary.from_arrays([*"ab"], np.eye(2))
    assert plain.plain
    plain.require_plain()
    for name, values in {"bias": [0, 1], "scale": [1, 2], "threshold": [0, 1]}.items():
        assert not plain.with_scorers(**{name: values}).plain
        with pytest.raises(VocabularyError, match=name):
            plain.with_scorers(**{name: values}).require_plain()
