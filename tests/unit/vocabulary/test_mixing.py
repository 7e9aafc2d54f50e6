"""Tables of classes mixed and joined, and told apart where they do not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proxydet.errors import VocabularyError
from proxydet.vocabulary.sources import merge_alike, mix, published_vocabulary
from proxydet.vocabulary.vocabulary import Vocabulary

NAMES = [f"class {i}" for i in range(20)]


def space(seed: int = 0) -> np.ndarray:
    """Embeddings with a common direction, as text has it: (20, 64)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(20, 64)) + 2 * rng.normal(size=64)


def near(rows: np.ndarray, seed: int = 1) -> np.ndarray:
    """The same classes, said otherwise."""
    return 3 * rows + np.random.default_rng(seed).normal(size=rows.shape)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_classes_are_matched_by_name_in_any_order_and_weighted():
    rows, other = space(), near(space())
    base = np.arange(20) % 2 == 0
    first = Vocabulary.from_arrays(NAMES, rows, base)
    second = Vocabulary.from_arrays([n.replace(" ", "_").title() for n in NAMES[::-1]], other[::-1])
    made = mix({"A": first, "B": second}, [1, 3])
    assert made.vocabulary.names == tuple(NAMES)
    assert made.vocabulary.base.tolist() == base.tolist()
    np.testing.assert_allclose(
        made.vocabulary.embeddings, 0.25 * unit(rows) + 0.75 * unit(other), rtol=1e-4, atol=1e-6
    )
    assert "10 classes base in one table and novel in another" in made.notes[0]


def test_other_classes_are_named_and_joined_where_asked():
    rows = space()
    first = Vocabulary.from_arrays(NAMES[:12], rows[:12], bias=1.0 * (np.arange(12) >= 10))
    second = Vocabulary.from_arrays(NAMES[2:10] + NAMES[12:], near(rows)[[*range(2, 10), *range(12, 20)]])  # fmt: skip
    with pytest.raises(VocabularyError) as caught:
        mix({"A": first, "B": second})
    assert "only in A: 'class 0', 'class 1', 'class 10'" in caught.value.message
    assert "only in B: 'class 12'" in caught.value.message
    assert "--union" in str(caught.value.hint)
    made = mix({"A": first, "B": second}, union=True).vocabulary
    assert made.names == tuple(NAMES)
    # Of one table: as they are.
    np.testing.assert_array_equal(made.embeddings[:2], first.embeddings[:2])
    np.testing.assert_array_equal(made.bias, [float(10 <= i < 12) for i in range(20)])
    lone = mix({"A": first.subset(NAMES[:2]), "B": second.subset(NAMES[12:])}, union=True)
    assert "not tested" in lone.notes[0]


def test_near_duplicates_are_merged_whatever_is_background():
    axes = np.eye(6)
    first = Vocabulary.from_arrays(["wall", "cup", "plate"], axes[[5, 0, 1]], background=[1, 0, 0])
    second = Vocabulary.from_arrays(["mug", "mugs", "Cups"], [axes[2], axes[2] + 0.01, axes[0]])
    made = mix({"A": first, "B": second}, union=True, merge_above=0.95).vocabulary
    assert made.names == ("cup", "plate", "mug", "mugs", "wall")
    assert made.reported == made.names[:4]


def rotated(rows: np.ndarray) -> np.ndarray:
    return rows @ np.linalg.qr(np.random.default_rng(5).normal(size=(64, 64)))[0]


@pytest.mark.parametrize(
    ("change", "count"),
    [(rotated, 20), (rotated, 3), (lambda rows: rows[::-1], 20), (lambda rows: rows[[1, 2, 0]], 3)],
    ids=["encoder", "encoder, few classes", "order", "order, few classes"],
)
def test_other_encoders_and_orders_are_told_by_the_shared_names(change, count):
    rows = space()[:count]
    first = Vocabulary.from_arrays(NAMES[:count], rows)
    mix({"A": first, "B": Vocabulary.from_arrays(NAMES[:count], near(rows))})
    with pytest.raises(VocabularyError, match="A and B are of different text encoders"):
        mix({"A": first, "B": Vocabulary.from_arrays(NAMES[:count], change(near(rows)))})


def test_another_dimension_and_wrong_weights_are_refused():
    first, second = Vocabulary.from_arrays(["a"], [[1, 2]]), Vocabulary.from_arrays(["a"], [[1]])
    with pytest.raises(VocabularyError, match="A has 2 dimensions and B 1"):
        mix({"A": first, "B": second})
    for weights in ([1], [1, 0], [1, -2], [1, np.nan]):
        with pytest.raises(VocabularyError, match="weight"):
            mix({"A": first, "B": first}, weights)


