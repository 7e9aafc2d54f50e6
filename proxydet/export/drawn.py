"""A picture drawn for the proof of an export."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

_SHAPES = 12


def drawn_picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Draw coloured boxes and discs on noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(96, 160, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for index in range(_SHAPES):
        side = int(rng.integers(8, max(min(height, width) // 2, 9)))
        left, top = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw = pen.rectangle if index % 2 else pen.ellipse
        draw((left, top, left + side, top + side), fill=colour)
    return np.array(image)
