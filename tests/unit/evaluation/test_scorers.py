"""Thresholds of classes that are learned from annotated images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from proxydet.data.sources import open_config
from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.analysis import calibrate as calibration_of
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_split
from proxydet.evaluation.scorers import ScoreCalibration, ScoreParts, calibrate_vocabulary
from proxydet.evaluation.split import DescribedSplit
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.models import PUBLISHED_MODELS
from proxydet.vocabulary.vocabulary import Vocabulary

NAMES = ["cup", "mug", "jar"]
IMAGES = 24
BOXES = EvaluationConfig(bootstrap=0, iou_types=("bbox",))


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def test_the_calibration_finds_slope_and_offsets_again():
    draw = np.random.default_rng(0)
    class_S, logit_S = draw.integers(0, 3, 6000), draw.normal(0, 1.5, 6000)
    offset_C = np.array([-1.0, 0.0, 1.0, 9.0])
    right_S = draw.random(6000) < sigmoid(1.5 * logit_S + offset_C[class_S])
    fitted = ScoreCalibration.fit(sigmoid(logit_S), class_S, right_S, 4)
    assert fitted.slope == pytest.approx(1.5, abs=0.1)
    np.testing.assert_allclose(fitted.offset_C[:3], offset_C[:3], atol=0.15)
    # Without detections a class has what the classes share; with one it lies near that.
    assert fitted.offset_C[3] == pytest.approx(fitted.shared, abs=1e-6)
    assert fitted.thresholds(0.5)[3:] == pytest.approx([sigmoid(-fitted.shared / fitted.slope)] * 2)
    thresholds = fitted.thresholds(0.5)
    assert thresholds[0] > thresholds[1] > thresholds[2]
    one_S = np.append(class_S, 3), np.append(right_S, False), np.append(sigmoid(logit_S), 0.5)
    near = ScoreCalibration.fit(one_S[2], one_S[0], one_S[1], 4)
    assert near.shared - near.spread < near.offset_C[3] < near.shared


@pytest.mark.parametrize("right", [True, False])
def test_detections_that_are_all_right_or_all_wrong_make_finite_thresholds(right):
    score_S, class_S = np.linspace(0.1, 0.9, 9), np.arange(9) % 2
    fitted = ScoreCalibration.fit(score_S, class_S, np.full(9, right), 3)
    thresholds = fitted.thresholds(0.5)
    assert np.isfinite(thresholds).all()
    assert (thresholds < 0.5).all() if right else (thresholds > 0.5).all()


class Known:
    """Finds the object of each image at its place; where else, and how it scores, is the class's."""

    sides = (64, 64)

    def __init__(self) -> None:
        self.network = nn.Linear(2, 2)
        self.network.device = torch.device("cpu")
        self.vocabulary = Vocabulary.from_arrays(NAMES, np.eye(3, 4))
        self.inference = InferenceConfig(masks=False)
        self.asked: list[dict[str, Any]] = []

    def with_settings(self, **changes: Any) -> Known:
        self.asked.append(changes)
        return self

    def with_base(self, vocabulary: Vocabulary, _threshold: float = 0.9) -> Vocabulary:
        return vocabulary

    def resolve(self, names: list[str]) -> Vocabulary:
        return Vocabulary.from_arrays(names, np.eye(len(names), 4))

    def scaled(self, pixels: np.ndarray, _: InferenceConfig) -> np.ndarray:
        return pixels

    def predict_images(
        self, images: Sequence[np.ndarray], vocabulary: Vocabulary, settings: InferenceConfig
    ) -> list[Prediction]:
        assert np.isnan(vocabulary.threshold).all()
        return [self._found(int(pixels[0, 0, 0]), len(vocabulary)) for pixels in images]

    def _found(self, number: int, classes: int) -> Prediction:
        here, there = [8.0, 8, 28, 28], [36.0, 36, 56, 56]
        kind, shade = number % 2, number / IMAGES
        # Cups are right above 0.6 and wrong below; mugs right above 0.2. A jar is never right.
        right, wrong = ((0.6, 0.3), (0.2, 0.06))[kind]
        rows = [
            (here, right + 0.1 + 0.1 * shade, kind),
            (there, wrong + 0.1 * shade, kind),
        ]
        rows = [row for row in rows if row[2] < classes]
        rows.sort(key=lambda row: -row[1])
        boxes, scores, kinds = zip(*rows, strict=True) if rows else ([], [], [])
        return Prediction(
            boxes_N4=torch.tensor(boxes).reshape(-1, 4),
            scores_N=torch.tensor(scores),
            classes_N=torch.tensor(kinds, dtype=torch.int64),
            mask_probs_MSS=None,
            mask_index_N=torch.full((len(rows),), -1),
            image_size=(64, 64),
        )


