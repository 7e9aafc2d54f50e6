"""Photos in a folder, and an exact and a compact index of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from region_indexes import made

SIZES = [(48, 64), (64, 48), (80, 80), (30, 90)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(2)
    for number, size in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"p{number}.png")
    return folder


@pytest.fixture(scope="module")
def exact(photos, detector, tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("exact") / "photos.index", detector, photos)


@pytest.fixture(scope="module")
def compact(photos, detector, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compact") / "photos.index"
    return made(path, detector, photos, most_regions=20)
