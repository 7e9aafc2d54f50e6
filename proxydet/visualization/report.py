"""One HTML file that shows a run: facts, images, plots, tables, and the next commands.

The file holds all that it shows: nothing is loaded from anywhere, and its own policy forbids it. The page is
``page.html``, a template of jinja2, which escapes all text.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from proxydet.files import write_text
from proxydet.wording import printable

Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """An image with a line of text below it."""

    image: Image.Image
    caption: str

    @property
    def wide(self) -> bool:
        """Whether it needs a wide column, as two images side by side do."""
        return self.image.width > 1.5 * self.image.height


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; numbers are written with one decimal, None and what is not finite as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line and what it does."""

    command: str
    does: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report under a heading, shown in the order of the fields."""

    title: str
    text: str = ""
    """Plain text; a blank line starts a new paragraph."""
    tables: Sequence[Table] = ()
    plots: Sequence[str] = ()
    """``<svg>`` elements made by `proxydet.visualization.plots.svg_of`; the only content that is not escaped."""
    images: Sequence[CaptionedImage] = ()
    commands: Sequence[Command] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows."""

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    """Name and value pairs shown large at the top."""
    sections: Sequence[Section]


def write_report(report: Report, path: Path) -> Path:
    """Write a report as one HTML file, in one step.

    Args:
        report: What to show. All text is escaped.
        path: The file; replaced if there.

    Returns:
        The path.
    """
    return write_text(path, render_report(report))


def render_report(report: Report) -> str:
    """Return a report as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("proxydet", "visualization"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters["data_url"] = _data_url
    return environment.get_template("page.html").render(report=report, infinity=math.inf)


def escape(text: str) -> str:
    """Return text as it stands in HTML, with control characters escaped that browsers would pass on to the clipboard."""
    return html.escape(_shown(text))


def _shown(value: Any) -> Any:
    """Escape the control characters of a text; anything else, and what is HTML already, stays as it is."""
    return printable(value, keep="\n\t") if type(value) is str else value


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
