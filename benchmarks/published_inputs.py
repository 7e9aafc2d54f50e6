"""Made-up files in the format and at the size of the published ones, for `benchmarks/prepare.py`.

Every function writes below a data root and returns what was written, counted while writing: the other side of the
comparison with what `proxydet data prepare` says. Photographs are links to a few small pictures.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.image_labels import synset_of_wnid
from proxydet.data.prepare import SEEN, UNSEEN

Ints = npt.NDArray[np.int64]

WIDTH, HEIGHT = 640, 480
_SHAPES = 4000
_MOST_LINKS = 30_000
_OTHER_COCO = (
    "traffic light; fire hydrant; stop sign; parking meter; sports ball; baseball bat; baseball glove; tennis racket; "
    "wine glass; hot dog; potted plant; dining table; cell phone; hair drier; teddy bear"
)


@dataclass(frozen=True)
class Shape:
    """One object: its polygons as JSON text, its box and its area."""

    polygons: str
    box: str
    area: float


def shapes(rng: np.random.Generator, points: int) -> list[Shape]:
    """Draw outlines; ``points`` is their mean number of corners."""
    found = []
    for _ in range(_SHAPES):
        x, y = rng.uniform(0, 400), rng.uniform(0, 300)
        w, h = rng.uniform(4, WIDTH - x), rng.uniform(4, HEIGHT - y)
        corners = rng.random((rng.geometric(1 / (points - 4)) + 3, 2)) * (w, h) + (x, y)
        polygon = json.dumps([corners.round(2).ravel().tolist()])
        box = json.dumps([round(float(v), 2) for v in (x, y, w, h)])
        found.append(Shape(polygon, box, round(float(w * h / 2), 2)))
    return found


class Photographs:
    """Links to a few pictures, so that a hundred thousand take no room."""

    def __init__(self, folder: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size, self._made = folder, size, 0
        self._source = Path()

    def link(self, path: Path) -> None:
        """Put a picture at ``path``."""
        if self._made % _MOST_LINKS == 0:
            self._source = self._folder / f"picture-{self._size[0]}-{self._made}.jpg"
            Image.new("RGB", self._size, (90, 120, 150)).save(self._source, quality=50)
        self._made += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._source, path)


def write_file(
    path: Path, images: Iterator[str], annotations: Iterator[str], categories: list[Any]
) -> None:
    """Write an annotation file from records that are JSON text already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write('{"info": {"year": 2020}, "annotations": [')
        _write_all(file, annotations)
        file.write('], "images": [')
        _write_all(file, images)
        file.write('], "licenses": [], "categories": ' + json.dumps(categories) + "}")


def _write_all(file: Any, records: Iterator[str]) -> None:
    for number, record in enumerate(records):
        file.write(", " + record if number else record)


def lvis(root: Path, scale: float) -> dict[str, Any]:
    """LVIS v1: 100,170 and 19,809 images, 1,270,141 and 244,707 annotations, 5,257 of them of 337 rare classes."""
    rng = np.random.default_rng(1)
    categories = _lvis_categories()
    photographs = Photographs(root.parent / "pictures")
    result: dict[str, Any] = {}
    for split, images, objects, rare in (
        ("train", 100_170, 1_270_141, 5_257),
        ("val", 19_809, 244_707, 1_000),
    ):
        images, objects, rare = (round(n * scale) for n in (images, objects, rare))
        classes = _long_tail(rng, categories, objects, rare)
        owners = np.sort(rng.integers(images, size=objects))
        folders = ["train2017", "val2017"] if split == "val" else ["train2017"]
        offset = 0 if split == "train" else 1_000_000
        names = [f"{folders[i % len(folders)]}/{offset + i:012}.jpg" for i in range(images)]
        write_file(
            root / f"lvis/lvis_v1_{split}.json",
            (_lvis_image(i, name, rng) for i, name in enumerate(names)),
            _polygon_annotations(shapes(rng, 49), owners, classes, rng),
            categories,
        )
        for name in names:
            photographs.link(root / "coco" / name)
        is_rare = np.array([c["frequency"] == "r" for c in categories])[classes - 1]
        result[split] = {
            "images": images,
            "annotations": objects,
            "rare": int(is_rare.sum()),
            "instances": np.bincount(classes, minlength=1204)[1:],
            "pairs": np.unique(owners * 2000 + classes) % 2000,
        }
    _embeddings(root / "metadata/lvis_v1_clip_a+cname.npy", 1203, rng)
    return result


