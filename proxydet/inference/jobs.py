"""Runs a detector on image files and videos: reads ahead of the network, writes behind it, and continues where one cannot be read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.data.images import Pixels
from proxydet.detections import Detections, FrameResult
from proxydet.errors import ConfigError, DataError, JobInterruptedError
from proxydet.inference.pipeline import WriteBehind, Writer, run_images
from proxydet.inference.sources import ImageFile, Unreadable, VideoFile
from proxydet.inference.writers import make_frame_writers
from proxydet.modeling.postprocess import to_host
from proxydet.reporting import SILENT
from proxydet.wording import printable

if TYPE_CHECKING:
    from proxydet.detector import Detector, ScaledImage
    from proxydet.modeling.config import InferenceConfig
    from proxydet.modeling.postprocess import Prediction
    from proxydet.reporting import Progress
    from proxydet.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


# --- Images ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageResult:
    """The detections of one image."""

    image: ImageFile
    pixels: Pixels
    """uint8 (H, W, 3) RGB."""
    found: Detections

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return {"file": self.image.source.name, **self.found.to_dict()}


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What was done with images."""

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
        vocabulary: What to detect.
        settings: Which detections are kept.
        batch_size: Images in the network at once.
        writers: What is saved.
        on_result: Called with each result, in input order.
        progress: Where progress is shown.

    Raises:
        DataError: The only image cannot be read.
        ConfigError: The batch size is below 1, or a drawn image would replace one that is read.
        JobInterruptedError: Ctrl-C; what was found before is saved.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
    if settings.tiles:
        batch_size = 1  # few whole images in memory: the network is given batches of their tiles
    done, detections = 0, 0
    unreadable: list[Unreadable] = []
    stopped: KeyboardInterrupt | None = None

    def read(image: ImageFile) -> tuple[Pixels, ScaledImage]:
        pixels = image.source.read()
        return pixels, detector.scaled(pixels, settings)

    def detect(batch: list[tuple[Pixels, ScaledImage]]) -> list[Prediction]:
        scaled = [image for _, image in batch]
        return to_host(detector.predict_images(scaled, vocabulary, settings))

    with (
        progress.task("predicting", total=len(images), unit="images") as task,
        WriteBehind(writers, 2 * batch_size) as behind,
        closing(run_images(images, read, detect, batch_size=batch_size)) as results,
    ):
        try:
            for image, made in results:
                task.advance()
                if isinstance(made, DataError):
                    if len(images) == 1:
                        raise made
                    logger.warning("%s", printable(made.message))
                    unreadable.append(Unreadable(file=image.source.name, reason=made.message))
                    continue
                (pixels, _), prediction = made
                found = Detections(prediction, vocabulary.reported)
                result = ImageResult(image=image, pixels=pixels, found=found)
                if on_result is not None:
                    on_result(result)
                done, detections = done + 1, detections + len(found)
                behind.add(result, image.source.name)
        except KeyboardInterrupt as error:
            stopped = error
        saved = behind.finish()
    if stopped is not None:
        where = ""
        if saved:
            shared = (p for p in saved[0].parents if all(path.is_relative_to(p) for path in saved))
            where = f"; what was found in them is saved in {next(shared)}"
        raise JobInterruptedError(
            f"stopped after {done} of {len(images)} images{where}"
        ) from stopped
    return PredictionSummary(
        images=done, detections=detections, unreadable=tuple(unreadable), saved=saved
    )


# --- Videos ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoSummary:
    """What was done with a video."""

    video: str
    frames: int
    """Frames that the detector was run on."""
    detections: int
    """Detections in all of them."""
    saved: tuple[Path, ...]
    broken: str | None = None
    """Where and why the video ended early; None where it did not."""


def predict_video(
    detector: Detector,
    video: VideoFile,
    *,
    vocabulary: Vocabulary,
    settings: InferenceConfig,
    output: Path,
    kinds: Sequence[str] = (),
    batch_size: int = 4,
    every: int = 1,
    track: bool = False,
    on_result: Callable[[str, FrameResult], None] | None = None,
    progress: Progress = SILENT,
) -> VideoSummary:
    """Run a detector on a video or a camera, and save what was found: decoding, network, drawing and encoding at once.

    What was found before a video breaks, or before Ctrl-C, is saved in complete files. Ctrl-C is how running on a camera
    ends.

    Args:
        detector: The detector.
        video: What to run on.
        vocabulary: What to detect.
        settings: Which detections are kept.
        output: Folder of what is saved.
        kinds: What is saved: some of `proxydet.inference.writers.VIDEO_KINDS`.
        batch_size: Frames in the network at once.
        every: Run on each frame (1), each second one (2), ...
        track: Give objects the ids of their tracks.
        on_result: Called with the video's name and each result, in order.
        progress: Where progress is shown.

    Raises:
        MissingDependencyError: The package that tracks is not installed.
        DataError: The video cannot be opened, has no frames, or breaks before its first one.
        JobInterruptedError: Ctrl-C stopped a file; its results up to there are saved.
    """
    from proxydet.inference.video import VideoReader

    frames, detections = 0, 0
    broken: str | None = None
    stopped: KeyboardInterrupt | None = None
    name = video.source.name
    with VideoReader(video.source, every=every) as reader, contextlib.ExitStack() as stack:
        info = reader.info
        writers = make_frame_writers(
            kinds,
            output / video.name,
            source=video.source,
            info=info,
            sound=every == 1,
            tracked=track,
        )
        behind = stack.enter_context(WriteBehind(writers, 2 * batch_size))
        total = None if info.frames is None else -(-info.frames // every)
        task = stack.enter_context(progress.task(f"predicting {name}", total=total, unit="frames"))
        results = stack.enter_context(
            closing(
                detector.predict_frames(
                    reader, vocabulary, settings, batch_size=batch_size, track=track
                )
            )
        )
        try:
            for result in results:
                frames, detections = frames + 1, detections + len(result.found)
                if on_result is not None:
                    on_result(name, result)
                behind.add(result, f"frame {result.index} of {name}")
                task.advance()
        except DataError as error:
            if frames == 0:
                raise
            broken = error.message
        except KeyboardInterrupt as error:
            stopped = error
        saved = behind.finish() if frames else ()
    if stopped is not None and not video.source.live:
        kept = "; what was found in them is saved" if saved else ""
        raise JobInterruptedError(f"stopped after {frames} frames of {name}{kept}") from stopped
    return VideoSummary(
        video=name, frames=frames, detections=detections, saved=saved, broken=broken
    )
