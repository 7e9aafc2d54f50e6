"""Running an exported file: what surrounds the session, which here is a made-up one, and masks in numpy."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image

from proxydet.detector import Detector
from proxydet.errors import InputError, NumericsError, VocabularyError
from proxydet.export.exporter import describe
from proxydet.export.runtime import (
    INPUTS,
    ONNX_SEAL,
    OUTPUTS,
    SCORER_INPUTS,
    OnnxDetector,
    paste,
    to_image,
)
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import seal


class Session:
    """Answers with one box, and remembers what it was asked."""

    def __init__(self, *, finite: bool = True) -> None:
        self.finite = finite
        self.inputs: dict[str, np.ndarray] = {}

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[Any]:
        self.inputs = inputs
        outputs = {
            "boxes": np.array([[10, 20, 30, 40]], np.float32),
            "scores": np.array([0.5], np.float32),
            "classes": np.array([1]),
            "masks": np.ones((1, 28, 28), np.float32),
            "mask_index": np.array([0]),
            "finite": np.bool_(self.finite),
        }
        return [outputs[name] for name in names]


def opened(detector: Detector, session: Session) -> OnnxDetector:
    return OnnxDetector(session, describe(detector), None)


def test_the_image_is_scaled_and_the_boxes_are_scaled_back(detector, tiny):
    session, words = Session(), tiny.vocabulary(3)
    image = np.zeros((200, 240, 3), np.uint8)
    found = opened(detector, session).predict(image, words, score_threshold=0.25)
    assert tuple(session.inputs) == INPUTS + SCORER_INPUTS
    assert detector.sides == (100, 160)
    assert session.inputs["image"].shape == (100, 120, 3)
    assert session.inputs["image"].dtype == np.uint8
    np.testing.assert_array_equal(session.inputs["text"], words.embeddings)
    np.testing.assert_array_equal(session.inputs["base"], words.base)
    assert session.inputs["score_threshold"].dtype == np.float32
    assert session.inputs["score_threshold"] == 0.25
    np.testing.assert_allclose(found.boxes_xyxy, [[20, 40, 60, 80]])
    assert found.labels == (words.names[1],)
    assert found.masks[0, 40:80, 20:60].mean() > 0.9


def test_an_older_file_runs_on_plain_classes_and_refuses_others(detector, tiny):
    session, words = Session(), tiny.vocabulary(3)
    metadata = dataclasses.replace(describe(detector), scorers=False)
    older, image = OnnxDetector(session, metadata, None), np.zeros((20, 30, 3), np.uint8)
    assert older.predict(image, words).labels == (words.names[1],)
    assert tuple(session.inputs) == INPUTS
    with pytest.raises(VocabularyError, match=r"0\.1\.0") as caught:
        older.predict(image, words.with_scorers(threshold=[0.5] * 3))
    assert "proxydet export" in str(caught.value.hint)


def test_the_scorers_of_the_classes_are_inputs(detector, tiny):
    session, words = Session(), tiny.vocabulary(3)
    scored = words.with_scorers(bias=[1, 2, 3], threshold=[0.5] * 3, background=[1, 0, 0])
    found = opened(detector, session).predict(np.zeros((20, 30, 3), np.uint8), scored)
    for name in SCORER_INPUTS:
        np.testing.assert_array_equal(session.inputs[name], scored.scorers[name])
    assert found.labels == (words.names[2],)  # the background stands behind


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_out_of_range_are_refused(detector, tiny, threshold):
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(InputError, match="threshold must be 0 to 1"):
        opened(detector, Session()).predict(image, tiny.vocabulary(3), score_threshold=threshold)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((20, 30, 3), np.float32),
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((0, 30, 3), np.uint8),
    ],
)
def test_arrays_of_another_shape_or_type(detector, tiny, image):
    with pytest.raises(InputError, match="uint8 of shape"):
        opened(detector, Session()).predict(image, tiny.vocabulary(3))


def test_classes_that_cannot_be_detected(detector, tiny):
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(VocabularyError, match="no classes were given"):
        opened(detector, Session()).predict(image)
    with pytest.raises(VocabularyError, match="have 8 dimensions, the model's have 16"):
        opened(detector, Session()).predict(image, tiny.vocabulary(3, dimensions=8))


def test_only_the_vocabulary_that_was_exported_with_the_file_is_taken(
    detector, tiny, tmp_path, monkeypatch
):
    own, other = tiny.vocabulary(3, seed=1), tiny.vocabulary(3, seed=2)
    (tmp_path / "model.onnx").touch()
    seal(tmp_path / "model.onnx", ONNX_SEAL)

    def open_file(exported_with: Vocabulary | None, **forged: bool) -> OnnxDetector:
        text = dataclasses.replace(describe(detector, exported_with), **forged).to_text()
        values = [SimpleNamespace(name=name) for name in (*INPUTS, *SCORER_INPUTS, *OUTPUTS)]
        made_up = SimpleNamespace(
            SessionOptions=SimpleNamespace,
            InferenceSession=lambda *_, **__: SimpleNamespace(
                get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={"proxydet": text}),
                get_inputs=lambda: values[:8],
                get_outputs=lambda: values[8:],
            ),
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", made_up)
        return OnnxDetector.from_file(tmp_path / "model.onnx")

    with pytest.raises(InputError, match=r"model\.onnx are not those"):
        open_file(own, scorers=False)
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(VocabularyError, match="there is no vocabulary next to the model"):
        open_file(own).predict(image)
    own.save(tmp_path / "model.npz")
    assert open_file(own).vocabulary == own
    for exported_with in (other, None):
        opened = open_file(exported_with)
        assert opened.vocabulary is None
        with pytest.raises(VocabularyError, match=r"model\.npz was not exported with this model"):
            opened.predict(image)


def test_values_that_are_not_finite_are_an_error(detector, tiny):
    with pytest.raises(NumericsError, match="not finite"):
        opened(detector, Session(finite=False)).predict(
            np.zeros((20, 30, 3), np.uint8), tiny.vocabulary(3)
        )


def outputs(boxes: list[list[float]]) -> dict[str, np.ndarray]:
    count = len(boxes)
    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "scores": np.linspace(0.9, 0.1, count, dtype=np.float32),
        "classes": np.arange(count) % 2,
        "masks": np.random.default_rng(0).random((max(count, 1), 28, 28), dtype=np.float32),
        "mask_index": np.arange(count),
        "finite": np.True_,
    }


def test_masks_are_pasted_as_detectron2_does():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-5, 75, (40, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 0.5], axis=1)
    boxes = np.concatenate([boxes, [[0, 0, 70, 50], [10.2, 10.2, 10.9, 40], [69, 49, 70, 50]]])
    boxes = np.clip(boxes, 0, [70, 50, 70, 50]).astype(np.float32)
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    # Smooth, as a mask head's are: where a probability is one half to the last bit, rounding decides.
    wave = np.sin(np.linspace(0, 5, 28, dtype=np.float32))
    masks = np.stack([0.5 + 0.45 * np.roll(wave, k)[:, None] * wave for k in range(len(boxes))])
    wanted = paste_masks_in_image(
        torch.from_numpy(masks), torch.from_numpy(boxes), (50, 70), threshold=0.5
    ).numpy()
    pasted = np.stack([paste(*pair, (50, 70)) for pair in zip(masks, boxes, strict=True)])
    assert wanted.any(axis=(1, 2)).sum() > 20
    assert (wanted != pasted).mean() < 1e-4


def test_boxes_are_scaled_clipped_and_dropped_where_empty():
    found = to_image(
        outputs([[10, 20, 30, 40], [5, 5, 5, 9], [90, 0, 120, 50]]), (50, 100), (100, 300), "ab"
    )
    np.testing.assert_allclose(found.boxes_xyxy, [[30, 40, 90, 80], [270, 0, 300, 100]])
    assert found.labels == ("a", "a")
    assert found.mask_index.tolist() == [0, 2]
    assert found.image_size == (100, 300)


def test_a_mask_alone_and_all_masks_are_the_same():
    found = to_image(outputs([[3, 4, 40, 30], [20, 10, 60, 45]]), (50, 70), (50, 70), "ab")
    assert found.masks.shape == (2, 50, 70)
    assert found.masks.any()
    np.testing.assert_array_equal(found.masks[1], found.mask(1))


def test_nothing_found():
    found = to_image(outputs([]), (50, 70), (100, 140), "ab")
    assert len(found) == 0
    assert found.masks.shape == (0, 100, 140)
