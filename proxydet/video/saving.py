"""Saves what was found in a video: an annotated video, JSON lines, a table."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from proxydet.errors import ConfigError
from proxydet.files import discard, staged, write_errors
from proxydet.inference.writers import TABLE_COLUMNS, table_cells
from proxydet.video.frames import FrameResult
from proxydet.video.reading import VideoInfo, VideoSource
from proxydet.video.writing import VideoWriter
from proxydet.visualization.drawing import DrawingStyle, letters_for
from proxydet.wording import json_text

KINDS = {"images": ".mp4", "json": ".jsonl", "csv": ".csv"}
"""What can be saved of a video, and the file's ending; ``images`` are an annotated video."""


class FrameSaver(Protocol):
    """Saves the results of one frame after the other."""

    def prepare(self, result: FrameResult) -> Any:
        """Do the work that needs no order; threads call this at once."""

    def add(self, result: FrameResult, prepared: Any) -> None:
        """Save a frame; called in the frames' order."""

    def finish(self) -> list[Path]:
        """Complete the files; those that were made."""

    def abandon(self) -> None:
        """Remove what is not complete."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Check that all kinds can be saved of a video.

    Raises:
        ConfigError: One cannot.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"cannot save {kind!r} of a video", hint=f"choose from {', '.join(KINDS)}"
            )


def make_frame_savers(
    kinds: Sequence[str],
    target: Path,
    *,
    source: VideoSource,
    info: VideoInfo,
    sound: bool = True,
) -> list[FrameSaver]:
    """Make the savers of the wanted kinds for one video.

    Args:
        kinds: Some of `KINDS`.
        target: The files' path without ending; its folder is made when needed.
        source: The video.
        info: What is known of it.
        sound: Copy its sound.

    Raises:
        ConfigError: There is no such kind, or the annotated video would replace the one that is read.
    """
    check_kinds(kinds)
    targets = {kind: target.with_name(target.name + suffix) for kind, suffix in KINDS.items()}
    drawn = targets["images"]
    replaces = "images" in kinds and source.path is not None and drawn.exists()
    if replaces and drawn.samefile(str(source.path)):
        raise ConfigError(
            f"the annotated video would replace {source.path}",
            hint="choose another --output folder",
        )
    sound_from = source.path if sound else None
    makers: dict[str, Callable[[], FrameSaver]] = {
        "images": lambda: DrawnVideo(VideoWriter(drawn, info, sound_from=sound_from)),
        "json": lambda: JsonLines(targets["json"], source.name),
        "csv": lambda: CsvTable(targets["csv"]),
    }
    return [makers[kind]() for kind in dict.fromkeys(kinds)]


class DrawnVideo:
    """Draws what was found on the frames and encodes them."""

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer

    def prepare(self, result: FrameResult) -> Any:
        """Draw."""
        height, width = result.frame.pixels.shape[:2]
        drawn = result.found.draw(Image.fromarray(result.frame.pixels), frame_style(height, width))
        return np.asarray(drawn)

    def add(self, result: FrameResult, prepared: Any) -> None:
        """Encode."""
        self._writer.write(result.frame.pts, prepared)

    def finish(self) -> list[Path]:
        """Complete the video; none where there were no frames."""
        made = self._writer.finish()
        return [] if made is None else [made]

    def abandon(self) -> None:
        """Remove what is not complete."""
        self._writer.abandon()


def frame_style(height: int, width: int) -> DrawingStyle:
    """How frames are drawn: at their own size, with letters that do not change from frame to frame.

    Args:
        height: Of the frames, in pixels.
        width: Likewise.
    """
    return DrawingStyle(font_size=letters_for((width, height)), shortest_edge=0)


class JsonLines:
    """Saves one JSON object a frame, each on a line."""

    def __init__(self, target: Path, video: str) -> None:
        self._file = _TextFile(target)
        self._video = video

    def prepare(self, result: FrameResult) -> Any:
        """Encode a frame."""
        return json_text(result.to_dict(self._video)) + "\n"

    def add(self, result: FrameResult, prepared: Any) -> None:  # noqa: ARG002
        """Write a line."""
        self._file.write(prepared)

    def finish(self) -> list[Path]:
        """Complete the file."""
        return [self._file.finish()]

    def abandon(self) -> None:
        """Remove what is not complete."""
        self._file.abandon()


class CsvTable:
    """Saves one table of all frames' detections."""

    def __init__(self, target: Path) -> None:
        self._file = _TextFile(target)
        self._file.write(_rows([("frame", "seconds", *TABLE_COLUMNS)]))

    def prepare(self, result: FrameResult) -> Any:
        """Make the rows of a frame."""
        start = [result.index, round(result.seconds, 4)]
        return _rows([[*start, *table_cells(item)] for item in result.found])

    def add(self, result: FrameResult, prepared: Any) -> None:  # noqa: ARG002
        """Write the rows."""
        self._file.write(prepared)

    def finish(self) -> list[Path]:
        """Complete the table."""
        return [self._file.finish()]

    def abandon(self) -> None:
        """Remove what is not complete."""
        self._file.abandon()


class _TextFile:
    """A file that is written bit by bit and appears under its name when it is complete."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(staged(target))
        with write_errors(target):
            self._stream = self._temporary.open("w", encoding="utf-8", newline="")

    def write(self, text: str) -> None:
        with write_errors(self._target):
            self._stream.write(text)

    def finish(self) -> Path:
        with write_errors(self._target):
            self._stream.close()
        self._stack.close()
        return self._target

    def abandon(self) -> None:
        # On a full disk closing fails as writing did: the error is told already, and the file is removed.
        with contextlib.suppress(OSError):
            self._stream.close()
        discard(self._temporary)
        self._stack.close()


def _rows(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
