"""Compares looking at a folder and at a video with the sum of their parts.

::

    python benchmarks/predict_throughput.py --run RUN --pictures FOLDER [--frames 60] [--size 720] [--rounds 3]

The parts are measured one after the other: reading (or decoding) everything, the network on everything, drawing, saving (or
encoding). The whole is `proxydet.inference.jobs.predict_files` and `proxydet.inference.jobs.predict_video`, where they
overlap. The video is made of the folder's pictures, each moved a little from frame to frame. Medians of the rounds, seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from proxydet.data.images import read_image
from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.inference.jobs import ImageResult, predict_files, predict_video
from proxydet.inference.sources import find_images, name_videos
from proxydet.inference.video import VideoReader, VideoWriter
from proxydet.inference.writers import make_writers
from proxydet.visualization.drawing import DrawingStyle, letters_for

Times = dict[str, list[float]]
RATE = 25


def make_video(pictures: list[np.ndarray], target: Path, frames: int, side: int) -> None:
    """Write a video of ``frames`` frames, each picture for a second, drifting."""
    width, height = side * 4 // 3 // 2 * 2, side
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = Image.fromarray(pictures[index // RATE % len(pictures)])
            scaled = np.asarray(picture.resize((width + RATE, height)))
            shift = index % RATE
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(scaled[:, shift : shift + width]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def timed(times: Times, name: str, work: Callable[[], object]) -> object:
    """Run and note the seconds."""
    start = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - start)
    return result


class Subject:
    """A detector, and how it is asked."""

    def __init__(self, detector: Detector, batch: int) -> None:
        self.detector = detector
        self.batch = batch
        self.settings = detector.settings(score_threshold=0.3, max_detections=100)

    def predict(self, pixels: list[np.ndarray]) -> list[Detections]:
        """Run the network on everything, in batches."""
        found = []
        for start in range(0, len(pixels), self.batch):
            predictions = self.detector.predict_images(
                pixels[start : start + self.batch], settings=self.settings
            )
            found += [Detections(p, self.detector.vocabulary.names) for p in predictions]
        return found

    def folder(self, source: Path, times: Times, place: Path) -> None:
        """Measure a folder: its parts, then the whole."""
        images = find_images([source])
        pixels = timed(times, "folder: read", lambda: [read_image(p.path) for p in images])
        found = timed(times, "folder: network", lambda: self.predict(pixels))
        results = [
            ImageResult(image=image, pixels=array, found=one)
            for image, array, one in zip(images, pixels, found, strict=True)
        ]
        writers = make_writers(["images"], place / "parts", self.detector.vocabulary.names)
        timed(
            times,
            "folder: draw and save",
            lambda: [writers[0].add(each, writers[0].prepare(each)) for each in results],
        )
        timed(
            times,
            "folder: whole",
            lambda: predict_files(
                self.detector,
                images,
                vocabulary=self.detector.vocabulary,
                settings=self.settings,
                batch_size=self.batch,
                writers=make_writers(["images"], place / "whole", self.detector.vocabulary.names),
            ),
        )

    def video(self, source: Path, times: Times, place: Path) -> None:
        """Measure a video: its parts, then the whole."""
        reader = VideoReader(source)
        with reader:
            frames = timed(times, "video: decode", lambda: list(reader))
        found = timed(times, "video: network", lambda: self.predict([f.pixels for f in frames]))
        style = DrawingStyle(
            font_size=letters_for(frames[0].pixels.shape[1::-1]), shortest_edge=0, class_order={}
        )
        drawn = timed(
            times,
            "video: draw",
            lambda: [
                np.asarray(one.draw(frame.pixels, style))
                for frame, one in zip(frames, found, strict=True)
            ],
        )

        def encode() -> None:
            writer = VideoWriter(place / "parts.mp4", reader.info)
            for frame, image in zip(frames, drawn, strict=True):
                writer.write(frame.pts, image)
            writer.finish()

        timed(times, "video: encode", encode)
        (video,) = name_videos([source])
        timed(
            times,
            "video: whole",
            lambda: predict_video(
                self.detector,
                video,
                vocabulary=self.detector.vocabulary,
                settings=self.settings,
                output=place / "whole",
                kinds=["images"],
                batch_size=self.batch,
            ),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--size", type=int, default=720)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = Subject(Detector.from_run(arguments.run, device="cpu"), arguments.batch)
    pictures = find_images([arguments.pictures])
    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        make_video([read_image(p.path) for p in pictures], clip, arguments.frames, arguments.size)
        for number in range(arguments.rounds):
            place = Path(folder) / str(number)
            place.mkdir()
            subject.folder(arguments.pictures, times, place)
            subject.video(clip, times, place)
    print(f"{len(pictures)} pictures; {arguments.frames} frames of height {arguments.size}")
    for kind, count in (("folder", len(pictures)), ("video", arguments.frames)):
        mine = {n: statistics.median(v) for n, v in times.items() if n.startswith(kind)}
        whole = mine[f"{kind}: whole"]
        parts = sum(mine.values()) - whole
        for name, seconds in mine.items():
            print(f"{name:24} {seconds:8.3f}")
        print(f"{kind}: whole / sum of the parts {whole / parts:.2f}, {count / whole:.2f} a second")


if __name__ == "__main__":
    main()
