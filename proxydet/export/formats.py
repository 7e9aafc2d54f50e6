"""The two kinds of exported files: ONNX, and programs of torch.export with their runner."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision  # noqa: F401 registers the operators that a program uses

from proxydet.data.images import Pixels
from proxydet.errors import ConfigError, InputError, MissingDependencyError
from proxydet.export.graph import onnx_translations, silence_tracers
from proxydet.export.runtime import (
    BOX_OUTPUTS,
    ONNX_SEAL,
    OUTPUTS,
    ExportMetadata,
    Outputs,
    check_exported,
    check_finite,
)
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import seal

# The oldest has RoIAlign with half pixels and everything else that the translation writes; onnxruntime (1.32) has no
# RoIAlign of sets 22 and later.
OPSETS = (18, 19, 20, 21)
DEFAULT_OPSET = 18

METADATA_FILE = "proxydet.json"
PROGRAM_SEAL = b"proxydet sha256 "
"""In front of a program's SHA-256; see `proxydet.weight_files.seal`."""


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
    # onnxscript logs its own rewriting.
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            silence_tracers()
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=list(output_names or (OUTPUTS if metadata.masks else BOX_OUTPUTS)),
                custom_translation_table=onnx_translations(),
                external_data=False,
                optimize=True,
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if translated is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    translated.model.metadata_props["proxydet"] = metadata.to_text()
    translated.save(path, external_data=False)
    seal(path, ONNX_SEAL)


def save_program(
    program: torch.export.ExportedProgram, path: Path, metadata: ExportMetadata
) -> None:
    """Write a ``.pt2`` with its metadata and digest."""
    with path.open("wb") as file, warnings.catch_warnings():
        silence_tracers()
        torch.export.save(program, file, extra_files={METADATA_FILE: metadata.to_text()})
    with path.open("r+b") as file:
        # Announce the digest as the comment at the end of the zip archive.
        file.seek(-2, 2)
        file.write((len(PROGRAM_SEAL) + 64).to_bytes(2, "little"))
    seal(path, PROGRAM_SEAL)


class TorchProgram:
    """A detector in a file of ``proxydet export --format torch``; it runs with torch and torchvision alone.

    Attributes:
        metadata: What the file says of itself.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a file.

        Args:
            path: The file; like every file of torch.export, open it only if you trust where it comes from.

        Raises:
            InputError: It is absent, damaged, or was not made by proxydet.
        """
        path = Path(path)
        sealed = check_exported(path, PROGRAM_SEAL)
        extra = {METADATA_FILE: ""}
        try:
            with path.open("rb") as file:
                program = torch.export.load(file, extra_files=extra)
        except Exception as error:  # torch raises many kinds for a damaged archive
            raise InputError(
                f"torch cannot open {path}: {str(error).partition(chr(10))[0]}",
                hint="export it again with: proxydet export, with the same version of torch",
                path=path,
            ) from error
        self.metadata = ExportMetadata.from_text(extra[METADATA_FILE] or None, path, sealed=sealed)
        self._module = program.module()

    @torch.inference_mode()
    def run(self, scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float) -> Outputs:
        """Run the graph; see `proxydet.export.runtime.OnnxDetector.run`."""
        outputs = self._module(
            torch.from_numpy(scaled_hw3),
            torch.from_numpy(vocabulary.embeddings.copy()),
            torch.from_numpy(vocabulary.base.copy()),
            torch.tensor(score_threshold, dtype=torch.float32),
        )
        arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
        check_finite(arrays)
        return arrays
