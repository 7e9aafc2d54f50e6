"""A run counts as finished only while what others open of it is as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proxydet.config import dump_yaml, to_mapping
from proxydet.errors import CheckpointError, InputError
from proxydet.files import sha256
from proxydet.manifest import build_manifest, write_run_records
from proxydet.paths import list_checkpoints
from proxydet.recipes import RunConfig, get_recipe
from proxydet.runtime.report import environment
from proxydet.training.distributed import DistInfo
from proxydet.training.runfolder import RunFolder, prepare
from proxydet.training_run import finished_run
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_safetensors, write_state

pytestmark = pytest.mark.usefixtures("unplotted")

REPORT = environment(quick=True)
WEIGHTS = {"layer.weight": torch.arange(512.0).reshape(16, 32)}


@pytest.fixture
def config() -> RunConfig:
    return get_recipe("tiny")


@pytest.fixture
def run(tmp_path, config) -> RunFolder:
    """Write what a finished run of one process leaves."""
    folder = RunFolder(tmp_path / "run")
    settings = prepare(config, folder, DistInfo(device=torch.device("cpu")), "auto").config
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def edit(path: Path) -> None:
    content = json.loads(path.read_text())
    content["fields"][0]["value"] = "another"
    path.write_text(json.dumps(content))


NEEDED = ["model_final.safetensors", "model_final.pth", "vocabulary.npz", "text_encoder.json"]
RECORDS = ["manifest.json", "environment.json"]


@pytest.mark.usefixtures("unmeasured")
def test_a_whole_run_is_finished(run, config, cli):
    assert finished_run(run, config) is not None
    words = ("train", "--recipe", "tiny", "--device", "cpu", "--output", run.root)
    code, out, _ = cli(*words)
    assert (code, "finished: nothing to do" in out) == (0, True)
    # Also after it was resumed with another batch. It needs no data, and resumes nothing.
    larger = ("--set", "data.boxes.batch_size=5")
    code, out, _ = cli(*words, *larger)
    assert (code, "finished: nothing to do" in out) == (0, True)
    code, out, _ = cli(*words, "--dry-run")
    assert (code, f"{run.root} (finished: nothing to do)" in out) == (0, True)
    assert cli(*words, "--dry-run", "--json").data["finished"] is True


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (edit, RECORDS[1]),
        *((flip, name) for name in NEEDED),
        *((cut, name) for name in [*NEEDED, *RECORDS]),
    ],
)
def test_what_is_damaged_is_written_again_from_the_last_checkpoint(
    run, config, damage, name, caplog
):
    damage(run.root / name)
    assert finished_run(run, config) is None, "training has something to do"
    assert name in caplog.text


@pytest.mark.parametrize("name", NEEDED)
def test_without_that_checkpoint_it_is_refused_by_name(run, config, name):
    ((_, checkpoint),) = list_checkpoints(run.checkpoints)
    flip(run.root / name)
    for damage in (flip, Path.unlink):
        damage(checkpoint)
        with pytest.raises(CheckpointError, match=name) as caught:
            finished_run(run, config)
        assert name in str(caught.value.hint)
        other = {NEEDED[0]: NEEDED[1], NEEDED[1]: NEEDED[0]}.get(name)
        assert other is None or f"--weights {run.root / other}" in str(caught.value.hint)


@pytest.mark.usefixtures("unmeasured")
def test_the_command_refuses_it_too(run, config, cli):
    ((_, checkpoint),) = list_checkpoints(run.checkpoints)
    checkpoint.unlink()
    assert finished_run(run, config) is not None, "whole, and never resumed"
    flip(run.root / NEEDED[0])
    words = ("train", "--recipe", "tiny", "--device", "cpu", "--output", run.root)
    code, _, err = cli(*words)
    assert (code, NEEDED[0] in err) == (InputError.exit_code, True)
    code, out, _ = cli(*words, "--dry-run")
    assert (code, "UNUSABLE finished run" in out) == (InputError.exit_code, True)


def test_records_that_cannot_be_written_again_are_reported(run, config, caplog):
    ((_, checkpoint),) = list_checkpoints(run.checkpoints)
    checkpoint.unlink()
    run.environment.unlink()
    assert finished_run(run, config) is not None
    assert "environment.json" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"model: [", b"seed: 7\0"])
def test_the_settings_are_restored(run, config, content, caplog):
    before = run.config.read_bytes()
    run.config.unlink() if content is None else run.config.write_bytes(content)
    assert finished_run(run, config) is not None
    assert run.config.read_bytes() == before
    assert "config.yaml" in caplog.text
