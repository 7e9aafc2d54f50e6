"""A colour for each class name, the same in every picture and every run."""

from __future__ import annotations

import hashlib
import math

RGB = tuple[int, int, int]

_LIGHTNESSES = (0.66, 0.76, 0.86)
_CHROMA = 0.17


def colour_of(name: str) -> RGB:
    """The colour of a class: decided by its name alone.

    Names are spread over hues of equal perceived strength (the OKLCH space) at three lightnesses, all
    light enough to stand out from photographs.

    Args:
        name: The class name.

    Returns:
        Red, green, blue, each 0 to 255.
    """
    digest = hashlib.sha256(name.encode()).digest()
    hue = int.from_bytes(digest[:4], "little") / 2**32 * 2 * math.pi
    return _from_oklch(_LIGHTNESSES[digest[4] % len(_LIGHTNESSES)], _CHROMA, hue)


def text_colour_on(background: RGB) -> RGB:
    """Black or white, whichever contrasts more with a background (WCAG 2 contrast ratio)."""
    luminance = relative_luminance(background)
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def relative_luminance(colour: RGB) -> float:
    """Luminance of an sRGB colour from 0 (black) to 1 (white), as WCAG 2 defines it."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _from_oklch(lightness: float, chroma: float, hue: float) -> RGB:
    """Convert; the matrices are those of the OKLab definition (B. Ottosson, 2020). Clips to sRGB."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _to_byte(4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short),
        _to_byte(-1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short),
        _to_byte(-0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short),
    )


def _to_byte(linear: float) -> int:
    linear = min(max(linear, 0.0), 1.0)
    encoded = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(encoded * 255)
