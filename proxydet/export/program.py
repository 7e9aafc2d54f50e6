"""Exported detectors as programs of torch.export: writing, and running with torch and torchvision alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision  # noqa: F401 registers the operators that a program uses

from proxydet.errors import InputError
from proxydet.export.metadata import REMEDY, ExportMetadata
from proxydet.export.runtime import check_finite
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import check_seal, seal

METADATA_FILE = "proxydet.json"
SEAL = b"proxydet sha256 "
"""In front of the file's SHA-256; see `proxydet.weight_files.seal`."""


def save_program(
    program: torch.export.ExportedProgram, path: Path, metadata: ExportMetadata
) -> None:
    """Write a ``.pt2`` with its metadata and digest."""
    with path.open("wb") as file, warnings.catch_warnings():
        quiet()
        torch.export.save(program, file, extra_files={METADATA_FILE: metadata.to_text()})
    with path.open(
        "r+b"
    ) as file:  # announce the digest as the comment at the end of the zip archive
        file.seek(-2, 2)
        file.write((len(SEAL) + 64).to_bytes(2, "little"))
    seal(path, SEAL)


class TorchProgram:
    """A detector in a file of ``proxydet export --format torch``.

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
        if not path.is_file():
            raise InputError(
                f"there is no file {path}", hint="make one with: proxydet export", path=path
            )
        sealed = check_seal(path, SEAL, hint=REMEDY)
        extra = {METADATA_FILE: ""}
        try:
            with path.open("rb") as file:
                program = torch.export.load(file, extra_files=extra)
        except Exception as error:  # torch raises many kinds for a damaged archive
            raise InputError(
                f"torch cannot open {path}: {str(error).partition(chr(10))[0]}",
                hint="make it again with: proxydet export, with the same version of torch",
                path=path,
            ) from error
        self.metadata = ExportMetadata.from_text(extra[METADATA_FILE] or None, path, sealed=sealed)
        self._module = program.module()

    @torch.inference_mode()
    def run(
        self, scaled_hw3: npt.NDArray[np.uint8], vocabulary: Vocabulary, score_threshold: float
    ) -> dict[str, npt.NDArray[Any]]:
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


def quiet() -> None:
    """Silence, inside ``warnings.catch_warnings``, what torch's and torchvision's tracers say of themselves."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
