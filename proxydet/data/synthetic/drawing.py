"""Draws scenes and single objects of the synthetic data set, by Pillow and numpy, and traces what stays visible of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import contourpy
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from proxydet.data.synthetic.classes import COLOURS, ShapeClass

if TYPE_CHECKING:
    from proxydet.data.synthetic.dataset import SyntheticConfig

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
_TOLERANCE = 0.2
"""Pixels by which a polygon may miss the outline that it simplifies."""


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


def draw_scene(
    classes: Sequence[ShapeClass],
    rates_C: npt.NDArray[np.float64],
    config: SyntheticConfig,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], list[SceneObject]]:
    """Draw a scene of several objects, which overlap a little.

    Args:
        classes: All classes.
        rates_C: float64 (C,), the probability of each.
        config: Sizes.
        rng: Source of everything random in the scene.

    Returns:
        The image, uint8 (H, W, 3), and what is visible on it.
    """
    canvas = _Canvas(config.size, rng)
    count = int(rng.integers(config.objects_least, config.objects_most + 1))
    chosen: list[int] = []
    for _ in range(count):
        repeat = chosen and rng.random() < _SAME_CLASS
        chosen.append(chosen[-1] if repeat else int(rng.choice(len(rates_C), p=rates_C)))
    drawn = []
    for index in chosen:
        share = rng.uniform(config.object_size_least, config.object_size_most)
        if canvas.place(classes[index], share * config.size, rng):
            drawn.append(index)
    objects = []
    for index, coverage_HW in zip(drawn, canvas.coverages, strict=True):
        polygons = _polygons(coverage_HW)
        if polygons:
            corners = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            box = (float(x0), float(y0), round(float(x1 - x0), 2), round(float(y1 - y0), 2))
            objects.append(SceneObject(index, polygons, round(float(coverage_HW.sum()), 2), box))
    return canvas.image_HW3.astype(np.uint8), objects


def draw_single(
    shape_class: ShapeClass, size: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Draw one object that fills much of the image, for image labels: uint8 (H, W, 3)."""
    canvas = _Canvas(size, rng)
    shorter = min(canvas.image_HW3.shape[:2])
    while not canvas.place(shape_class, rng.uniform(0.45, 0.85) * shorter, rng):
        pass
    return canvas.image_HW3.astype(np.uint8)


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
            x0, x1, y0, y1 = (
                max(left, 0),
                min(left + side, width),
                max(top, 0),
                min(top + side, height),
            )
            target = slice(y0, y1), slice(x0, x1)
            source = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            coverage_HW = np.zeros((height, width), np.float32)
            coverage_HW[target] = coverage_SS[source]
            if self._allows(coverage_HW):
                for below_HW in self.coverages:
                    below_HW *= 1 - coverage_HW
                self.coverages.append(coverage_HW)
                self._full_areas.append(float(coverage_HW.sum()))
                weight = coverage_HW[target][..., None]
                self.image_HW3[target] = (
                    self.image_HW3[target] * (1 - weight) + colours_SS3[source] * weight
                )
                return True
        return False

    def _allows(self, coverage_HW: Floats) -> bool:
        area = float(coverage_HW.sum())
        for below_HW, full in zip(self.coverages, self._full_areas, strict=True):
            hidden = float((below_HW * coverage_HW).sum())
            # The second limit keeps an object from lying wholly inside another: no holes.
            if float(below_HW.sum()) - hidden < _VISIBLE_LEAST * full or hidden > 0.5 * area:
                return False
        return True


def _enlarged(small: npt.NDArray[np.float64], width: int, height: int) -> Floats:
    channels = [
        Image.fromarray(small[..., c].astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for c in range(small.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


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


def _polygons(coverage_HW: Floats) -> list[list[float]]:
    """Trace the outlines of a mask along coverage one half.

    Args:
        coverage_HW: How much of each pixel belongs to the object, 0 to 1; it must have no holes.

    Returns:
        Polygons in COCO's form, x1, y1, x2, y2, ... in pixels (the first pixel's middle is at 0.5, 0.5), each with at least
        three corners; outlines below one pixel of area are left out.
    """
    height, width = coverage_HW.shape
    polygons = []
    for line in contourpy.contour_generator(z=np.pad(coverage_HW, 1), name="serial").lines(0.5):
        points_P2 = _simplified(np.asarray(line)[:-1] - 0.5)
        x, y = points_P2.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        if len(points_P2) >= 3 and area >= 1:
            inside_P2 = np.clip(points_P2, 0, (width, height)).round(2)
            polygons.append([float(value) for value in inside_P2.ravel()])
    return polygons


def _simplified(points_P2: Points) -> Points:
    """Leave out corners of a closed outline that lie within a tolerance of the line they are on.

    Douglas-Peucker on the two halves between the first point and the one farthest from it.
    """
    if len(points_P2) < 4:
        return points_P2
    far = int(np.argmax(((points_P2 - points_P2[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([points_P2, points_P2[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far]] = True
    spans = [(0, far), (far, len(closed) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        along = closed[last] - closed[first]
        offset = closed[first + 1 : last] - closed[first]
        length = np.hypot(*along)
        if length == 0:
            distances = np.hypot(offset[:, 0], offset[:, 1])
        else:
            distances = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]) / length
        worst = int(np.argmax(distances))
        if distances[worst] > _TOLERANCE:
            middle = first + 1 + worst
            kept[middle] = True
            spans += [(first, middle), (middle, last)]
    return points_P2[kept[:-1]]
