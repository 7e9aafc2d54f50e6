"""Predictions saved for correction: annotation tools' formats, read back by our own readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from proxydet.data.check import check_path
from proxydet.data.formats.label_studio import decode_brush, encode_brush
from proxydet.data.sources import look
from proxydet.data.store import AnnotationStore
from proxydet.detections import Detections
from proxydet.inference.jobs import ImageResult
from proxydet.inference.sources import ImageFile, SourceImage
from proxydet.inference.writers import make_writers
from proxydet.modeling.postprocess import Prediction

NAMES = ("cup & saucer", 'a "plate"', "fork: small")
PLACES = {"yolo": "yolo", "voc": "voc", "labelstudio": "labelstudio.json", "coco": "coco.json"}
SIZE = (90, 120)
Box = tuple[float, float, float, float]


def detections(
    boxes: list[Box], *, masks: bool = False, size: tuple[int, int] = SIZE
) -> Detections:
    count = len(boxes)
    prediction = Prediction(
        boxes_N4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores_N=torch.linspace(0.9, 0.4, count),
        classes_N=torch.arange(count) % len(NAMES),
        mask_probs_MSS=torch.ones(count, 28, 28) if masks else None,
        mask_index_N=torch.arange(count) if masks else torch.full((count,), -1),
        image_size=size,
    )
    return Detections(prediction, NAMES)


def save(kind: str, folder: Path, found: dict[str, Detections]) -> Path:
    photos = folder / "photos"
    (writer,) = make_writers([kind], folder / "out", NAMES)
    for stem, each in found.items():
        path = photos / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((*each.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        result = ImageResult(
            image=ImageFile(SourceImage(str(path)), Path(stem)), pixels=pixels, found=each
        )
        writer.add(result, writer.prepare(result))
    assert all(path.exists() for path in writer.finish())
    return folder / "out" / PLACES[kind]


def stored(place: Path, cache: Path) -> AnnotationStore:
    photos = [cache.parent / "photos"] if place.is_file() else []
    ((_, source),) = look(place, photos).parts.items()
    return AnnotationStore.open(source, cache=cache, warn=False)


def boxes_of(store: AnnotationStore) -> list[tuple[str, list[float]]]:
    rows = zip(store.column("category").tolist(), store.column("box").tolist(), strict=True)
    return [(store.categories[category].name, box) for category, box in rows]


@pytest.mark.parametrize("kind", PLACES)
def test_saved_predictions_are_sound_annotations(kind, tmp_path):
    found = {
        "desk": detections([(2, 3, 60, 41), (10.25, 0, 119.5, 90), (70, 50, 75, 80)]),
        "sub/desk": detections([(1, 1, 5, 5)]),
        "nothing": detections([]),
    }
    place = save(kind, tmp_path, found)
    store = stored(place, tmp_path / "c")
    assert len(store) == 3
    tolerance = 0.51 if kind == "voc" else 1e-3
    expected = [
        (item.label, item.box_xyxy)
        for stem in ("desk", "nothing", "sub/desk")
        for item in found[stem]
    ]
    by_image = sorted(
        (Path(store.file_name(int(image))).stem, row)
        for row, image in enumerate(store.column("image").tolist())
    )
    read = [boxes_of(store)[row] for _, row in by_image]
    assert sorted(label for label, _ in read) == sorted(label for label, _ in expected)
    for label, box in expected:
        assert any(
            name == label and np.allclose(box, other, atol=tolerance) for name, other in read
        ), (label, box, read)
    assert not store.has_masks
    if kind != "coco":  # whose images lie where they were
        (report, *_) = (
            check_path(tmp_path / "out" / PLACES[kind], cache=tmp_path / "c")
            if kind != "labelstudio"
            else check_path(tmp_path, cache=tmp_path / "c")
        )
        assert report.sound, report.findings


@pytest.mark.parametrize("kind", ["yolo", "labelstudio"])
def test_masks_come_back(kind, tmp_path):
    found = detections([(2, 3, 60, 41), (10, 20, 110, 90)], masks=True)
    place = save(kind, tmp_path, {"desk": found})
    store = stored(place, tmp_path / "c")
    assert store.has_masks
    from proxydet.data.masks import decode, rasterize

    for row, mask_HW in enumerate(found.masks):
        counts = store.rle(row) or rasterize(store.polygons(row), SIZE)
        back_HW = decode(counts, SIZE)
        union = (back_HW | mask_HW).sum()
        least = 1.0 if kind == "labelstudio" else 0.98
        assert (back_HW & mask_HW).sum() >= least * union


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["yolo", "voc", "labelstudio", "coco"]))
def test_any_box_comes_back_within_the_formats_precision(data, kind, tmp_path_factory):
    height, width = data.draw(st.tuples(st.integers(2, 4000), st.integers(2, 4000)))
    corner = st.floats(0, 1, allow_subnormal=False, width=32)
    fractions = data.draw(
        st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4)
    )
    boxes = [
        (min(a, c) * width, min(b, d) * height, max(a, c) * width, max(b, d) * height)
        for a, b, c, d in fractions
    ]
    boxes = [b for b in boxes if b[2] - b[0] >= 1 and b[3] - b[1] >= 1]
    if not boxes:
        return
    folder = tmp_path_factory.mktemp("set")
    found = detections(boxes, size=(height, width))
    store = stored(save(kind, folder, {"desk": found}), folder / "c")
    tolerance = 0.502 if kind == "voc" else 1.5e-6 * max(height, width) + 1e-3
    for (label, box), item in zip(boxes_of(store), found, strict=True):
        assert label == item.label
        np.testing.assert_allclose(box, item.box_xyxy, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 10),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_brush_strokes_come_back(size, seed, share):
    mask_HW = np.random.default_rng(seed).random(size) < share
    values = encode_brush(mask_HW)
    back_HW = decode_brush(values, size)
    assert back_HW is not None
    assert np.array_equal(back_HW, mask_HW)
    assert decode_brush(values[: len(values) // 2], size) is None
    assert decode_brush(values, (size[0] + 1, size[1])) is None


def test_labeling_interface_and_tasks_fit_each_other(tmp_path):
    import xml.etree.ElementTree as ElementTree

    found = detections([(2, 3, 60, 41), (10, 20, 110, 90)])
    (task,) = json.loads(save("labelstudio", tmp_path, {"desk": found}).read_text())
    view = ElementTree.parse(tmp_path / "out" / "labelstudio.xml").getroot()
    controls = {tag.get("name"): [label.get("value") for label in tag] for tag in view}
    for region in task["predictions"][0]["result"]:
        assert controls[region["from_name"]] == list(NAMES)
        assert region["to_name"] in controls
    assert task["data"]["image"].endswith("photos/desk.png")


def test_writing_again_harms_no_photograph(tmp_path):
    save("yolo", tmp_path, {"a": detections([(1, 1, 9, 9)])})
    first = tmp_path / "photos" / "a.png"
    kept = tmp_path / "kept.png"
    first.rename(kept)
    before = kept.read_bytes()
    save("yolo", tmp_path, {"a": detections([(1, 1, 9, 9)], size=(50, 60))})
    assert kept.read_bytes() == before
    with Image.open(tmp_path / "out" / "yolo" / "images" / "a.png") as image:
        assert image.size == (60, 50)
    # Run on the set itself: its images stay.
    (writer,) = make_writers(["yolo"], tmp_path / "out", NAMES)
    path = tmp_path / "out" / "yolo" / "images" / "a.png"
    found = detections([(1, 1, 9, 9)], size=(50, 60))
    pixels = np.zeros((50, 60, 3), dtype=np.uint8)
    result = ImageResult(
        image=ImageFile(SourceImage(str(path)), Path("a")), pixels=pixels, found=found
    )
    writer.add(result, writer.prepare(result))
    assert path.exists()


def test_where_links_cannot_be_made_images_are_copied(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", link)
    place = save("voc", tmp_path, {"a": detections([(1, 1, 9, 9)])})
    image = place / "JPEGImages" / "a.png"
    assert image.read_bytes() == (tmp_path / "photos" / "a.png").read_bytes()
    assert not image.samefile(tmp_path / "photos" / "a.png")
