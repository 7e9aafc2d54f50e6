"""Lines of a run's logs that something has damaged are passed over by all who read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxydet.config import dump_yaml
from proxydet.recipes import get_recipe
from proxydet.training.runfolder import RunFolder
from proxydet.training_run import finished_run, plot_run
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_state
from proxydet_cli.commands.train import _summary

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


@pytest.mark.parametrize("number", range(len(DAMAGED_STEPS)))
def test_damaged_lines_are_passed_over(tmp_path: Path, number: int) -> None:
    folder = RunFolder(tmp_path)
    for path, whole, damaged in (
        (folder.metrics, STEP, DAMAGED_STEPS[number]),
        (folder.evaluations, EVALUATION, DAMAGED_EVALUATIONS[number]),
    ):
        path.write_bytes(json.dumps(whole).encode() + b"\n" + damaged + b"\n")
    config = get_recipe("tiny")
    folder.config.write_text(dump_yaml(config))
    write_state({"model": {}, "iteration": 2}, folder.final_weights)
    Vocabulary.from_arrays(["cup"], [[1.0]]).save(folder.vocabulary)
    result = finished_run(folder, config)
    assert result is not None
    assert (result.iterations, result.losses, result.skipped) == (2, STEP["losses"], 0)
    assert result.evaluations == {2: EVALUATION["metrics"]}
    assert result.best is not None
    assert "loss 1.5" in _summary(result)
    assert len(list(folder.plots.glob("*.png"))) == 2
    assert plot_run(folder, again=False) == []