def _lvis_categories() -> list[dict[str, Any]]:
    synsets = [*synset_of_wnid().values()]
    groups = ["r"] * 337 + ["c"] * 461 + ["f"] * 405
    np.random.default_rng(2).shuffle(groups)
    return [
        {
            "id": i + 1,
            "name": f"class_{i + 1}",
            "synset": synsets[i] if i < len(synsets) else f"other{i}.n.01",
            "synonyms": [f"class_{i + 1}"],
            "def": "what it is",
            "frequency": group,
            "image_count": 1,
            "instance_count": 1,
        }
        for i, group in enumerate(groups)
    ]


def _long_tail(
    rng: np.random.Generator, categories: list[dict[str, Any]], count: int, rare: int
) -> Ints:
    of_group = {
        group: np.array([c["id"] for c in categories if (c["frequency"] == "r") == group])
        for group in (True, False)
    }
    weights = 1 / np.arange(1, len(of_group[False]) + 1)
    classes = rng.choice(of_group[False], count, p=weights / weights.sum())
    classes[rng.choice(count, rare, replace=False)] = rng.choice(of_group[True], rare)
    return classes.astype(np.int64)


def _lvis_image(number: int, name: str, rng: np.random.Generator) -> str:
    return json.dumps(
        {
            "id": number + 1,
            "height": HEIGHT,
            "width": WIDTH,
            "coco_url": f"http://images.cocodataset.org/{name}",
            "flickr_url": f"http://farm1.staticflickr.com/{number}.jpg",
            "date_captured": "2013-11-14 17:02:52",
            "license": 1,
            "neg_category_ids": rng.integers(1, 1204, 8).tolist(),
            "not_exhaustive_category_ids": rng.integers(1, 1204, 1).tolist(),
        }
    )


def _polygon_annotations(
    drawn: list[Shape], owners: Ints, classes: Ints, rng: np.random.Generator
) -> Iterator[str]:
    which = rng.integers(len(drawn), size=len(owners)).tolist()
    for number, (owner, category, index) in enumerate(
        zip(owners.tolist(), classes.tolist(), which, strict=True), 1
    ):
        shape = drawn[index]
        yield (
            f'{{"area": {shape.area}, "id": {number}, "segmentation": {shape.polygons}, '
            f'"image_id": {owner + 1}, "bbox": {shape.box}, "category_id": {category}, "iscrowd": 0}}'
        )


def coco(root: Path, scale: float) -> dict[str, Any]:
    """COCO 2017: 118,287 and 5,000 images, 860,001 and 36,781 annotations, one in eighty a crowd."""
    rng = np.random.default_rng(3)
    names = [*SEEN, *UNSEEN, *_OTHER_COCO.split("; ")]
    rng.shuffle(names)
    # As COCO's: 80 ids of 1 to 90.
    ids = np.sort(rng.choice(np.arange(1, 91), 80, replace=False))
    categories = [
        {"id": int(i), "name": name, "supercategory": "x"}
        for i, name in zip(ids, names, strict=True)
    ]
    seen = np.array([c["id"] for c in categories if c["name"] in SEEN])
    used = np.array([c["id"] for c in categories if c["name"] in (*SEEN, *UNSEEN)])
    photographs = Photographs(root.parent / "pictures")
    result: dict[str, Any] = {}
    for split, images, objects in (("train2017", 118_287, 860_001), ("val2017", 5_000, 36_781)):
        images, objects = round(images * scale), round(objects * scale)
        classes = rng.choice(ids, objects, p=_weights(80))
        owners = np.sort(rng.integers(images, size=objects))
        write_file(
            root / f"coco/annotations/instances_{split}.json",
            (_coco_image(i, split) for i in range(images)),
            _with_crowds(_polygon_annotations(shapes(rng, 22), owners, classes, rng)),
            categories,
        )
        for i in range(images):
            photographs.link(root / f"coco/{split}/{i:012}.jpg")
        kept = np.isin(classes, seen if split == "train2017" else used)
        result[split] = {
            "images": images,
            "annotations": objects,
            "zero-shot images": len(np.unique(owners[kept])),
            "zero-shot annotations": int(kept.sum()),
        }
    _embeddings(root / "metadata/coco_clip_a+cname.npy", 80, rng)
    return result


def _weights(count: int) -> npt.NDArray[np.float64]:
    weights = 1 / np.arange(2, count + 2)
    return weights / weights.sum()


