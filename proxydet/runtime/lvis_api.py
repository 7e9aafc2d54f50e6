"""The official LVIS evaluator's classes, without what its package does on import.

``import lvis`` loads OpenCV and matplotlib for drawing and reconfigures the root logger, and its evaluator asks
for ``np.float``, which numpy 2 does not have. Its modules are loaded here from the same files past the package's
``__init__``, and the evaluator sees a numpy namespace of its own. Nothing installed changes.

Attributes:
    LVIS: Ground truth: ``LVIS(annotation_path)``.
    LVISEval: The evaluator: ``LVISEval(ground_truth, results, iou_type="segm")``.
    LVISResults: Detections: ``LVISResults(ground_truth, results, max_dets=300)``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from proxydet.errors import MissingDependencyError
from proxydet.runtime.stand_ins import NamespaceOverlay, temporary_module


def _load(name: str) -> ModuleType:
    if "lvis" in sys.modules:
        return importlib.import_module(f"lvis.{name}")
    spec = find_spec("lvis")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "The package lvis, the official LVIS evaluator, is not installed.",
            hint="reinstall proxydet in this environment; its dependencies include lvis",
        )
    # An empty package with the real folder: its modules import each other, its __init__ never runs.
    package = ModuleType("lvis")
    package.__path__ = list(spec.submodule_search_locations)
    with temporary_module("lvis", package):
        return importlib.import_module(f"lvis.{name}")


_evaluator, _results = _load("eval"), _load("results")
if not isinstance(_evaluator.__dict__["np"], NamespaceOverlay):
    _evaluator.__dict__["np"] = NamespaceOverlay(_evaluator.__dict__["np"], {"float": float})
# Logger.warn is deprecated. All that the results warn of is that those given as a list are taken as they are.
for _module, _level in ((_evaluator, logging.WARNING), (_results, logging.INFO)):
    _logger = logging.getLogger(_module.__name__)
    _logger.warn = partial(_logger.log, _level)  # type: ignore[method-assign]

LVIS: Any = _load("lvis").LVIS
LVISResults: Any = _results.LVISResults
LVISEval: Any = _evaluator.LVISEval
