"""Draws boxes, masks and labels on pictures, by Pillow."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from proxydet.errors import ConfigError
from proxydet.mask_window import MaskWindow
from proxydet.visualization.colours import RGB, colour_of, text_colour_on
from proxydet.visualization.labels import Box, LabelRequest, place_labels

Bools = npt.NDArray[np.bool_]
Mask = Bools | MaskWindow
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SMALLEST_FONT = 11
# Where labels would cover more of the picture than this, they are written smaller.
_LABELS_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """One thing to draw."""

    label: str
    """Class name; decides the colour."""
    box_xyxy: Box
    """Left, top, right, bottom in pixels of the picture."""
    score: float | None = None
    """Shown behind the label where given."""
    mask_HW: Mask | Callable[[], Mask] | None = field(default=None, compare=False)
    """Mask of the picture's size, the window of the picture that it lies in, or a function that gives one of them when
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
    """How strongly a mask tints the picture, 0 to 1."""
    font_size: int | None = None
    """Height of the letters in pixels; None: fitted to the picture."""
    font_file: Path | None = None
    """TrueType file for scripts that the bundled fonts lack; None: a bundled font."""
    shortest_edge: int = 480
    """Smaller pictures are enlarged so that labels have room; 0 keeps every picture's size."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        if not 0 <= self.mask_opacity <= 1:
            raise ConfigError(f"mask_opacity is {self.mask_opacity}; it must be from 0 to 1")
        if self.font_size is not None and self.font_size < 1:
            raise ConfigError(f"font_size is {self.font_size}; it must be at least 1")
        if self.shortest_edge < 0:
            raise ConfigError(f"shortest_edge is {self.shortest_edge}; it must be 0 or more")


def draw_objects(
    picture: Image.Image, objects: Sequence[DrawnObject], style: DrawingStyle | None = None
) -> Image.Image:
    """Draw objects on a copy of a picture.

    Large masks are painted before small ones; labels are written last, the first object's with the first
    choice of place.

    Args:
        picture: The picture; any mode.
        objects: What to draw, the most important first.
        style: How; the default style where None.

    Returns:
        A new RGB picture; larger than the given one where that was small (see ``shortest_edge``).
    """
    style = style or DrawingStyle()
    scale = _scale(picture.size, style.shortest_edge)
    size = (picture.width * scale, picture.height * scale)
    canvas = picture.convert("RGB")
    if scale > 1:
        canvas = canvas.resize(size, Image.Resampling.BICUBIC)
    line = max(2, round(min(size) / 320))
    if style.masks:
        for item in sorted(objects, key=_area, reverse=True):
            if item.mask_HW is not None:
                canvas = _with_mask(canvas, item, scale, style.mask_opacity)
    if style.boxes:
        draw = ImageDraw.Draw(canvas, "RGBA")
        for item in reversed(objects):
            _draw_box(draw, _scaled(item.box_xyxy, scale), colour_of(item.label), line)
    if style.labels:
        _draw_labels(canvas, objects, scale, style)
    return canvas


def _scale(size: tuple[int, int], shortest_edge: int) -> int:
    """Whole factor that brings the shortest edge to about ``shortest_edge``, at most 8."""
    shortest, longest = min(size), max(size)
    wanted = min(round(shortest_edge / shortest), 4096 // longest, 8)
    return max(wanted, 1)


def _area(item: DrawnObject) -> float:
    left, top, right, bottom = item.box_xyxy
    return (right - left) * (bottom - top)


def _scaled(box: Box, scale: int) -> Box:
    left, top, right, bottom = (value * scale for value in box)
    return left, top, right, bottom


def _with_mask(canvas: Image.Image, item: DrawnObject, scale: int, opacity: float) -> Image.Image:
    found = _cut_out(item, (canvas.height // scale, canvas.width // scale))
    if found is None:
        return canvas
    mask = Image.fromarray(found.inside_hw.astype(np.uint8) * 255)
    if scale > 1:
        mask = mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.BILINEAR)
    origin = (found.left * scale, found.top * scale)
    colour = colour_of(item.label)
    canvas.paste(colour, origin, mask.point([round(value * opacity) for value in range(256)]))
    canvas.paste(colour, origin, _rim(mask))
    return canvas


def _cut_out(item: DrawnObject, size: tuple[int, int]) -> MaskWindow | None:
    """Return the mask with a little space around it; None where it is empty.

    Only this window is touched in drawing: hundreds of masks on a large photograph stay cheap.
    """
    mask = item.mask_HW() if callable(item.mask_HW) else item.mask_HW
    assert mask is not None
    if not isinstance(mask, MaskWindow):
        mask = MaskWindow(top=0, left=0, inside_hw=mask, size=(mask.shape[0], mask.shape[1]))
    if mask.size != size:
        raise ConfigError(
            f"the mask of {item.label!r} is {mask.size[1]} x {mask.size[0]} pixels, "
            f"the picture {size[1]} x {size[0]}"
        )
    rows = np.flatnonzero(mask.inside_hw.any(axis=1))
    columns = np.flatnonzero(mask.inside_hw.any(axis=0))
    if not len(rows):
        return None
    # In the picture's rows and columns; the rim needs to see where the mask ends.
    margin = 3
    y0, x0 = (max(start - margin, 0) for start in (mask.top + rows[0], mask.left + columns[0]))
    y1, x1 = (
        min(end + 1 + margin, most)
        for end, most in zip((mask.top + rows[-1], mask.left + columns[-1]), size, strict=True)
    )
    cut_hw = np.zeros((y1 - y0, x1 - x0), dtype=np.bool_)
    tight_hw = mask.inside_hw[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = mask.top + rows[0] - y0, mask.left + columns[0] - x0
    cut_hw[top : top + tight_hw.shape[0], left : left + tight_hw.shape[1]] = tight_hw
    return MaskWindow(top=int(y0), left=int(x0), inside_hw=cut_hw, size=size)


def _rim(mask: Image.Image) -> Image.Image:
    """The mask's edge, about two pixels wide, as an alpha channel."""
    mask_HW = np.asarray(mask)
    framed = np.pad(mask_HW, 2)
    sides = (framed[:-4, 2:-2], framed[4:, 2:-2], framed[2:-2, :-4], framed[2:-2, 4:])
    inner_HW = np.minimum.reduce(sides)
    return Image.fromarray(np.where(mask_HW > inner_HW, mask_HW - inner_HW, 0).astype(np.uint8))


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, colour: RGB, line: int) -> None:
    left, top, right, bottom = (round(value) for value in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    # A dark hair line around the coloured one keeps it visible on pictures of the same colour.
    draw.rectangle(
        (left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0, 110), width=line + 2
    )
    draw.rectangle((left, top, right, bottom), outline=(*colour, 255), width=line)


def _draw_labels(
    canvas: Image.Image, objects: Sequence[DrawnObject], scale: int, style: DrawingStyle
) -> None:
    signs = _signs(objects, canvas.size, style)
    requests = [
        LabelRequest(_scaled(item.box_xyxy, scale), sign.width, sign.height)
        for item, sign in zip(objects, signs, strict=True)
    ]
    places = place_labels(requests, canvas.size)
    for sign, place in reversed(list(zip(signs, places, strict=True))):
        canvas.paste(sign, (round(place[0]), round(place[1])), sign)


def _signs(
    objects: Sequence[DrawnObject], canvas: tuple[int, int], style: DrawingStyle
) -> list[Image.Image]:
    texts = [_text(item, style) for item in objects]
    size = style.font_size or _fitting_size(texts, canvas, style.font_file)
    return [
        _sign(text, colour_of(item.label), size, canvas[0], style)
        for text, item in zip(texts, objects, strict=True)
    ]


def letters_for(size: tuple[int, int]) -> int:
    """Height of letters, in pixels, that can be read where the whole picture is shown on a screen.

    Args:
        size: Width and height of the picture.
    """
    shortest = min(size)
    # Up to a screen's size letters need not grow with the picture; beyond, it is shown smaller than it is.
    return round(max(_SMALLEST_FONT, min(shortest / 30, 48), shortest / 45))


def _fitting_size(texts: Sequence[str], canvas: tuple[int, int], font_file: Path | None) -> int:
    """Height of the letters: fitted to the picture, and smaller where labels would cover much of it."""
    size = letters_for(canvas)
    while size > _SMALLEST_FONT:
        # Labels are about one and a half times as high as their letters.
        covered = sum(_font(text, size, font_file).getlength(text) * size * 1.5 for text in texts)
        if covered < _LABELS_SHARE * canvas[0] * canvas[1]:
            break
        size = max(_SMALLEST_FONT, round(size * 0.85))
    return size


def _text(item: DrawnObject, style: DrawingStyle) -> str:
    # Control characters in a class name would break the line or vanish.
    name = "".join(c for c in item.label if unicodedata.category(c)[0] != "C")
    return f"{name} {item.score:.0%}" if style.scores and item.score is not None else name


def _sign(text: str, colour: RGB, size: int, widest: int, style: DrawingStyle) -> Image.Image:
    """A label: text on a rounded ground of the class's colour."""
    font = _font(text, size, style.font_file)
    pad = max(2, round(size * 0.25))
    while len(text) > 2 and font.getlength(text) + 2 * pad > widest:
        text = text[:-2] + "…"
    top, bottom = _height(font)
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


def _height(font: Font) -> tuple[int, int]:
    """Top and bottom of letters with ascenders and descenders, so that all labels are equally high."""
    box = font.getbbox("Ágjy|")
    return round(box[1]), round(box[3])


def _font(text: str, size: int, font_file: Path | None) -> Font:
    if font_file is not None:
        return _font_from(str(font_file), size)
    # Pillow's own font has Latin letters only; matplotlib brings one that knows many more scripts.
    return (
        _default_font(size) if all(ord(c) < 0x250 or c == "…" for c in text) else _wide_font(size)
    )


@lru_cache(maxsize=64)
def _font_from(path: str, size: int) -> Font:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ConfigError(f"cannot read the font file {path}: {error}", path=Path(path)) from error


@lru_cache(maxsize=64)
def _default_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=64)
def _wide_font(size: int) -> Font:
    import matplotlib as mpl

    return ImageFont.truetype(
        str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size
    )
