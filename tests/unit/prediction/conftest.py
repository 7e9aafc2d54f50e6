"""A small random detector that the tests of prediction share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxydet.detector import Detector
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import get_recipe
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

WORDS = ["red", "blue", "green", "circle", "square", "star"]
CLASSES = ["red circle", "blue square", "green star", "blue circle"]


@pytest.fixture(scope="session")
def encoder() -> CompositionalEncoder:
    return CompositionalEncoder.create(WORDS, dim=64, noise=0.1, seed=1)


@pytest.fixture(scope="session")
def network(encoder) -> ProxyDetNetwork:
    torch.manual_seed(5)
    vocabulary = Vocabulary.from_arrays(CLASSES, encoder.encode(CLASSES), [1, 1, 1, 0])
    made = ProxyDetNetwork(get_recipe("tiny").model, vocabulary)
    # Fresh heads score everything alike; larger weights make scores that differ.
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith("roi_heads.") and parameter.ndim > 1:
                parameter.mul_(6)
    return made


@pytest.fixture(scope="session")
def detector(network, encoder) -> Detector:
    return Detector(network, shortest=64, longest=100, encoder=encoder)


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
