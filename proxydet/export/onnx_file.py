"""Writing ONNX files."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from proxydet.errors import ConfigError, MissingDependencyError
from proxydet.export.metadata import ExportMetadata
from proxydet.export.onnx_operators import translations
from proxydet.export.program import quiet
from proxydet.export.runtime import BOX_OUTPUTS, OUTPUTS, SEAL
from proxydet.weight_files import seal

# The oldest has RoIAlign with half pixels and everything else that the translation writes; onnxruntime (1.32) has no
# RoIAlign of sets 22 and later.
OPSETS = (18, 19, 20, 21)
DEFAULT_OPSET = 18


def check_onnx(opset: int) -> None:
    """Make sure, before any work is done, that an ONNX file can be written.

    Raises:
        ConfigError: The operator set is not supported.
        MissingDependencyError: A package of the extra ``export`` is absent.
    """
    if opset not in OPSETS:
        raise ConfigError(
            f"the ONNX operator set {opset} is not supported",
            hint=f"there are {OPSETS[0]} to {OPSETS[-1]}; the least is the one that most programs can read",
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"exporting to ONNX needs the package {package}, which is not installed",
                hint="run: pip install 'proxydet[export]'",
            ) from error


def save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: ExportMetadata,
    opset: int,
    *,
    output_names: Sequence[str] | None = None,
) -> None:
    """Translate a program to ONNX and write it, weights and digest included, into one file."""
    with warnings.catch_warnings(), _less_talk():
        quiet()
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            output_names=list(output_names or (OUTPUTS if metadata.masks else BOX_OUTPUTS)),
            custom_translation_table=translations(),
            external_data=False,
            optimize=True,
            verbose=False,
        )
    if translated is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    translated.model.metadata_props["proxydet"] = metadata.to_text()
    translated.save(path, external_data=False)
    seal(path, SEAL)


@contextmanager
def _less_talk() -> Iterator[None]:
    """Silence what onnxscript logs about its own rewriting."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
