"""The drawn data set: what it promises to readers of LVIS data and to the experiment."""

from __future__ import annotations

import filecmp
import json
import tarfile
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.errors import ConfigError, DataError
from proxydet.vocabulary.compositional import CompositionalEncoder

SMALL = SyntheticConfig(
    images_train=14,
    images_val=10,
    image_label_images_per_class=2,
    size=96,
    image_label_size=48,
    colours=3,
    shapes=3,
    textures=2,
    novel_classes=4,
    novel_covered=2,
    embedding_dim=32,
    not_exhaustive_rate=1.0,
)
SINGLE = SyntheticConfig(
    images_train=240,
    images_val=1,
    image_label_images_per_class=0,
    size=96,
    colours=1,
    shapes=7,
    textures=4,
    train_scale=1.0,
    train_objects_least=1,
    train_objects_most=1,
    object_size_least=0.4,
    object_size_most=0.5,
    novel_classes=0,
    novel_covered=0,
    embedding_dim=32,
)
"""Scenes of one object."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("drawn") / "shapes"
    make_dataset(target, SMALL)
    return target


def read(folder: Path, split: str) -> dict:
    return json.loads((folder / f"lvis_{split}.json").read_text())


def test_equal_settings_draw_equal_files(folder, tmp_path):
    make_dataset(tmp_path / "again", SMALL)
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    match, mismatch, errors = filecmp.cmpfiles(folder, tmp_path / "again", names, shallow=False)
    assert (mismatch, errors) == ([], [])
    assert len(match) > 40


def test_other_seed_draws_other_pictures(folder, tmp_path):
    make_dataset(tmp_path / "other", replace(SMALL, seed=8))
    picture = "train/200001.jpg"
    assert (folder / picture).read_bytes() != (tmp_path / "other" / picture).read_bytes()


def test_training_scenes_hold_base_classes_only(folder):
    train, val = read(folder, "train"), read(folder, "val")
    novel = {c["id"] for c in train["categories"] if c["frequency"] == "r"}
    assert len(novel) == 4
    assert not novel & {a["category_id"] for a in train["annotations"]}
    assert novel & {a["category_id"] for a in val["annotations"]}
    assert all(c["image_count"] == 0 for c in train["categories"] if c["id"] in novel)


def test_annotations_fit_their_pictures(folder):
    for split in ("train", "val"):
        content = read(folder, split)
        sizes = {}
        for image in content["images"]:
            with Image.open(folder / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                sizes[image["id"]] = picture.size
        for a in content["annotations"]:
            width, height = sizes[a["image_id"]]
            corners = np.concatenate([np.reshape(p, (-1, 2)) for p in a["segmentation"]])
            x, y, w, h = a["bbox"]
            np.testing.assert_allclose(corners.min(axis=0), (x, y), atol=0.01)
            np.testing.assert_allclose(corners.max(axis=0), (x + w, y + h), atol=0.02)
            assert 0 <= x <= x + w <= width + 0.01
            assert 0 <= y <= y + h <= height + 0.01
            area = sum(polygon_area(np.reshape(p, (-1, 2))) for p in a["segmentation"])
            assert a["area"] == pytest.approx(area, rel=0.05, abs=4)


def test_federated_fields_are_consistent(folder):
    content = read(folder, "val")
    present: dict[int, set[int]] = {}
    for a in content["annotations"]:
        present.setdefault(a["image_id"], set()).add(a["category_id"])
    for image in content["images"]:
        here = present.get(image["id"], set())
        assert not here & set(image["neg_category_ids"])
        assert set(image["not_exhaustive_category_ids"]) <= here
    assert any(image["not_exhaustive_category_ids"] for image in content["images"])
    counts = {c["id"]: c["instance_count"] for c in read(folder, "train")["categories"]}
    assert sum(counts.values()) == len(read(folder, "train")["annotations"])


def test_image_labels_cover_base_and_some_novel_classes(folder):
    by_synset = {c["synset"]: c for c in read(folder, "train")["categories"]}
    tars = sorted((folder / "tars").glob("*.tar"))
    frequencies = [by_synset[tar.name.removesuffix(".tar")]["frequency"] for tar in tars]
    assert len(tars) == 18 - 4 + 2
    assert frequencies.count("r") == 2
    with tarfile.open(tars[0]) as tar:
        members = tar.getmembers()
        assert len(members) == 2
        for member in members:
            data = tar.extractfile(member)
            assert data is not None
            assert max(Image.open(BytesIO(data.read())).size) == 48


def test_embeddings_are_those_of_the_saved_encoder(folder):
    names = [c["name"] for c in read(folder, "val")["categories"]]
    stored = np.load(folder / "embeddings.npy", allow_pickle=False)
    encoder = CompositionalEncoder.load(folder / "text_encoder.json")
    np.testing.assert_array_equal(stored.astype(np.float32), encoder.encode(names))


def test_the_folder_is_reused_or_refused(folder, tmp_path):
    stamp = (folder / "lvis_train.json").stat().st_mtime_ns
    assert make_dataset(folder, SMALL) == folder / "description.toml"
    assert (folder / "lvis_train.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="images_val"):
        make_dataset(folder, replace(SMALL, images_val=11))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/synthetic.json").write_text("{")
    with pytest.raises(DataError, match=r"synthetic\.json"):
        make_dataset(tmp_path / "damaged", SMALL)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        make_dataset(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    colours=st.integers(2, 6),
    shapes=st.integers(2, 6),
    textures=st.integers(2, 4),
    share=st.floats(0, 0.25),
)
def test_every_attribute_and_pair_stays_in_base_classes(seed, colours, shapes, textures, share):
    count = int(share * colours * shapes * textures)
    config = replace(
        SINGLE,
        seed=seed,
        images_train=1,
        size=32,
        colours=colours,
        shapes=shapes,
        textures=textures,
        novel_classes=count,
    )
    with TemporaryDirectory() as folder:
        make_dataset(Path(folder), config)
        categories = read(Path(folder), "train")["categories"]

    def pairs(*frequencies: str) -> set[tuple[str, str]]:
        words = [c["name"].split() for c in categories if c["frequency"] in frequencies]
        return {pair for triple in words for pair in combinations(triple, 2)}

    assert len(categories) == colours * shapes * textures
    assert sum(c["frequency"] == "r" for c in categories) == count
    assert pairs("f", "c") == pairs("f", "c", "r")


def test_too_many_novel_classes_are_refused(tmp_path):
    crowded = replace(SINGLE, colours=2, shapes=2, textures=2, novel_classes=8)
    with pytest.raises(ConfigError, match="novel_classes"):
        make_dataset(tmp_path / "shapes", crowded)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images_val", 0),
        ("colours", 99),
        ("novel_covered", 99),
        ("novel_rate", 1.5),
        ("embedding_dim", 4),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        SyntheticConfig(**{field: value})


@dataclass(frozen=True)
class Drawn:
    """The only object of a scene, whole."""

    texture: str
    shape: str
    polygon_P2: np.ndarray
    area: float
    colours_N3: np.ndarray
    """Pixels well inside it."""

    @property
    def diameter(self) -> float:
        """Largest distance of two corners."""
        steps = self.polygon_P2[:, None] - self.polygon_P2
        return float(np.hypot(steps[..., 0], steps[..., 1]).max())


@pytest.fixture(scope="module")
def singles(tmp_path_factory) -> list[Drawn]:
    folder = tmp_path_factory.mktemp("singles") / "shapes"
    make_dataset(folder, SINGLE)
    content = read(folder, "train")
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    found = []
    for a in content["annotations"]:
        image, (x, y, w, h) = images[a["image_id"]], a["bbox"]
        if min(x, y) < 1 or x + w > image["width"] - 1 or y + h > image["height"] - 1:
            continue
        (polygon,) = a["segmentation"]
        points = np.reshape(polygon, (-1, 2))
        inside = points.mean(axis=0) + (points - points.mean(axis=0)) * 0.8
        colours = np.asarray(Image.open(folder / "train" / image["file_name"]))
        chosen = np.asarray(filled([inside], (image["width"], image["height"]))) > 0
        _, texture, shape = names[a["category_id"]].split()
        found.append(Drawn(texture, shape, points, a["area"], colours[chosen]))
    return found


def filled(polygons: list[Any], size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("L", size)
    for points in polygons:
        corners = [(x - 0.5, y - 0.5) for x, y in np.reshape(points, (-1, 2))]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return canvas


@pytest.mark.parametrize(
    ("shape", "reach", "share", "corners"),
    # Largest width over the circle around it, area over squared width (both from geometry; of the last two shapes as drawn),
    # and most corners, of about 150 pixels along the outline.
    [
        ("circle", 1, np.pi / 4, 40),
        ("square", 1, 1 / 2, 16),
        ("triangle", np.sqrt(3) / 2, np.sqrt(3) / 4, 16),
        ("star", 0.951, 0.341, 32),
        ("cross", 0.996, 0.484, 40),
        ("crescent", 1, 0.514, 50),
        ("heart", 0.9, 0.553, 42),
    ],
)
def test_masks_have_the_shape_of_their_class(singles, shape, reach, share, corners):
    drawn = [entry for entry in singles if entry.shape == shape]
    assert len(drawn) > 5
    for entry in drawn:
        assert 0.4 * 96 - 1.5 < entry.diameter / reach < 0.5 * 96 + 1.5
        assert polygon_area(entry.polygon_P2) == pytest.approx(entry.area, rel=0.03)
        assert entry.area / entry.diameter**2 == pytest.approx(share, abs=0.035)
        assert len(entry.polygon_P2) <= corners
        if shape == "circle":
            middle = (entry.polygon_P2.max(axis=0) + entry.polygon_P2.min(axis=0)) / 2
            assert np.ptp(np.linalg.norm(entry.polygon_P2 - middle, axis=1)) < 0.8


def test_textures_differ_by_how_much_of_them_is_dark(singles):
    def dark(texture: str) -> list[float]:
        chosen = [
            entry for entry in singles if entry.texture == texture and entry.shape == "circle"
        ]
        assert len(chosen) > 2
        return [float((entry.colours_N3.max(axis=1) < 90).mean()) for entry in chosen]

    plain, striped, dotted, checked = map(dark, ("plain", "striped", "dotted", "checked"))
    assert max(plain) < 0.01
    assert min(*striped, *checked) > 0.3
    assert min(dotted) > 0.05
    assert max(dotted) < min(striped)


def test_a_mask_is_what_stays_visible_of_an_object(folder):
    content = read(folder, "val")
    overlapping = 0
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        size = image["width"], image["height"]
        # Without the pixels along their outlines, which objects that touch share.
        masks = [
            np.asarray(filled(a["segmentation"], size).filter(ImageFilter.MinFilter(3))) > 0
            for a in objects
        ]
        for one, other in combinations(range(len(objects)), 2):
            x, y, w, h = objects[one]["bbox"]
            u, v, s, t = objects[other]["bbox"]
            overlapping += (min(x + w, u + s) - max(x, u)) > 3 < min(y + h, v + t) - max(y, v)
            assert not (masks[one] & masks[other]).any()
    assert overlapping > 5


def polygon_area(points_P2: np.ndarray) -> float:
    x, y = points_P2.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
