"""The synthetic data set: coloured, textured shapes in LVIS format, with image labels and text embeddings.

::

    from proxydet.data.synthetic.dataset import SyntheticConfig, make_dataset

    description = make_dataset(Path("shapes"), SyntheticConfig(images_train=200))
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.synthetic.classes import (
    ALIASES,
    COLOURS,
    SHAPES,
    TEXTURES,
    ShapeClass,
    build_classes,
)
from proxydet.data.synthetic.drawing import SceneObject, draw_scene, draw_single
from proxydet.errors import ConfigError, DataError
from proxydet.files import Lock, read_json, write_errors
from proxydet.reporting import SILENT
from proxydet.vocabulary.compositional import CompositionalEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxydet.reporting import Progress, Task

logger = logging.getLogger(__name__)

DRAWING_VERSION = 1
"""Raised whenever the same configuration draws other files."""

_SPLIT_KEYS = {"train": 2, "val": 3, "labels": 4}
_DESCRIPTION = """\
name = "shapes"

[vocabulary]
embeddings = "embeddings.npy"
encoder = "text_encoder.json"
novel_frequency = ["r"]

[train]
annotations = "lvis_train.json"
images = "train"

[val]
annotations = "lvis_val.json"
images = "val"
"""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Sizes of the drawn data set; equal configurations draw equal files."""

    seed: int = 7
    """Decides every random choice: splits, scenes, image labels and embeddings."""
    images_train: int = 800
    """Training scenes; they hold base classes only."""
    images_val: int = 120
    """Validation scenes; they hold base and novel classes."""
    image_label_images_per_class: int = 16
    """Images of a single object in each class's tar of the image-label source; 0 leaves the source out."""
    size: int = 128
    """Longest edge of a scene in pixels."""
    image_label_size: int = 64
    """Longest edge of an image-label image in pixels."""
    colours: int = 5
    """How many colours take part, from the first of the list."""
    shapes: int = 4
    """How many shapes take part, from the first of the list."""
    textures: int = 3
    """How many textures take part, from the first of the list."""
    novel_classes: int = 12
    """Combinations held out of training: the novel classes, frequency group "r"."""
    novel_covered: int = 9
    """Novel classes that the image-label source covers (in the paper 277 of 337)."""
    common_share: float = 0.4
    """Share of the base classes that are drawn at half the rate: frequency group "c"; the rest are "f"."""
    novel_rate: float = 0.35
    """Share of the objects of validation scenes that belong to novel classes."""
    objects_least: int = 2
    """Fewest objects a scene."""
    objects_most: int = 4
    """Most objects a scene."""
    object_size_least: float = 0.25
    """Smallest diameter of an object, as a share of the scene's longest edge."""
    object_size_most: float = 0.5
    """Largest diameter of an object, as a share of the scene's longest edge."""
    negatives_per_image: int = 20
    """Absent classes that a scene lists as verified absent (LVIS's federated evaluation)."""
    not_exhaustive_rate: float = 0.1
    """Chance that a scene with a class twice leaves one of them out and says so, as LVIS does."""
    embedding_dim: int = 64
    """Width of the text embeddings."""
    embedding_noise: float = 0.15
    """Length of a class's own random direction, next to its attributes' directions of length 1."""

    def __post_init__(self) -> None:
        words = self.colours + self.shapes + self.textures
        ranges: dict[str, tuple[float, float]] = {
            "images_train": (1, np.inf),
            "images_val": (1, np.inf),
            "image_label_images_per_class": (0, np.inf),
            "size": (32, np.inf),
            "image_label_size": (32, np.inf),
            "colours": (1, len(COLOURS)),
            "shapes": (1, len(SHAPES)),
            "textures": (1, len(TEXTURES)),
            "novel_classes": (0, np.inf),
            "novel_covered": (0, self.novel_classes),
            "common_share": (0, 1),
            "novel_rate": (0, 1),
            "objects_least": (1, np.inf),
            "objects_most": (self.objects_least, np.inf),
            "object_size_least": (0.05, 0.9),
            "object_size_most": (self.object_size_least, 0.9),
            "negatives_per_image": (0, np.inf),
            "not_exhaustive_rate": (0, 1),
            "embedding_dim": (words + 1, np.inf),
            "embedding_noise": (0, 1),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if not low <= value <= high:
                most = "" if high == np.inf else f" and at most {high}"
                raise ConfigError(f"{field} is {value}; it must be at least {low}{most}")


def make_dataset(
    folder: Path, config: SyntheticConfig | None = None, *, progress: Progress = SILENT
) -> Path:
    """Draw a small open-vocabulary data set in LVIS format.

    Classes are combinations such as "red striped circle". Novel classes are combinations that no training
    scene holds; the image-label source covers some of them. The folder is written under a temporary name
    and renamed when complete; a folder that already holds the same data set is used as it is.

    Args:
        folder: Where the data set goes; must not exist, be empty, or hold the same data set.
        config: What to draw; the defaults where None.
        progress: Where progress is shown.

    Returns:
        Path of the data description, ``description.toml``.

    Raises:
        DataError: The folder holds something else.
        DiskFullError: There is no room for the files.
    """
    config = config or SyntheticConfig()
    description = folder / "description.toml"
    if _holds(folder, config):
        logger.info("using the data set that is in %s", folder)
        return description
    with Lock(folder.with_name(f".{folder.name}.lock"), subject=str(folder)):
        if _holds(folder, config):  # another process drew it meanwhile
            return description
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with write_errors(folder):
                unfinished.mkdir(parents=True)
                _Writer(unfinished, config, progress).write()
                if folder.exists():
                    folder.rmdir()
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return description


def _fingerprint(config: SyntheticConfig) -> dict[str, Any]:
    return {"drawing_version": DRAWING_VERSION, **asdict(config)}


def _holds(folder: Path, config: SyntheticConfig) -> bool:
    """Whether the folder already holds this data set; raises where it holds anything else."""
    manifest = folder / "synthetic.json"
    if manifest.is_file():
        found = read_json(
            manifest, hint="choose another folder, or delete this one", error=DataError
        )
        wanted = _fingerprint(config)
        changed = sorted(key for key, value in wanted.items() if found.get(key) != value)
        if found == wanted:
            return True
        raise DataError(
            f"{folder} holds a synthetic data set of other settings ({', '.join(changed)})",
            hint="choose another folder, or delete this one",
            path=folder,
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} is not empty and does not hold a synthetic data set",
            hint="choose another folder",
            path=folder,
        )
    return False


