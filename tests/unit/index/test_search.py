"""What a search of an index finds is what the detector finds in the images."""

from __future__ import annotations

import numpy as np
import pytest

from proxydet import RegionIndex, Vocabulary
from proxydet.errors import ConfigError, DataError, VocabularyError

WORDS = ["red square", "green circle", "blue star"]


def scorers(encoder) -> Vocabulary:
    """Classes with a bias, a scale, a threshold, and one of background."""
    names = [*WORDS, "red star"]
    return Vocabulary.from_arrays(
        names,
        encoder.encode(names),
        [1, 0, 1, 0],
        bias=[0.5, 0, -0.3, 0],
        scale=[1, 0.8, 1, 1],
        threshold=[np.nan, 0.4, np.nan, np.nan],
        background=[0, 0, 0, 1],
    )


def assert_equal(hits, wanted, tolerance=1e-3):
    assert {hit.path for hit in hits} == {path for path, found in wanted.items() if len(found)}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        found, mine = wanted[hit.path], hit.found
        assert (mine.labels, mine.image_size) == (found.labels, found.image_size)
        np.testing.assert_allclose(mine.scores, found.scores, atol=tolerance)
        np.testing.assert_allclose(mine.boxes_xyxy, found.boxes_xyxy, atol=tolerance)


@pytest.mark.parametrize("one_label", [True, False])
@pytest.mark.parametrize("which", ["training", "words", "scorers"])
def test_exact_search_finds_what_the_detector_finds(
    photos, exact, detector, encoder, which, one_label
):
    classes = {"training": None, "words": WORDS, "scorers": scorers(encoder)}[which]
    index = RegionIndex(exact)
    common = {"score_threshold": 0.2, "max_detections": 40, "one_label": one_label}
    hits = index.search(classes, **common)
    wanted = {str(path): detector.predict(path, classes, **common) for path in photos.glob("*.png")}
    assert sum(map(len, wanted.values())) >= 3
    assert_equal(hits, wanted)


def test_the_best_images_come_first_and_no_more_than_asked_for(exact):
    index = RegionIndex(exact)
    everything = index.search(WORDS, score_threshold=0.1)
    assert len(everything) == len(index) == 4
    some = index.search(WORDS, score_threshold=0.1, top=2)
    assert [hit.path for hit in some] == [hit.path for hit in everything[:2]]
    assert [index.path_at(hit.number) for hit in some] == [hit.path for hit in some]
    assert index.path_at(4) is index.path_at(-1) is None


def test_a_whole_vocabulary_is_searched_in_pieces(exact, monkeypatch):
    names = [f"class {number}" for number in range(300)]
    classes = Vocabulary.from_arrays(names, np.random.default_rng(0).normal(size=(300, 64)))
    index = RegionIndex(exact)
    whole = index.search(classes, score_threshold=0.05)
    monkeypatch.setattr("proxydet.index.search._SCORES_AT_ONCE", 300 * 64)
    assert_equal(index.search(classes, score_threshold=0.05), {h.path: h.found for h in whole}, 0)
    assert len({label for hit in whole for label in hit.found.labels}) > 3


def test_a_compact_index_keeps_few_regions_and_nearly_the_scores(exact, compact, detector):
    whole, small = RegionIndex(exact), RegionIndex(compact)
    assert small.stored.regions <= 20 * len(small) < whole.stored.regions
    assert small.stored.bytes < whole.stored.bytes / 8
    best = {hit.path: hit.found for hit in whole.search(WORDS, score_threshold=0.2)}
    shared = 0
    for hit in small.search(WORDS, score_threshold=0.2):
        exactly = best[hit.path]
        # The mean of the steps stands for them, and of the regions that overlap another may be the best.
        assert abs(hit.score - float(exactly.scores[0])) < 0.06
        distance = np.abs(hit.found.boxes_xyxy[:, None] - exactly.boxes_xyxy[None]).max(-1)
        shared += int((distance.min(axis=1) < 0.05).sum())
    assert shared > 0


def test_mistakes_are_named(exact, tmp_path):
    index = RegionIndex(exact)
    with pytest.raises(VocabularyError, match="3 dimensions"):
        index.search(Vocabulary.from_arrays(["a"], np.ones((1, 3))))
    with pytest.raises(ConfigError, match="score_threshold"):
        index.search(WORDS, score_threshold=2)
    with pytest.raises(ConfigError, match="rescore"):
        index.settings(rescore=True)
    with pytest.raises(VocabularyError, match="purple"):
        index.search(["purple"])
    with pytest.raises(DataError, match="no index"):
        RegionIndex(tmp_path / "absent")


def test_approximate_search_finds_the_best_or_says_what_is_missing(exact, monkeypatch):
    index = RegionIndex(exact)
    pytest.importorskip("faiss")
    with pytest.raises(DataError, match="no approximate"):
        index.search(WORDS, approximately=True)
    tree = index.build_approximate()
    whole = index.search(WORDS, score_threshold=0.2)
    found = RegionIndex(exact).search(WORDS, score_threshold=0.2, approximately=True)
    assert_equal(found, {hit.path: hit.found for hit in whole})
    assert index.stored.verify() == []
    with tree.open("r+b") as file:
        file.seek(tree.stat().st_size // 2)
        file.write(bytes(64))
    assert len(index.stored.verify()) == 1
    with pytest.raises(DataError, match="SHA-256"):
        RegionIndex(exact).search(WORDS, approximately=True)
    assert index.build_approximate() == tree
    assert index.stored.verify() == []


def test_background_that_takes_the_best_regions_does_not_end_a_search_too_early(exact, monkeypatch):
    index = RegionIndex(exact)
    monkeypatch.setattr("proxydet.index.search._MARGIN", 0.05)  # what is rare becomes frequent
    for seed in (13, 47):
        draw = np.random.default_rng(seed)
        embeddings = draw.normal(size=(4, 64))
        embeddings[3] = embeddings[0] + 0.3 * draw.normal(size=64)  # the background: like a class
        classes = Vocabulary.from_arrays([*"abcd"], embeddings, background=[0, 0, 0, 1])
        scores = [hit.score for hit in index.search(classes, score_threshold=0.1)]
        for top in (1, 2):
            some = index.search(classes, score_threshold=0.1, top=top)
            assert [hit.score for hit in some] == scores[:top]


def test_more_like_a_region_is_a_class_of_its_embedding(exact, compact, detector):
    for path in (exact, compact):
        index = RegionIndex(path)
        hit = index.search(WORDS, score_threshold=0.1)[0]
        box = hit.found.boxes_xyxy[0]
        like = index.like(hit.path, box)
        assert index.like(hit.number, box.tolist()).to_dict() == like.to_dict()
        assert like.iou > 0.95
        np.testing.assert_allclose(like.box_xyxy, box, atol=1)
        every = index.settings(score_threshold=0.0, nms_iou=1.0, max_detections=1000)
        found = index.search_classes(like.vocabulary, every)
        (own,) = (more.found for more in found if more.path == hit.path)
        distance = np.abs(own.boxes_xyxy - np.asarray(like.box_xyxy)).max(axis=1)
        scores = np.concatenate([more.found.scores for more in found])
        assert distance.min() < 0.1
        assert own.scores[distance.argmin()] > np.median(scores)
    for image, box, what in (
        ("absent.png", [0, 0, 9, 9], "no image absent"),
        (99, [0, 0, 9, 9], "no image 99"),
        (hit.path, [0, 0, 1, 1], "IoU"),
        (hit.path, [5, 5, 1, 1], "exchanged"),
    ):
        with pytest.raises(DataError, match=what):
            index.like(image, box)
