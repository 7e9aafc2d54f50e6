"""Classes of exemplars, in a world whose regions are a linear image of the texts, with a common direction and noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxydet.errors import VocabularyError
from proxydet.vocabulary.exemplars import RegionStatistics, classes_of_exemplars
from proxydet.vocabulary.vocabulary import Vocabulary

D, TRAINED, NEW = 24, 60, 12
RNG = np.random.default_rng(3)
AXES = np.linalg.qr(RNG.normal(size=(D, D)))[0]
TEXTS = RNG.normal(size=(TRAINED + NEW, 6)) @ AXES[:6]
TEXTS /= np.linalg.norm(TEXTS, axis=1, keepdims=True)
COMMON = AXES[7] * 3
NAMES = [f"class {row}" for row in range(TRAINED + NEW)]
VOCABULARY = Vocabulary.from_arrays(NAMES[:TRAINED], TEXTS[:TRAINED])


def seen(row: int, count: int, seed: int = 0) -> np.ndarray:
    """Regions of a class: (N, D)."""
    rng = np.random.default_rng([row, seed])
    noise_ND = rng.normal(size=(count, D)) * np.linspace(0.05, 0.3, D)
    # Light, pose: as large as what tells classes apart.
    noise_ND += rng.normal(size=(count, 3)) @ AXES[8:11]
    regions_ND = COMMON + TEXTS[row] * np.linspace(1.5, 0.5, D) + noise_ND
    return regions_ND / np.linalg.norm(regions_ND, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def statistics() -> RegionStatistics:
    regions = np.concatenate([seen(row, 30) for row in range(TRAINED)])
    rows = np.repeat(np.arange(TRAINED), 30)
    return RegionStatistics.from_regions(regions, rows, VOCABULARY, weights="w", temperature=50.0)


def right(vocabulary: Vocabulary, rows: list[int]) -> float:
    """The share of other regions of these classes that are named rightly."""
    scorer_CD = vocabulary.normalised() * vocabulary.scale[:, None]
    hits = [
        (seen(row, 40, seed=9) @ scorer_CD.T).argmax(axis=1) == place
        for place, row in enumerate(rows)
    ]
    return float(np.mean(hits))


def test_new_classes_are_told_apart_where_their_means_fail(statistics):
    rows = list(range(TRAINED, TRAINED + NEW))
    names = [NAMES[row] for row in rows]
    shares = {}
    for count in (1, 5, 50):
        made = classes_of_exemplars(names, [seen(row, count) for row in rows], statistics)
        assert made.counts_C.sum() >= 0.95 * count * NEW
        shares[count] = right(made.vocabulary, rows)
    means = Vocabulary.from_arrays(names, np.stack([seen(row, 5).mean(0) for row in rows]))
    assert shares[1] < shares[5] < shares[50]
    assert shares[5] > right(means, rows) + 0.1


def test_the_embedding_lies_in_the_space_of_texts_and_fusing_is_nearer(statistics):
    row = TRAINED + 1
    text = Vocabulary.from_arrays([NAMES[row]], TEXTS[[row]])
    exemplars = [seen(row, 5)]
    alone = classes_of_exemplars([NAMES[row]], exemplars, statistics).vocabulary
    fused = classes_of_exemplars([NAMES[row]], exemplars, statistics, text).vocabulary
    cosine, nearer = (float(made.normalised()[0] @ TEXTS[row]) for made in (alone, fused))
    assert 0.5 < cosine < nearer < 1


def test_wrong_boxes_among_the_exemplars_are_left_out(statistics):
    row = TRAINED
    other = int((TEXTS @ TEXTS[row]).argmin())
    mixed = np.concatenate([seen(row, 8), seen(other, 2)])
    made = classes_of_exemplars(["a"], [mixed], statistics)
    assert made.outliers[0][8:].all()
    clean = classes_of_exemplars(["a"], [mixed[:8][~made.outliers[0][:8]]], statistics)
    np.testing.assert_allclose(made.vocabulary.embeddings, clean.vocabulary.embeddings, atol=1e-6)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 9),
    copies=st.integers(1, 3),
)
def test_order_and_copies_change_nothing(statistics, seed, count, copies):
    rng = np.random.default_rng(seed)
    exemplars = seen(int(rng.integers(TRAINED + NEW)), count, seed)
    wanted = classes_of_exemplars(["a"], [exemplars], statistics)
    other = classes_of_exemplars(
        ["a"], [rng.permutation(np.repeat(exemplars, copies, axis=0))], statistics
    )
    np.testing.assert_allclose(wanted.vocabulary.embeddings, other.vocabulary.embeddings, atol=1e-5)
    assert wanted.counts_C.tolist() == other.counts_C.tolist()
    assert wanted.vocabulary.scale[0] > 0
    assert 2 * wanted.outliers[0].sum() < max(count, 1)


def test_without_annotated_regions_they_are_taken_to_vary_as_texts_do():
    some = np.concatenate([seen(row, 3) for row in range(30)])
    assumed = RegionStatistics.assumed(some, VOCABULARY, weights="w", temperature=50.0)
    rows = list(range(TRAINED, TRAINED + NEW))
    made = classes_of_exemplars([NAMES[r] for r in rows], [seen(r, 10) for r in rows], assumed)
    assert right(made.vocabulary, rows) > 0.5


def test_files_hold_all_and_damage_is_named(statistics, tmp_path):
    file = statistics.save(tmp_path / "s.npz")
    again = RegionStatistics.load(file)
    np.testing.assert_array_equal(again.texts_of(seen(1, 2), [1, 2]), statistics.texts_of(seen(1, 2), [1, 2]))  # fmt: skip
    assert again.weights == "w"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(VocabularyError, match=r"s\.npz"):
        RegionStatistics.load(file)
    arrays = dict(np.load(statistics.save(file)))
    for name, wrong in {
        "within_DD": np.full((D, D), np.nan),
        "counts_K": np.zeros(TRAINED, np.int64),
        "means_KD": arrays["means_KD"][:, :3],
    }.items():
        np.savez(file, **{**arrays, name: wrong})
        with pytest.raises(VocabularyError, match=r"s\.npz"):
            RegionStatistics.load(file)


@pytest.mark.parametrize(
    ("names", "regions", "said"),
    [
        (["a", "a "], [seen(1, 2), seen(2, 2)], "'a'"),
        (["a"], [np.zeros((0, D))], "'a'"),
        (["a"], [seen(1, 2)[:, :5]], "'a'"),
        (["a"], [np.full((2, D), np.nan)], "'a'"),
    ],
)
def test_what_cannot_be_used_is_named(statistics, names, regions, said):
    with pytest.raises(VocabularyError, match=said):
        classes_of_exemplars(names, regions, statistics)


def test_too_little_to_measure_is_refused():
    with pytest.raises(VocabularyError, match="1 training class"):
        RegionStatistics.from_regions(
            seen(1, 5), np.zeros(5, np.int64), VOCABULARY, weights="w", temperature=50.0
        )


def test_its_base_classes_stay_when_texts_are_compared(statistics):
    made = classes_of_exemplars(["a"], [seen(TRAINED, 5)], statistics).vocabulary
    assert made.base.tolist() == [True]
    # A region of the class scores as those of the training classes by their names.
    own_N = (seen(TRAINED, 40) @ made.normalised()[0]) * 50 * made.scale[0] + made.bias[0]
    names = [(seen(row, 5) @ TEXTS[row]).mean() * 50 for row in range(TRAINED)]
    assert abs(own_N.mean() - np.mean(names)) < 0.5 * np.std(np.subtract.outer(names, names))
    assert made.base_by_similarity(TEXTS[:TRAINED], 0.99).base.tolist() == [True]
    plain = Vocabulary.from_arrays(["a"], made.embeddings)
    assert plain.base_by_similarity(TEXTS[:TRAINED], 0.9999).base.tolist() == [False]
