import itertools
import json
import logging
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.images import read_image, training_view
from proxydet.data.loader import Batch, BoxBatch, ImageLabelBatch, TrainingLoader, TrainingSources
from proxydet.errors import ConfigError, DataError, RuntimeEnvironmentError
from proxydet.runtime.modes import MODES, reproducibility_mode

BOXES = SourceConfig(batch_size=3, size=48, scale=(0.5, 2.0), ratio=1.0)
LABELS = SourceConfig(batch_size=4, size=24, scale=(0.5, 1.5), ratio=1.5)


def loader(
    path: Path, *, rank: int = 0, world: int = 1, start: int = 0, seed: int = 7, **config: Any
) -> TrainingLoader:
    settings = DataConfig(**{"boxes": BOXES, "image_labels": LABELS, "workers": 0} | config)
    sources = TrainingSources(
        settings, Dataset(config=DatasetConfig.from_toml(path), cache=settings.cache)
    )
    return TrainingLoader(sources, rank=rank, world_size=world, seed=seed, start=start)


def fingerprint(batch: Batch) -> bytes:
    """Everything that a batch holds, bit for bit."""
    parts: list[Any] = [batch.image_ids, [image.numpy() for image in batch.images]]
    if isinstance(batch, BoxBatch):
        for instances in batch.instances:
            parts += [
                instances.image_size,
                instances.gt_boxes.tensor.numpy(),
                instances.gt_classes.numpy(),
            ]
            parts.append(instances.gt_masks.polygons)
    else:
        parts += [labels.numpy() for labels in batch.labels]
    return pickle.dumps([type(batch).__name__, *parts])


def first(stream: TrainingLoader, count: int) -> list[bytes]:
    return [fingerprint(batch) for batch in itertools.islice(stream, count)]


def test_a_batch_has_what_the_contract_says(small_set_with_labels):
    seen: dict[type, Any] = {}
    for batch in itertools.islice(loader(small_set_with_labels), 30):
        seen[type(batch)] = batch
        assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in batch.images)
        assert all(image.is_contiguous() for image in batch.images)
        size = BOXES.size if isinstance(batch, BoxBatch) else LABELS.size
        assert all(max(image.shape[1:]) <= size for image in batch.images)
        assert batch.skipped == ()
        if isinstance(batch, BoxBatch):
            assert len(batch) == 3
            for image, instances in zip(batch.images, batch.instances, strict=True):
                assert instances.image_size == tuple(image.shape[1:])
                # "dog", row 1, is novel.
                assert set(instances.gt_classes.tolist()) <= {0, 2}
                assert instances.gt_classes.dtype == torch.int64
        else:
            assert len(batch) == 4
            assert {label for labels in batch.labels for label in labels.tolist()} <= {1, 2}
            assert all(
                str(name).partition("/")[0] in ("dog.n.01.tar", "bird.tar")
                for name in batch.image_ids
            )
    assert seen.keys() == {BoxBatch, ImageLabelBatch}


def test_batches_do_not_depend_on_workers_or_on_where_iteration_began(small_set_with_labels):
    straight = first(loader(small_set_with_labels), 14)
    assert first(loader(small_set_with_labels, workers=2, prefetch=3), 14) == straight
    assert first(loader(small_set_with_labels, workers=1, start=5), 9) == straight[5:]
    assert first(loader(small_set_with_labels, seed=8), 14) != straight
    assert len(set(straight)) == 14


def slow_pixels(pixels: np.ndarray, source: SourceConfig, rng: np.random.Generator) -> torch.Tensor:
    """Resize the whole image, its width first, cut, mirror, turn over."""
    height, width = pixels.shape[:2]
    view = training_view(height, width, source, flip_probability=0.5, rng=rng)
    wide = Image.fromarray(pixels).resize((view.scaled[1], height), Image.Resampling.BILINEAR)
    resized = wide.resize(view.scaled[::-1], Image.Resampling.BILINEAR)
    top, left = view.offset
    part = np.asarray(resized)[top : top + view.size[0], left : left + view.size[1]]
    part = part[:, ::-1] if view.mirrored else part
    return torch.from_numpy(part.copy()).permute(2, 0, 1)


def test_the_pixels_of_samples_equal_a_plain_way_to_make_them(small_set_with_labels):
    sources = loader(small_set_with_labels).sources
    labels = sources.images["image_labels"]
    for seed in range(24):
        record = sources.store.record(seed % len(sources.store))
        pixels = read_image(small_set_with_labels.parent / "train" / record.file_name)
        sample = sources.sample("boxes", record.index, np.random.default_rng(seed))
        assert torch.equal(sample.image, slow_pixels(pixels, BOXES, np.random.default_rng(seed)))
        assert sample.image.is_contiguous()
        row = seed % len(labels)
        pixels = np.asarray(labels.image(row, exif_orientation=True))
        image = sources.sample("image_labels", row, np.random.default_rng(seed)).image
        assert torch.equal(image, slow_pixels(pixels, LABELS, np.random.default_rng(seed)))