@pytest.fixture
def annotated(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for index, name in enumerate(["cup", "mug", "spoon"]):
        content["categories"].append({"id": index + 1, "name": name})
    for number in range(IMAGES):
        file = f"{number:02}.png"
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(tmp_path / file)
        content["images"].append({"id": number + 1, "height": 64, "width": 64, "file_name": file})
        box = {"bbox": [8, 8, 20, 20], "area": 400, "iscrowd": 0, "category_id": number % 2 + 1}
        content["annotations"].append({"id": number + 1, "image_id": number + 1, **box})
    path = tmp_path / "few.json"
    path.write_text(json.dumps(content))
    return path


def opened(path: Path) -> DescribedSplit:
    return DescribedSplit.open(open_config(path), "train")


def test_each_class_gets_the_threshold_that_parts_right_from_wrong(annotated, tmp_path):
    detector, words = Known(), Vocabulary.from_arrays(NAMES, np.eye(3, 4), bias=[1, 2, 3])
    report = calibrate_vocabulary(detector, opened(annotated), words)
    assert detector.asked == [{"agnostic_nms": True, "masks": False}]
    cup, mug, jar = report.classes
    assert 0.4 < cup.threshold < 0.7
    assert 0.16 < mug.threshold < 0.3
    assert [entry.basis for entry in report.classes] == ["own", "own", "shared"]
    assert mug.threshold < jar.threshold < cup.threshold
    assert (cup.objects, cup.right, cup.wrong) == (12, 12, 0)
    assert cup.wrong_before > 0
    assert (mug.right, mug.wrong) == (12, 0)
    before, after, elsewhere = report.points
    assert after.precision == after.recall == 1
    assert before.precision < 1
    assert elsewhere.right + elsewhere.wrong > 20  # each learned from other images
    assert report.not_asked == ("spoon",)
    saved = Vocabulary.load(report.vocabulary.save(tmp_path / "own.vocab"))
    assert saved.names == words.names
    assert saved.bias.tolist() == [1, 2, 3]
    np.testing.assert_allclose(saved.threshold, [c.threshold for c in report.classes], rtol=1e-6)
    strict = calibrate_vocabulary(detector, opened(annotated), words, precision=0.99)
    assert strict.points[1].precision >= 0.99
    half = calibrate_vocabulary(detector, opened(annotated), words, keep=0.5)
    assert 12 <= half.points[1].right < 20


class Mistaken(Known):
    """Scores what is wrong higher than what is right."""

    def _found(self, number: int, classes: int) -> Prediction:
        found = super()._found(number, classes)
        return dataclasses.replace(found, boxes_N4=found.boxes_N4.flip(0))


def test_a_precision_that_no_threshold_reaches_is_reported(annotated, calibrate, monkeypatch):
    words = Vocabulary.from_arrays(NAMES, np.eye(3, 4))
    assert not calibrate_vocabulary(Mistaken(), opened(annotated), words, precision=0.9).reached
    assert calibrate_vocabulary(Known(), opened(annotated), words, precision=0.9).reached
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: Mistaken())
    options = ["--data", "few.json", "-o", "own.vocab", "--precision", "0.9"]
    code, _, err = calibrate(*options)
    assert code == 0
    assert "warning" in err
    assert "0.9" in err
    code, out, _ = calibrate(*options, "--yes", "--json")
    assert json.loads(out)["precision_reached"] is False


class Noisy(Known):
    """Scores mean nothing."""

    def _found(self, number: int, classes: int) -> Prediction:
        found = super()._found(number, classes)
        draw = np.random.default_rng(number)
        order = torch.from_numpy(draw.permutation(len(found)))
        scores = torch.from_numpy(np.sort(draw.uniform(0.4, 0.9, len(found)))[::-1].copy())
        return dataclasses.replace(found, boxes_N4=found.boxes_N4[order], scores_N=scores)


def test_what_is_worse_on_other_images_is_not_saved(annotated, calibrate, monkeypatch):
    had = [np.nan, 0.45, np.nan]
    words = Vocabulary.from_arrays(NAMES, np.eye(3, 4), threshold=had)
    report = calibrate_vocabulary(Noisy(), opened(annotated), words)
    general, _, elsewhere = report.points
    assert elsewhere.right + elsewhere.wrong < general.right + general.wrong
    assert (report.worse, report.saved) == (True, False)
    np.testing.assert_allclose(report.vocabulary.threshold, had)
    forced = calibrate_vocabulary(Noisy(), opened(annotated), words, even_if_worse=True)
    assert (forced.worse, forced.saved) == (True, True)
    assert np.isfinite(forced.vocabulary.threshold).all()
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: Noisy())
    options = ["--data", "few.json", "-o", "own.vocab"]
    code, _, err = calibrate(*options)
    assert (code, "--even-if-worse" in err) == (0, True)
    assert Vocabulary.load("own.vocab").plain
    _, out, _ = calibrate(*options, "--even-if-worse", "--json")
    assert json.loads(out)["thresholds_saved"] is True
    assert not Vocabulary.load("own.vocab").plain


