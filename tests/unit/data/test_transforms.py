from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proxydet.data.config import SourceConfig
from proxydet.data.images import View, scaled_crop, shortest_side, training_view

FIXTURE = Path(__file__).parents[2] / "fixtures" / "data_parity.npz"


def test_resize_crop_equals_the_published_geometry():
    parity = np.load(FIXTURE)
    columns = parity["resize_crop.columns"].tolist()
    rows = parity["resize_crop.rows"]
    assert len(rows) == 36
    for values in rows:
        row = dict(zip(columns, values.tolist(), strict=True))
        view = scaled_crop(
            int(row["height"]),
            int(row["width"]),
            size=int(row["size"]),
            scale_factor=row["scale_factor"],
            crop_y=row["u_y"],
            crop_x=row["u_x"],
        )
        assert view.scaled == (row["scaled_h"], row["scaled_w"])
        assert view.offset == (row["offset_y"], row["offset_x"])
        assert view.factor_xy == pytest.approx((row["img_scale"],) * 2, rel=1e-12)


sides = st.integers(1, 1500)


@given(
    sides,
    sides,
    st.integers(1, 700),
    st.floats(0.05, 2.5),
    st.floats(0, 0.999999),
    st.floats(0, 0.999999),
)
def test_a_crop_lies_inside_and_is_never_larger_than_asked(h, w, size, scale, crop_y, crop_x):
    view = scaled_crop(h, w, size=size, scale_factor=scale, crop_y=crop_y, crop_x=crop_x)
    for axis in (0, 1):
        assert 1 <= view.size[axis] <= size
        assert 0 <= view.offset[axis] <= view.scaled[axis] - view.size[axis]


@given(sides, sides)
def test_test_size_equals_detectron2(h, w):
    import proxydet.runtime.d2  # noqa: F401

    from detectron2.data.transforms import ResizeShortestEdge

    view = shortest_side(h, w, shortest=800, longest=1333)
    expected = ResizeShortestEdge.get_output_shape(h, w, 800, 1333)
    assert view.scaled == tuple(max(1, side) for side in expected)


def test_the_image_equals_one_full_resize_then_crop_then_mirror():
    pixels = np.random.default_rng(0).integers(0, 255, (37, 53, 3)).astype(np.uint8)
    view = View(
        scaled=(80, 111), offset=(11, 30), size=(60, 64), factor_xy=(2.1, 2.1), mirrored=True
    )
    whole = np.asarray(Image.fromarray(pixels).resize((111, 80), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(view.image(pixels), whole[11:71, 30:94][:, ::-1])
    smaller = View(scaled=(20, 53), offset=(0, 0), size=(20, 53), factor_xy=(1, 0.5))
    whole = np.asarray(Image.fromarray(pixels).resize((53, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(smaller.image(pixels), whole)


def slow_view(pixels: np.ndarray, view: View) -> np.ndarray:
    """Resize the whole image, its width first whatever the version of Pillow, then cut, then mirror."""
    height, width = view.scaled
    wide = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BILINEAR)
    whole = np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR))
    top, left = view.offset
    part = whole[top : top + view.size[0], left : left + view.size[1]]
    return part[:, ::-1] if view.mirrored else part


@settings(max_examples=75, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([(0.1, 2.0), (0.5, 1.5), (1.0, 1.0), (4.0, 9.0)]),
)
def test_rows_and_columns_that_are_dropped_early_change_no_pixel(height, width, size, seed, scale):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    source = SourceConfig(batch_size=1, size=size, scale=scale, ratio=1.0)
    view = training_view(height, width, source, flip_probability=0.5, rng=rng)
    np.testing.assert_array_equal(view.image(pixels), slow_view(pixels, view))


@pytest.mark.parametrize("scaled", [(70, 30), (90, 30), (70, 45), (50, 30)])
def test_a_side_that_keeps_its_length(scaled):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 30, 3)).astype(np.uint8)
    view = View(scaled=scaled, offset=(21, 3), size=(25, 20), factor_xy=(1, 1))
    np.testing.assert_array_equal(view.image(pixels), slow_view(pixels, view))


def test_an_identical_view_copies():
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 3)).astype(np.uint8)
    view = View(scaled=(3, 5), offset=(0, 0), size=(3, 5), factor_xy=(1, 1))
    np.testing.assert_array_equal(view.image(pixels), pixels)
    assert not np.shares_memory(view.image(pixels), pixels)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_points_and_masks_follow_the_pixels(mirrored):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:20, 30:50] = 255
    view = View(
        scaled=(80, 120), offset=(4, 20), size=(60, 90), factor_xy=(2, 2), mirrored=mirrored
    )
    seen = view.image(pixels)[:, :, 0] > 127
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert view.boxes(np.array([[30, 10, 50, 20]])).tolist() == [extent]
    polygon = view.polygons([np.array([30, 10, 50, 10, 50, 20, 30, 20])])[0].reshape(-1, 2)
    assert [*polygon.min(axis=0), *polygon.max(axis=0)] == extent
    np.testing.assert_array_equal(view.mask(pixels[:, :, 0] > 0), seen)


def test_boxes_are_clipped_and_outside_ones_lose_their_area():
    view = View(scaled=(40, 60), offset=(10, 10), size=(20, 20), factor_xy=(1, 1))
    boxes = view.boxes(np.array([[0, 0, 60, 40], [0, 0, 5, 5], [40, 35, 50, 39]]))
    assert boxes[0].tolist() == [0, 0, 20, 20]
    assert (boxes[1:, 2:] - boxes[1:, :2]).min(axis=1).tolist() == [0, 0]
    assert view.boxes(np.empty((0, 4))).shape == (0, 4)


def test_the_drawn_view_depends_on_the_generator_only_and_mirrors_as_asked():
    source = SourceConfig(batch_size=1, size=320, scale=(0.1, 2.0), ratio=1.0)

    def draw(seed: int, flip: float = 0.5) -> View:
        rng = np.random.default_rng(seed)
        return training_view(480, 640, source, flip_probability=flip, rng=rng)

    assert draw(3) == draw(3)
    views = [draw(seed) for seed in range(2000)]
    factors = np.array([view.factor_xy[0] for view in views]) / 0.5
    assert factors.min() == pytest.approx(0.1, abs=0.01)
    assert factors.max() == pytest.approx(2.0, abs=0.01)
    assert factors.mean() == pytest.approx(1.05, abs=0.05)
    assert np.mean([view.mirrored for view in views]) == pytest.approx(0.5, abs=0.05)
    assert not any(draw(seed, 0.0).mirrored for seed in range(50))
    assert all(draw(seed, 1.0).mirrored for seed in range(50))
