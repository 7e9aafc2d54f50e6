"""Finds what a user names: image files, folders and patterns, videos and cameras."""

from __future__ import annotations

import glob
import os
import platform
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from proxydet.data.images import readable_suffixes
from proxydet.errors import DataError, MissingDependencyError
from proxydet.files import walk

VIDEO_SUFFIXES = frozenset(
    [
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
    ]
)
"""Suffixes of files that count as videos where images may be meant too."""

_CAMERA = re.compile(r"webcam(?::(\d{1,3}))?")


# --- Images ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """An image to run on."""

    path: Path
    name: Path
    """Where its results go below the output folder: relative, without suffix, different for every image."""


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """What a user's sources stand for."""

    files: tuple[ImageFile, ...] = ()
    """Each file once, in the order given; those of a folder or a pattern by name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files of folders and patterns that are not read, by kind: ``".heic"``, ``"broken link"``, ..."""


def find_images(
    sources: Iterable[str | Path], *, reserved: Iterable[str] = (), listed: Collection[str] = ()
) -> FoundImages:
    """Find images.

    A name that exists is taken as it is, whatever is in it; else ``~`` is expanded, and patterns are. Folders are searched
    at any depth, through links to folders too; what Pillow cannot read there is counted by kind, and names that begin with
    a dot (AppleDouble files ``._photo.jpg`` among them) are passed over.

    Args:
        sources: Files, folders, and patterns such as ``photos/*.jpg`` or ``**/*.png``.
        reserved: Names in the output folder that other results have; an image or folder of that name gets a number.
        listed: Those of the sources that come from a long list: one that is not there is found out when it is read, like
            an image that cannot be read.

    Raises:
        DataError: A source is not there or holds no images, or nothing was given.
    """
    found: dict[Path, Path] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        if source in listed and not os.path.lexists(source) and not glob.has_magic(str(source)):
            found.setdefault(Path(source), Path(Path(source).stem))
            continue
        for path, name in _expand(source, left_out):
            found.setdefault(path, name)
    if not found:
        raise DataError("no images were given", hint="name files, folders or patterns")
    taken: set[Path] = set()
    avoided = frozenset(reserved)
    files = tuple(
        ImageFile(path, unique_name(_clear_of(name, avoided), taken))
        for path, name in found.items()
    )
    return FoundImages(files=files, left_out=left_out)


