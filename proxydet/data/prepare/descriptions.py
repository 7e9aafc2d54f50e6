"""Data descriptions for the published layout of a data root."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from proxydet.data.prepare.json_files import replacing

MARK = "# Written by `proxydet data prepare`. Remove this line to keep your changes."

_LVIS = """
name = "lvis"

[vocabulary]
embeddings = "metadata/lvis_v1_clip_a+cname.npy"
encoder = "ViT-B/32"
novel_frequency = ["r"]

[train]
annotations = "lvis/lvis_v1_train.json"
images = "coco"

[val]
annotations = "lvis/lvis_v1_val.json"
images = "coco"
"""

_IMAGE_LABELS = """
[image_labels]
tars = "imagenet/ImageNet-21K"
"""

_COCO = """
name = "coco"

[vocabulary]
embeddings = "metadata/coco_clip_a+cname.npy"
encoder = "ViT-B/32"

[train]
annotations = "coco/annotations/instances_train2017.json"
images = "coco/train2017"

[val]
annotations = "coco/annotations/instances_val2017.json"
images = "coco/val2017"
"""

_COCO_ZERO_SHOT = """
name = "coco-zero-shot"

# COCO's 80 classes: 48 to train on, 17 unseen (novel below), 15 that have no annotations here.
[vocabulary]
embeddings = "metadata/coco_clip_a+cname.npy"
encoder = "ViT-B/32"
novel = [{novel}]

[train]
annotations = "coco/zero-shot/instances_train2017_seen_2_oriorder.json"
images = "coco/train2017"

[val]
annotations = "coco/zero-shot/instances_val2017_all_2_oriorder.json"
images = "coco/val2017"
"""

_OBJECTS365 = """
name = "objects365"

[vocabulary]
embeddings = "metadata/o365_clip_a+cnamefix.npy"
encoder = "ViT-B/32"

[val]
annotations = "objects365/annotations/zhiyuan_objv2_val_fixname.json"
images = "objects365/val"
"""

_OPENIMAGES = """
name = "openimages"

[vocabulary]
embeddings = "metadata/oid_clip_a+cname.npy"
encoder = "ViT-B/32"

[val]
annotations = "oid/annotations/oid_challenge_2019_val_expanded.json"
images = "oid/images/validation"
"""


def description_text(name: str, *, image_labels: bool = False, novel: tuple[str, ...] = ()) -> str:
    """Return the data description of a published data set, with paths relative to the data root.

    Args:
        name: ``lvis``, ``coco``, ``coco_zero_shot``, ``objects365`` or ``openimages``.
        image_labels: Whether ``lvis`` trains on ImageNet-LVIS too.
        novel: Novel classes of ``coco_zero_shot``.
    """
    text = {
        "lvis": _LVIS + (_IMAGE_LABELS if image_labels else ""),
        "coco": _COCO,
        "coco_zero_shot": _COCO_ZERO_SHOT.format(novel=", ".join(f'"{item}"' for item in novel)),
        "objects365": _OBJECTS365,
        "openimages": _OPENIMAGES,
    }[name]
    return MARK + "\n" + text


def write_description(path: Path, text: str) -> Literal["made", "up to date", "kept"]:
    """Write a description unless somebody changed it and took the mark away.

    Returns:
        ``made``, ``up to date`` where the file held ``text`` before, ``kept`` where it is somebody's own.
    """
    if path.exists():
        there = path.read_text(encoding="utf-8")
        if not there.startswith(MARK):
            return "kept"
        if there == text:
            return "up to date"
    with replacing(path) as file:
        file.write(text.encode())
    return "made"
