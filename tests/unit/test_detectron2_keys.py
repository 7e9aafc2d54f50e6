"""A configuration of detectron2 or Detic is refused wherever one of ours is read, with our key for each of its own."""

from __future__ import annotations

import pytest

from proxydet.config import load_mapping
from proxydet.errors import ConfigError

DETIC = """
_BASE_: "Base-C2_L_R5021k_640b64_4x.yaml"
MODEL:
  WEIGHTS: "models/BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth"
  ROI_BOX_HEAD: {USE_ZEROSHOT_CLS: True, IMAGE_LABEL_LOSS: 'max_size', NOT_KNOWN_HERE: 1}
SOLVER: {MAX_ITER: 90000, BASE_LR: 0.0002, CLIP_GRADIENTS: {ENABLED: True}}
DATASETS:
  TRAIN: ("lvis_v1_train_norare", "imagenet_lvis_v1")
WITH_IMAGE_LABELS: True
"""
WANTED = {
    "_BASE_": "recipe",
    "MODEL.WEIGHTS": "training.weights (--weights)",
    "MODEL.ROI_BOX_HEAD.IMAGE_LABEL_LOSS": "none; it is max-size",
    "MODEL.ROI_BOX_HEAD.NOT_KNOWN_HERE": "none",
    "SOLVER.MAX_ITER": "training.iterations",
    "SOLVER.CLIP_GRADIENTS": "training.optimizer.clip_value",
    "DATASETS.TRAIN": "[train] of a dataset config",
    "WITH_IMAGE_LABELS": "data.image_labels",
}


@pytest.fixture
def detic(tmp_path):
    path = tmp_path / "detic.yaml"
    path.write_text(DETIC)
    return path


def test_each_of_its_keys_is_answered(detic):
    with pytest.raises(
        ConfigError, match=r"detic\.yaml is a configuration of detectron2"
    ) as caught:
        load_mapping(detic)
    rows = dict(line.strip().split(": ", 1) for line in caught.value.message.splitlines()[1:])
    assert len(rows) == 10
    for key, ours in WANTED.items():
        assert rows[key].startswith(ours), key


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "pets.toml", "--config"],
        ["predict", "photo.jpg", "-v", "cat", "--weights", "model.safetensors", "--config"],
    ],
    ids=["train", "predict"],
)
def test_commands_refuse_it_before_anything_is_loaded(cli, detic, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = cli(*words, str(detic))
    assert done.code == 3
    assert "SOLVER.MAX_ITER: training.iterations" in done.err


def test_a_configuration_of_ours_is_none_of_theirs(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text("recipe: small\nmodel: {mixup_branch: false}\n")
    assert load_mapping(path)["recipe"] == "small"
