from collections.abc import Callable
from pathlib import Path
from typing import Any

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pytest
from detectron2.structures import BitMasks, PolygonMasks

from proxydet.data.images import View, scaled_crop
from proxydet.data.loader import Targets, make_instances
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError
from proxydet.vocabulary.vocabulary import Vocabulary

Write = Callable[[Any], Path]
CATEGORIES = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
WHOLE = View(scaled=(20, 30), offset=(0, 0), size=(20, 30), factor_xy=(1, 1))


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def entry(box: list[float], category: int = 1, **more: Any) -> dict[str, Any]:
    mask = [square(box[0], box[1], box[2])]
    return {
        "image_id": 1,
        "category_id": category,
        "bbox": box,
        "area": 1,
        "segmentation": mask,
        **more,
    }


def store_of(write_json: Write, *annotations: dict[str, Any]) -> AnnotationStore:
    image = {"id": 1, "file_name": "a", "height": 20, "width": 30}
    numbered = [{"id": number, **item} for number, item in enumerate(annotations)]
    path = write_json({"images": [image], "annotations": numbered, "categories": CATEGORIES})
    return AnnotationStore.open(path)


def targets(*, masks: bool = True, base: tuple[bool, bool] = (True, True)) -> Targets:
    return Targets(rows_K=np.array([1, 0]), base_C=np.array(base), masks=masks)


def make(store: AnnotationStore, view: View = WHOLE, goals: Targets | None = None) -> Any:
    goals = goals or targets()
    return make_instances(store, store.record(0), goals.usable(store), view, goals)


def test_boxes_classes_and_polygons_are_mapped(write_json):
    view = View(scaled=(40, 60), offset=(0, 10), size=(40, 50), factor_xy=(2, 2), mirrored=True)
    made = make(store_of(write_json, entry([10, 5, 6, 6], category=2)), view)
    assert made.image_size == (40, 50)
    assert made.gt_boxes.tensor.tolist() == [[28, 10, 40, 22]]
    assert made.gt_classes.tolist() == [0]
    assert isinstance(made.gt_masks, PolygonMasks)
    polygon = made.gt_masks.polygons[0][0].reshape(-1, 2)
    assert polygon.min(axis=0).tolist() == [28, 10]
    assert polygon.max(axis=0).tolist() == [40, 22]


def test_crowds_and_novel_classes_are_left_out(write_json):
    runs = {"counts": [0, 600], "size": [20, 30]}
    store = store_of(
        write_json,
        entry([1, 1, 5, 5], category=1),
        entry([1, 1, 5, 5], category=2),
        entry([0, 0, 30, 20], category=1, iscrowd=1, segmentation=runs),
    )
    made = make(store, goals=targets(base=(False, True)))
    assert made.gt_classes.tolist() == [1]
    assert isinstance(made.gt_masks, PolygonMasks)
    assert len(made.gt_masks) == 1


def test_an_image_without_objects_has_empty_fields(write_json):
    for store in (store_of(write_json), store_of(write_json, entry([1, 1, 5, 5], iscrowd=1))):
        made = make(store)
        assert len(made) == 0
        assert made.gt_boxes.tensor.shape == (0, 4)
        assert made.gt_classes.dtype.is_signed
        assert len(made.gt_masks) == 0


def test_what_is_outside_the_view_is_left_out(write_json: Write) -> None:
    # The second has its box, but none of its mask in the view.
    store = store_of(
        write_json,
        entry([20, 10, 5, 5]),
        entry([0, 0, 30, 20], segmentation=[square(20, 10, 5)]),
        entry([0, 0, 8, 8], category=2),
    )
    corner = View(scaled=(20, 30), offset=(0, 0), size=(9, 9), factor_xy=(1, 1))
    made = make(store, corner)
    assert made.gt_classes.tolist() == [0]
    assert len(made.gt_masks) == 1
    without_masks = make(store, corner, targets(masks=False))
    assert without_masks.gt_classes.tolist() == [1, 0]
    assert not without_masks.has("gt_masks")
    assert without_masks.gt_boxes.tensor.tolist()[0] == [0, 0, 9, 9]