def _coco_image(number: int, split: str) -> str:
    name = f"{number:012}.jpg"
    return json.dumps(
        {
            "license": 3,
            "file_name": name,
            "coco_url": f"http://images.cocodataset.org/{split}/{name}",
            "height": HEIGHT,
            "width": WIDTH,
            "id": number + 1,
        }
    )


def _with_crowds(records: Iterator[str]) -> Iterator[str]:
    for number, record in enumerate(records):
        if number % 80:
            yield record
            continue
        entry = json.loads(record)
        runs = [1000, 500] * 200
        entry["segmentation"] = {
            "counts": [*runs, WIDTH * HEIGHT - sum(runs)],
            "size": [HEIGHT, WIDTH],
        }
        yield json.dumps(entry | {"iscrowd": 1})


def objects365(root: Path, scale: float, fixes: Path) -> dict[str, Any]:
    """Objects365 v2 validation: 80,000 images, 1,240,587 boxes, names as misspelt as the published ones."""
    rng = np.random.default_rng(4)
    with fixes.open(newline="") as file:
        rows = list(csv.reader(file))
    categories = [{"id": int(i), "name": old, "supercategory": "x"} for i, old, _ in rows]
    images, annotations = round(80_000 * scale), round(1_240_587 * scale)
    owners = np.sort(rng.integers(images, size=annotations))
    classes = rng.integers(1, 366, annotations)
    names = [_objects365_name(i, images) for i in range(images)]
    write_file(
        root / "objects365/annotations/zhiyuan_objv2_val.json",
        (
            json.dumps(
                {
                    "height": HEIGHT,
                    "width": WIDTH,
                    "id": i + 1,
                    "license": 5,
                    "url": "",
                    "file_name": name,
                }
            )
            for i, name in enumerate(names)
        ),
        _box_annotations(shapes(rng, 8), owners, classes, rng),
        categories,
    )
    photographs = Photographs(root.parent / "pictures")
    for name in names:
        photographs.link(root / "objects365/val" / name)
    (root / "metadata").mkdir(exist_ok=True)
    (root / "metadata/Objects365_names_fix.csv").write_bytes(fixes.read_bytes())
    _embeddings(root / "metadata/o365_clip_a+cnamefix.npy", 365, rng)
    return {
        "images": images,
        "annotations": annotations,
        "instances": np.bincount(classes, minlength=366)[1:],
        "changed names": sum(old != new for _, old, new in rows),
        "names": [new for _, _, new in rows],
    }


def _objects365_name(number: int, images: int) -> str:
    patch = number * 44 // images
    version = 1 if patch < 16 else 2
    return f"images/v{version}/patch{patch}/objects365_v{version}_{number:08}.jpg"


def _box_annotations(
    drawn: list[Shape], owners: Ints, classes: Ints, rng: np.random.Generator
) -> Iterator[str]:
    which = rng.integers(len(drawn), size=len(owners)).tolist()
    for number, (owner, category, index) in enumerate(
        zip(owners.tolist(), classes.tolist(), which, strict=True), 1
    ):
        shape = drawn[index]
        yield (
            f'{{"id": {number}, "iscrowd": {int(number % 50 == 0)}, "isfake": 0, "area": {2 * shape.area}, '
            f'"isreflected": 0, "bbox": {shape.box}, "image_id": {owner + 1}, "category_id": {category}}}'
        )


