"""Encodes drawn frames as a video, with the times of the original and its sound.

Dimensions: H and W pixels of a frame.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from proxydet.files import discard, staged, unwritable
from proxydet.video.reading import VideoInfo, pyav

Pixels = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

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
        self._sound: _Sound | None = None
        self._end = 0.0

    def write(self, pts: int, pixels_HW3: Pixels) -> None:
        """Encode a frame.

        Args:
            pts: Its time in the original's time base, later than the last one's.
            pixels_HW3: uint8 RGB; frames of another size than the first are scaled to it.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        with self._told():
            self._write(pts, pixels_HW3)

    def _write(self, pts: int, pixels_HW3: Pixels) -> None:
        if self._container is None:
            self._open(pixels_HW3.shape[0], pixels_HW3.shape[1])
        stream = self._stream
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), format="rgb24")
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
            EnvironmentProblem: It cannot be written; nothing is left.
        """
        if self._container is None:
            return None
        try:
            with self._told():
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
        name = next(name for name in _ENCODERS if self._has(name))
        stream = self._container.add_stream(
            name, rate=self._info.rate, options=dict(_ENCODERS[name])
        )
        # 4:2:0 halves the colours' resolution, so sides must be even: the picture is stretched by a pixel.
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
            self._sound = _Sound.of(self._av, self._sound_from, self._container)

    def _has(self, encoder: str) -> bool:
        try:
            self._av.codec.Codec(encoder, "w")
        except self._av.codec.codec.UnknownCodecError:
            return False
        return True

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if self._sound is not None and packet.dts is not None:
                self._sound.copy_until(float(packet.dts * packet.time_base))
            self._container.mux(packet)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn FFmpeg's errors into ours."""
        try:
            yield
        except self._av.FFmpegError as error:
            number, reason = error.errno, error.strerror or str(error)
            raise unwritable(self._target, number, reason) from error


class _Sound:
    """Copies the packets of a file's first sound track, as far as the pictures have come."""

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
    def of(cls, av: Any, path: Path, target: Any) -> _Sound | None:
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
