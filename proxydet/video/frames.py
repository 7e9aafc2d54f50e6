"""Looks at the frames of a video, in batches, decoding ahead of the network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from proxydet.detections import Detections
from proxydet.errors import ConfigError, DataError
from proxydet.video.reading import Frame, VideoReader

if TYPE_CHECKING:
    from proxydet.modeling.config import InferenceConfig
    from proxydet.modeling.prediction import Prediction
    from proxydet.video.reading import Pixels
    from proxydet.vocabulary.vocabulary import Vocabulary


Item = TypeVar("Item")

# A camera may block in its driver: the thread is a daemon, and is not waited for longer than this.
_PATIENCE_S = 5.0


def read_ahead(
    items: Iterable[Item], size: int, *, newest: bool = False
) -> Generator[Item, None, None]:
    """Yield the items of an iterable that a thread runs through.

    An error of the iterable is raised here, after the items before it. Closing the generator stops the thread.

    Args:
        items: What to run through.
        size: Most items that wait; at least 1.
        newest: Where the consumer is slower, drop the oldest waiting item instead of making the thread wait.
    """
    queue = _Queue[Item](size, newest=newest)
    thread = threading.Thread(target=queue.fill, args=(items,), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield from queue
    finally:
        queue.stop()
        thread.join(_PATIENCE_S)


class _Queue(Generic[Item]):
    def __init__(self, size: int, *, newest: bool) -> None:
        self._size = size
        self._newest = newest
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def fill(self, items: Iterable[Item]) -> None:
        """Run through the items: the thread's work."""
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 raised again where the items are consumed
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def stop(self) -> None:
        """Make the thread end at its next item."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def _put(self, item: Item) -> bool:
        with self._changed:
            if self._newest and len(self._waiting) >= self._size:
                self._waiting.popleft()
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._size)
            if self._stopped:
                return False
            self._waiting.append(item)
            self._changed.notify_all()
            return True


class FrameDetector(Protocol):
    """What is asked of a detector; `proxydet.detector.Detector` is one."""

    def predict_images(
        self,
        images: Sequence[Pixels],
        vocabulary: Vocabulary | None = None,
        settings: InferenceConfig | None = None,
    ) -> list[Prediction]:
        """Find objects in uint8 (H, W, 3) RGB images; boxes and masks in their pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameResult:
    """What was found in one frame.

    Attributes:
        frame: The frame: its number, time and pixels.
        found: What was found in it.
    """

    frame: Frame
    found: Detections

    @property
    def index(self) -> int:
        """The frame's number in the video, from 0."""
        return self.frame.index

    @property
    def seconds(self) -> float:
        """The frame's time, counted from the first frame."""
        return self.frame.seconds

    def to_dict(self, video: str) -> dict[str, Any]:
        """Return plain Python values, ready for JSON, with the video's name."""
        place = {"file": video, "frame": self.index, "seconds": round(self.seconds, 6)}
        return {**place, **self.found.to_dict()}


def look_at_frames(
    detector: FrameDetector,
    reader: VideoReader,
    vocabulary: Vocabulary,
    settings: InferenceConfig,
    *,
    batch_size: int = 4,
) -> Generator[FrameResult, None, None]:
    """Find objects in every frame that a reader gives; a thread decodes ahead.

    Of a camera, frames that come while the network is busy are dropped, and batches hold one frame, so that results
    are never late.

    Args:
        detector: Finds objects.
        reader: An open video; it is closed at the end.
        vocabulary: What to look for.
        settings: Thresholds and limits.
        batch_size: Frames that go through the network at once.

    Raises:
        ConfigError: The batch size is below 1: at once, all others while iterating.
        DataError: The video is damaged or cut off; the frames before it come first.
    """
    if batch_size < 1:
        reader.close()
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    size = 1 if reader.source.live else batch_size
    return _look(detector, reader, vocabulary, settings, size)


def _look(
    detector: FrameDetector,
    reader: VideoReader,
    vocabulary: Vocabulary,
    settings: InferenceConfig,
    size: int,
) -> Generator[FrameResult, None, None]:
    live = reader.source.live
    with reader, closing(read_ahead(reader, 1 if live else 2 * size, newest=live)) as frames:
        for batch in _batches(frames, size):
            predictions = detector.predict_images(
                [frame.pixels for frame in batch], vocabulary, settings
            )
            for frame, prediction in zip(batch, predictions, strict=True):
                yield FrameResult(frame=frame, found=Detections(prediction, vocabulary.names))


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Split frames into batches; an error comes after the frames before it."""
    batch: list[Frame] = []
    broken: DataError | None = None
    while broken is None:
        try:
            frame = next(frames, None)
        except DataError as error:
            broken = error
            break
        if frame is None:
            break
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
    if broken is not None:
        raise broken
