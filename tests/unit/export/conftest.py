"""Small detectors, and one export of each format that the tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest

from proxydet.detector import Detector
from proxydet.export.exporter import ExportReport, export_detector


@pytest.fixture(scope="session")
def make_detector() -> Callable[[ModuleType, str], Detector]:
    return _make_detector


def _make_detector(tiny: ModuleType, kind: str) -> Detector:
    """Two steps a cascade, which the tracer is through with sooner, and everything else that the full model has."""
    config = tiny.model_config(kind)
    cascade = dataclasses.replace(
        config.cascade, iou_thresholds=(0.6, 0.7), delta_weights=config.cascade.delta_weights[:2]
    )
    network = tiny.lively(tiny.network(dataclasses.replace(config, cascade=cascade)))
    return Detector(network, shortest=100, longest=160)


@pytest.fixture(scope="session")
def detector(tiny) -> Detector:
    return _make_detector(tiny, "resnet")


@pytest.fixture(scope="session")
def onnx_export(detector, tmp_path_factory) -> ExportReport:
    return export_detector(detector, tmp_path_factory.mktemp("export") / "tiny.onnx")


@pytest.fixture(scope="session")
def torch_export(detector, tmp_path_factory) -> ExportReport:
    return export_detector(detector, tmp_path_factory.mktemp("export") / "tiny.pt2")
