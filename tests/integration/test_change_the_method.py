"""The examples of docs/how-to/change-the-method.md: each is trained with, in one process and in two."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxydet.detector import Detector
from proxydet.errors import ConfigError
from proxydet.manifest import read_run_records
from proxydet.recipes import resolve_config
from proxydet.training.train import train
from proxydet.vocabulary.vocabulary import Vocabulary

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/change-the-method.md"
MODULES = ("my_losses", "my_backbone", "my_format", "my_logger")
KEYS = {
    "losses.criterion": "my_losses:GIoUCriterion",
    "losses.options": "{weight: 3.0}",
    "model.backbone.kind": "my_backbone:PatchNet",
    "model.backbone.options": "{width: 8}",
    "training.log.loggers": "[my_logger:Csv]",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the page's modules, and images and boxes in the format of the page."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == list(MODULES)
    for name, text in blocks:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "images").mkdir()
    rows = ["image,width,height,class,left,top,right,bottom"]
    for index in range(4):
        pixels = np.full((64, 96, 3), 200, np.uint8)
        pixels[10:40, 20:60] = (200, 40, 60 * index)
        Image.fromarray(pixels).save(tmp_path / f"images/{index}.png")
        rows.append(f"{index}.png,96,64,{('cat', 'dog')[index % 2]},20,10,60,40")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    vocabulary = Vocabulary.from_arrays(["cat", "dog"], np.eye(2, 64) + 0.1)
    vocabulary.save(tmp_path / "words.npz")
    (table,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    vocabulary_table = '[vocabulary]\nembeddings = "words.npz"\n'
    (tmp_path / "pets.toml").write_text(f'name = "pets"\n{vocabulary_table}{table}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    return tmp_path


def settings(folder: Path, **changes: str) -> list[str]:
    own = {
        **KEYS,
        "data.description": str(folder / "pets.toml"),
        "data.image_labels": "null",
        "training.iterations": "2",
        "training.scaling": "none",
        "training.log.period": "1",
        "training.log.tensorboard": "false",
        "training.device": "cpu",
        **changes,
    }
    return [f"{key}={value}" for key, value in own.items()]


def check_run(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["losses"] for record in records if "losses" in record]
    assert len(losses) == 2
    assert all(np.isfinite(list(each.values())).all() for each in losses)
    rows = list(csv.reader((run / "values.csv").read_text().splitlines()))
    logged = {(int(at), name): float(value) for at, name, value in rows}
    assert logged[1, "loss/total"] == losses[0]["total"]
    assert len([name for _, name in logged if name == "loss/total"]) == 2
    digests = read_run_records(run)[0].digests
    assert {f"code {KEYS[k]}" for k in ("losses.criterion", "model.backbone.kind")} <= set(digests)


def test_all_examples_in_one_process_and_the_run_is_opened_with_its_backbone(
    folder, monkeypatch, caplog
):
    config = resolve_config("tiny", None, settings(folder))
    run = train(config, output=folder / "run").folder
    check_run(run)
    detector = Detector.from_run(run, device="cpu")
    assert type(detector.network.backbone.bottom_up.base).__name__ == "PatchNet"
    detector.predict(folder / "images/0.png")
    # Code that changed since is named where the run continues, and where it is opened.
    for name in ("my_losses", "my_backbone"):
        with (folder / f"{name}.py").open("a") as file:
            file.write("# changed\n")
    caplog.clear()
    Detector.from_run(run, device="cpu")
    assert [text.count("code my_") for text in caplog.messages] == [1]
    caplog.clear()
    train(config, output=run)
    (message,) = [text for text in caplog.messages if "changed since" in text]
    assert re.findall(r"code (\w+):", message) == ["my_losses", "my_backbone"]
    # Elsewhere, where the module is not, opening the run says what it lacks.
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(folder)])
    monkeypatch.delitem(sys.modules, "my_backbone")
    with pytest.raises(ConfigError, match=r"model\.backbone\.kind.*no module my_backbone"):
        Detector.from_run(run, device="cpu")


def test_classes_as_arguments_are_recorded_by_their_paths(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import my_backbone
    import my_logger
    import my_losses

    unset = {
        "losses.criterion": "null",
        "model.backbone.kind": "resnet",
        "training.log.loggers": "[]",
        "training.iterations": "1",
    }
    config = resolve_config("tiny", None, settings(folder, **unset))
    result = train(
        config,
        output=folder / "run",
        criterion=my_losses.GIoUCriterion,
        backbone=my_backbone.PatchNet,
        loggers=[my_logger.Csv],
    )
    written = resolve_config(None, result.folder / "config.yaml")
    assert written.losses.criterion == KEYS["losses.criterion"]
    assert written.model.backbone.kind == KEYS["model.backbone.kind"]
    assert written.training.log.loggers == ("my_logger:Csv",)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run proxydet train in the working folder, which is not on its path."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.remove(''); from proxydet_cli.main import main; sys.exit(main())",
         "train", "--recipe", "tiny", "--output", "run", *words],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_all_examples_in_two_processes_by_the_command(folder):
    words = [word for item in settings(folder) for word in ("--set", item)]
    done = command(folder, *words, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    check_run(folder / "run")
