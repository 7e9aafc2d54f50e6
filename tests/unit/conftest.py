"""Small random detectors that the packages' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.modeling.network import ProxyDetNetwork
    from proxydet.vocabulary.compositional import CompositionalEncoder


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """A detector of every part, of a few hundred thousand parameters, and batches for it."""
    import tiny_detector

    return tiny_detector


@pytest.fixture(scope="session")
def encoder() -> CompositionalEncoder:
    from shape_detector import WORDS

    from proxydet.vocabulary.compositional import CompositionalEncoder

    return CompositionalEncoder.create(WORDS, dim=64, noise=0.1, seed=1)


@pytest.fixture(scope="session")
def network(encoder) -> ProxyDetNetwork:
    from shape_detector import CLASSES, random_network

    from proxydet.vocabulary.vocabulary import Vocabulary

    return random_network(Vocabulary.from_arrays(CLASSES, encoder.encode(CLASSES), [1, 1, 1, 0]))


@pytest.fixture(scope="session")
def detector(network, encoder) -> Detector:
    """Classes by the words of :mod:`shape_detector`, the last one novel; images of 64 to 100 pixels."""
    from proxydet.detector import Detector

    return Detector(network, shortest=64, longest=100, encoder=encoder)


@pytest.fixture(params=[(False, True), (True, False)])
def users_tf32(request) -> Iterator[tuple[bool, bool]]:
    """Whether the user allows TF32 in products and in convolutions."""
    import torch

    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32, convolutions.allow_tf32 = request.param
    yield request.param
    products.allow_tf32, convolutions.allow_tf32 = before
