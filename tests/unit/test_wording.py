import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.wording import counted, json_text, printable, table_cell


@pytest.mark.parametrize(("number", "text"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes")])
def test_nouns_follow_their_number(number, text):
    assert counted(number, "box", "boxes") == text


def test_an_s_is_the_usual_plural():
    assert [counted(number, "tar") for number in (1, 3)] == ["1 tar", "3 tars"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 犬 🐶", "café 犬 🐶"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x9b1m", "\\x9b1m"),
        ("exe\u202egpj", "exe\\u202egpj"),
        ("\udcff.png", "\\udcff.png"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


@given(
    st.text(
        st.characters()
        | st.characters(categories=["Cc"])
        | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)  # of names that are not UTF-8
    )
)
def test_escaped_text_can_be_written_and_json_is_read_back(text):
    assert all(ord(c) >= 32 and not 127 <= ord(c) < 160 for c in printable(text))
    printable(text).encode()
    for options in ({}, {"indent": 2}):
        written = json_text({text: [text]}, **options)
        written.encode()
        assert printable(written, keep="\n") == written
        assert json.loads(written) == {text: [text]}


@given(st.text(max_size=10))
def test_no_cell_of_a_table_is_a_formula(text):
    file = io.StringIO(newline="")
    csv.writer(file).writerow([table_cell(text)])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert not (row or [""])[0].strip().startswith(("=", "+", "-", "@"))
    assert table_cell(-1.5) == -1.5
