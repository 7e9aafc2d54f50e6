"""The detector: pictures of every kind in, the same answers however they come in."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from proxydet.detections import Detections
from proxydet.detector import Detector, choose_device
from proxydet.errors import (
    ConfigError,
    DataError,
    InputError,
    RuntimeEnvironmentError,
    VocabularyError,
)
from proxydet.vocabulary.compositional import CompositionalEncoder


def assert_same(first: Detections, second: Detections) -> None:
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.labels == second.labels
    assert first.rles == second.rles


def predict(detector: Detector, image: object, vocabulary: object = None) -> Detections:
    found = detector.predict(image, vocabulary, score_threshold=0.02)  # type: ignore[arg-type]
    assert len(found) > 0
    return found


def test_a_file_a_picture_and_an_array_are_the_same(detector, pictures, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pictures[0]).save(path)
    wanted = predict(detector, pictures[0])
    assert_same(predict(detector, path), wanted)
    assert_same(predict(detector, str(path)), wanted)
    assert_same(predict(detector, Image.open(path)), wanted)
    bgr = detector.predict(pictures[0][:, :, ::-1], score_threshold=0.02, channel_order="bgr")
    assert_same(bgr, wanted)


def test_boxes_are_in_the_pixels_of_the_given_picture(detector, pictures):
    found = predict(detector, pictures[4])
    assert found.image_size == (30, 90)
    assert found.boxes_xyxy[:, 0::2].max() <= 90
    assert found.boxes_xyxy[:, 1::2].max() <= 30
    assert found.masks.shape[1:] == (30, 90)


def test_photographs_are_turned_upright(detector, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(pictures[0]).save(path, exif=exif)
    assert_same(predict(detector, path), predict(detector, np.rot90(pictures[0], k=-1).copy()))
    assert_same(predict(detector, Image.open(path)), predict(detector, path))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
def test_pictures_of_any_mode_are_looked_at(detector, mode):
    found = detector.predict(Image.new(mode, (50, 40), 1))
    assert found.image_size == (40, 50)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_and_thinnest_pictures_are_looked_at(detector, size):
    found = detector.predict(np.full((*size, 3), 200, np.uint8), score_threshold=0.0)
    assert found.image_size == size


def test_a_batch_of_mixed_sizes_gives_what_single_pictures_give(detector, pictures):
    together = detector.predict_batch(pictures, score_threshold=0.02, batch_size=4)
    assert len(together) == len(pictures)
    for picture, found in zip(pictures, together, strict=True):
        alone = predict(detector, picture)
        assert alone.labels == found.labels
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes_xyxy, found.boxes_xyxy, atol=1e-3)


def test_an_empty_batch_is_an_empty_list(detector):
    assert detector.predict_batch([]) == []


def test_a_higher_threshold_only_leaves_out(detector, pictures):
    low = detector.predict(pictures[0], score_threshold=0.02, one_label=False)
    middle = float(np.median(low.scores))
    high = detector.predict(pictures[0], score_threshold=middle, one_label=False)
    assert 0 < len(high) < len(low)
    assert_same(high, low.above(middle))
    best = detector.predict(pictures[0], score_threshold=0.02, max_detections=3, one_label=False)
    assert_same(best, low.top(3))


def test_names_are_embedded_and_split_by_the_published_rule(detector):
    vocabulary = detector.vocabulary_of(["red circle", "blue circle", "green square"])
    # "blue circle" is a class of the training, but a novel one.
    assert vocabulary.base.tolist() == [True, False, False]
    assert detector.resolve(["red circle", "blue circle", "green square"]) == vocabulary
    assert detector.with_base(vocabulary, threshold=-1.0).base.all()


def test_a_vocabulary_object_is_taken_as_it_is(detector):
    novel = detector.vocabulary_of(["red circle"]).with_base([False])
    assert detector.resolve(novel) is novel


def test_a_vocabulary_file_is_split_by_the_rule(detector, tmp_path):
    path = (
        detector.vocabulary_of(["red circle", "red star"])
        .with_base([False, True])
        .save(tmp_path / "a.npz")
    )
    for given in (path, str(path)):
        assert detector.resolve(given).base.tolist() == [True, False]


def test_the_vocabulary_decides_the_labels_and_leaves_no_trace(detector, pictures):
    before = predict(detector, pictures[0])
    other = predict(detector, pictures[0], ["green square", "red star"])
    assert set(other.labels) <= {"green square", "red star"}
    assert_same(predict(detector, pictures[0]), before)
    assert_same(predict(detector, pictures[0], detector.vocabulary), before)


def test_threads_with_vocabularies_of_their_own_do_not_meet(detector, pictures):
    vocabularies = [
        ["green square"],
        ["red star", "blue star"],
        None,
        ["blue square", "red circle"],
    ]
    wanted = [predict(detector, pictures[0], v) for v in vocabularies]
    found: dict[int, list[Detections]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        for _ in range(3):
            found[i].append(predict(detector, pictures[0], vocabularies[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answers in found.items():
        assert len(answers) == 3
        for answer in answers:
            assert_same(answer, wanted[i])


def test_settings_are_changed_on_a_copy(detector, pictures):
    bare = detector.with_settings(masks=False)
    assert not bare.predict(pictures[0], score_threshold=0.02).has_masks
    assert detector.predict(pictures[0], score_threshold=0.02).has_masks
    one = detector.with_settings(one_class_per_proposal=True).predict(
        pictures[0], score_threshold=0.0
    )
    assert len(np.unique(one.boxes_xyxy, axis=0)) == len(one)
    with pytest.raises(ConfigError, match="mask"):
        detector.with_settings(mask=False)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        [[1, 2]],
        None,
    ],
)
def test_arrays_of_another_kind_are_refused(detector, array):
    with pytest.raises(InputError, match="array"):
        detector.predict(array)  # type: ignore[arg-type]


def test_bad_input_is_named(detector, tmp_path, pictures):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        detector.predict(broken)
    with pytest.raises(DataError, match=r"absent\.jpg"):
        detector.predict(tmp_path / "absent.jpg")
    with pytest.raises(VocabularyError, match="duplicate"):
        detector.predict(pictures[0], ["red star", "red star "])
    with pytest.raises(VocabularyError, match="giraffe"):
        detector.predict(pictures[0], ["giraffe"])
    with pytest.raises(InputError, match="neither"):
        detector.predict(pictures[0], "red star")
    with pytest.raises(ConfigError, match="score_threshold"):
        detector.predict(pictures[0], score_threshold=1.5)
    with pytest.raises(ConfigError, match="batch_size"):
        detector.predict_batch(pictures, batch_size=0)
    with pytest.raises(InputError, match="several"):
        detector.predict_batch("photo.jpg")
    with pytest.raises(ConfigError, match="channel_order"):
        detector.predict(pictures[0], channel_order="gbr")  # type: ignore[arg-type]


def test_devices_that_are_not_there_are_refused():
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(RuntimeEnvironmentError, match="cuda:99") as caught:
        choose_device("cuda:99")
    assert caught.value.exit_code == 5
    # Not torch's list of twenty kinds.
    with pytest.raises(ConfigError, match=r"^unknown device 'toaster'$"):
        choose_device("toaster")


def test_threads_open_the_text_encoder_once(network, encoder, monkeypatch):
    both, opened = threading.Barrier(2), []

    def slow(source: object) -> CompositionalEncoder:
        opened.append(source)
        # Comes through at once where a second thread is in here too.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return encoder

    monkeypatch.setattr("proxydet.vocabulary.encoder.open_encoder", slow)
    opening = Detector(network)
    with ThreadPoolExecutor(2) as pool:
        got = [pool.submit(lambda: opening.encoder) for _ in range(2)]
        assert all(future.result() is encoder for future in got)
    assert len(opened) == 1


def test_threads_prepare_the_network_once(network, pictures, monkeypatch):
    both, prepare, made = threading.Barrier(2), type(network).prepared, []

    def slow(self: object, precision: str) -> object:
        made.append(precision)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return prepare(self, precision)

    monkeypatch.setattr(type(network), "prepared", slow)
    shared = Detector(network, shortest=64, longest=96)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(shared.predict, [pictures[0]] * 2))
    assert_same(*found)
    assert made == ["fp32"]


def test_background_classes_take_boxes_and_are_not_reported(detector, pictures):
    names = ["green square", "red star", "blue star", "blue circle", "red square", "green circle"]
    options = {"score_threshold": 0.02, "one_label": False}
    every = detector.predict(pictures[0], names, **options)
    others = [every.labels[0]]
    words = [name for name in names if name not in others]
    asked = detector.with_background(detector.resolve(words), others, margin=0)
    found = detector.predict(pictures[0], asked, **options)
    assert set(found.labels) <= set(words)
    assert found.scores.tolist() != every.of(*words).scores.tolist()
    assert (found.class_ids < len(words)).all()
    (batch,) = detector.predict_batch([pictures[0]], words, background=others, **options)
    assert_same(batch, detector.predict(pictures[0], detector.resolve(words, others), **options))
    # With one label a box it is a class as all others, left out at the end.
    best = detector.predict(pictures[0], names, score_threshold=0.02)
    words = [name for name in names if name != best.labels[0]]
    asked = detector.with_background(detector.resolve(words), [best.labels[0]], margin=0)
    left = detector.predict(pictures[0], asked, score_threshold=0.02)
    assert sorted(left.labels) == sorted(best.of(*words).labels)
    # By a margin, unless it has biases of its own.
    assert detector.resolve(words, others).bias.tolist() == [0.0] * len(words) + [-1.0]
    own = detector.resolve(others).with_scorers(bias=[0.5])
    assert detector.resolve(words, own).bias.tolist() == [0.0] * len(words) + [0.5]
    calibrated = detector.resolve(others).with_scorers(threshold=[0.5])
    assert detector.resolve(words, calibrated).bias.tolist() == [0.0] * len(words) + [-1.0]
    # Asked for again, it stays as it is.
    again = detector.resolve(detector.resolve(words, own), others)
    assert again == detector.resolve(words, own)
    training = detector.resolve(["red circle", "green square"], background="training")
    assert detector.resolve(training, background="training") == training
    assert training.reported == ("red circle", "green square")
    assert set(training.names) == {"green square", *detector.vocabulary.names}
    for nothing_left in ("training", detector.vocabulary):
        with pytest.raises(VocabularyError):
            detector.resolve(None, background=nothing_left)
    with pytest.raises(VocabularyError, match="'red star'"):
        detector.predict(pictures[0], ["red star"], background=["red star"])
