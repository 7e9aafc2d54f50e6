"""Pictures that a user sees: what is drawn where, and that labels can be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from proxydet.errors import ConfigError
from proxydet.visualization.drawing import (
    COLOURS,
    DrawingStyle,
    DrawnObject,
    LabelRequest,
    contact_sheet,
    draw_objects,
    instance_colours,
    letters_for,
    overlaps,
    place_labels,
    relative_luminance,
    text_colour_on,
)

GREY = Image.new("RGB", (600, 500), (128, 128, 128))
BARE = DrawingStyle(labels=False, masks=False)


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return np.any(np.asarray(before) != np.asarray(after), axis=2)


def test_objects_of_one_image_are_told_apart():
    found = instance_colours([(0.0, 0.0, 9.0, 9.0)] * len(COLOURS))
    between = np.linalg.norm(np.array(found)[:, None] - np.array(found)[None], axis=-1)
    assert between[np.triu_indices(len(found), 1)].min() >= 50
    # Of a crowd, each differs from those around it.
    crowd = [
        (30.0 * x, 30.0 * y, 30.0 * x + 40, 30.0 * y + 40) for y in range(8) for x in range(12)
    ]
    grid = np.array(instance_colours(crowd)).reshape(8, 12, 3)
    assert (grid[1:] != grid[:-1]).any(axis=-1).all()
    assert (grid[:, 1:] != grid[:, :-1]).any(axis=-1).all()
    assert (grid[1:, 1:] != grid[:-1, :-1]).any(axis=-1).all()


def test_two_objects_of_a_class_get_two_colours_and_a_given_one_is_kept():
    boxes = [(50, 50, 100, 100), (200, 50, 250, 100), (400, 50, 450, 100)]
    given = [None, None, (1, 2, 3)]
    items = [
        DrawnObject(label="dog", box_xyxy=box, colour=colour)
        for box, colour in zip(boxes, given, strict=True)
    ]
    drawn = np.asarray(draw_objects(GREY, items, BARE))
    assert [tuple(drawn[75, box[0]]) for box in boxes] == [*COLOURS[:2], (1, 2, 3)]


@pytest.mark.parametrize("background", COLOURS)
def test_text_on_any_colour_contrasts(background):
    lights = sorted(
        (relative_luminance(background), relative_luminance(text_colour_on(background)))
    )
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def test_a_box_is_drawn_where_it_is():
    item = DrawnObject(label="dog", box_xyxy=(100, 150, 300, 400), score=0.5)
    where = changed(GREY, draw_objects(GREY, [item], BARE))
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    assert (columns[0], columns[-1]) == (99, 301)
    assert (rows[0], rows[-1]) == (149, 401)
    assert not where[200:350, 150:250].any()


def test_a_mask_tints_its_pixels_only():
    mask = np.zeros((500, 600), bool)
    mask[100:300, 200:350] = True
    item = DrawnObject(label="dog", box_xyxy=(200, 100, 350, 300), mask_HW=mask)
    style = DrawingStyle(labels=False, boxes=False, mask_opacity=0.5)
    drawn = draw_objects(GREY, [item], style)
    np.testing.assert_array_equal(changed(GREY, drawn), mask)
    middle = np.asarray(drawn)[200, 275].astype(float)
    np.testing.assert_allclose(middle, (np.array(COLOURS[0]) + 128) / 2, atol=1.5)


def test_a_mask_of_another_size_is_refused():
    item = DrawnObject(label="dog", box_xyxy=(0, 0, 9, 9), mask_HW=np.ones((10, 10), bool))
    with pytest.raises(ConfigError, match="10 x 10"):
        draw_objects(GREY, [item])


def test_the_given_picture_is_left_alone():
    picture = Image.new("RGB", (600, 500), (10, 20, 30))
    before = picture.tobytes()
    draw_objects(picture, [DrawnObject(label="a", box_xyxy=(5, 5, 90, 90), score=1.0)])
    assert picture.tobytes() == before


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((160, 128), (640, 512)),
        ((1, 1), (8, 8)),
        ((4000, 30), (4000, 30)),
        ((640, 480), (640, 480)),
    ],
)
def test_small_pictures_are_enlarged(size, expected):
    item = DrawnObject(label="a long class name", box_xyxy=(0, 0, size[0], size[1]), score=0.9)
    assert draw_objects(Image.new("RGB", size), [item]).size == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_are_drawn_on(mode):
    item = DrawnObject(label="a", box_xyxy=(5, 5, 90, 90))
    assert draw_objects(Image.new(mode, (600, 500)), [item]).mode == "RGB"


@pytest.mark.parametrize("name", ["犬", "собака", "σκύλος", "a\nb\x00", "x" * 400, "…"])
def test_names_of_any_kind_are_written(name):
    item = DrawnObject(label=name, box_xyxy=(50, 50, 90, 90), score=0.5)
    style = DrawingStyle(boxes=False)
    assert changed(GREY, draw_objects(GREY, [item], style)).any()


def test_a_bad_font_file_is_named(tmp_path):
    bad = tmp_path / "no.ttf"
    bad.write_text("no font")
    item = DrawnObject(label="a", box_xyxy=(5, 5, 90, 90))
    with pytest.raises(ConfigError, match=r"no\.ttf"):
        draw_objects(GREY, [item], DrawingStyle(font_file=bad))


boxes = st.tuples(st.floats(0, 500), st.floats(0, 400), st.floats(1, 200), st.floats(1, 200)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes, min_size=1, max_size=12))
@example([(0.0, 0.0, 1.0, 1.0)] * 7)
@example([(500.0, 400.0, 640.0, 480.0)] * 12)
def test_labels_stay_in_the_picture_and_apart(where):
    requests = [LabelRequest(box, 80, 18) for box in where]
    places = place_labels(requests, (640, 480))
    assert len(places) == len(where)
    for place in places:
        assert place[0] >= 0
        assert place[1] >= 0
        assert place[2] <= 640
        assert place[3] <= 480
    covered = np.triu(overlaps(np.array(places), np.array(places)), k=1).sum()
    assert covered <= 0.2 * len(where) * 80 * 18


def test_labels_of_boxes_side_by_side_do_not_touch():
    row = [LabelRequest((20.0 + 60 * i, 100, 70.0 + 60 * i, 200), 90, 18) for i in range(6)]
    places = place_labels(row, (640, 480))
    assert np.triu(overlaps(np.array(places), np.array(places)), k=1).sum() == 0


def test_the_first_label_gets_the_first_choice():
    (place,) = place_labels([LabelRequest((100, 100, 200, 200), 50, 10)], (640, 480))
    assert place == (100, 90, 150, 100)


def test_a_sheet_holds_all_pictures():
    pictures = [Image.new("RGB", (40, 20), (250, 0, 0)) for _ in range(5)]
    sheet = contact_sheet(pictures, columns=3, cell=60)
    assert sheet.size == (3 * 68 + 8, 2 * 38 + 8), "a row is as high as its pictures"
    assert (np.asarray(sheet) == (250, 0, 0)).all(axis=2).sum() == 5 * 60 * 30


@pytest.mark.parametrize(
    ("shortest", "letters"), [(64, 11), (480, 16), (1440, 48), (2160, 48), (9000, 200)]
)
def test_letters_fit_the_picture(shortest, letters):
    assert letters_for((shortest * 4 // 3, shortest)) == letters


def test_labels_of_a_large_picture_can_be_read_on_a_screen():
    """Shown a thousand pixels wide, the label is at least 14 pixels high."""
    picture = Image.new("RGB", (6000, 4000))
    drawn = draw_objects(
        picture, [DrawnObject(label="cup", box_xyxy=(2000, 2000, 3000, 3000), score=0.5)]
    )
    column = np.asarray(drawn)[:1990, 2030].astype(int)
    ground = np.all(np.abs(column - COLOURS[0]) < 40, axis=1)
    assert ground.sum() > 14 * 6


def test_a_sheet_of_wide_and_high_pictures():
    wide, high = Image.new("RGB", (40, 20), (250, 0, 0)), Image.new("RGB", (20, 40), (0, 250, 0))
    sheet = np.asarray(contact_sheet([wide, high, wide], columns=2, cell=60))
    assert sheet.shape[:2] == (8 + 60 + 8 + 30 + 8, 2 * 68 + 8)
    red = (sheet == (250, 0, 0)).all(axis=2)
    assert np.flatnonzero(red.any(axis=1)).tolist() == [*range(23, 53), *range(76, 106)]


def test_a_label_that_the_edge_would_push_over_its_box_goes_inside():
    (place,) = place_labels([LabelRequest((100, 4, 200, 100), 50, 10)], (640, 480))
    assert place == (100, 4, 150, 14)


def test_a_label_rather_covers_its_own_box_than_another():
    above, own = (90.0, 50.0, 210.0, 99.0), (100.0, 100.0, 200.0, 200.0)
    place, _ = place_labels([LabelRequest(own, 50, 10), LabelRequest(above, 50, 10)], (640, 480))
    assert place == (100, 100, 150, 110)


def test_a_label_is_rather_far_from_its_box_than_over_another_label():
    requests = [LabelRequest((100, 100, 160, 180), 80, 18)] * 25
    places = np.array(place_labels(requests, (640, 300)))
    assert np.triu(overlaps(places, places), k=1).sum() == 0
