"""Where files are to be saved is looked at before the work, not after it."""

import os

import pytest

from proxydet.errors import EnvironmentProblem
from proxydet.prediction_output import check_folder


def test_a_folder_that_can_be_made_is_accepted_and_not_made(tmp_path):
    check_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("x")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(EnvironmentProblem, match="taken is a file, not a folder"):
            check_folder(folder)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EnvironmentProblem, match="cannot be written to"):
        check_folder(tmp_path / "new")
