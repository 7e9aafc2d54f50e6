"""Decodes a video frame by frame, upright, with the time of each frame.

Dimensions: H and W pixels of a frame.
"""

from __future__ import annotations

import glob
import logging
import os
import platform
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import ConfigError, DataError, MissingDependencyError

SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    }
)
"""Endings of files that count as videos where pictures may be meant too."""

_CAMERA = re.compile(r"webcam(?::(\d{1,3}))?")


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video that PyAV can open."""

    name: str
    """What it is called in results and messages."""
    url: str
    """What PyAV opens."""
    path: Path | None = None
    """The file; None for a camera."""
    format: str | None = None
    """FFmpeg's name of the input device; None: found out from the file's content."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values of options of FFmpeg's input."""

    @property
    def live(self) -> bool:
        """Whether frames come at their own pace, so that those that come too fast are dropped."""
        return self.path is None


def is_video(source: str | Path) -> bool:
    """Whether a source is meant as a video: a file with one of `SUFFIXES`, or ``webcam`` where no such file is."""
    path = Path(source)
    if _CAMERA.fullmatch(str(source)) and not path.exists():
        return True
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)  # noqa: PTH112


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what a user names into pictures and videos.

    Patterns that match videos are expanded; videos inside folders are left alone.

    Args:
        sources: Files, folders, patterns, cameras.

    Returns:
        Sources for `proxydet.inference.image_files.find_images`, and videos.
    """
    pictures: list[str] = []
    videos: list[str] = []
    for source in sources:
        for name in _expanded(source):
            (videos if is_video(name) else pictures).append(name)
    return pictures, videos


def _expanded(source: str) -> list[str]:
    if os.path.exists(source) or not glob.has_magic(source):  # noqa: PTH110
        return [source]
    matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 absolute patterns too
    files = [name for name in matches if Path(name).is_file()]
    return files if any(map(is_video, files)) else [source]


def open_source(source: str | Path | VideoSource) -> VideoSource:
    """Say how a video is opened.

    Args:
        source: A file; ``webcam``, or ``webcam:1`` for the second camera; or a source as it is.

    Raises:
        DataError: There is no such file or camera.
    """
    if isinstance(source, VideoSource):
        return source
    path = Path(source)
    camera = _CAMERA.fullmatch(str(source))
    if camera and not path.exists():
        return _camera(int(camera[1] or 0))
    if not path.is_file():
        raise DataError(
            f"there is no video file {path}",
            hint="name a video, or a camera: webcam, webcam:1",
            path=path,
        )
    # Nothing but files: a playlist that calls itself a video shall not reach for addresses.
    return VideoSource(
        name=str(path),
        url=str(path.absolute()),
        path=path,
        options=(("protocol_whitelist", "file"),),
    )


def pyav() -> ModuleType:
    """Import PyAV.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            f"videos and cameras need the package av (PyAV), which cannot be imported: {error}",
            hint="run: pip install 'proxydet[video]' (or: pip install av)",
        ) from error
    module: ModuleType = av
    return module


def _camera(number: int) -> VideoSource:
    name = f"webcam:{number}"
    system = platform.system()
    if system == "Linux":
        return VideoSource(name=name, url=f"/dev/video{number}", format="v4l2")
    if system == "Darwin":
        # AVFoundation refuses to open a camera without a rate that it supports.
        return VideoSource(
            name=name, url=f"{number}:none", format="avfoundation", options=(("framerate", "30"),)
        )
    return VideoSource(name=name, url=f"video={_windows_camera(number)}", format="dshow")


def _windows_camera(number: int) -> str:
    """Name of a camera: DirectShow knows no numbers."""
    devices = [
        device.description or device.name
        for device in pyav().device.enumerate_input_devices("dshow")
        if "video" in getattr(device, "media_types", ["video"])
    ]
    if number >= len(devices):
        raise DataError(
            f"there is no camera number {number}",
            hint=f"there are {len(devices)} cameras, counted from 0",
        )
    return str(devices[number])


Pixels = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

