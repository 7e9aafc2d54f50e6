"""Lines of a run's logs that something has damaged are passed over by all who read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxydet.config import dump_yaml
from proxydet.recipes import RunConfig, resolve_config
from proxydet.training.runfolder import RunFolder
from proxydet.training_run import finished_run, plot_run
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_state
from proxydet_cli.commands.train import _summary

pytestmark = pytest.mark.usefixtures("unplotted")

STEP = {"iteration": 2, "losses": {"total": 1.5, "loss_mask": 0.5}, "skipped": 0}
EVALUATION = {"iteration": 2, "metrics": {"segm/AP": 0.25}}
DAMAGED_STEPS = [
    b"\0" * 64,
    b"[1]",
    b'{"iteration": 3, "losses": [1]}',
    b'{"iteration": 3, "losses": {}}',
    b'{"iteration": 3, "losses": {"total": "x"}}',
    b'{"iteration": 3, "losses": {"total": null}, "skipped": "x"}',
    b'{"iteration": 1' + b"0" * 400 + b', "losses": {"total": 1}}',
    b'{"iteration": 3, "losses": {"total": 1' + b"0" * 400 + b"}}",
    b'{"iteration": -1, "losses": {"total": 1}}',
    b'{"iteration": 3.5, "losses": {"total": 1}}',
]
DAMAGED_EVALUATIONS = [
    line.replace(b'"losses"', b'"metrics"').replace(b'"total"', b'"segm/AP"')
    for line in DAMAGED_STEPS
]


def finish(root: Path) -> tuple[RunFolder, RunConfig]:
    """Write a finished run without logs."""
    folder, config = RunFolder(root), resolve_config("tiny", None, ["training.iterations=2"])
    folder.config.write_text(dump_yaml(config))
    write_state({"model": {}, "iteration": 2}, folder.final_weights)
    Vocabulary.from_arrays(["cup"], [[1.0]]).save(folder.vocabulary)
    return folder, config


def test_damaged_lines_are_passed_over(tmp_path):
    folder, config = finish(tmp_path)
    for path, whole, damaged in (
        (folder.metrics, STEP, DAMAGED_STEPS),
        (folder.evaluations, EVALUATION, DAMAGED_EVALUATIONS),
    ):
        path.write_bytes(b"\n".join([json.dumps(whole).encode(), *damaged, b""]))
    result = finished_run(folder, config)
    assert result is not None
    assert (result.iterations, result.losses, result.skipped) == (2, STEP["losses"], 0)
    assert result.evaluations == {2: EVALUATION["metrics"]}
    assert result.best is not None
    assert "loss 1.5" in _summary(result, config)
    assert len(list(folder.plots.glob("*.png"))) == 2
    assert plot_run(folder, again=False) == []


def test_the_numbers_of_a_finished_run_are_those_of_its_end(tmp_path, caplog):
    """Not of the last record that is left."""
    folder, config = finish(tmp_path)
    metrics = [{**STEP, "iteration": 1, "skipped": 3}, {**STEP, "iteration": 2, "skipped": 4}]
    folder.metrics.write_text(json.dumps(metrics[0]) + "\n")
    folder.evaluations.write_text(json.dumps({**EVALUATION, "iteration": 1}) + "\n")
    for iteration in (1, 2):
        folder.evaluation(iteration).mkdir(parents=True)
        (folder.evaluation(iteration) / "report.json").write_text("{}")
    result = finished_run(folder, config)
    assert result is not None
    assert (result.iterations, result.losses, result.skipped) == (2, {}, 0)
    assert "trained 2 iterations" in _summary(result, config)
    assert "loss" not in _summary(result, config)
    assert f"{folder.metrics} " in caplog.text
    assert f"{folder.evaluations} " in caplog.text
    caplog.clear()
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in metrics))
    folder.evaluations.write_text(
        "".join(json.dumps({**EVALUATION, "iteration": i}) + "\n" for i in (1, 2))
    )
    result = finished_run(folder, config)
    assert result is not None
    assert (result.losses, result.skipped) == (STEP["losses"], 4)
    assert ".jsonl" not in caplog.text


def test_a_finished_run_reports_logs_that_are_gone(tmp_path, caplog):
    folder, config = finish(tmp_path)
    (folder.evaluation(2)).mkdir(parents=True)
    (folder.evaluation(2) / "report.json").write_text("{}")
    result = finished_run(folder, config)
    assert result is not None
    assert result.iterations == config.training.iterations
    reported = [record.getMessage() for record in caplog.records if ".jsonl" in record.getMessage()]
    assert [
        str(path) in line
        for path, line in zip((folder.metrics, folder.evaluations), reported, strict=True)
    ] == [True, True]


@pytest.mark.parametrize("finished", [True, False])
def test_a_line_that_was_cut_is_reported_once(toy, tmp_path, finished, caplog):
    """And, where training continues, after which iteration: step 5 of the cut log is taken again."""
    changes = {"log": {"period": 1}, "evaluation": {"period": 4}}
    toy.run(tmp_path, changes, evaluate=lambda *_: {"AP": 1.0})
    folder = RunFolder(tmp_path)
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join(lines[:4]) + lines[4][:37])
    if finished:
        config = finish(tmp_path)[1]
        assert finished_run(folder, config) is not None
    else:
        for path in (folder.final_weights, folder.checkpoints / "step_0000012.pth"):
            path.unlink()
        toy.run(tmp_path, changes, evaluate=lambda *_: {"AP": 1.0})
        assert len(folder.metrics.read_text().splitlines()) == 8
    told = [r.getMessage() for r in caplog.records if str(folder.metrics) in r.getMessage()]
    (line,) = [line for line in told if "37 bytes" in line]
    assert len(told) == 1 + finished, "a finished run lacks the record of its end, too"
    assert ("after iteration 8" in line) != finished


def test_a_run_that_is_resumed_reports_a_log_that_is_gone(toy, tmp_path, caplog):
    toy.run(tmp_path, {})
    folder = RunFolder(tmp_path)
    folder.metrics.unlink()
    toy.run(tmp_path, {}, resume=folder.checkpoints / "step_0000008.pth")
    (line,) = [r.getMessage() for r in caplog.records if str(folder.metrics) in r.getMessage()]
    assert "after iteration 8" in line


@pytest.mark.parametrize("skips", [False, True])
def test_a_log_that_had_no_record_yet_is_not_missed(toy, tmp_path, monkeypatch, skips, caplog):
    """Also where records are now asked for more often, or a step was skipped."""
    losses, calls = toy.toy_losses, iter(range(100))

    def poisoned(found, *, generator):
        factor = float("nan") if skips and next(calls) == 1 else 1.0
        return {n: v * factor for n, v in losses(found, generator=generator).items()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "toy_losses", poisoned)
    rare = {"log": {"period": 8}, "guards": {"non_finite": "skip"}, "evaluation": {"period": 4}}
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, rare, evaluate=killed)
    assert not RunFolder(tmp_path).metrics.exists()
    toy.run(tmp_path, {"log": {"period": 1}})
    assert "metrics.jsonl" not in caplog.text


def test_only_weights_that_were_there_are_written_again(toy, tmp_path, caplog):
    toy.run(tmp_path, {})
    folder = RunFolder(tmp_path)
    for path in (folder.final_weights, folder.final_safetensors):
        path.write_bytes(path.read_bytes()[:-9])
    toy.run(tmp_path, {})
    assert f"wrote {folder.final_safetensors} and {folder.final_weights} again" in caplog.text
    caplog.clear()
    folder.final_weights.unlink()  # as by a kill
    toy.run(tmp_path, {})
    assert "again" not in caplog.text
