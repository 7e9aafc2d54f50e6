"""Draws boxes, masks and labels on images, by Pillow: colours, masks and boxes, places for labels, contact sheets.

Dimensions: H and W the image, h and w a window of it, L labels, P places for one label, B boxes that may be covered.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from proxydet.errors import ConfigError

if TYPE_CHECKING:
    from proxydet.modeling.postprocess import MaskWindow

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
RGB = tuple[int, int, int]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Where labels would cover more of the image than this, they are written smaller.
_LABELS_SHARE = 0.1
_SMALLEST_FONT = 11
# Around a mask, in pixels: its rim is drawn where it ends.
_MARGIN = 3


# --- Colours -----------------------------------------------------------------------------------------------------------

COLOURS: tuple[RGB, ...] = (
    *((255, 75, 60), (45, 255, 105), (0, 120, 255), (0, 150, 75), (255, 195, 255), (195, 60, 210)),
    *((240, 180, 0), (0, 210, 225), (165, 150, 225), (165, 120, 45), (255, 120, 255), (210, 240, 165)),
    *((120, 195, 75), (30, 150, 180), (255, 150, 150), (180, 90, 120), (255, 60, 165), (135, 75, 255)),
)  # fmt: skip
"""Colours that stand out from photographs and from each other: each is the one of the OKLab space (lightness 0.58 to 0.93, chroma
0.1 to 0.25) that is farthest from those before it. The page of ``proxydet serve`` has the same."""


def instance_colours(boxes: Sequence[Box]) -> list[RGB]:
    """Choose colours that tell the objects of one image apart, whatever their classes.

    The first ones get the colours in their order, all different; each further one the colour whose nearest bearer is farthest away.

    Args:
        boxes: The objects' boxes, the most important first.

    Returns:
        One colour for each, red, green, blue, each 0 to 255.
    """
    corners_N4 = np.asarray(boxes, np.float64).reshape(-1, 4)
    centres_N2 = (corners_N4[:, :2] + corners_N4[:, 2:]) / 2
    chosen: list[int] = []
    for index, centre_2 in enumerate(centres_N2):
        if index < len(COLOURS):
            chosen.append(index)
            continue
        nearest = np.full(len(COLOURS), np.inf)
        np.minimum.at(nearest, chosen, ((centres_N2[:index] - centre_2) ** 2).sum(axis=1))
        chosen.append(int(nearest.argmax()))
    return [COLOURS[index] for index in chosen]


def class_colour(index: int) -> RGB:
    """The colour of a class or track by its place, for videos, where the order of objects changes from frame to frame."""
    return COLOURS[index % len(COLOURS)]


def relative_luminance(colour: RGB) -> float:
    """Luminance of an sRGB colour from 0 (black) to 1 (white), as WCAG 2 defines it."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_colour_on(background: RGB) -> RGB:
    """Black or white, whichever contrasts more with a background (WCAG 2 contrast ratio)."""
    luminance = relative_luminance(background)
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


# --- Drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """One object to draw."""

    label: str
    """Class name."""
    box_xyxy: Box
    """Left, top, right, bottom in pixels of the image."""
    colour: RGB | None = None
    """Of box, mask and label; None: another one than the other objects, see `instance_colours`."""
    score: float | None = None
    """Shown behind the label where given."""
    mask_HW: Bools | MaskWindow | Callable[[], Bools | MaskWindow] | None = field(
        default=None, compare=False
    )
    """Mask of the image's size, the window of the image that it lies in, or a function that gives one of them when
    it is drawn."""


