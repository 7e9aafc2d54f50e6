"""The HTML report: complete in itself, and nothing in it can act as markup."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from io import BytesIO

from PIL import Image

from proxydet.visualization.report import (
    CaptionedImage,
    Command,
    Report,
    Section,
    Table,
    render_report,
    write_report,
)

HOSTILE = '<script>alert("x")</script> & {title} \x1b[2J \' "'


class Collector(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_report() -> Report:
    return Report(
        title=HOSTILE,
        summary=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        sections=[
            Section(
                title=HOSTILE,
                text=HOSTILE,
                tables=[
                    Table(
                        columns=[HOSTILE, "AP"],
                        rows=[[HOSTILE, 1.25], ["x", math.nan]],
                        caption=HOSTILE,
                    )
                ],
                images=[
                    CaptionedImage(image=Image.new("RGB", (30, 20), (9, 200, 9)), caption=HOSTILE)
                ],
                commands=[Command(command=HOSTILE, does=HOSTILE)],
            )
        ],
    )


def parsed(text: str) -> Collector:
    collector = Collector()
    collector.feed(text)
    return collector


def test_hostile_text_stays_text():
    page = parsed(render_report(hostile_report()))
    assert page.tags.count("script") == 1
    assert page.text.count("alert(") == 13
    assert "\x1b" not in page.text
    assert page.text.count("\\x1b") == 13


def test_nothing_is_loaded_from_elsewhere():
    text = render_report(hostile_report())
    assert all(address.startswith("data:") for address in parsed(text).addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_pictures_are_inside():
    assert 'loading="lazy"' not in render_report(hostile_report())  # prints would lack them
    (address,) = parsed(render_report(hostile_report())).addresses
    with Image.open(BytesIO(base64.b64decode(address.split(",")[1]))) as picture:
        assert picture.size == (30, 20)


def test_numbers_and_gaps_are_written_plainly():
    text = render_report(hostile_report())
    assert "1.2</td>" in text
    assert text.count("&ndash;</td>") == 1
    assert "nan" not in parsed(text).text


def test_sentences_wrap_and_headings_are_above_what_they_head():
    rows = [("loss", "a sentence that is much wider than a telephone", 1.0)]
    table = Table(columns=("curve", "what it measures", "weight"), rows=rows)
    text = render_report(
        Report(title="", summary="", facts=(), sections=[Section(title="", tables=[table])])
    )
    assert 'class="text">what it measures<' in text
    assert 'class="text">a sentence' in text
    assert '<th scope="col">weight<' in text


def test_two_images_side_by_side_get_wide_columns():
    for width, wide in ((30, False), (64, True)):
        image = CaptionedImage(image=Image.new("RGB", (width, 30)), caption="")
        section = Section(title="", images=[image])
        text = render_report(Report(title="", summary="", facts=(), sections=[section]))
        assert ('class="gallery wide"' in text) == wide


def test_paragraphs_are_split_at_blank_lines():
    section = Section(title="t", text="one\n\n two\nthree")
    text = render_report(Report(title="r", summary="", facts=[], sections=[section]))
    assert "<p>one</p><p>two\nthree</p>" in text


def test_the_file_is_written_whole(tmp_path):
    path = write_report(hostile_report(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
