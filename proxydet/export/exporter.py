"""Writes a detector into a file that runs without detectron2 (ONNX or torch.export), and proves that it finds the same.

Dimensions: N detections of the detector, M of the file.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401 registers the operators that a program uses
from PIL import Image, ImageDraw

from proxydet._version import __version__
from proxydet.data.images import ImageInput, Pixels, as_pixels
from proxydet.detector import Detector, to_network
from proxydet.errors import (
    ConfigError,
    DataError,
    InputError,
    MissingDependencyError,
    NumericsError,
    RuntimeEnvironmentError,
)
from proxydet.export.graph import Format, onnx_translations, silence_tracers, trace
from proxydet.export.runtime import (
    BOX_OUTPUTS,
    ONNX_SEAL,
    OUTPUTS,
    ExportMetadata,
    OnnxDetector,
    Outputs,
    check_exported,
    check_finite,
    graph_inputs,
    to_image,
)
from proxydet.files import staged, write_errors
from proxydet.modeling.postprocess import to_host
from proxydet.modeling.weights import weights_digest
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import seal
from proxydet.wording import first_line

# The oldest has RoIAlign with half pixels and everything else that the translation writes; onnxruntime (1.32) has no
# RoIAlign of sets 22 and later.
OPSETS = (18, 19, 20, 21)
DEFAULT_OPSET = 18

METADATA_FILE = "proxydet.json"
PROGRAM_SEAL = b"proxydet sha256 "
"""In front of a program's SHA-256; see `proxydet.weight_files.seal`."""

SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
VOCABULARY_SUFFIX = ".npz"

IOU_ABOVE = 0.99
SCORE_WITHIN = 1e-4
MATCHED_AT_LEAST = 0.99
MASKS_WITHIN = 0.01

# Network inputs of the proof, height and width: neither is the one that is traced, nor a multiple of a stride.
_PROOF_SIZES = ((250, 330), (417, 190))
_SHAPES = 12

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well an exported file agrees with the detector on one image."""

    image: str
    """Name of the image."""
    classes: int
    """Classes to detect."""
    detections: int
    """Detections of the detector in torch."""
    exported: int
    """Detections of the exported file."""
    matched: int
    """Pairs of the same class with an IoU above 0.99 and scores within 1e-4."""
    largest_score_difference: float
    """Among the matched."""
    largest_mask_difference: float | None
    """Among the matched, of mask probabilities; None for a detector of boxes."""

    @property
    def share(self) -> float:
        """Matched detections as a share of the larger number; 1 where neither found anything."""
        larger = max(self.detections, self.exported)
        return self.matched / larger if larger else 1.0

    @property
    def good(self) -> bool:
        """Whether at least 99 % are matched, and their masks differ nowhere by more than 0.01."""
        return (
            self.share >= MATCHED_AT_LEAST and (self.largest_mask_difference or 0) <= MASKS_WITHIN
        )


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported."""

    path: Path
    """The file."""
    format: Format
    """``onnx`` or ``torch``."""
    opset: int | None
    """ONNX operator set; None for ``torch``."""
    bytes: int
    """Size of the file."""
    seconds: float
    """Time to trace, translate and write it; the proof is not counted."""
    vocabulary: Path | None
    """The vocabulary next to it."""
    agreement: tuple[Agreement, ...]
    """How it agrees with the detector: on synthetic images, then on those that were given."""
    metadata: ExportMetadata
    """What the file says of itself."""


