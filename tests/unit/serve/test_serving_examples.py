"""Example images of the page: those of the package, and those of a run's own data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxydet.config import dump_yaml
from proxydet.recipes import resolve_config
from proxydet.serve.examples import packaged_examples, run_examples
from proxydet.vocabulary.names import split_names


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.load()
        return image.size


def test_the_packaged_photographs_come_with_classes():
    examples = packaged_examples()
    assert len(examples) == 3
    for example in examples:
        assert max(size_of(example.data)) <= 480
        assert len(example.data) < 50_000
        assert len(set(split_names(example.words))) >= 3


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run of data with six validation images, of which the last two have both classes; one is large."""
    sizes = [(64, 48)] * 5 + [(2000, 500)]
    images = [
        {"id": i, "width": w, "height": h, "file_name": f"{i}.png"}
        for i, (w, h) in enumerate(sizes, 1)
    ]
    for image, (width, height) in zip(images, sizes, strict=True):
        Image.new("RGB", (width, height), (90, 90, 90)).save(tmp_path / str(image["file_name"]))
    pairs = [(i, 1) for i in range(1, 7)] + [(5, 2), (6, 2)]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        for n, (i, c) in enumerate(pairs, 1)
    ]
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    np.save(tmp_path / "e.npy", np.eye(2, 64, dtype=np.float32))
    (tmp_path / "d.toml").write_text(
        'name = "d"\n[vocabulary]\nembeddings = "e.npy"\n[val]\nannotations = "a.json"\nimages = "."\n'
    )
    folder = tmp_path / "run"
    folder.mkdir()
    config = resolve_config("tiny", None, [f"data.description={tmp_path / 'd.toml'}"])
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


def test_a_run_offers_its_own_validation_images(run_folder):
    examples = run_examples(run_folder)
    assert len(examples) == 4
    assert {example.name for example in examples[:2]} == {"5.png", "6.png"}
    assert {size_of(example.data) for example in examples[:2]} == {(64, 48), (1024, 256)}
    assert {example.words for example in examples} == {""}


@pytest.mark.parametrize("gone", ["../1.png", "../a.json", "../d.toml", "config.yaml"])
def test_a_run_whose_data_is_elsewhere_offers_none(run_folder, gone):
    for image in run_folder.parent.glob("*.png") if gone.endswith("png") else ():
        image.unlink()
    (run_folder / gone).unlink(missing_ok=True)
    assert run_examples(run_folder) == ()