@dataclass(frozen=True, kw_only=True)
class DrawingStyle:
    """How objects are drawn."""

    boxes: bool = True
    """Draw the boxes."""
    masks: bool = True
    """Draw the masks of objects that have one."""
    labels: bool = True
    """Write the class names."""
    scores: bool = True
    """Write the scores behind the names."""
    mask_opacity: float = 0.32
    """How strongly a mask tints the image, 0 to 1."""
    font_size: int | None = None
    """Height of the letters in pixels; None: fitted to the image."""
    font_file: Path | None = None
    """TrueType file for scripts that the bundled fonts lack; None: a bundled font."""
    shortest_edge: int = 480
    """Smaller images are enlarged so that labels have room; 0 keeps every image's size."""
    class_order: Mapping[int, int] | None = None
    """Colours by class, as in videos: the place among `COLOURS` of each class id. None: each detection has a colour of its own."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        if not 0 <= self.mask_opacity <= 1:
            raise ConfigError(f"mask_opacity is {self.mask_opacity}; it must be from 0 to 1")
        if self.font_size is not None and self.font_size < 1:
            raise ConfigError(f"font_size is {self.font_size}; it must be at least 1")
        if self.shortest_edge < 0:
            raise ConfigError(f"shortest_edge is {self.shortest_edge}; it must be 0 or more")


def draw_objects(
    image: Image.Image, objects: Sequence[DrawnObject], style: DrawingStyle | None = None
) -> Image.Image:
    """Draw objects on a copy of an image.

    Large masks are painted before small ones; labels are written last, the first object's with the first
    choice of place.

    Args:
        image: The image; any mode.
        objects: What to draw, the most important first.
        style: How; the default style where None.

    Returns:
        A new RGB image; larger than the given one where that was small (see ``shortest_edge``).
    """
    style = style or DrawingStyle()
    # A whole factor that brings the shortest edge to about the desired one.
    desired = min(round(style.shortest_edge / min(image.size)), 4096 // max(image.size), 8)
    scale = max(desired, 1)
    size = (image.width * scale, image.height * scale)
    canvas = image.convert("RGB")
    if scale > 1:
        canvas = canvas.resize(size, Image.Resampling.BICUBIC)
    boxes: list[Box] = []
    for item in objects:
        left, top, right, bottom = (value * scale for value in item.box_xyxy)
        boxes.append((left, top, right, bottom))
    found = instance_colours([item.box_xyxy for item in objects])
    colours = [item.colour or own for item, own in zip(objects, found, strict=True)]
    if style.masks:
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        for index in sorted(range(len(objects)), key=lambda index: areas[index], reverse=True):
            if objects[index].mask_HW is not None:
                _draw_mask(canvas, objects[index], colours[index], scale, style.mask_opacity)
    if style.boxes:
        draw = ImageDraw.Draw(canvas, "RGBA")
        line = max(2, round(min(size) / 320))
        for colour, box in reversed(list(zip(colours, boxes, strict=True))):
            left, top, right, bottom = (round(value) for value in box)
            right, bottom = max(right, left + 1), max(bottom, top + 1)
            # A dark hair line around the coloured one keeps it visible on images of the same colour.
            around = (left - 1, top - 1, right + 1, bottom + 1)
            draw.rectangle(around, outline=(0, 0, 0, 110), width=line + 2)
            draw.rectangle((left, top, right, bottom), outline=(*colour, 255), width=line)
    if style.labels:
        texts = []
        for item in objects:
            # Control characters in a class name would break the line or vanish.
            name = "".join(c for c in item.label if unicodedata.category(c)[0] != "C")
            with_score = style.scores and item.score is not None
            texts.append(f"{name} {item.score:.0%}" if with_score else name)
        letters = style.font_size or _fitting_letters(texts, size, style.font_file)
        signs = [
            _sign(text, colour, letters, size[0], style.font_file)
            for text, colour in zip(texts, colours, strict=True)
        ]
        requests = [
            LabelRequest(box, sign.width, sign.height)
            for box, sign in zip(boxes, signs, strict=True)
        ]
        places = place_labels(requests, size)
        for sign, place in reversed(list(zip(signs, places, strict=True))):
            canvas.paste(sign, (round(place[0]), round(place[1])), sign)
    return canvas


def _draw_mask(
    canvas: Image.Image, item: DrawnObject, colour: RGB, scale: int, opacity: float
) -> None:
    """Tint an object's mask and draw its rim.

    Only the window that the mask lies in is touched: hundreds of masks on a large photograph stay cheap.
    """
    mask = item.mask_HW() if callable(item.mask_HW) else item.mask_HW
    assert mask is not None
    if isinstance(mask, np.ndarray):
        offset, inside_hw, (height, width) = (0, 0), mask, mask.shape
    else:
        offset, inside_hw, (height, width) = (mask.top, mask.left), mask.inside_hw, mask.size
    if (width * scale, height * scale) != canvas.size:
        raise ConfigError(
            f"the mask of {item.label!r} is {width} x {height} pixels, "
            f"the image {canvas.width // scale} x {canvas.height // scale}"
        )
    # The window in the image's rows and columns, cut to the mask and a margin, as far as the image goes.
    rows, columns = inside_hw.any(axis=1).nonzero()[0], inside_hw.any(axis=0).nonzero()[0]
    if not len(rows):
        return
    tight_hw = inside_hw[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = offset[0] + int(rows[0]), offset[1] + int(columns[0])
    before = (min(top, _MARGIN), min(left, _MARGIN))
    after = (
        min(height - top - tight_hw.shape[0], _MARGIN),
        min(width - left - tight_hw.shape[1], _MARGIN),
    )
    padded_hw = np.pad(tight_hw, list(zip(before, after, strict=True)))
    alpha = Image.fromarray(padded_hw.astype(np.uint8) * 255)
    if scale > 1:
        alpha = alpha.resize((alpha.width * scale, alpha.height * scale), Image.Resampling.BILINEAR)
    origin = ((left - before[1]) * scale, (top - before[0]) * scale)
    canvas.paste(colour, origin, alpha.point([round(value * opacity) for value in range(256)]))
    # The rim is about two pixels wide.
    alpha_hw = np.asarray(alpha)
    framed = np.pad(alpha_hw, 2)
    sides = (framed[:-4, 2:-2], framed[4:, 2:-2], framed[2:-2, :-4], framed[2:-2, 4:])
    inner_hw = np.minimum.reduce(sides)
    rim_hw = np.where(alpha_hw > inner_hw, alpha_hw - inner_hw, 0).astype(np.uint8)
    canvas.paste(colour, origin, Image.fromarray(rim_hw))


# --- Labels ------------------------------------------------------------------------------------------------------------

# Rows that a label may go up or down from its box, so that a dozen of one place stay apart.
_ROWS = 12
# What a place costs: for the share of it that covers other labels, for the share that covers other
# boxes (at most thrice), for coming late in the list (up to a point: being far is better than covering), and for each
# label's height that the image's edge moved it.
_COVERED, _CROWDED, _LATE, _MOVED = 10.0, 0.15, 0.05, 0.3
_CROWD_MOST, _LATE_MOST = 3.0, 1.4


@dataclass(frozen=True)
class LabelRequest:
    """A label that needs a place."""

    box: Box
    """The box that the label belongs to."""
    width: float
    height: float


def place_labels(requests: Sequence[LabelRequest], canvas: tuple[int, int]) -> list[Box]:
    """Choose a place for each label, the first ones first.

    Each label has a list of places around and inside its box, the best first: above, inside at the
    top, below, then at the right edge, then further rows. The place wins that covers the least of
    the labels placed before; among equal ones, the earlier in the list, where covering other boxes counts a little.

    Args:
        requests: What to place, the most important first.
        canvas: Width and height of the image in pixels; places never leave it.

    Returns:
        One place for each request.
    """
    boxes_L4 = np.array([request.box for request in requests], np.float64).reshape(-1, 4)
    placed_L4 = np.zeros_like(boxes_L4)
    for index, request in enumerate(requests):
        left, top, right, bottom = request.box
        width, height = request.width, request.height
        corners = [
            (column, row)
            for column in (left, right - width, (left + right - width) / 2)
            for row in (top - height, top, bottom, bottom - height)
        ]
        for number in range(1, _ROWS + 1):
            row = top + number * height
            above = top - (number + 1) * height
            corners += [(left, row), (left, above), (right, row), (left - width, row)]
        desired_P2 = np.array(corners, np.float64)
        size_2 = np.array([width, height])
        inside_P2 = np.maximum(np.minimum(desired_P2, np.array(canvas) - size_2), 0)
        places_P4 = np.concatenate([inside_P2, inside_P2 + size_2], axis=1)

        area = width * height
        others_B4 = np.delete(boxes_L4, index, axis=0)
        cost_P = _COVERED * overlaps(places_P4, placed_L4[:index]).sum(axis=1) / area
        crowd_P = overlaps(places_P4, others_B4).sum(axis=1) / area
        late_P = np.minimum(_LATE * np.arange(len(places_P4)), _LATE_MOST)
        cost_P += _CROWDED * np.minimum(crowd_P, _CROWD_MOST) + late_P
        cost_P += _MOVED * np.abs(inside_P2 - desired_P2).sum(axis=1) / height
        placed_L4[index] = places_P4[np.argmin(cost_P)]
    return [(left, top, right, bottom) for left, top, right, bottom in placed_L4.tolist()]


def overlaps(first_P4: Floats, second_B4: Floats) -> Floats:
    """Area in which each box of one set overlaps each of another: (P, B), in squared pixels."""
    low_PB2 = np.maximum(first_P4[:, None, :2], second_B4[None, :, :2])
    high_PB2 = np.minimum(first_P4[:, None, 2:], second_B4[None, :, 2:])
    areas: Floats = np.clip(high_PB2 - low_PB2, 0, None).prod(axis=2)
    return areas


def letters_for(size: tuple[int, int]) -> int:
    """Height of letters, in pixels, that can be read where the whole image is shown on a screen.

    Args:
        size: Width and height of the image.
    """
    shortest = min(size)
    # Up to a screen's size letters need not grow with the image; beyond, it is shown smaller than it is.
    return round(max(_SMALLEST_FONT, min(shortest / 30, 48), shortest / 45))


def _fitting_letters(texts: Sequence[str], canvas: tuple[int, int], font_file: Path | None) -> int:
    """Height of the letters: fitted to the image, and smaller where labels would cover much of it."""
    size = letters_for(canvas)
    while size > _SMALLEST_FONT:
        # Labels are about one and a half times as high as their letters.
        covered = sum(_font(text, size, font_file).getlength(text) * size * 1.5 for text in texts)
        if covered < _LABELS_SHARE * canvas[0] * canvas[1]:
            break
        size = max(_SMALLEST_FONT, round(size * 0.85))
    return size


def _sign(text: str, colour: RGB, size: int, widest: int, font_file: Path | None) -> Image.Image:
    """A label: text on a rounded ground of the object's colour."""
    font = _font(text, size, font_file)
    pad = max(2, round(size * 0.25))
    while len(text) > 2 and font.getlength(text) + 2 * pad > widest:
        text = text[:-2] + "…"
    # Letters with ascenders and descenders: all labels are equally high.
    _, top, _, bottom = (round(value) for value in font.getbbox("Ágjy|"))
    width, height = round(font.getlength(text)) + 2 * pad, bottom - top + 2 * pad
    ground = Image.new("L", (width * 3, height * 3), 0)
    ImageDraw.Draw(ground).rounded_rectangle(
        (0, 0, width * 3 - 1, height * 3 - 1), radius=round(size * 0.75), fill=235
    )
    sign = Image.new("RGBA", (width, height), (*colour, 255))
    sign.putalpha(ground.reduce(3))
    ImageDraw.Draw(sign).text(
        (pad, pad - top), text, font=font, fill=(*text_colour_on(colour), 255)
    )
    return sign


