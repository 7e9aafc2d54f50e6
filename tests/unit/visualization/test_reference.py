"""Logs of detectron2 that a run is plotted next to: read as detectron2 writes them, whatever else a file holds."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pytest
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter

from proxydet.errors import DataError
from proxydet.training.runfolder import RunFolder
from proxydet.training_run import plot_reference
from proxydet.visualization.plots import loss_plot
from proxydet.visualization.reference import read_reference

LOSSES = {"total_loss": 12.5, "loss_cls_stage0": 1.25, "cmm_loss_stage2": 0.0625}


@pytest.fixture
def logs(tmp_path, caplog) -> tuple[Path, Path]:
    """A text log and a JSON log, by detectron2's own writers."""
    writers = [CommonMetricPrinter(100), JSONWriter(str(tmp_path / "metrics.json"))]
    with EventStorage(19) as storage, caplog.at_level(logging.INFO):
        for _ in range(3):
            storage.put_scalars(
                **{name: value / (storage.iter + 1) for name, value in LOSSES.items()}
            )
            storage.put_scalars(lr=0.1, time=0.5, rank_data_time=0.1)
            for writer in writers:
                writer.write()
            storage.step()
    writers[1].close()
    lines = [f"[10/01 12:00:00 d2.utils.events]: {message}" for message in caplog.messages]
    lines.insert(1, "[10/01 12:00:00 d2.engine.hooks]: Overall training speed: 3 iterations")
    (tmp_path / "log.txt").write_text("\n".join(lines))
    return tmp_path / "log.txt", tmp_path / "metrics.json"


def test_both_formats_of_detectron2_are_read(logs):
    text, lines = map(read_reference, logs)
    assert set(text) == set(lines) == {"total", "loss_cls_stage0", "cmm_loss_stage2"}
    for name, points in lines.items():
        assert [iteration for iteration, _ in points] == [19, 20, 21]
        np.testing.assert_allclose(text[name], points, rtol=1e-3)


def test_of_an_iteration_that_is_there_twice_the_later_counts(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [(20, 3.0), (40, 2.0), (20, 2.5), (40, float("nan"))]
    path.write_text("\n".join(json.dumps({"iteration": i, "total_loss": v}) for i, v in rows))
    assert read_reference(path) == {"total": [(20, 2.5), (40, 2.0)]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing of the kind\n" * 100,
        b"\x00\xff" * 100_000,
        b'{"iteration": ' + b"9" * 60_000 + b', "total_loss": 1}',
        b"[" * 1_000_000,
        b'{"iteration": [[], {}], "total_loss": {"a": 1}}\n' * 10,
        b"iter: x  total_loss: y\n",
        b"a" * 500_000 + b": loss: ",
        b'{"iteration": 1e400, "total_loss": 1}',
        b'{"iteration": 3, "total_loss": "1' + b"0" * 1000 + b'"}',
    ],
)
def test_what_is_no_log_is_named(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt") as raised:
        read_reference(path)
    assert raised.value.hint


def test_absent_and_huge_files_are_named(tmp_path):
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**40)
    for name in ("absent", "huge", "."):
        with pytest.raises(DataError) as raised:
            read_reference(tmp_path / name)
        assert str(tmp_path) in raised.value.message


def test_many_names_are_bounded(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(json.dumps({"iteration": i, f"loss_{i}": 1.0}) for i in range(2000)))
    assert len(read_reference(path)) <= 200


def test_a_run_is_plotted_next_to_a_log(logs, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    record = {"iteration": 5, "losses": {"total": 3.0, "loss_cls_stage0": 1.0, "loss_mask": 0.5}}
    folder.metrics.write_text(json.dumps(record) + "\n")
    path = plot_reference(folder, logs[0])
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "no loss of" not in caplog.text
    strange = tmp_path / "strange.txt"
    strange.write_text("iter: 3  loss_rpn_cls: 1.0\n")
    plot_reference(folder, strange)
    assert "no loss of" in caplog.text


def test_panels_show_both_curves_in_full():
    figure = loss_plot(
        {"total": [(1.0, 2.0)], "own": [(1.0, 1.0)]}, reference={"total": [(9.0, 40.0)]}
    )
    both, own = figure.axes
    assert [tuple(line.get_xdata()) for line in both.lines[1::2]] == [(1.0,), (9.0,)]
    assert both.get_ylim()[1] > 40
    run, reference = both.lines[1::2]
    assert run.zorder > reference.zorder, "the run is hidden"
    assert len(own.lines) == 2


def test_the_command_refuses_a_log_before_it_loads_torch(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    code, _, err = cli("train", "--recipe", "tiny", "--reference", tmp_path / "absent.txt")
    assert code == 3
    assert "absent.txt" in err
