"""Where files are to be saved is checked before the work, not after it."""

import os
from pathlib import Path

import pytest

from proxydet.errors import ConfigError, RuntimeEnvironmentError
from proxydet.inference.writers import check_folder, choose_folder


def test_a_folder_that_can_be_made_is_accepted_and_not_made(tmp_path):
    check_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("x")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(RuntimeEnvironmentError, match="taken is a file, not a folder"):
            check_folder(folder)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RuntimeEnvironmentError, match="cannot be written to"):
        check_folder(tmp_path / "new")


def test_earlier_results_are_not_replaced_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path("a.jpg"), Path("coco.json")]
    assert choose_folder(None, files) == Path("predictions")
    for taken, chosen in (("predictions", "predictions-2"), ("predictions-2", "predictions-3")):
        Path(taken).mkdir()
        Path(taken, "coco.json").touch()
        assert choose_folder(None, files) == Path(chosen)
        assert choose_folder(None, [Path("b.jpg")]) == Path("predictions")
    assert choose_folder(None, files, overwrite=True) == Path("predictions")
    with pytest.raises(ConfigError, match=r"predictions.*coco\.json") as caught:
        choose_folder(Path("predictions"), files)
    assert "--overwrite" in str(caught.value.hint)
    assert choose_folder(Path("predictions"), files, overwrite=True) == Path("predictions")
    assert choose_folder(Path("new"), files) == Path("new")
