"""Draws single shapes and backgrounds with soft edges, by Pillow and numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from proxydet.data.synthetic.attributes import COLOURS

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxydet.data.synthetic.attributes import ShapeClass

Floats = npt.NDArray[np.float32]

_OVERSAMPLING = 4
_REPEATS_MIN, _REPEATS_MAX = 3.0, 4.0
_TONE_DARK = 0.22


@dataclass(frozen=True)
class Patch:
    """A drawn object on a square of side S."""

    colours_SS3: Floats
    """RGB from 0 to 255."""
    coverage_SS: Floats
    """How much of each pixel the object covers, from 0 to 1."""


def paint_object(shape_class: ShapeClass, diameter: float, rng: np.random.Generator) -> Patch:
    """Draw one object of a class at a random angle, with varied colour, shading and texture phase.

    Args:
        shape_class: What to draw.
        diameter: Diameter in pixels of the circle that holds the shape.
        rng: Source of the variations.

    Returns:
        The object in the middle of a square just large enough.
    """
    side = int(np.ceil(diameter)) + 4
    angle = rng.uniform(-np.pi, np.pi)
    coverage_SS = _coverage(shape_class.shape, diameter, angle, side)
    colour_3 = np.asarray(COLOURS[shape_class.colour], np.float32) * rng.uniform(0.88, 1.08, 3)
    dark_3 = colour_3 * rng.uniform(0.7, 1.3) * _TONE_DARK
    u_SS, v_SS = _rotated_grid(side, diameter, angle + rng.uniform(-0.3, 0.3))
    tone_SS1 = _texture(shape_class.texture, u_SS, v_SS, diameter, rng)[..., None]
    shade_SS1 = (1 + rng.uniform(-0.18, 0.18) * u_SS + rng.uniform(-0.18, 0.18) * v_SS)[..., None]
    colours_SS3 = (colour_3 * (1 - tone_SS1) + dark_3 * tone_SS1) * shade_SS1
    grain_SS1 = rng.normal(0, 4, (side, side, 1))
    return Patch(np.clip(colours_SS3 + grain_SS1, 0, 255).astype(np.float32), coverage_SS)


def paint_background(width: int, height: int, rng: np.random.Generator) -> Floats:
    """Draw a muted background: colour gradient, cloudy texture, distracting lines, grain.

    Returns:
        (height, width, 3) RGB from 0 to 255.
    """
    corners = rng.uniform(50, 190, (2, 2, 1)) + rng.uniform(-28, 28, (2, 2, 3))
    picture_HW3 = _enlarged(corners, width, height)
    cells = int(rng.integers(3, 14))
    picture_HW3 += _enlarged(rng.normal(0, rng.uniform(4, 18), (cells, cells, 3)), width, height)
    picture_HW3 = _with_lines(picture_HW3, rng)
    picture_HW3 += rng.normal(0, rng.uniform(2, 7), (height, width, 1)).astype(np.float32)
    return np.clip(picture_HW3, 0, 255)


def _enlarged(small: npt.NDArray[np.float64], width: int, height: int) -> Floats:
    channels = [
        Image.fromarray(small[..., c].astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for c in range(small.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


def _with_lines(picture_HW3: Floats, rng: np.random.Generator) -> Floats:
    height, width = picture_HW3.shape[:2]
    canvas = Image.fromarray(np.clip(picture_HW3, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 7))):
        ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(2)]
        tone = tuple(int(value) for value in rng.uniform(30, 215) + rng.uniform(-30, 30, 3))
        draw.line(ends, fill=tone, width=int(rng.integers(1, 4)))
    return np.asarray(canvas).astype(np.float32)


def outline(shape: str) -> npt.NDArray[np.float64]:
    """The closed outline of a shape, (P, 2) x and y inside the unit circle, y down."""
    return _OUTLINES[shape]()


def _regular(
    corners: int, *, inner: float | None = None, start: float = -np.pi / 2
) -> npt.NDArray[np.float64]:
    count = corners if inner is None else 2 * corners
    angles = start + np.arange(count) * 2 * np.pi / count
    radii = np.ones(count)
    if inner is not None:
        radii[1::2] = inner
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross() -> npt.NDArray[np.float64]:
    arm, half = 0.95, 0.3
    quarter = np.array([(half, -arm), (half, -half), (arm, -half)])
    quarter_turn = np.array([(0.0, 1.0), (-1.0, 0.0)])
    corners = [quarter]
    for _ in range(3):
        corners.append(corners[-1] @ quarter_turn)
    return np.concatenate(corners)


def _crescent() -> npt.NDArray[np.float64]:
    outer = np.linspace(-0.78 * np.pi, 0.78 * np.pi, 48)
    rim = np.stack([-np.cos(outer), np.sin(outer)], axis=1)
    tip_x, tip_y = rim[-1]
    centre = 0.62
    radius = float(np.hypot(tip_x - centre, tip_y))
    spread = float(np.arctan2(tip_y, centre - tip_x))
    inner = np.linspace(spread, -spread, 40)
    bite = np.stack([centre - radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    return np.concatenate([rim, bite[1:-1]])


def _heart() -> npt.NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    points = np.stack([x, -y - 2], axis=1)
    unit: npt.NDArray[np.float64] = points / np.linalg.norm(points, axis=1).max()
    return unit


_OUTLINES: dict[str, Callable[[], npt.NDArray[np.float64]]] = {
    "circle": lambda: _regular(64),
    "square": lambda: _regular(4, start=-np.pi / 4),
    "triangle": lambda: _regular(3),
    "star": lambda: _regular(5, inner=0.42),
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
}


def _coverage(shape: str, diameter: float, angle: float, side: int) -> Floats:
    cos, sin = np.cos(angle), np.sin(angle)
    points = outline(shape) @ np.array([(cos, sin), (-sin, cos)]) * (diameter / 2) + side / 2
    canvas = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING), 0)
    corners = [(float(x), float(y)) for x, y in points * _OVERSAMPLING - 0.5]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    coverage_SS: Floats = np.asarray(canvas.reduce(_OVERSAMPLING)).astype(np.float32) / np.float32(
        255
    )
    return coverage_SS


def _rotated_grid(side: int, diameter: float, angle: float) -> tuple[Floats, Floats]:
    """Coordinates turned by an angle, -1 to 1 over the diameter."""
    axis = ((np.arange(side) + 0.5 - side / 2) * 2 / diameter).astype(np.float32)
    x_SS, y_SS = np.meshgrid(axis, axis)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x_SS * cos + y_SS * sin, y_SS * cos - x_SS * sin


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
