"""Decoding: every frame with its time, upright; what is not a video, or breaks, is named."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from proxydet.errors import ConfigError, DataError
from proxydet.inference.sources import VideoSource, is_video, open_source, split_sources
from proxydet.inference.video import Frame, VideoReader


def read(path: object, **options: int) -> list[Frame]:
    with VideoReader(path, **options) as reader:
        return list(reader)


def until_error(path: Path) -> tuple[list[Frame], DataError]:
    """The frames before a video breaks, and how it breaks."""
    frames: list[Frame] = []
    with VideoReader(path) as reader:
        try:
            frames.extend(iter(reader))
        except DataError as error:
            return frames, error
    pytest.fail("the video did not break")


def test_frames_come_with_their_number_time_and_pixels(make, bar_pixels):
    frames = read(make())
    assert [frame.index for frame in frames] == list(range(24))
    assert [frame.seconds for frame in frames] == pytest.approx([i / 10 for i in range(24)])
    for frame in frames:
        difference = np.abs(frame.pixels.astype(int) - bar_pixels(frame.index))
        assert difference.mean() < 6


def test_variable_frame_rates_keep_their_times(make):
    times = [0, 40, 50, 400, 1000, 1001, 1500]
    frames = read(make(frames=7, times=times))
    assert [frame.seconds for frame in frames] == pytest.approx([t / 1000 for t in times], abs=2e-3)


def test_each_nth_frame(make):
    path = make()
    assert [frame.index for frame in read(path, every=7)] == [0, 7, 14, 21]
    with pytest.raises(ConfigError, match="every"):
        read(path, every=0)


@pytest.mark.parametrize(
    ("turn", "matrix"),
    [
        (90, (0, 1, -1, 0)),
        (180, (-1, 0, 0, -1)),
        (270, (0, -1, 1, 0)),
    ],
)
def test_turned_videos_are_shown_upright(make, turn, matrix):
    path = make(frames=3)
    plain = read(path)[0].pixels
    data = bytearray(path.read_bytes())
    # The display matrix of the track's header: 16.16 fixed point, which players turn clockwise by.
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned = read(path)[0].pixels
    np.testing.assert_array_equal(turned, np.rot90(plain, -turn // 90))


def test_a_cut_off_file_gives_what_is_there_and_says_where(make):
    path = make("clip.mkv", frames=60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames, error = until_error(path)
    assert re.search(r"ends at [\d.]+ s, after \d+ frames", error.message)
    assert 5 < len(frames) < 60
    assert f"after {len(frames)} frames" in error.message


def test_an_mp4_cut_off_behind_its_index(make):
    path = make(frames=60, container_options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])
    frames, error = until_error(path)
    assert re.search(r"after \d+ frames", error.message)
    assert 5 < len(frames) < 60


@pytest.mark.parametrize("name", ["clip.mp4", "notes.txt"])
@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 100, bytes(range(256)) * 64])
def test_files_that_are_not_videos_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)) as caught:
        read(path)
    assert caught.value.hint
    assert caught.value.path == path


def test_sound_alone_is_not_a_video(tmp_path):
    import av

    path = tmp_path / "tone.mp4"
    with av.open(str(path), "w") as container:
        track = container.add_stream("aac", rate=44100)
        tone = av.AudioFrame.from_ndarray(
            np.zeros((1, 44100), np.float32), format="fltp", layout="mono"
        )
        tone.sample_rate, tone.pts = 44100, 0
        container.mux(track.encode(tone))
        container.mux(track.encode(None))
    with pytest.raises(DataError, match=r"tone\.mp4"):
        read(path)


def test_a_video_of_no_frames(make, tamper):
    path = make("empty.avi", frames=1)
    tamper("r", decode=lambda _stream: iter([]))
    with pytest.raises(DataError, match="has no frames"):
        read(path)


def test_a_playlist_does_not_reach_for_addresses(tmp_path):
    path = tmp_path / "list.mp4"
    path.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(DataError):
        read(path)


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("a.mp4", True),
        ("a.MOV", True),
        ("webcam", True),
        ("webcam:1", True),
        ("a.gif", False),
        ("webcam.png", False),
        ("webcamera", False),
    ],
)
def test_what_counts_as_a_video(name, video):
    assert is_video(name) == video


def test_sources_are_split_and_patterns_expanded(make, tmp_path):
    make("b.mp4", 1)
    make("a.mp4", 1)
    (tmp_path / "a.png").write_bytes(b"")
    images, videos = split_sources([f"{tmp_path}/*", "webcam:2", str(tmp_path), "none/*.jpg"])
    assert [Path(name).name for name in videos] == ["a.mp4", "b.mp4", "webcam:2"]
    assert images == [f"{tmp_path}/a.png", str(tmp_path), "none/*.jpg"]


def test_a_file_called_webcam_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("webcam").write_bytes(b"")
    assert not is_video("webcam")
    assert not open_source("webcam").live


@pytest.mark.parametrize(
    ("system", "url", "device"),
    [("Linux", "/dev/video1", "v4l2"), ("Darwin", "1:none", "avfoundation")],
)
def test_cameras_are_opened_as_the_system_names_them(monkeypatch, system, url, device):
    monkeypatch.setattr("platform.system", lambda: system)
    source = open_source("webcam:1")
    assert (source.url, source.format, source.live) == (url, device, True)


def test_a_camera_that_is_not_there_is_named():
    source = VideoSource(name="webcam:9", url="/dev/no-video9", format="v4l2")
    with pytest.raises(DataError, match="camera webcam:9"):
        VideoReader(source)
