"""What ``proxydet predict`` does and shows: results as they come, what was saved, what could not be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxydet_cli.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from proxydet.detections import Detections
    from proxydet.detector import Detector
    from proxydet.modeling.config import InferenceConfig
    from proxydet.picture_files import PictureFile
    from proxydet.prediction_run import PictureResult, PredictionSummary
    from proxydet.video.frames import FrameResult
    from proxydet.video.run import VideoFile, VideoSummary
    from proxydet.vocabulary.vocabulary import Vocabulary

# More detections than these make a line that nobody reads.
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is looked at and what becomes of it; the fields are those of the plans for pictures and for videos."""

    pictures: Sequence[PictureFile]
    videos: Sequence[VideoFile]
    vocabulary: Vocabulary
    settings: InferenceConfig
    output: Path
    kinds: Sequence[str]
    batch_size: int
    every: int


def look(detector: Detector, job: Job, out: Output) -> None:
    """Look at pictures, then at videos.

    Raises:
        DataError: Something could not be read; all else is done.
    """
    from proxydet.prediction_output import make_savers
    from proxydet.prediction_run import PredictionPlan, predict_files
    from proxydet.video.run import VideoPlan, predict_video_file
    from proxydet_cli.progress import show_progress

    shown, progress = Shown(out, lines=bool(job.videos)), show_progress()
    alone = len(job.pictures) + len(job.videos) == 1
    if job.pictures:
        plan = PredictionPlan(
            vocabulary=job.vocabulary,
            settings=job.settings,
            batch_size=job.batch_size,
            savers=make_savers(job.kinds, job.output, job.vocabulary.names),
            on_result=shown.picture,
        )
        with shown.going_on(str(job.pictures[0].path), alone=alone):
            shown.pictures_done(predict_files(detector, job.pictures, plan, progress=progress))
    frames = VideoPlan(
        vocabulary=job.vocabulary,
        settings=job.settings,
        output=job.output,
        kinds=job.kinds,
        batch_size=job.batch_size,
        every=job.every,
        on_result=shown.frame,
    )
    for video in job.videos:
        with shown.going_on(video.source.name, alone=alone):
            shown.video_done(predict_video_file(detector, video, frames, progress=progress))
    shown.conclude()


@dataclass
class Shown:
    """Writes results.

    Attributes:
        out: Where they are written.
        lines: With ``--json``, write each result on a line of its own as it comes; else all in one object at the end.
    """

    out: Output
    lines: bool = False
    _collected: list[dict[str, Any]] = field(default_factory=list)
    _saved: list[Path] = field(default_factory=list)
    _broken: list[str] = field(default_factory=list)
    _hints: dict[str, None] = field(default_factory=dict)

    def picture(self, result: PictureResult) -> None:
        """Write, or collect, the result of a picture."""
        if not self.out.json:
            self.out.data(None, f"{result.file}: {_summary(result.found)}")
        elif self.lines:
            self.out.line(result.to_dict())
        else:
            self._collected.append(result.to_dict())

    def frame(self, video: str, result: FrameResult) -> None:
        """Write the result of a frame."""
        if self.out.json:
            self.out.line(result.to_dict(video))
        else:
            self.out.data(None, f"{video} {result.seconds:.2f} s: {_summary(result.found)}")

    def pictures_done(self, summary: PredictionSummary) -> None:
        """Take note of what became of the pictures."""
        self._saved += summary.saved
        if self.out.json and not self.lines:
            self.out.data({"images": self._collected, "unreadable": summary.unreadable})
        if summary.unreadable:
            total = summary.pictures + len(summary.unreadable)
            self._broken.append(f"{len(summary.unreadable)} of {total} pictures could not be read")
            self._hints["the warnings above say why"] = None

    def video_done(self, summary: VideoSummary) -> None:
        """Take note of what became of a video."""
        self._saved += summary.saved
        if summary.broken is not None:
            self._broken.append(summary.broken)
            self._hints["what was found before a video broke off is kept"] = None

    @contextlib.contextmanager
    def going_on(self, name: str, *, alone: bool) -> Iterator[None]:
        """Note what cannot be read at all, so that the next is looked at.

        Args:
            name: What is read.
            alone: It is all that there is to read: its error is raised.
        """
        from proxydet.errors import DataError

        try:
            yield
        except DataError as error:
            if alone:
                raise
            self.out.warning(error.message)
            self._broken.append(f"{name} could not be read")
            self._hints["the warnings above say why"] = None

    def conclude(self) -> None:
        """Say what was saved.

        Raises:
            DataError: Something could not be read.
        """
        from proxydet.errors import DataError

        _tell_saved(self.out, self._saved)
        if self._broken:
            raise DataError(
                f"{'; '.join(self._broken)}; all else is done",
                hint="; ".join(self._hints),
            )


def _tell_saved(out: Output, saved: Sequence[Path]) -> None:
    if len(saved) == 1:
        out.message(f"saved {saved[0]}")
    elif saved:
        out.message(f"saved {len(saved)} files, the first: {saved[0]}")


def _summary(found: Detections) -> str:
    """The best few detections, for a line of text; files and JSON hold all."""
    best = zip(found.labels[:_SHOWN], found.scores[:_SHOWN], strict=True)
    shown = [f"{label} {score:.2f}" for label, score in best]
    if len(found) > _SHOWN:
        shown.append(f"... and {len(found) - _SHOWN} more")
    return ", ".join(shown) or "nothing found"
