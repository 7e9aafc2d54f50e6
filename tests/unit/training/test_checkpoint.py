"""Checkpoints: whole or not at all, rotated, checked."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from proxydet.errors import CheckpointError, DiskFullError, RuntimeEnvironmentError
from proxydet.paths import list_checkpoints
from proxydet.training.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    read_header,
)
from proxydet.training.config import CheckpointConfig
from proxydet.weight_files import write_state


def folder(tmp_path: Path, **config: object) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", CheckpointConfig(**config))


def state(value: float) -> dict:
    weights = {"w": torch.full((1000,), value)}
    return {"model": weights, "optimizer": {}, "iteration": int(value), "window": {}}


def saved(checkpoints: CheckpointFolder, value: float, best: int | None = None) -> Path:
    """Write a checkpoint and wait for it."""
    checkpoints.save(state(value), int(value), best)
    checkpoints.wait()
    return checkpoints.path(int(value))


def iterations(found: CheckpointFolder) -> list[int]:
    return [iteration for iteration, _ in list_checkpoints(found.folder)]


def test_round_trip(tmp_path):
    checkpoints = folder(tmp_path)
    path = saved(checkpoints, 5.0)
    assert path.name == "step_0000005.pth"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], torch.full((1000,), 5.0))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    header = read_header(path)
    assert (header["iteration"], header["run"]) == (5, {})


@pytest.fixture
def held_back(monkeypatch) -> threading.Event:
    """Checkpoints are written once this is set."""
    go_ahead = threading.Event()

    def late(*arguments: object, **options: object) -> None:
        assert go_ahead.wait(60)
        write_state(*arguments, **options)

    monkeypatch.setattr("proxydet.training.checkpoint.write_state", late)
    return go_ahead


def test_training_need_not_wait_for_a_checkpoint(tmp_path, held_back):
    checkpoints, content = folder(tmp_path), state(3.0)
    content["again"] = content["model"]["w"]
    checkpoints.save(content, 3)
    content["model"]["w"].zero_()  # the next step changes the weights in place
    checkpoints.check()
    assert iterations(checkpoints) == []
    held_back.set()
    checkpoints.wait()
    loaded = load_checkpoint(checkpoints.path(3))
    assert torch.equal(loaded["model"]["w"], torch.full((1000,), 3.0))
    assert checkpoints.path(3).stat().st_size < 2 * 4000, "what occurs twice is written once"


def test_leaving_and_the_next_checkpoint_wait_for_the_one_before(tmp_path, held_back):
    with folder(tmp_path, keep_last=3) as checkpoints:
        checkpoints.save(state(1.0), 1)
        threading.Timer(0.05, held_back.set).start()
        checkpoints.save(state(2.0), 2)
        assert 1 in iterations(checkpoints)
    assert iterations(checkpoints) == [1, 2]


def leave(checkpoints: CheckpointFolder, value: float, error: BaseException | None) -> None:
    """Save, and end the training, by an error if there is one."""
    with checkpoints:
        checkpoints.save(state(value), int(value))
        if error is not None:
            raise error


def test_a_failed_write_is_raised_later_and_next_to_another_error_only_said(
    tmp_path, monkeypatch, caplog
):
    checkpoints = folder(tmp_path)
    saved(checkpoints, 1.0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    def steps() -> None:
        while True:
            checkpoints.check()

    checkpoints.save(state(2.0), 2)
    with pytest.raises(DiskFullError, match="step_0000002"):
        steps()
    checkpoints.check()  # once
    with pytest.raises(KeyError):
        leave(checkpoints, 3.0, KeyError())
    assert "step_0000003" in caplog.text
    with pytest.raises(DiskFullError, match="step_0000004"):
        leave(checkpoints, 4.0, None)
    assert iterations(checkpoints) == [1]


def test_any_failure_of_the_writer_leaves_the_true_error(tmp_path, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("proxydet.training.checkpoint.write_state", fail)
    with pytest.raises(KeyError):
        leave(folder(tmp_path), 1.0, KeyError())
    assert "MemoryError" in caplog.text


def test_a_second_ctrl_c_does_not_wait_and_leaves_nothing(tmp_path, held_back):
    checkpoints = folder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        leave(checkpoints, 1.0, KeyboardInterrupt())
    held_back.set()
    with pytest.raises(RuntimeEnvironmentError, match="step_0000001"):
        checkpoints.wait()
    assert list(checkpoints.folder.iterdir()) == []


def test_rotation_keeps_newest_milestones_and_best(tmp_path):
    checkpoints = folder(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 110, 10):
        saved(checkpoints, step, best=30 if step >= 30 else None)
    assert iterations(checkpoints) == [30, 40, 80, 90, 100]
    checkpoints.rotate(best=90)
    assert iterations(checkpoints) == [40, 80, 90, 100]
    without_best = CheckpointFolder(checkpoints.folder, CheckpointConfig(keep_best=False))
    without_best.rotate(best=40)
    assert iterations(without_best) == [90, 100]


def test_of_each_interval_the_first_checkpoint_is_kept(tmp_path):
    """A step may be more than an iteration, or the period not divide the interval."""
    checkpoints = folder(tmp_path, keep_last=1, keep_every=10)
    for step in (3, 6, 9, 12, 15, 18, 21, 24, 35, 47, 50):
        saved(checkpoints, step)
    assert iterations(checkpoints) == [12, 21, 35, 47, 50]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, None])
def test_a_checkpoint_that_the_machine_cannot_read_now_is_not_passed_over(
    tmp_path, monkeypatch, number
):
    checkpoints = folder(tmp_path)
    saved(checkpoints, 1.0)
    newest = saved(checkpoints, 2.0)
    opened = Path.open

    def fail(self: Path, *words: object, **options: object) -> object:
        if self == newest:
            raise MemoryError if number is None else OSError(number, os.strerror(number))
        return opened(self, *words, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(RuntimeEnvironmentError, match=newest.name) as caught:
        checkpoints.load_newest()
    assert caught.value.path == newest
    assert iterations(checkpoints) == [1, 2]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, damage, caplog):
    checkpoints = folder(tmp_path)
    saved(checkpoints, 1.0)
    newest = saved(checkpoints, 2.0)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        place = content.index(torch.full((10,), 2.0).numpy().tobytes()) + 17
        content[place] ^= 4
    damaged = {"truncated": content[:-600], "empty": b"", "text": b"hello"}.get(damage, content)
    newest.write_bytes(bytes(damaged))
    with caplog.at_level(logging.WARNING):
        loaded, path = checkpoints.load_newest()
    assert path.name == "step_0000001.pth"
    assert loaded["iteration"] == 1
    assert "step_0000002.pth" in caplog.text
    assert "Falling back" in caplog.text


def test_other_values_than_were_written_are_never_loaded(tmp_path):
    """As far as zip checksums go, this is a good file."""
    path = tmp_path / "a.pth"
    write_state(state(1.0), path)
    content = torch.load(path, weights_only=True)
    content["model"]["w"][3] = 2.0
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        load_checkpoint(path)
    assert caught.value.path == path


def test_damage_anywhere_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.pth"
    write_state(state(1.0), path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    expected = load_checkpoint(path)["model"]["w"]
    directory = whole.index(b"PK\x01\x02")
    # Bits of the zip directory, where most of what the readers do not check lies, and of all else.
    places = [*range(directory, len(whole)), *random.integers(0, len(whole), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert error.path == path  # noqa: PT017 - most raise, some do not
        else:
            assert torch.equal(loaded["model"]["w"], expected)
            assert loaded["iteration"] == 1


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    torch.save({"format": 1, **state(3.0)}, tmp_path / "old.pth")
    assert load_checkpoint(tmp_path / "old.pth")["iteration"] == 3
    assert read_header(tmp_path / "old.pth")["run"] == {}


def test_nothing_to_load_and_nothing_readable(tmp_path):
    checkpoints = folder(tmp_path)
    assert checkpoints.load_newest() is None
    checkpoints.folder.mkdir()
    checkpoints.path(3).write_bytes(b"")
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        checkpoints.load_newest()


def test_other_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("absent.pth", "pipe.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not a training checkpoint") as caught:
        load_checkpoint(tmp_path / "weights.pth")
    assert "--weights" in str(caught.value.hint)
    torch.save({"format": 1, "x": Path("a")}, tmp_path / "unsafe.pth")
    with pytest.raises(CheckpointError, match=r"unsafe\.pth .*pathlib"):
        load_checkpoint(tmp_path / "unsafe.pth")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path, monkeypatch, wrapped):
    def fail(content: object, file: object) -> None:
        file.write(b"half")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not wrapped:
            raise full
        message = "PytorchStreamWriter failed writing file data/0: file write failed"
        raise RuntimeError(message) from full

    monkeypatch.setattr(torch, "save", fail)
    path = tmp_path / "model.pth"
    path.write_bytes(b"before")
    with pytest.raises(DiskFullError):
        write_state(state(1.0), path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