def test_scorers_of_mixed_classes_are_refused_and_thresholds_left_out():
    rows = space()
    first = Vocabulary.from_arrays(NAMES, rows)
    for scorer in ({"bias": np.arange(20)}, {"scale": np.arange(20) + 1}):
        with pytest.raises(VocabularyError, match="'class 1' of B is a scorer"):
            mix({"A": first, "B": first.with_scorers(**scorer)})
    hidden = np.arange(20) == 19
    with pytest.raises(VocabularyError, match="'class 19' is background"):
        mix({"A": first, "B": first.with_scorers(background=hidden)})
    both = first.with_scorers(background=hidden, threshold=np.where(hidden, np.nan, 0.5))
    made = mix({"A": both, "B": both})
    np.testing.assert_array_equal(made.vocabulary.background, hidden)
    assert np.isnan(made.vocabulary.threshold).all()
    assert "38 thresholds" in made.notes[0]


def test_near_duplicates_become_the_first_of_them():
    rows = np.eye(4)[[0, 1, 0, 2, 1]] + 1e-3 * np.arange(5)[:, None]
    made = merge_alike(Vocabulary.from_arrays(["cup", "dog", "cups", "cat", "dogs"], rows), 0.95)
    assert made.vocabulary.names == ("cup", "dog", "cat")
    assert made.notes == ("2 classes merged into one that is alike: cups (cup), dogs (dog)",)
    apart = merge_alike(Vocabulary.from_arrays(["cup", "cups", "mug"], rows[[0, 2, 0]]), 0.95, [0, 0, 1])  # fmt: skip
    assert apart.vocabulary.names == ("cup", "cups")


# --- The command ---------------------------------------------------------------------------------------------------------


def saved(path: Path, rows: np.ndarray, names: list[str] = NAMES) -> Path:
    return Vocabulary.from_arrays(names, rows).save(path)


def test_mix_writes_a_vocabulary_or_nothing(tmp_path, cli):
    first = saved(tmp_path / "a.vocab", space())
    second = saved(tmp_path / "b.npz", near(space())[::-1], NAMES[::-1])
    broken, target = tmp_path / "broken.npz", tmp_path / "mixed.vocab"
    rows = space()
    rows[3] = np.nan
    np.savez(broken, names=np.array(NAMES), embeddings=rows, base=np.ones(20, dtype=bool))
    done = cli("vocab", "mix", first, broken, "-o", target)
    assert done.code == 3
    assert "broken.npz: embeddings that are not finite, rows 3 (counted from 0: 'class 3')" in done.err  # fmt: skip
    np.save(tmp_path / "t.npy", rotated(space()))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    other = ("vocab", "mix", first, tmp_path / "t.npy", "-o", target)
    assert "different text encoders" in cli(*other, "--names", tmp_path / "names.txt").err
    assert cli(*other).code == 3
    refused = cli("vocab", "mix", first, second, "-o", tmp_path / "x.txt")
    assert (refused.code, "x.vocab" in refused.err) == (3, True)
    misspelt = cli("vocab", "mix", second, first.with_name(f"x{first.name}"), "-o", target)
    assert (misspelt.code, f"did you mean {first}?" in misspelt.err) == (3, True)
    assert not target.exists()
    for wrong in ([first], [first, first], [first, second, "--weights", "1,x"]):
        assert cli("vocab", "mix", *wrong, "-o", target).code == 2
    words = ("vocab", "mix", first, second, "--weights", "1,3", "-o", target)
    assert cli(*words, "--json").data["classes"] == 20
    wanted = 0.25 * unit(space()) + 0.75 * unit(near(space()))
    np.testing.assert_allclose(Vocabulary.load(target).embeddings, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.shared
def test_the_probe_of_the_published_tables(tmp_path, repository, monkeypatch, cli):
    """Descriptions name mm-ovod's image exemplars better than names do, by our commands: 62.9 and 74.1 % of 1,203."""
    real = repository.parent / "shared" / "real_data"
    folder = tmp_path / "metadata"
    folder.mkdir()
    for file in [*(real / "class_tables").iterdir(), *(real / "clip_text_embeddings").iterdir()]:
        (folder / file.name).symlink_to(file)
    monkeypatch.setenv("PROXYDET_DATASETS", str(tmp_path))
    mixed = tmp_path / "mixed.vocab"
    assert cli("vocab", "mix", "lvis", "lvis-descriptions", "-o", mixed).code == 0
    found = {}
    for table in ("lvis", "lvis-descriptions", mixed):
        report = cli("vocab", "show", "lvis-exemplars", "--against", table, "--json").data
        assert report["shared"] == 1203
        found[str(table)] = round(100 * report["nearest_is_own"], 1)
    assert found["lvis"] == 62.9
    assert found["lvis-descriptions"] == 74.1
    # Base classes are base in every table: they have the names of the training's.
    assert sum(entry["base"] for entry in report["classes"]) >= 866
    # Of the published tables of names, no class is base by its name alone.
    trained = published_vocabulary("lvis")
    for name in ("coco", "objects365", "lvis"):
        table = published_vocabulary(name)
        alike = table.base_by_similarity(trained.base_embeddings)
        assert table.base_as(trained) == alike
