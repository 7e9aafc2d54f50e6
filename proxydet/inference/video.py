"""Videos: decoded frame by frame ahead of the network, upright, with the time of each frame; encoded with sound behind it.

Dimensions: H and W pixels of a frame.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from proxydet.data.images import Pixels
from proxydet.errors import ConfigError, DataError
from proxydet.files import discard, staged, unwritable
from proxydet.inference.sources import VideoSource, open_source, pyav

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_DEFAULT_RATE = Fraction(30)
# A camera may block in its driver: neither its thread nor its lock is waited for longer than this.
CAMERA_TIMEOUT_S = 1.0
# A file that ends this much earlier than its header says was cut off.
_SHORT_BY_S = 0.5
# FFmpeg takes any text for images made of letters.
_NO_VIDEO_FORMATS = frozenset({"tty", "txd", "subviewer1", "srt"})


# --- Decoding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One frame of a video."""

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
    """Width of a pixel by its height, before the frame is turned."""


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
            reason = getattr(error, "strerror", None) or str(error)
            if self.source.live:
                raise DataError(
                    f"cannot open the camera {self.source.name} ({self.source.url}): {reason}",
                    hint="check that it is connected, that no other program uses it, and that you may use it",
                ) from error
            raise DataError(
                f"cannot read the video {self.source.name}: {reason}",
                hint="give a video that FFmpeg can read; a file that was cut off while recording may lack its index",
                path=self.source.path,
            ) from error
        streams = self._container.streams.video
        if not streams or self._container.format.name in _NO_VIDEO_FORMATS:
            self._container.close()
            raise DataError(
                f"{self.source.name} is not a video: it contains no frames",
                hint="give a video such as an .mp4, .mov, .mkv or .webm file",
                path=self.source.path,
            )
        self._stream = streams[0]
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

    @property
    def rate(self) -> Fraction:
        """Frames a second that it gives, on average."""
        return self.info.rate / self._every

    def close(self) -> None:
        """Close the file or the camera.

        One whose driver hangs in another thread stays open until it returns: closed under it, FFmpeg would crash.
        """
        if self._decoding.acquire(timeout=CAMERA_TIMEOUT_S):
            try:
                self._container.close()
            finally:
                self._decoding.release()
        else:
            logger.warning("%s does not respond, and is left open", self.source.name)

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

    def _read_info(self) -> VideoInfo:
        stream, container = self._stream, self._container
        time_base = Fraction(stream.time_base or Fraction(1, 1000))
        seconds = float(stream.duration * time_base) if stream.duration else _tagged_seconds(stream)
        if seconds is None and container.duration and len(container.streams) == 1:
            seconds = container.duration / 1e6
        return VideoInfo(
            rate=Fraction(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE),
            time_base=time_base,
            seconds=None if self.source.live else seconds,
            frames=stream.frames or None,
            pixel_aspect=Fraction(stream.sample_aspect_ratio or 1) or Fraction(1),
        )


def _tagged_seconds(stream: Any) -> float | None:
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


# --- Running ahead of the network --------------------------------------------------------------------------------------


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
    waiting: deque[Item] = deque()
    changed = threading.Condition()
    ended = stopped = False
    error: BaseException | None = None

    def run() -> None:
        nonlocal ended, error
        try:
            for item in items:
                with changed:
                    if newest and len(waiting) >= size:
                        waiting.popleft()
                    changed.wait_for(lambda: stopped or len(waiting) < size)
                    if stopped:
                        return
                    waiting.append(item)
                    changed.notify_all()
        except BaseException as caught:  # noqa: BLE001 raised again where the items are consumed
            error = caught
        finally:
            with changed:
                ended = True
                changed.notify_all()

    # A daemon: a camera may block in its driver.
    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                item = waiting.popleft()
                changed.notify_all()
            yield item
        if error is not None:
            raise error
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join(5 * CAMERA_TIMEOUT_S)


# --- Encoding ----------------------------------------------------------------------------------------------------------

# The first that this FFmpeg has. H.264 plays everywhere; MPEG-4 part 2 is in every build.
_ENCODERS = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "libopenh264": {"b": "6M"},
    "mpeg4": {"qscale": "4"},
}
# MPEG-4 part 2 counts time in at most 65,535 steps a second.
_FINEST = Fraction(1, 60_000)
# Sound that an .mp4 file may hold as it is.
_SOUNDS = frozenset({"aac", "ac3", "alac", "eac3", "mp2", "mp3", "opus"})
_BT709 = 1
_LIMITED_RANGE = 1


