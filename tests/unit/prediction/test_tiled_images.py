"""Large images in tiles: small objects are found, each once, and smaller images are as without."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from proxydet.data.masks import outlines
from proxydet.detector import Detector
from proxydet.errors import ConfigError
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary


class RedThings:
    """As a network is to a detector: finds red things of at least 8 pixels in what it is given, one class each colour."""

    vocabulary = Vocabulary.from_arrays(["red", "nothing"], np.eye(2, 4))
    has_mask_head = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def eval(self) -> RedThings:
        return self

    def prepared(self, precision: str) -> RedThings:
        return self

    def detect(
        self,
        images: Sequence[torch.Tensor],
        classes: Vocabulary | None,
        *,
        original_sizes: Sequence[tuple[int, int]],
        settings: InferenceConfig,
    ) -> list[Prediction]:
        self.seen.append((len(images), *images[0].shape[1:]))
        return [self._find(*pair) for pair in zip(images, original_sizes, strict=True)]

    def _find(self, image: torch.Tensor, size: tuple[int, int]) -> Prediction:
        scale = np.array([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
        boxes = []
        for outline in outlines(image[0].numpy() > 128):
            points = np.reshape(outline, (-1, 2))
            box = np.concatenate([points.min(axis=0), points.max(axis=0)])
            if min(box[2:] - box[:2]) >= 8:
                boxes.append(box * scale)
        count = len(boxes)
        return Prediction(
            boxes_N4=torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
            scores_N=torch.linspace(0.9, 0.8, count),
            classes_N=torch.zeros(count, dtype=torch.int64),
            mask_probs_MSS=torch.ones(count, 28, 28),
            mask_index_N=torch.arange(count),
            image_size=size,
        )


SMALL = [(i * 97 + 3, j * 89 + 40, i * 97 + 23, j * 89 + 60) for i in range(8) for j in range(4)]
LARGE = (120, 410, 700, 590)


@pytest.fixture
def seen() -> RedThings:
    return RedThings()


@pytest.fixture
def of_red(seen) -> Detector:
    return Detector(seen, shortest=120, longest=160)  # type: ignore[arg-type]


@pytest.fixture
def aerial() -> np.ndarray:
    pixels = np.zeros((600, 800, 3), np.uint8)
    for x0, y0, x1, y1 in [*SMALL, LARGE]:
        pixels[y0:y1, x0:x1, 0] = 255
    return pixels


def near(boxes: np.ndarray, expected: list[tuple[int, ...]]) -> bool:
    distance = np.abs(boxes[:, None] - np.array(expected)).max(axis=2)
    return len(boxes) == len(expected) and bool((distance.min(axis=0) < 5).all())


def test_small_objects_are_found_in_tiles_and_large_ones_in_the_whole_image(of_red, aerial, seen):
    assert near(of_red.predict(aerial).boxes_xyxy, [LARGE])
    found = of_red.predict(aerial, tiles=160)
    assert near(found.boxes_xyxy, [*SMALL, LARGE])
    assert found.image_size == (600, 800)
    # Masks are where their objects are.
    for item in found:
        x0, y0, x1, y1 = (round(value) for value in item.box_xyxy)
        assert item.mask_area == pytest.approx((x1 - x0) * (y1 - y0), rel=0.2)
    # A few tiles at once, each as large for the network as an image.
    assert {size[0] for size in seen.seen[2:]} <= {1, 2, 3, 4}
    assert {size[1:] for size in seen.seen[2:]} == {(120, 120)}


def test_tiles_alone_join_what_they_see_of_a_large_object(of_red, aerial):
    tiled = of_red.with_settings(tiles=160, tile_overlap=0.3, whole_image=False)
    assert near(tiled.predict(aerial).boxes_xyxy, [*SMALL, LARGE])


def test_an_image_that_fits_into_a_tile_is_as_without(detector, pictures):
    for picture in pictures:
        plain = detector.predict(picture, score_threshold=0.02)
        tiled = detector.predict(picture, score_threshold=0.02, tiles=90)
        assert len(plain) > 0
        np.testing.assert_array_equal(tiled.boxes_xyxy, plain.boxes_xyxy)
        np.testing.assert_array_equal(tiled.scores, plain.scores)
        assert tiled.rles == plain.rles


def test_a_batch_of_large_and_small_images_is_as_one_by_one(detector, pictures):
    rng = np.random.default_rng(3)
    large = rng.integers(0, 256, (130, 200, 3), np.uint8)
    together = detector.predict_batch([pictures[0], large], score_threshold=0.02, tiles=96)
    for picture, found in zip([pictures[0], large], together, strict=True):
        alone = detector.predict(picture, score_threshold=0.02, tiles=96)
        np.testing.assert_array_equal(found.boxes_xyxy, alone.boxes_xyxy)
        np.testing.assert_array_equal(found.scores, alone.scores)
    assert together[1].boxes_xyxy[:, 2].max() > 100
    mirrored = detector.with_settings(tiles=96, flip=True).predict(large, score_threshold=0.02)
    assert len(mirrored) > 0


def test_frames_are_run_in_tiles_too(of_red, aerial):
    (prediction,) = of_red.predict_images([aerial], settings=of_red.settings(tiles=160))
    assert len(prediction) == len(SMALL) + 1
    assert of_red.with_settings(tiles=0).settings() == of_red.settings()


class CupsAndVases(RedThings):
    """Sees a whole thing as a vase, and its narrow end as a cup, whatever is reported of them."""

    vocabulary = Vocabulary.from_arrays(["cup", "vase"], np.eye(2, 4))

    def detect(self, images, classes, *, original_sizes, settings):
        found = super().detect(images, classes, original_sizes=original_sizes, settings=settings)
        return [self._named(one, classes or self.vocabulary, settings) for one in found]

    @staticmethod
    def _named(found: Prediction, classes: Vocabulary, settings: InferenceConfig) -> Prediction:
        wide_N = found.boxes_N4[:, 2] - found.boxes_N4[:, 0] > 60
        named = dataclasses.replace(found, classes_N=wide_N.long())
        limits = np.where(np.isnan(classes.threshold), settings.score_threshold, classes.threshold)
        limits[classes.background] = np.inf
        return named.choose(named.scores_N > torch.tensor(limits)[named.classes_N])


@pytest.mark.parametrize("one_label", [True, False])
@pytest.mark.parametrize("hidden", [{"background": [False, True]}, {"threshold": [np.nan, 0.99]}])
def test_what_is_not_reported_still_takes_its_fragments(hidden, one_label):
    # A thing 80 wide, of which the first tile sees 40, the second one all.
    pixels = np.zeros((160, 264, 3), np.uint8)
    pixels[60:100, 120:200, 0] = 255
    pixels[20:40, 20:60, 0] = 255
    detector = Detector(CupsAndVases(), shortest=160, longest=160)  # type: ignore[arg-type]
    classes = CupsAndVases.vocabulary.with_scorers(**hidden)
    asked = detector.with_settings(tile_overlap=0.3, whole_image=False, tiles=160)
    both = asked.predict(pixels, vocabulary=CupsAndVases.vocabulary)
    assert sorted(both.labels) == ["cup", "vase"]
    found = asked.predict(pixels, vocabulary=classes, one_label=one_label)
    assert found.labels == ("cup",)
    assert near(found.boxes_xyxy, [(20, 20, 60, 40)])


@pytest.mark.parametrize(
    "wrong", [{"tiles": 31}, {"tiles": -1}, {"tile_overlap": 0.95}, {"tile_overlap": -0.1}]
)
def test_tiles_that_cannot_be_are_refused(of_red, wrong):
    with pytest.raises(ConfigError, match=f"inference.{next(iter(wrong))}"):
        of_red.with_settings(**wrong)


def test_the_command_runs_in_tiles(detector, monkeypatch, cli, tmp_path):
    monkeypatch.setattr("proxydet.models.locate_published", str)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (90, 200, 3), np.uint8)
    Image.fromarray(pixels).save("wide.png")

    def run(*options: str) -> list[dict[str, object]]:
        ended = cli("predict", "wide.png", "--score-threshold", "0.02", "--json", *options)
        assert ended.code == 0, ended.err
        return json.loads(ended.out)["images"][0]["detections"]

    asked = detector.with_settings(tile_overlap=0.3, whole_image=False)
    wanted = asked.predict(pixels, score_threshold=0.02, tiles=64).to_dict()["detections"]
    assert run("--tiles", "64", "--tile-overlap", "0.3", "--no-whole-image") == json.loads(
        json.dumps(wanted)
    )
    assert run("--tiles", "200") == run() != run("--tiles", "64")
    assert cli("predict", "wide.png", "--tiles", "31").code == 3
    for useless in (["--tile-overlap", "0.3"], ["--no-whole-image", "--tiles", "0"]):
        refused = cli("predict", "wide.png", *useless)
        assert (refused.code, "--tiles" in refused.err) == (2, True)


def test_the_command_reads_images_that_are_too_large_without_tiles(
    detector, monkeypatch, cli, tmp_path
):
    monkeypatch.setattr("proxydet.models.locate_published", str)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("large.png")
    refused = cli("predict", "large.png", "--save", "none")
    assert refused.code == 3
    assert "--tiles" in refused.err
    assert cli("predict", "large.png", "--save", "none", "--tiles", "64").code == 0
