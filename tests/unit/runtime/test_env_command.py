"""``proxydet env``: what it prints and how it exits."""

from dataclasses import replace

import pytest

from proxydet.manifest import build_manifest, write_run_records
from proxydet.runtime import report as report_module
from proxydet.runtime.report import environment

REPORT = environment(quick=True)


@pytest.fixture
def run(cli):
    return lambda *words: cli("env", *words)


@pytest.fixture
def broken(monkeypatch):
    fields = [
        replace(field, value=None, verdict="will fail", reason="run: proxydet setup")
        if field.key == "detectron2"
        else field
        for field in REPORT.fields
    ]
    report = replace(REPORT, fields=tuple(fields))
    monkeypatch.setattr(report_module, "environment", lambda **_: report)


def test_text_json_and_markdown(run):
    code, out, err = run("--quick")
    assert (code, err) == (0, "")
    assert "published 1.11.0+cu113: may change results" in out
    assert max(map(len, out.splitlines())) <= 140
    assert run("--quick", "--json").data["worst"] == "may change results"
    assert run("--quick", "--markdown")[1].startswith("<details>")


def test_check_is_silent_about_what_works(run):
    assert run("--quick", "--check") == (0, "nothing will fail\n", "")


def test_check_fails_with_what_will_fail(run, broken):
    assert run("--check") == (5, "detectron2: missing: run: proxydet setup\n", "")
    assert run()[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--check", "--markdown"),
        ("--diff", "a", "b", "--markdown"),
        ("--diff", "a", "b", "--check"),
        ("--diff", "a", "b", "--quick"),
        ("--diff", "a", "b", "--data-root", "a"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run, words):
    assert run(*words)[0] == 2


def test_diff_of_two_runs(run, tmp_path):
    for name, seed in (("a", 7), ("b", 8)):
        (tmp_path / name).mkdir()
        manifest = build_manifest(
            "training", configuration={}, digests={}, mode="off", seeds={"seed": seed}
        )
        write_run_records(tmp_path / name, manifest, REPORT)
    code, out, _ = run("--diff", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert out.splitlines()[:3] == [
        "decides results: seeds.seed (every random number derives from it)",
        "    7",
        "    8",
    ]
    found = run("--diff", tmp_path / "a", tmp_path / "b", "--json").data
    assert found["differences"][0]["key"] == "seeds.seed"
    code, _, err = run("--diff", tmp_path / "a", tmp_path)
    assert code == 3
    assert "manifest.json" in err
    code, _, err = run("--diff", tmp_path / "a", tmp_path / "absent")
    assert code == 3
    assert "There is no run folder" in err


def test_diff_takes_a_quickstarts_folder(run, tmp_path):
    inner = tmp_path / "quickstart" / "run"
    inner.mkdir(parents=True)
    (inner / "config.yaml").touch()
    manifest = build_manifest("training", configuration={}, digests={}, mode="off", seeds={})
    write_run_records(inner, manifest, REPORT)
    (inner / "metrics.jsonl").write_text('{"iteration": 1, "losses": {"total": 2.0}}\n')
    code, out, _ = run("--diff", inner, tmp_path / "quickstart")
    assert code == 0
    assert "The losses of all 1 common records are equal." in out
