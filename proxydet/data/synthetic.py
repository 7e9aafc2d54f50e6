"""The synthetic data set: coloured, textured shapes in LVIS format, with image labels and text embeddings.

::

    from proxydet.data.synthetic import SyntheticConfig, make_dataset

    description = make_dataset(Path("shapes"), SyntheticConfig(images_train=200))
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from proxydet.data.masks import outlines
from proxydet.errors import ConfigError, DataError
from proxydet.files import Lock, read_json, write_errors
from proxydet.reporting import SILENT
from proxydet.vocabulary.compositional import CompositionalEncoder

if TYPE_CHECKING:
    from proxydet.reporting import Progress, Task

logger = logging.getLogger(__name__)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 38, 38),
    "green": (44, 160, 62),
    "blue": (40, 86, 214),
    "yellow": (240, 208, 40),
    "purple": (150, 60, 190),
    "white": (240, 240, 236),
    "cyan": (40, 196, 206),
    "orange": (240, 134, 26),
}
"""Colour words and their RGB values, easiest to tell apart first."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "crescent", "heart")
"""Shape words."""

TEXTURES = ("plain", "striped", "dotted", "checked")
"""Texture words."""

ALIASES = {
    "disc": "circle",
    "disk": "circle",
    "round": "circle",
    "box": "square",
    "plus": "cross",
    "moon": "crescent",
    "violet": "purple",
    "turquoise": "cyan",
    "solid": "plain",
    "stripy": "striped",
    "spotted": "dotted",
    "chequered": "checked",
    "checkered": "checked",
}
"""Other words for the same attributes, understood by the data set's text encoder."""


@dataclass(frozen=True, kw_only=True)
class ShapeClass:
    """One class: a colour, a texture and a shape."""

    colour: str
    texture: str
    shape: str
    frequency: str
    """LVIS frequency group: "f" and "c" are base classes, "r" is novel (never in training scenes)."""
    covered: bool
    """Whether the image-label source has a tar of this class."""

    @property
    def name(self) -> str:
        """The class name, such as "red striped circle"."""
        return f"{self.colour} {self.texture} {self.shape}"

    @property
    def synset(self) -> str:
        """A WordNet-like key, also the name of the class's tar."""
        return f"{self.colour}_{self.texture}_{self.shape}.n.01"


def build_classes(config: SyntheticConfig) -> tuple[ShapeClass, ...]:
    """Make all combinations of the attributes and split them into base and novel.

    Novel combinations are spread evenly over the attribute values, and every pair of values of different attributes stays in
    some base class wherever the counts allow it, so that what a novel class looks like can be learnt from what base classes
    look like.

    Raises:
        ConfigError: So many classes are novel that an attribute value would be left without a base class.
    """
    counts = (config.colours, config.textures, config.shapes)
    combos = list(product(*map(range, counts)))
    rng = np.random.default_rng([config.seed, 1])
    novel = _choose_novel(combos, config.novel_classes, rng)
    covered = set(sorted(novel, key=lambda _: rng.random())[: config.novel_covered])
    base = [combo for combo in combos if combo not in novel]
    commons = round(config.common_share * len(base))
    common = {base[i] for i in rng.permutation(len(base))[:commons]}
    colours, textures = list(COLOURS), list(TEXTURES)
    return tuple(
        ShapeClass(
            colour=colours[combo[0]],
            texture=textures[combo[1]],
            shape=SHAPES[combo[2]],
            frequency="r" if combo in novel else "c" if combo in common else "f",
            covered=combo not in novel or combo in covered,
        )
        for combo in combos
    )


