from pathlib import Path

import pytest

from proxydet.data.config import DataConfig
from proxydet.data.description import DatasetDescription
from proxydet.data.evaluation_loader import EvaluationLoader, build_evaluation_loader
from proxydet.data.images import read_image
from proxydet.errors import DataError


def loader(path: Path, *, workers: int = 0, split: str = "train", **place: int) -> EvaluationLoader:
    config = DataConfig(workers=workers, test_shortest_side=80, test_longest_side=110)
    return build_evaluation_loader(config, DatasetDescription.from_toml(path), split=split, **place)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_comes_once_in_order(small_set: Path, workers: int) -> None:
    stream = loader(small_set, workers=workers, batch_size=4)
    assert len(stream) == 2
    batches = list(stream)
    assert [batch.image_ids for batch in batches] == [(1, 2, 3, 4), (5, 6)]
    assert batches[0].file_names == ("1.png", "2.png", "3.png", "4.png")
    assert batches[0].original_sizes == ((60, 40), (40, 60), (60, 40), (40, 60))
    # 80 on the short side would make 120 on the long one.
    assert [tuple(image.shape) for image in batches[1].images] == [(3, 110, 73), (3, 73, 110)]
    assert [batch.image_ids for batch in stream] == [(1, 2, 3, 4), (5, 6)]


def test_processes_share_the_images_and_done_ones_are_left_out(small_set: Path) -> None:
    parts = [
        [i for b in loader(small_set, rank=r, world_size=4) for i in b.image_ids] for r in range(4)
    ]
    assert parts == [[1, 5], [2, 6], [3], [4]]
    rest = loader(small_set).without({1, 2, 4, 99})
    assert [batch.image_ids for batch in rest] == [(3,), (5,), (6,)]
    assert list(rest.without({3, 5, 6})) == []


def test_an_unreadable_image_is_an_error(small_set: Path) -> None:
    (small_set.parent / "val" / "102.png").unlink()
    with pytest.raises(DataError, match=r"102\.png"):
        list(loader(small_set, split="val"))


def test_the_pixels_are_the_images(small_set: Path) -> None:
    config = DataConfig(workers=0, test_shortest_side=40, test_longest_side=60)
    description = DatasetDescription.from_toml(small_set)
    batch = next(iter(build_evaluation_loader(config, description)))
    image = read_image(small_set.parent / "val" / "101.png")
    assert (batch.images[0].permute(1, 2, 0).numpy() == image).all()
