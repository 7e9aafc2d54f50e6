from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

import proxydet.runtime.report as report_module
import proxydet.runtime.setup as install
from proxydet.runtime.report import Field
from proxydet.runtime.setup import SetupReport

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


def test_what_is_done_is_reported(answers, cli):
    code, out, _ = cli("setup")
    assert code == 0
    assert "detectron2 0.6 installed: /env/detectron2" in out
    assert "without compiled operators" in out
    assert answers.asked == [False]
    told = cli("setup", "--json").data
    assert (told["action"], told["failures"]) == ("installed", {})


def test_a_dry_run_reports_what_it_would_do(answers, cli):
    answers.report = replace(REPORT, action="would install", folder=None, operators=None)
    answers.failures = (NO_DRIVER,)  # not asked for: an absent detectron2 is no failure yet
    code, out, _ = cli("setup", "--dry-run")
    assert (code, "would install detectron2 0.6" in out) == (0, True)
    assert answers.asked == [True]


def test_what_will_fail_is_reported_with_code_5(answers, cli):
    answers.failures = (NO_DRIVER,)
    code, out, _ = cli("setup")
    assert (code, "will fail: Driver: too old" in out) == (5, True)
