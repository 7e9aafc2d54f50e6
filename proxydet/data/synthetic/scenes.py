"""Puts objects on a background so that they overlap a little, and keeps what stays visible of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from proxydet.data.synthetic.contours import polygons_of
from proxydet.data.synthetic.painting import Floats, Patch, paint_background, paint_object

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxydet.data.synthetic.attributes import ShapeClass
    from proxydet.data.synthetic.config import SyntheticConfig

_VISIBLE_LEAST = 0.65
_TRIES = 24
_EDGE_SLACK = 0.08


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene."""

    class_index: int
    polygons: list[list[float]]
    """Outline of the visible part, COCO polygons in pixels."""
    area: float
    """Visible area in pixels."""
    box_xywh: tuple[float, float, float, float]
    """Box around the visible part, pixels."""


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it."""

    picture_HW3: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class ClassRates:
    """How often each class is drawn: (C,) probabilities."""

    rates_C: npt.NDArray[np.float64]
    repeat: float = 0.2
    """Chance that an object is of the same class as the one before it."""

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draw the classes of one scene's objects."""
        chosen: list[int] = []
        for _ in range(count):
            if chosen and rng.random() < self.repeat:
                chosen.append(chosen[-1])
            else:
                chosen.append(int(rng.choice(len(self.rates_C), p=self.rates_C)))
        return chosen


class _Canvas:
    """A picture in the making."""

    def __init__(self, background_HW3: Floats) -> None:
        self.picture_HW3 = background_HW3
        self.coverages: list[Floats] = []
        self.full_areas: list[float] = []

    def place(self, patch: Patch, rng: np.random.Generator) -> bool:
        """Paint a patch where it hides little of the objects below; False where no place was found."""
        height, width = self.picture_HW3.shape[:2]
        side = len(patch.coverage_SS)
        slack = int(side * _EDGE_SLACK)
        if side - 2 * slack >= min(height, width):
            return False
        for _ in range(_TRIES):
            left = int(rng.integers(-slack, width - side + slack + 1))
            top = int(rng.integers(-slack, height - side + slack + 1))
            coverage_HW = np.zeros((height, width), np.float32)
            target, source = _overlap(left, top, side, width, height)
            coverage_HW[target] = patch.coverage_SS[source]
            if self._allows(coverage_HW):
                self._paint(coverage_HW, patch.colours_SS3, target, source)
                return True
        return False

    def _allows(self, coverage_HW: Floats) -> bool:
        area = float(coverage_HW.sum())
        for below_HW, full in zip(self.coverages, self.full_areas, strict=True):
            hidden = float((below_HW * coverage_HW).sum())
            # The second limit keeps an object from lying wholly inside another: no holes.
            if float(below_HW.sum()) - hidden < _VISIBLE_LEAST * full or hidden > 0.5 * area:
                return False
        return True

    def _paint(
        self,
        coverage_HW: Floats,
        colours_SS3: Floats,
        target: tuple[slice, slice],
        source: tuple[slice, slice],
    ) -> None:
        for below_HW in self.coverages:
            below_HW *= 1 - coverage_HW
        self.coverages.append(coverage_HW)
        self.full_areas.append(float(coverage_HW.sum()))
        weight = coverage_HW[target][..., None]
        self.picture_HW3[target] = (
            self.picture_HW3[target] * (1 - weight) + colours_SS3[source] * weight
        )


def _overlap(
    left: int, top: int, side: int, width: int, height: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    return (
        (slice(y0, y1), slice(x0, x1)),
        (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)),
    )


def draw_scene(
    classes: Sequence[ShapeClass],
    rates: ClassRates,
    config: SyntheticConfig,
    rng: np.random.Generator,
) -> Scene:
    """Draw a scene of several objects.

    Args:
        classes: All classes.
        rates: How often each is drawn.
        config: Sizes.
        rng: Source of everything random in the scene.
    """
    width, height = _frame(config.size, rng)
    canvas = _Canvas(paint_background(width, height, rng))
    count = int(rng.integers(config.objects_least, config.objects_most + 1))
    drawn: list[int] = []
    for index in rates.draw(count, rng):
        share = rng.uniform(config.object_size_least, config.object_size_most)
        if canvas.place(paint_object(classes[index], share * config.size, rng), rng):
            drawn.append(index)
    return _finish(canvas, drawn)


def draw_single(
    shape_class: ShapeClass, size: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Draw one object that fills much of the picture: an image-label picture, (H, W, 3) uint8."""
    width, height = _frame(size, rng)
    canvas = _Canvas(paint_background(width, height, rng))
    placed = False
    while not placed:
        placed = canvas.place(
            paint_object(shape_class, rng.uniform(0.45, 0.85) * min(width, height), rng), rng
        )
    return canvas.picture_HW3.astype(np.uint8)


def _frame(size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: square, landscape or portrait."""
    short = round(size * 0.8)
    return ((size, size), (size, short), (short, size))[int(rng.integers(0, 3))]


def _finish(canvas: _Canvas, drawn: list[int]) -> Scene:
    objects = []
    for index, coverage_HW in zip(drawn, canvas.coverages, strict=True):
        polygons = polygons_of(coverage_HW)
        if polygons:
            corners = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            box = (float(x0), float(y0), round(float(x1 - x0), 2), round(float(y1 - y0), 2))
            objects.append(SceneObject(index, polygons, round(float(coverage_HW.sum()), 2), box))
    return Scene(canvas.picture_HW3.astype(np.uint8), tuple(objects))