def _choose_novel(
    combos: list[tuple[int, ...]], count: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Pick ``count`` combinations greedily, those whose values and pairs are held out least so far."""
    values = {combo: list(enumerate(combo)) for combo in combos}
    pairs = {combo: list(combinations(values[combo], 2)) for combo in combos}
    total: Counter[object] = Counter(key for c in combos for key in (*values[c], *pairs[c]))
    left = total.copy()
    remaining = [combos[i] for i in rng.permutation(len(combos))]
    novel: list[tuple[int, ...]] = []

    def cost(combo: tuple[int, ...]) -> tuple[int, float, float]:
        pairs_lost = sum(left[pair] == 1 for pair in pairs[combo])
        share_out = sum(1 - left[key] / total[key] for key in values[combo])
        return pairs_lost, share_out, sum(1 - left[key] / total[key] for key in pairs[combo])

    for _ in range(count):
        allowed = [c for c in remaining if all(left[value] > 1 for value in values[c])]
        if not allowed:
            raise ConfigError(
                f"novel_classes is {count}, but after {len(novel)} of {len(combos)} combinations some colour, "
                "texture or shape would be left without a base class"
            )
        chosen = min(allowed, key=cost)
        remaining.remove(chosen)
        novel.append(chosen)
        left.subtract([*values[chosen], *pairs[chosen]])
    return novel


Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

_OVERSAMPLING = 4
_REPEATS_MIN, _REPEATS_MAX = 3.0, 4.0
_TONE_DARK = 0.22
_VISIBLE_LEAST = 0.65
_TRIES = 24
_EDGE_SLACK = 0.08
_SAME_CLASS = 0.2
"""Chance that an object is of the same class as the one before it."""


class _Canvas:
    """An image in the making: square, landscape or portrait, with a muted background.

    Attributes:
        image_HW3: RGB from 0 to 255.
        coverages: How much of each pixel each object visibly covers, from 0 to 1.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        short = round(size * 0.8)
        width, height = ((size, size), (size, short), (short, size))[int(rng.integers(0, 3))]
        # A colour gradient, a cloudy texture, distracting lines, grain.
        corners = rng.uniform(50, 190, (2, 2, 1)) + rng.uniform(-28, 28, (2, 2, 3))
        image_HW3 = _enlarged(corners, width, height)
        cells = int(rng.integers(3, 14))
        image_HW3 += _enlarged(rng.normal(0, rng.uniform(4, 18), (cells, cells, 3)), width, height)
        canvas = Image.fromarray(np.clip(image_HW3, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(0, 7))):
            ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(2)]
            tone = tuple(int(value) for value in rng.uniform(30, 215) + rng.uniform(-30, 30, 3))
            draw.line(ends, fill=tone, width=int(rng.integers(1, 4)))
        image_HW3 = np.asarray(canvas).astype(np.float32)
        image_HW3 += rng.normal(0, rng.uniform(2, 7), (height, width, 1)).astype(np.float32)
        self.image_HW3: Floats = np.clip(image_HW3, 0, 255)
        self.coverages: list[Floats] = []
        self._full_areas: list[float] = []
        self._visible_areas: list[float] = []

    def jpeg(self) -> bytes:
        """Return the image's file."""
        buffer = io.BytesIO()
        image = Image.fromarray(self.image_HW3.astype(np.uint8))
        image.save(buffer, "JPEG", quality=92, subsampling=0)
        return buffer.getvalue()

    def place(self, shape_class: ShapeClass, diameter: float, rng: np.random.Generator) -> bool:
        """Paint an object where it hides little of those below; False where no place was found."""
        colours_SS3, coverage_SS = _object(shape_class, diameter, rng)
        height, width = self.image_HW3.shape[:2]
        side = len(coverage_SS)
        slack = int(side * _EDGE_SLACK)
        if side - 2 * slack >= min(height, width):
            return False
        for _ in range(_TRIES):
            left = int(rng.integers(-slack, width - side + slack + 1))
            top = int(rng.integers(-slack, height - side + slack + 1))
            x0, x1 = max(left, 0), min(left + side, width)
            y0, y1 = max(top, 0), min(top + side, height)
            target = slice(y0, y1), slice(x0, x1)
            source = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            coverage_WW = coverage_SS[source]
            area = float(coverage_WW.sum())
            hidden_O = [
                float((below_HW[target] * coverage_WW).sum()) for below_HW in self.coverages
            ]
            # The second limit keeps an object from lying wholly inside another: no holes.
            if not any(
                visible - hidden < _VISIBLE_LEAST * full or hidden > 0.5 * area
                for visible, hidden, full in zip(
                    self._visible_areas, hidden_O, self._full_areas, strict=True
                )
            ):
                for index, below_HW in enumerate(self.coverages):
                    below_HW[target] *= 1 - coverage_WW
                    self._visible_areas[index] -= hidden_O[index]
                coverage_HW = np.zeros((height, width), np.float32)
                coverage_HW[target] = coverage_WW
                self.coverages.append(coverage_HW)
                self._visible_areas.append(area)
                self._full_areas.append(area)
                weight = coverage_WW[..., None]
                self.image_HW3[target] = (
                    self.image_HW3[target] * (1 - weight) + colours_SS3[source] * weight
                )
                return True
        return False


def _enlarged(small: npt.NDArray[np.float64], width: int, height: int) -> Floats:
    channels = (Image.fromarray(channel) for channel in np.moveaxis(small.astype(np.float32), 2, 0))
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(c.resize((width, height), bicubic)) for c in channels], axis=2)