def export_detector(
    detector: Detector,
    path: Path | str,
    *,
    format: Format | None = None,
    opset: int = DEFAULT_OPSET,
    check: Sequence[ImageInput] = (),
    vocabulary: Vocabulary | None = None,
    progress: Callable[[str], None] = _log.info,
) -> ExportReport:
    """Write a detector into a file that runs without detectron2.

    The file takes any vocabulary and images of any size. Before it appears at ``path`` it is run, and must find what
    the detector finds.

    Args:
        detector: What to export; its settings (fusion weights, overlaps, limits) go into the file.
        path: The file, ``.onnx`` or ``.pt2``; an existing one is replaced.
        format: ``"onnx"``, or ``"torch"`` for a program of torch.export; None: by the path's suffix.
        opset: ONNX operator set.
        check: Images to compare on as well.
        vocabulary: Saved as ``.npz`` next to the file, so that it can be used where there is no text encoder; the
            comparison on images is for its classes. None: nothing is saved, and the classes of the training are compared.
        progress: Called with a line about each step.

    Raises:
        ConfigError: The format, the operator set or the detector's settings cannot be exported.
        MissingDependencyError: A package of the extra ``export`` is absent.
        InputError: An image cannot be read.
        RuntimeEnvironmentError: The file cannot be written.
        NumericsError: The file disagrees with the detector; nothing is left at ``path``.
    """
    path = Path(path)
    if format is None and path.suffix not in SUFFIXES:
        raise ConfigError(
            f"the suffix of {path.name} does not name a format",
            hint="end it in .onnx or .pt2, or give --format onnx or --format torch",
        )
    chosen = format or SUFFIXES[path.suffix]
    if chosen not in SUFFIXES.values():
        raise ConfigError(f"unknown format {format!r}", hint="choose onnx or torch")
    if path.is_dir():
        raise RuntimeEnvironmentError(
            f"{path} is a folder", hint="name the file that is to be written", path=path
        )
    companion = path.with_suffix(VOCABULARY_SUFFIX)
    if vocabulary is not None and path == companion:
        raise ConfigError(
            f"the vocabulary would replace the model: it is saved as {path.name} too",
            hint="end the model's name in .onnx or .pt2",
        )
    if detector.inference.augmented:
        raise ConfigError(
            "test-time augmentation cannot be exported: an exported file runs on each image once",
            hint="export without inference.flip and with inference.scales [1.0]",
        )
    if detector.inference.tiles:
        raise ConfigError(
            "tiles cannot be exported: an exported file runs on each image once",
            hint="export with inference.tiles 0, and cut images into tiles before it",
        )
    if chosen == "onnx":
        check_onnx(opset)
    images = [
        (str(image) if isinstance(image, str | Path) else f"image {index}", as_pixels(image))
        for index, image in enumerate(check)
    ]
    metadata = describe(detector, vocabulary)
    with staged(path) as temporary:
        started = time.perf_counter()
        progress("tracing the detector")
        program = trace(detector, chosen)
        progress("writing the file")
        with write_errors(path):
            if chosen == "onnx":
                save_onnx(program, temporary, metadata, opset)
            else:
                save_program(program, temporary, metadata)
        seconds = time.perf_counter() - started
        del program
        progress("comparing with the detector")
        exported = (
            OnnxDetector.from_file(temporary) if chosen == "onnx" else TorchProgram(temporary)
        )
        agreement = _prove(detector, exported, images, vocabulary or detector.vocabulary)
        if vocabulary is not None:
            vocabulary.save(companion)
        elif companion.is_file():
            progress(f"{companion} is of an earlier export and is not used with this model")
    return ExportReport(
        path=path,
        format=chosen,
        opset=opset if chosen == "onnx" else None,
        bytes=path.stat().st_size,
        seconds=seconds,
        vocabulary=None if vocabulary is None else companion,
        agreement=agreement,
        metadata=metadata,
    )


def describe(detector: Detector, vocabulary: Vocabulary | None = None) -> ExportMetadata:
    """Return what an exported file says of itself, and of the vocabulary that is saved next to it."""
    settings, config = detector.inference, detector.network.config
    return ExportMetadata(
        proxydet_version=__version__,
        torch_version=str(torch.__version__),
        backbone=config.backbone.kind,
        weights_sha256=weights_digest(detector.network),
        vocabulary_sha256=None if vocabulary is None else vocabulary.digest,
        embedding_dimension=config.classifier.embedding_dim,
        masks=settings.masks,
        mixup_branch=config.mixup_branch,
        alpha=settings.alpha,
        beta=settings.beta,
        nms_iou=settings.nms_iou,
        max_detections=settings.max_detections,
        one_class_per_proposal=settings.one_class_per_proposal,
        agnostic_nms=settings.agnostic_nms,
        scorers=True,
        rescore=settings.rescore,
        shortest=detector.sides[0],
        longest=detector.sides[1],
        sealed=True,
    )


# --- The two kinds of files ---------------------------------------------------------------------------------------------


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
                f"torch cannot open {path}: {first_line(error)}",
                hint="export it again with: proxydet export, with the same version of torch",
                path=path,
            ) from error
        self.metadata = ExportMetadata.from_text(extra[METADATA_FILE] or None, path, sealed=sealed)
        self._module = program.module()

    @torch.inference_mode()
    def run(self, scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float) -> Outputs:
        """Run the graph; see `proxydet.export.runtime.OnnxDetector.run`."""
        inputs = graph_inputs(scaled_hw3, vocabulary, score_threshold, self.metadata)
        outputs = self._module(*(torch.from_numpy(value.copy()) for value in inputs.values()))
        arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
        check_finite(arrays)
        return arrays


# --- The proof ---------------------------------------------------------------------------------------------------------


