"""``proxydet train`` as far as it goes without training: what a dry run answers, what one of several processes writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proxydet.config import dump_yaml
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.distributed import DistInfo
from proxydet.training.launch import LaunchPlan
from proxydet.training.runfolder import RunFolder, prepare
from proxydet.training.train import TrainResult, fit_to_backbone
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_state
from proxydet_cli.main import main


def dry_run(*words: object) -> int:
    try:
        return main(["train", "--dry-run", "--recipe", "tiny", "--device", "cpu", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def description(tmp_path) -> Path:
    """Describe a data set of which all files are there."""
    document = {
        "images": [{"id": 1, "width": 2, "height": 2, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    np.save(tmp_path / "e.npy", np.ones((1, 32), np.float32))
    path = tmp_path / "d.toml"
    path.write_text(
        'name = "d"\n[vocabulary]\nembeddings = "e.npy"\n'
        '[train]\nannotations = "a.json"\nimages = "."\n'
    )
    return path


@pytest.mark.usefixtures("unmeasured")
def test_a_dry_run_ends_with_3_while_training_cannot_start(description, capsys):
    assert dry_run("--data", description) == 0
    assert "cannot start" not in capsys.readouterr().out
    (description.parent / "a.json").unlink()
    assert dry_run("--data", description) == 3
    assert "1 missing or unusable: training cannot start yet." in capsys.readouterr().out
    assert dry_run("--data", description, "--json") == 3
    needs = json.loads(capsys.readouterr().out)["needs"]
    assert [need["what"] for need in needs if not need["present"]] == ["training annotations"]


@pytest.mark.usefixtures("unmeasured")
def test_a_dry_run_tells_what_keeps_a_run_from_going_on(description, tmp_path, capsys):
    words = ("--data", description, "--output", tmp_path / "run")
    assert dry_run(*words, "--resume", "absent.pth") == 3
    assert "absent.pth does not exist" in capsys.readouterr().out
    # What training writes down when it has read the data.
    decided = ["data.masks=false", "model.masks=null", "model.classifier.embedding_dim=32"]
    config = resolve_config("tiny", None, [f"data.description={description}", *decided])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(fit_to_backbone(config)))
    assert dry_run(*words) == 0
    capsys.readouterr()
    assert dry_run(*words, "--set", "seed=8") == 3
    assert "seed: 7 there, 8 now" in capsys.readouterr().out
    assert dry_run(*words, "--resume", "never") == 3
    assert "already holds a run. train in another folder (--output)" in capsys.readouterr().out


RESULT = TrainResult(
    folder=Path("runs/a b"),
    weights=Path("runs/a b/model_final.pth"),
    iterations=6,
    losses={"total": 1.5},
    evaluations={},
    best=None,
    stopped_early=False,
    skipped=0,
    seconds=1.0,
)


def train(*words: str) -> int:
    """Run the command on two processes with the folder ``run``, and return its exit code."""
    try:
        return main(["train", "--recipe", "tiny", "--output", "run", "--gpus", "2", *words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_the_first_of_all_processes_writes_the_result(
    rank, as_json, finished, tmp_path, monkeypatch, capsys
):
    """So it is written once, whatever the number of machines, and the same as by one process."""
    monkeypatch.setattr("proxydet.training_run.run_training", lambda *_, **__: RESULT)
    found = RESULT if finished else None
    monkeypatch.setattr("proxydet.training_run.finished_run", lambda *_: found)
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 29400),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    alone = DistInfo(rank=rank, device=torch.device("cpu"))
    monkeypatch.setattr(
        "proxydet.training.distributed.connect", lambda *_: contextlib.nullcontext(alone)
    )
    assert train(*(["--json"] if as_json else [])) == 0
    written = capsys.readouterr().out
    if rank:
        assert written == ""
    elif as_json:
        assert json.loads(written)["iterations"] == 6
    else:
        assert "trained 6 iterations" in written
        assert "next: proxydet eval --run 'runs/a b' --data" in written
    # What was only written again was not trained.
    mended = dataclasses.replace(RESULT, losses={})
    monkeypatch.setattr("proxydet.training_run.run_training", lambda *_, **__: mended)
    assert train() == 0
    assert finished or "trained" not in capsys.readouterr().out


@pytest.mark.parametrize("validated", [False, True])
def test_only_a_run_with_validation_images_is_to_be_evaluated_next(
    validated, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("proxydet.training_run.run_training", lambda *_, **__: RESULT)
    part = 'annotations = "a.json"\nimages = "."\n'
    text = f'name = "d"\n[vocabulary]\nembeddings = "e.npy"\n[train]\n{part}'
    (tmp_path / "d.toml").write_text(text + (f"[val]\n{part}" if validated else ""))
    words = ["--recipe", "tiny", "--output", tmp_path / "run", "--data", tmp_path / "d.toml"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", *map(str, words), "--device", "cpu"])
    written = capsys.readouterr().out
    assert ("proxydet eval --run" in written) == validated
    assert "proxydet predict --run" in written


@pytest.fixture
def launched(monkeypatch) -> list[tuple[Any, ...]]:
    """Collect what would be launched."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "proxydet.training.launch.launch", lambda *arguments: calls.append(arguments)
    )
    plan = LaunchPlan(processes=2, world_size=2, torchrun=("--standalone", "--nproc-per-node=2"))
    monkeypatch.setattr("proxydet.training.launch.plan_launch", lambda **_: plan)
    return calls


