"""What ``proxydet predict`` shows: results as they come, what was saved, what could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxydet_cli.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from proxydet.detections import Detections
    from proxydet.prediction_run import PictureResult, PredictionSummary
    from proxydet.video.frames import FrameResult
    from proxydet.video.run import VideoSummary


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

    def video_done(self, summary: VideoSummary) -> None:
        """Take note of what became of a video."""
        self._saved += summary.saved
        if summary.broken is not None:
            self._broken.append(summary.broken)

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
                hint="what was found before a video broke off is kept; pictures are named in the warnings above",
            )


def _tell_saved(out: Output, saved: Sequence[Path]) -> None:
    if len(saved) == 1:
        out.message(f"saved {saved[0]}")
    elif saved:
        out.message(f"saved {len(saved)} files, the first: {saved[0]}")


def _summary(found: Detections) -> str:
    shown = ", ".join(
        f"{label} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)
    )
    return shown or "nothing found"
