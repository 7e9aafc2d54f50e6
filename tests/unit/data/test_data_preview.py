import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.images import read_image
from proxydet.data.preview import PreviewRequest, preview_images, write_preview
from proxydet.data.sources import open_config
from proxydet.errors import ConfigError, DataError, VocabularyError

pytestmark = pytest.mark.usefixtures("unplotted")


def described(path: Path) -> Dataset:
    return Dataset(config=DatasetConfig.from_toml(path))


def test_annotated_images_are_drawn(small_set):
    request = PreviewRequest(count=20)
    images = preview_images(described(small_set), request)
    assert sorted(p.caption for p in images) == [
        "1.png: 0 annotations",
        "2.png: 1 annotation",
        "3.png: 2 annotations",
        "4.png: 3 annotations",
        "5.png: 0 annotations",
        "6.png: 1 annotation",
    ]
    again = preview_images(described(small_set), request)
    assert [p.caption for p in again] == [p.caption for p in images]
    other = preview_images(described(small_set), PreviewRequest(count=20, seed=1))
    assert [p.caption for p in other] != [p.caption for p in images]
    by_name = {p.caption[:5]: np.asarray(p.image).astype(int) for p in images}
    source = read_image(small_set.parent / "train" / "6.png").astype(int)
    scale = by_name["6.png"].shape[0] // source.shape[0]
    difference = np.abs(by_name["6.png"][::scale, ::scale] - source)
    assert difference.max() > 60, "nothing was drawn"


def test_images_of_one_class(small_set):
    request = PreviewRequest(class_name="dog")
    captions = [p.caption for p in preview_images(described(small_set), request)]
    assert sorted(captions) == ["3.png: 2 annotations", "4.png: 3 annotations"]
    with pytest.raises(VocabularyError, match=r"'dogg' is not a class .* mean 'dog'"):
        preview_images(described(small_set), PreviewRequest(class_name="dogg"))
    with pytest.raises(DataError, match="no image with 'bird' on it in val"):
        preview_images(described(small_set), PreviewRequest(split="val", class_name="bird"))


def test_a_part_that_is_not_there_is_named_with_what_to_do(small_set):
    """Of annotations alone the hint does not speak of a dataset config."""
    alone = Dataset(config=open_config(small_set.parent / "train.json"))
    with pytest.raises(DataError, match=r"'train' .* val") as caught:
        preview_images(alone, PreviewRequest(split="val"))
    assert "dataset config" not in (caught.value.hint or "")
    text = small_set.read_text()
    small_set.write_text(text[: text.index("[val]")])
    with pytest.raises(DataError, match=r"\[val\]") as caught:
        preview_images(described(small_set), PreviewRequest(split="val"))
    assert "train" in (caught.value.hint or "")


def test_masks_are_filled_polygons_and_run_lengths(small_set):
    from proxydet.data.preview import annotated_objects

    annotations = small_set.parent / "train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["segmentation"] = {"counts": [0, 40, 2360], "size": [40, 60]}
    content["annotations"][1] |= {"iscrowd": 1}
    annotations.write_text(json.dumps(content))
    data = described(small_set)
    store, vocabulary = data.store("train"), data.vocabulary
    (first,) = annotated_objects(store, store.record(1), vocabulary)
    assert callable(first.mask_HW)
    assert first.mask_HW().sum() == 40
    crowd, novel = annotated_objects(store, store.record(2), vocabulary)
    assert (crowd.label, novel.label) == ("cat (crowd)", "dog (novel)")
    assert callable(novel.mask_HW)
    area = store.column("area")[store.record(2).first_annotation + 1]
    assert abs(novel.mask_HW().sum() - area) < 0.25 * area


def test_what_training_sees(small_set_with_labels):
    request = PreviewRequest(augmented=True, count=9)
    captions = [p.caption for p in preview_images(described(small_set_with_labels), request)]
    assert len(captions) == 9
    assert any(" object" in caption for caption in captions)
    assert any("tar/" in caption and caption.endswith((": dog", ": bird")) for caption in captions)


def test_what_training_sees_of_boxes_without_masks(small_set):
    annotations = small_set.parent / "train.json"
    annotations.write_text(annotations.read_text().replace('"segmentation"', '"outline"'))
    images = preview_images(described(small_set), PreviewRequest(augmented=True, count=6))
    assert any(" object" in image.caption for image in images)


def test_a_sheet_or_a_page_is_written(small_set, tmp_path):
    sheet = write_preview(described(small_set), tmp_path / "out" / "s.png", PreviewRequest(count=3))
    with Image.open(sheet) as image:
        assert image.width > 1000
    page = write_preview(described(small_set), tmp_path / "p.html", PreviewRequest(count=2))
    text = page.read_text()
    assert text.count("<svg") == 2
    assert text.count("data:image/") == 2
    assert "2 of 2" in text
    assert "mathdefault" not in text
    for name in ("s.xyz", "s.gif"):
        with pytest.raises(DataError, match=r"'\.(xyz|gif)'"):
            write_preview(described(small_set), tmp_path / name, PreviewRequest())


@pytest.mark.parametrize("choice", [{"split": "val"}, {"class_name": "dog"}])
def test_what_training_sees_is_not_chosen(choice):
    with pytest.raises(ConfigError, match="--augmented"):
        PreviewRequest(augmented=True, **choice)


def test_the_page_of_annotations_alone_names_no_command_that_needs_embeddings(small_set, tmp_path):
    file = small_set.parent / "train.json"
    roots = [small_set.parent / "train"]
    data = Dataset(config=open_config(file, roots))
    page = write_preview(data, tmp_path / "p.html", PreviewRequest(count=2), named=file).read_text()
    assert "proxydet data check" in page
    assert "proxydet train" not in page
    assert "proxydet eval" not in page


def test_the_page_goes_on_with_the_description_itself(small_set, tmp_path):
    folder = small_set.parent
    named = folder / "my set.toml"
    text = small_set.read_text()
    start, end = text.index("[train]"), text.index("[val]")
    named.write_text(text[:start] + text[end:])  # as Objects365 and OpenImages: evaluation only
    page = write_preview(
        described(named), tmp_path / "p.html", PreviewRequest(split="val", count=1), named=named
    ).read_text()
    assert "proxydet eval --run runs/RUN --data" in page
    assert "my set.toml" in page
    assert "proxydet train" not in page
