from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import proxydet.runtime.report as report_module
import proxydet.runtime.setup as install
from proxydet.runtime.report import Field
from proxydet.runtime.setup import SetupReport
from proxydet_cli import main

REPORT = SetupReport(
    action="installed",
    python="/env/bin/python",
    torch="2.15.0",
    torchvision="0.30.0",
    detectron2="0.6",
    folder="/env/detectron2",
    operators="absent",
)
NO_DRIVER = Field(
    key="driver", section="x", label="Driver", value=None, verdict="will fail", reason="too old"
)


@pytest.fixture
def answers(monkeypatch) -> SimpleNamespace:
    """What the core answers; tests change it."""
    state = SimpleNamespace(report=REPORT, failures=(), asked=[])

    def set_up(*, dry_run: bool, progress: object) -> SetupReport:
        state.asked.append(dry_run)
        return state.report

    monkeypatch.setattr(install, "set_up", set_up)
    monkeypatch.setattr(report_module, "environment", lambda: state)
    return state


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main(["setup", *words])
    return int(stop.value.code or 0)


def test_says_what_it_did(answers, capsys):
    assert run() == 0
    text = capsys.readouterr().out
    assert "detectron2 0.6 installed: /env/detectron2" in text
    assert "without compiled operators" in text
    assert answers.asked == [False]


def test_dry_run_says_what_it_would_do(answers, capsys):
    answers.report = replace(REPORT, action="would install", folder=None, operators=None)
    answers.failures = (NO_DRIVER,)  # not asked for: an absent detectron2 is no failure yet
    assert run("--dry-run") == 0
    assert "would install detectron2 0.6" in capsys.readouterr().out
    assert answers.asked == [True]


def test_what_will_fail_is_told_with_code_5(answers, capsys):
    answers.failures = (NO_DRIVER,)
    assert run() == 5
    assert "will fail: Driver: too old" in capsys.readouterr().out


def test_json(answers, capsys):
    assert run("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["action"], told["failures"]) == ("installed", {})
