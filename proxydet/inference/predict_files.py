"""Runs a detector on image files: reads ahead of the network, writes behind it, and continues where one cannot be read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.data.images import Pixels, read_image
from proxydet.detections import Detections
from proxydet.errors import ConfigError, DataError, Interrupted
from proxydet.reporting import SILENT
from proxydet.wording import printable

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.inference.image_files import ImageFile
    from proxydet.inference.writers import Writer
    from proxydet.modeling.config import InferenceConfig
    from proxydet.reporting import Progress
    from proxydet.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_READERS = 4


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """The detections of one image."""

    file: Path
    found: Detections

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return {"file": str(self.file), **self.found.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that could not be read."""

    file: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What was done."""

    images: int
    """Images that the detector was run on."""
    detections: int
    """Detections in all of them."""
    unreadable: tuple[Unreadable, ...]
    saved: tuple[Path, ...]


def predict_files(
    detector: Detector,
    images: Sequence[ImageFile],
    *,
    vocabulary: Vocabulary,
    settings: InferenceConfig,
    batch_size: int = 4,
    writers: Sequence[Writer] = (),
    on_result: Callable[[ImageResult], None] | None = None,
    progress: Progress = SILENT,
) -> PredictionSummary:
    """Run a detector on image files, reading and writing while the network works.

    An image that cannot be read is logged, counted and left out; a single image's error is raised.

    Args:
        detector: The detector.
        images: Files to run on.
        vocabulary: Classes to look for.
        settings: Which detections are kept.
        batch_size: Images in the network at once.
        writers: What is saved.
        on_result: Called with each result, in input order.
        progress: Where progress is shown.

    Raises:
        DataError: The only image cannot be read.
        ConfigError: The batch size is below 1, or a drawn image would replace one that is read.
        Interrupted: Ctrl-C; what was found before is saved.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
    done, detections = 0, 0
    unreadable: list[Unreadable] = []
    stopped: KeyboardInterrupt | None = None
    with (
        progress.task("predicting", total=len(images), unit="images") as task,
        ThreadPoolExecutor(_READERS, "read") as readers,
        ThreadPoolExecutor(1, "write") as behind,
    ):
        pending: deque[Future[None]] = deque()
        decoded = _read_ahead(images, readers, 2 * batch_size + _READERS)
        try:
            while batch := list(islice(decoded, batch_size)):
                readable = []
                for image, pixels in batch:
                    if not isinstance(pixels, DataError):
                        readable.append((image, pixels))
                    elif len(images) == 1:
                        raise pixels
                    else:
                        logger.warning("%s", printable(pixels.message))
                        unreadable.append(Unreadable(file=image.path, reason=pixels.message))
                predictions = detector.predict_images(
                    [pixels for _, pixels in readable], vocabulary, settings
                )
                for (image, pixels), prediction in zip(readable, predictions, strict=True):
                    found = Detections(prediction, vocabulary.names)
                    if on_result is not None:
                        on_result(ImageResult(file=image.path, found=found))
                    pending.append(behind.submit(_write, writers, image, pixels, found))
                    done, detections = done + 1, detections + len(found)
                # What is not written yet stays in memory, so the network waits for a slow disk.
                while len(pending) > 2 * batch_size:
                    pending.popleft().result()
                task.advance(len(batch))
        except KeyboardInterrupt as error:
            stopped = error
        for future in pending:
            future.result()
    saved = tuple(path for writer in writers for path in writer.finish())
    if stopped is not None:
        where = f"; what was found in them is saved in {_common_folder(saved)}" if saved else ""
        raise Interrupted(f"stopped after {done} of {len(images)} images{where}") from stopped
    return PredictionSummary(
        images=done, detections=detections, unreadable=tuple(unreadable), saved=saved
    )


def _common_folder(saved: Sequence[Path]) -> Path:
    """The deepest folder that all files are in."""
    first = saved[0]
    return next(p for p in first.parents if all(path.is_relative_to(p) for path in saved))


def _write(writers: Sequence[Writer], image: ImageFile, pixels: Pixels, found: Detections) -> None:
    for writer in writers:
        writer.add(image, pixels, found)


def _read_ahead(
    images: Sequence[ImageFile], readers: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[ImageFile, Pixels | DataError]]:
    """Read images in their order, at most ``ahead`` of them before they are asked for."""

    def read(path: Path) -> Pixels | DataError:
        try:
            return read_image(path)
        except DataError as error:
            return error

    waiting: deque[tuple[ImageFile, Future[Pixels | DataError]]] = deque()
    for image in images:
        waiting.append((image, readers.submit(read, image.path)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
