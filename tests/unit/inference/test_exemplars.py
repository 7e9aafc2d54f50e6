"""Exemplars from folders of crops, annotations and Python, through a small random detector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxydet.config import dump_yaml
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.errors import DataError, InputError, VocabularyError
from proxydet.inference.exemplars import (
    find_exemplars,
    region_statistics,
    vocabulary_of_exemplars,
)
from proxydet.recipes import get_recipe
from proxydet.vocabulary.exemplars import STATISTICS_NAME
from proxydet.vocabulary.vocabulary import Vocabulary

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def shots(tmp_path) -> Path:
    """Two classes of crops of different sizes."""
    for name, sizes in {"mug": [(20, 30), (50, 40)], "red plate": [(33, 33)]}.items():
        (tmp_path / "shots" / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            crop = RNG.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(crop).save(tmp_path / "shots" / name / f"{number}.png")
    return tmp_path / "shots"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Annotated drawings; their classes are not all known to the detector."""
    folder = tmp_path_factory.mktemp("drawn")
    drawn = SyntheticConfig(images_train=12, images_val=4, image_label_images_per_class=1)
    make_dataset(folder, drawn)
    return folder / "description.toml"


@pytest.fixture
def own(network, encoder, tmp_path, monkeypatch) -> Detector:
    """A detector that keeps statistics in a cache of its own."""
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    return Detector(network, shortest=64, longest=100, encoder=encoder)


@pytest.fixture
def saved_run(network, encoder, tmp_path) -> Path:
    """A run folder of the detector."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(get_recipe("tiny")))
    network.vocabulary.save(folder / "vocabulary.npz")
    encoder.save(folder / "text_encoder.json")
    torch.save({"model": network.state_dict()}, folder / "model_final.pth")
    return folder


def test_given_boxes_are_embedded_as_the_network_does(detector):
    boxes = [[4, 4, 44, 44], [-10, 20, 60, 300]]
    (found,) = detector.embed_boxes([NOISE], [boxes])
    assert found.shape == (2, 3, detector.vocabulary.dimension)
    np.testing.assert_allclose(np.linalg.norm(found, axis=2), 1, atol=1e-5)
    (cut,) = detector.embed_boxes([NOISE], [[[0, 20, 60, 60]]])
    np.testing.assert_allclose(found[1], cut[0], atol=1e-5)
    # In another company, and none at all.
    none, again = detector.embed_boxes([NOISE[:40], NOISE], [[], boxes])
    assert none.shape == (0, 3, detector.vocabulary.dimension)
    np.testing.assert_allclose(again, found, atol=1e-4)
    (nothing,) = detector.embed_boxes([NOISE], [[]])
    assert nothing.shape == none.shape


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([0, 0, np.nan, 5], "finite"),
        ([9, 9, 5, 5], "exchanged"),
        ([90, 5, 99, 9], "no pixel"),
        ([1, 2, 3], "shape"),
        (["a", 1, 2, 3], "numbers"),
    ],
)
def test_boxes_that_are_none_are_refused_with_their_place(detector, box, said):
    with pytest.raises(InputError, match=f"image 0.*{said}"):
        detector.embed_boxes([NOISE], [[box]])


def test_crops_in_folders_are_classes(shots, own, tmp_path, cli, caplog):
    shown = find_exemplars(shots)
    assert shown.names == ("mug", "red plate")
    assert shown.given_C.tolist() == [2, 1]
    Image.new("RGB", (9, 9), "red").save(shots / "mug" / "plain.png")
    shown = find_exemplars(shots)
    statistics = region_statistics(own, otherwise=shown)
    assert not list(tmp_path.glob("cache/**/*.npz"))  # of too little to be kept
    from proxydet.inference.exemplars import build_from_exemplars

    made = build_from_exemplars(own, shown, statistics)
    assert made.counts_C.tolist() == [2, 1]
    assert caplog.text.count("1 exemplar of one colour") == 1  # not again for the statistics
    assert len(own.predict(NOISE, made.vocabulary, score_threshold=0.0))


def test_statistics_are_stored_and_belong_to_the_weights(own, data, shots, tmp_path):
    made = region_statistics(own, data)
    (file,) = tmp_path.glob(f"cache/**/{STATISTICS_NAME}")
    again = region_statistics(own, otherwise=find_exemplars(shots))
    np.testing.assert_array_equal(made.means_KD, again.means_KD)
    file.write_bytes(b"damaged")
    assert region_statistics(own, otherwise=find_exemplars(shots)).counts_K[0] == 1_000_000
    with pytest.raises(VocabularyError, match="statistics"):
        region_statistics(own)


def test_annotated_images_fused_with_their_names(own, data, tmp_path, cli):
    few = find_exemplars(data, split="val", most=2)
    assert max(few.given_C) >= 2
    assert max(np.bincount(np.concatenate([i.classes_A for i in few.images]))) == 2
    labels = [["red circle", "blue star"]]
    boxes = [[[4, 4, 44, 44], [30, 20, 70, 50]]]
    alone = vocabulary_of_exemplars(own, [NOISE], boxes, labels)
    fused = vocabulary_of_exemplars(own, [NOISE], boxes, labels, fuse=True)
    text = own.vocabulary_of(labels[0])
    cosines = [(v.normalised() * text.normalised()).sum(axis=1) for v in (alone, fused)]
    assert (cosines[0] < cosines[1]).all()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda f: (f / "empty").mkdir(), "neither annotations nor"),
        (lambda f: Image.fromarray(NOISE).save(f / "loose.png"), "1 image and no subfolder"),
        (lambda f: (f / "mug").mkdir(), "no images of mug"),
    ],
)
def test_folders_without_exemplars_are_named(tmp_path, made, said):
    folder = tmp_path / "given"
    folder.mkdir()
    made(folder)
    where = folder / "empty" if said.startswith("neither") else folder
    with pytest.raises(DataError, match=said):
        find_exemplars(where)


def test_annotations_without_a_usable_box_are_named(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "mug"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 1},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0.5, 20], "area": 10, "iscrowd": 0},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="none of its 2 boxes"):
        find_exemplars(tmp_path / "a.json")


def test_the_command_writes_whole_files_only(shots, data, tmp_path, cli, saved_run):
    target = tmp_path / "shots.vocab"
    words = ("vocab", "build", "--exemplars", shots, "--run", saved_run, "-o", target)
    code, _, err = cli(*words, "--statistics", data)
    assert code == 0, err
    made = Vocabulary.load(target)
    assert made.names == ("mug", "red plate")
    assert (saved_run / STATISTICS_NAME).exists()
    names = tmp_path / "names.txt"
    names.write_text("blue star\nmug\n")
    mixed = cli("vocab", "build", names, *words[2:], "--json")
    assert mixed.data["classes"] == 3
    assert Vocabulary.load(target).scale[2] == 1
    before = target.read_bytes()
    (shots / "mug ").mkdir()
    shutil.copy(shots / "mug" / "0.png", shots / "mug ")
    code, _, err = cli(*words)
    assert (code, "'mug'" in err) == (3, True)
    assert target.read_bytes() == before
    said = tmp_path / "said.yaml"
    said.write_text("red plate: [A plate that is red.]\n")
    (shots / "mug " / "0.png").unlink()
    (shots / "mug ").rmdir()
    lost = cli(*words, "--descriptions", said)
    assert (lost.code, "'red plate'" in lost.err, "--fuse" in lost.err) == (3, True, True)
    assert cli("vocab", "build", names, "-o", target, "--fuse").code == 2
    assert cli("vocab", "build", "-o", target).code == 2
