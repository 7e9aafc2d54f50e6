"""Runs an exported ONNX file. Needs numpy, Pillow and onnxruntime; neither torch nor detectron2.

::

    from proxydet.export.runtime import OnnxDetector

    detector = OnnxDetector.from_file("detector.onnx")
    found = detector.predict("desk.jpg", "kitchen.npz", score_threshold=0.3)

Dimensions: N detections, M distinct boxes, S side of a mask, C classes, D embedding, H and W the image, h and w as it
goes into the network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from proxydet.data.images import ImageInput, Pixels, as_pixels, shortest_side
from proxydet.errors import InputError, MissingDependencyError, NumericsError, VocabularyError
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import check_seal
from proxydet.wording import first_line

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Outputs = dict[str, npt.NDArray[Any]]

INPUTS = ("image", "text", "base", "score_threshold")
"""Names of the inputs of every file."""
SCORER_INPUTS = ("bias", "scale", "threshold", "background")
"""Names of the inputs behind them, for classes that are not plain text; files of version 0.1 have none."""
OUTPUTS = ("boxes", "scores", "classes", "masks", "mask_index", "finite")
"""Names of its outputs."""
BOX_OUTPUTS = ("boxes", "scores", "classes", "finite")
"""Names of the outputs of a detector without masks."""

# An entry of the model's metadata (field 14: key, value) at the end of the file: protobuf joins repeated fields.
_KEY = b"proxydet_sha256"
_ENTRY = b"\x0a" + bytes([len(_KEY)]) + _KEY + b"\x12" + bytes([64])
ONNX_SEAL = b"\x72" + bytes([len(_ENTRY) + 64]) + _ENTRY
"""In front of an ONNX file's SHA-256; see `proxydet.weight_files.seal`."""

REMEDY = (
    "copy it again, or export it again with: proxydet export (an ONNX file changed on purpose? remove proxydet_sha256 from "
    'its metadata_props, and "sealed" from the JSON under proxydet)'
)
"""What to do about a file that is not what was exported."""