class _Writer:
    """Writes all files of one data set."""

    def __init__(self, folder: Path, config: SyntheticConfig, progress: Progress) -> None:
        self.folder = folder
        self.config = config
        self.progress = progress
        self.classes = build_classes(config)

    def write(self) -> None:
        config, each = self.config, self.config.image_label_images_per_class
        labelled = [c for c in self.classes if c.covered] if each else []
        total = config.images_train + config.images_val + len(labelled) * each
        with self.progress.task("drawing the data set", total=total, unit="images") as task:
            self._write_embeddings()
            train = self._draw_split("train", config.images_train, task)
            val = self._draw_split("val", config.images_val, task)
            categories = self._categories(train["annotations"])
            for split, content in (("train", train), ("val", val)):
                self._write_json(f"lvis_{split}.json", content | {"categories": categories})
            for shape_class in labelled:
                self._write_tar(shape_class, task)
        labels = '\n[image_labels]\ntars = "tars"\n' if labelled else ""
        (self.folder / "description.toml").write_text(_DESCRIPTION + labels, encoding="utf-8")
        self._write_json("synthetic.json", _fingerprint(config))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding="utf-8")

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *key])

    def _draw_split(self, split: str, count: int, task: Task) -> dict[str, Any]:
        (self.folder / split).mkdir()
        rates_C = np.array([{"f": 1.0, "c": 0.5, "r": 0.0}[c.frequency] for c in self.classes])
        rates_C /= rates_C.sum()
        novel_C = np.array([float(c.novel) for c in self.classes])
        if split == "val" and novel_C.any():
            share = self.config.novel_rate
            rates_C = (1 - share) * rates_C + share * novel_C / novel_C.sum()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            rng = self._rng(_SPLIT_KEYS[split], index)
            image_HW3, objects = draw_scene(self.classes, rates_C, self.config, rng)
            # Ids of the splits must not meet: predictions on both may end up in one file.
            image_id = _SPLIT_KEYS[split] * 100_000 + index + 1
            file_name = f"{image_id:06d}.jpg"
            (self.folder / split / file_name).write_bytes(_jpeg(image_HW3))
            kept, not_exhaustive = self._annotated(objects, rng)
            for entry in kept:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": entry.class_index + 1,
                        "bbox": list(entry.box_xywh),
                        "area": entry.area,
                        "segmentation": entry.polygons,
                    }
                )
            absent = sorted(
                set(range(len(self.classes))) - {entry.class_index for entry in objects}
            )
            negatives = rng.permutation(len(absent))[: self.config.negatives_per_image]
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": image_HW3.shape[1],
                    "height": image_HW3.shape[0],
                    "neg_category_ids": sorted(absent[i] + 1 for i in negatives),
                    "not_exhaustive_category_ids": not_exhaustive,
                }
            )
            task.advance()
        return {"images": images, "annotations": annotations}

    def _annotated(
        self, objects: Sequence[SceneObject], rng: np.random.Generator
    ) -> tuple[list[SceneObject], list[int]]:
        """Which objects get an annotation, and the ids of classes that are not annotated exhaustively."""
        counts = Counter(entry.class_index for entry in objects)
        twice = sorted(index for index, count in counts.items() if count > 1)
        if not twice or rng.random() >= self.config.not_exhaustive_rate:
            return list(objects), []
        left_out = next(e for e in reversed(objects) if e.class_index == twice[0])
        return [e for e in objects if e is not left_out], [twice[0] + 1]

    def _categories(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the classes as LVIS's categories, with their counts in training."""
        instances = Counter(a["category_id"] for a in annotations)
        images = Counter(c for c, _ in {(a["category_id"], a["image_id"]) for a in annotations})
        return [
            {
                "id": identity,
                "name": c.name,
                "synonyms": [c.name, f"{c.texture} {c.colour} {c.shape}"],
                "synset": c.synset,
                "def": f"a {c.shape}, {c.colour}, {c.texture}",
                "frequency": c.frequency,
                "image_count": images[identity],
                "instance_count": instances[identity],
            }
            for identity, c in enumerate(self.classes, 1)
        ]

    def _write_tar(self, shape_class: ShapeClass, task: Task) -> None:
        (self.folder / "tars").mkdir(exist_ok=True)
        class_index = self.classes.index(shape_class)
        with tarfile.open(self.folder / "tars" / f"{shape_class.synset}.tar", "w") as tar:
            for index in range(self.config.image_label_images_per_class):
                rng = self._rng(_SPLIT_KEYS["labels"], class_index, index)
                content = _jpeg(draw_single(shape_class, self.config.image_label_size, rng))
                # A fresh TarInfo has time 0 and no owner: equal data sets have equal tars.
                member = tarfile.TarInfo(f"{shape_class.synset}_{index}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                task.advance()

    def _write_embeddings(self) -> None:
        config = self.config
        encoder = CompositionalEncoder.create(
            [
                *list(COLOURS)[: config.colours],
                *TEXTURES[: config.textures],
                *SHAPES[: config.shapes],
            ],
            dim=config.embedding_dim,
            noise=config.embedding_noise,
            seed=config.seed,
            aliases=ALIASES,
        )
        encoder.save(self.folder / "text_encoder.json")
        embeddings_CD = encoder.encode([c.name for c in self.classes])
        np.save(self.folder / "embeddings.npy", embeddings_CD.astype(np.float16))


def _jpeg(image_HW3: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
