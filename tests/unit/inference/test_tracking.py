"""Objects of videos with the ids of their tracks."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch

from proxydet.detections import Detections
from proxydet.errors import MissingDependencyError
from proxydet.inference.jobs import predict_video
from proxydet.inference.sources import name_videos
from proxydet.inference.tracking import Tracker
from proxydet.inference.video import VideoReader
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.visualization.drawing import class_colour
from proxydet.vocabulary.vocabulary import Vocabulary

KINDS = Vocabulary.from_arrays(["car", "cup", "dog"], np.eye(3, 4))
SETTINGS = InferenceConfig(score_threshold=0.4, agnostic_nms=True)
GREY = np.full((64, 96, 3), 90, np.uint8)

Thing = tuple[float, float, int]
"""Its left edge, score and class."""


def seen(things: Sequence[Thing], row: int | None = None) -> Detections:
    """Boxes of 10 by 10 pixels, in a row for each class where none is given."""
    things = sorted(things, key=lambda thing: -thing[1])
    tops = [20.0 * (kind if row is None else row) for _, _, kind in things]
    boxes = [[x, top, x + 10, top + 10] for (x, _, _), top in zip(things, tops, strict=True)]
    count = len(things)
    prediction = Prediction(
        boxes_N4=torch.tensor(boxes).reshape(-1, 4),
        scores_N=torch.tensor([score for _, score, _ in things]),
        classes_N=torch.tensor([kind for _, _, kind in things], dtype=torch.int64),
        mask_probs_MSS=None,
        mask_index_N=torch.full((count,), -1),
        image_size=GREY.shape[:2],
    )
    return Detections(prediction, KINDS.names)


def ids(tracker: Tracker, frames: Sequence[Sequence[Thing]], pixels=None, every=1) -> list[dict]:
    """By class, the ids that are reported of each frame."""
    out = []
    for index, things in enumerate(frames):
        shown = GREY if pixels is None else pixels[index]
        found = tracker.update(seen(things), shown, index * every / 10)
        out.append({item.class_id: item.track_id for item in found})
    return out


@pytest.fixture(autouse=True)
def library(request) -> None:
    if "missing" not in request.node.name:
        pytest.importorskip("trackers")


@pytest.fixture
def tracker() -> Tracker:
    return Tracker(KINDS, SETTINGS, Fraction(10))


def test_an_object_keeps_its_id_and_each_has_its_own(tracker):
    frames = [[(2.0 * i, 0.9, 0), (60 - 2.0 * i, 0.8, 1)] for i in range(8)]
    found = ids(tracker, frames)
    assert found[0] == {0: None, 1: None}, "seen once is no track yet"
    assert found[1].keys() == {0, 1}
    assert sorted(found[1].values()) == [1, 2]
    assert all(frame == found[1] for frame in found[1:])


def test_an_object_out_of_sight_for_a_moment_keeps_its_id_and_not_for_longer(tracker):
    visible = [*range(5), *range(9, 12), *range(40, 44)]
    frames = [[(30.0, 0.9, 0)] if i in visible else [] for i in range(44)]
    found = ids(tracker, frames)
    assert {found[i][0] for i in range(9, 12)} == {found[1][0]}
    assert found[43][0] not in (None, found[1][0])


def test_faint_detections_keep_the_track_and_are_not_reported(tracker):
    frames = [[(4.0 * i, 0.9 if i < 3 or i > 16 else 0.3, 0)] for i in range(20)]
    found = ids(tracker, frames)
    assert all(frame == {} for frame in found[3:17])
    assert found[17] == found[1] != {}
    # Without them it is another object: it moved on for longer than it may be out of sight.
    other = Tracker(KINDS, SETTINGS, Fraction(10))
    blind = ids(other, [frame if frame[0][1] > 0.4 else [] for frame in frames])
    assert blind[19] != blind[1]


def test_what_is_reported_is_what_is_found_without_tracking(tracker):
    things = [(5.0, 0.9, 0), (40.0, 0.41, 1), (70.0, 0.39, 2)]
    found = tracker.update(seen(things), GREY, 0.0)
    assert found.labels == ("car", "cup")
    np.testing.assert_array_equal(found.boxes_xyxy, seen(things).above(0.4).boxes_xyxy)
    assert tracker.detecting.score_threshold == pytest.approx(0.2)


def test_thresholds_of_classes_hold():
    own = KINDS.with_scorers(threshold=np.array([np.nan, 0.1, 0.8]))
    tracker = Tracker(own, SETTINGS, Fraction(10))
    frames = [[(5.0, 0.5, 0), (40.0, 0.2, 1), (70.0, 0.7, 2)]] * 3
    # Below its class's threshold an object keeps its track, and begins none.
    frames += [[(5.0, 0.3, 0), (40.0, 0.06, 1), (70.0, 0.9, 2)]] * 14
    found = ids(tracker, frames + frames[:3])
    assert found[0] == {0: None, 1: None}
    assert found[1] == found[2] == found[17] == found[19] != {}
    assert None not in found[1].values()
    assert [frame.keys() for frame in found[3:17]] == [{2}] * 14
    # The detector's own filter lets faint detections pass.
    np.testing.assert_allclose(tracker.vocabulary.threshold, [np.nan, 0.05, 0.4])
    assert Tracker(KINDS, SETTINGS, Fraction(10)).vocabulary is KINDS


def test_with_one_label_an_object_keeps_its_id_when_its_label_changes():
    def relabelled(tracker: Tracker) -> list[int | None]:
        found = []
        for index in range(8):
            (item,) = tracker.update(seen([(10.0, 0.9, index // 4)], row=0), GREY, index / 10)
            found.append(item.track_id)
        return found

    together = relabelled(Tracker(KINDS, SETTINGS, Fraction(10)))
    assert together[1:] == [1] * 7
    every_label = InferenceConfig(score_threshold=0.4)
    apart = relabelled(Tracker(KINDS, every_label, Fraction(10)))
    assert apart == [None, 1, 1, 1, None, 2, 2, 2]


def test_a_cut_ends_all_tracks_and_a_change_of_light_does_not(tracker):
    bright = np.clip(GREY.astype(int) + 3, 0, 255).astype(np.uint8)
    other = np.random.default_rng(0).integers(0, 256, GREY.shape, np.uint8)
    pixels = [GREY, GREY, bright, bright, other, other, other]
    found = ids(tracker, [[(30.0, 0.9, 0)]] * 7, pixels)
    assert [frame[0] for frame in found] == [None, 1, 1, 1, None, 2, 2]


def test_frames_far_apart_are_tracked_by_their_times():
    # Each fifth of ten frames a second: an object may be away for three of them.
    tracker = Tracker(KINDS, SETTINGS, Fraction(2))
    frames = [[(30.0, 0.9, 0)] if i not in (4, 5) else [] for i in range(9)]
    found = ids(tracker, frames, every=5)
    assert {frame[0] for frame in found[1:4] + found[6:]} == {1}


def test_a_video_is_saved_with_its_tracks(bars, make, tmp_path):
    (video,) = name_videos([make()])
    options = {"vocabulary": bars.vocabulary, "settings": SETTINGS, "output": tmp_path / "out"}
    predict_video(bars, video, kinds=["json", "csv", "images"], track=True, every=2, **options)
    lines = [json.loads(line) for line in (tmp_path / "out/clip.jsonl").read_text().splitlines()]
    assert [line["detections"][0]["track_id"] for line in lines] == [None, *[1] * 11]
    with (tmp_path / "out/clip.csv").open(newline="") as file:
        assert [row["track_id"] for row in csv.DictReader(file)] == ["", *["1"] * 11]
    with VideoReader(tmp_path / "out/clip.mp4") as drawn:
        last = list(drawn)[-1].pixels
    x0, y0, _, y1 = (round(v) for v in lines[-1]["detections"][0]["box_xyxy"])
    edge = last[y0 + 4 : y1 - 4, x0 : x0 + 2].reshape(-1, 3).mean(axis=0)
    assert np.abs(edge - class_colour(0)).max() < 70
    # In Python; and without tracking there are no ids.
    (*_, result) = bars.predict_video(make(), track=True, score_threshold=0.4)
    assert result.found.track_ids.tolist() == [1]
    assert result.found.to_supervision().tracker_id.tolist() == [1]
    assert result.found.to_pandas()["track_id"].tolist() == [1]
    (*_, result) = bars.predict_video(make())
    assert result.found.track_ids is None
    assert "track_id" not in result.found.to_dict()["detections"][0]


def test_ids_stay_with_their_detections():
    found = seen([(5.0, 0.9, 0), (40.0, 0.6, 1), (70.0, 0.5, 2)]).tracked(np.array([4, -1, 7]))
    assert found.above(0.55).track_ids.tolist() == [4, -1]
    assert found.of("dog").track_ids.tolist() == [7]
    assert [item.track_id for item in found] == [4, None, 7]
    assert [entry["track_id"] for entry in found.to_dict()["detections"]] == [4, None, 7]


def test_a_missing_package_is_named_with_its_command(bars, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(MissingDependencyError, match="trackers") as raised:
        bars.predict_video(make(), track=True)
    assert "proxydet[track]" in raised.value.hint
