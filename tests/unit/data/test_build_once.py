import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from proxydet.data.build_once import build_once


def _count(folder: Path, results: "multiprocessing.Queue[float]") -> None:
    def build(path: Path) -> None:
        with (folder / "log").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        (folder / "part").write_text("whole")
        (folder / "part").replace(path)

    build_once(folder / "target", build)
    results.put(float((folder / "target").read_text() == "whole"))


def test_one_of_many_processes_builds_and_all_see_the_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_count, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [results.get(timeout=5) for _ in processes] == [1, 1, 1]
    assert (tmp_path / "log").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "target"]


def test_an_existing_file_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("there")
    build_once(tmp_path / "t", lambda _: pytest.fail("built"))


def test_a_failed_build_frees_the_lock_and_the_next_one_builds(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        build_once(tmp_path / "t", fail)
    build_once(tmp_path / "t", lambda path: path.write_text("x") and None)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_dead_owners_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "t.lock").write_text("dead 1")
    start = time.monotonic()
    build_once(tmp_path / "t", lambda path: path.write_text("x") and None, stale_after_s=0.3)
    assert 0.3 <= time.monotonic() - start < 10
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_living_owners_lock_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxydet.data.build_once._TOUCH_S", 0.05)
    built = []

    def slow(path: Path) -> None:
        built.append(1)
        time.sleep(1.0)
        path.write_text("x")

    first = threading.Thread(target=build_once, args=(tmp_path / "t", slow))
    first.start()
    time.sleep(0.2)
    build_once(tmp_path / "t", slow, stale_after_s=0.4)
    first.join()
    assert built == [1]


def test_a_file_that_came_between_the_look_and_the_lock_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(lock: Path) -> bool:
        (tmp_path / "t").write_text("another's")
        lock.touch()
        return True

    monkeypatch.setattr("proxydet.data.build_once._take", take)
    build_once(tmp_path / "t", lambda _: pytest.fail("built"))
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
