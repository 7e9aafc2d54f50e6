"""Class names as users write them, and the sentences they go into."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.errors import VocabularyError
from proxydet.vocabulary.names import ClassWords, read_names, split_names
from proxydet.vocabulary.sources import is_vocabulary_file
from proxydet.vocabulary.vocabulary import PROMPT_SETS, fill, find_prompts


def test_names_are_split_at_commas_outside_quotes():
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
        ("a, " + "b" * 501, "501 characters"),
    ],
)
def test_unusable_lists_are_refused(text, what):
    with pytest.raises(VocabularyError, match=what):
        split_names(text)


@pytest.mark.parametrize("text", ["", "  "])
def test_no_names_are_told_as_such(text):
    with pytest.raises(VocabularyError, match="no class names are given"):
        split_names(text)


def test_long_rows_of_blanks_and_quotes_are_refused_at_once():
    # Time that grows with the square of the length would take minutes here.
    for text in ('"' * 200_001, " " * 200_000 + '"x', "a," + " " * 200_000 + '"b"c'):
        with pytest.raises(VocabularyError):
            split_names(text)


@given(st.lists(st.text("abc ,'äß-", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_quoted_names_come_back_whole(names):
    assert split_names(", ".join(f'"{name}"' for name in names)) == names


def test_text_files_hold_a_class_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeff# kitchen\ncouch | sofa|settee\n\n  ladle, large \n", encoding="utf-8")
    assert read_names(path) == (
        ClassWords("couch", ("sofa", "settee")),
        ClassWords("ladle, large"),
    )


def names_of(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [entry.name for entry in read_names(path)]


COCO = {
    "images": [],
    "annotations": [{"category_id": 3}, {"category_id": "7"}],
    "categories": [
        {"id": 7, "name": "plate", "supercategory": "kitchen"},
        {"id": 3, "name": " cup", "supercategory": "kitchen"},
    ],
}
ROOT = {"id": 0, "name": "kitchen", "supercategory": "none"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "cup\r\nplate\r\n", ["cup", "plate"]),
        ("a.txt", "cup\nplate".encode("utf-16"), ["cup", "plate"]),
        ("a.txt", "é\n犬\n  a\u00a0\n", ["é", "犬", "a"]),
        ("a", "cup\nplate", ["cup", "plate"]),
        ("coco.names", "cup\nplate", ["cup", "plate"]),
        ("a.txt", '"knife, fork"\ncup', ["knife, fork", "cup"]),
        ("a.txt", "'cup',\n'knife, fork',\n# x\nplate", ["cup", "knife, fork", "plate"]),
        ("a.txt", "- cup\n- no", ["cup", "no"]),
        ("a.txt", "1: cup\n0: plate", ["plate", "cup"]),
        ("a.txt", '["cup",\n "plate"]', ["cup", "plate"]),
        ("a.txt", "['cup', plate]", ["cup", "plate"]),
        ("a.json", '["cup", " pan "]', ["cup", "pan"]),
        ("a.json", "\ufeff[\"cup\"]", ["cup"]),
        ("a.json", '{"couch": ["sofa"], "pan": []}', ["couch", "pan"]),
        ("a.json", '{"1": "pan", "0": "cup", "10": "lid"}', ["cup", "pan", "lid"]),
        ("a.json", '{"pan": 1, "cup": 0}', ["cup", "pan"]),
        ("a.json", '{"id2label": {"0": "cup"}, "model_type": "x"}', ["cup"]),
        ("a.json", json.dumps(COCO), ["cup", "plate"]),
        ("a.json", json.dumps(COCO["categories"]), ["cup", "plate"]),
        ("a.json", json.dumps({**COCO, "categories": [ROOT, *COCO["categories"]]}), ["cup", "plate"]),
        ("a.json", '{"categories": [{"id": 1, "name": "a"}], "x": NaN}', ["a"]),
        ("a.yaml", "path: x\nnc: 2\nnames:\n  1: pan\n  0: no\n", ["no", "pan"]),
        ("a.yaml", "names: [cup, 007]\n", ["cup", "007"]),
        ("a.yml", "- cup\n- pan\n", ["cup", "pan"]),
        ("a.yaml", "cup:\npan: [pot]\n", ["cup", "pan"]),
    ],
)  # fmt: skip
def test_files_of_many_kinds_give_their_names(tmp_path, name, content, expected):
    assert names_of(tmp_path / name, content) == expected


def test_synonyms_come_from_lines_json_and_yaml(tmp_path):
    for name, content in (
        ("a.txt", "couch | sofa | couch"),
        ("a.json", '{"couch": ["sofa", "couch"]}'),
        ("a.yaml", "couch: [sofa]"),
    ):
        (tmp_path / name).write_text(content)
        assert read_names(tmp_path / name)[0].words == ("couch", "sofa")


def test_a_root_with_objects_is_a_class(tmp_path):
    used = {
        "annotations": [{"category_id": 0}],
        "categories": [ROOT, *COCO["categories"]],
    }
    assert names_of(tmp_path / "a.json", json.dumps(used)) == ["kitchen", "cup", "plate"]


def test_categories_of_a_large_annotation_file_are_read_in_little_memory(tmp_path):
    path = tmp_path / "large.json"
    row = json.dumps({"segmentation": [[1.5] * 25_000]}) + ","
    with path.open("w") as file:
        file.write('{"annotations": [')
        for _ in range(300):
            file.write(row)
        file.write('{}], "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]}')
    assert path.stat().st_size > 35e6
    tracemalloc.start()
    assert [entry.name for entry in read_names(path)] == ["a", "b"]
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("line", "names", "separator"),
    [
        ("red circle, blue star", ["red circle", "blue star"], "commas"),
        ("red circle; blue star;", ["red circle", "blue star"], "semicolons"),
        ("a . b . c .", ["a", "b", "c"], "dots"),
        ("a cat. a dog.", ["a cat", "a dog"], "dots"),
        ('"red circle, blue star"', ["red circle, blue star"], None),
        ('"a . b ."', ["a . b ."], None),
        ("St. Bernard", ["St. Bernard"], None),
        ("no.2 pencil", ["no.2 pencil"], None),
    ],
)
def test_several_names_on_a_single_line_are_split_and_that_is_reported(
    tmp_path, caplog, line, names, separator
):
    assert names_of(tmp_path / "n.txt", line + "\n") == names
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == (separator is not None)
    assert all(
        "n.txt" in text and separator in text and repr(names[1]) in text for text in reported
    )
    caplog.clear()
    assert split_names(line) == names
    assert len(caplog.records) == (separator in ("semicolons", "dots"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["vocab build", "predict", "serve"])
@pytest.mark.parametrize(
    ("text", "answer", "asked"),
    [
        ("red circle, blue star\n", "n\n", True),
        ("# two\na . b .\n", "n\n", True),
        ("red circle, blue star\n", "", True),  # Ctrl-D
        ('"red circle, blue star"\n', "n\n", False),
        ("red circle\nblue star\n", "n\n", False),
        ("[red circle, blue star]\n", "n\n", False),
    ],
)
def test_on_a_terminal_a_single_line_is_asked_about(
    tmp_path, monkeypatch, cli, command, text, answer, asked
):
    names = tmp_path / "names.txt"
    names.write_text(text)
    (tmp_path / "a.jpg").touch()
    absent = tmp_path / "absent.json"
    words = {
        "vocab build": ["vocab", "build", names, "-o", tmp_path / "x.vocab", "--encoder", absent],
        "predict": ["predict", tmp_path / "a.jpg", "-v", names, "--run", absent],
        "serve": ["serve", "--vocabulary", names, "--run", absent],
    }[command]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", terminal)
    ended = cli(*words)
    shown = terminal.getvalue()
    assert ended.code != 0
    assert ("Continue?" in shown) == asked
    # Where nothing is asked, the command proceeds to what is not there.
    assert ("absent.json" in shown) != asked
    assert ("several names" in shown) == (asked and answer == "n\n")


def test_what_was_agreed_to_is_not_reported_again(tmp_path, monkeypatch, cli, caplog):
    names = tmp_path / "names.txt"
    names.write_text("red circle, blue star\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    monkeypatch.setattr(sys, "stderr", terminal)
    cli("vocab", "build", names, "-o", tmp_path / "x.vocab", "--encoder", tmp_path / "absent.json")
    assert "read as 2 names, separated by commas" in terminal.getvalue()
    assert "absent.json" in terminal.getvalue()
    assert [entry.name for entry in read_names(names)] == ["red circle", "blue star"]
    assert not caplog.records


def test_lines_that_hold_commas_are_reported(tmp_path, caplog):
    assert names_of(tmp_path / "n.txt", "tench, Tinca tinca\ngoldfish, Carassius\n") == [
        "tench, Tinca tinca",
        "goldfish, Carassius",
    ]
    assert "2 of 2 lines hold commas" in caplog.text
    caplog.clear()
    names_of(tmp_path / "n.txt", 'cup\nbowl, plate\n"knife, fork"\npan\n')
    assert "1 of 4 lines hold commas" in caplog.text


def test_an_index_without_a_name_is_reported(tmp_path, caplog):
    assert names_of(tmp_path / "n.yaml", "names: {1: cup, 2: pan}\n") == ["cup", "pan"]
    assert caplog.text == ""
    assert names_of(tmp_path / "n.yaml", "names: {0: cup, 2: pan}\n") == ["cup", "pan"]
    assert "no name has the index 1" in caplog.text


def test_gzipped_annotations_give_their_categories(tmp_path):
    path = tmp_path / "a.json.gz"
    categories = [{"id": 2, "name": "pan"}, {"id": 1, "name": "cup"}]
    text = json.dumps({"images": [], "annotations": [], "categories": categories}).encode()
    path.write_bytes(gzip.compress(text))
    assert is_vocabulary_file(path)
    assert [entry.name for entry in read_names(path)] == ["cup", "pan"]
    for damaged in (gzip.compress(text)[:-9], text, b"", gzip.compress(b"[]")):
        path.write_bytes(damaged)
        with pytest.raises(VocabularyError, match=r"json\.gz"):
            read_names(path)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"# only\n", "no class names"),
        ("a.txt", b"cup | | pan", "line 1"),
        ("a.txt", b"cup\n\xff\xe9", "line 2"),
        ("a.txt", b"cup\0", "cannot read"),
        ("a.txt", b"cup\nlid\n# x\ncup ", "line 1 and line 4"),
        ("a.txt", b"cup\n" + b"x" * 501, "line 2.*501 characters"),
        ("a.txt", b"<html><p>cup</p>", "HTML"),
        ("a.txt", b"[cup]]", "not valid"),
        ("a.txt", b"\n".join(b"%d" % i for i in range(100_001)), "100001"),
        ("a.py", b"cup\n", "not a list of class names"),
        ("a.png", b"\x89PNG", "not a list of class names"),
        ("a.html", b"cup\n", "not a list of class names"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"a": "b"}', "must hold"),
        ("a.json", b"[1]", "must hold"),
        ("a.json", b"3", "must hold"),
        ("a.json", b'{"a": [], "a": ["b"]}', "'a'"),
        ("a.json", b'["cup", "lid", "cup"]', "entry 1 and entry 3"),
        ("a.json", b'{"categories": [{"id": 1}]}', "category 0.*no name"),
        ("a.json", b'{"categories": [{"id": "x", "name": "a"}]}', "category 0.*id"),
        ("a.json", b'{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "id 1 and id 2"),
        ("a.json", b'{"categories": []}', "no class names"),
        ("a.json", b" " * (33 << 20) + b"[]", "larger than"),
        ("a.yaml", b"[" * 5000, "nested too deeply"),
        ("a.yaml", b"path: x\n", "must hold"),
        ("a.yaml", b"a: &x [b]\nc: *x", "line 2"),
        ("a.yaml", b"#" * 3_000_000, "larger than"),
    ],
)  # fmt: skip
def test_unusable_files_are_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabularyError, match=what) as caught:
        read_names(tmp_path / name)
    assert name in caught.value.message
    assert len(caught.value.message) < 500


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VocabularyError, match="no file"):
        read_names(tmp_path / "absent.txt")


def test_prompts_are_found_by_name_or_taken_as_written():
    assert find_prompts("published") == ("a {}",)
    assert find_prompts("my {} here") == ("my {} here",)
    assert find_prompts(["a {}", "the {}"]) == ("a {}", "the {}")
    assert all(prompt.count("{}") == 1 for prompts in PROMPT_SETS.values() for prompt in prompts)


@pytest.mark.parametrize("wanted", ["publshed", "{} {}", [], ["a {}", "a"]])
def test_prompts_without_a_place_for_the_name_are_refused(wanted):
    with pytest.raises(VocabularyError, match="prompt"):
        find_prompts(wanted)  # type: ignore[arg-type]


def test_braces_in_names_stay():
    assert fill("a {}", "set {1}") == "a set {1}"
