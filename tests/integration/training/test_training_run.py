"""The whole training on a drawn data set: run folders, repeating, going on, starting weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from trainings import final, records, same

from proxydet.errors import ProxydetError
from proxydet.manifest import read_manifest, read_run_records
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.runfolder import RunFolder
from proxydet.training.train import TrainResult, train
from proxydet.training_run import finished_run, run_training
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import read_safetensors

pytestmark = pytest.mark.slow


def config(base: list[str], *more: str) -> RunConfig:
    return resolve_config("tiny", None, [*base, *more])


def losses(folder: Path) -> list[dict]:
    return [record["losses"] for record in records(folder)]


@pytest.fixture(scope="module")
def first(drawn, tmp_path_factory) -> TrainResult:
    folder = tmp_path_factory.mktemp("run") / "first"
    base = [*drawn, "training.iterations=6", "training.checkpoints.period=2"]
    return run_training(config([*base, "training.log.period=1"]), output=folder)


def test_a_run_folder_holds_what_repeats_it(first, tmp_path):
    folder = first.folder
    manifest, report = read_run_records(folder)
    vocabulary = Vocabulary.load(folder / "vocabulary.npz")
    assert manifest.digests["vocabulary"] == vocabulary.digest
    assert manifest.seeds == {"seed": 7}
    assert report.fields
    assert set(first.evaluations) == {6}
    assert (folder / "plots/losses.png").stat().st_size > 1000
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "text_encoder.json").exists()
    repeated = run_training(resolve_config(None, folder / "config.yaml"), output=tmp_path / "again")
    assert same(folder, tmp_path / "again")
    assert repeated.losses == first.losses
    assert repeated.evaluations == first.evaluations


def test_damaged_files_of_a_finished_run_are_written_again(first, drawn, tmp_path):
    folder = RunFolder(shutil.copytree(first.folder, tmp_path / "run"))
    settings = resolve_config(None, folder.config)
    paths = (folder.final_safetensors, folder.final_weights, folder.vocabulary, folder.text_encoder)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-50])
    assert finished_run(folder, settings) is None
    assert run_training(settings, output=folder.root).iterations == 6
    assert same(folder.root, first.folder)
    written, whole = (read_safetensors(f / paths[0].name) for f in (folder.root, first.folder))
    assert written[1] == whole[1]
    assert written[0].keys() == whole[0].keys()
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in written[0].items())
    assert [path.read_bytes() for path in paths[2:]] == [
        (first.folder / path.name).read_bytes() for path in paths[2:]
    ]
    assert not (folder.root / "aside").exists()
    assert finished_run(folder, settings) is not None


def test_records_that_are_gone_are_written_again_and_named(first, tmp_path, caplog):
    folder = RunFolder(shutil.copytree(first.folder, tmp_path / "run"))
    settings = resolve_config(None, folder.config)
    for path in (folder.config, folder.environment):
        path.unlink()
    early = folder.checkpoints / "step_0000004.pth"
    run_training(settings, output=folder.root, resume=early)
    assert folder.config.exists()
    assert f"wrote {folder.config} and {folder.environment} again" in caplog.text
    caplog.clear()
    run_training(settings, output=tmp_path / "other", resume=early)
    assert "again" not in caplog.text


def test_a_finished_run_is_plotted_next_to_a_log_by_the_command(first, cli, tmp_path):
    folder = shutil.copytree(first.folder, tmp_path / "run")
    log = tmp_path / "metrics.json"
    log.write_text('{"iteration": 5, "total_loss": 3.0}\n')
    words = ("--config", folder / "config.yaml", "--output", folder, "--reference", log)
    code, out, err = cli("train", *words)
    assert code == 0, err
    assert "nothing to do" in out + err
    assert (folder / "plots/reference.png").stat().st_size > 1000


def test_every_part_of_the_method_has_a_loss(first):
    names = set(first.losses)
    assert {"cmm_loss_stage2", "image_loss_stage0", "loss_mask", "loss_centernet_loc"} <= names
    seen = {name for record in losses(first.folder) for name, value in record.items() if value}
    assert names == seen


def test_going_on_is_exact_with_other_numbers_of_workers(first, base, tmp_path):
    part = config(base, "data.workers=2")

    def stop(network: torch.nn.Module, iteration: int, folder: Path) -> dict[str, float]:
        raise RuntimeError("crash")

    schedule = config(base, "training.evaluation.period=5", "data.workers=2")
    with pytest.raises(RuntimeError, match="crash"):
        train(schedule, output=tmp_path, evaluate=stop)
    assert (tmp_path / "checkpoints/step_0000005.pth").exists()
    (tmp_path / "checkpoints/step_0000005.pth").write_bytes(b"damaged")
    train(part, output=tmp_path)
    assert same(first.folder, tmp_path)
    assert losses(first.folder) == losses(tmp_path)


def test_boxsup_weights_leave_the_mixup_branch_fresh(first, base, tmp_path):
    """The branch starts as a copy of the detection branch's fresh initialisation, not of its loaded weights."""
    boxsup = {name: w for name, w in final(first.folder).items() if "_cmm." not in name}
    torch.save({"model": boxsup}, tmp_path / "boxsup.pth")
    frozen = [
        f"training.weights={tmp_path / 'boxsup.pth'}",
        "training.iterations=1",
        "training.optimizer.learning_rate=1e-12",
        "training.schedule.warmup_iterations=0",
    ]
    copy = tmp_path / "run/checkpoints/step_0000004-copy.pth"  # not a checkpoint of the run
    copy.parent.mkdir(parents=True)
    copy.touch()
    train(config(base, *frozen), output=tmp_path / "run")
    started = final(tmp_path / "run")
    fresh_options = [item for item in frozen if "weights" not in item]
    train(config(base, *fresh_options), output=tmp_path / "fresh")
    fresh = final(tmp_path / "fresh")
    for name, weight in started.items():
        wanted = fresh[name] if "_cmm." in name else boxsup[name]
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-9)
    box, mixup = "roi_heads.box_head.0.fc1.weight", "roi_heads.box_head_cmm.0.fc1.weight"
    torch.testing.assert_close(fresh[mixup], fresh[box], rtol=0, atol=1e-9)
    assert not torch.equal(started[mixup], started[box])
    manifest, _ = read_run_records(tmp_path / "run")
    assert "weights" in manifest.digests


