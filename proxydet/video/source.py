"""What a user may call a video: a file, or a camera."""

from __future__ import annotations

import glob
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from proxydet.errors import DataError, MissingDependencyError

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
