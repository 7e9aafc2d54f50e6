"""Search of an index: the images, boxes and scores of any classes, as the detector would find them, without images and network.

A scan of all regions gives those that score above the threshold for any class; of their images the detector's own
selection (`proxydet.modeling.postprocess.detect_classes`) makes detections, the best images first.

Dimensions: N regions, C classes, D embedding, R regions of an image (padded), L detections.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from proxydet.config import merge
from proxydet.data.images import Pixels
from proxydet.detections import Detections
from proxydet.errors import ConfigError, DataError, MissingDependencyError, VocabularyError
from proxydet.files import sha256, staged, write_errors
from proxydet.index.store import Part, StoredIndex, read_words
from proxydet.inference.sources import SourceImage
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import (
    ClassText,
    Prediction,
    assemble_predictions,
    class_scores,
    detect_classes,
)
from proxydet.modeling.roi_heads import FeatureBatch, ZeroShotClassifier
from proxydet.reporting import SILENT, Progress
from proxydet.visualization.report import CaptionedImage, Report, Section
from proxydet.vocabulary.sources import Classes, TrainedClasses
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import first_line

# Scores, and rounded or stored values, that are in memory at once.
_SCORES_AT_ONCE = 2**21
_REGIONS_AT_ONCE = 2**14
# The scan multiplies in another order than the detector; what may be above the threshold is scored again.
_MARGIN = 1e-4
_IMAGES_AT_ONCE = 64
# Regions that approximate search scores for a class, and the share of the lists that it looks for them in.
_NEAREST = 4096
_PROBED = 0.03
_THUMBNAIL = 480

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
        super().__init__(*read_words(self.stored.path))
        self.inference = self.stored.detector.inference

    def __len__(self) -> int:
        return self.stored.images

    @cached_property
    def _firsts(self) -> npt.NDArray[np.int64]:
        """The place of the first image of each part, and behind the last the number of places."""
        return np.cumsum([0, *(part.record.images for part in self.stored.parts)])

    def path_at(self, number: int) -> str | None:
        """Return the path of the image at a place of the index; None: there is none."""
        source = self.source_at(number)
        return None if source is None else source.name

    def source_at(self, number: int) -> SourceImage | None:
        """Return the image at a place of the index, as what can be read; None: there is none."""
        place = int(np.searchsorted(self._firsts, number, side="right")) - 1
        if not 0 <= place < len(self.stored.parts):
            return None
        part, row = self.stored.parts[place], number - int(self._firsts[place])
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
                part, classes, settings, None if approximate is None else approximate[number]
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
                predictions = _select(part, own.tolist(), regions, classes, settings)
                hits += [
                    ImageHit(
                        number=int(self._firsts[number]) + row,
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
        (prediction,) = _select(part, [row], [regions], self._text(vocabulary), settings)
        return prediction

    def _text(self, vocabulary: Vocabulary) -> ClassText:
        expected = self.stored.detector.dimension
        if vocabulary.dimension != expected:
            raise VocabularyError(
                f"the vocabulary's embeddings have {vocabulary.dimension} dimensions, the index's have {expected}",
                hint="embed the class names with the text encoder of the detector that made the index",
            )
        return ClassText.of(vocabulary, torch.device("cpu"))

    # --- Approximate search ---------------------------------------------------------------------------------------------

    @property
    def _tree(self) -> str:
        """What the file of the tree over the regions of these parts is called; its own SHA-256 comes behind."""
        parts = "".join(part.record.sha256 for part in self.stored.parts)
        return f"approximate-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"

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
        faiss = _faiss()
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
        file = self.stored.path / f"{self._tree}-{digest}.faiss"
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
            for start in range(0, part.record.regions, _REGIONS_AT_ONCE):
                stored = part.embeddings(slice(start, start + _REGIONS_AT_ONCE))
                given = [
                    *stored.detection,
                    *([] if stored.mixup_BRD is None else [stored.mixup_BRD]),
                ]
                plain = [
                    classifier.logits(values[0], torch.eye(values.shape[2])) - classifier.bias
                    for classifier, values in zip(part.classifiers, given, strict=True)
                ]
                steps = torch.stack(plain[: len(stored.detection)]).mean(dim=0)
                if stored.mixup_BRD is not None:
                    steps = (1 - weight) * steps + weight * plain[-1]
                yield steps.numpy()

    @cached_property
    def _opened_tree(self) -> Any:
        faiss = _faiss()
        file = next(self.stored.path.glob(f"{self._tree}-*.faiss"), None)
        if file is None:
            raise DataError(
                f"{self.stored.path} has no approximate search, or had it before images were added or removed",
                hint="build it with: proxydet index approximate PHOTOS.index; or leave --approximate out",
                path=self.stored.path,
            )
        try:
            if not file.stem.endswith(sha256(file)[:16]):
                raise RuntimeError("SHA-256 mismatch: it changed after it was written")
            tree = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{file} is damaged: {first_line(error)}",
                hint="build it again with: proxydet index approximate PHOTOS.index",
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


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"approximate search needs the package faiss-cpu, which cannot be imported: {error}",
            hint="run: pip install 'proxydet[index]' (or: pip install faiss-cpu)",
        ) from error
    module: ModuleType = faiss
    return module


def _scan(
    part: Part, classes: ClassText, settings: InferenceConfig, near_K: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the regions of a part, ascending, that may score above the threshold of a class, and the best score of each.

    Args:
        part: The part.
        classes: What to look for.
        settings: The general threshold, and fusion weights.
        near_K: The only regions that are scored; None: all.
    """
    threshold_C = torch.full_like(classes.text_DC[0], settings.score_threshold)
    if classes.threshold_C is not None:
        threshold_C = torch.where(classes.threshold_C.isnan(), threshold_C, classes.threshold_C)
    threshold_C -= _MARGIN
    if classes.background_K is not None:
        threshold_C[classes.background_K] = torch.inf
    step = max(min(_REGIONS_AT_ONCE, _SCORES_AT_ONCE // len(threshold_C)), 64)
    regions, scores = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for start in range(0, part.record.regions if near_K is None else len(near_K), step):
        if near_K is None:
            stored = part.embeddings(slice(start, start + step))
        else:
            stored = part.embeddings(near_K[start : start + step][None])
        scores_NC = class_scores(stored, classes, _as_modules(part), settings)
        best_N = scores_NC.masked_fill_(scores_NC <= threshold_C, -1.0).amax(dim=1)
        above_K = (best_N >= 0).nonzero()[:, 0]
        regions.append(above_K + start if near_K is None else near_K[start + above_K])
        scores.append(best_N[above_K])
    return torch.cat(regions), torch.cat(scores)


def _select(
    part: Part,
    rows: list[int],
    regions: list[Tensor],
    classes: ClassText,
    settings: InferenceConfig,
) -> list[Prediction]:
    """Return the detections of some images of a part.

    Args:
        part: The part.
        rows: The images.
        regions: Regions of each that may be detections.
        classes: What to look for.
        settings: Thresholds and limits.
    """
    place_BR = pad_sequence(regions, True)
    valid_BR = pad_sequence([torch.ones_like(own, dtype=torch.bool) for own in regions], True)
    row_B = torch.tensor(rows)
    sizes_B4 = part.tensors["sizes"][row_B]
    stored = dataclasses.replace(
        part.embeddings(place_BR), boxes_BR4=part.boxes(place_BR, row_B[:, None]), valid_BR=valid_BR
    )
    found = detect_classes([stored], classes, _as_modules(part), settings)
    batch = FeatureBatch(features=[], sizes_B2=sizes_B4[:, :2].float())
    originals = [(height, width) for height, width in sizes_B4[:, 2:].tolist()]
    return assemble_predictions(found, batch, originals, None)


def _as_modules(part: Part) -> list[ZeroShotClassifier]:
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
