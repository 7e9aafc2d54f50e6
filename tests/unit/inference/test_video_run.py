"""Jobs over videos: what is saved, in which order things happen, and what is kept when something breaks."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from proxydet.detections import Detections, FrameResult
from proxydet.errors import ConfigError, DataError, DiskFullError, JobInterruptedError
from proxydet.inference.jobs import VideoSummary, predict_video
from proxydet.inference.sources import VideoSource, name_videos
from proxydet.inference.video import VideoReader, VideoWriter, read_ahead
from proxydet.inference.writers import VIDEO_KINDS, CsvTable, DrawnVideo
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.visualization.drawing import COLOURS, class_colour


def run(bars, source, output: Path, **changes) -> VideoSummary:
    (video,) = name_videos([source])
    options = {"kinds": tuple(VIDEO_KINDS), **changes}
    return predict_video(
        bars,
        video,
        vocabulary=bars.vocabulary,
        settings=InferenceConfig(),
        output=output,
        **options,
    )


def decoded(path: Path) -> list:
    with VideoReader(path) as reader:
        return list(reader)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


def test_everything_is_saved_and_says_the_same(bars, make, output):
    results = []
    summary = run(bars, make(), output, on_result=lambda name, result: results.append(result))
    assert (summary.frames, summary.detections, summary.broken) == (24, 24, None)
    assert summary.saved == tuple(output / f"clip.{kind}" for kind in ("mp4", "jsonl", "csv"))
    lines = [json.loads(line) for line in (output / "clip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(24))
    assert [line["seconds"] for line in lines] == [i / 10 for i in range(24)]
    with (output / "clip.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for result, line, row in zip(results, lines, rows, strict=True):
        (entry,) = line["detections"]
        assert entry["box_xyxy"] == result.found.boxes_xyxy[0].tolist()
        assert (int(row["frame"]), row["label"], float(row["score"])) == (
            line["frame"],
            "bar",
            0.75,
        )
        assert int(row["mask_area"]) == result.found.masks[0].sum()
    assert not list(output.glob(".*"))


def test_the_annotated_video_keeps_times_and_shows_what_was_found(bars, make, output):
    times = [0, 40, 90, 400, 1000, 1020, 1500, 2100]
    path = make(frames=8, times=times)
    run(bars, path, output, kinds=["images"])
    drawn = decoded(output / "clip.mp4")
    assert [frame.seconds for frame in drawn] == pytest.approx([t / 1000 for t in times], abs=2e-3)
    with av.open(str(output / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    before = decoded(path)
    colour = np.array(class_colour(0))
    for old, new in zip(before, drawn, strict=True):
        assert new.pixels.shape == old.pixels.shape
        # The left edge of the box, below the label: the class's colour in every frame.
        left = 3 * old.index % 80
        edge = new.pixels[44:60, left : left + 2].reshape(-1, 3).astype(int).mean(axis=0)
        # Encoding mixes it with the dark line next to it, which keeps its hue.
        assert np.abs(edge / edge.max() - colour / colour.max()).max() < 0.1
        assert edge.max() > 0.5 * colour.max()
        far = np.s_[50:, (left + 45) % 96 : (left + 45) % 96 + 4]
        assert np.abs(new.pixels[far].astype(int) - old.pixels[far]).mean() < 6


def test_the_first_classes_of_a_video_have_different_colours_whatever_their_places(
    bars, make, output
):
    path = make(frames=2)
    with VideoReader(path) as reader:
        frames = list(reader)
        writer = DrawnVideo(output / "clip.mp4", reader.info, None)
    names, size = [str(index) for index in range(2 * len(COLOURS))], frames[0].pixels.shape[:2]

    def edges(frame, classes: list[int]) -> list[tuple[int, ...]]:
        found = Prediction(
            boxes_N4=torch.tensor([[10.0, 4, 40, 60], [50.0, 4, 80, 60]])[: len(classes)],
            scores_N=torch.ones(len(classes)),
            classes_N=torch.tensor(classes),
            mask_probs_MSS=None,
            mask_index_N=torch.full((len(classes),), -1),
            image_size=size,
        )
        drawn = writer.prepare(FrameResult(frame=frame, found=Detections(found, names)))
        return [tuple(drawn[50, left]) for left in (10, 50)[: len(classes)]]

    assert edges(frames[0], [18, 0]) == list(COLOURS[:2])
    assert edges(frames[1], [0]) == [COLOURS[1]]


@pytest.mark.parametrize("size", [(63, 95), (33, 64)])
def test_odd_sizes_are_encoded(make, output, size):
    # Only 4:2:0 asks for even sides; a source without it may be odd.
    path = make("clip.avi", 3, size=(size[0] + size[0] % 2, size[1] + size[1] % 2))
    with VideoReader(path) as reader:
        frames = list(reader)
        output.mkdir()
        writer = VideoWriter(output / "odd.mp4", reader.info)
        for frame in frames:
            writer.write(frame.pts, frame.pixels[: size[0], : size[1]])
        made = writer.finish()
    assert made is not None
    first = decoded(made)[0].pixels
    assert first.shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)


def test_sound_is_copied_as_it_is(bars, make, output):
    path = make(sound=True)
    run(bars, path, output, kinds=["images"])

    def packets(file: Path) -> list[bytes]:
        with av.open(str(file)) as container:
            return [bytes(p) for p in container.demux(audio=0) if p.size]

    assert len(packets(path)) > 50
    assert packets(output / "clip.mp4") == packets(path)


def test_without_every_frame_there_is_no_sound(bars, make, output):
    summary = run(bars, make(sound=True), output, kinds=["images", "csv"], every=5)
    assert summary.frames == 5
    with av.open(str(output / "clip.mp4")) as container:
        assert not container.streams.audio
    assert [frame.seconds for frame in decoded(output / "clip.mp4")] == pytest.approx(
        [0, 0.5, 1.0, 1.5, 2.0], abs=2e-3
    )


def test_what_came_before_a_break_is_kept(bars, make, output):
    path = make("clip.mkv", frames=60, sound=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    summary = run(bars, path, output)
    assert summary.broken is not None
    assert "cut off" in summary.broken
    assert 5 < summary.frames < 60
    assert len((output / "clip.jsonl").read_text().splitlines()) == summary.frames
    assert len(decoded(output / "clip.mp4")) == summary.frames


def test_a_video_that_breaks_before_its_first_frame_is_an_error(bars, make, output):
    path = make("clip.mkv", frames=60)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"clip\.mkv"):
        run(bars, path, output)
    assert not [p for p in output.rglob("*") if p.is_file()]


def test_ctrl_c_completes_the_files(bars, make, output):
    seen = itertools.count(1)

    def stop(*_: object) -> None:
        if next(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(JobInterruptedError, match="stopped after 9 frames") as caught:
        run(bars, make(frames=60), output, on_result=stop)
    assert caught.value.exit_code == 130
    lines = (output / "clip.jsonl").read_text().splitlines()
    assert 8 <= len(lines) <= 9
    assert len(decoded(output / "clip.mp4")) == len(lines)
    assert not list(output.glob(".*"))


def test_an_error_in_saving_leaves_no_half_files(bars, make, output, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(CsvTable, "add", full)
    with pytest.raises(OSError, match="no space"):
        run(bars, make(), output)
    assert not list(output.glob("*"))


def test_a_video_that_cannot_be_written_is_an_error_and_no_broken_video(bars, make, output, tamper):
    short, long = make("short.mp4", 3), make("long.mp4", 24)  # reported at the end, and on the way

    def full(*_: object) -> None:
        raise av.error.OSError(28, "No space left on device", "clip.mp4")

    tamper("w", mux=full)
    for path in (short, long):
        with pytest.raises(
            DiskFullError, match=rf"no room .*/{path.stem}\.mp4 \(No space"
        ) as caught:
            run(bars, path, output)
        assert "free some space" in str(caught.value.hint)
        assert not list(output.glob("*"))


def test_sound_that_is_damaged_is_left_out_with_a_warning(bars, make, output, tamper, caplog):
    def damaged(_stream):
        raise av.error.InvalidDataError(1, "Invalid data")
        yield

    path = make(sound=True)
    tamper("r", demux=damaged)
    summary = run(bars, path, output, kinds=["images"])
    assert summary.broken is None
    assert "sound of" in caplog.text


def test_threads_end_and_files_close_where_the_detector_fails(bars, make, output):
    before = threading.active_count()
    path = make(frames=60)
    opened = len(list(Path("/proc/self/fd").iterdir()))

    def fail(*_: object) -> None:
        raise RuntimeError("lost")

    bars.predict_images = fail
    with pytest.raises(RuntimeError, match="lost"):
        run(bars, path, output)
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    assert not list(output.glob("*"))


def test_a_consumer_that_stops_early_leaves_no_thread_and_no_open_video(detector_of_shapes, make):
    before = threading.active_count()
    path = make(frames=60)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    results = detector_of_shapes.predict_video(path, batch_size=2)
    assert next(results).index == 0
    results.close()
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_wrong_batch_size_is_reported_at_once(detector_of_shapes, make):
    with pytest.raises(ConfigError, match="batch_size is 0"):
        detector_of_shapes.predict_video(make(frames=1), batch_size=0)


def test_a_camera_that_hangs_is_not_closed_under_its_thread(make, tamper, monkeypatch, caplog):
    monkeypatch.setattr("proxydet.inference.video.CAMERA_TIMEOUT_S", 0.05)
    path = make(frames=1)
    hanging, release, closed = threading.Event(), threading.Event(), []

    def decode(_stream):
        hanging.set()
        release.wait(20)
        yield from ()

    def take() -> None:
        with contextlib.suppress(DataError):
            list(reader)

    tamper("r", decode=decode, close=lambda: closed.append(True))
    reader = VideoReader(path)
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert hanging.wait(5)
    reader.close()
    assert closed == []
    assert "does not respond" in caplog.text
    release.set()
    thread.join(5)
    reader.close()
    assert closed == [True]


def test_the_video_that_is_read_is_never_replaced(bars, make, tmp_path):
    path = make()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="replace"):
        run(bars, path, tmp_path)
    assert path.read_bytes() == before


def test_a_camera_ends_with_ctrl_c_and_drops_what_comes_too_fast(bars, output, monkeypatch):
    camera = VideoSource(name="webcam:0", url="testsrc=size=64x48:rate=500", format="lavfi")
    assert camera.live
    seen, given, changed = itertools.count(1), [0], threading.Condition()
    original = VideoReader.__iter__

    def frames(self):
        for frame in original(self):
            yield frame
            # Comes here when the frame was taken in, whether or not another had to go for it.
            with changed:
                given[0] = frame.index + 1
                changed.notify_all()

    def slow(_name, result) -> None:
        with changed:
            assert changed.wait_for(lambda: given[0] > result.index + 3, 30)
        if next(seen) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoReader, "__iter__", frames)

    summary = run(bars, camera, output, on_result=slow)
    assert summary.frames == 12
    assert set(bars.batches) == {1}
    lines = [json.loads(line) for line in (output / "webcam_0.jsonl").read_text().splitlines()]
    indices = [line["frame"] for line in lines]
    assert all(later - earlier > 2 for earlier, later in itertools.pairwise(indices))
    assert len(decoded(output / "webcam_0.mp4")) == len(lines)


def test_videos_of_one_name_get_files_of_their_own(make, tmp_path):
    first = make(frames=1)
    (tmp_path / "other").mkdir()
    second = Path(tmp_path / "other" / "clip.mp4")
    second.write_bytes(first.read_bytes())
    assert [str(v.name) for v in name_videos([first, second, first])] == ["clip", "clip_2"]


def test_batches_are_filled_and_the_rest_is_run_too(bars, make):
    results = bars.predict_frames(
        VideoReader(make()), bars.vocabulary, InferenceConfig(), batch_size=5
    )
    assert [result.index for result in results] == list(range(24))
    assert bars.batches == [5, 5, 5, 5, 4]


def test_decoding_continues_while_the_network_works():
    produced = []
    given = threading.Event()

    def frames():
        for index in range(10):
            produced.append(index)
            if index == 4:
                given.set()
            yield index

    ahead = read_ahead(frames(), 4)
    assert next(ahead) == 0
    assert given.wait(5), "the thread did not run ahead"
    time.sleep(0.05)
    assert len(produced) <= 6  # one taken, four waiting, one in hand
    assert list(ahead) == list(range(1, 10))


def test_an_error_comes_after_the_items_before_it():
    def broken():
        yield from range(3)
        raise DataError("broken")

    ahead = read_ahead(broken(), 8)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="broken"):
        next(ahead)


def test_the_newest_items_win_where_asked():
    taken, enough = threading.Event(), threading.Event()

    def fast():
        yield 0
        taken.wait(5)
        yield from range(1, 50)
        enough.set()
        yield 50

    ahead = read_ahead(fast(), 1, newest=True)
    assert next(ahead) == 0
    taken.set()
    assert enough.wait(5)
    time.sleep(0.1)
    assert list(ahead) == [50]


def test_drawing_and_encoding_run_next_to_the_network(bars, make, output, monkeypatch):
    threads = set()
    original = DrawnVideo.add

    def watch(self, result, prepared):
        threads.add(threading.current_thread().name)
        original(self, result, prepared)

    monkeypatch.setattr(DrawnVideo, "add", watch)
    run(bars, make(), output, kinds=["images"])
    assert threads == {"write_0"}


def test_frames_are_predicted_as_images_are(detector_of_shapes, make):
    path = make(frames=6)
    with VideoReader(path) as reader:
        images = [frame.pixels for frame in reader]
    results = list(
        detector_of_shapes.predict_video(path, score_threshold=0.02, max_detections=5, batch_size=4)
    )
    assert [result.index for result in results] == list(range(6))
    for result, image in zip(results, images, strict=True):
        alone = detector_of_shapes.predict(image, score_threshold=0.02, max_detections=5)
        assert alone.labels == result.found.labels
        np.testing.assert_allclose(alone.scores, result.found.scores, atol=1e-5)
    with pytest.raises(DataError, match="no video file"):
        detector_of_shapes.predict_video("absent.mp4")