def _font(text: str, size: int, font_file: Path | None) -> Font:
    if font_file is not None:
        return _font_from(font_file, size)
    # Pillow's own font has Latin letters only; matplotlib brings one that knows many more scripts.
    if all(ord(c) < 0x250 or c == "…" for c in text):
        return _font_from(None, size)
    import matplotlib as mpl

    return _font_from(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


@lru_cache(maxsize=128)
def _font_from(path: Path | None, size: int) -> Font:
    """Load a font; Pillow's own where there is no path."""
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise ConfigError(f"cannot read the font file {path}: {error}", path=path) from error


# --- Contact sheets ----------------------------------------------------------------------------------------------------

_GROUND = (24, 26, 30)
_GAP = 8


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int = 4, cell: int = 480
) -> Image.Image:
    """Arrange images in a grid, each scaled to fit a square cell; a row is as high as its highest image.

    Args:
        images: At least one image.
        columns: Cells a row; fewer where there are fewer images.
        cell: Edge of a cell in pixels.

    Returns:
        An RGB image.
    """
    columns = min(columns, len(images))
    fitted = [
        ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        for image in images
    ]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    heights = [max(image.height for image in row) for row in rows]
    size = (columns * (cell + _GAP) + _GAP, sum(heights) + (len(rows) + 1) * _GAP)
    sheet = Image.new("RGB", size, _GROUND)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            left = _GAP + column * (cell + _GAP) + (cell - image.width) // 2
            sheet.paste(image, (left, top + (height - image.height) // 2))
        top += height + _GAP
    return sheet
