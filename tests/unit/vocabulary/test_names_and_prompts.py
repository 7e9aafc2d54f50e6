"""Class names as users write them, and the sentences they go into."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.errors import VocabularyError
from proxydet.vocabulary.names import ClassWords, read_names, split_names
from proxydet.vocabulary.prompts import PROMPT_SETS, fill, find_prompts


def test_names_are_split_at_commas_outside_quotes() -> None:
    assert split_names(' headphone,webcam , "cup, paper" ,coffee cup') == [
        "headphone",
        "webcam",
        "cup, paper",
        "coffee cup",
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,,b", r"name 1 \(counted from 0\) is empty"),
        ("a,", "name 1"),
        ('a, "b', "cannot split"),
        ("a\nb", "one line"),
    ],
)
def test_unusable_lists_are_refused(text: str, what: str) -> None:
    with pytest.raises(VocabularyError, match=what):
        split_names(text)


@pytest.mark.parametrize("text", ["", "  "])
def test_no_names_are_told_as_such(text: str) -> None:
    with pytest.raises(VocabularyError, match="no class names are given"):
        split_names(text)


def test_long_rows_of_blanks_and_quotes_are_refused_at_once() -> None:
    # Time that grows with the square of the length would take minutes here.
    for text in ('"' * 200_001, " " * 200_000 + '"x', "a," + " " * 200_000 + '"b"c'):
        with pytest.raises(VocabularyError):
            split_names(text)


@given(st.lists(st.text("abc ,'äß-", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_quoted_names_come_back_whole(names: list[str]) -> None:
    assert split_names(", ".join(f'"{name}"' for name in names)) == names


def test_text_files_hold_a_class_a_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeff# kitchen\ncouch | sofa|settee\n\n  ladle, large \n", encoding="utf-8")
    assert read_names(path) == (
        ClassWords("couch", ("sofa", "settee")),
        ClassWords("ladle, large"),
    )


def test_json_files_hold_lists_or_synonyms(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('["cup", " pan "]')
    assert [entry.name for entry in read_names(path)] == ["cup", "pan"]
    path.write_text('{"couch": ["sofa", "couch"]}')
    assert read_names(path)[0].words == ("couch", "sofa")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"# only\n", "no class names"),
        ("a.txt", b"cup | | pan", "line 1"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"a": "b"}', "must hold"),
        ("a.json", b"[1]", "must hold"),
        ("a.json", b"3", "must hold"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabularyError, match=what):
        read_names(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="no file"):
        read_names(tmp_path / "absent.txt")


def test_prompts_are_found_by_name_or_taken_as_written() -> None:
    assert find_prompts("published") == ("a {}",)
    assert find_prompts("my {} here") == ("my {} here",)
    assert find_prompts(["a {}", "the {}"]) == ("a {}", "the {}")
    assert all(prompt.count("{}") == 1 for prompts in PROMPT_SETS.values() for prompt in prompts)


@pytest.mark.parametrize("wanted", ["publshed", "{} {}", [], ["a {}", "a"]])
def test_prompts_without_a_place_for_the_name_are_refused(wanted: object) -> None:
    with pytest.raises(VocabularyError, match="prompt"):
        find_prompts(wanted)  # type: ignore[arg-type]


def test_braces_in_names_stay() -> None:
    assert fill("a {}", "set {1}") == "a set {1}"
