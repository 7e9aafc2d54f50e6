"""Installations that this user may not change are left as they are, with the reason."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxydet.errors import RuntimeEnvironmentError
from proxydet.runtime.patch import apply_patch, patch_status

needs_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="needs root, to be another user"
)


def folder_content(file: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in file.parent.iterdir() if p.is_file()}


def test_read_only_installations_are_refused_as_such(roi_align_file, monkeypatch):
    before = folder_content(roi_align_file)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert patch_status(roi_align_file).writable is False
    with pytest.raises(RuntimeEnvironmentError, match="read-only") as caught:
        apply_patch(roi_align_file)
    assert "published" in (caught.value.hint or "")
    assert apply_patch(roi_align_file, dry_run=True).changed
    assert folder_content(roi_align_file) == before


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user reaches."""
    folder = Path(tempfile.mkdtemp(prefix="proxydet-patch-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_another_user(file: Path, group: int) -> str:
    """What another user is told who tries to apply the patch: its refusal; as root only."""
    code = (
        "import os, sys; from pathlib import Path; from proxydet.runtime.patch import apply_patch; "
        "from proxydet.errors import RuntimeEnvironmentError\n"
        f"os.setgroups([]); os.setgid({group}); os.setuid(65534)\n"
        "try: apply_patch(Path(sys.argv[1]))\n"
        "except RuntimeEnvironmentError as error: print(error.message)"
    )
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_root
@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "message"),
    [
        (0o755, 0o644, "is read-only"),
        (0o755, 0o664, "is read-only"),
        (0o775, 0o644, "is read-only"),
        (0o775, 0o664, "belongs to another user"),
    ],
)
def test_files_of_another_user_are_left_to_them(
    roi_align_file, open_folder, folder_mode, file_mode, message
):
    file = Path(shutil.copy(roi_align_file, open_folder))
    for path, mode in ((open_folder, folder_mode), (file, file_mode)):
        os.chown(path, 0, 65533)
        path.chmod(mode)
    before = folder_content(file)
    assert message in as_another_user(file, group=65533)
    assert folder_content(file) == before


@needs_root
def test_root_keeps_the_owner_of_what_it_replaces(roi_align_file):
    os.chown(roi_align_file, 65534, 65533)
    apply_patch(roi_align_file)
    owners = {(p.stat().st_uid, p.stat().st_gid) for p in roi_align_file.parent.iterdir()}
    assert owners == {(65534, 65533)}


@needs_root
def test_compiled_files_that_would_stay_are_told_before_anything_is_done(
    roi_align_file, open_folder
):
    file = Path(shutil.copy(roi_align_file, open_folder))
    py_compile.compile(str(file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    for path in (open_folder, file):
        os.chown(path, 65534, 65533)
    before = folder_content(file)
    assert "its compiled file may not be deleted" in as_another_user(file, group=65533)
    assert folder_content(file) == before