def test_a_wrong_checkpoint_is_found_before_processes_start(
    launched, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    absent = tmp_path / "absent.pth"
    assert train("--resume", str(absent)) == 3
    assert f"there is no file {absent}" in capsys.readouterr().err
    absent.touch()
    assert train("--resume", str(absent)) == 3
    assert str(absent) in capsys.readouterr().err
    assert not launched
    write_state({"iteration": 3, "optimizer": {}}, absent)
    assert train("--resume", str(absent)) == 0
    assert launched


def test_the_launcher_leaves_the_result_to_its_processes(launched, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("--json", "--set", "seed=8") == 0
    assert capsys.readouterr().out == ""
    plan, words, logs = launched[0]
    assert plan.world_size == 2
    folder = Path("run").absolute()
    assert list(words[:3]) == ["-m", "proxydet_cli", "train"]
    options = "--recipe tiny --set seed=8 --json --output"
    assert {*words[3:]} == {*options.split(), str(folder)}
    assert logs == folder / "logs"
    assert train() == 0
    assert "--json" not in launched[1][1]


def test_without_a_folder_a_run_has_its_own(tmp_path, monkeypatch, capsys):
    trained: list[tuple[Path, Any, bool]] = []

    def run_training(config: RunConfig, **job: Any) -> TrainResult:
        folder = RunFolder(job["output"])
        trained.append((folder.root.name, job["resume"], job["overwrite"]))
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(
            dump_yaml(prepare(config, folder, DistInfo(device=torch.device("cpu")), "auto").config)
        )
        return RESULT

    monkeypatch.setattr("proxydet.training_run.run_training", run_training)
    monkeypatch.setenv("PROXYDET_RUNS", str(tmp_path))

    def command(*words: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["train", "--recipe", "tiny", "--device", "cpu", *words])
        found = capsys.readouterr()
        return found.out + found.err

    assert "tiny" in command()
    assert "not finished" in command()
    assert "seed: 7 there, 8 now" in command("--set", "seed=8")
    assert trained == [("tiny", "auto", False), ("tiny", "auto", False), ("tiny-2", "auto", False)]
    folder = RunFolder(tmp_path / "tiny-2")
    write_state({"model": {}, "iteration": 20}, folder.final_weights)
    Vocabulary.from_arrays(["cup"], [[1.0]]).save(folder.vocabulary)
    folder.metrics.write_text('{"iteration": 20, "losses": {"total": 0.5}}\n')
    for words in ((), ("--output", str(folder.root))):
        said = command("--set", "seed=8", *words)
        assert "finished: nothing to do" in said
        assert "trained 20 iterations" in said
    assert len(trained) == 3
    command("--set", "seed=8", "--resume", "Never")
    command("--set", "seed=8", "--overwrite", "--output", str(folder.root))
    assert trained[3:] == [("tiny-3", "never", False), ("tiny-2", "never", True)]
    assert main_code("--overwrite", "--resume", "a.pth") == 2
    assert main_code("--backbone", "r50", "--recipe", "tiny", "--show-config") == 2


def main_code(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *words])
    return int(stop.value.code)


def test_the_launcher_holds_the_folder_of_its_processes(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held: list[bool] = []
    monkeypatch.setattr(
        "proxydet.training.launch.launch",
        lambda *_: held.append(RunFolder(tmp_path / "run").lock.exists()),
    )
    assert train() == 0
    assert held == [True]
    assert not (tmp_path / "run").exists()