_DEFAULT_RATE = Fraction(30)
_PATIENCE_S = 1.0
# A file that ends this much earlier than its header says was cut off.
_SHORT_BY_S = 0.5
# FFmpeg takes any text for pictures made of letters.
_NO_VIDEO_FORMATS = frozenset({"tty", "txd", "subviewer1", "srt"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One picture of a video."""

    index: int
    """Its number in the video, from 0."""
    seconds: float
    """Its time, counted from the first frame."""
    pts: int
    """Its time in the video's time base."""
    pixels: Pixels
    """uint8 (H, W, 3) RGB, turned upright."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What is known of a video before it is decoded."""

    rate: Fraction
    """Frames a second, on average."""
    time_base: Fraction
    """Seconds of one unit of `Frame.pts`."""
    seconds: float | None
    """Its length; None where that is not known."""
    frames: int | None
    """Its frames; None where they are not counted."""
    pixel_aspect: Fraction
    """Width of a pixel by its height, before the picture is turned."""


class VideoReader:
    """An open video; use it in a ``with`` statement and iterate over it once.

    Args:
        source: A file, ``webcam``, ``webcam:1``, or a `VideoSource`.
        every: Decode each frame, but give only each ``every``-th.

    Raises:
        MissingDependencyError: PyAV is not installed.
        DataError: There is no such video or camera, or it cannot be opened.
    """

    def __init__(self, source: str | Path | VideoSource, *, every: int = 1) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; it must be at least 1")
        av = pyav()
        self._decoding = threading.Lock()
        self.source = open_source(source)
        self._every = every
        self._error = av.FFmpegError
        try:
            self._container: Any = av.open(
                self.source.url, format=self.source.format, options=dict(self.source.options)
            )
        except (av.FFmpegError, ValueError) as error:
            raise self._unreadable(error) from error
        self._stream = self._video_stream()
        self.info = self._read_info()
        self._damaged = 0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or the camera.

        One whose driver hangs in another thread stays open until it returns: closed under it, FFmpeg would crash.
        """
        if self._decoding.acquire(timeout=_PATIENCE_S):
            try:
                self._container.close()
            finally:
                self._decoding.release()
        else:
            logger.warning("%s does not answer, and is left open", self.source.name)

    def __iter__(self) -> Iterator[Frame]:
        """Decode.

        Raises:
            DataError: The video is damaged, cut off or has no frames; what could be decoded came before.
        """
        index, last_end = 0, 0.0
        first_pts: int | None = None
        pts = -1
        for decoded in self._decoded():
            # Some files lack times, or repeat one: then the frame comes one step after the last.
            step = max(round(1 / (self.info.rate * self.info.time_base)), 1)
            given = decoded.pts if decoded.pts is not None else pts + step
            pts = given if first_pts is None or given > pts else pts + 1
            first_pts = pts if first_pts is None else first_pts
            seconds = float((pts - first_pts) * self.info.time_base)
            last_end = seconds + float(1 / self.info.rate)
            if decoded.is_corrupt:
                self._damaged += 1
            if index % self._every == 0:
                yield Frame(
                    index=index,
                    seconds=seconds,
                    pts=pts - first_pts if self.source.live else pts,
                    pixels=_upright(decoded),
                )
            index += 1
        self._check_end(index, last_end)

    def _decoded(self) -> Iterator[Any]:
        """Decode, turning FFmpeg's errors into ours with the place."""
        count, seconds = 0, 0.0
        try:
            frames = iter(self._container.decode(self._stream))
            while True:
                with self._decoding:
                    decoded = next(frames, None)
                if decoded is None:
                    return
                yield decoded
                count += 1
                seconds = decoded.time if decoded.time is not None else seconds
        except self._error as error:
            raise DataError(
                f"the video {self.source.name} is damaged at {seconds:.2f} s, after {count} frames: "
                f"{error.strerror or error}",
                hint="what was found before is kept",
                path=self.source.path,
            ) from error

    def _check_end(self, count: int, end: float) -> None:
        if count == 0:
            raise DataError(
                f"the video {self.source.name} has no frames",
                hint="the file is damaged, or it holds only sound",
                path=self.source.path,
            )
        if self._damaged:
            logger.warning(
                "%d of %d frames of %s are damaged", self._damaged, count, self.source.name
            )
        allowed = max(_SHORT_BY_S, float(2 / self.info.rate))
        if self.info.seconds is not None and end + allowed < self.info.seconds:
            raise DataError(
                f"the video {self.source.name} ends at {end:.2f} s, after {count} frames, although it should be "
                f"{self.info.seconds:.2f} s long: the file is cut off",
                hint="what was found before is kept",
                path=self.source.path,
            )

    def _video_stream(self) -> Any:
        streams = self._container.streams.video
        if not streams or self._container.format.name in _NO_VIDEO_FORMATS:
            self._container.close()
            raise DataError(
                f"{self.source.name} is no video: there are no pictures in it",
                hint="give a video such as an .mp4, .mov, .mkv or .webm file",
                path=self.source.path,
            )
        return streams[0]

    def _read_info(self) -> VideoInfo:
        stream, container = self._stream, self._container
        time_base = Fraction(stream.time_base or Fraction(1, 1000))
        seconds = float(stream.duration * time_base) if stream.duration else _tagged(stream)
        if seconds is None and container.duration and len(container.streams) == 1:
            seconds = container.duration / 1e6
        return VideoInfo(
            rate=Fraction(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE),
            time_base=time_base,
            seconds=None if self.source.live else seconds,
            frames=stream.frames or None,
            pixel_aspect=Fraction(stream.sample_aspect_ratio or 1) or Fraction(1),
        )

    def _unreadable(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or str(error)
        if self.source.live:
            return DataError(
                f"cannot open the camera {self.source.name} ({self.source.url}): {reason}",
                hint="check that it is connected, that no other program uses it, and that you may use it",
            )
        return DataError(
            f"cannot read the video {self.source.name}: {reason}",
            hint="give a video that FFmpeg can read; a file that was cut off while recording may lack its index",
            path=self.source.path,
        )


def _tagged(stream: Any) -> float | None:
    """Length of a stream in seconds as Matroska notes it, ``00:01:02.500000000``; None where it does not."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _upright(decoded: Any) -> Pixels:
    """Turn as the file's display matrix says: cameras store what they see and how they were held."""
    pixels_HW3: Pixels = decoded.to_ndarray(format="rgb24")
    turns = round(decoded.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels_HW3, turns)) if turns else pixels_HW3