def openimages(root: Path, scale: float) -> dict[str, Any]:
    """OpenImages' challenge validation: 500 classes in a tree of several levels, 41,620 images, 226,000 boxes."""
    rng = np.random.default_rng(5)
    folder = root / "oid/annotations"
    folder.mkdir(parents=True)
    labels = [f"/m/0{i:04x}" for i in range(500)]
    parents, tree = _tree(rng, labels)
    (folder / "challenge-2019-label500-hierarchy.json").write_text(json.dumps(tree))
    _rows(
        folder / "challenge-2019-classes-description-500.csv",
        [],
        ([label, f"Thing {i}, kind"] for i, label in enumerate(labels)),
    )
    images, boxes, verified = (round(n * scale) for n in (41_620, 226_000, 190_000))
    names = [f"{i:016x}" for i in rng.choice(2**40, images, replace=False).tolist()]
    drawn = [
        (names[i], labels[c], x, y, x + w, y + h, int(group))
        for i, c, x, y, w, h, group in zip(
            rng.integers(images, size=boxes).tolist(),
            rng.choice(500, boxes, p=_weights(500)).tolist(),
            *(rng.uniform(0, 0.5, (2, boxes)).round(6).tolist()),
            *(rng.uniform(0.01, 0.5, (2, boxes)).round(6).tolist()),
            (rng.random(boxes) < 0.06).tolist(),
            strict=True,
        )
    ]
    _rows(
        folder / "challenge-2019-validation-detection-bbox.csv",
        ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"],
        ([n, c, x1, x2, y1, y2, g] for n, c, x1, y1, x2, y2, g in drawn),
    )
    said = [
        (names[i], labels[c], int(sure))
        for i, c, sure in zip(
            rng.integers(images, size=verified).tolist(),
            rng.integers(500, size=verified).tolist(),
            (rng.random(verified) < 0.4).tolist(),
            strict=True,
        )
    ]
    _rows(
        folder / "challenge-2019-validation-detection-human-imagelabels.csv",
        ["ImageID", "Source", "LabelName", "Confidence"],
        ([n, "verification", c, sure] for n, c, sure in said),
    )
    wide = Photographs(root.parent / "pictures", (1024, 683))
    tall = Photographs(root.parent / "pictures", (768, 1024))
    for i, name in enumerate(names):
        (wide if i % 3 else tall).link(root / f"oid/images/validation/{name}.jpg")
    _embeddings(root / "metadata/oid_clip_a+cname.npy", 500, rng)
    return {"parents": parents, "labels": labels, "boxes": drawn, "verified": said}


def _tree(
    rng: np.random.Generator, labels: list[str]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the parents of each label, and the tree; a few labels stand in two places."""
    top: dict[str, Any] = {"LabelName": "/m/0bl9f", "Subcategory": []}
    nodes = {label: {"LabelName": label} for label in labels}
    parents: dict[str, list[str]] = {}
    for i, label in enumerate(labels):
        above = [labels[j] for j in rng.integers(i, size=1 + (i % 40 == 39))] if i > 60 else []
        parents[label] = sorted(set(above))
        for parent in parents[label] or [None]:
            home: dict[str, Any] = top if parent is None else nodes[parent]
            home.setdefault("Subcategory", []).append(nodes[label])
    nodes[labels[0]]["Part"] = [{"LabelName": labels[-1]}]  # type: ignore[assignment]  # a part is no subcategory
    return parents, top


def imagenet(root: Path, scale: float) -> dict[str, Any]:
    """997 tars: a tenth of the members gzip-compressed, some broken, one tar cut short, one empty, five missing."""
    rng = np.random.default_rng(6)
    folder = root / "imagenet/ImageNet-21K"
    folder.mkdir(parents=True)
    pictures = [_picture(rng, size) for size in ((500, 375), (375, 500), (333, 500), (640, 480))]
    result = {"tars": 0, "images": 0, "gzipped": 0, "broken": 0}
    for number, wnid in enumerate(synset_of_wnid()):
        if number < 5:
            continue
        result["tars"] += 1
        members = []
        for i in range(0 if number == 5 else max(2, round(rng.integers(20, 180) * scale))):
            kind = rng.random()
            content = pictures[i % len(pictures)]
            if kind < 0.1:
                content = gzip.compress(content, 1)
            elif kind < 0.102:
                content = content[:200] if i % 2 else b"<html>not found</html>"
            members.append((f"{wnid}_{i}.JPEG", content, kind))
        path = folder / f"{wnid}.tar"
        _write_tar(path, members)
        if number == 6:  # cut in its last member
            blocks = sum(1 + -(-len(content) // 512) for _, content, _ in members)
            os.truncate(path, 512 * (blocks - 1))
            members.pop()
        result["images"] += sum(not 0.1 <= kind < 0.102 for _, _, kind in members)
        result["gzipped"] += sum(kind < 0.1 for _, _, kind in members)
        result["broken"] += sum(0.1 <= kind < 0.102 for _, _, kind in members)
    (folder / "n00000001.tar").write_bytes(next(folder.glob("*.tar")).read_bytes())
    return result


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    noise = rng.integers(0, 255, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    Image.fromarray(noise).resize(size).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def _write_tar(path: Path, members: list[tuple[str, bytes, float]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content, _ in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _rows(path: Path, header: list[str], rows: Iterator[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if header else [])
        writer.writerows(rows)


def _embeddings(path: Path, classes: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rng.standard_normal((classes, 512)).astype(np.float16))