def test_an_object_cut_by_the_crop_keeps_its_part(write_json):
    store = store_of(write_json, entry([5, 5, 10, 10]))
    made = make(store, View(scaled=(20, 30), offset=(0, 0), size=(8, 9), factor_xy=(1, 1)))
    assert made.gt_boxes.tensor.tolist() == [[5, 5, 9, 8]]
    target = made.gt_masks.crop_and_resize(made.gt_boxes.tensor, 4)
    assert target.all()


def test_objects_that_vanish_when_scaled_are_left_out(write_json):
    store = store_of(write_json, entry([29.999, 0, 0.001, 10]), entry([0, 0, 20, 20], category=2))
    view = scaled_crop(20, 30, size=3, scale_factor=0.01, crop_y=0, crop_x=0)
    made = make(store, view)
    assert view.size == (1, 1)
    assert made.gt_classes.tolist() == [0]


def test_run_lengths_make_the_image_bitmaps(write_json: Write) -> None:
    # Columns 0 to 4, all rows; mask of the polygon: a square of 6.
    runs = {"counts": [0, 100, 500], "size": [20, 30]}
    store = store_of(
        write_json,
        entry([0, 0, 5, 20], segmentation=runs),
        entry([10, 6, 6, 6], category=2),
        entry([25, 0, 5, 5], category=2),
    )
    view = View(scaled=(40, 60), offset=(10, 0), size=(30, 40), factor_xy=(2, 2), mirrored=True)
    made = make(store, view)
    assert isinstance(made.gt_masks, BitMasks)
    assert made.gt_masks.tensor.shape == (2, 30, 40)
    assert made.gt_classes.tolist() == [1, 0]
    first, second = made.gt_masks.tensor.numpy()
    assert first[:, 30:].all()
    assert not first[:, :30].any()
    assert second.sum() == 12 * 12
    assert second[2:14, 8:20].all()


@pytest.mark.parametrize("runs", [True, False])
def test_an_object_without_a_mask_keeps_its_box_beside_those_with(write_json, runs):
    other = {"counts": [0, 100, 500], "size": [20, 30]} if runs else [square(2, 2, 5)]
    store = store_of(
        write_json,
        entry([1, 1, 5, 5], segmentation=[]),
        entry([0, 0, 5, 20], category=2, segmentation=other),
        # In the view with its box, but not with its mask.
        entry([0, 0, 30, 20], segmentation=[square(20, 10, 5)]),
    )
    corner = View(scaled=(20, 30), offset=(0, 0), size=(9, 9), factor_xy=(1, 1))
    made = make(store, corner)
    assert made.gt_classes.tolist() == [1, 0]
    assert made.gt_masked.tolist() == [False, True]
    assert isinstance(made.gt_masks, BitMasks if runs else PolygonMasks)
    assert len(made.gt_masks) == 2
    cut = made.gt_masks.crop_and_resize(made.gt_boxes.tensor, 4)
    assert cut.flatten(1).any(dim=1).tolist() == [False, True]


def test_whether_masks_are_trained_depends_on_the_objects_to_train_on(write_json):
    bare = entry([1, 1, 5, 5], segmentation=[])
    of_novel = store_of(write_json, bare, entry([2, 2, 5, 5], category=2))
    names = [category["name"] for category in CATEGORIES]
    vocabulary = Vocabulary.from_arrays(names, np.eye(2), [True, False])
    assert not Targets.of(of_novel, vocabulary, "auto").masks
    everything = vocabulary.with_base(np.array([True, True]))
    assert Targets.of(of_novel, everything, "auto").masks
    assert not Targets.of(of_novel, everything, False).masks
    with pytest.raises(DataError, match="no masks"):
        Targets.of(of_novel, vocabulary, True)
