"""Writes the drawn data set: scenes, LVIS annotations, image-label tars, text embeddings, description."""

from __future__ import annotations

import errno
import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.synthetic.attributes import ALIASES, COLOURS, SHAPES, TEXTURES, build_classes
from proxydet.data.synthetic.config import SyntheticConfig
from proxydet.data.synthetic.lvis_rows import (
    annotation_row,
    category_rows,
    count_objects,
    write_json,
)
from proxydet.data.synthetic.scenes import ClassRates, SceneObject, draw_scene, draw_single
from proxydet.errors import DataError, DiskFullError
from proxydet.reporting import SILENT
from proxydet.vocabulary.compositional import CompositionalEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxydet.data.synthetic.attributes import ShapeClass
    from proxydet.reporting import Progress, Task

logger = logging.getLogger(__name__)

DRAWING_VERSION = 1
"""Raised whenever the same configuration draws other files."""

_SPLIT_KEYS = {"train": 2, "val": 3, "labels": 4}


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
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        _Writer(unfinished, config, progress).write()
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"no room left on the disk for the data set {folder}",
                hint="free some space, or choose another folder, and run the same command again",
                path=folder,
            ) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return description


def _fingerprint(config: SyntheticConfig) -> dict[str, Any]:
    return {"drawing_version": DRAWING_VERSION, **asdict(config)}


def _holds(folder: Path, config: SyntheticConfig) -> bool:
    """Whether the folder already holds this data set; raises where it holds anything else."""
    if not folder.exists():
        return False
    manifest = folder / "synthetic.json"
    if folder.is_dir() and manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found == _fingerprint(config):
            return True
        changed = sorted(
            key for key, value in _fingerprint(config).items() if found.get(key) != value
        )
        raise DataError(
            f"{folder} holds a data set drawn with other settings ({', '.join(changed)})",
            hint="choose another folder, or delete this one",
            path=folder,
        )
    if not folder.is_dir() or any(folder.iterdir()):
        raise DataError(
            f"{folder} is not empty, and what is in it is not a drawn data set",
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
        config = self.config
        labelled = (
            [c for c in self.classes if c.covered] if config.image_label_images_per_class else []
        )
        pictures = (
            config.images_train
            + config.images_val
            + len(labelled) * config.image_label_images_per_class
        )
        with self.progress.task("drawing the data set", total=pictures, unit="images") as task:
            self._write_embeddings()
            train = self._write_scenes("train", config.images_train, task)
            val = self._write_scenes("val", config.images_val, task)
            counts = count_objects(train["annotations"])
            for split, content in (("train", train), ("val", val)):
                content["categories"] = category_rows(self.classes, *counts)
                write_json(self.folder / f"lvis_{split}.json", content)
            for shape_class in labelled:
                self._write_tar(shape_class, task)
        self._write_description(with_labels=bool(labelled))
        write_json(self.folder / "synthetic.json", _fingerprint(config))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *key])

    def _rates(self, split: str) -> ClassRates:
        base_rates = {"f": 1.0, "c": 0.5, "r": 0.0}
        rates_C = np.array([base_rates[c.frequency] for c in self.classes])
        rates_C /= rates_C.sum()
        novel_C = np.array([float(c.novel) for c in self.classes])
        if split == "val" and novel_C.any():
            share = self.config.novel_rate
            rates_C = (1 - share) * rates_C + share * novel_C / novel_C.sum()
        return ClassRates(rates_C)

    def _write_scenes(self, split: str, count: int, task: Task) -> dict[str, Any]:
        (self.folder / split).mkdir()
        rates = self._rates(split)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            rng = self._rng(_SPLIT_KEYS[split], index)
            scene = draw_scene(self.classes, rates, self.config, rng)
            # Ids of the splits must not meet: predictions on both may end up in one file.
            image_id = _SPLIT_KEYS[split] * 100_000 + index + 1
            file_name = f"{image_id:06d}.jpg"
            (self.folder / split / file_name).write_bytes(_jpeg(scene.picture_HW3))
            kept, not_exhaustive = self._annotated(scene.objects, rng)
            for entry in kept:
                annotations.append(annotation_row(entry, image_id, len(annotations) + 1))
            height, width = scene.picture_HW3.shape[:2]
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": width,
                    "height": height,
                    "neg_category_ids": self._negatives(scene.objects, rng),
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

    def _negatives(self, objects: Sequence[SceneObject], rng: np.random.Generator) -> list[int]:
        absent = sorted(set(range(len(self.classes))) - {entry.class_index for entry in objects})
        chosen = rng.permutation(len(absent))[: self.config.negatives_per_image]
        return sorted(absent[i] + 1 for i in chosen)

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
        words = [
            *list(COLOURS)[: config.colours],
            *TEXTURES[: config.textures],
            *SHAPES[: config.shapes],
        ]
        encoder = CompositionalEncoder.create(
            words,
            dim=config.embedding_dim,
            noise=config.embedding_noise,
            seed=config.seed,
            aliases=ALIASES,
        )
        encoder.save(self.folder / "text_encoder.json")
        embeddings_CD = encoder.encode([c.name for c in self.classes])
        np.save(self.folder / "embeddings.npy", embeddings_CD.astype(np.float16))

    def _write_description(self, *, with_labels: bool) -> None:
        lines = [
            'name = "shapes"',
            "",
            "[vocabulary]",
            'embeddings = "embeddings.npy"',
            'encoder = "text_encoder.json"',
            'novel_frequency = ["r"]',
            "",
            "[train]",
            'annotations = "lvis_train.json"',
            'images = "train"',
            "",
            "[val]",
            'annotations = "lvis_val.json"',
            'images = "val"',
        ]
        if with_labels:
            lines += ["", "[image_labels]", 'tars = "tars"']
        (self.folder / "description.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _jpeg(picture_HW3: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture_HW3).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