def test_iterating_again_starts_again_and_single_batches_can_be_asked_for(small_set_with_labels):
    stream = loader(small_set_with_labels)
    once = first(stream, 4)
    assert first(stream, 4) == once
    assert [fingerprint(stream.batch(number)) for number in (3, 0)] == [once[3], once[0]]


def test_ranks_split_one_sequence(small_set_with_labels):
    alone = first(loader(small_set_with_labels), 6)
    ranks = [first(loader(small_set_with_labels, rank=rank, world=2), 3) for rank in range(2)]
    assert [ranks[n % 2][n // 2] for n in range(6)] == alone


def test_two_processes_that_share_groups_see_what_one_sees(small_set_with_labels):
    whole = SourceConfig(batch_size=4, size=48, scale=(0.5, 2.0), ratio=1.0)
    half = SourceConfig(batch_size=2, size=48, scale=(0.5, 2.0), ratio=1.0)
    shared: dict[str, Any] = {"ranks_share_group": True, "image_labels": None}
    one = loader(small_set_with_labels, boxes=whole, **shared)
    two = [loader(small_set_with_labels, boxes=half, rank=r, world=2, **shared) for r in range(2)]
    for large, *halves in itertools.islice(zip(one, *two, strict=True), 5):
        assert large.image_ids == halves[0].image_ids + halves[1].image_ids
        images = halves[0].images + halves[1].images
        assert all(torch.equal(a, b) for a, b in zip(large.images, images, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_the_same_in_every_reproducibility_mode(small_set_with_labels, mode):
    plain = first(loader(small_set_with_labels), 4)
    with reproducibility_mode(mode):
        assert first(loader(small_set_with_labels), 4) == plain
        assert first(loader(small_set_with_labels, workers=1), 4) == plain


def test_the_global_generators_are_left_alone(small_set_with_labels):
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    for workers in (0, 1):
        next(iter(loader(small_set_with_labels, workers=workers)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_image_labels_can_be_left_out_on_both_sides(small_set, small_set_with_labels):
    for stream in (loader(small_set_with_labels, image_labels=None),):
        assert all(isinstance(batch, BoxBatch) for batch in itertools.islice(stream, 10))
    text = small_set.read_text().replace('[image_labels]\ntars = "tars"', "")
    small_set.write_text(text)
    assert all(isinstance(batch, BoxBatch) for batch in itertools.islice(loader(small_set), 10))


def test_images_without_objects_are_kept_or_left_out(small_set):
    ids = {i for batch in itertools.islice(loader(small_set), 60) for i in batch.image_ids}
    assert ids == {1, 2, 3, 4, 5, 6}
    # Images 1 and 5 have no annotation.
    stream = loader(small_set, keep_empty_images=False, repeat_threshold=2.0)
    ids = {i for batch in itertools.islice(stream, 60) for i in batch.image_ids}
    assert ids == {2, 3, 4, 6}


def test_a_square_image_goes_with_the_portraits(small_set):
    path = small_set.parent / "train.json"
    content = json.loads(path.read_text())
    content["images"][1].update(height=50, width=50)
    path.write_text(json.dumps(content))
    Image.new("RGB", (50, 50)).save(small_set.parent / "train/2.png")
    drawn = [set(batch.image_ids) for batch in itertools.islice(loader(small_set), 60)]
    assert set().union(*(ids for ids in drawn if 2 in ids)) == {1, 2, 3, 5}


def test_rare_classes_are_repeated_and_novel_ones_are_not(small_set):
    stream = loader(small_set, repeat_threshold=0.6)
    drawn = np.bincount([row for n in range(6000) for row in stream.planned(n).rows], minlength=6)
    # "cat" is in 4 of 6 images, "bird" in 1; "dog" is novel and counts nowhere.
    factors = np.array([1, 1, 1, np.sqrt(0.6 * 6), 1, 1])
    np.testing.assert_allclose(drawn / drawn.sum(), factors / factors.sum(), rtol=0.06)


def test_an_empty_data_set_is_an_error(small_set):
    annotations = small_set.parent / "train.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(DataError, match="annotations"):
        loader(small_set)
    with pytest.raises(DataError, match="annotations"):
        loader(small_set, keep_empty_images=False)
    annotations.write_text(json.dumps(content | {"annotations": [], "images": []}))
    with pytest.raises(DataError, match="image"):
        loader(small_set)


@pytest.mark.parametrize(("key", "value"), [("iscrowd", 1), ("category_id", 7)])
def test_crowds_or_the_novel_class_alone_are_an_error(small_set, key, value):
    annotations = small_set.parent / "train.json"
    content = json.loads(annotations.read_text())
    changed = [annotation | {key: value} for annotation in content["annotations"]]
    annotations.write_text(json.dumps(content | {"annotations": changed}))
    with pytest.raises(DataError, match=r"iscrowd|no object to train on"):
        loader(small_set)


@pytest.mark.parametrize("masks", ["auto", False])
def test_boxes_without_any_mask_are_trained_on_without_masks(small_set, masks):
    annotations = small_set.parent / "train.json"
    annotations.write_text(annotations.read_text().replace('"segmentation"', '"outline"'))
    batches = list(itertools.islice(loader(small_set, masks=masks), 8))
    assert sum(len(instances) for batch in batches for instances in batch.instances) > 0
    assert not any(instances.has("gt_masks") for batch in batches for instances in batch.instances)
    with pytest.raises(DataError, match="no masks"):
        loader(small_set, masks=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_or_is_counted(small_set, caplog, workers):
    victim = small_set.parent / "train" / "2.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png") as caught:
        list(itertools.islice(loader(small_set, workers=workers), 50))
    assert caught.value.hint
    with caplog.at_level(logging.WARNING):
        larger = SourceConfig(batch_size=9, size=48, scale=(0.5, 2.0), ratio=1.0)
        policy: dict[str, Any] = {"unreadable_images": "skip", "boxes": larger}
        stream = loader(small_set, workers=workers, **policy)
        batches = list(itertools.islice(stream, 25))
    lost = [name for batch in batches for name in batch.skipped]
    assert stream.skipped == len(lost) > 0
    assert set(lost) == {"2.png"}
    assert all(len(batch) + len(batch.skipped) == 9 for batch in batches)
    assert f"image 2.png cannot be read; left out ({len(lost)} so far)" in caplog.text


def test_a_batch_of_unreadable_images_only_is_an_error(small_set):
    for image in (small_set.parent / "train").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DataError, match="cannot read the image"):
        next(iter(loader(small_set, unreadable_images="skip")))


def test_an_image_of_another_size_is_an_error(small_set):
    folder = small_set.parent / "train"
    for image in folder.iterdir():
        image.write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"40 x 60 pixels.*for 60 x 40") as caught:
        list(itertools.islice(loader(small_set), 50))
    assert "exif_orientation" not in str(caught.value.hint)


def test_a_worker_that_is_killed_is_named(small_set, monkeypatch):
    parent = os.getpid()

    def die(*_: object) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Image, "open", die)
    with pytest.raises(RuntimeEnvironmentError, match="a data worker died") as caught:
        next(iter(loader(small_set, workers=1)))
    assert "data.workers" in str(caught.value.hint)


def test_workers_that_hang_are_given_up(small_set, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: signal.pause())
    # How long torch waits for a worker to end before it ends it.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(RuntimeEnvironmentError, match=r"nothing for 0\.5 s"):
        next(iter(loader(small_set, workers=1, worker_timeout_s=0.5)))


def test_batches_move_as_a_whole(small_set_with_labels):
    for batch in itertools.islice(loader(small_set_with_labels), 8):
        moved = batch.to("meta")
        assert all(image.is_meta for image in moved.images)
        assert moved.image_ids == batch.image_ids
    with pytest.raises(ValueError, match="as many"):
        ImageLabelBatch(images=(), labels=(), image_ids=())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SourceConfig(batch_size=0, size=1, scale=(1, 1), ratio=1),
        lambda: SourceConfig(batch_size=1, size=0, scale=(1, 1), ratio=1),
        lambda: SourceConfig(batch_size=1, size=1, scale=(2, 1), ratio=1),
        lambda: SourceConfig(batch_size=1, size=1, scale=(0, 1), ratio=1),
        lambda: SourceConfig(batch_size=1, size=1, scale=(1, 1), ratio=0),
        lambda: DataConfig(workers=-1),
        lambda: DataConfig(flip_probability=1.5),
        lambda: DataConfig(repeat_threshold=-1),
        lambda: DataConfig(prefetch=0),
        lambda: DataConfig(worker_timeout_s=-1),
        lambda: DataConfig(test_shortest_side=900, test_longest_side=800),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_impossible_shards_are_refused(small_set):
    for wrong in ({"rank": 2, "world": 2}, {"rank": -1}, {"seed": -1}, {"start": -1}):
        with pytest.raises(ValueError, match=r"rank|negative"):
            loader(small_set, **wrong)


def test_digests_tell_changed_images_and_labels(small_set_with_labels):
    def digests() -> dict[str, str]:
        return loader(small_set_with_labels).sources.digests()

    before = digests()
    assert before == digests()
    assert before.keys() == {"images", "image labels"}
    sources = loader(small_set_with_labels).sources
    image = sources.images["boxes"].encoded(int(sources.rows_I[0]))
    assert isinstance(image, Path)
    whole = image.read_bytes()
    image.write_bytes(whole + b"\0")
    assert digests()["images"] != before["images"]
    image.unlink()
    assert digests()["images"] != before["images"]
    image.write_bytes(whole)
    assert digests() == before
    (tar, *_) = sorted(small_set_with_labels.parent.rglob("*.tar"))
    tar.unlink()
    assert digests()["image labels"] != before["image labels"]
