from __future__ import annotations

import io
import sys
import time

import pytest

from proxydet.reporting import SilentProgress
from proxydet_cli import progress
from proxydet_cli.progress import (
    BarProgress,
    LineProgress,
    NotebookProgress,
    show_progress,
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_lines_are_rate_limited_and_say_the_time_left(clock, capsys):
    with LineProgress().task("training", total=100, unit="it") as task:
        for _ in range(50):
            clock.now += 1
            task.advance(loss=0.5, lr="1e-4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 10/100 it (10%), 1 min 30 s left  loss 0.5  lr 1e-4"
    assert len(lines) == 6
    assert lines[-1] == "training: 50 it in 50 s  loss 0.5  lr 1e-4"


def test_resumed_task_counts_its_speed_from_where_it_began(clock, capsys):
    with LineProgress().task("downloading", total=4e9, unit="B", done=3e9) as task:
        clock.now += 10
        task.advance(5e8)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "downloading: 3.5/4.0 GB (88%), 10 s left, 50.0 MB/s"
    assert last == "downloading: 3.5 GB in 10 s, 50.0 MB/s"


def test_short_task_is_silent_and_uncounted_one_tells_its_time(clock, capsys):
    with LineProgress().task("reading"):
        pass
    with LineProgress().task("building") as task:
        task.describe("building the store")
        clock.now += 75
    assert capsys.readouterr().err == "building the store: 1 min 15 s\n"


def test_failed_task_has_no_closing_line(clock, capsys):
    def divide() -> None:
        with LineProgress().task("dividing"):
            clock.now += 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (11520, "3 h 12 min")]
)
def test_duration(seconds, words):
    assert progress.duration(seconds) == words


@pytest.mark.parametrize(
    ("done", "total", "unit", "words"),
    [
        (12, 40, "images", "12/40 images"),
        (12, None, "", "12"),
        (0, 1.2e6, "B", "0.0/1.2 MB"),
        (512, None, "B", "512.0 B"),
        (1500, None, "B", "1.5 kB"),
    ],
)
def test_amount(done, total, unit, words):
    assert progress.amount(done, total, unit) == words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = show_progress()
    assert isinstance(shown, BarProgress)
    with shown.task("training [x]\a", total=4, unit="it", done=1) as outer:
        with shown.task("evaluating", unit="images") as inner:
            inner.advance()
            inner.describe("scoring\a")
        outer.advance(3, loss=0.25)
    text = terminal.getvalue()
    assert "training [x]\\x07" in text
    assert "\a" not in text
    assert "4/4 it" in text
    assert "loss 0.25" in text
    assert shown._bars is None


def test_lines_elsewhere_and_nothing_when_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(show_progress(), LineProgress)
    assert isinstance(show_progress(quiet=True), SilentProgress)


def test_notebook(capsys):
    with NotebookProgress().task("training", total=2, unit="it") as task:
        task.advance(2, loss=0.5)
        task.describe("trained")
    assert "trained: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(("total", "left"), [(None, False), (100, True)])
def test_bars_say_left_only_beside_a_time(monkeypatch, total, left):
    """A bar of unknown length used to show the time gone by as the time left."""
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with BarProgress().task("fetching", total=total, unit="B") as task:
        for _ in range(8):
            task.advance(5)
            time.sleep(0.05)
    assert ("left" in stream.getvalue()) == left
