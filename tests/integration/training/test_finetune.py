"""A fine-tuning from beginning to report: exact after a crash, on two processes, with and without masks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proxydet.config import load_mapping
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.detector import Detector
from proxydet.errors import CheckpointError, ConfigError
from proxydet.finetune import finetune_config
from proxydet.manifest import read_run_records
from proxydet.models import find_detector
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.runfolder import RunFolder
from proxydet.training.train import train
from proxydet.training_run import finished_run, run_training, scheduled_evaluation

pytestmark = pytest.mark.slow

QUICK = (
    "training.log.tensorboard=false",
    "training.threads=1",
    "evaluation.bootstrap=0",
    "data.workers=0",
    "training.schedule.warmup_iterations=0",
)


@pytest.fixture(scope="module")
def start(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    config = resolve_config("tiny", None, [*drawn, *QUICK, "training.iterations=4"])
    train(config, output=folder)
    return folder


@pytest.fixture(scope="module")
def pets(drawn, tmp_path_factory) -> Path:
    """Write a data set of three of the classes, on the validation images; one of them by another name."""
    folder = tmp_path_factory.mktemp("pets")
    source = Path(drawn[0].partition("=")[2])
    document = json.loads((source.parent / "lvis_val.json").read_text())
    known = Dataset(config=DatasetConfig.from_toml(source)).vocabulary
    used = sorted({entry["category_id"] for entry in document["annotations"]})[:3]
    names = {c["id"]: c["name"] for c in document["categories"] if c["id"] in used}
    document = {
        "images": [{k: v for k, v in i.items() if "_ids" not in k} for i in document["images"]],
        "annotations": [a for a in document["annotations"] if a["category_id"] in used],
        "categories": [
            {"id": number, "name": "wug" if number == used[0] else names[number]} for number in used
        ],
    }
    (folder / "a.json").write_text(json.dumps(document))
    rows = known.subset([names[number] for number in used]).embeddings
    np.save(folder / "e.npy", rows)
    split = f'annotations = "a.json"\nimages = "{source.parent / "val"}"\n'
    path = folder / "pets.toml"
    path.write_text(
        f'name = "pets"\n[vocabulary]\nembeddings = "e.npy"\n[train]\n{split}[val]\n{split}'
    )
    return path


def configured(start: Path, pets: Path, *more: str, epochs: float = 4) -> RunConfig:
    named = find_detector(run=start, weights=None, config=None)
    overrides = [*QUICK, "training.evaluation.patience=null", *more]
    return finetune_config(named, pets, overrides=overrides, epochs=epochs)[0]


def test_a_finetuning_ends_with_a_report_and_any_words(start, pets, tmp_path):
    config = configured(start, pets)
    result = run_training(config, output=tmp_path / "run")
    report = result.finetune
    assert report == json.loads((tmp_path / "run/finetune.json").read_text())
    assert "<table" in (tmp_path / "run/finetune.html").read_text()
    assert report["own"]["before"] == result.evaluations[0]
    assert report["own"]["iteration"] == result.best.iteration
    part = report["kept"]["types"]["bbox"]
    own = set(report["own"]["classes"])
    assert part["classes"] == len(part["by_class"]) > 3
    assert not {row["name"] for row in part["by_class"]} & own
    again = finished_run(RunFolder(result.folder), config)
    assert (again.finetune, again.best) == (report, result.best)
    # Version 0.1 did not write which images were asked for.
    (result.folder / "finetune.json").write_text(
        json.dumps({key: value for key, value in report.items() if key != "keep_check"})
    )
    assert finished_run(RunFolder(result.folder), config) is not None
    # Other images to check on are measured, whatever predictions the folder holds.
    other = dataclasses.replace(config.training.finetune, keep_check=pets)
    other = dataclasses.replace(
        config, training=dataclasses.replace(config.training, finetune=other)
    )
    assert finished_run(RunFolder(result.folder), other) is None
    checked = run_training(other, output=result.folder).finetune
    assert checked["kept"]["data"] == str(pets)
    assert sorted(path.name[:5] for path in (result.folder / "forgetting").iterdir()) == [
        "finet",
        "start",
    ]
    detector = Detector.from_run(result.folder)
    assert detector.vocabulary.names == tuple(report["own"]["classes"])
    old = Detector.from_run(start).vocabulary
    names = [name for name, base in zip(old.names, old.base, strict=True) if base]
    asked = detector.resolve([*names, "red spotted disc"])
    assert asked.base[: len(names)].all(), "what was base in the start is base in the fusion"
    frozen = [
        name for name, _ in detector.network.named_parameters() if name.startswith("backbone.")
    ]
    before = Detector.from_run(start).network.state_dict()
    after = detector.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_crash_changes_nothing_and_needs_no_starting_detector(start, pets, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(start, gone)
    config = configured(
        gone, pets, "training.freeze=[proposal_generator.]", "training.checkpoints.period=2"
    )
    train(config, output=tmp_path / "whole", evaluate=scheduled_evaluation(config))

    def crash(network: torch.nn.Module, at: int, folder: Path) -> dict[str, float]:
        if at == 4:
            raise ZeroDivisionError
        return evaluate(network, at, folder)

    evaluate = scheduled_evaluation(config)
    with pytest.raises(ZeroDivisionError):
        train(config, output=tmp_path / "cut", evaluate=crash)
    gone.rename(tmp_path / "elsewhere")
    resumed = resolve_config(None, tmp_path / "cut/config.yaml")
    train(resumed, output=tmp_path / "cut", evaluate=evaluate)
    for name in ("model_final", "model_best", "model_start"):
        left, right = (
            (tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "cut")
        )
        assert left == right, name
    for name in ("vocabulary.npz", "text_encoder.json"):
        left, right = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        assert left == right, name
    left, right = (read_run_records(tmp_path / run)[0].digests for run in ("whole", "cut"))
    assert left == right
    assert "text encoder" in right


def test_two_processes(start, pets, tmp_path):
    words = ["--finetune", start, "--data", pets, "--epochs", "3", "--gpus", "2", "--device", "cpu"]
    words += ["--output", tmp_path / "run", *(word for item in QUICK for word in ("--set", item))]
    done = subprocess.run(
        [sys.executable, "-m", "proxydet_cli", "train", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 epochs of 4 images" in done.stderr
    assert "classes that were not trained" in done.stdout
    report = json.loads((tmp_path / "run/finetune.json").read_text())
    assert report["kept"]["how"] == "ap"
    assert load_mapping(tmp_path / "run/config.yaml")["training"]["replicas"] == 2


def test_without_annotated_images_of_other_classes_objects_are_counted(start, pets, tmp_path):
    lone = tmp_path / "start"
    shutil.copytree(start, lone)
    (lone / "manifest.json").unlink()
    config = (lone / "config.yaml").read_text()
    description = str(load_mapping(lone / "config.yaml")["data"]["description"])
    (lone / "config.yaml").write_text(config.replace(description, "/absent.toml"))
    report = run_training(configured(lone, pets, epochs=1), output=tmp_path / "run").finetune
    assert report["kept"]["how"] == "probe"
    assert "absent.toml" in report["kept"]["why"]
    assert report["kept"]["images"] == 4
    assert report["kept"]["found_after"] <= report["kept"]["found_before"]


def test_masks_that_one_side_lacks(start, pets, drawn, tmp_path, caplog):
    boxes = tmp_path / "boxes"
    train(
        resolve_config("tiny", None, [*drawn, *QUICK, "training.iterations=1", "data.masks=false"]),
        output=boxes,
    )
    train(configured(boxes, pets, epochs=0.5), output=tmp_path / "from_boxes")
    assert "without a mask head" in caplog.text
    asked = configured(boxes, pets, "data.masks=true", epochs=0.5)
    with pytest.raises(ConfigError, match=r"model\.masks"):
        train(asked, output=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    fresh = configured(boxes, pets, "model.masks={}", epochs=0.5)
    with pytest.raises(CheckpointError, match="mask_head") as caught:
        train(fresh, output=tmp_path / "refused")
    assert "training.ignore_in_weights" in str(caught.value.hint)
    document = json.loads((pets.parent / "a.json").read_text())
    for entry in document["annotations"]:
        del entry["segmentation"]
    folder = tmp_path / "plain"
    shutil.copytree(pets.parent, folder)
    (folder / "a.json").write_text(json.dumps(document))
    train(configured(start, folder / pets.name, epochs=0.5), output=tmp_path / "to_boxes")
    assert "the weights of its mask head are not used" in caplog.text