def _expand(source: str | Path, left_out: Counter[str]) -> Iterator[tuple[Path, Path]]:
    """Yield the images that a source stands for, each with a name for its results."""
    path = Path(source)
    # Not Path's own, which raises an error for a name too long for the disk.
    exists = os.path.exists
    if str(source).startswith("~") and not exists(path):
        try:
            path = path.expanduser()  # the shell has not expanded it, for it was in quotes
        except RuntimeError as error:
            raise DataError(
                f"no home folder for {path.parts[0]}",
                hint="write the whole path",
                path=path,
            ) from error
    if os.path.isdir(path):  # noqa: PTH112
        files = sorted(_files_of(path, left_out))
        if not files:
            raise DataError(
                f"the folder {path} holds no images{_among(left_out)}",
                hint="name the folder that holds them; images are recognised by their suffixes",
                path=path,
            )
        yield from ((file, file.relative_to(path).with_suffix("")) for file in files)
    elif not exists(path) and glob.has_magic(str(path)):
        named = [Path(name) for name in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 absolute patterns too
        # photos/* stands for whatever is there; photos/*.dng names a kind.
        any_kind = not path.suffix or glob.has_magic(path.suffix)
        files = sorted(
            file for file in named if file.is_file() and (not any_kind or _is_read(file, left_out))
        )
        if not files:
            raise DataError(
                f"no image matches {str(source)!r}{_among(left_out)}",
                hint="put the pattern in quotes, and check the folder that it starts from",
            )
        yield from ((file, Path(file.stem)) for file in files)
    elif not exists(path):
        link = "is a broken link: its target is not there" if os.path.islink(path) else None  # noqa: PTH114
        raise DataError(
            f"{path} {link}" if link else f"there is no file or folder {str(path)[:500]}",
            hint="download it first and give the file"
            if "://" in str(source)
            else "check its spelling",
            path=path,
        )
    else:
        yield path, Path(path.stem)


def _files_of(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Find the images in a folder at any depth, each folder once, however links lead to it."""

    def unopened(_: OSError) -> None:
        left_out["folder that cannot be opened"] += 1

    for place, _, names in walk(folder, unopened):
        for name in names:
            if _is_read(file := place / name, left_out):
                yield file


def _is_read(file: Path, left_out: Counter[str]) -> bool:
    """Whether a file of a folder is an image that can be read; others are counted."""
    suffix = file.suffix.lower()
    if suffix not in readable_suffixes():
        left_out[suffix or "without suffix"] += 1
        return False
    if not file.is_file():
        left_out["broken link" if file.is_symlink() else "not a regular file"] += 1
        return False
    return True


def _among(left_out: Counter[str]) -> str:
    return f": {describe_left_out(left_out)}" if left_out else ""


def describe_left_out(left_out: Counter[str]) -> str:
    """Describe what was left out, in one line: ``2 .heic, 1 .dng (not images that can be read; ...)``."""
    shown = [f"{count} {kind}" for kind, count in left_out.most_common(8)]
    if len(left_out) > len(shown):
        shown.append(f"{left_out.total() - sum(c for _, c in left_out.most_common(8))} others")
    text = ", ".join(shown)
    if any(kind.startswith(".") for kind in left_out):
        text += " (not images that can be read here"
        if left_out.keys() & {".heic", ".heif", ".hif"}:
            text += "; for HEIC: pip install pillow-heif"
        text += ")"
    return text


def _clear_of(name: Path, reserved: frozenset[str]) -> Path:
    """Number a name whose first part is reserved; any other stays as it is."""
    first, *rest = name.parts
    return Path(f"{first}_2", *rest) if first in reserved else name


def unique_name(name: Path, taken: set[Path]) -> Path:
    """Number a name that is taken already, and add the result to those that are.

    Args:
        name: The desired name.
        taken: Names that are in use.
    """
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = name.with_name(f"{name.name}_{number}")
    taken.add(unique)
    return unique


# --- Videos and cameras ------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video to run on."""

    source: VideoSource
    name: Path
    """Where its results go below the output folder: relative, without suffix."""


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


def is_video(source: str | Path) -> bool:
    """Whether a source is meant as a video: a file with one of `VIDEO_SUFFIXES`, or ``webcam`` where no such file is."""
    path = Path(source)
    if _CAMERA.fullmatch(str(source)) and not path.exists():
        return True
    return path.suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path)  # noqa: PTH112


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what a user names into images and videos.

    Patterns that match videos are expanded; videos inside folders are left alone.

    Args:
        sources: Files, folders, patterns, cameras.

    Returns:
        Sources for `find_images`, and videos.
    """
    images: list[str] = []
    videos: list[str] = []
    for source in sources:
        names = [source]
        if not os.path.exists(source) and glob.has_magic(source):  # noqa: PTH110
            matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 absolute patterns too
            files = [name for name in matches if Path(name).is_file()]
            names = files if any(map(is_video, files)) else names
        for name in names:
            (videos if is_video(name) else images).append(name)
    return images, videos


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
        name = unique_name(_clear_of(plain, frozenset(reserved)), taken)
        videos.append(VideoFile(source=source, name=name))
    return tuple(videos)


def open_source(source: str | Path | VideoSource) -> VideoSource:
    """Find out how a video is opened.

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
    # DirectShow knows cameras by name.
    devices = [
        device.description or device.name
        for device in pyav().device.enumerate_input_devices("dshow")
        if "video" in getattr(device, "media_types", ["video"])
    ]
    if number >= len(devices):
        raise DataError(
            f"camera {number} not found",
            hint=f"{len(devices)} cameras are connected, counted from 0",
        )
    return VideoSource(name=name, url=f"video={devices[number]}", format="dshow")
