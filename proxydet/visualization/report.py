"""One HTML file that shows a run: facts, pictures, plots, tables, and the commands to go on with.

The file holds all that it shows: nothing is loaded from anywhere, and its own policy forbids it.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from proxydet.files import write_text
from proxydet.wording import printable

Cell = str | float | int | None


def escape(text: str) -> str:
    """Return text as it stands in HTML, with control characters escaped that browsers would pass on to the clipboard."""
    return html.escape(printable(text, keep="\n\t"))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with a line of text below it."""

    image: Image.Image
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; numbers are written with one decimal, None and NaN as a dash."""

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
    pictures: Sequence[Picture] = ()
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
    """Give a report as HTML text."""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in report.facts
    )
    body = "".join(_section(section) for section in report.sections)
    return _resource("page.html").format(
        title=escape(report.title),
        summary=_paragraphs(report.summary),
        facts=f'<dl class="facts">{facts}</dl>' if facts else "",
        body=body,
        style=_resource("page.css"),
        script=_resource("page.js"),
    )


def _resource(name: str) -> str:
    return files("proxydet.visualization").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    parts = [
        _paragraphs(section.text),
        *(_table(table) for table in section.tables),
        _plots(section.plots),
        _gallery(section.pictures),
        "".join(_command(command) for command in section.commands),
    ]
    return f"<section><h2>{escape(section.title)}</h2>{''.join(parts)}</section>"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in table.rows)
    return (
        f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return '<td class="number">&ndash;</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.1f}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    return f"<td>{escape(value)}</td>"


def _plots(plots: Sequence[str]) -> str:
    figures = "".join(f'<div class="plot">{svg}</div>' for svg in plots)
    return f'<div class="plots">{figures}</div>' if plots else ""


def _gallery(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    return f'<div class="gallery">{"".join(_figure(picture) for picture in pictures)}</div>'


def _figure(picture: Picture) -> str:
    caption = escape(picture.caption)
    size = f'width="{picture.image.width}" height="{picture.image.height}"'
    return (
        f'<figure><button type="button" class="zoom" aria-label="enlarge">'
        f'<img src="{_data_url(picture.image)}" {size} alt="{caption}" loading="lazy"></button>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _command(command: Command) -> str:
    return (
        f'<div class="command"><p>{escape(command.does)}</p>'
        f"<pre><code>{escape(command.command)}</code>"
        '<button type="button" class="copy">copy</button></pre></div>'
    )