def _object(
    shape_class: ShapeClass, diameter: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Draw one object at a random angle, with varied colour, shading and texture phase.

    Args:
        shape_class: What to draw.
        diameter: Diameter in pixels of the circle that holds the shape.
        rng: Source of the variations.

    Returns:
        On a square of side S just large enough: RGB from 0 to 255 (S, S, 3), and how much of each pixel the object covers,
        from 0 to 1 (S, S).
    """
    side = int(np.ceil(diameter)) + 4
    angle = rng.uniform(-np.pi, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    outline_P2 = _outline(shape_class.shape) @ np.array([(cos, sin), (-sin, cos)])
    points_P2 = (outline_P2 * (diameter / 2) + side / 2) * _OVERSAMPLING - 0.5
    canvas = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING), 0)
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points_P2], fill=255)
    covered_SS = np.asarray(canvas.reduce(_OVERSAMPLING)).astype(np.float32)
    coverage_SS: Floats = covered_SS / np.float32(255)
    colour_3 = np.asarray(COLOURS[shape_class.colour], np.float32) * rng.uniform(0.88, 1.08, 3)
    dark_3 = colour_3 * rng.uniform(0.7, 1.3) * _TONE_DARK
    # Coordinates turned by an angle, -1 to 1 over the diameter.
    angle += rng.uniform(-0.3, 0.3)
    axis = ((np.arange(side) + 0.5 - side / 2) * 2 / diameter).astype(np.float32)
    x_SS, y_SS = np.meshgrid(axis, axis)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u_SS, v_SS = x_SS * cos + y_SS * sin, y_SS * cos - x_SS * sin
    tone_SS1 = _texture(shape_class.texture, u_SS, v_SS, diameter, rng)[..., None]
    shade_SS1 = (1 + rng.uniform(-0.18, 0.18) * u_SS + rng.uniform(-0.18, 0.18) * v_SS)[..., None]
    colours_SS3 = (colour_3 * (1 - tone_SS1) + dark_3 * tone_SS1) * shade_SS1
    grain_SS1 = rng.normal(0, 4, (side, side, 1))
    return np.clip(colours_SS3 + grain_SS1, 0, 255).astype(np.float32), coverage_SS


def _texture(
    texture: str, u_SS: Floats, v_SS: Floats, diameter: float, rng: np.random.Generator
) -> Floats:
    """Share of the dark tone in each pixel, 0 to 1, with edges about a pixel wide."""
    if texture == "plain":
        return np.zeros_like(u_SS)
    repeats = rng.uniform(_REPEATS_MIN, _REPEATS_MAX)
    a_SS = np.cos(np.pi * repeats * u_SS + rng.uniform(0, 2 * np.pi))
    b_SS = np.cos(np.pi * repeats * v_SS + rng.uniform(0, 2 * np.pi))
    # A wave's slope at its zero is pi * repeats per half diameter: this makes the edge one pixel wide.
    sharpness = np.float32(diameter / (2 * np.pi * repeats))
    waves = {"striped": a_SS, "dotted": (a_SS + b_SS) / 2 - 0.25, "checked": a_SS * b_SS}
    dark_SS: Floats = np.clip(waves[texture] * sharpness + 0.5, 0, 1).astype(np.float32)
    return dark_SS


def _outline(shape: str) -> Points:
    """The closed outline of a shape, (P, 2) x and y inside the unit circle, y down."""
    if shape == "cross":
        arm, half = 0.95, 0.3
        quarters = [np.array([(half, -arm), (half, -half), (arm, -half)])]
        for _ in range(3):
            quarters.append(quarters[-1] @ np.array([(0.0, 1.0), (-1.0, 0.0)]))
        return np.concatenate(quarters)
    if shape == "crescent":
        outer = np.linspace(-0.78 * np.pi, 0.78 * np.pi, 48)
        rim = np.stack([-np.cos(outer), np.sin(outer)], axis=1)
        tip_x, tip_y = rim[-1]
        centre = 0.62
        radius = float(np.hypot(tip_x - centre, tip_y))
        spread = float(np.arctan2(tip_y, centre - tip_x))
        inner = np.linspace(spread, -spread, 40)
        bite = np.stack([centre - radius * np.cos(inner), radius * np.sin(inner)], axis=1)
        return np.concatenate([rim, bite[1:-1]])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([x, -y - 2], axis=1)
        unit: Points = points / np.linalg.norm(points, axis=1).max()
        return unit
    corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[shape]
    start = -np.pi / 4 if shape == "square" else -np.pi / 2
    angles = start + np.arange(corners) * 2 * np.pi / corners
    radii = np.ones(corners)
    if shape == "star":
        radii[1::2] = 0.42
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


DRAWING_VERSION = 2
"""Raised whenever the same configuration draws other files."""


_LABELS_KEY = 4
_SPLIT_KEYS = {"train": 2, "val": 3}
"""Of their streams of random numbers; 1 is that of the classes."""
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
    """Sizes of the synthetic dataset; equal configurations draw equal files."""

    seed: int = 7
    """Decides every random choice: splits, scenes, image labels and embeddings."""
    images_train: int = 1350
    """Training scenes; they hold base classes only."""
    images_val: int = 120
    """Validation scenes; they hold base and novel classes."""
    image_label_images_per_class: int = 16
    """Images of a single object in each class's tar of the image-label source; 0 leaves the source out."""
    size: int = 128
    """Longest edge of a validation scene in pixels."""
    train_scale: float = 1.25
    """Longest edge of a training scene, as a multiple of ``size``; more objects fit into it, no larger than in validation."""
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
    """Fewest objects a validation scene."""
    objects_most: int = 4
    """Most objects a validation scene."""
    train_objects_least: int = 4
    """Fewest objects a training scene."""
    train_objects_most: int = 9
    """Most objects a training scene."""
    object_size_least: float = 0.25
    """Smallest diameter of an object, as a share of ``size``."""
    object_size_most: float = 0.5
    """Largest diameter of an object, as a share of ``size``."""
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
            "train_scale": (1, 10),
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
            "train_objects_least": (1, np.inf),
            "train_objects_most": (self.train_objects_least, np.inf),
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
        Path of the dataset config, ``description.toml``.

    Raises:
        DataError: The folder holds something else.
        DiskFullError: There is no room for the files.
    """
    config = config or SyntheticConfig()
    settings = {"drawing_version": DRAWING_VERSION, **asdict(config)}
    description = folder / "description.toml"
    if _holds(folder, settings):
        logger.info("using the data set that is in %s", folder)
        return description
    with Lock(folder.with_name(f".{folder.name}.lock"), subject=str(folder)):
        if _holds(folder, settings):  # another process drew it meanwhile
            return description
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with write_errors(folder):
                unfinished.mkdir(parents=True)
                _write(unfinished, config, progress)
                (unfinished / "synthetic.json").write_text(json.dumps(settings), encoding="utf-8")
                if folder.exists():
                    folder.rmdir()
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return description


def _holds(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder already holds the data set of these settings; raises where it holds anything else."""
    manifest, hint = folder / "synthetic.json", "choose another folder, or delete this one"
    if manifest.is_file():
        found = read_json(manifest, hint=hint, error=DataError)
        if found == settings:
            return True
        changed = sorted(key for key, value in settings.items() if found.get(key) != value)
        why = f"holds a synthetic data set of other settings ({', '.join(changed)})"
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        why = "is not empty and does not hold a synthetic data set"
    else:
        return False
    raise DataError(f"{folder} {why}", hint=hint, path=folder)


def _write(folder: Path, config: SyntheticConfig, progress: Progress) -> None:
    """Write the files of a data set."""
    classes = build_classes(config)
    each = config.image_label_images_per_class
    labelled = {index: c for index, c in enumerate(classes) if c.covered and each}
    total = config.images_train + config.images_val + len(labelled) * each
    colours = list(COLOURS)[: config.colours]
    words = [*colours, *TEXTURES[: config.textures], *SHAPES[: config.shapes]]
    dim, noise, seed = config.embedding_dim, config.embedding_noise, config.seed
    encoder = CompositionalEncoder.create(words, dim=dim, noise=noise, seed=seed, aliases=ALIASES)
    encoder.save(folder / "text_encoder.json")
    embeddings_CD = encoder.encode([c.name for c in classes])
    np.save(folder / "embeddings.npy", embeddings_CD.astype(np.float16))
    with progress.task("drawing the data set", total=total, unit="images") as task:
        splits = {s: _draw_split(folder, s, classes, config, task) for s in ("train", "val")}
        seen = splits["train"]["annotations"]
        instances = Counter(a["category_id"] for a in seen)
        images = Counter(c for c, _ in {(a["category_id"], a["image_id"]) for a in seen})
        categories = [
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
            for identity, c in enumerate(classes, 1)
        ]
        for split, content in splits.items():
            text = json.dumps(content | {"categories": categories})
            (folder / f"lvis_{split}.json").write_text(text, encoding="utf-8")
        if labelled:
            (folder / "tars").mkdir()
        for class_index, shape_class in labelled.items():
            with tarfile.open(folder / "tars" / f"{shape_class.synset}.tar", "w") as tar:
                for index in range(each):
                    rng = np.random.default_rng([config.seed, _LABELS_KEY, class_index, index])
                    canvas = _Canvas(config.image_label_size, rng)
                    shorter = min(canvas.image_HW3.shape[:2])
                    # One object that fills the image: the loss of image labels takes it for the largest region.
                    while not canvas.place(shape_class, rng.uniform(0.8, 1.05) * shorter, rng):
                        pass
                    image = canvas.jpeg()
                    # A fresh TarInfo has time 0 and no owner: equal data sets have equal tars.
                    member = tarfile.TarInfo(f"{shape_class.synset}_{index}.jpg")
                    member.size = len(image)
                    tar.addfile(member, io.BytesIO(image))
                    task.advance()
    labels = '\n[image_labels]\ntars = "tars"\n' if labelled else ""
    (folder / "description.toml").write_text(_DESCRIPTION + labels, encoding="utf-8")


def _draw_split(
    folder: Path, split: str, classes: Sequence[ShapeClass], config: SyntheticConfig, task: Task
) -> dict[str, list[dict[str, Any]]]:
    """Draw the scenes of a split: several objects, which overlap a little.

    Returns:
        ``images`` and ``annotations``, as LVIS has them.
    """
    (folder / split).mkdir()
    rates_C = np.array([{"f": 1.0, "c": 0.5, "r": 0.0}[c.frequency] for c in classes])
    rates_C /= rates_C.sum()
    novel_C = np.array([float(c.frequency == "r") for c in classes])
    if split == "val" and novel_C.any():
        share = config.novel_rate
        rates_C = (1 - share) * rates_C + share * novel_C / novel_C.sum()
    key, count = _SPLIT_KEYS[split], getattr(config, f"images_{split}")
    size, least, most = config.size, config.objects_least, config.objects_most
    if split == "train":
        size = round(config.train_scale * size)
        least, most = config.train_objects_least, config.train_objects_most
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([config.seed, key, index])
        canvas = _Canvas(size, rng)
        chosen: list[int] = []
        for _ in range(int(rng.integers(least, most + 1))):
            repeat = chosen and rng.random() < _SAME_CLASS
            chosen.append(chosen[-1] if repeat else int(rng.choice(len(rates_C), p=rates_C)))
        drawn = []
        for class_index in chosen:
            share = rng.uniform(config.object_size_least, config.object_size_most)
            if canvas.place(classes[class_index], share * config.size, rng):
                drawn.append(class_index)
        objects: list[dict[str, Any]] = []
        for class_index, coverage_HW in zip(drawn, canvas.coverages, strict=True):
            if polygons := outlines(coverage_HW):
                corners = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
                low, high = corners.min(axis=0), corners.max(axis=0)
                box = [*low.tolist(), *(round(side, 2) for side in (high - low).tolist())]
                area = round(float(coverage_HW.sum()), 2)
                made = {"category_id": class_index + 1, "bbox": box, "area": area}
                objects.append({**made, "segmentation": polygons})
        counts = Counter(entry["category_id"] for entry in objects)
        absent = sorted(set(range(1, len(classes) + 1)) - counts.keys())
        # Of a class that is there twice the last one may be left out, and then the class is not annotated exhaustively.
        not_exhaustive = sorted(category for category, number in counts.items() if number > 1)[:1]
        if not_exhaustive and rng.random() < config.not_exhaustive_rate:
            last = [entry for entry in objects if entry["category_id"] == not_exhaustive[0]][-1]
            objects.remove(last)
        else:
            not_exhaustive = []
        negatives = rng.permutation(len(absent))[: config.negatives_per_image]
        # Ids of the splits must not meet: predictions on both may end up in one file.
        image_id = key * 100_000 + index + 1
        file_name = f"{image_id:06d}.jpg"
        (folder / split / file_name).write_bytes(canvas.jpeg())
        height, width = canvas.image_HW3.shape[:2]
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
        image = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        image |= {"neg_category_ids": sorted(absent[i] for i in negatives)}
        images.append(image | {"not_exhaustive_category_ids": not_exhaustive})
        task.advance()
    return {"images": images, "annotations": annotations}
