"""Which files a user means."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from proxydet.errors import DataError, MissingDependencyError
from proxydet.inference.sources import ImageFile, describe_left_out, find_images


def names(found: Iterable[ImageFile]) -> list[str]:
    return [image.name.as_posix() for image in found]


def test_a_folder_is_searched_at_any_depth_and_keeps_its_shape(folder):
    left_out: Counter[str] = Counter()
    found = find_images([folder], left_out)
    assert names(found) == ["a0", "a1", "a2", "broken", "sub/b3", "sub/b4"]
    assert left_out == {".txt": 1}
    assert found[4].path == folder / "sub" / "b3.png"


def test_patterns_are_expanded_and_files_taken_whatever_their_suffix(folder):
    assert names(find_images([f"{folder}/a*.png"])) == ["a0", "a1", "a2"]
    assert names(find_images([f"{folder}/**/b*.png"])) == ["b3", "b4"]
    assert names(find_images([folder / "notes.txt"])) == ["notes"]


def test_a_file_named_twice_is_run_once(folder):
    found = find_images([folder / "a1.png", folder, f"{folder}/a*.png"])
    assert names(found) == ["a1", "a0", "a2", "broken", "sub/b3", "sub/b4"]


def test_files_of_one_name_get_results_of_their_own(folder):
    (folder / "sub" / "a0.jpg").write_bytes(b"")
    (folder / "a0.gif").write_bytes(b"")
    found = find_images([folder / "a0.png", folder / "sub" / "a0.jpg", folder / "a0.gif"])
    assert names(found) == ["a0", "a0_2", "a0_3"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    path = tmp_path / "photo[1].png"
    path.write_bytes(b"")
    assert [p.path for p in find_images([path])] == [path]


def test_what_is_not_there_is_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, what in (
        (folder / "absent.png", "absent.png"),
        (empty, "no images"),
        (f"{folder}/*.tif", "no image matches"),
    ):
        with pytest.raises(DataError, match=what):
            find_images([folder, source])
    with pytest.raises(DataError, match="no images were given"):
        find_images([])


def test_what_pillow_reads_is_found_and_the_rest_is_counted_by_kind(tmp_path):
    read = ["a.png", "b.JPG", "c.jpe", "d.jp2", "e.mpo", "f.tga", "g.ico", "h.webp", "i.dib"]
    for name in (*read, "j.HEIC", "k.heic", "l.dng", "m.mp4", "n.h5", "no_ending"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    left_out: Counter[str] = Counter()
    found = find_images([tmp_path], left_out)
    assert [image.path.name for image in found] == read
    assert left_out == {
        ".heic": 2,
        ".dng": 1,
        ".mp4": 1,
        ".h5": 1,
        "without suffix": 1,
        "broken link": 1,
        "not a regular file": 1,
    }
    text = describe_left_out(left_out)
    assert text.startswith("2 .heic, ")
    assert "pip install pillow-heif" in text
    assert "\n" not in text


def test_hidden_files_are_passed_over_in_folders_and_patterns_and_taken_when_named(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".cache/b.jpg", "__MACOSX/._c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    left_out: Counter[str] = Counter()
    assert names(find_images([tmp_path], left_out)) == ["a"]
    assert not left_out
    assert names(find_images([f"{tmp_path}/**/*"])) == ["a"]
    assert names(find_images([tmp_path / "._a.jpg"])) == ["._a"]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a.png").write_bytes(b"")
    (tmp_path / "disk" / "deep" / "up").symlink_to(tmp_path / "disk")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk")
    assert names(find_images([tmp_path / "photos"])) == ["linked/deep/a"]


def test_patterns_for_anything_take_images_and_patterns_for_a_kind_take_it(tmp_path):
    for name in ("a.png", "a.txt", "a.heic"):
        (tmp_path / name).write_bytes(b"")
    left_out: Counter[str] = Counter()
    found = find_images([f"{tmp_path}/*"], left_out)
    assert ([image.path.name for image in found], left_out) == (
        ["a.png"],
        {".txt": 1, ".heic": 1},
    )
    assert [i.path.name for i in find_images([f"{tmp_path}/*.heic"])] == ["a.heic"]
    (tmp_path / "a.png").unlink()
    for source in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(DataError, match=r"1 \.heic"):
            find_images([source])


def test_a_quoted_tilde_is_expanded_unless_such_a_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    assert [i.path for i in find_images(["~/a.png"])] == [tmp_path / "a.png"]
    assert [i.path for i in find_images(["~/*.png"])] == [tmp_path / "a.png"]
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.png").write_bytes(b"")
    assert [i.path for i in find_images(["~/a.png"])] == [Path("~/a.png")]
    with pytest.raises(DataError, match="home folder"):
        find_images(["~nobody_of_this_name/a.png"])


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("nostore://bucket/a.jpg", "no file", "download"),
        ("x" * 5000, "no file", "spelling"),
        ("gone.png", "broken link", "spelling"),
    ],
)
def test_names_that_are_not_files(tmp_path, monkeypatch, source, message, hint):
    monkeypatch.chdir(tmp_path)
    Path("gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=message) as caught:
        find_images([source])
    assert hint in str(caught.value.hint)


def test_a_store_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError) as caught:
        find_images(["s3://bucket/a.jpg"])
    assert "pip install s3fs" in str(caught.value.hint)
