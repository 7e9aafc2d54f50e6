"""The classes of the synthetic data set: every combination of a colour, a texture and a shape."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np

from proxydet.errors import ConfigError

if TYPE_CHECKING:
    from proxydet.data.synthetic.dataset import SyntheticConfig

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

    @property
    def novel(self) -> bool:
        """Whether the class is held out of training."""
        return self.frequency == "r"


def build_classes(config: SyntheticConfig) -> tuple[ShapeClass, ...]:
    """Make all combinations of the attributes and split them into base and novel.

    Novel combinations are spread evenly over the attribute values, and every pair of values of different attributes stays in
    some base class wherever the counts allow it, so that what a novel class looks like can be told from what base classes
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
