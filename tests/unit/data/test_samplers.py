from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.data.loader import BatchPlan, SourceImages, image_weights, repeat_factors
from proxydet.errors import DataError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "data_parity.npz"
PARITY_THRESHOLD = 0.1


def factors_of(categories: list[str]) -> np.ndarray:
    labels = [[int(c) for c in text.split(",")] for text in categories]
    images = np.repeat(np.arange(len(labels)), [len(x) for x in labels])
    flat = np.array([c for x in labels for c in x])
    return repeat_factors(images, flat, image_count=len(labels), threshold=PARITY_THRESHOLD)


def test_repeat_factors_and_weights_equal_the_published_ones():
    parity = np.load(FIXTURE)
    categories = parity["sampler.categories"].tolist()
    box = factors_of(categories[:40])
    image = factors_of(categories[40:])
    np.testing.assert_allclose(box, parity["sampler.repeat_factors_box"], rtol=1e-6)
    np.testing.assert_allclose(image, parity["sampler.repeat_factors_image"], rtol=1e-6)
    weights = np.concatenate(image_weights([box, np.ones(100)], [1, 4]))
    np.testing.assert_allclose(weights, parity["sampler.weights"], rtol=1e-6)


def test_repeat_factors_at_the_edges():
    none = np.array([], dtype=np.int64)
    assert repeat_factors(none, none, image_count=3, threshold=0.5).tolist() == [1, 1, 1]
    once = repeat_factors(np.array([1]), np.array([5]), image_count=4, threshold=1.0)
    assert once.tolist() == [1, 2, 1, 1]
    assert (
        repeat_factors(np.array([1]), np.array([5]), image_count=4, threshold=0).tolist() == [1] * 4
    )


def sources() -> list[SourceImages]:
    return [
        SourceImages(
            name="boxes",
            weights_I=np.array([1.0, 1, 2, 0]),
            landscape_I=np.array([True, True, False, True]),
            batch_size=2,
        ),
        SourceImages(
            name="image_labels",
            weights_I=np.full(10, 1.6),
            landscape_I=np.arange(10) < 3,
            batch_size=8,
        ),
    ]


def test_a_batch_has_one_source_and_one_orientation():
    plan = BatchPlan(sources(), seed=1)
    for step in range(300):
        batch = plan.batch(step, rank=0, world_size=1)
        assert len(batch.rows) == len(batch.seeds) == (2 if batch.source == "boxes" else 8)
        landscape = sources()[batch.source == "image_labels"].landscape_I[list(batch.rows)]
        assert landscape.all() or not landscape.any()


@pytest.mark.parametrize("grouped", [True, False])
def test_in_the_long_run_images_come_up_in_proportion_to_their_weights(grouped):
    plan = BatchPlan(sources(), seed=0, group_by_orientation=grouped)
    drawn = {"boxes": np.zeros(4), "image_labels": np.zeros(10)}
    for step in range(6000):
        batch = plan.batch(step, rank=0, world_size=1)
        np.add.at(drawn[batch.source], list(batch.rows), 1)
    total = drawn["boxes"].sum() + drawn["image_labels"].sum()
    np.testing.assert_allclose(drawn["boxes"] / total, np.array([1, 1, 2, 0]) / 20, atol=0.01)
    np.testing.assert_allclose(drawn["image_labels"] / total, np.full(10, 1.6 / 20), atol=0.01)


def test_batches_depend_on_the_number_and_not_on_what_was_asked_before():
    plan = BatchPlan(sources(), seed=5)
    forward = [plan.batch(step, rank=1, world_size=3) for step in range(20)]
    fresh = BatchPlan(sources(), seed=5)
    assert [fresh.batch(step, rank=1, world_size=3) for step in reversed(range(20))] == forward[
        ::-1
    ]
    other = BatchPlan(sources(), seed=6)
    assert [other.batch(step, rank=1, world_size=3) for step in range(20)] != forward


def test_ranks_draw_their_parts_of_one_sequence():
    plan = BatchPlan(sources(), seed=5)
    alone = [plan.batch(number, rank=0, world_size=1) for number in range(12)]
    together = [plan.batch(step, rank=rank, world_size=4) for step in range(3) for rank in range(4)]
    assert alone == together
    seeds = [seed for batch in alone for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds)


def test_shared_groups_split_one_large_batch():
    plan = BatchPlan(sources(), seed=5, ranks_share_group=True)
    double = [
        SourceImages(
            name=source.name,
            weights_I=source.weights_I,
            landscape_I=source.landscape_I,
            batch_size=2 * source.batch_size,
        )
        for source in sources()
    ]
    large = BatchPlan(double, seed=5, ranks_share_group=True)
    for step in range(30):
        halves = [plan.batch(step, rank=rank, world_size=2) for rank in range(2)]
        whole = large.batch(step, rank=0, world_size=1)
        assert halves[0].rows + halves[1].rows == whole.rows
        assert halves[0].seeds + halves[1].seeds == whole.seeds
        assert {half.source for half in halves} == {whole.source}


def test_images_without_weight_are_never_drawn_and_none_at_all_is_an_error():
    def plan(*weights: float) -> BatchPlan:
        images = SourceImages(
            name="boxes",
            weights_I=np.array(weights),
            landscape_I=np.zeros(len(weights), dtype=bool),
            batch_size=3,
        )
        return BatchPlan([images], seed=0)

    assert {
        row for step in range(50) for row in plan(0, 1, 0).batch(step, rank=0, world_size=1).rows
    } == {1}
    for weights in ((), (0.0, 0.0)):
        with pytest.raises(DataError, match="no images"):
            plan(*weights)


@given(total=st.floats(1e-6, 1e12))
def test_the_smallest_and_the_largest_random_number_draw_an_image(total):
    class Extremes:
        def random(self, count: int) -> np.ndarray:
            return np.resize([0.0, np.nextafter(1.0, 0.0)], count)

    images = SourceImages(
        name="boxes",
        weights_I=np.array([total / 2, total / 2]),
        landscape_I=np.zeros(2, dtype=bool),
        batch_size=2,
    )
    plan = BatchPlan([images], seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda _: Extremes())
        assert plan.batch(0, rank=0, world_size=1).rows == (0, 1)