def made_up_parts(count: int, classes: int) -> ScoreParts:
    draw = np.random.default_rng(1)
    return ScoreParts(
        class_S=draw.integers(0, classes, count),
        logit_KS=torch.from_numpy(draw.normal(0, 2, (2, count))),
        mixup_S=torch.from_numpy(draw.normal(0, 0.5, count)),
        rest_KS=torch.zeros(3, count, dtype=torch.float64),
        proposal_S=torch.from_numpy(draw.uniform(0.5, 1, count)),
        share_S=torch.full((count,), 0.3, dtype=torch.float64),
    )


def test_scores_are_fitted_to_what_is_right():
    parts = made_up_parts(9000, 3)
    scale_C, bias_C = np.array([1.3, 1.3, 1.3, 1.3]), np.array([-1.0, 0.0, 1.0, 9.0])
    own = [torch.from_numpy(values)[parts.class_S] for values in (scale_C, bias_C)]
    chance_S = parts.log_scores(*own).exp().numpy()
    right_S = np.random.default_rng(2).random(len(chance_S)) < chance_S
    found = parts.fit(right_S, np.ones(len(right_S), dtype=bool), 4, 1.3)
    np.testing.assert_allclose(found[0][:3], scale_C[:3], atol=0.2)
    np.testing.assert_allclose(found[1][:3], bias_C[:3], atol=0.2)
    # Without detections a class has what the classes share; with few it is near that.
    assert -0.6 < found[1][3] < 0.6
    few_S = (parts.class_S != 2) | (np.cumsum(parts.class_S == 2) <= 5)
    near = parts.fit(right_S, few_S, 4, 1.3)
    assert near[1][3] - 0.5 < near[1][2] < found[1][2]
    # Within a class logits keep their order, and a calibrated score is what it says.
    fitted = [torch.from_numpy(values)[parts.class_S] for values in found]
    score_S = parts.log_scores(*fitted).exp().numpy()
    for low in (0.1, 0.3, 0.5, 0.7):
        inside = (score_S > low) & (score_S < low + 0.2)
        assert right_S[inside].mean() == pytest.approx(score_S[inside].mean(), abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"rescore": True, "alpha": 0.4}])
def test_calibrated_scores_are_those_of_the_detector(detector, tmp_path, monkeypatch, settings):
    """Half of what a random detector finds is annotated, so that scores can be right."""
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    detector = detector.with_settings(max_detections=6, **settings)
    draw, content = np.random.default_rng(4), {"images": [], "annotations": [], "categories": []}
    words = detector.vocabulary
    for row, name in enumerate(words.names):
        content["categories"].append({"id": row + 1, "name": name})
    for number in range(10):
        pixels = draw.integers(0, 256, (60, 80, 3), np.uint8)
        file = {"id": number + 1, "height": 60, "width": 80, "file_name": f"{number}.png"}
        Image.fromarray(pixels).save(tmp_path / file["file_name"])
        content["images"].append(file)
        for item in list(detector.predict(pixels, score_threshold=0.02))[::2]:
            x0, y0, x1, y1 = map(float, item.box_xyxy)
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            kind = {"category_id": words.names.index(item.label) + 1, "image_id": number + 1}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **box, **kind})
    path = tmp_path / "few.json"
    path.write_text(json.dumps(content))
    split = DescribedSplit.open(open_config(path), "train", protocol="coco")
    one_label = detector.with_settings(agnostic_nms=True, masks=False)
    found = evaluate_split(one_label, split, vocabulary=words, config=BOXES)
    parts = ScoreParts.of_detections(one_label, split, words, found.main)
    same = torch.ones(len(parts.class_S)), torch.zeros(len(parts.class_S))
    score_S = found.main.selection.score_S
    np.testing.assert_allclose(parts.log_scores(*same).exp(), score_S, atol=1e-4)
    report = calibrate_vocabulary(detector, split, words, scores=True, even_if_worse=True)
    assert report.scores.saved
    assert len(set(report.vocabulary.scale.tolist())) > 1
    again = evaluate_split(one_label, split, vocabulary=report.vocabulary, config=BOXES)
    parts = ScoreParts.of_detections(one_label, split, report.vocabulary, again.main)
    same = torch.ones(len(parts.class_S)), torch.zeros(len(parts.class_S))
    score_S = again.main.selection.score_S
    np.testing.assert_allclose(parts.log_scores(*same).exp(), score_S, atol=1e-4)
    before = calibration_of(found.main.matches).error
    assert report.scores.error_before == pytest.approx(before)
    kept = calibrate_vocabulary(detector, split, words, scores=True)
    assert kept.scores.error == report.scores.error
    assert kept.scores.saved == (kept.vocabulary.scale != 1).any()


