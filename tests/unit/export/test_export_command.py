"""The command: options in, a report out."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxydet.detector import Detector
from proxydet.export.exporter import Agreement, ExportReport, describe


@pytest.fixture
def seen(detector, monkeypatch) -> dict[str, object]:
    """What the command gave to the exporter, which is not run."""
    given: dict[str, object] = {}

    def exported(chosen: Detector, path: Path, **options: object) -> ExportReport:
        given.update(options, path=path, detector=chosen)
        agreement = Agreement(
            image="drawn",
            classes=6,
            detections=40,
            exported=40,
            matched=40,
            largest_score_difference=1e-6,
            largest_mask_difference=2e-6,
        )
        return ExportReport(
            path=path,
            format="onnx",
            opset=18,
            bytes=2_000_000,
            seconds=3.0,
            vocabulary=None,
            agreement=(agreement,),
            metadata=describe(chosen),
        )

    monkeypatch.setattr("proxydet.export.exporter.export_detector", exported)
    monkeypatch.setattr("proxydet.models.locate_published", Path)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    return given


def test_options_reach_the_exporter(seen, detector, tmp_path, cli):
    target = tmp_path / "a.onnx"
    options = ("--opset", 19, "--format", "onnx", "--check", "x.jpg")
    report = cli("export", "-o", target, *options, "--json").data
    assert report["path"] == str(target)
    assert report["agreement"][0]["matched"] == 40
    assert report["metadata"]["weights_sha256"]
    assert seen["detector"].network is detector.network
    assert seen["detector"].inference.agnostic_nms
    assert (seen["opset"], seen["format"]) == (19, "onnx")
    assert seen["check"] == [Path("x.jpg")]
    assert seen["vocabulary"] is None


def test_a_vocabulary_is_given_on(seen, detector, tmp_path, cli):
    saved = detector.vocabulary.subset(["class 1", "class 4"]).save(tmp_path / "two.npz")
    assert cli("export", "-o", tmp_path / "a.onnx", "--vocabulary", saved).code == 0
    assert seen["vocabulary"].names == ("class 1", "class 4")  # type: ignore[attr-defined]


@pytest.mark.usefixtures("seen")
def test_the_report_for_people(tmp_path, cli):
    report = cli("export", "-o", tmp_path / "a.onnx").out
    assert "2.0 MB, exported in 3 s" in report
    assert "drawn, 6 classes: 40 of 40 detections the same" in report


def test_a_folder_that_is_no_run(tmp_path, cli):
    target = tmp_path / "a.onnx"
    code, _, err = cli("export", "--run", tmp_path, "--output", target)
    assert (code, "is not a run folder" in err) == (3, True)
    assert not target.exists()
