"""What a vocabulary's classes resemble."""

from __future__ import annotations

import numpy as np
import pytest

from proxydet.errors import VocabularyError
from proxydet.vocabulary import comparison
from proxydet.vocabulary.comparison import compare
from proxydet.vocabulary.vocabulary import Vocabulary


@pytest.fixture
def reference() -> Vocabulary:
    rows = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])
    return Vocabulary.from_arrays(["cat", "dog", "bird"], rows, [True, True, False])


def test_base_is_decided_by_the_nearest_base_class(reference):
    rows = [[1, 0.1, 0], [0, 0.1, 1], [1, 1, 0]]
    report = compare(
        Vocabulary.from_arrays(["kitten", "robin", "mix"], rows), reference, neighbours=2
    )
    kitten, robin, mix = report.classes
    assert kitten.base
    assert [near.name for near in kitten.nearest] == ["cat", "dog"]
    assert "'cat' is above 0.9" in kitten.reason
    # Nearest to a novel class, which does not make it base.
    assert not robin.base
    assert robin.nearest[0].name == "bird"
    assert not robin.nearest[0].base
    assert "'dog' is not above 0.9" in robin.reason
    assert not mix.base
    assert mix.nearest[0].cosine == pytest.approx(np.sqrt(0.5), rel=1e-5)
    assert (
        compare(Vocabulary.from_arrays(["mix"], [[1, 1, 0]]), reference, threshold=0.7)
        .classes[0]
        .base
    )


def test_classes_too_alike_are_paired_once(reference, monkeypatch):
    monkeypatch.setattr(comparison, "_ROWS", 2)
    rows = [[1, 0, 0], [0, 1, 0], [1, 0.01, 0], [0, 1, 0.2], [1, 0, 0.02]]
    report = compare(Vocabulary.from_arrays(list("abcde"), rows), reference, alike_above=0.95)
    pairs = [(pair.first, pair.second) for pair in report.alike]
    assert set(pairs) == {("a", "c"), ("a", "e"), ("c", "e"), ("b", "d")}
    assert len(report.classes) == 5
    cosines = [pair.cosine for pair in report.alike]
    assert cosines == sorted(cosines, reverse=True)


def test_other_encoders_and_references_without_base_are_refused(reference):
    with pytest.raises(VocabularyError, match="dimensions"):
        compare(Vocabulary.from_arrays(["a"], [[1.0, 2]]), reference)
    with pytest.raises(VocabularyError, match="no base class"):
        compare(reference, reference.with_base([False] * 3))