def test_scores_of_few_images_are_not_calibrated(annotated):
    content = json.loads(annotated.read_text())
    content["images"] = content["images"][:8]
    content["annotations"] = content["annotations"][:8]
    annotated.write_text(json.dumps(content))
    with pytest.raises(DataError, match="8 images"):
        calibrate_vocabulary(Known(), opened(annotated), Known().vocabulary, scores=True)


def test_wrong_classes_and_nothing_found_are_named(annotated):
    detector = Known()
    with pytest.raises(DataError, match="'fork'"):
        calibrate_vocabulary(
            detector, opened(annotated), Vocabulary.from_arrays(["fork"], [[1.0, 0, 0, 0]])
        )
    for scores in (False, True):
        with pytest.raises(DataError, match="'spoon'"):
            calibrate_vocabulary(
                detector,
                opened(annotated),
                Vocabulary.from_arrays(["spoon"], [[1.0, 0, 0, 0]]),
                scores=scores,
            )
    for precision in (0.0, 1.0):
        with pytest.raises(ConfigError, match=str(precision)):
            calibrate_vocabulary(
                detector, opened(annotated), detector.vocabulary, precision=precision
            )


@pytest.fixture
def calibrate(cli, monkeypatch, annotated):
    monkeypatch.setattr("proxydet.models.locate_published", Path)
    monkeypatch.setattr("proxydet.models.trained_classes", lambda _: Known())
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: Known())
    monkeypatch.chdir(annotated.parent)
    return lambda *words: cli("vocab", "calibrate", "-v", "cup, mug, jar", *words)


def test_the_command_prints_a_table_and_saves_the_vocabulary(calibrate):
    code, out, err = calibrate("--data", "few.json", "-o", "own.vocab")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["class", *NAMES]
    assert "its own" in lines[1]
    assert "it has none" in lines[3]
    assert sum("thresholds of the classes" in line for line in lines) == 1
    assert "'spoon'" in err
    saved = Vocabulary.load("own.vocab")
    assert saved.names == tuple(NAMES)
    assert np.isfinite(saved.threshold).all()
    code, out, _ = calibrate("--data", "few.json", "-o", "again.npz", "--json")
    content = json.loads(out)
    assert [row["threshold"] for row in content["classes"]] == pytest.approx(saved.threshold)
    assert len(content["operating_points"]) == 3


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--data", "few.json", "-o", "own.txt"], "own.txt"),
        (["--data", "few.json", "-o", "own.vocab", "--split", "test"], "test"),
        (["--data", "absent.json", "-o", "own.vocab"], "absent.json"),
    ],
)
def test_mistakes_write_nothing(calibrate, words, what):
    code, _, err = calibrate(*words)
    assert code == 3
    assert what in err
    assert not Path("own.vocab").exists()


@pytest.mark.parametrize(
    ("words", "settings", "what"),
    [
        (["--precision", "0"], {}, "precision"),
        (["--precision", "1"], {}, "precision"),
        (["--keep", "0"], {}, "keep"),
        (["--keep", "1"], {}, "keep"),
        (["--scores"], {}, "8 images"),
        (["--scores"], {"tiles": 800}, "inference.tiles"),
        (["--scores"], {"flip": True}, "inference.flip"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_detector_is_opened(
    calibrate, annotated, monkeypatch, words, settings, what
):
    content = json.loads(annotated.read_text())
    if not settings:
        content["images"], content["annotations"] = (
            content["images"][:8],
            content["annotations"][:8],
        )
    annotated.write_text(json.dumps(content))
    started: list[Any] = []
    monkeypatch.setattr(
        "proxydet.detector.open_named", lambda *_, **__: started.append(1) or Known()
    )
    named = dataclasses.replace(
        PUBLISHED_MODELS["proxydet-r50-inl"], inference=InferenceConfig(**settings)
    )
    monkeypatch.setattr("proxydet.models.settings_of", lambda _: named)
    code, _, err = calibrate("--data", "few.json", "-o", "own.vocab", *words)
    assert (code, started) == (3, [])
    assert what in err


def test_two_aims_at_once_are_a_wrong_command_line(cli, tmp_path):
    words = ["-v", "cup", "--data", "absent.json", "-o", str(tmp_path / "x.vocab")]
    code, _, err = cli("vocab", "calibrate", *words, "--precision", "0.9", "--keep", "0.9")
    assert code == 2
    assert "--keep" in err
