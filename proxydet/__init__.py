"""Open-vocabulary object detection with class-wise mixup.

The names below are the public API. Each is imported from its module when it is first used, so that
``import proxydet`` loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from proxydet._version import __version__

if TYPE_CHECKING:
    from proxydet import errors
    from proxydet.artifacts.downloader import download
    from proxydet.detections import Detections
    from proxydet.detector import Detector
    from proxydet.evaluation.detector_evaluation import evaluate
    from proxydet.export.exporter import export_detector
    from proxydet.index.search import RegionIndex
    from proxydet.runtime.report import environment
    from proxydet.runtime.roi_verify import verify_roi_align
    from proxydet.training.train import train
    from proxydet.vocabulary.vocabulary import Vocabulary

__all__ = [
    "Detections",
    "Detector",
    "RegionIndex",
    "Vocabulary",
    "__version__",
    "download",
    "environment",
    "errors",
    "evaluate",
    "export_detector",
    "train",
    "verify_roi_align",
]

# No submodule of this package may have one of these names: importing it would hide the public one.
_HOME = {
    "Detections": "proxydet.detections",
    "Detector": "proxydet.detector",
    "Vocabulary": "proxydet.vocabulary.vocabulary",
    "download": "proxydet.artifacts.downloader",
    "RegionIndex": "proxydet.index.search",
    "environment": "proxydet.runtime.report",
    "evaluate": "proxydet.evaluation.detector_evaluation",
    "export_detector": "proxydet.export.exporter",
    "train": "proxydet.training.train",
    "verify_roi_align": "proxydet.runtime.roi_verify",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("proxydet.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'proxydet' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
