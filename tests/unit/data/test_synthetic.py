"""The drawn data set: what it promises to readers of LVIS data and to the experiment."""

from __future__ import annotations

import filecmp
import json
import tarfile
from dataclasses import replace
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from proxydet.data.synthetic import scenes
from proxydet.data.synthetic.attributes import build_classes
from proxydet.data.synthetic.config import SyntheticConfig
from proxydet.data.synthetic.contours import polygon_area, polygons_of, simplify
from proxydet.data.synthetic.dataset import make_dataset
from proxydet.data.synthetic.painting import outline, paint_object
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("drawn") / "shapes"
    make_dataset(target, SMALL)
    return target


def read(folder: Path, split: str) -> dict:
    return json.loads((folder / f"lvis_{split}.json").read_text())


def test_equal_settings_draw_equal_files(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", SMALL)
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    match, mismatch, errors = filecmp.cmpfiles(folder, tmp_path / "again", names, shallow=False)
    assert (mismatch, errors) == ([], [])
    assert len(match) > 40


def test_other_seed_draws_other_pictures(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", replace(SMALL, seed=8))
    picture = "train/200001.jpg"
    assert (folder / picture).read_bytes() != (tmp_path / "other" / picture).read_bytes()


def test_training_scenes_hold_base_classes_only(folder: Path) -> None:
    train, val = read(folder, "train"), read(folder, "val")
    novel = {c["id"] for c in train["categories"] if c["frequency"] == "r"}
    assert len(novel) == 4
    assert not novel & {a["category_id"] for a in train["annotations"]}
    assert novel & {a["category_id"] for a in val["annotations"]}
    assert all(c["image_count"] == 0 for c in train["categories"] if c["id"] in novel)


def test_annotations_fit_their_pictures(folder: Path) -> None:
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


def test_federated_fields_are_consistent(folder: Path) -> None:
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


def test_image_labels_cover_base_and_some_novel_classes(folder: Path) -> None:
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


def test_embeddings_are_those_of_the_saved_encoder(folder: Path) -> None:
    names = [c["name"] for c in read(folder, "val")["categories"]]
    stored = np.load(folder / "embeddings.npy", allow_pickle=False)
    encoder = CompositionalEncoder.load(folder / "text_encoder.json")
    np.testing.assert_array_equal(stored.astype(np.float32), encoder.encode(names))


def test_the_folder_is_reused_or_refused(folder: Path, tmp_path: Path) -> None:
    stamp = (folder / "lvis_train.json").stat().st_mtime_ns
    assert make_dataset(folder, SMALL) == folder / "description.toml"
    assert (folder / "lvis_train.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="images_val"):
        make_dataset(folder, replace(SMALL, images_val=11))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        make_dataset(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    colours=st.integers(2, 6),
    shapes=st.integers(2, 6),
    textures=st.integers(2, 4),
    share=st.floats(0, 0.25),
)
def test_every_attribute_and_pair_stays_in_base_classes(
    seed: int, colours: int, shapes: int, textures: int, share: float
) -> None:
    novel = int(share * colours * shapes * textures)
    config = SyntheticConfig(
        seed=seed,
        colours=colours,
        shapes=shapes,
        textures=textures,
        novel_classes=novel,
        novel_covered=novel // 2,
    )
    classes = build_classes(config)
    base = [c for c in classes if not c.novel]
    assert len(classes) - len(base) == novel
    assert sum(c.novel and c.covered for c in classes) == novel // 2

    def pairs(members: list) -> set[tuple[str, str]]:
        triples = [(c.colour, c.texture, c.shape) for c in members]
        return {pair for triple in triples for pair in combinations(triple, 2)}

    assert pairs(base) == pairs(list(classes))


def test_too_many_novel_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="without a base class"):
        build_classes(
            SyntheticConfig(colours=2, shapes=2, textures=2, novel_classes=8, novel_covered=0)
        )


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
def test_wrong_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        SyntheticConfig(**{field: value})


@pytest.mark.parametrize(
    "shape", ["circle", "square", "triangle", "star", "cross", "crescent", "heart"]
)
def test_outlines_fill_the_unit_circle(shape: str) -> None:
    radii = np.linalg.norm(outline(shape), axis=1)
    assert 0.98 <= radii.max() <= 1.0 + 1e-9


def test_the_three_textures_differ_and_keep_the_outline() -> None:
    classes = [
        c for c in build_classes(SyntheticConfig()) if (c.colour, c.shape) == ("red", "circle")
    ]
    patches = [paint_object(c, 60, np.random.default_rng(3)) for c in classes]
    darkness = [float((patch.colours_SS3.max(axis=2) < 90).mean()) for patch in patches]
    assert darkness[0] == 0
    assert darkness[1] > 0.3
    assert 0.05 < darkness[2] < darkness[1]
    for patch in patches:
        assert patch.coverage_SS.sum() == pytest.approx(np.pi * 30**2, rel=0.02)


def test_polygons_trace_a_mask_to_a_fraction_of_a_pixel() -> None:
    canvas = Image.new("L", (400, 320), 0)
    ImageDraw.Draw(canvas).ellipse((80, 60, 279, 259), fill=255)
    coverage = np.asarray(canvas.reduce(4)).astype(np.float32) / 255
    (polygon,) = polygons_of(coverage)
    points = np.reshape(polygon, (-1, 2))
    radii = np.hypot(points[:, 0] - 45, points[:, 1] - 40)
    np.testing.assert_allclose(radii, 25, atol=0.3)
    assert len(points) < 60


def test_polygons_of_an_object_cut_by_the_edge_stay_inside() -> None:
    coverage = np.zeros((20, 30), np.float32)
    coverage[:, 22:] = 1
    (polygon,) = polygons_of(coverage)
    points = np.reshape(polygon, (-1, 2))
    assert points.min() >= 0
    assert (points.max(axis=0) == (30, 20)).all()
    assert polygon_area(points) == pytest.approx(8 * 20, abs=1.5)


def test_a_mask_is_what_stays_visible_of_an_object() -> None:
    canvas = scenes._Canvas(np.zeros((40, 60, 3), np.float32))
    square = np.zeros((24, 24), np.float32)
    square[2:22, 2:22] = 1
    for left, colour in ((10, 50.0), (24, 200.0)):
        target = (slice(8, 32), slice(left, left + 24))
        coverage = np.zeros((40, 60), np.float32)
        coverage[target] = square
        canvas._paint(
            coverage, np.full((24, 24, 3), colour, np.float32), target, (slice(None), slice(None))
        )
    below, above = scenes._finish(canvas, [4, 7]).objects
    # The upper square starts 14 pixels to the right, so 6 of 20 columns of the lower one are hidden.
    assert (below.class_index, below.area, below.box_xywh[2]) == (4, 14 * 20, 14)
    assert (above.area, above.box_xywh[2]) == (400, 20)
    assert (canvas.picture_HW3[20, 27] == 200).all()


def test_simplify_keeps_corners_only() -> None:
    side = np.linspace(0, 10, 21)[:-1]
    square = np.concatenate(
        [
            np.stack([side, 0 * side], axis=1),
            np.stack([0 * side + 10, side], axis=1),
            np.stack([10 - side, 0 * side + 10], axis=1),
            np.stack([0 * side, 10 - side], axis=1),
        ]
    )
    assert len(simplify(square, 0.1)) == 4
