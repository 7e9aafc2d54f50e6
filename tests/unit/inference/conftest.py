"""Small videos, and a detector that finds what is drawn in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from shape_detector import random_network

from proxydet.detector import Detector
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary

Make = Callable[..., Path]

RATE = 10
SIZE = (64, 96)


def frame_pixels(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A red bar on grey that moves 3 pixels a frame; its upper half is blue."""
    pixels = np.full((*size, 3), 90, np.uint8)
    left = 3 * index % (size[1] - 16)
    pixels[:, left : left + 16] = (200, 40, 40)
    pixels[: size[0] // 2, left : left + 16] = (40, 40, 200)
    return pixels


@pytest.fixture
def bar_pixels() -> Callable[[int], np.ndarray]:
    """The frame of a number as it was before encoding."""
    return frame_pixels


@pytest.fixture
def make(tmp_path) -> Make:
    """Make a video: name, number of frames, and what is special about it."""

    def made(
        name: str = "clip.mp4",
        frames: int = 24,
        *,
        size: tuple[int, int] = SIZE,
        times: Sequence[int] | None = None,
        sound: bool = False,
        codec: str = "libx264",
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=RATE, options=options or {"g": "5"})
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
            track = container.add_stream("aac", rate=44100) if sound else None
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(frame_pixels(index, size), format="rgb24")
                frame.pts = times[index] if times else 100 * index
                frame.time_base = Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if track is not None:
                wave = np.sin(np.arange(44100 * frames // RATE) / 20).astype(np.float32)[None]
                tone = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                tone.sample_rate, tone.pts = 44100, 0
                container.mux(track.encode(tone))
                container.mux(track.encode(None))
        return path

    return made


class Tampered:
    """A container of PyAV's, some of its methods replaced."""

    def __init__(self, container: object, methods: dict[str, object]) -> None:
        self._container = container
        self.__dict__ |= methods

    def __getattr__(self, name: str) -> object:
        return getattr(self._container, name)


@pytest.fixture
def tamper(monkeypatch) -> Callable[..., None]:
    """Replace methods of the containers that are opened from now on: those for reading ("r") or for writing ("w")."""
    original = av.open

    def replace(which: str, **methods: object) -> None:
        def opened(file: str, mode: str = "r", **options: object) -> object:
            container = original(file, mode, **options)
            return Tampered(container, methods) if mode == which else container

        monkeypatch.setattr(av, "open", opened)

    return replace


class BarDetector(Detector):
    """Finds the red lower half of the bar; remembers the batches that it was given."""

    vocabulary = Vocabulary.from_arrays(["bar", "nothing"], np.eye(2, 4))
    inference = InferenceConfig()

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict_images(
        self,
        images: Sequence[np.ndarray],
        vocabulary: Vocabulary | None = None,
        settings: InferenceConfig | None = None,
    ) -> list[Prediction]:
        self.batches.append(len(images))
        return [self._detect(pixels) for pixels in images]

    def _detect(self, pixels: np.ndarray) -> Prediction:
        height, width = pixels.shape[:2]
        rows, columns = np.nonzero((pixels[:, :, 0] > 150) & (pixels[:, :, 1] < 90))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
        count = 1 if len(rows) else 0
        return Prediction(
            boxes_N4=torch.tensor(box, dtype=torch.float32).reshape(-1, 4),
            scores_N=torch.full((count,), 0.75),
            classes_N=torch.zeros(count, dtype=torch.int64),
            mask_probs_MSS=torch.ones(count, 28, 28),
            mask_index_N=torch.zeros(count, dtype=torch.int64),
            image_size=(height, width),
        )


@pytest.fixture
def bars() -> BarDetector:
    return BarDetector()


@pytest.fixture(scope="session")
def detector_of_shapes() -> Detector:
    """A small random network of four classes."""
    names, rng = ["circle", "square", "star", "ring"], np.random.default_rng(0)
    vocabulary = Vocabulary.from_arrays(names, rng.normal(size=(4, 64)))
    return Detector(random_network(vocabulary), shortest=64, longest=100)
