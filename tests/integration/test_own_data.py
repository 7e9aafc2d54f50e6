"""From an export to a detector and back to annotations, by the commands that ``data init`` prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unplotted")]


def write_photographs(folder: Path, count: int) -> None:
    """Write photographs with labelme's files, each with an apple or a pear."""
    folder.mkdir()
    for index in range(count):
        x, y, side = 8 + 4 * index, 6 + 3 * index, 30
        pixels = np.full((64, 96, 3), 200, np.uint8)
        pixels[y : y + side, x : x + side] = (220, 40, 40 * index)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        outline = [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
        shape = {"label": ("apple", "pear")[index % 2], "points": outline, "shape_type": "polygon"}
        content = {
            "version": "5",
            "shapes": [shape],
            "imagePath": f"{index}.png",
            "imageHeight": 64,
            "imageWidth": 96,
        }
        (folder / f"{index}.json").write_text(json.dumps(content))


def test_an_export_is_trained_on_predicted_and_corrected(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    write_photographs(tmp_path / "my fruit", 5)
    begun = cli("data", "init", "my fruit", "--closed", "--json")
    assert begun.code == 0, begun.err
    check, train = (shlex.split(line)[1:] for line in begun.data["commands"])
    checked = cli(*check)
    assert checked.code == 0, checked.out
    train[train.index("small")] = "tiny"
    fewer = ("--set", "training.iterations=2", "--set", "data.image_labels=null", "--device", "cpu")
    trained = cli(*train, *fewer, "--gpus", "1")
    assert trained.code == 0, trained.err
    run = train[train.index("--output") + 1]
    scored = cli("eval", "--run", run, "--device", "cpu", "--bootstrap", "0", "--json")
    assert scored.code == 0, scored.err
    predict = ("predict", "my fruit", "--run", run, "--device", "cpu", "--score-threshold", "0")
    found = cli(*predict, "--top", "3", "--save", "yolo,voc,labelstudio,coco", "-o", "found")
    assert found.code == 0, found.err
    for place in ("yolo", "voc", "labelstudio.json", "coco.json"):
        name = f"{place.split('.')[0]}.toml"
        images = ("--images", "my fruit") if place.endswith("json") else ()
        again = cli("data", "init", f"found/{place}", "-o", name, "--closed", "--json", *images)
        assert again.code == 0, (place, again.err)
        assert sum(part["images"] for part in again.data["parts"].values()) == 5
        assert cli("data", "check", name).code == 0
