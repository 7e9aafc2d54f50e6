"""What a training shows: a short line, and on a terminal a table above the bar."""

from __future__ import annotations

import io
import sys

from proxydet_cli import progress
from proxydet_cli.progress import parts_table, show_progress

FIELDS = {
    "total": 3.25,
    "loss_mask": 0.5,
    "cmm_loss_stage2": 1.5,
    "lr": 0.002,
    "it/s": 2.5,
    "data s": 0.01,
    "MiB": 812.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_names_loss_speed_time_left_and_rate_only(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    with show_progress().task("training", total=4, unit="it") as task:
        task.advance(2, **FIELDS)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "training: 2/4 it (50%), 0 s left  loss 3.25  it/s 2.5  lr 0.002"


def test_the_table_holds_the_parts_and_the_machine(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with show_progress().task("training", total=4, unit="it") as task:
        task.advance(4, **FIELDS)
    text = terminal.getvalue()
    for shown in (
        "mask",
        "0.5000",
        "cmm_loss_stage2",
        "waiting for data, s/it",
        "812",
        "loss 3.25",
    ):
        assert shown in text
    assert "total" not in text


def test_a_table_without_machine_numbers_has_none():
    assert parts_table({"loss_mask": 1.0}).row_count == 1
    assert parts_table({"loss_mask": 1.0, "MiB": 2.0}).row_count == 2
