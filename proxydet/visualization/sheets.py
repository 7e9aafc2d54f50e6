"""Puts several pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps

_GROUND = (24, 26, 30)
_GAP = 8


def contact_sheet(
    pictures: Sequence[Image.Image], *, columns: int = 4, cell: int = 480
) -> Image.Image:
    """Arrange pictures in a grid, each scaled to fit a square cell; a row is as high as its highest picture.

    Args:
        pictures: At least one picture.
        columns: Cells a row; fewer where there are fewer pictures.
        cell: Edge of a cell in pixels.

    Returns:
        An RGB picture.
    """
    columns = min(columns, len(pictures))
    fitted = [
        ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    size = (columns * (cell + _GAP) + _GAP, sum(heights) + (len(rows) + 1) * _GAP)
    sheet = Image.new("RGB", size, _GROUND)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = _GAP + column * (cell + _GAP) + (cell - picture.width) // 2
            sheet.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + _GAP
    return sheet
