"""Categories of few images: what their resamples lack in spread is put back."""

import numpy as np
import pytest

from proxydet.evaluation.bootstrap import FewImages, images_of, widening


@pytest.mark.parametrize("images", [2, 3, 4])
def test_the_variance_of_a_mean_of_few_values_comes_out_right(images):
    """Over many data sets, the resampled mean's variance is on average the mean's own, 1 / images."""
    draw = np.random.default_rng(images)
    estimates, plain = [], []
    for _ in range(400):
        values = draw.normal(size=images)
        counts = draw.poisson(1, (300, images))
        counts = counts[counts.sum(axis=1) > 0]
        means = counts @ values / counts.sum(axis=1)
        few = FewImages(np.full((1, 1, 1), values.mean()), np.array([[images]]), ("",))
        wide = [few.widen(np.full((1, 1, 1), mean), draw)[0, 0, 0] for mean in means[:150]]
        estimates.append(np.square(np.array(wide) - values.mean()).mean())
        plain.append(np.square(means - values.mean()).mean())
    assert np.mean(estimates) == pytest.approx(1 / images, rel=0.1)
    assert np.mean(plain) <= 1.03 / images


def test_many_images_are_left_alone():
    assert [widening(number) for number in (0, 1, 5, 1000)] == [1, 1, 1, 1]
    assert widening(2) > widening(3) > widening(4) > 1
    whole, drawn = np.random.default_rng(0).random((2, 4, 10, 3))
    few = FewImages(whole, np.full((4, 3), 9), "rcf")
    np.testing.assert_allclose(few.widen(drawn, np.random.default_rng(0)), drawn)


def test_categories_of_one_image_are_pooled_with_those_of_their_kind():
    whole = np.array([0.1, 0.9, 0.5, 0.3, 0.7])[None, None]
    few = FewImages(whole, np.array([[1, 1, 1, 9, 1]]), ("r", "r", "f", "r", "r"))
    drawn = whole.copy()
    drawn[0, 0, 4] = np.nan
    seen = np.array([few.widen(drawn, np.random.default_rng(seed))[0, 0] for seed in range(99)])
    assert set(seen[:, 0]) == set(seen[:, 1]) == {0.1, 0.9, 0.7}
    assert (seen[:, 2:4] == [0.5, 0.3]).all()  # alone of its kind; many images
    assert np.isnan(seen[:, 4]).all()  # not in the resample
    again = few.widen(drawn, np.random.default_rng(5))[0, 0]
    np.testing.assert_array_equal(again, seen[5])


def test_images_are_counted_once_a_category():
    image, category = np.array([0, 0, 0, 2, 2]), np.array([1, 1, 0, 1, 3])
    assert images_of(image, category, 5).tolist() == [1, 2, 0, 1, 0]