_MASK_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """Stored as JSON: in an ONNX file under the property ``proxydet``, in a torch program as the file ``proxydet.json``."""

    proxydet_version: str
    """Version that exported it."""
    torch_version: str
    """Version of torch that exported it."""
    backbone: str
    """``resnet`` or ``swin``."""
    weights_sha256: str
    """Digest of the weights that were exported: of names, shapes and values in the order of the names."""
    vocabulary_sha256: str | None
    """Digest of the vocabulary that was saved next to the file; None where none was."""
    embedding_dimension: int
    """Dimensions that text embeddings must have."""
    masks: bool
    """Whether it predicts masks; a detector without a mask head predicts boxes only."""
    mixup_branch: bool
    """Whether the scores of two branches are fused."""
    alpha: float
    """Weight of the mixup branch for base classes."""
    beta: float
    """Weight of the mixup branch for novel classes."""
    nms_iou: float
    """IoU above which the lower-scored of two detections of one class is dropped."""
    max_detections: int
    """Detections at most."""
    one_class_per_proposal: bool
    """Whether only the best class of each proposal is kept."""
    agnostic_nms: bool
    """Whether NMS takes all classes at once: one label a box."""
    scorers: bool
    """Whether bias, scale, threshold and background of the classes are inputs. Version 0.1 had none."""
    rescore: bool
    """Whether overlapping proposals count for each other."""
    shortest: int
    """Images are scaled so that their shortest side has this many pixels,"""
    longest: int
    """but the longest at most this many."""
    sealed: bool
    """Whether the file's SHA-256 is at its end: absence means damage. Version 0.1 wrote none."""

    def to_text(self) -> str:
        """Return JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str | None, path: Path, *, sealed: bool) -> ExportMetadata:
        """Read what `to_text` wrote.

        Args:
            text: JSON; None where the file has none.
            path: The file that it comes from.
            sealed: Whether `proxydet.weight_files.check_seal` found a digest in it.

        Raises:
            InputError: There is none, or it is not complete; or the digest that it announces is absent.
        """
        hint = "make a file with: proxydet export"
        if text is None:
            raise InputError(f"{path} was not made by proxydet", hint=hint, path=path)
        try:
            # Version 0.1 always exported masks, no digest, NMS of each class alone, classes of text, and scores of each proposal alone.
            earlier = {"masks": True, "sealed": False, "agnostic_nms": False}
            earlier |= {"scorers": False, "rescore": False}
            content = {**earlier, **json.loads(text)}
            metadata = msgspec.convert(content, cls)
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise InputError(
                f"{path} was made by another version of proxydet, or is damaged",
                hint=hint,
                path=path,
            ) from error
        if metadata.sealed and not sealed:
            raise InputError(
                f"{path} is damaged: its SHA-256 is not where proxydet export wrote it",
                hint=REMEDY,
                path=path,
            )
        return metadata


def check_exported(path: Path, mark: bytes) -> bool:
    """Check that a file is there, and whole where it carries its digest.

    Args:
        path: An exported file.
        mark: What stands in front of the digest.

    Returns:
        Whether it carries its digest.

    Raises:
        InputError: It is absent, or changed since it was written.
    """
    if not path.is_file():
        raise InputError(
            f"there is no file {path}", hint="make one with: proxydet export", path=path
        )
    return check_seal(path, mark, hint=REMEDY)


class OnnxDetector:
    """A detector in an ONNX file.

    Attributes:
        metadata: What the file says of itself.
        vocabulary: The classes that were exported with the file, in the ``.npz`` of the same name next to it; None
            where there are none, or where that file is another.
    """

    def __init__(
        self,
        session: Any,
        metadata: ExportMetadata,
        vocabulary: Vocabulary | None,
        *,
        absence: str = "there is no vocabulary next to the model",
    ) -> None:
        """Wrap a session; `from_file` makes one.

        Args:
            session: An ``onnxruntime.InferenceSession``.
            metadata: Of the file.
            vocabulary: What `predict` detects where it is given nothing.
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
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "running an ONNX file needs the package onnxruntime, which is not installed",
                hint="run: pip install onnxruntime",
            ) from error
        sealed = check_exported(path, ONNX_SEAL)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise InputError(
                f"onnxruntime cannot open {path}: {first_line(error)}",
                hint=REMEDY,
                path=path,
            ) from error
        properties = session.get_modelmeta().custom_metadata_map
        metadata = ExportMetadata.from_text(properties.get("proxydet"), path, sealed=sealed)
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        expected = {*INPUTS, *(SCORER_INPUTS if metadata.scorers else ())}
        if inputs != expected or not outputs.issuperset(OUTPUTS if metadata.masks else BOX_OUTPUTS):
            raise InputError(
                f"the inputs or outputs of {path} are not those that its metadata say",
                hint=REMEDY,
                path=path,
            )
        companion = path.with_suffix(".npz")
        if not companion.is_file():
            return cls(session, metadata, None)
        vocabulary = Vocabulary.load(companion)
        if vocabulary.digest == metadata.vocabulary_sha256:
            return cls(session, metadata, vocabulary)
        return cls(session, metadata, None, absence=f"{companion} was not exported with this model")

    def predict(
        self,
        image: ImageInput,
        vocabulary: Vocabulary | Path | str | None = None,
        *,
        score_threshold: float = 0.3,
    ) -> Found:
        """Detect objects in an image.

        Args:
            image: A file, a Pillow image, or uint8 (H, W, 3) RGB.
            vocabulary: What to detect: a vocabulary, a file of ``proxydet vocab build`` or one that was saved next to the
                model; None takes the one next to the model, if it was exported with it. Which classes count as base is
                taken from it as it is.
            score_threshold: Only detections that score above this, 0 to 1.

        Raises:
            InputError: The image or the vocabulary cannot be used, or the threshold is out of range.
            NumericsError: The network gave values that are not finite.
        """
        if not 0 <= score_threshold <= 1:  # false for NaN, too
            raise InputError(
                f"the score threshold must be 0 to 1, not {score_threshold}",
                hint="0.3 shows what is likely, 0.02 nearly everything",
            )
        pixels = as_pixels(image)
        classes = self.vocabulary if vocabulary is None else vocabulary
        if classes is None:
            raise VocabularyError(
                f"no classes were given: {self._absence}",
                hint="give a vocabulary (of proxydet vocab build, or the file that you mean), or export with --vocabulary",
            )
        if not isinstance(classes, Vocabulary):
            classes = Vocabulary.load(classes)
        expected = self.metadata.embedding_dimension
        if classes.dimension != expected:
            raise VocabularyError(
                f"the vocabulary's embeddings have {classes.dimension} dimensions, the model's have {expected}",
                hint="embed the class names with the text encoder that the model was trained with",
            )
        scaled = shortest_side(
            *pixels.shape[:2], shortest=self.metadata.shortest, longest=self.metadata.longest
        ).image(pixels)
        outputs = self.run(scaled, classes, score_threshold)
        return to_image(outputs, scaled.shape[:2], pixels.shape[:2], classes.reported)

    def run(self, scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float) -> Outputs:
        """Run the file's graph on an image that is scaled already.

        Returns:
            The outputs by name, boxes in the pixels of ``scaled_hw3``.

        Raises:
            NumericsError: The network gave values that are not finite.
            VocabularyError: The classes are not plain text, and the file takes no others.
        """
        inputs = graph_inputs(scaled_hw3, vocabulary, score_threshold, self.metadata)
        names = OUTPUTS if self.metadata.masks else BOX_OUTPUTS
        outputs = dict(zip(names, self._session.run(list(names), inputs), strict=True))
        check_finite(outputs)
        return outputs