def test_starting_weights_are_read_only_where_a_run_begins(first, base, tmp_path, caplog):
    """A run that is resumed has its own; the file that it began with may be gone."""
    start = tmp_path / "w.pth"
    torch.save({"model": final(first.folder)}, start)
    options = config(base, f"training.weights={start}", "training.iterations=4")

    def stop(*_: object) -> dict[str, float]:
        raise RuntimeError("crash")

    schedule = config(base, f"training.weights={start}", "training.evaluation.period=2")
    with pytest.raises(RuntimeError, match="crash"):
        train(schedule, output=tmp_path / "other", evaluate=stop)
    began = read_manifest(tmp_path / "other")
    start.unlink()
    others = config(base, "training.weights=others.pth", "training.evaluation.period=2")
    train(others, output=tmp_path / "other")
    assert "others.pth are not used" in caplog.text
    manifest = read_manifest(tmp_path / "other")
    assert manifest.digests["weights"] == began.digests["weights"]
    assert manifest.configuration["training"]["weights"] == str(start)
    with pytest.raises(ProxydetError, match=start.name):
        train(options, output=tmp_path / "new")


def test_parameters_that_never_learn_are_as_they_were(first, base):
    """The first steps of the mixup branch get no gradient, hence no weight decay either."""
    moved = final(first.folder)
    name = "roi_heads.box_head_cmm.0.fc1.weight"
    from proxydet.modeling.network import ProxyDetNetwork
    from proxydet.training.step import seed_everything

    seed_everything(7)
    vocabulary = Vocabulary.load(first.folder / "vocabulary.npz")
    fresh = ProxyDetNetwork(config(base).model, vocabulary).state_dict()
    assert torch.equal(moved[name], fresh[name])
    last = "roi_heads.box_head_cmm.2.fc1.weight"
    assert not torch.equal(moved[last], fresh[last])
