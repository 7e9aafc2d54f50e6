"""A scatter plot whose points say their names when pointed at: AP of each category over its training images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 30, 40

Point = tuple[float, float, str]
"""Number of training images (at least 0), AP in percent, name."""


def scatter_svg(series: Mapping[str, Sequence[Point]], colours: Sequence[str]) -> str:
    """Return an ``<svg>`` element: AP upwards, training images to the right on a logarithmic scale.

    Args:
        series: Points by name of the series.
        colours: One for each series, as CSS has them.
    """
    most = max((x for points in series.values() for x, _, _ in points), default=1.0)
    decades = max(1, math.ceil(math.log10(max(most, 1.0) + 1)))
    parts = [_axes(decades)]
    for (name, points), colour in zip(series.items(), colours, strict=False):
        dots = "".join(
            f'<circle cx="{_x(x, decades):.1f}" cy="{_y(y):.1f}" r="3">'
            f"<title>{escape(label)}: AP {y:.1f}, {x:.0f} training images</title></circle>"
            for x, y, label in points
        )
        parts.append(
            f'<g fill="{colour}" fill-opacity="0.6"><title>{escape(name)}</title>{dots}</g>'
        )
    parts.append(_legend(list(series), colours))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _x(images: float, decades: int) -> float:
    """Horizontal place; 0 images stand at the left edge, 1 a little to the right of it."""
    share = math.log10(images + 1) / decades
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(percent: float) -> float:
    return _TOP + (1 - percent / 100) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(decades: int) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    lines = []
    for percent in range(0, 101, 20):
        y = _y(percent)
        lines.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" opacity="0.15"/>')
        lines.append(_text(_LEFT - 6, y + 4, str(percent), "end"))
    for images in [0, *(10**power for power in range(decades + 1))]:
        x = _x(images, decades)
        if x <= right + 1:
            lines.append(
                f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="currentColor" opacity="0.15"/>'
            )
            lines.append(_text(x, bottom + 15, f"{images:,}", "middle"))
    lines.append(_text((_LEFT + right) / 2, _HEIGHT - 6, "training images", "middle"))
    lines.append(_text(_LEFT - 6, 14, "AP", "end"))
    return "".join(lines)


def _legend(names: Sequence[str], colours: Sequence[str]) -> str:
    entries = []
    x = float(_LEFT + 14)
    for name, colour in zip(names, colours, strict=False):
        entries.append(f'<circle cx="{x}" cy="10" r="4" fill="{colour}"/>')
        entries.append(_text(x + 10, 14, name, "start"))
        x += 34 + 6.5 * len(name)
    return "".join(entries)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'
