"""What the exporter refuses, that it leaves nothing half done, and when two sets of detections count as the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from proxydet.detector import Detector
from proxydet.errors import (
    ConfigError,
    InputError,
    MissingDependencyError,
    NumericsError,
    ProxydetError,
    RuntimeEnvironmentError,
)
from proxydet.export import exporter
from proxydet.export.exporter import (
    Agreement,
    TorchProgram,
    compare,
    export_detector,
    synthetic_image,
)
from proxydet.export.runtime import OnnxDetector
from proxydet.modeling.postprocess import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary

Outputs = dict[str, np.ndarray]


class Untouched(AssertionError):
    """Raised where the exporter went on although it should have refused."""


@pytest.fixture
def no_tracing(monkeypatch) -> None:
    """Fail where work begins: what is refused must be refused before."""

    def trace(*_: object) -> None:
        raise Untouched

    monkeypatch.setattr(exporter, "trace", trace)


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.bin", {}, "does not name a format"),
        ("model.onnx", {"format": "tensorrt"}, "'tensorrt'"),
        ("model.onnx", {"opset": 99}, "operator set 99"),
        ("model.onnx", {"opset": 11}, "operator set 11"),
        ("model.onnx", {"opset": 22}, "operator set 22"),
        ("model.onnx", {"check": ["absent.jpg"]}, "absent.jpg"),
    ],
)
def test_wrong_options_are_refused_before_the_work(detector, tmp_path, name, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        export_detector(detector, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize(
    ("settings", "named"), [({"flip": True}, "augmentation"), ({"tiles": 64}, "tiles")]
)
def test_what_takes_several_runs_is_refused(detector, tmp_path, settings, named):
    with pytest.raises(ConfigError, match=named):
        export_detector(detector.with_settings(**settings), tmp_path / "model.onnx")


@pytest.mark.usefixtures("no_tracing")
def test_a_place_that_cannot_be_written_to(detector, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeEnvironmentError, match=r"model\.onnx cannot be written") as caught:
        export_detector(detector, tmp_path / "file" / "model.onnx")
    assert caught.value.exit_code == 5
    assert "--root" not in str(caught.value.hint)


@pytest.mark.usefixtures("no_tracing")
def test_a_folder_is_refused_before_the_work(detector, tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(RuntimeEnvironmentError, match="is a folder"):
        export_detector(detector, tmp_path / "model.onnx")


@pytest.mark.usefixtures("no_tracing")
def test_the_vocabulary_does_not_replace_the_model(detector, tiny, tmp_path):
    with pytest.raises(ConfigError, match="would replace the model"):
        export_detector(
            detector, tmp_path / "model.npz", format="onnx", vocabulary=tiny.vocabulary(2)
        )


class Altered:
    """The detector itself as an exported file, its outputs changed where a change is given."""

    def __init__(
        self, detector: Detector, change: Callable[[Outputs], None] = lambda _outputs: None
    ) -> None:
        self.detector, self.change = detector, change

    def run(
        self, scaled_hw3: np.ndarray, vocabulary: Vocabulary, score_threshold: float
    ) -> Outputs:
        settings = self.detector.settings(score_threshold=score_threshold, max_detections=300)
        image = torch.from_numpy(scaled_hw3).permute(2, 0, 1)
        (found,) = self.detector.network.detect([image], vocabulary, settings=settings)
        outputs = {
            "boxes": found.boxes_N4.numpy().copy(),
            "scores": found.scores_N.numpy().copy(),
            "classes": found.classes_N.numpy().copy(),
            "masks": found.mask_probs_MSS.numpy().copy(),
            "mask_index": found.mask_index_N.numpy().copy(),
        }
        self.change(outputs)
        return outputs


def stand_in(monkeypatch: pytest.MonkeyPatch, exported: object) -> None:
    """Put a made-up file in the place of the one that is written, which takes too long for a quick test."""
    monkeypatch.setattr(exporter, "trace", lambda *_: None)
    monkeypatch.setattr(exporter, "save_onnx", lambda *_: None)
    opener = SimpleNamespace(from_file=lambda _: exported)
    monkeypatch.setattr(exporter, "OnnxDetector", opener)


def test_the_vocabulary_is_written_next_to_the_file_as_it_was_given(
    detector, tiny, tmp_path, monkeypatch
):
    stand_in(monkeypatch, Altered(detector))
    words = tiny.vocabulary(4, seed=4)
    report = export_detector(
        detector, tmp_path / "shapes.onnx", vocabulary=words, check=[synthetic_image(80, 120)]
    )
    assert report.vocabulary == tmp_path / "shapes.npz"
    read = Vocabulary.load(report.vocabulary)
    assert read.names == words.names
    np.testing.assert_array_equal(read.embeddings, words.embeddings)
    np.testing.assert_array_equal(read.base, words.base)
    assert 0 < read.base.sum() < len(read)
    assert report.metadata.vocabulary_sha256 == read.digest
    trained = len(detector.vocabulary)
    assert trained != len(words)
    assert [result.classes for result in report.agreement] == [trained, 1, trained, 4]
    assert report.agreement[3].image == "image 0"


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_absent_packages_are_named_with_the_command(detector, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"package {package},") as caught:
        export_detector(detector, tmp_path / "model.onnx")
    assert "proxydet[export]" in str(caught.value.hint)


def test_running_without_onnxruntime_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        OnnxDetector.from_file(tmp_path / "model.onnx")
    assert "pip install onnxruntime" in str(caught.value.hint)


class Wrong:
    """An exported file that finds nothing."""

    def run(self, *_: object) -> dict[str, np.ndarray]:
        return {
            "boxes": np.zeros((0, 4), np.float32),
            "scores": np.zeros(0, np.float32),
            "classes": np.zeros(0, np.int64),
            "masks": np.zeros((0, 14, 14), np.float32),
            "mask_index": np.zeros(0, np.int64),
        }


def test_a_file_that_disagrees_is_not_kept(detector, tmp_path, monkeypatch):
    stand_in(monkeypatch, Wrong())
    kept = tmp_path / "model.onnx"
    kept.write_text("the file of before")
    with pytest.raises(NumericsError, match="discarded"):
        export_detector(detector, kept)
    assert kept.read_text() == "the file of before"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_vocabulary_of_an_earlier_export_is_reported(detector, tiny, tmp_path, monkeypatch):
    stand_in(monkeypatch, Altered(detector))
    tiny.vocabulary(4, seed=4).save(tmp_path / "shapes.npz")
    lines: list[str] = []
    report = export_detector(detector, tmp_path / "shapes.onnx", progress=lines.append)
    assert report.metadata.vocabulary_sha256 is None
    assert "shapes.npz is of an earlier export" in lines[-1]


def test_a_comparison_of_nothing_with_nothing_proves_nothing(tiny, tmp_path, monkeypatch):
    network = tiny.network()
    with torch.no_grad():
        network.proposal_generator.centernet_head.agn_hm.bias.fill_(-50.0)
    stand_in(monkeypatch, Wrong())
    with pytest.raises(ProxydetError, match="cannot be verified"):
        export_detector(Detector(network), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opener", [OnnxDetector.from_file, TorchProgram])
def test_files_that_cannot_be_opened(opener, tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        opener(tmp_path / "absent")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"PK\x03\x04 no model")
    with pytest.raises(InputError, match="cannot open"):
        opener(damaged)


def agreement(
    detector: Detector, tiny: ModuleType, change: Callable[[Outputs], None], threshold: float = 0.02
) -> Agreement:
    return compare(
        detector,
        Altered(detector, change),
        synthetic_image(100, 140),
        tiny.vocabulary(4),
        name="synthetic",
        score_threshold=threshold,
    )


def test_the_same_agrees_in_full(detector, tiny):
    result = agreement(detector, tiny, lambda _outputs: None)
    assert result.detections > 10
    assert result.matched == result.detections == result.exported
    assert result.share == 1.0
    assert result.good
    assert result.largest_score_difference == 0.0


def shift_boxes(outputs: Outputs) -> None:
    outputs["boxes"] += [5, 0, 5, 0]


def lower_scores(outputs: Outputs) -> None:
    outputs["scores"] -= 1e-3


def change_classes(outputs: Outputs) -> None:
    outputs["classes"] = (outputs["classes"] + 1) % 4


@pytest.mark.parametrize("change", [shift_boxes, lower_scores, change_classes])
def test_each_difference_counts(detector, tiny, change):
    result = agreement(detector, tiny, change)
    assert result.share < 0.5
    assert not result.good


def test_detections_that_are_missing_or_doubled_count(detector, tiny):
    def double(outputs: Outputs) -> None:
        for name in ("boxes", "scores", "classes", "mask_index"):
            outputs[name] = np.concatenate([outputs[name], outputs[name]])

    def halve(outputs: Outputs) -> None:
        for name in ("boxes", "scores", "classes", "mask_index"):
            outputs[name] = outputs[name][::2]

    assert agreement(detector, tiny, double).share == 0.5
    assert agreement(detector, tiny, halve).share <= 0.51


def test_masks_that_differ_are_reported(detector, tiny):
    def change(outputs: Outputs) -> None:
        outputs["masks"] = outputs["masks"] * 0.5

    result = agreement(detector, tiny, change)
    assert result.largest_mask_difference > 0.1
    assert result.share == 1.0
    assert not result.good


def test_nothing_in_both_agrees(detector, tiny):
    result = agreement(detector, tiny, lambda _outputs: None, threshold=0.9999)
    assert result.detections == 0
    assert result.good


def test_a_detection_is_matched_once_only(detector, tiny):
    class Doubled:
        """The detector, which finds everything twice."""

        sides, inference, network = detector.sides, detector.inference, None

        def detect(self, *arguments: Any, **options: Any) -> list[Prediction]:
            (found,) = detector.network.detect(*arguments, **options)
            return [found.choose(torch.arange(len(found)).repeat_interleave(2))]

    doubled = Doubled()
    doubled.network = doubled  # type: ignore[assignment]
    result = compare(
        doubled,  # type: ignore[arg-type]
        Altered(detector),  # type: ignore[arg-type]
        synthetic_image(100, 140),
        tiny.vocabulary(4),
        name="synthetic",
        score_threshold=0.02,
    )
    assert result.detections == 2 * result.exported == 2 * result.matched > 10
    assert not result.good
