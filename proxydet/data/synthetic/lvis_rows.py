"""The drawn data set's objects and classes in LVIS's words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxydet.data.synthetic.attributes import ShapeClass
    from proxydet.data.synthetic.scenes import SceneObject


def annotation_row(entry: SceneObject, image_id: int, annotation_id: int) -> dict[str, Any]:
    """Return an object as LVIS's annotation."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": entry.class_index + 1,
        "bbox": list(entry.box_xywh),
        "area": entry.area,
        "segmentation": entry.polygons,
    }


def count_objects(annotations: list[dict[str, Any]]) -> tuple[Counter[int], Counter[int]]:
    """Count instances and images of each category id."""
    instances = Counter(a["category_id"] for a in annotations)
    images = Counter(
        category for category, _ in {(a["category_id"], a["image_id"]) for a in annotations}
    )
    return instances, images


def category_rows(
    classes: Sequence[ShapeClass], instances: Counter[int], images: Counter[int]
) -> list[dict[str, Any]]:
    """Return the classes as LVIS's categories; counts are by category id."""
    return [
        {
            "id": index + 1,
            "name": c.name,
            "synonyms": [c.name, f"{c.texture} {c.colour} {c.shape}"],
            "synset": c.synset,
            "def": f"a {c.shape}, {c.colour}, {c.texture}",
            "frequency": c.frequency,
            "image_count": images[index + 1],
            "instance_count": instances[index + 1],
        }
        for index, c in enumerate(classes)
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