def _prove(
    detector: Detector,
    exported: OnnxDetector | TorchProgram,
    images: Sequence[tuple[str, Pixels]],
    vocabulary: Vocabulary,
) -> tuple[Agreement, ...]:
    """Compare on synthetic images, with every pair of region and class a candidate, then on those given.

    Raises:
        DataError: Nothing was found in any of them.
        NumericsError: They disagree.
    """
    training = detector.vocabulary
    results = []
    first, second = _PROOF_SIZES
    cases = [(first, training), (second, training.subset(training.names[:1]))]
    if len(training) > 1:  # not all of them can be background
        place_C = np.arange(len(training))
        scored = training.with_scorers(
            bias=np.sin(place_C),
            scale=1 + 0.2 * np.cos(place_C),
            threshold=np.where(place_C % 3 == 1, 0.1, np.nan),
            background=place_C % 4 == 3,
        )
        cases.append((second, scored))
    for size, classes in cases:
        own_size = Detector(
            detector.network, inference=detector.inference, shortest=min(size), longest=max(size)
        )
        name, pixels_HW3 = f"synthetic {size[1]} x {size[0]}", synthetic_image(*size)
        results.append(
            compare(own_size, exported, pixels_HW3, classes, name=name, score_threshold=0.0)
        )
    above = detector.inference.score_threshold
    results += [
        compare(detector, exported, pixels_HW3, vocabulary, name=name, score_threshold=above)
        for name, pixels_HW3 in images
    ]
    if not any(result.detections for result in results):
        raise DataError(
            "the detector finds nothing in any image, so the exported file cannot be verified",
            hint="give an image in which the detector finds something with --check",
        )
    for result in results:
        if not result.good:
            raise NumericsError(
                f"the exported file disagrees with the detector on {result.image}: {result.matched} of "
                f"{result.detections} detections match; the file was discarded",
                hint="please report it together with the output of: proxydet env",
            )
    return tuple(results)


def synthetic_image(height: int, width: int, seed: int = 0) -> Pixels:
    """Draw coloured boxes and discs on noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(96, 160, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for index in range(_SHAPES):
        side = int(rng.integers(8, max(min(height, width) // 2, 9)))
        left, top = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw = pen.rectangle if index % 2 else pen.ellipse
        draw((left, top, left + side, top + side), fill=colour)
    return np.array(image)


def compare(
    detector: Detector,
    exported: OnnxDetector | TorchProgram,
    pixels_HW3: Pixels,
    vocabulary: Vocabulary,
    *,
    name: str,
    score_threshold: float,
) -> Agreement:
    """Run both on an image.

    Args:
        detector: The detector.
        exported: The opened file.
        pixels_HW3: The image: uint8 RGB.
        vocabulary: What to detect.
        name: Of the image.
        score_threshold: Detections that score at most this are left out.
    """
    scaled = to_network(pixels_HW3, detector.sides)
    size = (pixels_HW3.shape[0], pixels_HW3.shape[1])
    settings = dataclasses.replace(
        detector.inference, score_threshold=score_threshold, precision="fp32"
    )
    predictions = detector.network.detect(
        [scaled], vocabulary, original_sizes=[size], settings=settings
    )
    (expected,) = to_host(predictions)
    image = np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())
    outputs = exported.run(image, vocabulary, score_threshold)
    found = to_image(outputs, image.shape[:2], size, vocabulary.reported)

    boxes_N4, boxes_M4 = (
        boxes.astype(np.float64) for boxes in (expected.boxes_N4.numpy(), found.boxes_xyxy)
    )
    top_left_NM2 = np.maximum(boxes_N4[:, None, :2], boxes_M4[None, :, :2])
    bottom_right_NM2 = np.minimum(boxes_N4[:, None, 2:], boxes_M4[None, :, 2:])
    shared_NM = np.clip(bottom_right_NM2 - top_left_NM2, 0, None).prod(axis=2)
    area_N, area_M = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_N4, boxes_M4))
    close_NM = shared_NM > IOU_ABOVE * (area_N[:, None] + area_M[None, :] - shared_NM)
    close_NM &= expected.classes_N.numpy()[:, None] == found.class_ids[None, :]
    gaps_NM = np.abs(expected.scores_N.numpy()[:, None] - found.scores[None, :])
    close_NM &= gaps_NM <= SCORE_WITHIN
    # One to one, best first.
    pairs = []
    for place in range(len(boxes_N4)):
        (candidates,) = close_NM[place].nonzero()
        if len(candidates):
            chosen = candidates[gaps_NM[place, candidates].argmin()]
            close_NM[:, chosen] = False
            pairs.append((place, chosen))
    first, second = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    mask_difference = None
    if expected.mask_probs_MSS is not None:
        assert found.mask_probs is not None
        assert found.mask_index is not None
        differences_PSS = (
            expected.mask_probs_MSS.numpy()[expected.mask_index_N.numpy()[first]]
            - found.mask_probs[found.mask_index[second]]
        )
        mask_difference = float(np.abs(differences_PSS).max(initial=0.0))
    return Agreement(
        image=name,
        classes=len(vocabulary),
        detections=len(expected),
        exported=len(found),
        matched=len(pairs),
        largest_score_difference=float(gaps_NM[first, second].max(initial=0.0)),
        largest_mask_difference=mask_difference,
    )
