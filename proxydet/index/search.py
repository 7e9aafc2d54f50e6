"""Search of an index: the images, boxes and scores of any classes, as the detector would find them, without images and network.

A scan of all regions gives those that score above the threshold for any class; of their images the detector's own
selection (`proxydet.modeling.postprocess.detect_classes`) makes detections, the best images first.

Dimensions: N regions, C classes, D embedding, R regions of an image (padded), L detections.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from proxydet.config import merge
from proxydet.data.images import Pixels, checked_boxes
from proxydet.detections import Detections
from proxydet.errors import ConfigError, DataError, VocabularyError
from proxydet.files import sha256, staged, write_errors
from proxydet.index.store import Part, StoredIndex, read_words, require_faiss
from proxydet.inference.sources import SourceImage
from proxydet.modeling.boxes import pairwise_iou
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import (
    ClassText,
    Prediction,
    assemble_predictions,
    best_scores_above,
    class_scores,
    detect_classes,
)
from proxydet.modeling.roi_heads import FeatureBatch, RegionEmbeddings, ZeroShotClassifier
from proxydet.reporting import SILENT, Progress
from proxydet.visualization.report import CaptionedImage, Report, Section
from proxydet.vocabulary.exemplars import RegionStatistics, classes_of_exemplars
from proxydet.vocabulary.sources import Classes, TrainedClasses
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import first_line

# Scores, and rounded or stored values, that are in memory at once.
_SCORES_AT_ONCE = 2**21
_REGIONS_AT_ONCE = 2**15
# The scan multiplies in another order than the detector; what may be above the threshold is scored again.
_MARGIN = 1e-4
_IMAGES_AT_ONCE = 64
# Regions that approximate search scores for a class, and the share of the lists that it looks for them in.
_NEAREST = 4096
_PROBED = 0.03
_THUMBNAIL = 480
# What a class of a region is called, and the overlap with a given box that a region must have.
_LIKE = "like this"
_LEAST_IOU = 0.2
# Regions that show how classes look, and the score of a class above which one shows it.
_SAMPLED = 2**15
_SAMPLED_AT_ONCE = 2**11
_FOUND_ABOVE = 0.3

Facts = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageHit:
    """What was found in one image."""

    number: int
    """The image's place in the index, see `RegionIndex.path_at`."""
    source: SourceImage
    """The image, as it was indexed: ``source.read()`` reads it from its file, tar or store."""
    found: Detections

    @property
    def path(self) -> str:
        """Path of the image: of its file, ``TAR/MEMBER``, or its URL."""
        return self.source.name

    @property
    def score(self) -> float:
        """The best score."""
        return float(self.found.scores[0]) if len(self.found) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON, as `proxydet predict --json` gives them for an image."""
        return {"file": self.path, **self.found.to_dict()}


@dataclasses.dataclass(frozen=True)
class StoredClassifier:
    """The classifier of one stored embedding of a part: logits of what is stored, for classes given by columns of text.

    Attributes:
        temperature: Factor from cosine to logit.
        bias: Added to the logits.
        scale_D: Of int8 embeddings: what they are multiplied by; None: they are stored as they are.
        offset_D: What is added to them then.
    """

    temperature: float
    bias: float
    scale_D: Tensor | None = None
    offset_D: Tensor | None = None

    def values(self, embeddings_ND: Tensor) -> Tensor:
        """Return embeddings as the detector made them, but for rounding: float32 (N, D)."""
        if self.scale_D is None or self.offset_D is None:
            return embeddings_ND
        return embeddings_ND * self.scale_D + self.offset_D

    def logits(self, embeddings_ND: Tensor, text_DK: Tensor) -> Tensor:
        """Return the logits (N, K)."""
        text_DK = self.temperature * text_DK
        if self.scale_D is None or self.offset_D is None:
            return (embeddings_ND @ text_DK).add_(self.bias)
        logits_NK = embeddings_ND.float() @ (self.scale_D[:, None] * text_DK)
        return logits_NK.add_(self.offset_D @ text_DK + self.bias)


class PartTensors:
    """The arrays of a part as tensors, which lie in the file until they are read.

    Attributes:
        part: The part.
        classifiers: That of each stored embedding.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self._tensors = {name: torch.from_numpy(values) for name, values in part.arrays.items()}
        self.classifiers = [
            StoredClassifier(
                *own, self._tensors.get(f"scale_{number}"), self._tensors.get(f"offset_{number}")
            )
            for number, own in enumerate(part.detector.classifiers)
        ]

    def embeddings(self, regions: slice | Tensor) -> RegionEmbeddings:
        """Return some regions as one image's, or for places (B, R) as a batch's, embeddings as they are stored."""
        pick = slice(None) if isinstance(regions, Tensor) else None  # a batch, or one image
        stored = [
            self._tensors[f"embeddings_{number}"][regions][pick]
            for number in range(len(self.classifiers))
        ]
        proposals_BR = self._tensors["proposals"][regions][pick].float()
        mixup = self.part.detector.mixup
        return RegionEmbeddings(
            detection=tuple(stored[: len(stored) - mixup]),
            mixup_BRD=stored[-1] if mixup else None,
            mixup_boxes_BR4=None,
            boxes_BR4=proposals_BR.new_zeros(*proposals_BR.shape, 4),
            proposal_scores_BR=proposals_BR,
            valid_BR=torch.ones_like(proposals_BR, dtype=torch.bool),
        )

    def means(self, regions: slice | Tensor) -> Tensor:
        """Return the mean over the detection branch's steps of the embeddings of some regions: float32 (N, D)."""
        steps = self.classifiers[: len(self.classifiers) - self.part.detector.mixup]
        return torch.stack(
            [own.values(self._tensors[f"embeddings_{k}"][regions]) for k, own in enumerate(steps)]
        ).mean(dim=0)

    def sizes(self, rows: Tensor) -> Tensor:
        """Return the sizes of images (...) as `proxydet.index.build.ImageRegions` has them: int32 (..., 4)."""
        return self._tensors["sizes"][rows]

    def boxes(self, regions: Tensor, rows: Tensor) -> Tensor:
        """Return boxes of regions (...), in the pixels of their images (rows) as the network saw them: (..., 4)."""
        boxes = self._tensors["boxes"][regions]
        if boxes.dtype == torch.float32:
            return boxes
        sides_2 = self.sizes(rows)[..., [1, 0, 1, 0]].float()
        return (boxes.float() + 32768) / 65535 * sides_2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LikeRegion:
    """What looks like a region of an image of an index."""

    vocabulary: Vocabulary
    """One class, of the region's embedding."""
    source: SourceImage
    """The image."""
    box_xyxy: tuple[float, ...]
    """The region's box, in pixels of the image."""
    iou: float
    """Its IoU with the box that was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return what was looked for as plain Python values, ready for JSON."""
        box = [round(value, 2) for value in self.box_xyxy]
        return {"file": self.source.name, "box_xyxy": box, "iou": round(self.iou, 4)}


