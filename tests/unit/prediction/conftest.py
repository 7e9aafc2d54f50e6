"""Images in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    sizes = [(48, 64), (64, 48), (80, 80), (48, 64), (30, 90)]
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.fixture
def folder(tmp_path, pictures) -> Path:
    """Six pictures in two folders, one of them broken, and a file that is no picture."""
    place = tmp_path / "photos"
    (place / "sub").mkdir(parents=True)
    for index, picture in enumerate(pictures):
        name = f"sub/b{index}.png" if index > 2 else f"a{index}.png"
        Image.fromarray(picture).save(place / name)
    (place / "broken.jpg").write_bytes(b"no picture")
    (place / "notes.txt").write_text("no picture")
    return place
