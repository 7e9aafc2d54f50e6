"""Running an exported file: what surrounds the session, which here is a made-up one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from proxydet.detector import Detector
from proxydet.errors import InputError, NumericsError, VocabularyError
from proxydet.export.exporter import _metadata
from proxydet.export.runtime import INPUTS, SEAL, OnnxDetector
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
    return OnnxDetector(session, _metadata(detector), None)


def test_the_picture_is_scaled_and_the_boxes_are_scaled_back(
    detector: Detector, tiny: ModuleType
) -> None:
    session, words = Session(), tiny.vocabulary(3)
    picture = np.zeros((200, 240, 3), np.uint8)
    found = opened(detector, session).predict(picture, words, score_threshold=0.25)
    assert tuple(session.inputs) == INPUTS
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


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_out_of_range_are_refused(
    detector: Detector, tiny: ModuleType, threshold: float
) -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(InputError, match="threshold must be 0 to 1"):
        opened(detector, Session()).predict(picture, tiny.vocabulary(3), score_threshold=threshold)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((20, 30, 3), np.float32),
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((0, 30, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_picture(
    detector: Detector, tiny: ModuleType, picture: np.ndarray
) -> None:
    with pytest.raises(InputError, match="must be uint8 of shape"):
        opened(detector, Session()).predict(picture, tiny.vocabulary(3))


def test_what_cannot_be_looked_for(detector: Detector, tiny: ModuleType) -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(VocabularyError, match="nothing says what to look for"):
        opened(detector, Session()).predict(picture)
    with pytest.raises(VocabularyError, match="have 8 dimensions, the model's have 16"):
        opened(detector, Session()).predict(picture, tiny.vocabulary(3, dimensions=8))


def test_only_the_vocabulary_that_was_exported_with_the_file_is_taken(
    detector: Detector, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tiny.vocabulary(3, seed=1), tiny.vocabulary(3, seed=2)
    (tmp_path / "model.onnx").touch()
    seal(tmp_path / "model.onnx", SEAL)

    def open_file(exported_with: Vocabulary | None) -> OnnxDetector:
        text = _metadata(detector, exported_with).to_text()
        made_up = SimpleNamespace(
            SessionOptions=SimpleNamespace,
            InferenceSession=lambda *_, **__: SimpleNamespace(
                get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={"proxydet": text})
            ),
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", made_up)
        return OnnxDetector.from_file(tmp_path / "model.onnx")

    picture = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(VocabularyError, match="there is no vocabulary beside the model"):
        open_file(own).predict(picture)
    own.save(tmp_path / "model.npz")
    assert open_file(own).vocabulary == own
    for exported_with in (other, None):
        opened = open_file(exported_with)
        assert opened.vocabulary is None
        with pytest.raises(VocabularyError, match=r"model\.npz was not exported with this model"):
            opened.predict(picture)


def test_values_that_are_not_finite_are_told(detector: Detector, tiny: ModuleType) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        opened(detector, Session(finite=False)).predict(
            np.zeros((20, 30, 3), np.uint8), tiny.vocabulary(3)
        )
