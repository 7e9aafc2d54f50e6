"""Looks at many pictures: reads ahead of the network, writes behind it, and goes on where one cannot be read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.data.images import read_image
from proxydet.detections import Detections
from proxydet.errors import ConfigError, DataError
from proxydet.reporting import SILENT

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.detector_inputs import Pixels
    from proxydet.modeling.config import InferenceConfig
    from proxydet.picture_files import PictureFile
    from proxydet.prediction_output import Saver
    from proxydet.reporting import Progress
    from proxydet.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_READERS = 4


@dataclass(frozen=True, kw_only=True)
class PictureResult:
    """What was found in one picture."""

    file: Path
    found: Detections

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return {"file": str(self.file), **self.found.to_dict()}


OnResult = Callable[[PictureResult], None]
"""Is told each result, in the order of the pictures."""


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A picture that could not be read."""

    file: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What became of the pictures."""

    pictures: int
    """Pictures that were looked at."""
    detections: int
    """Detections in all of them."""
    unreadable: tuple[Unreadable, ...]
    saved: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """How pictures are looked at."""

    vocabulary: Vocabulary
    settings: InferenceConfig
    batch_size: int = 4
    """Pictures in the network at once."""
    savers: Sequence[Saver] = ()
    on_result: OnResult | None = None

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        if self.batch_size < 1:
            raise ConfigError(f"the batch size is {self.batch_size}; it must be at least 1")


def predict_files(
    detector: Detector,
    pictures: Sequence[PictureFile],
    plan: PredictionPlan,
    *,
    progress: Progress = SILENT,
) -> PredictionSummary:
    """Look at picture files, reading and writing beside the network's work.

    A picture that cannot be read is logged, counted and left out; a single picture's error is raised.

    Args:
        detector: The detector.
        pictures: Files to look at.
        plan: Vocabulary, settings, and what is saved.
        progress: Where progress is shown.

    Raises:
        DataError: The only picture cannot be read.
        ConfigError: A drawn picture would replace one that is read.
    """
    looked_at, detections = 0, 0
    unreadable: list[Unreadable] = []
    with (
        progress.task("looking at pictures", total=len(pictures), unit="images") as task,
        ThreadPoolExecutor(_READERS, "read") as readers,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        behind: deque[Future[None]] = deque()
        for batch in _batches(_read_ahead(pictures, readers, plan.batch_size), plan.batch_size):
            readable = _sorted_out(batch, unreadable, alone=len(pictures) == 1)
            for picture, pixels, found in _look(detector, readable, plan):
                looked_at, detections = looked_at + 1, detections + len(found)
                if plan.on_result is not None:
                    plan.on_result(PictureResult(file=picture.path, found=found))
                behind.append(writer.submit(_save, plan.savers, picture, pixels, found))
            # What is not written yet stays in memory, so the network waits for a slow disk.
            while len(behind) > 2 * plan.batch_size:
                behind.popleft().result()
            task.advance(len(batch))
        for future in behind:
            future.result()
    saved = [path for saver in plan.savers for path in saver.finish()]
    return PredictionSummary(
        pictures=looked_at,
        detections=detections,
        unreadable=tuple(unreadable),
        saved=tuple(saved),
    )


def _sorted_out(
    batch: Sequence[tuple[PictureFile, Pixels | DataError]],
    unreadable: list[Unreadable],
    *,
    alone: bool,
) -> list[tuple[PictureFile, Pixels]]:
    """Return the pictures that could be read, and note the others."""
    readable = []
    for picture, pixels in batch:
        if not isinstance(pixels, DataError):
            readable.append((picture, pixels))
        elif alone:
            raise pixels
        else:
            logger.warning("%s", pixels.message)
            unreadable.append(Unreadable(file=picture.path, reason=pixels.message))
    return readable


def _look(
    detector: Detector, readable: Sequence[tuple[PictureFile, Pixels]], plan: PredictionPlan
) -> Iterator[tuple[PictureFile, Pixels, Detections]]:
    predictions = detector.predict_images(
        [pixels for _, pixels in readable], plan.vocabulary, plan.settings
    )
    for (picture, pixels), prediction in zip(readable, predictions, strict=True):
        yield picture, pixels, Detections(prediction, plan.vocabulary.names)


def _save(savers: Sequence[Saver], picture: PictureFile, pixels: Pixels, found: Detections) -> None:
    for saver in savers:
        saver.add(picture, pixels, found)


def _read_ahead(
    pictures: Sequence[PictureFile], readers: ThreadPoolExecutor, batch_size: int
) -> Iterator[tuple[PictureFile, Pixels | DataError]]:
    """Read the pictures in their order, at most two batches and a few ahead of the network."""
    waiting: deque[tuple[PictureFile, Future[Pixels | DataError]]] = deque()
    for picture in pictures:
        waiting.append((picture, readers.submit(_read, picture.path)))
        if len(waiting) > 2 * batch_size + _READERS:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _read(path: Path) -> Pixels | DataError:
    try:
        return read_image(path)
    except DataError as error:
        return error


def _batches(
    pictures: Iterator[tuple[PictureFile, Pixels | DataError]], size: int
) -> Iterator[list[tuple[PictureFile, Pixels | DataError]]]:
    batch: list[tuple[PictureFile, Pixels | DataError]] = []
    for entry in pictures:
        batch.append(entry)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
