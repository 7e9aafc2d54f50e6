"""What the drawn data set holds: how many classes, images and objects, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass

from proxydet.data.synthetic.attributes import COLOURS, SHAPES, TEXTURES
from proxydet.errors import ConfigError


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
    """Pictures of a single object in each class's tar of the image-label source; 0 leaves the source out."""
    size: int = 128
    """Longest edge of a scene in pixels."""
    image_label_size: int = 64
    """Longest edge of an image-label picture in pixels."""
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
    """Length of a class's own random direction beside its attributes' directions of length 1."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        self._check_counts()
        self._check_classes()
        self._check_rates()

    def _check_counts(self) -> None:
        least = {
            "images_train": 1,
            "images_val": 1,
            "image_label_images_per_class": 0,
            "size": 32,
            "image_label_size": 32,
            "objects_least": 1,
            "objects_most": self.objects_least,
            "negatives_per_image": 0,
        }
        for field, smallest in least.items():
            if getattr(self, field) < smallest:
                raise ConfigError(
                    f"{field} is {getattr(self, field)}; it must be at least {smallest}"
                )

    def _check_classes(self) -> None:
        for field, words in (("colours", COLOURS), ("shapes", SHAPES), ("textures", TEXTURES)):
            if not 1 <= getattr(self, field) <= len(words):
                raise ConfigError(f"{field} is {getattr(self, field)}; there are 1 to {len(words)}")
        if not 0 <= self.novel_covered <= self.novel_classes:
            raise ConfigError(
                f"novel_covered is {self.novel_covered}; it must be from 0 to novel_classes ({self.novel_classes})"
            )
        words_count = self.colours + self.shapes + self.textures
        if self.embedding_dim <= words_count:
            raise ConfigError(
                f"embedding_dim is {self.embedding_dim}; it must exceed the {words_count} attribute words"
            )

    def _check_rates(self) -> None:
        for field in ("common_share", "novel_rate", "not_exhaustive_rate", "embedding_noise"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be from 0 to 1")
        if not 0.05 <= self.object_size_least <= self.object_size_most <= 0.9:
            raise ConfigError(
                "object sizes must satisfy 0.05 <= object_size_least <= object_size_most <= 0.9, "
                f"not {self.object_size_least} and {self.object_size_most}"
            )
