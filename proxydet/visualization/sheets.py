"""Puts several pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps

_GROUND = (24, 26, 30)
_GAP = 8


def contact_sheet(
    pictures: Sequence[Image.Image], *, columns: int = 4, cell: int = 480
) -> Image.Image:
    """Arrange pictures in a grid, each scaled to fit a square cell.

    Args:
        pictures: At least one picture.
        columns: Cells a row; fewer where there are fewer pictures.
        cell: Edge of a cell in pixels.

    Returns:
        An RGB picture.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    step = cell + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * step + _GAP), _GROUND)
    for index, picture in enumerate(pictures):
        fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        row, column = divmod(index, columns)
        left = _GAP + column * step + (cell - fitted.width) // 2
        top = _GAP + row * step + (cell - fitted.height) // 2
        sheet.paste(fitted, (left, top))
    return sheet
