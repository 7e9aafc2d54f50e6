"""A run counts as finished only while what others open of it is as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proxydet.config import dump_yaml, to_mapping
from proxydet.errors import CheckpointError, InputError
from proxydet.files import sha256
from proxydet.manifest import build_manifest, write_run_records
from proxydet.recipes import RunConfig, get_recipe
from proxydet.runtime.report import environment
from proxydet.training.distributed import DistInfo
from proxydet.training.runfolder import RunFolder, continue_run
from proxydet.training_run import finished_run
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_safetensors, write_state
from proxydet_cli.main import main

REPORT = environment(quick=True)
WEIGHTS = {"layer.weight": torch.arange(512.0).reshape(16, 32)}


@pytest.fixture
def config() -> RunConfig:
    return get_recipe("tiny")


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunFolder:
    """Write what a finished run of one process leaves."""
    folder = RunFolder(tmp_path / "run")
    settings, _ = continue_run(config, [], DistInfo(device=torch.device("cpu")))
    vocabulary = Vocabulary.from_arrays(["cup", "mug"], [[1.0, 0.0], [0.0, 1.0]])
    vocabulary.save(folder.vocabulary)
    folder.text_encoder.write_text('{"format": "of the data"}')
    folder.config.write_text(dump_yaml(settings))
    digests = {"vocabulary": vocabulary.digest, "text encoder": sha256(folder.text_encoder)}
    records = build_manifest(
        "training", configuration=to_mapping(settings), digests=digests, mode="off", seeds={}
    )
    write_run_records(folder.root, records, REPORT)
    iterations = settings.training.iterations
    state = {"model": WEIGHTS, "iteration": iterations}
    run = json.dumps({"configuration": to_mapping(settings), "digests": digests})
    path = folder.checkpoints / f"step_{iterations:07d}.pth"
    write_state({**state, "optimizer": {}, "run": run}, path)
    write_safetensors(folder.final_safetensors, WEIGHTS, {"iteration": iterations})
    write_state(state, folder.final_weights)
    return folder


def train(folder: RunFolder, *words: str) -> int:
    words = ("train", "--recipe", "tiny", "--device", "cpu", "--output", str(folder.root), *words)
    try:
        return main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


NEEDED = ["model_final.safetensors", "model_final.pth", "vocabulary.npz", "text_encoder.json"]
RECORDS = ["manifest.json", "environment.json"]


def test_a_whole_run_is_finished(
    run: RunFolder, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished_run(run, config) is not None
    assert train(run) == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    # It needs no data, and resumes nothing.
    assert train(run, "--dry-run") == 0
    assert f"{run.root} (finished: nothing to do)" in capsys.readouterr().out
    assert train(run, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True


@pytest.mark.parametrize(
    ("damage", "name"),
    [*((flip, name) for name in NEEDED), *((cut, name) for name in [*NEEDED, *RECORDS])],
)
def test_what_is_damaged_is_written_again_from_the_last_checkpoint(
    run: RunFolder,
    config: RunConfig,
    damage: Callable[[Path], None],
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(run.root / name)
    assert finished_run(run, config) is None, "training has something to do"
    assert name in caplog.text


@pytest.mark.parametrize("last", ["damaged", "absent"])
@pytest.mark.parametrize("name", NEEDED)
def test_without_that_checkpoint_it_is_refused_by_name(
    run: RunFolder,
    config: RunConfig,
    name: str,
    last: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ((_, checkpoint),) = run.list_checkpoints()
    (flip if last == "damaged" else Path.unlink)(checkpoint)
    assert finished_run(run, config) is not None
    flip(run.root / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        finished_run(run, config)
    assert name in str(caught.value.hint)
    other = {NEEDED[0]: NEEDED[1], NEEDED[1]: NEEDED[0]}.get(name)
    assert other is None or f"--weights {run.root / other}" in str(caught.value.hint)
    assert train(run) == InputError.exit_code
    assert name in capsys.readouterr().err
    assert train(run, "--dry-run") == InputError.exit_code
    assert "UNUSABLE finished run" in capsys.readouterr().out


def test_records_that_cannot_be_written_again_are_reported(
    run: RunFolder, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    ((_, checkpoint),) = run.list_checkpoints()
    checkpoint.unlink()
    run.environment.unlink()
    assert finished_run(run, config) is not None
    assert "environment.json" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"model: [", b"seed: 7\0"])
def test_the_settings_are_restored(
    run: RunFolder, config: RunConfig, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = run.config.read_bytes()
    run.config.unlink() if content is None else run.config.write_bytes(content)
    assert finished_run(run, config) is not None
    assert run.config.read_bytes() == before
    assert "config.yaml" in caplog.text
