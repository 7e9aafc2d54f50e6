"""How a process tells why it failed, and which failure the user reads."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxydet.errors import DataError, Interrupted, NumericsError, TrainingError
from proxydet.training.failures import LAUNCHED, as_error, first_failure, worker_log
from proxydet.training.launcher import _killed, in_worker, requeue


def fail(folder: Path, rank: int, error: BaseException) -> None:
    with pytest.raises(type(error)), worker_log(folder, rank):
        raise error


def test_nothing_is_recorded_when_nothing_fails(tmp_path: Path) -> None:
    logger = logging.getLogger("proxydet.training")
    with worker_log(tmp_path, 0) as path:
        logger.info("hello")
    logger.info("after")
    assert "hello" in path.read_text()
    assert "after" not in path.read_text()
    assert first_failure(tmp_path, 0.0) is None


def test_the_level_of_the_log_is_put_back(tmp_path: Path) -> None:
    logger = logging.getLogger("proxydet")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with worker_log(tmp_path, 0):
            assert logger.level == logging.INFO
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)


def test_the_cause_comes_before_its_echoes(tmp_path: Path) -> None:
    since = time.time()
    fail(tmp_path, 0, RuntimeError("Connection closed by peer"))
    fail(tmp_path, 2, DataError("no image", hint="look"))
    fail(tmp_path, 1, NumericsError("nan"))
    record = first_failure(tmp_path, since)
    assert (record.rank, record.kind) == (2, "DataError")
    error = as_error(record, 4)
    assert type(error) is DataError
    assert error.message == "Process 2 of 4: no image"
    assert error.hint == f"look Its log: {tmp_path / 'rank_2.log'}"
    assert first_failure(tmp_path, time.time() + 1) is None


def test_an_error_of_all_processes_names_the_one_where_it_arose(tmp_path: Path) -> None:
    message = "At iteration 5, loss_box is nan in process 2 on images 7."
    for rank in (0, 2, 1):
        fail(tmp_path, rank, NumericsError(message, hint="look", rank=2))
    record = first_failure(tmp_path, 0.0)
    assert record.rank == 2
    error = as_error(record, 3)
    assert type(error) is NumericsError
    assert error.message == message
    assert error.hint == f"look Its log: {tmp_path / 'rank_2.log'}"


def test_a_bug_becomes_a_training_error_and_its_traceback_is_logged(tmp_path: Path) -> None:
    fail(tmp_path, 3, KeyError("boxes"))
    error = as_error(first_failure(tmp_path, 0.0), 4)
    assert type(error) is TrainingError
    assert "Process 3 of 4: KeyError: 'boxes'" in error.message
    assert "Traceback" in (tmp_path / "rank_3.log").read_text()


def test_a_stop_keeps_its_signal(tmp_path: Path) -> None:
    fail(tmp_path, 0, Interrupted("stopped", signal_number=15, hint="again"))
    error = as_error(first_failure(tmp_path, 0.0), 2)
    assert isinstance(error, Interrupted)
    assert error.exit_code == 143
    assert error.message == "stopped"


def test_under_our_launcher_a_process_ends_quietly_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    with pytest.raises(SystemExit) as caught, worker_log(tmp_path, 0):
        raise DataError("no image")
    assert caught.value.code == 3
    assert first_failure(tmp_path, 0.0).message == "no image"


def test_workers_are_known_by_their_environment() -> None:
    assert in_worker({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert not in_worker({"RANK": "0"})


def test_requeue_once_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert requeue({"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}, ran.append)
    assert ran == [["/bin/scontrol", "requeue", "7"]]
    assert not requeue({"SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}, ran.append)
    assert not requeue({}, ran.append)
    assert len(ran) == 1


def test_a_killed_process_is_told_from_those_that_the_launcher_ended() -> None:
    """When one process dies the launcher ends the others with SIGTERM; which of them it lists first says nothing."""

    def ended(number: int, name: str) -> SimpleNamespace:
        return SimpleNamespace(exitcode=-number, signal_name=lambda: name)

    failures = {0: ended(15, "SIGTERM"), 1: ended(9, "SIGKILL")}
    error = SimpleNamespace(failures=failures, get_first_failure=lambda: (0, failures[0]))
    assert _killed(error) == (1, "SIGKILL")
    del failures[1]
    assert _killed(error) == (0, "")