class RegionIndex(TrainedClasses):
    """An index of images that can be searched.

    Attributes:
        stored: What is on disk.
        vocabulary: The classes of the detector's training.
        inference: Settings of the detector; `search` changes thresholds only.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an index.

        Args:
            path: The folder that ``proxydet index`` wrote.

        Raises:
            InputError: There is none, or it is damaged or of another version.
        """
        self.stored = StoredIndex(path)
        self.stored.require_whole()
        super().__init__(*read_words(self.stored.path))
        self.inference = self.stored.detector.inference

    def __len__(self) -> int:
        return self.stored.images

    def path_at(self, number: int) -> str | None:
        """Return the path of the image at a place of the index; None: there is none."""
        source = self.source_at(number)
        return None if source is None else source.name

    def source_at(self, number: int) -> SourceImage | None:
        """Return the image at a place of the index, as what can be read; None: there is none."""
        if not 0 <= number < self.stored.firsts[-1]:
            return None
        part, row = self.stored.at(number)
        return part.source_of(row) if part.kept_B[row] else None

    def read_image(self, number: int) -> Pixels:
        """Read the image at a place of the index, wherever it is: a file, a member of a tar, an object of a store.

        Args:
            number: `ImageHit.number`.

        Returns:
            uint8 RGB (height, width, 3).

        Raises:
            DataError: The index has no such image, or it is not there any more, or its tar has changed.
            UnreachableError: The store does not answer.
        """
        source = self.source_at(number)
        if source is None:
            raise DataError(
                f"{self.stored.path} holds no image with the number {number}",
                hint="numbers are those of the hits of this index, as long as it is open",
            )
        return source.read()

    def settings(self, **changes: bool | float | None) -> InferenceConfig:
        """Return the detector's settings with some of them changed.

        Args:
            **changes: Fields of `InferenceConfig`, such as ``score_threshold``; None keeps the detector's.

        Raises:
            ConfigError: There is no such setting, or its value is out of range.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        settings = merge(self.inference, given, "inference")
        if settings.rescore:
            raise ConfigError(
                "inference.rescore needs all regions of an image; an index scores each alone"
            )
        return settings

    def search(
        self,
        vocabulary: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        one_label: bool = True,
        top: int | None = None,
        approximately: bool = False,
    ) -> list[ImageHit]:
        """Find images with objects of some classes.

        Args:
            vocabulary: What to look for, see `proxydet.vocabulary.sources.Classes`.
            score_threshold: Only detections that score above this, 0 to 1; classes of a vocabulary with thresholds of
                their own have these.
            max_detections: At most this many in an image, the best.
            one_label: One label a box: of overlapping detections of any classes only the best; else of each class.
            top: At most this many images; None: all.
            approximately: Score only the regions that `build_approximate`'s tree finds near the classes: faster in many
                millions of regions; some that score low are missed.

        Returns:
            Images in which something was found, the one with the best score first.

        Raises:
            InputError: The vocabulary cannot be used, or the index is damaged.
            ConfigError: A number is out of range.
        """
        settings = self.settings(
            score_threshold=score_threshold,
            max_detections=max_detections,
            agnostic_nms=one_label,
        )
        classes = self.resolve(vocabulary)
        return self.search_classes(classes, settings, top=top, approximately=approximately)

    @torch.inference_mode()
    def search_classes(
        self,
        vocabulary: Vocabulary,
        settings: InferenceConfig,
        *,
        top: int | None = None,
        approximately: bool = False,
    ) -> list[ImageHit]:
        """Do as `search` with a vocabulary as it is, and any settings."""
        classes = self._text(vocabulary)
        approximate = self._approximate(vocabulary) if approximately else None
        above: list[Tensor] = []
        numbers, rows, scores = [], [], []
        for number, part in enumerate(self.stored.parts):
            regions_K, scores_K = _scan(
                PartTensors(part),
                classes,
                settings,
                None if approximate is None else approximate[number],
            )
            above.append(regions_K)
            row_K = np.searchsorted(part.starts_B, regions_K.numpy(), side="right") - 1
            best_B = np.full(part.record.images, -1.0, np.float32)
            np.maximum.at(best_B, row_K, scores_K.numpy())
            own = np.flatnonzero((best_B >= 0) & part.kept_B)
            rows.append(own)
            scores.append(best_B[own])
            numbers.append(np.full(len(own), number))
        if not rows:
            return []
        score_H = np.concatenate(scores)
        order_H = np.argsort(-score_H, kind="stable")
        number_H, row_H = np.concatenate(numbers)[order_H], np.concatenate(rows)[order_H]
        bound_H = score_H[order_H]
        # Then a region that cannot be reported may take another one's place.
        competing = classes.threshold_C is not None or classes.background_K is not None
        hits: list[ImageHit] = []
        start, end = 0, min(top or _IMAGES_AT_ONCE, _IMAGES_AT_ONCE)
        while start < len(order_H):
            # No image behind can be better than these: background classes only lower what the scan found, rounding changes
            # it by less than the margin.
            better = sum(hit.score >= bound_H[start] + _MARGIN for hit in hits)
            if top is not None and better >= top:
                break
            places = slice(start, end)
            missing = _IMAGES_AT_ONCE if top is None else max(top - better, 8)
            start, end = end, end + min(missing, _IMAGES_AT_ONCE)
            for number in np.unique(number_H[places]).tolist():
                part = self.stored.parts[number]
                own = row_H[places][number_H[places] == number]
                bounds = np.stack([part.starts_B[own], part.starts_B[own + 1]])
                if competing:
                    regions = [torch.arange(first, last) for first, last in bounds.T.tolist()]
                else:
                    ends = np.searchsorted(above[number].numpy(), bounds)
                    regions = [above[number][first:last] for first, last in ends.T.tolist()]
                predictions = _select(PartTensors(part), own.tolist(), regions, classes, settings)
                hits += [
                    ImageHit(
                        number=int(self.stored.firsts[number]) + row,
                        source=part.source_of(row),
                        found=Detections(prediction, vocabulary.reported),
                    )
                    for row, prediction in zip(own.tolist(), predictions, strict=True)
                    if len(prediction)
                ]
        hits.sort(key=lambda hit: -hit.score)
        return hits[:top]

    def detect(
        self, part: Part, row: int, vocabulary: Vocabulary, settings: InferenceConfig
    ) -> Prediction:
        """Return what is found in one image of the index."""
        regions = torch.arange(int(part.starts_B[row]), int(part.starts_B[row + 1]))
        (prediction,) = _select(
            PartTensors(part), [row], [regions], self._text(vocabulary), settings
        )
        return prediction

    # --- More like a region ---------------------------------------------------------------------------------------------

    def like(self, image: int | Path | str, box_xyxy: Sequence[float]) -> LikeRegion:
        """Return the class of what is in a box of an image of the index; ``search(like.vocabulary)`` finds more of it.

        Its embedding is that of the region, of those that are stored of the image, with the highest IoU: neither the detector
        nor the image is needed.

        Args:
            image: `ImageHit.number`, or the path of the image.
            box_xyxy: Pixels of the image, such as ``hit.found.boxes_xyxy[0]``.

        Raises:
            DataError: The index has no such image, the box is none, or no region of the image overlaps it.
        """
        if isinstance(image, int):
            held = 0 <= image < int(self.stored.firsts[-1])
            found = self.stored.at(image) if held else None
        else:
            name = str(image)
            found = self.stored.find(name if "://" in name else os.path.abspath(name))  # noqa: PTH100
        if found is None or not found[0].kept_B[found[1]]:
            raise DataError(
                f"{self.stored.path} has no image {image}",
                hint="images are named by the paths that proxydet search shows",
            )
        part, row = found
        opened = PartTensors(part)
        height, width, *size = opened.sizes(torch.tensor(row)).tolist()
        (box_4,) = checked_boxes([box_xyxy], (size[0], size[1]), str(image))
        scale_4 = torch.tensor([width / size[1], height / size[0]] * 2)
        region_N = torch.arange(int(part.starts_B[row]), int(part.starts_B[row + 1]))
        boxes_N4 = opened.boxes(region_N, torch.full_like(region_N, row))
        iou_N = pairwise_iou((torch.from_numpy(box_4) * scale_4)[None, None], boxes_N4[None])[0, 0]
        if not len(iou_N) or float(iou_N.max()) <= _LEAST_IOU:
            best = float(iou_N.max()) if len(iou_N) else 0.0
            raise DataError(
                f"the index has no region of {part.path_of(row)} where the box is: the best has an IoU of {best:.2f}",
                hint="draw the box around one object; a compact index has only the best regions of an image (--regions)",
            )
        best_region = int(iou_N.argmax())
        mean_ND = opened.means(region_N[best_region : best_region + 1])
        made = classes_of_exemplars([_LIKE], [mean_ND.numpy()], self._statistics)
        return LikeRegion(
            vocabulary=made.vocabulary,
            source=part.source_of(row),
            box_xyxy=tuple((boxes_N4[best_region] / scale_4).tolist()),
            iou=float(iou_N[best_region]),
        )

    @cached_property
    def _statistics(self) -> RegionStatistics:
        """How regions of classes look to the detector: those of the index in which it finds the base classes of its training."""
        base = self.vocabulary.subset(
            [n for n, b in zip(self.vocabulary.names, self.vocabulary.base, strict=True) if b]
            or self.vocabulary.names
        )
        classes, step = self._text(base), max(1, self.stored.regions // _SAMPLED)
        means, rows, scores = [], [], []
        with torch.inference_mode():
            for part in self.stored.parts:
                opened = PartTensors(part)
                for start in range(0, part.record.regions, step * _SAMPLED_AT_ONCE):
                    places = slice(start, start + step * _SAMPLED_AT_ONCE, step)
                    stored = opened.embeddings(places)
                    best = class_scores(stored, classes, _as_modules(opened), self.inference).max(
                        dim=1
                    )
                    means.append(opened.means(places).numpy())
                    rows.append(best.indices.numpy())
                    scores.append(best.values.numpy())
        common: dict[str, Any] = {
            "weights": self.stored.detector.weights,
            "temperature": self.stored.detector.classifiers[0][0],
        }
        regions, found = np.concatenate(means), np.concatenate(scores) > _FOUND_ABOVE
        try:
            return RegionStatistics.from_regions(
                regions[found], np.concatenate(rows)[found], base, **common
            )
        except VocabularyError:  # the index shows too few of these classes
            return RegionStatistics.assumed(regions, base, **common)

    def _text(self, vocabulary: Vocabulary) -> ClassText:
        expected = self.stored.detector.dimension
        if vocabulary.dimension != expected:
            raise VocabularyError(
                f"the vocabulary's embeddings have {vocabulary.dimension} dimensions, the index's have {expected}",
                hint="embed the class names with the text encoder of the detector that made the index",
            )
        return ClassText.of(vocabulary, torch.device("cpu"))

    # --- Approximate search ---------------------------------------------------------------------------------------------

    def build_approximate(self, progress: Progress = SILENT) -> Path:
        """Build what approximate search needs: an inverted file (FAISS) of the fused embeddings of all regions.

        It serves until images are added or removed; exact search needs none.

        Args:
            progress: Where progress is shown.

        Returns:
            Its file, in the index.

        Raises:
            MissingDependencyError: FAISS is not installed.
            DataError: The index holds no regions.
            DiskFullError: There is no room.
        """
        faiss = require_faiss()
        regions = self.stored.regions
        if not regions:
            raise DataError(f"{self.stored.path} holds no regions", hint="index images first")
        lists = max(1, min(round(4 * math.sqrt(regions)), regions // 39))
        dimension = self.stored.detector.dimension
        tree = faiss.index_factory(dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        sample = max(1, regions // (64 * lists))
        tree.train(np.concatenate([values[::sample] for values in self._fused()]))
        with progress.task("approximate search", total=regions, unit="regions") as task:
            for values_ND in self._fused():
                tree.add(values_ND)
                task.advance(len(values_ND))
        content = faiss.serialize_index(tree).data
        digest = hashlib.sha256(content).hexdigest()[:16]
        file = self.stored.path / f"{self.stored.tree}-{digest}.faiss"
        with staged(file) as temporary, write_errors(file):
            temporary.write_bytes(content)
        for old in self.stored.path.glob("approximate-*.faiss"):
            if old != file:
                old.unlink(missing_ok=True)
        return file

    def _fused(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield one embedding of each region, whose products with text order regions nearly as their scores do."""
        weight = (self.inference.alpha + self.inference.beta) / 2
        for part in self.stored.parts:
            opened = PartTensors(part)
            for start in range(0, part.record.regions, _REGIONS_AT_ONCE):
                stored = opened.embeddings(slice(start, start + _REGIONS_AT_ONCE))
                given = [
                    *stored.detection,
                    *([] if stored.mixup_BRD is None else [stored.mixup_BRD]),
                ]
                plain = [
                    classifier.logits(values[0], torch.eye(values.shape[2])) - classifier.bias
                    for classifier, values in zip(opened.classifiers, given, strict=True)
                ]
                steps = torch.stack(plain[: len(stored.detection)]).mean(dim=0)
                if stored.mixup_BRD is not None:
                    steps = (1 - weight) * steps + weight * plain[-1]
                yield steps.numpy()

    @cached_property
    def _opened_tree(self) -> Any:
        faiss = require_faiss()
        file = self.stored.require_tree()
        try:
            if not file.stem.endswith(sha256(file)[:16]):
                raise RuntimeError("SHA-256 mismatch: it changed after it was written")
            tree = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{file} is damaged: {first_line(error)}",
                hint=f"build it again with: proxydet index approximate {self.stored.path}",
                path=file,
            ) from error
        tree.nprobe = max(16, round(tree.nlist * _PROBED))
        return tree

    def _approximate(self, vocabulary: Vocabulary) -> list[Tensor]:
        """Return the regions of each part, ascending, that are near a class."""
        text_CD = vocabulary.normalised()[~vocabulary.background]
        _, near_CK = self._opened_tree.search(text_CD, _NEAREST)
        near_K = np.unique(near_CK[near_CK >= 0])
        ends = np.cumsum([part.record.regions for part in self.stored.parts])
        pieces = np.split(near_K, np.searchsorted(near_K, ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        return [torch.from_numpy(own - start) for own, start in zip(pieces, starts, strict=True)]


def _scan(
    part: PartTensors, classes: ClassText, settings: InferenceConfig, near_K: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the regions of a part, ascending, that may score above the threshold of a class, and the best score of each.

    Only those of ``near_K`` are scored; None: all.
    """
    threshold_C = torch.full_like(classes.text_DC[0], settings.score_threshold)
    if classes.threshold_C is not None:
        threshold_C = torch.where(classes.threshold_C.isnan(), threshold_C, classes.threshold_C)
    threshold_C -= _MARGIN
    if classes.background_K is not None:
        threshold_C[classes.background_K] = torch.inf
    step = max(min(_REGIONS_AT_ONCE, _SCORES_AT_ONCE // len(threshold_C)), 64)
    regions, scores = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for start in range(0, part.part.record.regions if near_K is None else len(near_K), step):
        if near_K is None:
            stored = part.embeddings(slice(start, start + step))
        else:
            stored = part.embeddings(near_K[start : start + step][None])
        above_K, best_K = best_scores_above(
            stored, classes, _as_modules(part), settings, threshold_C
        )
        regions.append(above_K + start if near_K is None else near_K[start + above_K])
        scores.append(best_K)
    return torch.cat(regions), torch.cat(scores)


def _select(
    part: PartTensors,
    rows: list[int],
    regions: list[Tensor],
    classes: ClassText,
    settings: InferenceConfig,
) -> list[Prediction]:
    """Return the detections of some images (rows) of a part; ``regions``: those of each that may be detections."""
    place_BR = pad_sequence(regions, True)
    valid_BR = pad_sequence([torch.ones_like(own, dtype=torch.bool) for own in regions], True)
    row_B = torch.tensor(rows)
    sizes_B4 = part.sizes(row_B)
    stored = dataclasses.replace(
        part.embeddings(place_BR), boxes_BR4=part.boxes(place_BR, row_B[:, None]), valid_BR=valid_BR
    )
    found = detect_classes([stored], classes, _as_modules(part), settings)
    batch = FeatureBatch(features=[], sizes_B2=sizes_B4[:, :2].float())
    originals = [(height, width) for height, width in sizes_B4[:, 2:].tolist()]
    return assemble_predictions(found, batch, originals, None)


def _as_modules(part: PartTensors) -> list[ZeroShotClassifier]:
    return cast("list[ZeroShotClassifier]", part.classifiers)  # of which only `logits` is called


def results_page(hits: list[ImageHit], *, title: str, summary: str, facts: Facts = ()) -> Report:
    """Lay out what was found as a page of thumbnails with boxes.

    Args:
        hits: What `RegionIndex.search` returned.
        title: What was searched for.
        summary: What was searched.
        facts: Names and values shown at the top.

    Returns:
        A report for `proxydet.visualization.report.write_report`. An image that is not there any more, or has another size,
        is grey.
    """
    images = []
    for hit in hits:
        height, width = hit.found.image_size
        note = ""
        try:
            image = Image.fromarray(hit.source.read())
            if image.size != (width, height):
                note = " (changed since it was indexed)"
        except DataError:
            note = " (the file is not there any more)"
        if note:
            image = Image.new("RGB", (width, height), (128, 128, 128))
        drawn = hit.found.draw(image)
        drawn.thumbnail((_THUMBNAIL, _THUMBNAIL))
        best = ", ".join(
            f"{label} {score:.2f}"
            for label, score in zip(hit.found.labels[:3], hit.found.scores[:3], strict=True)
        )
        images.append(CaptionedImage(image=drawn, caption=f"{hit.path}: {best}{note}"))
    section = Section(title="Images", images=images, text="" if images else "Nothing was found.")
    return Report(title=title, summary=summary, facts=facts, sections=[section])
