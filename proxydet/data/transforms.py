"""Resizing, cropping and mirroring of images together with their boxes and polygons.

Geometry and images are separate: a `View` says where the pixels of the result come from; it is drawn or computed once
and then applied to the image and to everything annotated on it.

Dimensions: A annotations, H, W the image, h, w the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.config import SourceConfig
from proxydet.data.images import Pixels


@dataclass(frozen=True, kw_only=True)
class View:
    """Scale, then crop, then mirror.

    Attributes:
        scaled: (height, width) of the whole image after scaling, in pixels.
        offset: (y, x) of the crop in the scaled image.
        size: (height, width) of the crop, which lies inside the scaled image.
        factor_xy: What coordinates are multiplied by before the offset is taken off.
        mirrored: Whether the crop is then mirrored left to right.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    factor_xy: tuple[float, float]
    mirrored: bool = False

    def image(self, pixels_HW3: Pixels) -> Pixels:
        """Return the view of an image: uint8 (h, w, 3), contiguous."""
        return np.array(self.apply(Image.fromarray(pixels_HW3)))

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the view of a Pillow image; where nothing has to be done, the image itself.

        The pixels are those of resizing the width of the whole image, then its height, and cutting the view out, whatever
        order Pillow's own resize takes: 13.0.0 sometimes takes the height first, whose pixels differ by 1. Rows that the
        view does not need are dropped before, columns in between.
        """
        height, width = self.scaled
        top, left = self.offset
        tall = image.height
        # The first row that the view's rows are mixed from, and the one after the last: a bilinear filter reaches a pixel of
        # the larger of both images; one row more against rounding.
        step = tall / height
        reach = max(step, 1.0) + 1.0
        first = max(math.floor(top * step - reach), 0)
        last = min(math.ceil((top + self.size[0]) * step + reach), tall)
        if image.width != width:
            if (first, last) != (0, tall):
                image = image.crop((0, first, image.width, last))
            image = image.resize((width, image.height), Image.Resampling.BILINEAR)
        else:
            first = 0
        # What was dropped above and below comes back as black rows: resizing the other side depends on the whole height.
        if image.size != (self.size[1], tall):
            image = image.crop((left, -first, left + self.size[1], tall - first))
        if tall != height:
            image = image.resize((image.width, height), Image.Resampling.BILINEAR)
        if height != self.size[0]:
            image = image.crop((0, top, image.width, top + self.size[0]))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image

    def mask(self, mask_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return the view of a mask by nearest neighbour: bool (h, w)."""
        height, width = self.scaled
        top, left = self.offset
        resized = Image.fromarray(mask_HW.astype(np.uint8)).resize(
            (width, height), Image.Resampling.NEAREST
        )
        result = np.asarray(resized)[top : top + self.size[0], left : left + self.size[1]]
        return np.ascontiguousarray(result[:, ::-1] if self.mirrored else result, dtype=np.bool_)

    def points(self, points_N2: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Map points (N, 2) as x, y; the result may lie outside the view: float64 (N, 2)."""
        mapped: npt.NDArray[np.float64] = np.multiply(points_N2, self.factor_xy, dtype=np.float64)
        mapped -= np.array(self.offset[::-1], dtype=np.float64)
        if self.mirrored:
            mapped[:, 0] = self.size[1] - mapped[:, 0]
        return mapped

    def boxes(self, boxes_A4: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Map boxes (A, 4) as xyxy and clip them to the view: float64 (A, 4); outside ones get no area."""
        corners = self.points(np.asarray(boxes_A4).reshape(-1, 2)).reshape(-1, 2, 2)
        ordered = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        limit = np.array(self.size[::-1] * 2, dtype=np.float64)
        clipped: npt.NDArray[np.float64] = np.clip(ordered, 0, limit)
        return clipped

    def polygons(
        self, polygons: Sequence[npt.NDArray[np.floating]]
    ) -> list[npt.NDArray[np.float64]]:
        """Map polygons, each (2n,) as x, y, x, y, ...; they may reach outside the view."""
        return [self.points(polygon.reshape(-1, 2)).reshape(-1) for polygon in polygons]


def scaled_crop(
    height: int, width: int, *, size: int, scale_factor: float, crop_y: float, crop_x: float
) -> View:
    """Scale an image so that it fits a square, then crop it to at most a square of ``size``.

    The image is scaled to fit (``scale_factor`` x ``size``) squared with its proportions kept. Where that is larger than
    ``size``, a window is cut out.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        size: Largest side of the result, in pixels.
        scale_factor: Drawn from the source's jitter range.
        crop_y: In [0, 1), where between the topmost and the lowest place the window lies.
        crop_x: In [0, 1), likewise from left to right.
    """
    target = size * scale_factor
    factor = min(target / height, target / width)
    # A side never vanishes, however thin the image or small the factor.
    scaled = (max(1, int(height * factor)), max(1, int(width * factor)))
    offset = (
        int(max(0, scaled[0] - size) * crop_y),
        int(max(0, scaled[1] - size) * crop_x),
    )
    return View(
        scaled=scaled,
        offset=offset,
        size=(min(size, scaled[0]), min(size, scaled[1])),
        factor_xy=(factor, factor),
    )


def shortest_side(height: int, width: int, *, shortest: int, longest: int) -> View:
    """Scale an image so that its shortest side is ``shortest``, or its longest is ``longest`` where that is less.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        shortest: Wanted shortest side, in pixels.
        longest: Largest longest side, in pixels.
    """
    factor = shortest / min(height, width)
    # In two steps, as detectron2 does it: in one, half pixels may round the other way.
    sides = [
        float(shortest) if side == min(height, width) else factor * side for side in (height, width)
    ]
    if max(sides) > longest:
        factor = longest / max(sides)
        sides = [side * factor for side in sides]
    scaled = (max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5)))
    return View(
        scaled=scaled,
        offset=(0, 0),
        size=scaled,
        factor_xy=(scaled[1] / width, scaled[0] / height),
    )


def training_view(
    height: int,
    width: int,
    source: SourceConfig,
    *,
    flip_probability: float,
    rng: np.random.Generator,
) -> View:
    """Draw the augmentation of one training image.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        source: Size of the result, and range of the scale jitter.
        flip_probability: Of mirroring.
        rng: Source of the four numbers that are drawn: scale, crop y, crop x, mirror.
    """
    low, high = source.scale
    jitter, crop_y, crop_x, mirror = rng.random(4)
    view = scaled_crop(
        height,
        width,
        size=source.size,
        scale_factor=low + (high - low) * jitter,
        crop_y=crop_y,
        crop_x=crop_x,
    )
    return replace(view, mirrored=bool(mirror < flip_probability))
