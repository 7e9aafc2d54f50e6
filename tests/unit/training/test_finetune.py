"""``train --finetune`` as far as it goes without training: what it chooses by the data, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proxydet.config import dump_yaml
from proxydet.errors import ConfigError, DataError, InputError, VocabularyError
from proxydet.finetune import finetune_config
from proxydet.models import NamedDetector, find_detector
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.runfolder import RunFolder
from proxydet.training_run import finetune_report, report_text
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_safetensors

ROWS = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
KNOWN = ("cup", "mug", "dog")


@pytest.fixture
def start(tmp_path) -> NamedDetector:
    """Write what the configuration of a fine-tuning reads of a run."""
    run = tmp_path / "start"
    run.mkdir()
    (run / "config.yaml").write_text(
        dump_yaml(resolve_config("tiny", None, ["training.optimizer.learning_rate=0.004"]))
    )
    Vocabulary.from_arrays(KNOWN, ROWS[:3]).save(run / "vocabulary.npz")
    (run / "model_final.safetensors").touch()
    return find_detector(run=run, weights=None, config=None)


@pytest.fixture
def write(tmp_path):
    """Write a data set of so many images with boxes of the named classes."""

    def write_data(
        images: int, names: tuple[str, ...] = ("cat", "hen"), rows: Any = None, **more: str
    ) -> Path:
        folder = tmp_path / f"data{images}"
        folder.mkdir(exist_ok=True)
        numbers = range(1, images + 1)
        document = {
            "images": [
                {"id": n, "width": 9, "height": 9, "file_name": f"{n}.png"} for n in numbers
            ],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 1 + n % len(names), "bbox": [1, 1, 4, 4]}
                for n in numbers
            ],
            "categories": [{"id": row, "name": name} for row, name in enumerate(names, 1)],
        }
        (folder / "a.json").write_text(json.dumps(document))
        np.save(folder / "e.npy", ROWS[3 : 3 + len(names)] if rows is None else rows)
        vocabulary = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
        split = 'annotations = "a.json"\nimages = "."\n'
        path = folder / "pets.toml"
        path.write_text(
            f'name = "pets"\n[vocabulary]\nembeddings = "e.npy"\n{vocabulary}[train]\n{split}[val]\n{split}'
        )
        return path

    return write_data


def chosen(start: NamedDetector, data: Path, **options: Any) -> tuple[RunConfig, dict[str, str]]:
    config, reasons = finetune_config(start, data, **options)
    return config, {reason.key: reason.why for reason in reasons}


@pytest.mark.parametrize(
    ("images", "epochs", "period"), [(10, 100, 25), (40, 50, 50), (500, 12, 250)]
)
def test_the_length_follows_from_the_size_of_the_data(start, write, images, epochs, period):
    config, reasons = chosen(start, write(images))
    training = config.training
    assert training.iterations == epochs * images / 2  # the tiny recipe's batches have 2 images
    assert reasons["training.iterations"].startswith(f"{epochs} epochs of {images} images, 2 an ")
    assert training.evaluation.period == training.checkpoints.period == period
    assert (training.evaluation.at_start, training.checkpoints.best_weights) == (True, True)
    assert training.evaluation.patience == 5
    assert 10 <= training.schedule.warmup_iterations <= training.iterations // 10
    assert 0.89 < training.ema.decay < 1


def test_settings_are_the_starting_detectors_unless_they_are_given(start, write, tmp_path):
    data = write(10)
    config, reasons = chosen(start, data, epochs=3, overrides=["training.ema.decay=null", "seed=3"])
    assert config.training.weights == tmp_path / "start/model_final.safetensors"
    assert config.training.finetune.start == str(tmp_path / "start")
    assert (config.recipe, config.data.description) == ("tiny", data)
    assert config.training.optimizer.learning_rate == pytest.approx(0.001)
    assert (config.training.iterations, config.seed, config.training.ema.decay) == (15, 3, None)
    assert "--epochs 3" in reasons["training.iterations"]
    assert reasons["training.ema.decay"] == "--set"
    assert reasons["training.optimizer.learning_rate"] != "--set"


def test_a_repository_chooses_no_code_no_logger_and_no_path(start, write, caplog):
    sets = [
        "losses.criterion=evilmod:Mine",
        "training.log.loggers=[wandb, 'evilmod:Log']",
        "data.cache=/elsewhere",
    ]
    assert start.run is not None
    path, data = start.run / "config.yaml", write(10)
    path.write_text(dump_yaml(resolve_config("tiny", None, sets)))
    stranger = dataclasses.replace(start, repository="ann/shapes")
    config, _ = chosen(stranger, data)
    assert (config.losses.criterion, config.training.log.loggers, config.data.cache) == (
        None,
        (),
        None,
    )
    assert "evilmod:Mine" in caplog.text
    path.write_text(
        dump_yaml(resolve_config("tiny", None, ["model.backbone.kind=mod\u00fcle:Mine"]))
    )
    with pytest.raises(InputError, match="mod\u00fcle:Mine"):
        chosen(stranger, data)


def test_without_validation_images_nothing_stops_early(start, write):
    data = write(10)
    data.write_text(data.read_text().partition("[val]")[0])
    config, reasons = chosen(start, data)
    assert (config.training.evaluation.patience, config.training.checkpoints.best_weights) == (
        None,
        False,
    )
    assert "no [val] table" in reasons["training.evaluation.patience"]


def test_classes_that_the_start_knows_are_reported(start, write):
    _, reasons = chosen(start, write(10, ("cup", "hen"), ROWS[[0, 3]]))
    assert "1 of 2 classes" in reasons["classes"]


@pytest.mark.parametrize(
    ("names", "rows", "words"),
    [
        (("cat", "hen"), ROWS[3:5, :32], "have 32 dimensions"),
        (("cat", "hen"), np.eye(64, dtype=np.float32)[:2], "--closed"),
        (("mug", "hen"), ROWS[3:5], r"both have \(mug\)"),
    ],
)
def test_embeddings_of_another_encoder_are_refused(start, write, names, rows, words):
    data = write(10, names, rows)
    with pytest.raises(VocabularyError, match=words) as caught:
        finetune_config(start, data)
    assert caught.value.path == data.parent / "e.npy"
    assert "proxydet vocab build" in str(caught.value.hint)


def test_another_encoder_than_the_starting_detectors_is_refused(start, write, tmp_path):
    own, other = tmp_path / "start/text_encoder.json", tmp_path / "other.json"
    own.write_text("{}")
    other.write_text("{ }")
    with pytest.raises(VocabularyError, match=r"other\.json") as caught:
        finetune_config(start, write(10, encoder=str(other)))
    assert f"--encoder {own}" in str(caught.value.hint)
    other.write_text("{}")
    finetune_config(start, write(10, encoder=str(other)))


def test_data_that_cannot_be_used_are_refused(start, write, tmp_path):
    data = write(10)
    with pytest.raises(ConfigError, match="epochs"):
        finetune_config(start, data, epochs=0)
    with pytest.raises(ConfigError, match="own configuration"):
        finetune_config(start, data, recipe="small")
    with pytest.raises(DataError, match="absent"):
        finetune_config(start, data, keep_check=tmp_path / "absent.toml")
    (data.parent / "e.npy").unlink()
    with pytest.raises(VocabularyError, match=r"e\.npy"):
        finetune_config(start, data)
    empty = write(3)
    (empty.parent / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match=r"a\.json"):
        finetune_config(start, empty)
    bare = empty.parent / "bare.toml"
    bare.write_text('name = "bare"\n[train]\nannotations = "a.json"\nimages = "."\n')
    with pytest.raises(DataError, match="no text embeddings"):
        finetune_config(start, bare)
    (tmp_path / "start/model_final.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        finetune_config(start, data)


@pytest.mark.usefixtures("unmeasured")
def test_a_dry_run_says_what_was_chosen_and_what_was_scaled(start, write, cli, tmp_path):
    words = ("train", "--data", write(10), "--device", "cpu", "--dry-run", "--gpus", "2")
    code, out, err = cli(*words, "--finetune", start.run, "--output", tmp_path / "new")
    assert code == 0
    assert "100 epochs of 10 images" in err
    assert "250 iterations, scaled from 500" in out
    again = cli(*words, "--finetune", start.run, "--json")
    assert again.data["scaled"]["training.iterations"] == [500, 250]
    assert "finetune" in again.data["command"][-5:] or "--finetune" in again.data["command"]


@pytest.mark.usefixtures("unmeasured")
def test_a_long_recipe_for_few_images_is_questioned(write, cli):
    words = ("train", "--backbone", "r50", "--data", write(8, rows=np.ones((2, 512), np.float32)), "--dry-run",
             "--set", "training.precision.backbone=fp32", "--set", "training.weights=null")  # fmt: skip
    _, out, _ = cli(*words)
    assert "each 720,000 times" in out
    assert "--finetune" in out
    assert "--epochs" in out
    _, out, err = cli(*words, "--epochs", "16", "--gpus", "8")
    assert "times" not in out
    assert "16 epochs of 8 images" in err
    assert "iterations: 2\n" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--finetune", "proxydet-r50"],
        ["--finetune", "proxydet-r50", "--data", "a.toml", "--weights", "a.pth"],
        ["--keep-check", "a.toml"],
        ["--epochs", "3"],
    ],
    ids=" ".join,
)
def test_options_that_need_others(words, cli):
    assert cli("train", *words)[0] == 2


def test_a_report_says_what_was_not_measured():
    own = {"classes": ["cat"], "before": {"bbox/AP": 0.25}, "after": {"bbox/AP": 0.5}}
    kept = {
        "how": "ap",
        "data": "old",
        "types": {"bbox": {"classes": 3, "before_ap": 0.4, "after_ap": 0.39}},
    }
    content = {"own": own, "kept": kept, "weights": "model_best.safetensors"}
    text = report_text(content)
    assert "25.0 before, 50.0 after" in text
    assert "1 own classes, box AP: 25.0" in text
    assert "40.0 before, 39.0 after (-1.0)" in text
    nothing = {"classes": 0, "before_ap": None, "after_ap": None}
    text = report_text({**content, "kept": {**kept, "types": {"bbox": nothing, "segm": nothing}}})
    assert text.count("old has no annotations") == 1
    probe = {"how": "probe", "why": "no data", "images": 4, "found_before": 10, "found_after": 9}
    text = report_text({**content, "own": {**own, "after": None}, "kept": probe})
    assert "no validation images" in text
    assert "of 10 objects" in text
    assert "--keep-check" in text


def test_a_report_is_of_the_weights_that_the_folder_opens(tmp_path):
    """The best evaluation's may be gone: those of the one before are opened."""
    config = resolve_config("tiny", None, ["training.finetune.start=gone"])
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    Vocabulary.from_arrays(["cat", "hen"], ROWS[3:5]).save(run.vocabulary)
    rows = [{"iteration": at, "metrics": {"bbox/AP": at / 10}} for at in (0, 4, 6)]
    run.evaluations.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_safetensors(run.best_weights, {"a": torch.ones(1)}, {"iteration": 4})
    own = finetune_report(run.root, config)["own"]
    assert (own["iteration"], own["after"]) == (4, {"bbox/AP": 0.4})
    assert "mug, kettle" in run.report_page.read_text()
    (run.root / "text_encoder.json").touch()  # knows few words, no mugs
    finetune_report(run.root, config)
    assert "mug, kettle" not in run.report_page.read_text()
    assert "cat, hen" in run.report_page.read_text()


def test_a_report_compares_with_no_other_weights_than_the_run_began_from(tmp_path):
    weights = tmp_path / "start.safetensors"
    config = resolve_config(
        "tiny", None, ["training.finetune.start=lost", f"training.weights={weights}"]
    )
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    Vocabulary.from_arrays(["cat", "hen"], ROWS[3:5]).save(run.vocabulary)
    write_safetensors(run.final_safetensors, {"a": torch.ones(1)}, {"iteration": 4})
    run.manifest.write_text(json.dumps({"digests": {"weights": "0" * 64}}))
    assert "not there any more" in finetune_report(run.root, config)["kept"]["why"]
    write_safetensors(weights, {"a": torch.ones(1)}, {})
    assert "changed since" in finetune_report(run.root, config)["kept"]["why"]