def graph_inputs(
    scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float, metadata: ExportMetadata
) -> Outputs:
    """Return the inputs of a file's graph by name, in their order.

    Raises:
        VocabularyError: The classes are not plain text, and the file takes no others.
    """
    image, threshold = np.ascontiguousarray(scaled_hw3), np.array(score_threshold, np.float32)
    values = (image, vocabulary.embeddings, vocabulary.base, threshold)
    inputs: Outputs = dict(zip(INPUTS, values, strict=True))
    if metadata.scorers:
        return inputs | {name: vocabulary.scorers[name] for name in SCORER_INPUTS}
    if not vocabulary.plain:
        raise VocabularyError(
            f"the classes have a bias, scale, threshold or background, for which this file of proxydet {metadata.proxydet_version} "
            "has no inputs",
            hint="export the detector again with: proxydet export",
        )
    return inputs


def check_finite(outputs: Outputs) -> None:
    """Refuse what a network with damaged weights gave.

    Raises:
        NumericsError: The network gave values that are not finite.
    """
    if not bool(outputs["finite"]):
        raise NumericsError(
            "the network returned values that are not finite",
            hint="the exported weights are damaged",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that was found in one image, best first; the fields are named as `proxydet.Detections`' are.

    Attributes:
        boxes_xyxy: float32 (N, 4), left, top, right, bottom in pixels of the image.
        scores: float32 (N,), descending.
        class_ids: int64 (N,), places in the vocabulary, from 0.
        labels: Class name of each detection.
        image_size: Height and width of the image in pixels.
        mask_probs: float32 (M, S, S), probabilities inside the boxes; None where the file gives boxes only.
        mask_index: int64 (N,), the mask of each detection; None likewise.
    """

    boxes_xyxy: Floats
    scores: Floats
    class_ids: Integers
    labels: tuple[str, ...]
    image_size: tuple[int, int]
    mask_probs: Floats | None
    mask_index: Integers | None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def has_masks(self) -> bool:
        """Whether the exported detector predicts masks."""
        return self.mask_probs is not None

    def mask(self, index: int) -> Bools:
        """Return a detection's mask in the image: bool (H, W).

        Raises:
            InputError: The exported detector predicts boxes only.
        """
        probs, places = self._require_masks()
        return paste(probs[places[index]], self.boxes_xyxy[index], self.image_size)

    @property
    def masks(self) -> Bools:
        """All masks in the image: bool (N, H, W), N * H * W bytes.

        Raises:
            InputError: The exported detector predicts boxes only.
        """
        self._require_masks()
        pasted = np.zeros((len(self), *self.image_size), dtype=np.bool_)
        for index in range(len(self)):
            pasted[index] = self.mask(index)
        return pasted

    def _require_masks(self) -> tuple[Floats, Integers]:
        if self.mask_probs is None or self.mask_index is None:
            raise InputError(
                "the exported detector predicts boxes only, without masks",
                hint="export a detector that has a mask head",
            )
        return self.mask_probs, self.mask_index


def to_image(
    outputs: Outputs,
    network_size: tuple[int, ...],
    image_size: tuple[int, ...],
    names: Sequence[str],
) -> Found:
    """Scale boxes to the image, and drop those that end up empty.

    Args:
        outputs: What the graph returned.
        network_size: h and w.
        image_size: H and W.
        names: The vocabulary's class names.
    """
    sizes = np.array(image_size, dtype=np.float32)
    bounds = np.tile(sizes[::-1], 2)
    factors = np.tile((sizes / np.array(network_size, dtype=np.float32))[::-1], 2)
    boxes_N4: Floats = np.clip(outputs["boxes"] * factors, 0, bounds)
    solid = (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])
    classes_N = outputs["classes"][solid]
    return Found(
        boxes_xyxy=boxes_N4[solid],
        scores=outputs["scores"][solid],
        class_ids=classes_N,
        labels=tuple(names[index] for index in classes_N.tolist()),
        image_size=(int(image_size[0]), int(image_size[1])),
        mask_probs=outputs.get("masks"),
        mask_index=outputs["mask_index"][solid] if "masks" in outputs else None,
    )


def paste(mask_SS: Floats, box_4: Floats, image_size: tuple[int, int]) -> Bools:
    """Paste a mask into an image: the probability at each pixel's centre, interpolated, at least one half.

    Outside the mask the probability is 0; between the outermost cells' centres and the box it falls off towards that.

    Args:
        mask_SS: Probabilities in the cells of a grid over the box.
        box_4: xyxy pixels, not empty.
        image_size: H and W.

    Returns:
        bool (H, W).
    """
    spans, weights = [], []
    for axis, length in ((1, image_size[0]), (0, image_size[1])):
        start, end = box_4[axis], box_4[axis + 2]
        first, last = max(int(np.floor(start)) - 1, 0), int(np.ceil(end)) + 1
        spans.append(slice(first, last))
        # How much each pixel of the axis takes from each cell.
        centres = np.arange(first, min(last, length), dtype=np.float32) + np.float32(0.5)
        position = (centres - start) / (end - start) * len(mask_SS) - np.float32(0.5)
        distance = np.abs(position[:, None] - np.arange(len(mask_SS), dtype=np.float32))
        weights.append(np.maximum(0, 1 - distance).astype(np.float32))
    down, across = weights
    pasted = np.zeros(image_size, dtype=np.bool_)
    pasted[spans[0], spans[1]] = down @ mask_SS @ across.T >= _MASK_THRESHOLD
    return pasted
