"""A drawn data set that is small enough to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxydet.data.synthetic.dataset import SyntheticConfig, make_dataset


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name the data set."""
    folder = tmp_path_factory.mktemp("drawn")
    config = SyntheticConfig(
        images_train=24, images_val=4, image_label_images_per_class=2, size=96, image_label_size=48
    )
    path = make_dataset(folder / "data", config)
    return [f"data.description={path}", f"data.cache={folder / 'cache'}", "training.threads=1"]


@pytest.fixture
def base(drawn: list[str]) -> list[str]:
    """Overrides of a training of a few steps."""
    return [
        *drawn,
        "training.iterations=6",
        "training.checkpoints.period=2",
        "training.log.period=1",
        "training.log.tensorboard=false",
    ]


def path_of(overrides: list[str], key: str) -> Path:
    """Find the value of an override that is a path."""
    return next(Path(item.split("=", 1)[1]) for item in overrides if item.startswith(f"{key}="))
