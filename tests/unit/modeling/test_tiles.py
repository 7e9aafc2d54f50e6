"""Tiles of large images: where they are, and one prediction made of what is found in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction, masks
from proxydet.modeling.tiles import TileMerger, Window, tile_windows

SIZE = (400, 700)
ALL = InferenceConfig(score_threshold=0.1)
ONE_LABEL = InferenceConfig(score_threshold=0.1, agnostic_nms=True)
WHOLE = Window(0, 0, *SIZE)
LEFT, RIGHT = Window(0, 0, 400, 400), Window(0, 300, 400, 400)


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.integers(32, 900),
    st.sampled_from([0.0, 0.2, 0.5]),
)
def test_tiles_cover_the_image_and_overlap_as_asked(size, side, overlap):
    windows = tile_windows(size, side, overlap)
    assert len({(w.height, w.width) for w in windows}) == 1
    for length, places in (
        (size[0], sorted({(w.top, w.height) for w in windows})),
        (size[1], sorted({(w.left, w.width) for w in windows})),
    ):
        extent = min(side, length)
        assert places[0][0] == 0
        assert places[-1][0] + extent == length
        for (start, _), (after, _) in itertools.pairwise(places):
            assert start < after <= start + extent - int(overlap * extent) + 1
    assert len(windows) == len(set(windows))
    if max(size) <= side:
        assert windows == [Window(0, 0, *size)]


def found(window: Window, *objects, mask: float | None = 1.0) -> Prediction:
    """What a tile finds of objects (box in the image, score, class): the part of each that is in it."""
    rows = []
    for (x0, y0, x1, y1), score, kind in objects:
        box = [
            max(x0 - window.left, 0),
            max(y0 - window.top, 0),
            min(x1 - window.left, window.width),
            min(y1 - window.top, window.height),
        ]
        if box[2] > box[0] and box[3] > box[1]:
            rows.append((box, score, kind))
    rows.sort(key=lambda row: -row[1])
    count = len(rows)
    return Prediction(
        boxes_N4=torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        scores_N=torch.tensor([float(row[1]) for row in rows]),
        classes_N=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        mask_probs_MSS=None if mask is None else torch.full((count, 28, 28), mask),
        mask_index_N=torch.arange(count) if mask is not None else torch.full((count,), -1),
        image_size=(window.height, window.width),
    )


def merge(settings: InferenceConfig, *parts: tuple[Window, Prediction]) -> Prediction:
    merger = TileMerger(SIZE, settings)
    for window, prediction in parts:
        merger.add(prediction, window)
    return merger.merged()


def boxes(prediction: Prediction) -> list[list[float]]:
    return prediction.boxes_N4.round().tolist()


@pytest.mark.parametrize("settings", [ALL, ONE_LABEL])
def test_an_object_that_a_border_cuts_is_found_once(settings):
    box = (330, 50, 420, 120)
    merged = merge(
        settings,
        # The part is taken for another class, surer than the whole is for its own.
        (LEFT, found(LEFT, (box, 0.9, 1))),
        (RIGHT, found(RIGHT, (box, 0.7, 0))),
    )
    assert boxes(merged) == [list(box)]
    assert merged.classes_N.tolist() == [0]
    assert merged.image_size == SIZE


def test_objects_in_the_overlap_and_apart_from_it_are_found_once():
    objects = [
        ((310, 10, 380, 60), 0.8, 0),
        ((20, 20, 90, 90), 0.9, 1),
        ((600, 300, 690, 390), 0.7, 1),
    ]
    merged = merge(ALL, (LEFT, found(LEFT, *objects)), (RIGHT, found(RIGHT, *objects)))
    assert sorted(boxes(merged)) == sorted([list(o[0]) for o in objects])
    assert merged.scores_N.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_a_large_object_is_that_of_the_whole_image():
    box = (100, 100, 650, 300)
    merged = merge(
        ALL,
        (WHOLE, found(WHOLE, (box, 0.6, 0))),
        (LEFT, found(LEFT, (box, 0.9, 0))),
        (RIGHT, found(RIGHT, (box, 0.8, 0))),
    )
    assert boxes(merged) == [list(box)]


def test_a_small_object_in_a_large_one_of_another_class_is_kept():
    large, cut = (100, 100, 650, 300), (250, 150, 450, 250)
    merged = merge(
        ONE_LABEL,
        (WHOLE, found(WHOLE, (large, 0.6, 0))),
        (LEFT, found(LEFT, (cut, 0.9, 1))),
        (RIGHT, found(RIGHT, (cut, 0.8, 1))),
    )
    assert boxes(merged) == [list(cut), list(large)]


def test_parts_that_nothing_has_whole_become_one_object_with_one_mask():
    box = (100, 100, 650, 300)
    merged = merge(ALL, (LEFT, found(LEFT, (box, 0.9, 0))), (RIGHT, found(RIGHT, (box, 0.8, 0))))
    assert boxes(merged) == [list(box)]
    assert merged.scores_N.tolist() == pytest.approx([0.9])
    expected = np.zeros(SIZE, bool)
    expected[100:300, 100:650] = True
    (mask,) = masks(merged).numpy()
    assert np.logical_xor(mask, expected).sum() < 0.03 * expected.sum()


def test_parts_are_joined_across_both_borders_and_many_tiles():
    size, box = (900, 900), (60, 70, 850, 830)
    merger = TileMerger(size, ALL)
    for window in tile_windows(size, 400, 0.2):
        merger.add(found(window, (box, 0.5, 3), mask=None), window)
    merged = merger.merged()
    assert boxes(merged) == [list(box)]
    assert not merged.has_masks


def test_parts_of_different_objects_are_not_joined():
    merged = merge(
        ALL,
        # Another class; another height.
        (LEFT, found(LEFT, ((100, 10, 450, 60), 0.9, 0), ((100, 200, 450, 240), 0.8, 1))),
        (RIGHT, found(RIGHT, ((250, 10, 600, 60), 0.7, 1), ((250, 300, 600, 340), 0.6, 1))),
    )
    assert len(merged) == 4


def test_a_part_that_only_an_unsure_box_covers_is_kept():
    box = (330, 50, 420, 120)
    merged = merge(ALL, (LEFT, found(LEFT, (box, 0.9, 1))), (RIGHT, found(RIGHT, (box, 0.2, 0))))
    assert merged.scores_N.tolist() == pytest.approx([0.9, 0.2])


def test_what_waits_is_bounded_and_the_best_are_kept():
    settings = InferenceConfig(max_detections=5, score_threshold=0.0)
    window = Window(0, 0, 32, 32)
    merger = TileMerger((32 * 100, 32), settings)
    scores = np.random.default_rng(0).permutation(100 * 20).astype(float)
    for tile in range(100):
        own = scores[20 * tile : 20 * tile + 20]
        objects = [((10, 10, 14, 14), score / 2000, kind) for kind, score in enumerate(own)]
        merger.add(found(window, *objects), Window(32 * tile, 0, 32, 32))
        # Twice what is kept, and a tile: of 2,000 that came.
        assert len(merger) <= 2 * 16 * 5 + 20
    merged = merger.merged()
    assert merged.scores_N.tolist() == pytest.approx([(1999 - i) / 2000 for i in range(5)])
    assert len(merged.mask_probs_MSS) == 5


def test_nothing_found_is_nothing():
    assert len(merge(ALL, (LEFT, found(LEFT)), (RIGHT, found(RIGHT)))) == 0
