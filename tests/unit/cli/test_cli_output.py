from __future__ import annotations

import io
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from proxydet_cli.output import Output, is_terminal, prepare_streams, show_logs


@dataclass(frozen=True)
class Result:
    path: Path
    ap: float
    counts: tuple[int, ...]


RESULT = Result(path=Path("runs/a"), ap=math.nan, counts=(1, 2))


def test_json_is_plain(capsys):
    Output(json=True).data(
        {"result": RESULT, "array": np.array([1.5, math.inf]), "name": "é"}, "text"
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "result": {"path": "runs/a", "ap": None, "counts": [1, 2]},
        "array": [1.5, None],
        "name": "é",
    }
    assert captured.err == ""


def test_text_is_for_people(capsys):
    output = Output()
    output.data(RESULT)
    output.data(RESULT, "as told")
    assert capsys.readouterr().out == "path: runs/a\nap: -\ncounts: (1, 2)\nas told\n"


ROWS = [{"name": "cat", "ap": 61.25, "n": 3}, {"name": "traffic light", "ap": math.nan, "n": 12}]


def test_table_is_aligned_with_numbers_to_the_right(capsys):
    Output().table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "name              ap   n",
        "cat            61.25   3",
        "traffic light      -  12",
    ]


def test_table_takes_chosen_columns_and_json(capsys):
    Output().table(ROWS, ["n"])
    assert capsys.readouterr().out.splitlines() == [" n", " 3", "12"]
    Output(json=True).table(ROWS)
    assert json.loads(capsys.readouterr().out)[1] == {"name": "traffic light", "ap": None, "n": 12}
    Output().table([])
    assert capsys.readouterr().out == ""


def test_all_but_data_goes_to_stderr(capsys):
    for output in (Output(), Output(json=True)):
        output.message("working")
        output.warning("careful")
        output.error("broken", "mend it")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == 2 * "working\nwarning: careful\nerror: broken\n\nhint: mend it\n"


def test_quiet_leaves_out_messages_only(capsys):
    output = Output(quiet=True)
    output.message("working")
    output.warning("careful")
    assert capsys.readouterr().err == "warning: careful\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"),
    [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)],
)
def test_colour_only_where_it_is_wanted(monkeypatch, no_color, term, coloured):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    Output().error("broken")
    assert ("\033[" in terminal.getvalue()) == coloured
    assert is_terminal(terminal) == (term != "dumb")


def test_characters_that_the_encoding_lacks_do_not_crash(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_streams()
    Output().data("naïve 物")
    assert raw.getvalue() == b"na\\xefve \\u7269\n"


@pytest.mark.parametrize(("verbose", "expected"), [(False, ""), (True, "seen\n")])
def test_logs(capsys, verbose, expected):
    show_logs(verbose=verbose)
    show_logs(verbose=verbose)
    logging.getLogger("proxydet.data").info("seen")
    logging.getLogger("proxydet.data").warning("odd %s", "thing")
    assert capsys.readouterr().err == f"{expected}warning: odd thing\n"


def test_a_log_file_that_wants_more_does_not_fill_the_terminal(capsys):
    show_logs()
    logger = logging.getLogger("proxydet")
    logger.setLevel(logging.INFO)
    try:
        logger.info("for the file")
        logger.warning("for people")
    finally:
        logger.setLevel(logging.WARNING)
    shown = capsys.readouterr().err
    assert "for people" in shown
    assert "for the file" not in shown


HOSTILE = "\x1b]0;owned\x07\x9b2J"


def test_nothing_that_a_terminal_obeys_is_written(capsys):
    show_logs()
    for output in (Output(), Output(json=True)):
        output.data({"name": HOSTILE}, f"two\nlines {HOSTILE}")
        output.data(HOSTILE)
        output.table([{"name": HOSTILE, HOSTILE: 1}])
        output.row(f"a\nb {HOSTILE}")
        output.line({"name": HOSTILE})
        output.message(HOSTILE)
        output.warning(HOSTILE)
        output.error(HOSTILE, HOSTILE)
    logging.getLogger("proxydet.x").warning("%s", HOSTILE)
    captured = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & {*captured.out, *captured.err}
    assert captured.err.count("owned") == 9
    assert "two\nlines" in captured.out
    assert "a\\nb" in captured.out
