"""The report says what is there, what is missing, and what a difference means; it never fails itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from proxydet.errors import InputError
from proxydet.runtime.report import ORDER, EnvironmentReport, Field, without_home

PUBLISHED_FIELDS = {
    "sys.platform",
    "Python",
    "numpy",
    "detectron2",
    "Compiler",
    "CUDA compiler",
    "detectron2 arch flags",
    "DETECTRON2_ENV_MODULE",
    "PyTorch",
    "PyTorch debug build",
    "GPU available",
    "Driver version",
    "CUDA_HOME",
    "Pillow",
    "torchvision",
    "torchvision arch flags",
    "fvcore",
    "iopath",
    "cv2",
    "PyTorch built with",
}


@pytest.fixture(scope="module")
def report() -> EnvironmentReport:
    """The report of a process that does not import torch: another one is asked."""
    code = (
        "import json, sys; from proxydet.runtime.report import environment; report = environment(); "
        "assert 'torch' not in sys.modules; json.dump(report.to_dict(), sys.stdout)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    return EnvironmentReport.from_dict(json.loads(done.stdout))


def test_every_field_of_the_published_report_is_there_with_its_value(report):
    published = {field.label: field.published for field in report.fields}
    assert published.keys() >= PUBLISHED_FIELDS
    assert all(published[label] for label in PUBLISHED_FIELDS)
    assert published["PyTorch"] == "1.11.0+cu113"
    assert published["Driver version"] == "515.48.07"


def test_every_difference_has_a_verdict_and_a_reason(report):
    for field in report.fields:
        assert field.verdict in ORDER
        if field.verdict in {"harmless", "may change results", "will fail"}:
            assert field.reason, field.key
        if field.published is not None and "\n" not in (field.value or ""):
            assert field.verdict != "not judged", field.key


def test_this_environment_works(report):
    assert report.value("torch.import") == "works"
    assert report.value("torchvision.import") == "works"
    assert not report.failures
    assert report.worst == "may change results"


def test_a_report_survives_json(report):
    again = EnvironmentReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    with pytest.raises(InputError, match="format"):
        EnvironmentReport.from_dict({"format": 99})


def test_markdown_is_a_foldable_block_of_tables(report):
    text = report.to_markdown()
    assert text.startswith("<details>")
    assert text.endswith("</details>")
    assert "| PyTorch |" in text
    assert "```\nPyTorch built with:" in text
    assert "&lt;not set>" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_quick_leaves_torch_alone():
    code = (
        "import sys; from proxydet.runtime.report import environment; r = environment(quick=True); "
        "assert r.value('torch').startswith('2'); assert r.value('torch.import') is None; "
        "assert not {'torch', 'numpy', 'detectron2', 'PIL', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_home_folder_is_not_shown(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert without_home("at /home/ada/x, /home/adam and /mnt/home/ada") == (
        "at ~/x, /home/adam and /mnt/home/ada"
    )


def test_the_worst_verdict_counts():
    field = Field(key="a", section="s", label="A", value="1", verdict="harmless")
    report = EnvironmentReport(fields=(field,), created="now", quick=True)
    assert report.worst == "harmless"
    bad = replace(field, verdict="will fail")
    assert replace(report, fields=(field, bad)).worst == "will fail"
    assert replace(report, fields=(field, bad)).failures == (bad,)
