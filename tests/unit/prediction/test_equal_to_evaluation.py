"""Evaluation, the Python API and the saved files say the same, bit for bit, at equal settings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from shape_detector import random_network

from proxydet import evaluate
from proxydet.data.images import read_image
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.split import DescribedSplit
from proxydet.inference.jobs import predict_files
from proxydet.inference.sources import find_images
from proxydet.inference.writers import make_writers

pytestmark = pytest.mark.usefixtures("unplotted")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    config = SyntheticConfig(images_train=2, images_val=4, image_label_images_per_class=1)
    return make_dataset(tmp_path_factory.mktemp("drawn"), config)


@pytest.fixture(scope="module")
def split(drawn) -> DescribedSplit:
    return DescribedSplit.open(drawn)


@pytest.fixture(scope="module")
def eyes(split) -> Detector:
    """A random detector of the drawn set's classes, which finds a lot."""
    return Detector(random_network(split.data.vocabulary), shortest=96, longest=160)


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_evaluation_predicts_what_a_user_gets(eyes, drawn, split, tmp_path, augmented):
    detector = eyes.with_settings(flip=True) if augmented else eyes
    evaluate(detector, drawn, output=tmp_path, config=EvaluationConfig(bootstrap=0))
    rows = json.loads((tmp_path / "predictions.json").read_text())
    by_image: dict[int, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["image_id"], []).append(row)
    ids = [category.id for category in split.store.categories]
    assert len(rows) > 100
    for index, image_id in enumerate(split.store.image_ids):
        found = detector.predict(
            split.read(index),
            score_threshold=detector.inference.score_threshold,
            max_detections=detector.inference.max_detections,
            one_label=False,
        )
        theirs = by_image.pop(image_id, [])
        ours = found.to_coco(image_id, ids)
        for field in ("score", "category_id", "segmentation"):
            assert [row[field] for row in theirs] == [row[field] for row in ours], field
        corners = found.boxes_xyxy
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        assert [row["bbox"] for row in theirs] == boxes.tolist()
    assert by_image == {}


def test_saved_pictures_and_json_say_what_python_says(eyes, drawn, tmp_path):
    images = find_images([drawn.parent / "val"])
    predict_files(
        eyes,
        images,
        vocabulary=eyes.vocabulary,
        settings=eyes.settings(score_threshold=0.1, max_detections=5),
        batch_size=1,
        writers=make_writers(["images", "json"], tmp_path, eyes.vocabulary.names),
    )
    for picture in images:
        found = eyes.predict(picture.path, score_threshold=0.1, max_detections=5, one_label=False)
        assert len(found) == 5
        content = json.loads((tmp_path / f"{picture.name}.json").read_text())
        assert content == json.loads(json.dumps({"file": str(picture.path), **found.to_dict()}))
        saved = io.BytesIO()
        found.draw(read_image(picture.path)).save(saved, "JPEG", quality=92, subsampling=0)
        assert (tmp_path / f"{picture.name}.jpg").read_bytes() == saved.getvalue()
