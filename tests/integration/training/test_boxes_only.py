"""Own data with boxes and without masks: trained, evaluated, used and exported with no key set."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from proxydet import Detector
from proxydet.errors import CheckpointError, ConfigError
from proxydet_cli.main import main

pytestmark = pytest.mark.usefixtures("unplotted")

Run = Callable[..., tuple[int, str, str]]
TRAIN = ("train", "--recipe", "tiny", "--device", "cpu", "--gpus", "1")
SET = ("--set", "training.iterations=2", "--set", "data.image_labels=null")
SIZE = (64, 96)


def write_data(folder: Path, *, masks: tuple[bool, ...]) -> Path:
    """Write images with one object each, every one with a mask or without, as training and validation data."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index, with_mask in enumerate(masks):
        x, y, side = 8 + 4 * index, 6 + 3 * index, 30
        pixels = np.full((*SIZE, 3), 200, np.uint8)
        pixels[y : y + side, x : x + side] = (220, 40, 40 * index)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 96})
        outline = [x, y, x + side, y, x + side, y + side, x, y + side]
        annotations.append(
            {"id": index + 1, "image_id": index, "category_id": 1 + index % 2, "iscrowd": 0}
            | {"bbox": [x, y, side, side], "area": side * side}
            | ({"segmentation": [outline]} if with_mask else {})
        )
    categories = [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    np.save(folder / "text.npy", np.eye(2, 16, dtype=np.float32))
    split = 'annotations = "all.json"\nimages = "images"\n'
    (folder / "data.toml").write_text(
        f'name = "fruit"\n[vocabulary]\nembeddings = "text.npy"\n[train]\n{split}[val]\n{split}'
    )
    return folder / "data.toml"


def call(*words: object) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def run(capsys) -> Run:
    def captured(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(*words)
        return code, *capsys.readouterr()

    return captured


def train(data: Path, output: Path) -> Path:
    """Train for two steps, before the tests' own cache folder is set; what stderr showed is kept next to the run."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as shown:
        patch.setenv("PROXYDET_CACHE", str(data.parent / "cache"))
        assert call(*TRAIN, *SET, "--data", data, "--output", output) == 0
    (data.parent / "stderr.txt").write_text(shown.getvalue())
    return output


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("boxes"), masks=(False,) * 4)


@pytest.fixture(scope="module")
def trained(boxes) -> Path:
    """A run on boxes, trained by the command line."""
    return train(boxes, boxes.parent / "run")


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """A run on data where every second object has a mask."""
    data = write_data(tmp_path_factory.mktemp("masked"), masks=(True, False) * 2)
    return train(data, data.parent / "run")


def test_a_dry_run_says_what_will_be_trained(run, boxes):
    words = (*TRAIN, "--data", boxes, "--output", boxes.parent / "dry", "--dry-run")
    code, out, _ = run(*words, "--set", "data.image_labels=null", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["configuration"]["data"]["masks"] is False
    assert plan["configuration"]["model"]["masks"] is None
    assert len(plan["notes"]) == 1
    assert "all.json" in plan["notes"][0]


def test_boxes_alone_train_a_detector_of_boxes(run, boxes, trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["data"]["masks"] is False
    assert config["model"]["masks"] is None
    (evaluation,) = (trained / "evaluations.jsonl").read_text().splitlines()
    metrics = json.loads(evaluation)["metrics"]
    assert "bbox/AP" in metrics
    assert not any(name.startswith("segm") for name in metrics)
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    assert not [name for name in weights if "mask" in name]
    shown = (boxes.parent / "stderr.txt").read_text().splitlines()
    assert len([line for line in shown if "mask" in line]) == 1
    again = (*TRAIN, *SET, "--data", boxes, "--output", trained, "--dry-run")
    assert run(*again)[0] == 0
    assert run(*again, "--set", "data.masks=false")[0] == 0
    elsewhere = (*again[:-2], trained.with_name("masks"), "--dry-run")
    assert run(*elsewhere, "--set", "data.masks=true")[0] == 3


def test_such_a_detector_gives_boxes_only(run, boxes, trained):
    photo = boxes.parent / "images" / "0.png"
    detector = Detector.from_run(trained, device="cpu")
    found = detector.predict(photo, score_threshold=0.0)
    assert len(found) > 0
    assert not found.has_masks
    assert not found.above(1.0).has_masks
    with pytest.raises(ConfigError, match="mask head"):
        detector.with_settings(masks=True)
    words = ("predict", photo, "--run", trained, "--device", "cpu", "--score-threshold", "0.0")
    code, out, _ = run(*words, "--json")
    assert code == 0
    (image,) = json.loads(out)["images"]
    assert len(image["detections"]) == len(found)
    assert not any("mask" in item for item in image["detections"])
    code, _, err = run(*words, "--masks", "--json")
    assert code == 3
    assert "mask head" in err


def test_its_boxes_are_evaluated_and_masks_are_refused(run, trained, tmp_path):
    words = ("eval", "--run", trained, "--device", "cpu", "--bootstrap", "0", "--gpus", "1")
    assert run(*words, "--output", tmp_path / "out")[0] == 0
    scores = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(scores["results"]) == ["bbox"]
    assert run(*words, "--iou-type", "segm", "--output", tmp_path / "masks")[0] == 3
    assert not (tmp_path / "masks" / "predictions").exists()


def test_objects_without_a_mask_train_boxes_beside_those_with(run, masked):
    config = yaml.safe_load((masked / "config.yaml").read_text())
    assert config["data"]["masks"] is True
    assert config["model"]["masks"]["pool_size"] == 14
    record = json.loads((masked / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["losses"]["loss_mask"] > 0
    assert "segm/AP" in json.loads((masked / "evaluations.jsonl").read_text())["metrics"]
    data = masked.parent / "data.toml"
    code, out, _ = run(*TRAIN, *SET, "--data", data, "--output", masked, "--dry-run", "--json")
    assert code == 0
    (note,) = json.loads(out)["notes"]
    assert "2 of 4 objects" in note


def test_weights_of_a_mask_model_start_boxes_and_the_other_way_names_the_head(
    run, boxes, trained, masked, tmp_path
):
    quick = (*TRAIN, *SET, "--set", "training.evaluation.at_end=false")
    quick = (*quick, "--set", "model.classifier.embedding_dim=16")
    weights = masked / "model_final.pth"
    code, _, err = run(
        *quick, "--data", boxes, "--weights", weights, "--output", tmp_path / "boxes"
    )
    assert code == 0
    assert "mask head are not used" in err
    weights, data = trained / "model_final.pth", masked.parent / "data.toml"
    code, _, err = run(*quick, "--data", data, "--weights", weights, "--output", tmp_path / "masks")
    assert code == 3
    assert "roi_heads.mask_head." in err
    with pytest.raises(CheckpointError, match=r"roi_heads\.mask_head"):
        Detector.from_checkpoint(weights, config=masked / "config.yaml", device="cpu")


def test_a_run_of_boxes_whose_weights_hold_an_untrained_mask_head_gives_boxes(
    boxes, masked, tmp_path
):
    """As version 0.1 wrote them: ``data.masks`` false, and a mask head all the same."""
    for name in ("model_final.pth", "vocabulary.npz"):
        (tmp_path / name).write_bytes((masked / name).read_bytes())
    config = yaml.safe_load((masked / "config.yaml").read_text())
    config["data"]["masks"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    detector = Detector.from_run(tmp_path, device="cpu")
    found = detector.predict(boxes.parent / "images" / "0.png", score_threshold=0.0)
    assert len(found) > 0
    assert not found.has_masks
    with pytest.raises(ConfigError, match="mask head"):
        detector.with_settings(masks=True)


@pytest.mark.slow
def test_such_a_detector_is_exported_without_masks(run, boxes, trained, tmp_path):
    from proxydet.export.runtime import OnnxDetector

    for name in ("boxes.onnx", "boxes.pt2"):
        code, out, err = run("export", "--run", trained, "--output", tmp_path / name)
        assert code == 0, err
        assert "boxes only" in out
    exported = OnnxDetector.from_file(tmp_path / "boxes.onnx")
    assert not exported.metadata.masks
    wanted = Detector.from_run(trained, device="cpu").predict(
        boxes.parent / "images" / "0.png", score_threshold=0.02
    )
    vocabulary = Detector.from_run(trained, device="cpu").vocabulary
    found = exported.predict(boxes.parent / "images" / "0.png", vocabulary, score_threshold=0.02)
    assert not found.has_masks
    np.testing.assert_allclose(found.boxes_xyxy, wanted.boxes_xyxy, atol=0.01)
