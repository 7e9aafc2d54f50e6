"""Threads for transfers: they never keep the interpreter alive, and Ctrl-C reaches the caller at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 3.0


def run_workers(jobs: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run each job in a thread of its own and wait for all.

    When the wait is interrupted (Ctrl-C), ``stop`` is set, the jobs get a moment to notice, and the interruption is
    passed on. A job that is stuck in a read by then is left behind: it only ever writes to a hidden file.

    Args:
        jobs: What to run.
        stop: The sign that jobs watch for.

    Raises:
        BaseException: The first one that a job raised, after all have ended.
    """
    if len(jobs) == 1:
        jobs[0]()
        return
    raised: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(_GRACE_SECONDS / len(threads))
        raise
    if raised:
        raise raised[0]
