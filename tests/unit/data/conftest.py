"""Small data sets on disk for the tests of proxydet.data."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CATEGORIES = [
    {"id": 3, "name": "cat", "frequency": "f", "synset": "cat.n.01"},
    {"id": 7, "name": "dog", "frequency": "r", "synset": "dog.n.01"},
    {"id": 9, "name": "bird", "frequency": "c", "synset": "bird.n.01"},
]


def annotation(
    identity: int, image: int, category: int, box: list[float], **more: Any
) -> dict[str, Any]:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [polygon],
        **more,
    }


def document(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, which survive JPEG, with something different in each corner."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / max(width, 2), y * 255 / max(height, 2), np.full_like(x, 40 * (seed % 6))]
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.fixture
def write_json(tmp_path) -> Callable[[Any], Path]:
    def write(content: Any, name: str = "annotations.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def small_set(tmp_path) -> Path:
    """A description of 6 training images (landscape and portrait), 2 validation images; "dog" is novel."""
    rng = np.random.default_rng(0)
    for split, count, first in (("train", 6, 1), ("val", 2, 101)):
        folder = tmp_path / split
        folder.mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = (40, 60) if number % 2 else (60, 40)
            image_id = first + number
            Image.fromarray(picture(height, width, number)).save(folder / f"{image_id}.png")
            images.append(
                {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
            )
            for category in (3, 7, 9)[: number % 4]:
                x, y = rng.uniform(0, 20, 2).round(1)
                annotations.append(
                    annotation(len(annotations) + 1, image_id, category, [x, y, 15.5, 12.25])
                )
        (tmp_path / f"{split}.json").write_text(json.dumps(document(images, annotations)))
    np.save(tmp_path / "embeddings.npy", rng.normal(size=(3, 8)).astype(np.float16))
    description = tmp_path / "set.toml"
    description.write_text(
        """
name = "small"
[vocabulary]
embeddings = "embeddings.npy"
novel = ["dog"]
[train]
annotations = "train.json"
images = "train"
[val]
annotations = "val.json"
images = ["val"]
"""
    )
    return description


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    """Bytes of a JPEG of one grey."""

    def encode(height: int, width: int, value: int = 100) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_tar() -> Callable[..., Path]:
    """Write a tar of bytes by name, or of ready members."""

    def make(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                if isinstance(content, tarfile.TarInfo):
                    tar.addfile(content)
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def small_set_with_labels(small_set, make_tar, jpeg) -> Path:
    """`small_set` with an image-label source of "dog" (4 images) and "bird" (3 images)."""
    folder = small_set.parent / "tars"
    folder.mkdir()
    make_tar(folder / "dog.n.01.tar", {f"{n}.jpg": jpeg(20, 30 - 5 * n, 20 * n) for n in range(4)})
    make_tar(folder / "bird.tar", {f"{n}.jpg": jpeg(30, 20, 100 + n) for n in range(3)})
    small_set.write_text(small_set.read_text() + '\n[image_labels]\ntars = "tars"\n')
    return small_set
