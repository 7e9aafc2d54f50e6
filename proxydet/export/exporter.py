"""Writes a detector into a file that runs without detectron2, and proves that it finds the same."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch

from proxydet._version import __version__
from proxydet.detector import Detector, as_pixels
from proxydet.detector import ImageInput as Picture
from proxydet.errors import ConfigError, DataError, EnvironmentProblem, NumericsError
from proxydet.export.agreement import Agreement, Pixels, Runner, compare
from proxydet.export.drawn import drawn_picture
from proxydet.export.graph import DetectorGraph
from proxydet.export.metadata import ExportMetadata
from proxydet.export.onnx_file import DEFAULT_OPSET, check_onnx, save_onnx
from proxydet.export.onnx_operators import OnnxSuppression
from proxydet.export.program import TorchProgram, quiet, save_program
from proxydet.export.runtime import OnnxDetector
from proxydet.export.suppression import TorchvisionSuppression
from proxydet.files import staged, write_errors
from proxydet.modeling.config import InferenceConfig
from proxydet.vocabulary.vocabulary import Vocabulary

Format = Literal["onnx", "torch"]
SUFFIXES = {".onnx": "onnx", ".pt2": "torch"}
VOCABULARY_SUFFIX = ".npz"

# Network inputs of the proof, height and width: neither is the one that is traced, nor a multiple of a stride.
_PROOF_SIZES = ((250, 330), (417, 190))
_TRACED_SIZE = (200, 264)
_TRACED_CLASSES = 5

_log = logging.getLogger(__name__)


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
    """The vocabulary beside it."""
    agreement: tuple[Agreement, ...]
    """How it agrees with the detector: on drawn pictures, then on those that were given."""
    metadata: ExportMetadata
    """What the file says of itself."""


def export_detector(
    detector: Detector,
    path: Path | str,
    *,
    format: Format | None = None,
    opset: int = DEFAULT_OPSET,
    check: Sequence[Picture] = (),
    vocabulary: Vocabulary | None = None,
    progress: Callable[[str], None] = _log.info,
) -> ExportReport:
    """Write a detector into a file that runs without detectron2.

    The file takes any vocabulary and pictures of any size. Before it appears at ``path`` it is run, and must find what
    the detector finds.

    Args:
        detector: What to export; its settings (fusion weights, overlaps, limits) go into the file.
        path: The file, ``.onnx`` or ``.pt2``; an existing one is replaced.
        format: ``"onnx"``, or ``"torch"`` for a program of torch.export; None: what the path's ending says.
        opset: ONNX operator set.
        check: Pictures to compare on as well.
        vocabulary: Saved as ``.npz`` beside the file, so that it can be used where there is no text encoder; the
            comparison on pictures looks for it. None: nothing is saved, and the classes of the training are looked for.
        progress: Told what is being done.

    Raises:
        ConfigError: The format, the operator set or the detector's settings cannot be exported.
        MissingDependencyError: A package of the extra ``export`` is absent.
        InputError: A picture cannot be read.
        EnvironmentProblem: The file cannot be written.
        NumericsError: The file finds something else than the detector; nothing is left at ``path``.
    """
    path = Path(path)
    chosen = _format(path, format)
    _check_place(path, with_vocabulary=vocabulary is not None)
    _check_settings(detector.inference)
    if chosen == "onnx":
        check_onnx(opset)
    pictures = [(_name(picture, index), as_pixels(picture)) for index, picture in enumerate(check)]
    metadata = _metadata(detector, vocabulary)
    beside = path.with_suffix(VOCABULARY_SUFFIX)
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
        agreement = _prove(detector, _open(temporary, chosen), pictures, vocabulary)
        if vocabulary is not None:
            vocabulary.save(beside)
        elif beside.is_file():
            progress(f"{beside} was there before: it is not this model's, and is not used with it")
    return ExportReport(
        path=path,
        format=chosen,
        opset=opset if chosen == "onnx" else None,
        bytes=path.stat().st_size,
        seconds=seconds,
        vocabulary=None if vocabulary is None else beside,
        agreement=agreement,
        metadata=metadata,
    )


def trace(detector: Detector, format: Format) -> torch.export.ExportedProgram:
    """Trace a detector with free picture size and number of classes.

    Args:
        detector: What to trace; not changed.
        format: What the program is meant for.
    """
    suppression = OnnxSuppression() if format == "onnx" else TorchvisionSuppression()
    graph = DetectorGraph(detector.network, detector.inference, suppression)
    dimension = detector.network.config.classifier.embedding_dim
    example = (
        torch.zeros(*_TRACED_SIZE, 3, dtype=torch.uint8),
        torch.ones(_TRACED_CLASSES, dimension),
        torch.ones(_TRACED_CLASSES, dtype=torch.bool),
        torch.tensor(0.5),
    )
    free = torch.export.Dim.DYNAMIC
    classes = torch.export.Dim("classes", min=1)
    shapes: tuple[dict[int, object], ...] = ({0: free, 1: free}, {0: classes}, {0: classes}, {})
    with warnings.catch_warnings(), torch.no_grad():
        quiet()
        return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)


def _format(path: Path, format: Format | None) -> Format:
    if format is not None:
        if format not in SUFFIXES.values():
            raise ConfigError(f"there is no format {format!r}", hint="there are onnx and torch")
        return format
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"the name {path.name} does not say which format is wanted",
            hint="end it in .onnx or .pt2, or give --format onnx or --format torch",
        )
    return cast(Format, SUFFIXES[path.suffix])


def _check_place(path: Path, *, with_vocabulary: bool) -> None:
    if path.is_dir():
        raise EnvironmentProblem(
            f"{path} is a folder", hint="name the file that is to be written", path=path
        )
    if with_vocabulary and path.suffix == VOCABULARY_SUFFIX:
        raise ConfigError(
            f"the vocabulary would take the model's place: it is saved as {path.name} too",
            hint="end the model's name in .onnx or .pt2",
        )


def _check_settings(settings: InferenceConfig) -> None:
    if settings.flip or settings.scales != (1.0,):
        raise ConfigError(
            "test-time augmentation cannot be exported: the file looks at a picture once",
            hint="export without inference.flip and with inference.scales [1.0]",
        )


def _name(picture: Picture, index: int) -> str:
    return str(picture) if isinstance(picture, str | Path) else f"picture {index}"


def _metadata(detector: Detector, vocabulary: Vocabulary | None = None) -> ExportMetadata:
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
        shortest=detector.sides[0],
        longest=detector.sides[1],
        sealed=True,
    )


def weights_digest(network: torch.nn.Module) -> str:
    """Return the SHA-256, hexadecimal, of the parameters: names, shapes and float32 values in the order of the names."""
    digest = hashlib.sha256()
    for name, values in sorted(network.named_parameters()):
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values.detach().cpu().float().numpy()).data)
    return digest.hexdigest()


def _open(path: Path, format: Format) -> Runner:
    return OnnxDetector.from_file(path) if format == "onnx" else TorchProgram(path)


def _prove(
    detector: Detector,
    runner: Runner,
    pictures: list[tuple[str, Pixels]],
    vocabulary: Vocabulary | None,
) -> tuple[Agreement, ...]:
    """Compare on two drawn pictures, with every pair of region and class a candidate, then on those given.

    Raises:
        NumericsError: They disagree.
    """
    training = detector.vocabulary
    results = []
    for (height, width), classes in zip(
        _PROOF_SIZES, (training, training.subset(training.names[:1])), strict=True
    ):
        own_size = Detector(
            detector.network,
            inference=detector.inference,
            shortest=min(height, width),
            longest=max(height, width),
        )
        name = f"drawn {width} x {height}"
        picture = drawn_picture(height, width)
        results.append(compare(own_size, runner, picture, classes, name=name, score_threshold=0.0))
    for name, pixels_HW3 in pictures:
        results.append(
            compare(
                detector,
                runner,
                pixels_HW3,
                vocabulary or training,
                name=name,
                score_threshold=detector.inference.score_threshold,
            )
        )
    if not any(result.detections for result in results):
        raise DataError(
            "nothing was found in any picture, so nothing shows that the file is right",
            hint="give a picture in which the detector finds something with --check",
        )
    for result in results:
        if not result.good:
            raise NumericsError(
                f"the exported file finds something else than the detector on {result.picture}: {result.matched} of "
                f"{result.detections} detections are the same; it was not kept",
                hint="please report it together with the output of: proxydet env",
            )
    return tuple(results)
