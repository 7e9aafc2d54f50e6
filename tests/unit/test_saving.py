"""Files appear whole or not at all, and errors name them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proxydet.errors import DiskFullError, EnvironmentProblem
from proxydet.saving import saving, staged, write_whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(DiskFullError, match=r"no room .* to write .*/a\.txt") as caught,
        saving(tmp_path / "a.txt"),
    ):
        raise OSError(number, "full")
    assert caught.value.path == tmp_path / "a.txt"
    assert "free some space" in str(caught.value.hint)


def test_other_errors_of_the_disk_are_told_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentProblem, match=r"a\.txt cannot be written: not allowed") as caught,
        saving(tmp_path / "a.txt"),
    ):
        raise PermissionError(errno.EACCES, "not allowed")
    assert not isinstance(caught.value, DiskFullError)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_whole(b"old", tmp_path / "new" / "a.bin")

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(DiskFullError):
        write_whole(b"new", target)
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_a_staged_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.onnx"
    with staged(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    with pytest.raises(DiskFullError), staged(target) as temporary, saving(temporary):
        raise OSError(errno.ENOSPC, "full")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


KILLED = """
import os, signal, sys
from pathlib import Path
from proxydet.saving import staged
with staged(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    pytest.importorskip("fcntl", reason="no file locks on this system")
    target = tmp_path / "model.onnx"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    other = tmp_path / f".{'0' * 32}.other.onnx"
    other.touch()
    with staged(target) as first:
        assert not left.exists()
        with staged(target) as second:
            assert first.exists()
            os.write(os.open(second, os.O_WRONLY), b"second")
        assert target.read_bytes() == b"second"
    assert sorted(tmp_path.iterdir()) == sorted([other, target])
