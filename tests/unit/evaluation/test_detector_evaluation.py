"""Evaluating a detector: the same numbers for any number of processes, and no image twice."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotcoco.mask import decode
from PIL import Image
from torch import nn

from proxydet.data.dataset import DatasetConfig
from proxydet.errors import DataError, LockedError
from proxydet.evaluation import detector_evaluation
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import fusion_vocabulary, result_rows
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.manifest import read_run_records
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction, masks, rles
from proxydet.recipes import resolve_config
from proxydet.runtime.run_comparison import compare_runs
from proxydet.training.distributed import DistInfo
from proxydet.training_run import scheduled_evaluation
from proxydet.vocabulary.vocabulary import Vocabulary


def evaluate(*args: Any, **options: Any) -> Any:
    """Evaluate without intervals unless a test asks for more."""
    options.setdefault("config", EvaluationConfig(bootstrap=0))
    return detector_evaluation.evaluate(*args, **options)


class Guesser:
    """A detector whose guesses depend on nothing but the pixels of an image."""

    sides = (64, 128)

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.network = nn.Linear(2, 2)
        nn.init.ones_(self.network.weight)
        nn.init.zeros_(self.network.bias)
        self.vocabulary = vocabulary
        self.inference = InferenceConfig()
        self.seen = 0
        self.sought: Vocabulary | None = None
        self.settings: InferenceConfig | None = None

    def scaled(self, pixels: np.ndarray, _: InferenceConfig) -> np.ndarray:
        return pixels

    def predict_images(
        self, images: Sequence[np.ndarray], vocabulary: Vocabulary, settings: InferenceConfig
    ) -> list[Prediction]:
        self.sought, self.settings = vocabulary, settings
        self.seen += len(images)
        found = [self._guess(pixels, len(vocabulary)) for pixels in images]
        if settings.masks:
            return found
        return [dataclasses.replace(item, mask_probs_MSS=None) for item in found]

    def _guess(self, pixels: np.ndarray, classes: int) -> Prediction:
        draw = torch.Generator().manual_seed(int(pixels.sum()) % 2**31)
        height, width = pixels.shape[:2]
        count = 40
        corners = torch.rand(count, 2, generator=draw) * torch.tensor([width - 20, height - 20])
        boxes = torch.cat([corners, corners + 4 + 15 * torch.rand(count, 2, generator=draw)], 1)
        return Prediction(
            boxes_N4=boxes[torch.arange(count) // 2],
            scores_N=torch.rand(count, generator=draw).sort(descending=True).values,
            classes_N=torch.randint(classes, (count,), generator=draw),
            mask_probs_MSS=torch.rand(count // 2, 28, 28, generator=draw) * 0.3 + 0.4,
            mask_index_N=torch.arange(count) // 2,
            image_size=(height, width),
        )


@pytest.fixture
def dataset(tmp_path, make_set, monkeypatch) -> Path:
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    truth, _ = make_set(5, images=9, categories=4)
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for row in truth["images"]:
        row["neg_category_ids"] = [category["id"] for category in truth["categories"]]
        shape = (row["height"], row["width"], 3)
        pixels = np.random.default_rng(row["id"]).integers(0, 255, shape, dtype=np.uint8)
        row["file_name"] = f"{row['id']}.png"
        Image.fromarray(pixels).save(folder / "images" / row["file_name"])
    (folder / "val.json").write_text(json.dumps(truth))
    np.save(folder / "text.npy", np.eye(4, 6, dtype=np.float32))
    (folder / "set.toml").write_text(
        """
        name = "drawn"
        [vocabulary]
        embeddings = "text.npy"
        novel = ["thing 1"]
        [val]
        annotations = "val.json"
        images = "images"
        """
    )
    return folder / "set.toml"


@pytest.fixture
def vocabulary() -> Vocabulary:
    names = [f"thing {index}" for index in range(4)]
    return Vocabulary.from_arrays(names, np.eye(4, 6), [True, False, True, True])


@pytest.fixture
def as_rank(monkeypatch) -> Callable[[int, int], None]:
    """Make this process look like one of several."""

    def pretend(rank: int, processes: int) -> None:
        info = DistInfo(rank=rank, world_size=processes, device=torch.device("cpu"))
        monkeypatch.setattr(detector_evaluation, "current_process", lambda: info)
        monkeypatch.setattr(detector_evaluation, "wait_for_all", lambda _: None)
        monkeypatch.setattr(detector_evaluation, "broadcast_value", lambda value, _: value)

    return pretend


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_files(
    dataset, vocabulary, tmp_path, as_rank, processes
):
    alone = evaluate(Guesser(vocabulary), dataset, output=tmp_path / "alone")
    together = tmp_path / "together"
    for rank in reversed(range(processes)):
        as_rank(rank, processes)
        report = evaluate(Guesser(vocabulary), dataset, output=together)
        assert (report is None) == (rank > 0)
    assert report is not None
    assert report.to_dict() == alone.to_dict()
    for name in ("predictions.json", "identity.json"):
        assert (together / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_an_evaluation_of_a_training_that_began_with_other_settings_is_made_again(
    dataset, vocabulary, tmp_path, monkeypatch, caplog
):
    """As of a run that was killed while it predicted, and is resumed with another threshold."""
    made: list[Guesser] = []

    def detector(network: nn.Module, *, inference: InferenceConfig, **_: Any) -> Guesser:
        made.append(Guesser(vocabulary))
        made[-1].inference = inference
        return made[-1]

    monkeypatch.setattr("proxydet.training_run.Detector", detector)
    for threshold in (0.5, 0.1):
        data = f"data.description={dataset}"
        settings = (data, f"inference.score_threshold={threshold}", "evaluation.bootstrap=0")
        run = scheduled_evaluation(resolve_config("tiny", overrides=settings))
        assert run is not None
        assert "segm/AP" in run(nn.Identity(), 3, tmp_path / "step_3")
    assert [one.seen for one in made] == [9, 9]
    assert "other inference settings" in caplog.text


def test_the_main_process_chooses_the_number_format_for_all(
    dataset, vocabulary, tmp_path, as_rank, monkeypatch
):
    as_rank(1, 2)
    monkeypatch.setattr(detector_evaluation, "broadcast_value", lambda _, info: "bf16")
    guesser = Guesser(vocabulary)
    evaluate(guesser, dataset, output=tmp_path)
    assert guesser.inference.precision == "fp32"
    assert guesser.settings is not None
    assert guesser.settings.precision == "bf16"
    identity = json.loads((tmp_path / "identity.json").read_text())
    assert identity["inference settings"]["precision"] == "bf16"


def test_what_predictions_were_made_from_is_recorded(dataset, vocabulary, tmp_path, as_rank):
    for rank in (1, 0):
        as_rank(rank, 2)
        evaluate(Guesser(vocabulary), dataset, output=tmp_path / "two")
        assert (tmp_path / "two" / "manifest.json").exists() == (rank == 0)
    manifest, _ = read_run_records(tmp_path / "two")
    identity = json.loads((tmp_path / "two" / "identity.json").read_text())
    assert manifest.kind == "evaluation"
    assert manifest.digests == {
        name: identity[name] for name in ("weights", "vocabulary", "annotations")
    }
    assert manifest.configuration["split"] == "val"
    assert manifest.configuration["inference settings"] == identity["inference settings"]
    as_rank(0, 1)
    evaluate(
        Guesser(vocabulary),
        dataset,
        output=tmp_path / "one",
        config=EvaluationConfig(bootstrap=0, max_detections=10),
    )
    compared = compare_runs(tmp_path / "two", tmp_path / "one").differences
    found = {row.key: row.suspicion for row in compared if not row.key.startswith("environment.")}
    assert found == {
        "configuration.scoring.max_detections": "decides results",
        "world_size": "harmless",
    }


def test_a_finished_evaluation_does_not_predict_again(dataset, vocabulary, tmp_path):
    first, second = Guesser(vocabulary), Guesser(vocabulary)
    report = evaluate(first, dataset, output=tmp_path / "out")
    again = evaluate(second, dataset, output=tmp_path / "out")
    assert (first.seen, second.seen) == (9, 0)
    assert again.to_dict() == report.to_dict()


def test_a_stopped_evaluation_goes_on_where_it_stopped(dataset, vocabulary, tmp_path):
    class Stops(Guesser):
        def predict_images(self, *args: Any) -> list[Prediction]:
            if self.seen == 5:
                raise KeyboardInterrupt
            return super().predict_images(*args)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Stops(vocabulary), dataset, output=tmp_path / "out")
    rest = Guesser(vocabulary)
    report = evaluate(rest, dataset, output=tmp_path / "out")
    assert rest.seen == 4
    assert report.to_dict() == evaluate(Guesser(vocabulary), dataset).to_dict()


@pytest.mark.parametrize("batch_size", [2, 4, 20])
def test_any_batch_size_gives_the_same_files(dataset, vocabulary, tmp_path, batch_size):
    evaluate(Guesser(vocabulary), dataset, output=tmp_path / "one")
    config = EvaluationConfig(bootstrap=0, batch_size=batch_size)
    evaluate(Guesser(vocabulary), dataset, output=tmp_path / "many", config=config)
    one, many = (tmp_path / name / "predictions.json" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


def test_masks_are_encoded_in_other_threads_than_the_one_that_feeds_the_network(
    dataset, vocabulary, monkeypatch
):
    threads = set()

    def watched(*args: Any) -> Any:
        threads.add(threading.current_thread())
        return rles(*args)

    monkeypatch.setattr(detector_evaluation, "rles", watched)
    evaluate(Guesser(vocabulary), dataset)
    assert threads
    assert threading.current_thread() not in threads


def test_an_image_whose_result_cannot_be_encoded_is_named(dataset, vocabulary, monkeypatch, caplog):

    def fails(*_: Any) -> Any:
        raise MemoryError("too many masks")

    monkeypatch.setattr(detector_evaluation, "rles", fails)
    detector = Guesser(vocabulary)
    with pytest.raises(MemoryError, match="too many masks"):
        evaluate(detector, dataset)
    assert "image 1" in caplog.text


def test_other_weights_are_refused_in_the_same_folder(dataset, vocabulary, tmp_path):
    evaluate(Guesser(vocabulary), dataset, output=tmp_path / "out")
    other = Guesser(vocabulary)
    nn.init.zeros_(other.network.weight)
    with pytest.raises(DataError, match="made with other weights"):
        evaluate(other, dataset, output=tmp_path / "out")
    report = evaluate(other, dataset, output=tmp_path / "out", again=True)
    assert report.to_dict() == evaluate(other, dataset, output=tmp_path / "new").to_dict()


def test_the_joined_file_is_a_results_file(dataset, vocabulary, tmp_path):
    report = evaluate(Guesser(vocabulary), dataset, output=tmp_path / "out")
    elsewhere = run_evaluation(
        tmp_path / "out" / "predictions.json", dataset.parent / "val.json"
    ).report
    assert elsewhere.types["segm"].metrics == report.types["segm"].metrics
    official = run_evaluation(
        tmp_path / "out" / "predictions.json",
        dataset.parent / "val.json",
        config=EvaluationConfig(bootstrap=0, engine="lvis"),
    ).report
    assert official.types["segm"].metrics == pytest.approx(report.types["segm"].metrics, abs=1e-9)


def test_base_and_novel_are_reported(dataset, vocabulary):
    part = evaluate(Guesser(vocabulary), dataset).types["segm"]
    assert part.group("novel").categories == 1
    assert part.group("base").categories == 3


def test_boxes_only_asks_for_no_masks_and_fixed_ap_for_more_detections(dataset, vocabulary):
    detector = Guesser(vocabulary)
    evaluate(
        detector, dataset, config=EvaluationConfig(bootstrap=0, iou_types=("bbox",), fixed=True)
    )
    assert detector.settings == dataclasses.replace(
        InferenceConfig(), masks=False, max_detections=1000
    )


def test_a_second_evaluation_into_one_folder_is_refused(dataset, vocabulary, tmp_path):
    output = tmp_path / "out"

    class Watched(Guesser):
        def predict_images(self, *args: Any) -> list[Prediction]:
            assert len(list(output.glob("*.lock"))) == 1
            return super().predict_images(*args)

    evaluate(Watched(vocabulary), dataset, output=output)
    assert not list(output.glob("*.lock*"))
    hold = "import sys; from pathlib import Path; from proxydet.files import Lock\n"
    hold += "with Lock(Path(sys.argv[1])): print('held', flush=True), sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(output / "evaluation.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"in use by process {other.pid} on .* since"):
            evaluate(Guesser(vocabulary), dataset, output=output)
        other.communicate()
    assert evaluate(Guesser(vocabulary), dataset, output=output) is not None


def test_boxes_need_no_second_prediction_and_masks_do_where_there_are_none(
    dataset, vocabulary, tmp_path
):
    boxes = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
    seen = []
    for config in (boxes, boxes, None, boxes):
        detector = Guesser(vocabulary)
        report = evaluate(
            detector,
            dataset,
            output=tmp_path / "out",
            config=config or EvaluationConfig(bootstrap=0),
        )
        seen.append(detector.seen)
        assert list(report.types) == (["bbox"] if config else ["bbox", "segm"])
    assert seen == [9, 0, 9, 0]


def test_a_stopped_prediction_with_masks_keeps_them_when_boxes_are_scored(
    dataset, vocabulary, tmp_path
):
    evaluate(Guesser(vocabulary), dataset, output=tmp_path / "out")
    joined = tmp_path / "out" / "predictions.json"
    rows = [row for row in json.loads(joined.read_text()) if row["image_id"] == 100]
    line = json.dumps({"image_id": 100, "detections": rows}, separators=(",", ":"))
    (tmp_path / "out" / "part-00000.jsonl").write_text(line + "\n")
    joined.unlink()
    detector = Guesser(vocabulary)
    boxes = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
    evaluate(detector, dataset, output=tmp_path / "out", config=boxes)
    assert detector.seen == 8
    assert detector.settings is not None
    assert detector.settings.masks
    again = Guesser(vocabulary)
    assert "segm" in evaluate(again, dataset, output=tmp_path / "out").types
    assert again.seen == 0


def test_masks_that_the_ground_truth_lacks_are_neither_predicted_nor_scored(
    dataset, vocabulary, caplog
):
    annotations = dataset.parent / "val.json"
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    annotations.write_text(json.dumps(content))
    detector = Guesser(vocabulary)
    with caplog.at_level(logging.WARNING):
        report = evaluate(detector, dataset)
    assert list(report.types) == ["bbox"]
    assert report.masks_left_out == "the annotations have none"
    assert detector.settings is not None
    assert not detector.settings.masks
    (said,) = [record.getMessage() for record in caplog.records if "masks" in record.getMessage()]
    assert "drawn" in said
    masks = EvaluationConfig(bootstrap=0, iou_types=("bbox", "segm"))
    asked = Guesser(vocabulary)
    with pytest.raises(DataError, match="masks are to be scored, and the annotations"):
        evaluate(asked, dataset, config=masks)
    assert asked.seen == 0


@pytest.mark.parametrize("finds", [True, False])
def test_a_detector_of_boxes_is_scored_by_boxes_where_there_are_masks_too(
    dataset, vocabulary, finds
):
    detector = Guesser(vocabulary)
    detector.inference = dataclasses.replace(detector.inference, masks=False)
    if not finds:
        detector.predict_images = lambda images, *_: [  # type: ignore[method-assign]
            Guesser(vocabulary)._guess(pixels, 4).choose(torch.tensor([], dtype=torch.int64))
            for pixels in images
        ]
    report = evaluate(detector, dataset)
    assert list(report.types) == ["bbox"]
    assert report.masks_left_out == "the detector predicts none"
    masks = EvaluationConfig(bootstrap=0, iou_types=("segm",))
    with pytest.raises(DataError, match="predicts none"):
        evaluate(detector, dataset, config=masks)


def test_rows_keep_every_digit_and_leave_out_classes_that_the_data_has_not(vocabulary):
    pixels = np.full((48, 64, 3), 7, dtype=np.uint8)
    (prediction,) = Guesser(vocabulary).predict_images([pixels], vocabulary, InferenceConfig())
    kept = [row for row in prediction.classes_N.tolist() if row != 2]
    rows = result_rows(prediction, 5, (10, 20, None, 40))
    assert [row["category_id"] for row in rows] == [(10, 20, None, 40)[row] for row in kept]
    chosen = (prediction.classes_N != 2).nonzero().flatten()
    restored = json.loads(json.dumps(rows))
    scores = np.array([row["score"] for row in restored], dtype=np.float32)
    np.testing.assert_array_equal(scores, prediction.scores_N[chosen].numpy())
    x, y, w, h = np.array([row["bbox"] for row in restored], dtype=np.float32).T
    boxes = prediction.boxes_N4[chosen].numpy()
    np.testing.assert_array_equal(np.stack([x, y], 1), boxes[:, :2])
    np.testing.assert_array_equal(np.stack([w, h], 1), boxes[:, 2:] - boxes[:, :2])
    decoded = np.stack([decode(row["segmentation"]) for row in restored])
    np.testing.assert_array_equal(decoded.astype(bool), masks(prediction)[chosen].numpy())


def test_classes_of_the_training_keep_their_marks_and_others_get_them_by_similarity(vocabulary):
    described = vocabulary.with_base(np.ones(4, dtype=bool))
    assert fusion_vocabulary(described, vocabulary).base.tolist() == [True, False, True, True]
    others = Vocabulary.from_arrays(
        ["near base", "near novel", "far"],
        [[1, 0, 0, 0.4, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]],
    )
    assert fusion_vocabulary(others, vocabulary).base.tolist() == [True, False, False]


def test_an_image_that_cannot_be_read_is_named(dataset, vocabulary):
    broken = sorted((dataset.parent / "images").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=broken.name):
        evaluate(Guesser(vocabulary), dataset)


def test_images_are_turned_as_their_annotations_were(dataset, vocabulary, tmp_path):
    """A photograph with an EXIF turn whose annotations are for the unturned pixels."""
    expected = evaluate(Guesser(vocabulary), dataset, output=tmp_path / "plain")
    turn = Image.Exif()
    turn[0x0112] = 6
    file = sorted((dataset.parent / "images").iterdir())[0]
    with Image.open(file) as image:
        image.load()
        image.save(file, exif=turn)
    report = evaluate(Guesser(vocabulary), dataset, output=tmp_path / "turned")
    assert report.to_dict() == expected.to_dict()


def test_description_may_be_read_already(dataset, vocabulary):
    description = DatasetConfig.from_toml(dataset)
    assert evaluate(Guesser(vocabulary), description).dataset == "drawn"
