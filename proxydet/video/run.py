"""Looks at a video and saves what was found: decoding, the network, drawing and encoding at the same time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.errors import DataError, Interrupted
from proxydet.inference.image_files import clear_of, unique_name
from proxydet.reporting import SILENT, Progress, Task
from proxydet.video.frames import FrameDetector, FrameResult, look_at_frames
from proxydet.video.reading import VideoReader, VideoSource, open_source
from proxydet.video.saving import FrameSaver, make_frame_savers

if TYPE_CHECKING:
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.vocabulary import Vocabulary

_DRAWERS = 2


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video to look at."""

    source: VideoSource
    name: Path
    """Where its results go below the output folder: relative, without ending."""


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """How videos are looked at."""

    vocabulary: Vocabulary
    settings: InferenceConfig
    output: Path
    """Folder of what is saved."""
    kinds: Sequence[str] = ()
    """What is saved: some of `proxydet.video.saving.KINDS`."""
    batch_size: int = 4
    """Frames in the network at once."""
    every: int = 1
    """Look at each frame (1), each second one (2), ..."""
    on_result: Callable[[str, FrameResult], None] | None = None
    """Is told the video's name and each result, in order."""


@dataclass(frozen=True, kw_only=True)
class VideoSummary:
    """What became of a video."""

    video: str
    frames: int
    """Frames that were looked at."""
    detections: int
    """Detections in all of them."""
    saved: tuple[Path, ...]
    broken: str | None = None
    """Where and why the video ended early; None where it did not."""


def name_videos(
    sources: Sequence[str | Path], *, reserved: Iterable[str] = ()
) -> tuple[VideoFile, ...]:
    """Open what a user calls videos, and give each a name of its own.

    Args:
        sources: Files and cameras.
        reserved: Names in the output folder that other results have; a video of that name gets a number.

    Raises:
        DataError: A file or camera is not there.
    """
    taken: set[Path] = set()
    videos = []
    for source in map(open_source, dict.fromkeys(sources)):
        plain = Path(source.path.stem if source.path else source.name.replace(":", "_"))
        name = unique_name(clear_of(plain, frozenset(reserved)), taken)
        videos.append(VideoFile(source=source, name=name))
    return tuple(videos)


def predict_video_file(
    detector: FrameDetector, video: VideoFile, plan: VideoPlan, *, progress: Progress = SILENT
) -> VideoSummary:
    """Look at a video or a camera and save what was found.

    What was found before a video breaks, or before Ctrl-C, is saved in complete files. Ctrl-C is how looking at a
    camera ends.

    Args:
        detector: Finds objects.
        video: What to look at.
        plan: Vocabulary, settings, and what is saved.
        progress: Where progress is shown.

    Raises:
        DataError: The video cannot be opened, has no frames, or breaks before its first one.
        Interrupted: Ctrl-C stopped a file; its results up to there are saved.
    """
    with VideoReader(video.source, every=plan.every) as reader, contextlib.ExitStack() as stack:
        info = reader.info
        savers = make_frame_savers(
            plan.kinds,
            plan.output / video.name,
            source=video.source,
            info=info,
            sound=plan.every == 1,
        )
        for saver in savers:
            stack.callback(saver.abandon)
        run = stack.enter_context(closing(_Run(video.source.name, plan, savers)))
        total = None if info.frames is None else -(-info.frames // plan.every)
        task = stack.enter_context(
            progress.task(f"looking at {video.source.name}", total=total, unit="frames")
        )
        results = look_at_frames(
            detector, reader, plan.vocabulary, plan.settings, batch_size=plan.batch_size
        )
        stopped = run.follow(stack.enter_context(closing(results)), task)
        summary = run.finish()
    if stopped is not None and not video.source.live:
        kept = "; what was found in them is saved" if summary.saved else ""
        raise Interrupted(
            f"stopped after {summary.frames} frames of {summary.video}{kept}"
        ) from stopped
    return summary


class _Run:
    """Hands results to the savers behind the network's work."""

    def __init__(self, name: str, plan: VideoPlan, savers: Sequence[FrameSaver]) -> None:
        self._name = name
        self._plan = plan
        self._savers = savers
        self._drawers = ThreadPoolExecutor(_DRAWERS, "draw")
        self._writer = ThreadPoolExecutor(1, "encode")
        self._behind: deque[Future[None]] = deque()
        self._frames = self._detections = 0
        self._broken: str | None = None

    def follow(self, results: Iterator[FrameResult], task: Task) -> KeyboardInterrupt | None:
        """Take results until they end, the video breaks or Ctrl-C comes, which is returned.

        Raises:
            DataError: The video breaks before its first frame.
        """
        try:
            for result in self._until_broken(results):
                self.add(result)
                task.advance()
        except KeyboardInterrupt as error:
            return error
        return None

    def _until_broken(self, results: Iterator[FrameResult]) -> Iterator[FrameResult]:
        # Apart from what takes the results: a file that cannot be written is no broken video.
        try:
            yield from results
        except DataError as error:
            if self._frames == 0:
                raise
            self._broken = error.message

    def add(self, result: FrameResult) -> None:
        """Take a result; waits where drawing and encoding are far behind."""
        self._frames += 1
        self._detections += len(result.found)
        if self._plan.on_result is not None:
            self._plan.on_result(self._name, result)
        prepared = [self._drawers.submit(saver.prepare, result) for saver in self._savers]
        self._behind.append(self._writer.submit(self._save, result, prepared))
        while len(self._behind) > 2 * self._plan.batch_size + _DRAWERS:
            self._behind.popleft().result()

    def finish(self) -> VideoSummary:
        """Wait for what is behind, and complete the files."""
        for future in self._behind:
            future.result()
        saved = [path for saver in self._savers for path in saver.finish()] if self._frames else []
        return VideoSummary(
            video=self._name,
            frames=self._frames,
            detections=self._detections,
            saved=tuple(saved),
            broken=self._broken,
        )

    def close(self) -> None:
        """End the threads."""
        self._drawers.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)

    def _save(self, result: FrameResult, prepared: list[Future[Any]]) -> None:
        for saver, future in zip(self._savers, prepared, strict=True):
            saver.add(result, future.result())
