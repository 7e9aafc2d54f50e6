"""Runs an exported ONNX file. Needs numpy, Pillow and onnxruntime; neither torch nor detectron2.

::

    from proxydet.export.runtime import OnnxDetector

    detector = OnnxDetector.from_file("detector.onnx")
    found = detector.predict("desk.jpg", "kitchen.npz", score_threshold=0.3)

Dimensions: N detections, M distinct boxes, S side of a mask, C classes, D embedding, H and W the picture, h and w as it
goes into the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.images import read_image
from proxydet.data.transforms import shortest_side
from proxydet.errors import InputError, MissingDependencyError, NumericsError, VocabularyError
from proxydet.export.found import Found, to_picture
from proxydet.export.metadata import REMEDY, ExportMetadata
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import check_seal

Pixels = npt.NDArray[np.uint8]
Picture = str | Path | Image.Image | Pixels
Outputs = dict[str, npt.NDArray[Any]]

INPUTS = ("image", "text", "base", "score_threshold")
"""Names of the file's inputs."""

# An entry of the model's metadata (field 14: key, value) at the end of the file: protobuf joins repeated fields.
_KEY = b"proxydet_sha256"
_ENTRY = b"\x0a" + bytes([len(_KEY)]) + _KEY + b"\x12" + bytes([64])
SEAL = b"\x72" + bytes([len(_ENTRY) + 64]) + _ENTRY
"""In front of the file's SHA-256; see `proxydet.weight_files.seal`."""

_NONE_BESIDE = "there is no vocabulary beside the model"

OUTPUTS = ("boxes", "scores", "classes", "masks", "mask_index", "finite")
"""Names of its outputs."""
BOX_OUTPUTS = ("boxes", "scores", "classes", "finite")
"""Names of the outputs of a detector that finds boxes only."""


class OnnxDetector:
    """A detector in an ONNX file.

    Attributes:
        metadata: What the file says of itself.
        vocabulary: The classes that were exported with the file, in the ``.npz`` of the same name beside it; None
            where there are none, or where that file is another.
    """

    def __init__(
        self,
        session: Any,
        metadata: ExportMetadata,
        vocabulary: Vocabulary | None,
        *,
        absence: str = _NONE_BESIDE,
    ) -> None:
        """Wrap a session; `from_file` makes one.

        Args:
            session: An ``onnxruntime.InferenceSession``.
            metadata: Of the file.
            vocabulary: What `predict` looks for where it is given nothing.
            absence: Why there is none.
        """
        self._session = session
        self._absence = absence
        self.metadata = metadata
        self.vocabulary = vocabulary

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> OnnxDetector:
        """Open a file of ``proxydet export --format onnx``.

        Args:
            path: The file.
            threads: Threads of one operator; None: as many as onnxruntime likes.
            providers: Where onnxruntime computes, best first.

        Raises:
            InputError: The file is absent, damaged, or was not made by proxydet.
            MissingDependencyError: onnxruntime is not installed.
        """
        path = Path(path)
        runtime = _onnxruntime()
        if not path.is_file():
            raise InputError(
                f"there is no file {path}", hint="make one with: proxydet export", path=path
            )
        sealed = check_seal(path, SEAL, hint=REMEDY)
        options = runtime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = runtime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise InputError(
                f"onnxruntime cannot open {path}: {str(error).partition(chr(10))[0]}",
                hint=REMEDY,
                path=path,
            ) from error
        properties = session.get_modelmeta().custom_metadata_map
        metadata = ExportMetadata.from_text(properties.get("proxydet"), path, sealed=sealed)
        companion = path.with_suffix(".npz")
        if not companion.is_file():
            return cls(session, metadata, None)
        vocabulary = Vocabulary.load(companion)
        if vocabulary.digest == metadata.vocabulary_sha256:
            return cls(session, metadata, vocabulary)
        return cls(session, metadata, None, absence=f"{companion} was not exported with this model")

    def predict(
        self,
        image: Picture,
        vocabulary: Vocabulary | Path | str | None = None,
        *,
        score_threshold: float = 0.3,
    ) -> Found:
        """Find objects in a picture.

        Args:
            image: A file, a Pillow image, or uint8 (H, W, 3) RGB.
            vocabulary: What to look for: a vocabulary, a file of ``proxydet vocab build`` or that was saved beside the
                model; None takes the one beside the model, if it was exported with it. Which classes count as base is taken from it as it is.
            score_threshold: Only detections that score above this, 0 to 1.

        Raises:
            InputError: The picture or the vocabulary cannot be used, or the threshold is out of range.
            NumericsError: The network gave values that are not finite.
        """
        if not 0 <= score_threshold <= 1:  # false for NaN, too
            raise InputError(
                f"the score threshold must be 0 to 1, not {score_threshold}",
                hint="0.3 shows what is likely, 0.02 nearly everything",
            )
        pixels = _as_pixels(image)
        classes = self._classes(vocabulary)
        scaled = shortest_side(
            *pixels.shape[:2], shortest=self.metadata.shortest, longest=self.metadata.longest
        ).image(pixels)
        outputs = self.run(scaled, classes, score_threshold)
        return to_picture(outputs, scaled.shape[:2], pixels.shape[:2], classes.names)

    def run(self, scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float) -> Outputs:
        """Run the file's graph on a picture that is scaled already.

        Returns:
            The outputs by name, boxes in the pixels of ``scaled_hw3``.

        Raises:
            NumericsError: The network gave values that are not finite.
        """
        values = (
            np.ascontiguousarray(scaled_hw3),
            vocabulary.embeddings,
            vocabulary.base,
            np.float32(score_threshold),
        )
        inputs = dict(zip(INPUTS, (np.asarray(value) for value in values), strict=True))
        names = OUTPUTS if self.metadata.masks else BOX_OUTPUTS
        outputs = dict(zip(names, self._session.run(list(names), inputs), strict=True))
        check_finite(outputs)
        return outputs

    def _classes(self, vocabulary: Vocabulary | Path | str | None) -> Vocabulary:
        if vocabulary is None:
            vocabulary = self.vocabulary
        if vocabulary is None:
            raise VocabularyError(
                f"nothing says what to look for: {self._absence}",
                hint="give a vocabulary (of proxydet vocab build, or the file that you mean), or export with --vocabulary",
            )
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.load(vocabulary)
        expected = self.metadata.embedding_dimension
        if vocabulary.dimension != expected:
            raise VocabularyError(
                f"the vocabulary's embeddings have {vocabulary.dimension} dimensions, the model's have {expected}",
                hint="embed the class names with the text encoder that the model was trained with",
            )
        return vocabulary


def check_finite(outputs: Outputs) -> None:
    """Refuse what a network with damaged weights gave.

    Raises:
        NumericsError: The network gave values that are not finite.
    """
    if not bool(outputs["finite"]):
        raise NumericsError(
            "the network gave values that are not finite", hint="the exported weights are damaged"
        )


def _as_pixels(image: Picture) -> Pixels:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"a picture as an array must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}",
            hint="give RGB pixels from 0 to 255, or a file",
        )
    return image


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "running an ONNX file needs the package onnxruntime, which is not installed",
            hint="run: pip install onnxruntime",
        ) from error
    return onnxruntime
