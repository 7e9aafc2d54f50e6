"""Running a detector over a data set, from the first image that is not yet on disk.

Dimensions: N detections of an image, K categories of the data set, C classes of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from proxydet.data.dataset import class_rows
from proxydet.data.formats.records import Identifier
from proxydet.data.images import Pixels
from proxydet.evaluation.images import AnnotatedImages
from proxydet.evaluation.prediction_files import PredictionFolder
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.prediction import Prediction, rles
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary

_READ_AHEAD = 4


class ImageDetector(Protocol):
    """What evaluation asks of a detector; :class:`proxydet.detector.Detector` is one."""

    @property
    def network(self) -> nn.Module:
        """Its network, whose weights identify it."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes that it was trained on."""

    @property
    def inference(self) -> InferenceConfig:
        """Its thresholds and limits."""

    @property
    def sides(self) -> tuple[int, int]:
        """The shortest and the longest side, in pixels, that images are scaled to."""

    def predict_images(
        self, images: Sequence[Pixels], vocabulary: Vocabulary, settings: InferenceConfig
    ) -> Sequence[Prediction]:
        """Find objects in uint8 (H, W, 3) RGB images; boxes and masks in their pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """The images of a split, what to look for in them, and what detections are called.

    Attributes:
        images: The images.
        vocabulary: What to look for.
        category_id_C: The category id of each class of the vocabulary; None for classes that the data set has not.
        settings: Thresholds and limits of the detector.
        batch_size: Images that go through the detector at once.
    """

    images: AnnotatedImages
    vocabulary: Vocabulary
    category_id_C: tuple[Identifier | None, ...]
    settings: InferenceConfig
    batch_size: int = 1

    @classmethod
    def of(
        cls,
        images: AnnotatedImages,
        vocabulary: Vocabulary,
        settings: InferenceConfig,
        batch_size: int = 1,
    ) -> EvaluationTask:
        """Bring the categories of a split and the classes of a vocabulary together, by name.

        Raises:
            DataError: A category of the split is not in the vocabulary.
        """
        ids: list[Identifier | None] = [None] * len(vocabulary)
        for row, category in zip(
            class_rows(images.store, vocabulary), images.store.categories, strict=True
        ):
            ids[row] = category.id
        return cls(
            images=images,
            vocabulary=vocabulary,
            category_id_C=tuple(ids),
            settings=settings,
            batch_size=batch_size,
        )

    @property
    def ids(self) -> tuple[Identifier, ...]:
        """Ids of all images."""
        return self.images.store.image_ids


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work a process does.

    Attributes:
        rank: Number of the process, from 0.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1


def predict_split(
    detector: ImageDetector,
    task: EvaluationTask,
    folder: PredictionFolder,
    *,
    share: Share | None = None,
    progress: Progress = SILENT,
) -> None:
    """Predict this process's share of the images that are not on disk yet.

    Args:
        detector: Finds objects.
        task: The images, and what to look for.
        folder: Where predictions are kept.
        share: Which images are this process's; None takes all.
        progress: Where progress is shown.

    Raises:
        DataError: An image cannot be read.
        DiskFullError: There is no room for the predictions; those made so far stay.
    """
    share = share or Share()
    if folder.complete:
        return
    done = folder.images_done()
    ids = task.ids
    mine = range(share.rank, len(ids), share.processes)
    todo = [index for index in mine if ids[index] not in done]
    with (
        folder.writer(share.rank) as writer,
        progress.task(
            "predicting", total=len(mine), unit="images", done=len(mine) - len(todo)
        ) as shown,
    ):
        for batch in _read_ahead(task, todo):
            pixels = [pixels_HW3 for _, pixels_HW3 in batch]
            found = detector.predict_images(pixels, task.vocabulary, task.settings)
            for (index, _), prediction in zip(batch, found, strict=True):
                writer.write(ids[index], result_rows(prediction, ids[index], task.category_id_C))
            shown.advance(len(batch))


def result_rows(
    prediction: Prediction, image_id: Identifier, category_id_C: Sequence[Identifier | None]
) -> list[dict[str, Any]]:
    """Return the rows of a results file for what was found in an image.

    Boxes are turned to x, y, width, height in single precision, as detectron2 does before it scores them.

    Args:
        prediction: What was found.
        image_id: The image's id in the annotation file.
        category_id_C: The category id of each class of the vocabulary; detections of classes without one are left out.
    """
    boxes_N4 = prediction.boxes_N4.cpu().numpy().astype(np.float32, copy=True)
    boxes_N4[:, 2:] -= boxes_N4[:, :2]
    masks = rles(prediction) if prediction.has_masks else None
    rows: list[dict[str, Any]] = []
    columns = zip(
        boxes_N4.tolist(),
        prediction.scores_N.tolist(),
        prediction.classes_N.tolist(),
        strict=True,
    )
    for index, (box, score, class_row) in enumerate(columns):
        category_id = category_id_C[class_row]
        if category_id is None:
            continue
        row = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        if masks is not None:
            row["segmentation"] = masks[index]
        rows.append(row)
    return rows


def weights_digest(network: nn.Module) -> str:
    """Return a SHA-256 over the names and values of a network's state, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_ahead(task: EvaluationTask, todo: Sequence[int]) -> Iterator[list[tuple[int, Pixels]]]:
    """Yield batches of images, reading the next ones while the caller works on these."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-images") as pool:
        waiting: list[tuple[int, Future[Pixels]]] = []
        upcoming = iter(todo)
        try:
            while True:
                while len(waiting) < task.batch_size + _READ_AHEAD:
                    index = next(upcoming, None)
                    if index is None:
                        break
                    waiting.append((index, pool.submit(task.images.read, index)))
                if not waiting:
                    return
                batch, waiting = waiting[: task.batch_size], waiting[task.batch_size :]
                yield [(index, future.result()) for index, future in batch]
        finally:
            for _, future in waiting:
                future.cancel()
