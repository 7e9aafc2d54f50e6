"""How a process of a training tells the launcher, and the user, why it failed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from proxydet import errors
from proxydet.errors import Interrupted, NumericsError, ProxydetError, TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """Why one process failed."""

    rank: int
    """Its number; for an error that every process raises, that of the process where it arose."""

    kind: str
    """Name of the error's class."""

    message: str
    """What happened."""

    hint: str | None
    """What to do."""

    expected: bool
    """Whether it is one of this program's own errors; any other may be the echo of another process's failure."""

    signal_number: int
    """Signal that stopped the process, 0 for none."""

    time: float
    """When, in seconds since 1970."""

    log: str
    """Log file of the process with this number."""

    names_process: bool = False
    """Whether the message says which process it is."""


LAUNCHED = "PROXYDET_LAUNCHED"
"""Environment variable that our launcher sets to its process id: it reports the failures of its processes itself."""


@contextmanager
def worker_log(folder: Path, rank: int, level: int = logging.INFO) -> Iterator[Path]:
    """Write the log of this process to ``rank_N.log``, and its failure, if it fails, to ``rank_N.failure.json``.

    Args:
        folder: The run's folder of logs.
        rank: Number of this process.
        level: Least level that is logged.

    Raises:
        SystemExit: In place of any error, where our launcher will report it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("proxydet")
    before = package.level
    package.setLevel(min(level, package.getEffectiveLevel()))
    package.addHandler(handler)
    try:
        yield path
    except BaseException as error:
        # Written down and raised again, whatever it is: the launcher has no other way to know.
        _write_failure(error, folder, rank, path)
        if LAUNCHED not in os.environ:
            raise
        raise SystemExit(error.exit_code if isinstance(error, ProxydetError) else 1) from error
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        handler.close()


def first_failure(folder: Path, since: float) -> FailureRecord | None:
    """Return the failure that came first, before those that it caused in other processes.

    Args:
        folder: The run's folder of logs.
        since: Seconds since 1970; older records are of another attempt.
    """
    records = []
    for path in folder.glob("rank_*.failure.json"):
        record = FailureRecord(**json.loads(path.read_text(encoding="utf-8")))
        if record.time >= since:
            records.append(record)
    return min(records, key=lambda r: (not r.expected, r.time), default=None)


def as_error(record: FailureRecord, processes: int) -> ProxydetError:
    """Turn the record of another process into an error to raise here, of the same class."""
    if record.kind == Interrupted.__name__:
        return Interrupted(record.message, signal_number=record.signal_number, hint=record.hint)
    where = "" if record.names_process else f"Process {record.rank} of {processes}: "
    known = getattr(errors, record.kind, None)
    cls = known if record.expected and isinstance(known, type) else TrainingError
    hint = " ".join(filter(None, [record.hint, f"Its log: {record.log}"]))
    return cls(where + record.message, hint=hint)  # type: ignore[no-any-return]


def _write_failure(error: BaseException, folder: Path, rank: int, log: Path) -> None:
    expected = isinstance(error, ProxydetError)
    if not expected:
        logger.critical("Process %d failed", rank, exc_info=error)
    arose = error.rank if isinstance(error, NumericsError) else None
    if arose is not None:
        log = folder / f"rank_{arose}.log"
    record = FailureRecord(
        rank=rank if arose is None else arose,
        kind=type(error).__name__,
        message=error.message
        if isinstance(error, ProxydetError)
        else f"{type(error).__name__}: {error}",
        hint=error.hint if isinstance(error, ProxydetError) else None,
        expected=expected,
        signal_number=error.signal_number if isinstance(error, Interrupted) else 0,
        time=time.time(),
        log=str(log),
        names_process=arose is not None,
    )
    temporary = folder / f".rank_{rank}.failure.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / f"rank_{rank}.failure.json")
