"""Which files a user means."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxydet.errors import DataError
from proxydet.picture_files import find_pictures


def names(found: tuple) -> list[str]:
    return [picture.name.as_posix() for picture in found]


def test_a_folder_is_searched_at_any_depth_and_keeps_its_shape(folder: Path) -> None:
    found = find_pictures([folder])
    assert names(found) == ["a0", "a1", "a2", "broken", "sub/b3", "sub/b4"]
    assert found[4].path == folder / "sub" / "b3.png"


def test_patterns_are_expanded_and_files_taken_whatever_their_ending(folder: Path) -> None:
    assert names(find_pictures([f"{folder}/a*.png"])) == ["a0", "a1", "a2"]
    assert names(find_pictures([f"{folder}/**/b*.png"])) == ["b3", "b4"]
    assert names(find_pictures([folder / "notes.txt"])) == ["notes"]


def test_a_file_named_twice_is_looked_at_once(folder: Path) -> None:
    found = find_pictures([folder / "a1.png", folder, f"{folder}/a*.png"])
    assert names(found) == ["a1", "a0", "a2", "broken", "sub/b3", "sub/b4"]


def test_files_of_one_name_get_results_of_their_own(folder: Path) -> None:
    (folder / "sub" / "a0.jpg").write_bytes(b"")
    (folder / "a0.gif").write_bytes(b"")
    found = find_pictures([folder / "a0.png", folder / "sub" / "a0.jpg", folder / "a0.gif"])
    assert names(found) == ["a0", "a0_2", "a0_3"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "photo[1].png"
    path.write_bytes(b"")
    assert [p.path for p in find_pictures([path])] == [path]


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, what in (
        (folder / "absent.png", "absent.png"),
        (empty, "no pictures"),
        (f"{folder}/*.tif", "no file matches"),
    ):
        with pytest.raises(DataError, match=what):
            find_pictures([folder, source])
    with pytest.raises(DataError, match="no pictures were given"):
        find_pictures([])