class VideoWriter:
    """Writes an ``.mp4``; the file appears under its name when it is finished.

    Args:
        target: The file.
        info: The original's rate, time base and shape of pixels.
        sound_from: File whose sound is copied as it is; None: none.
    """

    def __init__(self, target: Path, info: VideoInfo, *, sound_from: Path | None = None) -> None:
        self._av = pyav()
        self._target = target
        self._info = info
        self._sound_from = sound_from
        self._stack = contextlib.ExitStack()
        self._temporary = target
        self._container: Any = None
        self._stream: Any = None
        self._sound: Sound | None = None
        self._end = 0.0

    def write(self, pts: int, pixels_HW3: Pixels) -> None:
        """Encode a frame.

        Args:
            pts: Its time in the original's time base, later than the last one's.
            pixels_HW3: uint8 RGB; frames of another size than the first are scaled to it.

        Raises:
            RuntimeEnvironmentError: It cannot be written.
        """
        with self._translated():
            if self._container is None:
                self._open(pixels_HW3.shape[0], pixels_HW3.shape[1])
            stream = self._stream
            frame = self._av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels_HW3), format="rgb24"
            )
            frame = frame.reformat(
                width=stream.width,
                height=stream.height,
                format="yuv420p",
                dst_colorspace=self._av.video.reformatter.Colorspace.ITU709,
            )
            frame.pts = round(pts * self._info.time_base / stream.codec_context.time_base)
            frame.time_base = stream.codec_context.time_base
            self._end = float(pts * self._info.time_base + 1 / self._info.rate)
            self._mux(stream.encode(frame))

    def finish(self) -> Path | None:
        """Write what is still in the encoder, and give the file its name; None where there were no frames.

        Raises:
            RuntimeEnvironmentError: It cannot be written; nothing is left.
        """
        if self._container is None:
            return None
        try:
            with self._translated():
                self._mux(self._stream.encode(None))
                if self._sound is not None:
                    self._sound.copy_until(self._end)
                self._container.close()
            self._stack.close()
        finally:
            self.abandon()
        return self._target

    def abandon(self) -> None:
        """Close, and remove what is not finished."""
        if self._sound is not None:
            self._sound.close()
        if self._container is not None:
            with contextlib.suppress(self._av.FFmpegError):
                self._container.close()
        discard(self._temporary)
        self._stack.close()

    def _open(self, height: int, width: int) -> None:
        self._temporary = self._stack.enter_context(staged(self._target))
        self._container = self._av.open(
            str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"}
        )
        codecs = self._av.codec
        for name in _ENCODERS:
            with contextlib.suppress(codecs.codec.UnknownCodecError):
                codecs.Codec(name, "w")
                break
        stream = self._container.add_stream(
            name, rate=self._info.rate, options=dict(_ENCODERS[name])
        )
        # 4:2:0 halves the colours' resolution, so sides must be even: the frame is stretched by a pixel.
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.time_base = self._info.time_base
        codec = stream.codec_context
        codec.time_base = (
            max(self._info.time_base, _FINEST) if name == "mpeg4" else self._info.time_base
        )
        codec.sample_aspect_ratio = self._info.pixel_aspect
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        self._stream = stream
        if self._sound_from is not None:
            self._sound = Sound.of(self._av, self._sound_from, self._container)

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if self._sound is not None and packet.dts is not None:
                self._sound.copy_until(float(packet.dts * packet.time_base))
            self._container.mux(packet)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn FFmpeg's errors into ours."""
        try:
            yield
        except self._av.FFmpegError as error:
            number, reason = error.errno, error.strerror or str(error)
            raise unwritable(self._target, number, reason) from error


class Sound:
    """Copies the packets of a file's first sound track, as far as the frames have come."""

    def __init__(self, av: Any, path: Path, source: Any, target: Any) -> None:
        stream = source.streams.audio[0]
        self._path = path
        self._source = source
        self._target = target
        self._track = target.add_stream_from_template(stream)
        self._packets: Iterator[Any] = source.demux(stream)
        self._damage = av.FFmpegError
        self._next: Any = self._read()

    @classmethod
    def of(cls, av: Any, path: Path, target: Any) -> Sound | None:
        """Open the sound of a file; None where it has none, or of a kind that an .mp4 does not hold."""
        source = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
        tracks = source.streams.audio
        if tracks and tracks[0].codec_context.name in _SOUNDS:
            return cls(av, path, source, target)
        if tracks:
            logger.warning(
                "the sound of %s (%s) is left out: an .mp4 file cannot hold it as it is",
                path,
                tracks[0].codec_context.name,
            )
        source.close()
        return None

    def copy_until(self, seconds: float) -> None:
        """Copy the packets that begin before a time."""
        while self._next is not None:
            packet = self._next
            if packet.dts is not None:
                if float(packet.dts * packet.time_base) >= seconds:
                    return
                packet.stream = self._track
                self._target.mux(packet)
            self._next = self._read()

    def _read(self) -> Any:
        """Return the next packet; None at the end, and where the file breaks."""
        try:
            return next(self._packets, None)
        except self._damage as error:
            logger.warning(
                "the sound of %s is left out from a damaged place on: %s", self._path, error
            )
            return None

    def close(self) -> None:
        """Close the file that is copied from."""
        self._source.close()
