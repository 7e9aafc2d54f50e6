"""The keys of an evaluation's JSON are those that the reference documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("unplotted")

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/results.md"
# Keys that are names of something, by where they are.
OPEN = {
    "results": "TYPE",
    "counts.without_area": "TYPE",
    "results.TYPE.metrics": "NAME",
    "results.TYPE.intervals": "NAME",
    "analysis.errors.counts": "KIND",
    "analysis.errors.costs": "KIND",
}


def key_paths(value: Any, where: str = "") -> Iterator[str]:
    """Every leaf's place, names of things written as what they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = OPEN.get(where, key)
            yield from key_paths(item, f"{where}.{name}" if where else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            yield from key_paths(item, f"{where}[]")
    else:
        yield where


def documented(section: str) -> set[str]:
    text = PAGE.read_text(encoding="utf-8")
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", part, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture
def files(tmp_path) -> Path:
    """Two results files of a data set with a rare class."""
    box = [10.0, 10.0, 20.0, 20.0]
    mask = [[10, 10, 30, 10, 30, 30, 10, 30]]
    images = [
        {"id": index, "height": 64, "width": 64, "neg_category_ids": [2]} for index in range(1, 9)
    ]
    annotations = [
        {"image_id": index, "category_id": 1, "bbox": box, "area": 400, "segmentation": mask}
        for index in range(1, 9)
    ]
    categories = [
        {"id": 1, "name": "kite", "frequency": "r"},
        {"id": 2, "name": "dog", "frequency": "f"},
    ]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(truth))
    for name, step in (("a", 2), ("b", 3)):
        rows = [
            {"image_id": index, "category_id": 1, "score": 0.5, "bbox": box, "segmentation": mask}
            for index in range(1, 9, step)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def evaluate(files, monkeypatch, cli):
    monkeypatch.chdir(files)
    return lambda *words: (
        cli("eval", *words, "--data", "val.json", "--bootstrap", 20, "--json").data
    )


def test_results_and_the_table_have_the_documented_keys_and_columns(files, evaluate):
    assert set(key_paths(evaluate("--results", "a.json", "-o", "out"))) == documented(
        "results.json"
    )
    header = (files / "out" / "per_category.csv").read_text().splitlines()[0]
    part = PAGE.read_text(encoding="utf-8").split("\n## per_category.csv\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    assert header.split(",") == [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_comparisons_have_the_documented_keys(evaluate):
    shown = evaluate("--compare", "a.json", "b.json")
    found = {
        f"TYPE{path.removeprefix(kind)}"
        for kind in shown
        for path in key_paths({kind: shown[kind]})
    }
    assert found == documented("proxydet eval --compare --json")
